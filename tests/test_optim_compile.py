"""torch.compile(optimizer.step): the same numbers, and no new graphs when lr changes."""

import pytest
import torch
from optimizers import ROWS, Row
from torch import nn
from torch._dynamo.utils import counters

import sphereopt as so


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def network():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU())
    model.extend([nn.Linear(8, 4), nn.LayerNorm(4)]).double()
    specs = {"0.weight": "row", ("3.weight", "3.bias"): "tensor"}
    return model, so.param_groups(model, specs)


def train(row: Row, backend: str | None, lr, steps: int = 7, **more):
    """Return the parameters, and how many graphs there were after each step."""
    model, groups = network()
    optimizer = row.make(groups, lr=lr, **more)
    step = optimizer.step if backend is None else torch.compile(optimizer.step, backend=backend)
    graphs, generator = [], torch.Generator().manual_seed(0)
    for i in range(steps):
        optimizer.zero_grad()
        model(torch.randn(16, 6, generator=generator).double()).pow(4).mean().backward()
        for group in optimizer.param_groups:
            value = row.lr / (i + 1)
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(value)
            else:
                group["lr"] = value
        step()
        graphs.append(counters["stats"]["unique_graphs"])
    return [p.detach() for p in model.parameters()], graphs


# One of each kind: compiling takes seconds.
NAMES = ["sgd-momentum", "sgd-nesterov", "adamw", "adamw-amsgrad", "adamw-sphere", "lion", "muon"]
CASES = [(row, {"radius": "fixed"}) for row in ROWS if row.name in NAMES]
CASES += [(row, {"radius": "free"}) for row in ROWS if row.name in ("sgd-momentum", "adamw")]
CASES += [(ROWS[1], {"transport": how}) for how in ("parallel", "project")]
CASES = [(*case, False) for case in CASES] + [(ROWS[1], {}, True), (ROWS[5], {}, True)]


@pytest.mark.parametrize(("row", "options", "tensor_lr"), CASES, ids=str)
def test_a_changing_lr_makes_no_new_graph(row: Row, options, tensor_lr):
    lr = torch.tensor(row.lr, dtype=torch.float64) if tensor_lr else row.lr
    compiled, graphs = train(row, "eager", lr, **options)
    plain, _ = train(row, None, row.lr, **options)
    # The first step makes the state; the second meets a step count that is no constant.
    assert graphs[0] > 0
    assert graphs[2:] == [graphs[2]] * (len(graphs) - 2)
    for p, q in zip(compiled, plain, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12)


# Inductor's own import uses torch.jit.
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("row", [ROWS[5]], ids=str)
def test_generated_code_gives_the_same_numbers(row: Row):
    # Inductor's C++ fused in-place row reductions wrongly in some releases (pytorch#188228).
    compiled, graphs = train(row, "inductor", row.lr, steps=4)
    plain, _ = train(row, None, row.lr, steps=4)
    assert graphs[0] > 0
    for p, q in zip(compiled, plain, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12)
