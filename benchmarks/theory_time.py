"""How long a million steps of ``trajectory`` take, beside the same recursion by numpy's matrices.

    python benchmarks/theory_time.py --write docs/results/theory_time.json

The peer is ``S' = F S F^T + h h^T`` for SGD with momentum, one 2x2 product after the other. Medians
of interleaved repeats, in processor seconds: the machine may be shared.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from sphereopt.theory import schedule, trajectory

STEPS, SHORT, REPEATS = 1_000_000, 20_000, 5
CASES: dict[str, dict[str, Any]] = {
    "sgd": {"momentum": 0.9, "norm0": 1.0, "grad_norm": 1.0},
    "adam": {"rms0": 0.02, "dim": 64, "grad_norm": 1.0},
    "adamw": {"rms0": 0.02},
    "lion": {"rms0": 0.02},
    "muon": {"rms0": 0.02, "shape": (64, 64)},
}


def by_matrices(rates: np.ndarray) -> np.ndarray:
    """Return norms under SGD with momentum 0.9 and decay 0.1."""
    moments, norms = np.array([[1.0, 0.0], [0.0, 0.0]]), []
    for rate in rates:
        f = np.array([[1 - rate * 0.1, -rate * 0.9], [0.1, 0.9]])
        h = np.array([-rate, 1.0])
        moments = f @ moments @ f.T + np.outer(h, h) / moments[0, 0]
        norms.append(moments[0, 0])
    return np.sqrt(norms)


def seconds(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def measure() -> dict[str, float]:
    """Return processor seconds per million steps."""
    rates = schedule("cosine", 1e-3, STEPS, warmup=1000)
    short = rates[:SHORT]
    times: dict[str, list[float]] = {name: [] for name in (*CASES, "numpy matrices")}
    for _ in range(REPEATS):
        for name, options in CASES.items():
            run = seconds(lambda: trajectory(name, lr=rates, weight_decay=0.1, **options))  # noqa: B023
            times[name].append(run)
        run = seconds(lambda: by_matrices(short))
        times["numpy matrices"].append(run * STEPS / SHORT)
    return {name: round(statistics.median(found), 3) for name, found in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=Path)
    args = parser.parse_args()
    rates = schedule("cosine", 1e-3, SHORT)
    same = trajectory("sgd", lr=rates, weight_decay=0.1, **CASES["sgd"]).norm
    np.testing.assert_allclose(by_matrices(rates), same, rtol=1e-9)
    found = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, CPU",
        "python": platform.python_version(),
        "numpy": np.__version__,
        "seconds per million steps": measure(),
    }
    print(json.dumps(found, indent=1))
    if args.write:
        args.write.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
