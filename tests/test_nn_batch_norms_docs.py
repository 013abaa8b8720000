"""The page on the batch norms of Norm matters: its code runs, its numbers are measured."""

import json
import re
from pathlib import Path

import pytest
import torch
from test_nn_batch_norms_half import errors, l1_training
from torch.nn import functional as F

from sphereopt.nn.batch_norm_functions import l1_batch_norm, lp_batch_norm, topk_batch_norm

DOCS = Path(__file__).parent.parent / "docs"
PAGE = (DOCS / "nn/norm_matters.md").read_text()
TIMES = json.loads((DOCS / "results/normalizers.json").read_text())["rows"]


def cells(marker):
    """Return the rows of the table after a marker, without its head."""
    lines = PAGE.partition(f"<!-- {marker} -->")[2].partition("<!-- end -->")[0].split("\n")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line]
    return rows[0], rows[2:]


def test_the_code_of_the_page_prints_what_it_says(capsys):
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL):
        exec(block, names)
    assert capsys.readouterr().out == "proved\nTrue\n"


def test_the_standard_deviations_are_measured():
    for n, *shown in cells("constants")[1]:
        n = int(n)
        x = torch.randn(n, max(16, 2**21 // n), generator=torch.Generator().manual_seed(n))
        outputs = [l1_batch_norm(x, training=True)]
        for function, options in (
            (topk_batch_norm, {"k": 1}),
            (topk_batch_norm, {"k": 10}),
            (lp_batch_norm, {"p": 3.0}),
        ):
            for constants in ("paper", "gaussian"):
                outputs.append(function(x, training=True, constants=constants, **options))
        measured = [y.std(0).mean().item() for y in outputs]
        assert measured == pytest.approx([float(v) for v in shown], abs=0.001)  # three digits


def test_the_errors_in_half_precision_are_measured():
    half = PAGE.partition("## Half precision")[2]

    def torchs(x, weight, bias):
        return F.batch_norm(x, None, None, weight, bias, True)

    for row, function, dtype in (
        ("`L1BatchNorm2d`, float16", l1_training, torch.float16),
        ("`L1BatchNorm2d`, bfloat16", l1_training, torch.bfloat16),
        ("`nn.BatchNorm2d(...).half()`", torchs, torch.float16),
    ):
        shown = re.search(re.escape(f"| {row} | ") + r"(\S+) \| (\S+) \|", half)
        found = [errors(function, dtype, mean) for mean in (0.0, 1000.0)]
        measured = [max(e[0] for e in found), max(max(e[1:]) for e in found)]
        # One digit is shown.
        assert measured == pytest.approx([float(v) for v in shown.groups()], rel=0.25), row


def test_the_times_are_those_of_the_benchmark_and_as_short_as_promised():
    head, rows = cells("times")
    for name, *ratios in rows:
        measured = [TIMES[name][column] for column in head[1:]]
        assert [float(v) for v in ratios] == pytest.approx(measured, abs=0.0051), name
    assert {row[0] for row in rows} == set(TIMES)
    for memory_format in ("contiguous", "channels_last"):
        eager, compiled = f"{memory_format}, eager", f"{memory_format}, compiled"
        assert TIMES["L1BatchNorm2d"][eager] <= TIMES["L2 in torch operations"][eager]
        assert TIMES["L1BatchNorm2d"][compiled] <= 1.5 * TIMES["nn.BatchNorm2d"][compiled]
    assert TIMES["L1BatchNorm2d"]["contiguous, compiled"] <= 1.5
