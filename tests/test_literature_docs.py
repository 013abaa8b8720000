"""The example on the page of published optimizers runs, and the page names every class."""

import re
from pathlib import Path

import torch
from torch import nn

import sphereopt as so
from sphereopt.optim import literature

PAGE = (Path(__file__).parent.parent / "docs/literature.md").read_text()


def test_the_example_runs():
    model = nn.Sequential(
        nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2)
    )
    x, losses = torch.randn(16, 4), []

    def train(model, optimizer):
        for _ in range(20):
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())

    (code,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    names = {"so": so, "model": model, "train": train}
    before = model[0].weight.detach().norm(dim=1)
    exec(code, names)
    assert losses[-1] < losses[0]
    torch.testing.assert_close(model[0].weight.detach().norm(dim=1), before)


def test_every_class_has_its_rows():
    for name in literature.__all__:
        family = "Rotational*" if name.startswith("Rotational") else name
        assert PAGE.count(f"`{name}`") + PAGE.count(f"`{family}`") >= 3, name
