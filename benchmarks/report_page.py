"""The pictures of docs/report.md and docs/diff.md: pages of small runs, photographed.

    python benchmarks/report_page.py --write docs/results

Chromium takes the pictures; see tests/browser.py. Beside them a JSON file says what ran.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import matplotlib as mpl
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import sphereopt as so

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

STEPS, EVERY = 2000, 10
WIDTH, HEIGHT = 1000, 1240
OPTIONS = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-3}
#: The second run, and the part of its page that is shown.
OTHER, TALL = {**OPTIONS, "weight_decay": 2e-2}, 1080


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    channels = 1
    for width in (16, 16, 32, 32):
        layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False)]
        layers += [nn.BatchNorm2d(width), nn.ReLU()]
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


def train(path: Path, options: dict[str, float]) -> None:
    """Train with plain SGD; the last layer, which is not scale-invariant, is put on spheres too."""
    data = load_digits()
    images = torch.tensor(data.data / 16.0, dtype=torch.float32).view(-1, 1, 8, 8)
    labels = torch.tensor(data.target)
    model = network()
    spheres = {f"{i}.weight": "row" for i in (0, 3, 6, 9, 14)}
    optimizer = torch.optim.SGD(so.param_groups(model, spheres), **options)
    batches = torch.Generator().manual_seed(0)
    config = {"data": "scikit-learn's digits", "batch size": 32}
    with so.track(optimizer, path, every=EVERY, config=config) as tracker:
        for _ in range(STEPS):
            batch = torch.randint(len(images), (32,), generator=batches)
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images[batch]), labels[batch])
            loss.backward()
            tracker.log(loss=loss.detach())
            optimizer.step()


def photograph(page: Path, picture: Path, height: int) -> None:
    from browser import browser

    with browser() as chromium:
        tab = chromium.new_page(viewport={"width": WIDTH, "height": height})
        tab.goto(page.as_uri())
        tab.screenshot(path=picture)


def named(log: Path) -> so.report.History:
    """Return a log under its name alone: the page is not to show a temporary folder."""
    return replace(so.report.History.read(log), source=log.name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, required=True, metavar="FOLDER")
    target = parser.parse_args().write
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        log, other = Path(folder, "digits.jsonl"), Path(folder, "more_decay.jsonl")
        train(log, OPTIONS)
        train(other, OTHER)
        page = so.report.write(log, Path(folder, "digits.html"))
        photograph(page, target / "report.png", HEIGHT)
        found = so.report.diff(named(log), named(other))
        page = Path(folder, "diff.html")
        page.write_text(so.report.render_diff(found), encoding="utf-8")
        photograph(page, target / "diff.png", TALL)
        sentences = [finding.sentence for finding in so.report.findings(log)]
    facts = {
        "steps": STEPS,
        "optimizer": "torch.optim.SGD",
        **OPTIONS,
        "findings": sentences,
        "second run": OTHER,
        "difference": found.verdict,
        "machine": f"{platform.machine()}, {platform.system()}, one thread",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "matplotlib": mpl.__version__,
            "sphereopt": so.__version__,
        },
        "date": datetime.date.today().isoformat(),
    }
    (target / "report.json").write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
