"""What to pass to an optimizer, and how it is spelled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sphereopt.names import did_you_mean
from sphereopt.theory.errors import OutOfRangeError
from sphereopt.theory.rules import OPTIMIZERS

__all__ = ["SPHERE_OPTIMIZERS", "Settings", "base_of", "inherited"]

#: Optimizers of fixed norm, and the ordinary ones whose momentum they have.
SPHERE_OPTIMIZERS: Mapping[str, str] = {
    "sphere-sgd": "sgd",
    "sphere-adam": "adamw",
    "sphere-lion": "lion",
    "sphere-muon": "muon",
}

_CALLS = {
    "sgd": "torch.optim.SGD",
    "sgdw": "torch.optim.SGD",
    "adam": "torch.optim.Adam",
    "adamw": "torch.optim.AdamW",
    "sign": "SphereLion",
    "signum": "SphereLion",
    "lion": "SphereLion",
    "muon": "torch.optim.Muon",
    "sphere-sgd": "SphereSGD",
    "sphere-adam": "SphereAdam",
    "sphere-lion": "SphereLion",
    "sphere-muon": "SphereMuon",
}


@dataclass(frozen=True)
class Settings:
    """What to pass to an optimizer.

    Attributes:
        optimizer: One of ``OPTIMIZERS`` or ``SPHERE_OPTIMIZERS``.
        lr: Learning rate; of a sphere optimizer the angle per step, in radians.
        weight_decay: Weight decay; 0 for a sphere optimizer.
        hyper: All other hyperparameters, by the names of
            :class:`~sphereopt.theory.Hyperparameters`.
        note: What else to change, in words; may be empty.

    Example:
        >>> print(Settings("lion", 1e-4, 1.0, {"betas": (0.9, 0.99)}))
        SphereLion(lr=0.0001, weight_decay=1, betas=(0.9, 0.99))
    """

    optimizer: str
    lr: float
    weight_decay: float
    hyper: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""

    def __str__(self) -> str:
        options: dict[str, Any] = {"lr": self.lr, "weight_decay": self.weight_decay}
        options |= _options(self.optimizer, self.hyper)
        if self.optimizer in SPHERE_OPTIMIZERS or self.optimizer == "sgdw":
            del options["weight_decay"]
        inside = ", ".join(f"{name}={_spelled(value)}" for name, value in options.items())
        text = f"{_CALLS[self.optimizer]}({inside})"
        if self.optimizer == "sgdw":
            shrink = f"{_spelled(self.lr)} * {_spelled(self.weight_decay)}"
            text += f" after p.mul_(1 - {shrink}) for every parameter p"
        return f"{text}  # {self.note}" if self.note else text


def _options(optimizer: str, hyper: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options to show: those that differ from defaults, and all decay factors."""
    defaults = OPTIMIZERS[SPHERE_OPTIMIZERS.get(optimizer, optimizer)][0]
    options = {
        name: value
        for name, value in hyper.items()
        if name != "shape" and (name in ("betas", "momentum") or value != defaults.get(name))
    }
    # Torch has neither; Lion with equal betas is signum, and without memory sign.
    if optimizer == "signum":
        options = {"betas": (options["momentum"],) * 2}
    elif optimizer == "sign":
        options = {"betas": (0.0, 0.0)}
    elif optimizer == "sphere-sgd":
        options["move"] = "rotate"
    if optimizer in SPHERE_OPTIMIZERS:
        options.pop("adjust_lr_fn", None)
    return options


def _spelled(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else repr(value)


def base_of(name: str, value: str) -> str:
    """Return the ordinary optimizer of which a sphere optimizer has the momentum, else itself.

    Args:
        name: Of the argument, for the error.
        value: Name of an optimizer, sphere optimizers included.

    Returns:
        One of ``OPTIMIZERS``.

    Raises:
        OutOfRangeError: If there is no such optimizer.
    """
    known = [*OPTIMIZERS, *SPHERE_OPTIMIZERS]
    if value not in known:
        hint = did_you_mean(str(value), known)
        raise OutOfRangeError(name, value, f"must be one of {', '.join(known)}{hint}")
    return SPHERE_OPTIMIZERS.get(value, value)


def inherited(
    source: str, hyper: Mapping[str, Any], target: str, target_hyper: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Return the target's hyperparameters: those of the source if both take the same ones."""
    same = set(OPTIMIZERS[source][0]) == set(OPTIMIZERS[target][0])
    return {**OPTIMIZERS[target][0], **(hyper if same else {}), **(target_hyper or {})}
