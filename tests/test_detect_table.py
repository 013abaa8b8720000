"""The table that ``print(report)`` shows, on reports made by hand."""

import pytest

from sphereopt.detect.report import Evidence, Finding, SphereReport

SMALL = """\
parameter    shape     sphere     status  euler  real eps  radial   reason
conv.weight  16x3x3x3  row        proved  1e-16  3e-02 !   2.1e-06  16 spheres of 27 entries
conv.bias    16        -          inert   -      -         -        norm subtracts it
fc.weight    8x16      tensor *1  proved  0      2e-05     4e-09    together before norm2
fc.bias      8         tensor *1  proved  0      2e-05     4e-09    together before norm2
scale        scalar    -          none    1e+00  -         1        a single entry: it has no direction
head.weight  10x8      -          none    3e-01  -         0.35     head (Linear) gives the outputs
*1 jointly: fc.weight, fc.bias
6 parameter tensors: 3 proved, 1 inert, 2 none; 85.4 % of all entries on proved spheres.
Inert, they waste memory and weight decay drives them: conv.bias
1 rescaling symmetry besides the spheres (for any c > 0):
  a * c, b / c^2, d * c^0.5
Note: proved for the training function.
! above 0.01: at these weights the normalization eps is not small against the variance, so their norm still matters."""  # noqa: E501


def report(*findings, **rest):
    return SphereReport({f.name: f for f in findings}, **rest)


def finding(name, sphere="row", joint=(), status="proved", shape=(4, 3), evidence=None, reason=""):
    return Finding(name, shape, sphere, tuple(joint), status, evidence, reason)


def lines(*findings, **rest):
    return str(report(*findings, **rest)).splitlines()


def test_small_report():
    far = Evidence(1.2e-16, 1e-13, 0.034, 2.1e-6, 3)
    near = Evidence(0.0, 1e-13, 2e-5, 4e-9, 3)
    alone, head = Evidence(1.0, None, None, 1.0, 3), Evidence(0.31, None, None, 0.35, 3)
    why = "together before norm2"
    rows = (
        ("conv.weight", (16, 3, 3, 3), "row", (), "proved", far, "16 spheres of 27 entries"),
        ("conv.bias", (16,), None, (), "inert", None, "norm subtracts it"),
        ("fc.weight", (8, 16), "tensor", ("fc.bias",), "proved", near, why),
        ("fc.bias", (8,), "tensor", ("fc.weight",), "proved", near, why),
        ("scale", (), None, (), "none", alone, "a single entry: it has no direction"),
        ("head.weight", (10, 8), None, (), "none", head, "head (Linear) gives the outputs"),
    )
    found = report(
        *(Finding(*row) for row in rows),
        symmetries=({"a": 1.0, "b": -2.0, "d": 0.5},),
        notes=("proved for the training function.",),
    )
    # 432 + 128 + 8 of 665 entries.
    assert str(found) == SMALL


def test_empty_report():
    assert lines() == [
        "parameter  shape  sphere  status  euler  real eps  radial  reason",
        "0 parameter tensors: none; 0.0 % of all entries on proved spheres.",
    ]


def test_joint_sets_are_numbered_once_each():
    first, second = ("a", "b"), ("c", "d", "e")
    members = [*first, *second]
    found = [
        finding(name, joint=[n for n in own if n != name])
        for own in (first, second)
        for name in own
    ]
    text = lines(*found)
    assert [line.split()[3] for line in text[1:6]] == ["*1", "*1", "*2", "*2", "*2"]
    assert [line.split()[0] for line in text[1:6]] == members
    assert text[6:8] == ["*1 jointly: a, b", "*2 jointly: c, d, e"]


def test_long_lists_are_shortened():
    names = [f"layers.{i}.weight" for i in range(7)]
    joint = [finding(n, joint=[m for m in names if m != n]) for n in names]
    assert (
        "*1 jointly: layers.0.weight, layers.1.weight, layers.2.weight, layers.3.weight and 3 more"
    ) in lines(*joint)
    inert = [finding(f"b{i}", None, status="inert") for i in range(15)]
    assert any(line.endswith("b10, b11 and 3 more") for line in lines(*inert))
    many = tuple({f"v{i}": 1.0, f"o{i}": -1.0} for i in range(6))
    text = lines(symmetries=many)
    assert "6 rescaling symmetries besides the spheres (for any c > 0):" in text
    assert text[-5:] == [*(f"  v{i} * c, o{i} / c" for i in range(4)), "  and 2 more"]
    wide = ({f"w{i}": 1.0 for i in range(9)},)
    assert lines(symmetries=wide)[-1] == "  w0 * c, w1 * c, w2 * c, w3 * c and 5 more"


def test_a_joint_set_without_a_sphere_is_not_one():
    text = lines(finding("a", None, ("b",), "none"), finding("b", None, ("a",), "none"))
    assert not any("*" in line for line in text)


@pytest.mark.parametrize("value", [None, 0.0, 0.01])
def test_real_eps_is_marked_above_the_threshold_only(value):
    text = str(report(finding("a", evidence=Evidence(0.0, None, value, None, 3))))
    assert "!" not in text


def test_totals_count_every_status():
    text = lines(
        finding("a"),
        finding("b"),
        finding("c", status="numerical"),
        finding("d", None, status="inert"),
        finding("e", None, status="none"),
    )
    # Only what is proved counts as covered: 2 of 5 tensors of the same size.
    assert text[6] == (
        "5 parameter tensors: 2 proved, 1 numerical, 1 inert, 1 none; "
        "40.0 % of all entries on proved spheres."
    )


def test_pieces_are_shown_as_they_are():
    text = lines(finding("qkv.weight", "block:2@0:2,row@2:3"))
    assert "block:2@0:2,row@2:3" in text[1]
    assert "75.0 % of all entries" in text[2]


def test_long_texts_are_folded_and_nothing_is_lost():
    reason = " ".join(f"word{i}" for i in range(90))
    note = " ".join(f"note{i}" for i in range(90))
    names = [f"encoder.layers.{i}.attention.output.dense.bias" for i in range(12)]
    inert = [finding(n, None, status="inert") for n in names]
    text = lines(finding("a", reason=reason), *inert, notes=(note,))
    assert max(map(len, text)) <= 200
    words = " ".join(text).split()
    assert [w for w in words if w.startswith("word")] == reason.split()
    assert [w for w in words if w.startswith("note")] == note.split()
    start = text[0].index("reason")  # what is folded stays in its column
    assert text[1][start:].startswith("word0 ")
    assert text[2].startswith(" " * start + "word")


def test_a_name_longer_than_the_line_leaves_room_for_the_reason():
    name = ".".join(["module"] * 40)
    text = lines(finding(name, reason="one two three four"))
    assert text[1].startswith(name)
    assert text[1].endswith("one two three four")


def test_ascii_and_one_line_each():
    odd = finding("größe.weight", reason="the – dash\nand a second line")
    text = str(report(odd, symmetries=({"größe.weight": 1.0},), notes=("π",)))
    assert text.isascii()
    assert "gr\\xf6\\xdfe.weight" in text
    assert "the \\u2013 dash and a second line" in text
    assert not any(line != line.rstrip() for line in text.splitlines())


def test_str_of_a_report_read_back_is_the_same():
    found = report(
        finding("a", joint=("b",), evidence=Evidence(1e-16, 1e-12, 0.5, 1e-9, 3)),
        finding("b", joint=("a",)),
        symmetries=({"a": 1.0, "b": -1.0},),
        notes=("one",),
    )
    assert str(SphereReport.from_json(found.to_json())) == str(found)
