"""Spheres inside tensors: specs, views that are views, sums that keep their digits."""

from __future__ import annotations

from itertools import chain

import numpy as np
import pytest
import torch
from reference import vectors
from torch import Tensor

from sphereopt import products, spheres
from sphereopt.geometry import transport_views
from sphereopt.spheres import SphereSpec

EXACT = {"rtol": 1e-12, "atol": 1e-12}
SPECS = pytest.mark.parametrize(("sphere", "shape"), vectors.SPECS)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


# Specs


@pytest.mark.parametrize(
    ("sphere", "spec"),
    [
        ("tensor", SphereSpec("tensor")),
        ("row", SphereSpec("row")),
        ("col", SphereSpec("col")),
        ("block:1", SphereSpec("block", 1)),
        ("block:12", SphereSpec("block", 12)),
        ("tensor@0:1", SphereSpec("tensor", 1, 0, 1)),
        ("row@10:200", SphereSpec("row", 1, 10, 200)),
        ("block:8@512:1024", SphereSpec("block", 8, 512, 1024)),
    ],
)
def test_parse(sphere, spec):
    assert spheres.parse(sphere) == spec
    assert str(spec) == sphere
    assert spheres.pieces(sphere) == (sphere,)


@pytest.mark.parametrize(
    "sphere",
    [
        *("", "filter", "ROW", " row", "row:2", "tensor:1", "block", "block:", "block:0"),
        *("block:-1", "block:x", "block:2.0", "block: 2", "block:2:3", "blocks:2", "block:02"),
        *("row@", "row@4", "row@4:", "row@:4", "row@-4:4", "row@ 0:4", "row@0:4:2", "row@00:4"),
        *("row@1.0:4", "row@a:b", "@0:4", "row@0-4", "block@0:4", "row@0:\u0664"),
        *(None, 3, True, b"row"),
    ],
)
def test_parse_names_what_it_cannot_read(sphere):
    for read in (spheres.parse, spheres.pieces):
        with pytest.raises(ValueError, match="is not a sphere spec; use 'tensor', 'row', 'col' or"):
            read(sphere)


@pytest.mark.parametrize(
    ("sphere", "message"),
    [
        ("row@4:4", "'row@4:4' has no rows; START must be less than STOP"),
        ("row@5:4", "'row@5:4' has no rows"),
        ("col@0:4", "'col@0:4' limits columns to some rows; use 'col' alone"),
        ("row@0:4,", "sphere='row@0:4,' has a wrong piece: sphere='' is not a sphere spec"),
        ("row@0:4, row@4:8", "has a wrong piece: sphere=' row@4:8' is not a sphere spec"),
        ("row@0:4,col@4:8", "has a wrong piece: sphere='col@4:8' limits columns"),
        ("row,tensor@0:4", "has several pieces, so 'row' needs its rows: 'row@START:STOP'"),
        ("tensor@0:4,col", "has several pieces, so 'col' needs its rows"),
        ("row@0:4,row@3:8", "overlap or are out of order: 'row@3:8' begins before 'row@0:4' ends"),
        ("row@4:8,row@0:4", "overlap or are out of order: 'row@0:4' begins before 'row@4:8' ends"),
    ],
)
def test_pieces_say_what_is_wrong_with_them(sphere, message):
    for call in (spheres.pieces, lambda s: spheres.check(s, (99, 3))):
        with pytest.raises(ValueError, match=message):
            call(sphere)


def test_pieces_are_specs_in_order_and_a_view_is_of_one():
    sphere = "block:2@0:8,row@8:12,tensor@13:14"
    assert spheres.pieces(sphere) == ("block:2@0:8", "row@8:12", "tensor@13:14")
    for call in (spheres.parse, lambda s: spheres.view(torch.ones(14, 3), s)):
        with pytest.raises(ValueError, match="has several pieces; take them one by one"):
            call(sphere)


@pytest.mark.parametrize(
    ("sphere", "shape", "message"),
    [
        ("row", (), "'row' needs two or more dimensions"),
        ("row", (5,), "'row' needs two or more dimensions"),
        ("col", (5,), "'col' needs two or more dimensions"),
        ("block:2", (), "'block:2' needs a dim 0 that 2 divides"),
        ("block:2", (5, 4), "'block:2' needs a dim 0 that 2 divides"),
        ("block:8", (4, 8), "'block:8' needs a dim 0 that 8 divides"),
        ("block:3@0:8", (9, 8), "'block:3@0:8' needs a number of rows that 3 divides"),
        ("row@0:4,row@4:9", (8, 2), "'row@4:9' needs a dim 0 of 9 or more"),
        ("tensor@0:1", (), "'tensor@0:1' needs a dim 0 of 1 or more"),
        ("tensor@0:2,row@2:4", (4,), "'row@2:4' needs two or more dimensions"),
    ],
)
def test_check_says_what_does_not_fit(sphere, shape, message):
    with pytest.raises(ValueError, match=message):
        spheres.check(sphere, shape)


@pytest.mark.parametrize(
    ("sphere", "shape", "k"),
    [
        ("tensor", (), 1),
        ("row", (5, 1), 5),
        ("row", (0, 3), 0),
        ("col", (5, 1), 1),
        ("col", (4, 3, 2), 3),
        ("block:5", (5,), 5),
        ("block:2", (0, 3), 2),
        ("tensor@1:3", (4,), 1),
        ("row@1:3", (4, 2), 2),
        ("block:3@1:7,row@7:9,tensor@10:12", (12, 1, 2), 6),
    ],
)
def test_check_and_count_of_what_fits(sphere, shape, k):
    spheres.check(sphere, shape)
    views = spheres.split(torch.ones(shape), sphere)
    assert spheres.count(sphere, shape) == k == sum(v.shape[0] for v in views)


@pytest.mark.parametrize("sphere", ["row", "col"])
def test_a_vector_is_split_by_its_only_dimension_in_a_joint_sphere_only(sphere):
    spheres.check(sphere, (5,), joint=True)
    for dtype in (torch.float32, torch.complex64):
        x = torch.randn(5, dtype=dtype)
        seen = torch.view_as_real(x) if x.is_complex() else x[:, None]
        assert torch.equal(spheres.view(x, sphere), seen)
    assert spheres.count(sphere, (5,)) == 5
    with pytest.raises(ValueError, match=f"'{sphere}' needs two or more dimensions"):
        spheres.check(sphere, (5,))
    with pytest.raises(ValueError, match=f"'{sphere}' needs two or more dimensions"):
        spheres.check(sphere, (), joint=True)


# Views


def channels_last(x: Tensor) -> Tensor:
    return x.to(memory_format=torch.channels_last) if x.ndim == 4 else x


def transposed(x: Tensor) -> Tensor:
    return x.transpose(0, -1).contiguous().transpose(0, -1)


def sliced(x: Tensor) -> Tensor:
    return torch.stack([x, torch.full_like(x, torch.nan)], -1).flatten(-2)[..., ::2]


LAYOUTS = pytest.mark.parametrize("layout", [Tensor.clone, channels_last, transposed, sliced])


@SPECS
@LAYOUTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
def test_view_is_the_same_memory_sphere_by_sphere(sphere, shape, layout, dtype):
    x = layout(torch.randn(shape, dtype=dtype))
    masks = [torch.from_numpy(m) for m in vectors.masks(shape, sphere)]
    for v in (spheres.view(x, sphere), *spheres.views([x, x], sphere)):
        assert v.ndim >= 2
        assert v.shape[0] == len(masks)
        assert v.data_ptr() == x.data_ptr()
        for i, m in enumerate(masks):
            entries = torch.view_as_real(x)[m] if x.is_complex() else x[m]
            assert torch.equal(v[i].flatten().sort().values, entries.flatten().sort().values)
            v[i] = i + 1
            assert (entries != i + 1).all()  # a copy taken before the write
            assert torch.equal(
                torch.view_as_real(x)[m] if x.is_complex() else x[m], entries * 0 + i + 1
            )
            v[i] = entries.reshape(v[i].shape)


def test_view_on_channels_last_is_not_a_silent_copy():
    # weight.view(rows, -1) raises here, weight.flatten(1) copies, and an update of it is lost.
    w = torch.zeros(8, 3, 5, 5).to(memory_format=torch.channels_last)
    for sphere in ("tensor", "row", "col", "block:2"):
        spheres.view(w, sphere).add_(1)
        spheres.views([w], sphere)[0].add_(1)
    assert (w == 8).all()


@SPECS
def test_views_of_different_layouts_have_one_shape(sphere, shape):
    x = normal(*shape)
    found = spheres.views([x, channels_last(x), transposed(x), sliced(x)], sphere)
    assert len({v.shape for v in found}) == 1
    for v in found[1:]:
        assert torch.equal(v, found[0])


@pytest.mark.parametrize("sphere", ["tensor", "row", "block:2"])
def test_views_of_contiguous_tensors_are_matrices(sphere):
    x = normal(8, 3, 5, 5)
    assert [v.ndim for v in spheres.views([x, x], sphere)] == [2, 2]


@LAYOUTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
@pytest.mark.parametrize("shape", [(13,), (13, 4), (13, 3, 2, 2)])
def test_split_and_rest_share_out_every_entry_once(shape, dtype, layout):
    sphere = "block:2@1:7,tensor@7:9,block:1@10:12"
    x = layout(torch.randn(shape, dtype=dtype))
    parts = [*spheres.split(x, sphere), *spheres.rest(x, sphere)]
    # Write a number to each sphere and each row between them: all of them must arrive in x.
    number = 0
    for part in parts:
        for one in part:
            number += 1
            one.fill_(number)
    want = torch.tensor([5, 1, 1, 1, 2, 2, 2, 3, 3, 6, 4, 4, 7]).to(dtype)
    got = x.reshape(13, -1)
    if x.is_complex():  # a view of a complex tensor fills real and imaginary parts
        on = torch.tensor([0, *[1] * 8, 0, 1, 1, 0], dtype=torch.bool)
        want = torch.where(on, want * (1 + 1j), want)
    assert torch.equal(got, want[:, None].expand(got.shape))


def test_there_is_no_rest_without_ranges_or_gaps():
    x = torch.ones(4, 3)
    for sphere in ("row", "tensor", "col", "block:2", "row@0:4", "row@0:1,tensor@1:4"):
        assert spheres.rest(x, sphere) == []


# Inner products


@SPECS
@LAYOUTS
def test_dot_is_the_sum_over_the_sphere(sphere, shape, layout):
    x, y = layout(normal(*shape)), normal(*shape)
    got = products.dot([spheres.view(x, sphere)], [spheres.view(y, sphere)])
    want = vectors.numbers(np.dot, shape, sphere, x.numpy(), y.numpy())
    torch.testing.assert_close(got, torch.from_numpy(want), **EXACT)


def test_dot_of_complex_tensors_is_the_real_part():
    x, y = (torch.randn(4, 3, dtype=torch.complex128) for _ in range(2))
    got = products.dot([spheres.view(x, "row")], [spheres.view(y, "row")])
    torch.testing.assert_close(got, (x.conj() * y).sum(1).real, **EXACT)


def test_dot_of_a_joint_sphere_is_that_of_its_concatenation():
    members = [(normal(4, 6), normal(4, 6)), (normal(4, 1), normal(4, 1)), (normal(4, 2, 3),) * 2]
    xs, ys = ([m[i] for m in members] for i in (0, 1))
    flat = [torch.cat([z.flatten(1) for z in zs], 1) for zs in (xs, ys)]
    torch.testing.assert_close(products.dot(xs, ys), (flat[0] * flat[1]).sum(1), **EXACT)
    gram = products.gram(xs, ys)
    for got, (x, y) in zip(gram, [(0, 0), (0, 1), (1, 1)], strict=True):
        torch.testing.assert_close(got, (flat[x] * flat[y]).sum(1), **EXACT)


def test_project_and_combine_act_on_a_joint_sphere_as_on_its_concatenation():
    xs, ws = [normal(4, 6), normal(4, 1)], [normal(4, 6), normal(4, 1)]
    x, w = torch.cat(xs, 1), torch.cat(ws, 1)
    want = np.stack([vectors.tangent(*row) for row in zip(w.numpy(), x.numpy(), strict=True)])
    got = torch.cat(products.project(xs, ws), 1)
    torch.testing.assert_close(got, torch.from_numpy(want), **EXACT)
    a, b = normal(4), normal(4)
    got = torch.cat(products.combine(a, ws, b, xs), 1)
    torch.testing.assert_close(got, a[:, None] * w + b[:, None] * x, **EXACT)


BY_MEMBERS = {
    "dot": lambda x, y, m: [products.dot(x, y, m)],
    "gram": lambda x, y, m: [products.gram(x, y, members=m).wu],
    "gram_with_ww": lambda x, y, m: [products.gram(x, y, products.dot(x, x, m), m).uu],
    "scale": lambda x, y, m: products.scale(products.dot(x, y, m), x, m),
    "combine": lambda x, y, m: products.combine(
        products.dot(x, y, m), x, products.dot(y, y, m), y, m
    ),
    "project": lambda x, y, m: products.project(x, y, members=m),
    "tangent": lambda x, y, m: products.tangent_form(x, y, products.dot(x, x, m), m)[0],
    "tangent_gram": lambda x, y, m: [products.tangent_form(x, y, products.dot(x, x, m), m)[1].uu],
    **{
        how: lambda x, y, m, how=how: transport_views(
            products.scale(products.dot(y, y, m), y, m), x, y, how, m
        )
        for how in ("parallel", "project", "rescale")
    },
}


@pytest.mark.parametrize("name", BY_MEMBERS)
def test_members_keep_the_spheres_of_one_list_apart(name):
    # A matrix, a joint sphere of two tensors, and a tensor of three dimensions, in one call.
    blocks = [[(3, 4)], [(2, 5), (2, 1)], [(4, 2, 3)]]
    xs, ys = ([[normal(*shape) for shape in shapes] for shapes in blocks] for _ in range(2))
    call = BY_MEMBERS[name]
    got = call(list(chain(*xs)), list(chain(*ys)), [1, 2, 1])
    want = chain(*(call(x, y, None) for x, y in zip(xs, ys, strict=True)))
    got, want = (torch.cat([t.flatten() for t in ts]) for ts in (got, want))
    torch.testing.assert_close(got, want, **EXACT)


def test_dot_needs_members_and_as_many_on_both_sides():
    with pytest.raises(ValueError, match="at least one member"):
        products.dot([], [])
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        products.dot([torch.ones(1, 2), torch.ones(1, 2)], [torch.ones(1, 2)])


@pytest.mark.parametrize(
    ("sphere", "shape"),
    [("tensor", (4_000_000,)), ("row", (4, 1_000_000)), ("col", (1_000_000, 4))],
)
def test_float32_sums_keep_their_digits_over_millions_of_entries(sphere, shape):
    # Why not torch.linalg.vector_norm: on this CPU it adds serially, and is off by 2e-4, 2e-5 and
    # 5e-4 in these three. A cascade of float32 sums is off by the last digit, 6e-8.
    x = torch.randn(shape)
    v = spheres.view(x, sphere)
    want = products.dot([v.double()], [v.double()])
    torch.testing.assert_close(products.dot([v], [v]), want, rtol=1e-6, atol=0)
    torch.testing.assert_close(products.square([v]), want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32(dtype):
    # 300 * 300 overflows float16, and 1e5 ones added in bfloat16 stop at 256.
    x = torch.full((1, 1000), 300.0).to(dtype)
    assert products.dot([x], [x]).item() == 300 * 300 * 1000
    assert products.square([x]).item() == pytest.approx(300 * 300 * 1000, rel=1e-6)
    ones = torch.ones(1, 100_000).to(dtype)
    assert products.dot([ones], [ones]).item() == 100_000


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_coefficients_meet_half_precision_in_float32(dtype):
    x, y = torch.randn(3, 50).to(dtype), torch.randn(3, 50).to(dtype)
    # 1.001 is 1 in bfloat16, and in float16 off by a third of an eps.
    a, b = torch.full((3,), 1.001).double(), torch.full((3,), 0.3).double()
    rows = zip(y.double().numpy(), x.double().numpy(), strict=True)
    tangents = torch.from_numpy(np.stack([vectors.tangent(*row) for row in rows]))
    for (got,), want in (
        (products.combine(a, [x], b, [y]), 1.001 * x.double() + 0.3 * y.double()),
        (products.scale(a, [x]), 1.001 * x.double()),
        (products.project([x], [y]), tangents),
    ):
        assert got.dtype == dtype
        # Rounded once, by half an eps.
        rtol = 0.51 * torch.finfo(dtype).eps
        torch.testing.assert_close(got.double(), want, rtol=rtol, atol=1e-6)


# The tangent part of an almost radial direction


def _nearly_radial(share: float) -> tuple[Tensor, Tensor, float]:
    """Return float32 w and u with |t|/|u| = share, and the norm of t for these very floats."""
    w, t = normal(1, 1000), normal(1, 1000)
    t = products.project([t], [w])[0]
    u = w + share * w.norm() * t / t.norm()
    w, u = w.float(), u.float()
    return w, u, vectors.norm(vectors.tangent(w[0].double().numpy(), u[0].double().numpy()))


@pytest.mark.parametrize("share", [1e-2, 1e-3, 1e-4, 1e-5])
def test_tangent_form_keeps_the_digits_that_the_gram_difference_loses(share):
    w, u, want = _nearly_radial(share)
    gram = products.gram([w], [u])
    (t,), formed = products.tangent_form([w], [u], gram.ww)
    # The vector difference is good to 6e-8 of u: to 6e-3 of t where that is 1e-5 of u.
    assert formed.uu.sqrt().item() == pytest.approx(want, rel=1e-2)
    assert formed.uu.item() == products.dot([t], [t]).item()
    assert (formed.ww.item(), formed.wu.item()) == (gram.ww.item(), 0)
    # The radial share left in t is as small as float32 makes it.
    assert abs(products.dot([w], [t]).item()) < 1e-6 * gram.ww.item()
    if share <= 1e-4:
        # What it is for: <u,u> - <w,u>**2/<w,w> is the rounding of sums in float32 by now.
        assert gram.tangent_square().sqrt().item() != pytest.approx(want, rel=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tangent_form_of_a_radial_direction_is_zero(dtype):
    w = torch.randn(50, 30, dtype=dtype)
    u = torch.linspace(-3, 3, 50, dtype=dtype)[:, None] * w
    assert not products.tangent_form([w], [u], products.dot([w], [w]))[1].uu.any()
