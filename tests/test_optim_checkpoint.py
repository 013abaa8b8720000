"""Checkpoints: resuming is exact, state keeps its dtype, other parameters are refused by name."""

import copy
import io
import pickle

import pytest
import torch
from optimizers import ROWS, Row
from small_model import continue_training, model_and_groups, run
from torch import nn

import sphereopt as so

every_row = pytest.mark.parametrize("row", ROWS, ids=str)


def through_file(state, weights_only=True):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


@pytest.mark.parametrize("radius", ["fixed", "free"])
@every_row
def test_resuming_equals_the_uninterrupted_run_bit_for_bit(row: Row, radius):
    model, groups = model_and_groups()
    optimizer = row.make(groups, radius=radius)
    continue_training(model, optimizer, 7)
    saved = through_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    fresh, fresh_groups = model_and_groups()
    resumed = row.make(fresh_groups, radius=radius)
    continue_training(fresh, resumed, 2)  # state that the checkpoint must replace
    fresh.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    twin = copy.deepcopy((model, optimizer))
    pickled = pickle.loads(pickle.dumps((model, optimizer)))
    runs = [(model, optimizer), (fresh, resumed), twin, pickled]
    for net, opt in runs:
        continue_training(net, opt, 5)
    for net, opt in runs[1:]:
        for p, q in zip(model.parameters(), net.parameters(), strict=True):
            assert torch.equal(p, q)
            for key, value in optimizer.state[p].items():
                if isinstance(value, torch.Tensor):
                    assert torch.equal(opt.state[q][key], value), key
                    assert opt.state[q][key].dtype == value.dtype


def test_wide_state_survives_a_checkpoint_of_bf16_weights():
    # torch casts every floating state tensor to the dtype of its parameter.
    w = nn.Parameter(torch.randn(4, 8).bfloat16())
    optimizer = so.SphereAdam([w], sphere="row", radius="free", lr=1e-2)
    run(optimizer, [w], [[torch.randn(4, 8).bfloat16()] for _ in range(3)])
    other = so.SphereAdam([w], sphere="row", radius="free", lr=1e-2)
    other.load_state_dict(through_file(optimizer.state_dict()))
    for key, value in optimizer.state[w].items():
        assert torch.equal(other.state[w][key], value), key
        assert other.state[w][key].dtype == value.dtype


def test_a_loaded_state_is_not_shared_with_its_source():
    model, groups = model_and_groups()
    optimizer = so.SphereSGD(groups, lr=0.1, momentum=0.9, radius="free")
    continue_training(model, optimizer, 3)
    state = optimizer.state_dict()
    before = copy.deepcopy(state["state"])
    other_model, other_groups = model_and_groups()
    other = so.SphereSGD(other_groups, lr=0.1, momentum=0.9, radius="free")
    other.load_state_dict(state)
    continue_training(other_model, other, 3)
    for i, values in before.items():
        if "radius" in values:
            for key, value in values.items():
                if key != "step":
                    assert torch.equal(state["state"][i][key], value), key


def sgd(params, **options):
    return so.SphereSGD(params, lr=0.1, momentum=0.9, **options)


def w_and_b():
    return [("w", nn.Parameter(torch.randn(4, 3))), ("b", nn.Parameter(torch.randn(4, 2)))]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            lambda: sgd(
                [("w", nn.Parameter(torch.randn(4, 3))), ("c", nn.Parameter(torch.ones(4, 2)))],
                sphere="row",
            ),
            r"this optimizer has 'c' at group 0\[1\].*'b' at group 0\[1\]",
        ),
        (lambda: sgd(w_and_b()[:1], sphere="row"), "no further parameter.*'b' at group"),
        (lambda: sgd(w_and_b(), sphere="tensor"), "'w' has sphere='tensor' in this.*'row' in the"),
        (
            lambda: sgd([("w", nn.Parameter(torch.randn(4, 9))), w_and_b()[1]], sphere="row"),
            r"'w' of shape \(4, 9\) needs momentum_buffer of shape \(4, 9\).*has \(4, 3\)",
        ),
        (
            lambda: sgd([("w", nn.Parameter(torch.randn(6, 3))), w_and_b()[1]], sphere="row"),
            r"'w' of shape \(6, 3\) needs momentum_buffer of shape \(6, 3\)",
        ),
    ],
    ids=["name", "missing", "sphere", "shape", "count"],
)
def test_a_checkpoint_of_other_parameters_names_the_first_that_differs(other, message):
    params = w_and_b()
    source = sgd(params, sphere="row")
    run(source, [p for _, p in params], [[torch.randn(4, 3), torch.randn(4, 2)]])
    target = other()
    with pytest.raises(ValueError, match=message):
        target.load_state_dict(source.state_dict())
    assert not target.state
