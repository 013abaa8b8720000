"""What works here: versions, devices, kinds of step, extras, and the arithmetic of a step."""

from __future__ import annotations

import importlib.metadata
import math
import platform
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sphereopt.geometry import angle, norm
from sphereopt.optim import SphereAdam, SphereLion, SphereMuon, SphereOptimizer, SphereSGD

__all__ = ["EXTRAS", "Check", "examine"]

#: Extras of the package, and what each brings.
EXTRAS = {
    "report": ("matplotlib", "jinja2"),
    "examples": ("scikit-learn", "rich"),
    "lightning": ("lightning",),
    "hf": ("transformers", "accelerate"),
    "parquet": ("pyarrow",),
}
#: Distribution, first version that works, what is wrong before.
_CLASHES = (
    ("torch", (2, 13), "the tests have not run on it"),
    ("numpy", (1, 26), "the tests have not run on it"),
    ("geoopt", (0, 5, 1), "the tests have not run on it"),
    ("transformers", (5, 2), "its Trainer does not show its model to sphereopt.hf"),
    ("lightning", (2, 4), "its tests have not run on it"),
)
_OPTIMIZERS = (SphereSGD, SphereAdam, SphereLion, SphereMuon)
#: Seconds that a compiler may take.
_PATIENCE = 300


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at.

    Attributes:
        section: What it belongs to: ``"versions"``, ``"devices"``, ``"steps"``, ``"extras"`` or
            ``"arithmetic"``.
        name: What was looked at.
        status: ``"ok"``; ``"absent"`` for what is not here and not needed; ``"failed"``.
        text: What was found.
        core: Training on spheres does not work without it.

    Example:
        >>> Check("versions", "torch", "ok", "2.13.0", core=True).fatal
        False
    """

    section: str
    name: str
    status: str
    text: str
    core: bool = False

    @property
    def fatal(self) -> bool:
        """Whether the core does not work."""
        return self.core and self.status == "failed"


def examine(*, full: bool = False) -> list[Check]:
    """Look at what works on this machine; everything is tried, nothing is trained.

    Args:
        full: Also try ``torch.compile``, which may take a minute.

    Returns:
        The checks. The core works if none is ``fatal``.

    Notes:
        Random number generators, default dtype and number of threads are left as they were. A
        check that raises becomes one that failed, with the error as its text.

    Example:
        >>> checks = examine()
        >>> [check.name for check in checks if check.fatal]
        []
        >>> sorted({check.section for check in checks})
        ['arithmetic', 'devices', 'extras', 'steps', 'versions']
    """
    with warnings.catch_warnings(action="ignore"), torch.random.fork_rng():
        torch.manual_seed(0)
        return [*_versions(), *_devices(), *_steps(full), *_extras(), *_arithmetic()]


def _tried(section: str, name: str, what: Callable[[], str], *, core: bool = False) -> Check:
    """Return a check that is ok unless this raises."""
    try:
        return Check(section, name, "ok", what(), core)
    except Exception as error:  # whatever a backend raises is the answer
        first = (str(error).strip() or "no message").splitlines()[0]
        return Check(section, name, "failed", f"{type(error).__name__}: {first}", core)


def _versions() -> list[Check]:
    from sphereopt import __version__

    system = f"{platform.system()} {platform.machine()}"
    found = [
        Check("versions", "sphereopt", "ok", __version__, True),
        Check("versions", "python", "ok", f"{platform.python_version()}, {system}", True),
    ]
    for name in ("torch", "numpy", "geoopt"):
        found.append(_version("versions", name, f'missing; run: pip install "{name}"', core=True))
    return found


def _version(section: str, name: str, missing: str, *, core: bool = False) -> Check:
    """Return a check of one distribution: its version, and whether that is too old."""
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Check(section, name, "failed" if core else "absent", missing, core)
    for clashing, first, why in _CLASHES:
        if name == clashing and _numbers(version) < first:
            wanted = ".".join(map(str, first))
            text = f'{version} clashes: {why}; run: pip install "{name}>={wanted}"'
            # Untried is not broken: the arithmetic below tells.
            return Check(section, name, "failed", text)
    return Check(section, name, "ok", version, core)


def _numbers(version: str) -> tuple[int, ...]:
    """Return the leading numbers of a version: (2, 13, 0) of "2.13.0+cpu"."""
    parts = version.split("+")[0].split(".")
    return tuple(int(part) for part in parts if part.isdigit())


def _devices() -> list[Check]:
    threads = torch.get_num_threads()
    found = [Check("devices", "cpu", "ok", f"{threads} thread{'s' * (threads > 1)}", True)]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            device = torch.device("cuda", index)
            label = torch.cuda.get_device_name(index)
            found.append(_tried("devices", str(device), partial(_on, device, label)))
    else:
        found.append(Check("devices", "cuda", "absent", "no CUDA device"))
    if torch.backends.mps.is_available():
        mps = torch.device("mps")
        found.append(_tried("devices", "mps", partial(_on, mps, "Apple GPU")))
    else:
        found.append(Check("devices", "mps", "absent", "no Apple GPU"))
    return found


def _on(device: torch.device, label: str) -> str:
    return f"{label}, {_two_steps(device=device)}"


def _two_steps(
    *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, **options: Any
) -> str:
    """Make two steps of a toy with ordinary weights and a sphere; raise unless the norm stays."""
    first = nn.Linear(8, 8)
    model = nn.Sequential(first, nn.LayerNorm(8), nn.Linear(8, 4)).to(device, dtype)
    others = [p for p in model.parameters() if p is not first.weight]
    groups: list[dict[str, Any]] = [
        {"params": [first.weight], "sphere": "row"},
        {"params": others},
    ]
    optimizer = SphereAdam(groups, lr=0.01, **options)
    before = norm(first.weight.detach(), "row")
    _train(model, optimizer.step, torch.ones(3, 8, device=device, dtype=dtype))
    _same(before, norm(first.weight.detach(), "row"), dtype)
    return "two steps made"


def _train(model: nn.Module, step: Callable[[], object], inputs: Tensor) -> None:
    for _ in range(2):
        model.zero_grad()
        model(inputs).pow(2).mean().backward()
        step()


def _same(before: Tensor, after: Tensor, dtype: torch.dtype) -> None:
    # Each step rounds: at most 2.1 eps over 300 seeds, and other hardware rounds its own way.
    drift = float(((after - before) / before).abs().max())
    if not drift <= 8 * torch.finfo(dtype).eps:
        raise ArithmeticError(f"the norm of a sphere changed by {drift:.1e} of itself")


def _steps(full: bool) -> list[Check]:
    found = [
        _tried("steps", "plain", lambda: _two_steps(foreach=False), core=True),
        _tried("steps", "foreach", lambda: _two_steps(foreach=True)),
        _tried("steps", "fused", lambda: _two_steps(fused=True)),
        _tried("steps", "bfloat16", lambda: _two_steps(dtype=torch.bfloat16)),
        _tried("steps", "distributed", _distributed),
    ]
    if full:
        found.append(_tried("steps", "compile", _apart))
    else:
        found.append(Check("steps", "compile", "absent", "not tried; run: sphereopt doctor --full"))
    return found


def _apart() -> str:
    """Compile in a process of its own: a compiler may hang, crash, and write to stderr."""
    code = "from sphereopt import doctor; doctor._compiled()"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE)
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise RuntimeError(f"exit code {done.returncode}: {last[0]}")
    return "two compiled steps made"


def _compiled() -> None:
    layer = nn.Linear(8, 8, bias=False)
    optimizer = SphereAdam(layer.parameters(), lr=0.01, sphere="row")
    before = norm(layer.weight.detach(), "row")
    _train(layer, torch.compile(optimizer.step), torch.ones(3, 8))
    _same(before, norm(layer.weight.detach(), "row"), torch.float32)


def _distributed() -> str:
    """Make and end a group of this one process, or look at the one there is."""
    if not torch.distributed.is_available():
        raise RuntimeError("this torch was built without torch.distributed")
    if torch.distributed.is_initialized():
        return f"{torch.distributed.get_backend()}, {torch.distributed.get_world_size()} processes"
    store = torch.distributed.HashStore()  # type: ignore[attr-defined]  # public in its docs
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        torch.distributed.all_reduce(torch.ones(1))
    finally:
        torch.distributed.destroy_process_group()
    return "gloo"


def _extras() -> list[Check]:
    return [
        _version("extras", name, f'not installed: pip install "sphereopt[{extra}]"')
        for extra, packages in EXTRAS.items()
        for name in packages
    ]


def _arithmetic() -> list[Check]:
    found = [
        _tried("arithmetic", cls.__name__, partial(_keeps_norms, cls), core=True)
        for cls in _OPTIMIZERS
    ]
    return [*found, _tried("arithmetic", "angle", _angle, core=True)]


def _keeps_norms(cls: Callable[..., SphereOptimizer]) -> str:
    """Step with generic gradients; raise unless every row keeps its norm and has moved."""
    w = nn.Parameter(torch.randn(6, 10, dtype=torch.float64))
    start = w.detach().clone()
    optimizer = cls([("w", w)], lr=0.1, sphere="row")
    for _ in range(5):
        w.grad = torch.randn_like(w)
        optimizer.step()
    _same(norm(start, "row"), norm(w.detach(), "row"), torch.float64)
    turned = float(angle(start, w.detach(), "row").min())
    if not turned > 1e-3:
        raise ArithmeticError(f"a sphere turned by {turned:.1e} radians in five steps of lr 0.1")
    return "norms kept over five steps"


def _angle() -> str:
    """Turn by lr radians, and measure the angle without our own functions."""
    w = nn.Parameter(torch.tensor([[3.0, 4.0]], dtype=torch.float64))
    w.grad = torch.tensor([[-4.0, 3.0]], dtype=torch.float64)
    SphereAdam([("w", w)], lr=0.25, sphere="row", betas=(0.0, 0.0), eps=0.0).step()
    x, y = w.detach()[0].tolist()
    measured = abs(math.atan2(y, x) - math.atan2(4.0, 3.0))
    if abs(measured - 0.25) > 1e-12:
        raise ArithmeticError(f"a step of 0.25 radians turned the weights by {measured!r}")
    return "a step of 0.25 radians turns by 0.25 radians"
