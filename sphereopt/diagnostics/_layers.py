"""Which modules are observed, what they are, and where their channels lie."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Literal

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from sphereopt.names import did_you_mean

__all__ = ["Choice", "Role", "channel_dim", "is_normalizer", "observed", "role"]

Role = Literal["weights", "embedding", "normalizer", "activation", "other"]
Choice = str | Sequence[str] | Callable[[str, nn.Module], bool] | None

_NORMALIZERS = (
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.LocalResponseNorm,
)
_CHANNELS_FIRST = (
    nn.modules.conv._ConvNd,
    nn.modules.batchnorm._NormBase,
    nn.GroupNorm,
    nn.LocalResponseNorm,
)
_CHANNELS_LAST = (nn.Linear, nn.Embedding, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)
_ACTIVATIONS = ("torch.nn.modules.activation", "transformers.activations", "sphereopt.nn")


def is_normalizer(module: nn.Module) -> bool:
    """Return whether a module normalizes activations: torch's, or a leaf named ``...Norm...``.

    Example:
        >>> is_normalizer(nn.GroupNorm(1, 4)), is_normalizer(nn.Linear(2, 2))
        (True, False)
    """
    named = _is_leaf(module) and "Norm" in type(module).__name__
    return isinstance(module, _NORMALIZERS) or named


def _is_leaf(module: nn.Module) -> bool:
    children = {name for name, _ in module.named_children()}
    return children <= {"parametrizations"}


def role(module: nn.Module) -> Role | None:
    """Return what a module is by default observed as, or None."""
    own = list(module.parameters(recurse=False))
    if is_normalizer(module):
        return "normalizer"
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return "embedding"
    if isinstance(module, nn.MultiheadAttention) or is_parametrized(module):
        return "weights"
    if _is_leaf(module) and any(p.dim() > 1 for p in own):
        return "weights"
    if _is_leaf(module) and type(module).__module__.startswith(_ACTIVATIONS):
        return "activation"
    return "other" if own else None


def observed(model: nn.Module, layers: Choice) -> dict[str, nn.Module]:
    """Return the modules to observe, by name.

    Args:
        model: Any module.
        layers: Patterns of names such as ``"encoder.*.mlp"``, or a function of name and module.
            By default every module with parameters of its own, every normalizer and activation;
            not what surrounds the whole.

    Raises:
        ValueError: If there is none.
    """
    tops = [m.parametrizations for m in model.modules() if is_parametrized(m)]
    inside = {id(m) for top in tops if isinstance(top, nn.Module) for m in top.modules()}
    known = {name: m for name, m in model.named_modules() if id(m) not in inside}
    if layers is None:
        alone = _is_leaf(model)
        found = {k: m for k, m in known.items() if role(m) is not None and (k or alone)}
    elif callable(layers):
        found = {name: m for name, m in known.items() if layers(name, m)}
    else:
        patterns = [layers] if isinstance(layers, str) else list(layers)
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in known):
                hint = did_you_mean(pattern, known)
                raise ValueError(f"layers: no module's name matches {pattern!r}{hint}")
        found = {k: m for k, m in known.items() if any(fnmatchcase(k, p) for p in patterns)}
    if not found:
        raise ValueError(
            f"nothing to observe in {type(model).__name__}: no module with parameters, normalizer "
            "or activation; name modules with layers="
        )
    return found


def channel_dim(module: nn.Module, output: Tensor, before: bool | None) -> int:
    """Return the dim of a layer's channels.

    Args:
        module: The layer.
        output: Its output, (N, C, ...) or (N, ..., C).
        before: Whether the channels of the layer before it were in dim 1, if there was one: what
            acts entry by entry says nothing itself.
    """
    last = output.dim() - 1
    if last < 2:
        return last
    name = type(module).__name__
    first: bool | None = None
    if isinstance(module, _CHANNELS_LAST):
        first = False
    elif isinstance(module, _CHANNELS_FIRST) or name[-2:] in ("1d", "2d", "3d"):
        first = True
    elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
        first = len(module.normalized_shape) > 1
    elif is_normalizer(module):
        first = not ("LayerNorm" in name or "RMS" in name)
    elif role(module) == "weights":
        first = False
    if first is None:
        first = before if before is not None else last > 2
    return 1 if first else last
