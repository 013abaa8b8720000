"""examples/plot_moves.py draws where the moves go; examples/plot_quickstart.py runs."""

import math
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def moves(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import plot_moves

    return plot_moves


def expected(moves):
    """Return the angles at LR, from vectors."""
    w, u = moves.W.numpy(), moves.U.numpy()
    tangent = u - (w @ u) * w

    def between(x):
        return math.atan2(np.linalg.norm(np.cross(w, x)), w @ x)

    return {
        "retract": between(w - moves.LR * tangent),
        "exp": moves.LR * np.linalg.norm(tangent),
        "renorm": between(w - moves.LR * u),
        "hyperball": between(w - moves.LR * u / np.linalg.norm(u)),
        "rotate": moves.LR,
    }


def test_the_angles_drawn_are_those_of_the_definitions(moves):
    # Float64 and a handful of operations.
    assert moves.run() == pytest.approx(expected(moves), rel=1e-12)


def test_every_move_ends_on_the_sphere_downhill_on_one_great_circle(moves):
    w, u = moves.W.numpy(), moves.U.numpy()
    for move in moves.LOOKS:
        end = moves.moved(move, moves.LR)[0].numpy()
        assert np.linalg.norm(end) == pytest.approx(1, rel=1e-12)
        assert np.linalg.det([w, u, end]) == pytest.approx(0, abs=1e-12)
        assert end @ (u - (w @ u) * w) < 0


def test_the_page_names_the_angles_and_shows_the_picture(moves):
    page = (ROOT / "docs/examples/plots.md").read_text()
    for move, angle in moves.run().items():
        assert f"| `{move}` | {angle:.4f} |" in page
    assert "../results/plot_moves.svg" in page


def test_the_picture_is_written_and_the_angles_are_printed(moves, tmp_path, capsys):
    assert moves.main(["--out", str(tmp_path / "moves.svg")]) == 0
    assert "<svg" in (tmp_path / "moves.svg").read_text()
    assert len(capsys.readouterr().out.splitlines()) == len(moves.LOOKS)


@pytest.mark.parametrize("name", ["no/such/folder.svg", "moves.doc"])
def test_a_picture_that_cannot_be_written_is_one_line(moves, tmp_path, capsys, name):
    with pytest.raises(SystemExit) as stopped:
        moves.main(["--out", str(tmp_path / name)])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_the_quickstart_holds_norms_and_turns_by_its_lr(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["plot_quickstart.py", str(tmp_path / "norms.svg")])
    names = runpy.run_path(str(ROOT / "examples/plot_quickstart.py"))
    entries = [row["parameters"][name] for row in names["rows"] for name in row["parameters"]]
    starts = {n: e["norm"]["mean"] for n, e in names["rows"][0]["parameters"].items()}
    assert set(starts) == {"0.weight", "3.weight"}
    assert len(entries) == 600
    for row in names["rows"]:
        for name, entry in row["parameters"].items():
            # The radius is kept in float64; angles are those of float32 inner products.
            assert entry["norm"]["mean"] == pytest.approx(starts[name], rel=1e-6)
            assert entry["angle"]["mean"] == pytest.approx(0.01, rel=1e-4)
    losses = [row["metrics"]["loss"] for row in names["rows"]]
    assert losses[-1] < 0.1 * losses[0]  # it learns: a coin has 0.69
    assert (tmp_path / "norms.svg").is_file()
    assert "angle 0.010000" in capsys.readouterr().out


def test_the_quickstart_is_ten_lines_of_training_that_run_as_a_script(tmp_path):
    found = subprocess.run(
        [sys.executable, str(ROOT / "examples/plot_quickstart.py")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=300,
        check=True,
    )
    assert "step 300" in found.stdout
    assert list(tmp_path.iterdir()) == []
