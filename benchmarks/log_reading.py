"""How long reading a large log takes, and how much memory: as a history, and into a Parquet file.

    python benchmarks/log_reading.py --megabytes 1000 --write docs/results/log_reading.json

A log of that size is made of the rows of the tests, without training, once with 50 layers and once
with one. Each reading has a process of its own, one thread; memory is its largest resident size
less that after the imports.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from logs import make_rows, make_run  # noqa: E402

READING = """
import json, resource, sys, time
from sphereopt.monitor.table import to_parquet, _pyarrow
from sphereopt.report.history import History
_pyarrow()
def megabytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before, start, process = megabytes(), time.perf_counter(), time.process_time()
if sys.argv[1] == "history":
    found = History.read(sys.argv[2])
    more = {"rows": found.logged, "held": len(found.steps)}
else:
    to_parquet(sys.argv[2], sys.argv[2] + ".parquet")
    more = {}
seconds, process = time.perf_counter() - start, time.process_time() - process
more |= {"seconds": round(seconds, 1), "processor_seconds": round(process, 1)}
print(json.dumps(more | {"megabytes": round(megabytes() - before)}))
"""


def write(path: Path, size: float, layers: int) -> None:
    """Write a log of some size: 400 rows over and over, with steps of their own."""
    tails = [
        json.dumps(row, separators=(",", ":")).partition(",")[2] for row in make_rows(400, layers)
    ]
    with path.open("w") as file:
        file.write(json.dumps({"run": make_run(layers)}) + "\n")
        step = 0
        while file.tell() < size:
            step += 1
            file.write(f'{{"step":{step},{tails[step % 400]}\n')


def read(path: Path, how: str) -> dict[str, Any]:
    argv = [sys.executable, "-c", READING, how, str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        argv, capture_output=True, text=True, check=True, cwd=ROOT, env=environment
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=float, default=1000)
    parser.add_argument("--layers", type=int, nargs="+", default=[50, 1])
    parser.add_argument("--write", type=Path)
    args = parser.parse_args()
    results: dict[str, Any] = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, 1 thread",
        "python": platform.python_version(),
        "numpy": np.__version__,
        "date": datetime.date.today().isoformat(),
        "megabytes": args.megabytes,
        "logs": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        for layers in args.layers:
            path = Path(folder, "run.jsonl")
            write(path, args.megabytes * 1e6, layers)
            found = {"layers": layers, **{how: read(path, how) for how in ("history", "parquet")}}
            results["logs"].append(found)
            print(found, flush=True)
    if args.write:
        args.write.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
