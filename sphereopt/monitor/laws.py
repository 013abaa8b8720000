"""What the calculator says of a group of parameters: asked once for each of its settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from torch.optim.optimizer import Optimizer

from sphereopt.theory import OutOfRangeError, alignment, equilibrium
from sphereopt.theory.live import CLASSES

__all__ = ["Law", "law", "rule_of"]

#: Class names, torch's and ours, to the calculator's name and the options that it follows. A class
#: is looked up along its bases, so AdamW, which derives from Adam in torch, is found as itself.
_RULES: Mapping[str, tuple[str, tuple[str, ...]]] = {
    # AdamW before Adam in that table, after it here: SphereAdam decays as AdamW does.
    **{ours: (rule, options) for rule, ours, options in reversed(CLASSES.values())},
    **{name: (rule, options) for name, (rule, _, options) in CLASSES.items()},
}


@dataclass(frozen=True, slots=True)
class Law:
    r"""What the calculator knows of one group's settings.

    Attributes:
        kappa: What weight decay takes off the norm per step once momentum has gathered it; ``None``
            where that depends on the gradients (Adam with L2).
        K: :math:`\theta_{diff}^2/\theta^2` of the momentum, for gradients that are noise.
        angle: At equilibrium, in radians per step; ``None`` without weight decay.
        norm: At equilibrium, over the root of the size of the gradient ``|g||w|`` for SGD, over the
            root of the number of weights for others; ``None`` without weight decay.
        by_gradient: Which of the two.
    """

    kappa: float | None
    K: float
    angle: float | None = None
    norm: float | None = None
    by_gradient: bool = False


def rule_of(optimizer: type[Optimizer], group: Mapping[str, Any]) -> str | None:
    """Return the calculator's name of an optimizer, or None if it does not know it.

    Example:
        >>> rule_of(torch.optim.AdamW, {}), rule_of(torch.optim.Rprop, {})
        ('adamw', None)
    """
    for kind in optimizer.__mro__:
        if kind.__name__ in _RULES:
            name, decoupled = _RULES[kind.__name__][0], group.get("decoupled_weight_decay")
            if name in ("adam", "adamw") and decoupled is not None:
                return "adamw" if decoupled else "adam"
            return name
    return None


def law(
    optimizer: type[Optimizer], group: Mapping[str, Any], shape: tuple[int, ...], *, free: bool
) -> Law | None:
    """Return what the calculator says of weights under these settings, if it can.

    Args:
        optimizer: Class of the optimizer.
        group: Its parameter group: learning rate, weight decay, momentum.
        shape: Of a sphere; the calculator needs it for Muon.
        free: The norm may change; where it may not, nothing settles.

    Returns:
        The law, or None for an optimizer or settings that the calculator does not cover, and for
        weights that are on spheres by choice, for which it does not hold.

    Example:
        >>> group = {"lr": 0.1, "weight_decay": 5e-4, "momentum": 0.9}
        >>> found = law(torch.optim.SGD, group, (27,), free=True)
        >>> round(found.angle, 5), round(found.K)
        (0.00725, 19)
    """
    name = rule_of(optimizer, group)
    special = group.get("amsgrad") or group.get("second_moment", "entry") != "entry"
    if name is None or special or group.get("kind") == "constrained":
        return None
    options = next(
        _RULES[kind.__name__][1] for kind in optimizer.__mro__ if kind.__name__ in _RULES
    )
    try:
        # An eps is small, and what it does depends on the size of the gradients.
        keys = [key for key in (*options, "adjust_lr_fn") if key != "eps"]
        hyper = {key: _plain(group[key]) for key in keys if group.get(key) is not None}
        if name == "muon":
            if len(shape) != 2:
                return None
            hyper["shape"] = tuple(shape)
        decay = float(group.get("weight_decay", 0.0)) if free else 0.0
        return _law(name, float(group["lr"]), decay, tuple(hyper.items()))
    except (OutOfRangeError, TypeError):
        return None


def _plain(value: Any) -> Any:
    """Return an option without tensors, hashable."""
    if isinstance(value, tuple | list):
        return tuple(float(x) for x in value)
    return value if isinstance(value, bool | str) else float(value)


@lru_cache(maxsize=1024)
def _law(name: str, lr: float, decay: float, options: tuple[tuple[str, Any], ...]) -> Law:
    """Return the law of hashable settings; a schedule that repeats a rate asks only once."""
    hyper: dict[str, Any] = dict(options)
    K = alignment(name, **hyper)  # noqa: N806
    if lr * decay == 0:
        return Law(0.0, K)
    if name == "adam":
        return Law(None, K)
    settled = equilibrium(name, lr=lr, weight_decay=decay, **hyper)
    if name == "sgd":
        unit = equilibrium(name, lr=lr, weight_decay=decay, grad_norm=1.0, **hyper)
        momentum, dampening = hyper.get("momentum", 0.0), hyper.get("dampening", 0.0)
        gathered = (1 - dampening) / (1 - momentum) if momentum else 1.0
        return Law(lr * decay * gathered, K, settled.angle, unit.norm, by_gradient=True)
    return Law(lr * decay, K, settled.angle, settled.rms)
