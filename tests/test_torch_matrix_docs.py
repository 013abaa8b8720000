"""The page of torch's matrix is what its table says, and what its table says is what runs."""

from pathlib import Path

import pytest
import test_torch_matrix_forms
import test_torch_matrix_state
import test_torch_matrix_step
import torch
from torch import nn
from torch_matrix import INFOS, TESTS, page, served

import sphereopt as so

PAGE = Path(__file__).parent.parent / "docs/torch_matrix.md"
MODULES = (test_torch_matrix_step, test_torch_matrix_forms, test_torch_matrix_state)


def test_the_page_is_what_the_table_would_write_today():
    assert PAGE.read_text() == page(), (
        "run: python tests/torch_matrix.py --write docs/torch_matrix.md"
    )


def longest(names, where):
    """Return the longest of some names that a condition holds for, or None."""
    return max(filter(where, names), key=len, default=None)


def test_every_cell_that_says_pass_is_a_test_and_no_other_is():
    run = set()
    for module in MODULES:
        for cls in vars(module).values():
            if not (isinstance(cls, type) and cls.__module__ == module.__name__):
                continue
            for name in dir(cls):
                # test, parameters of the test, column, device, dtype
                start, on_cpu, _ = name.rpartition("_cpu_")
                if on_cpu:
                    test = longest([t.name for t in TESTS], lambda x: start.startswith(f"{x}_"))  # noqa: B023
                    column = longest([i.name for i in INFOS], lambda x: start.endswith(f"_{x}"))  # noqa: B023
                    run.add((test, column))
    assert run == {(test.name, info.name) for test in TESTS for info in served(test.name)}


def test_flags_of_torch_can_be_set_after_the_import():
    assert not torch.backends.flags_frozen()


@pytest.mark.parametrize("make", [so.SphereSGD, so.SphereAdam, so.SphereLion, so.SphereMuon])
def test_one_list_of_groups_serves_several_optimizers(make):
    # torch fills in the caller's dicts: the second one would be of free radius, and move by renorm.
    w, b = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(4))
    groups = [{"params": iter([w]), "sphere": "row"}, {"params": [b]}]
    so.SphereSGD(groups, lr=0.5, radius="free", momentum=0.9)
    second = make(groups, lr=0.01)
    alone = make([{"params": [w], "sphere": "row"}, {"params": [b]}], lr=0.01)
    assert groups == [{"params": [w], "sphere": "row"}, {"params": [b]}]
    assert second.state_dict()["param_groups"] == alone.state_dict()["param_groups"]
