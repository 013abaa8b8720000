"""Swap the normalizers of an existing model, keep what carries over, and say what does not."""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, final

from torch import Tensor, nn
from torch.nn.utils import parametrize

__all__ = ["Conversion", "Swap", "convert_norm"]

Factory = Callable[[nn.Module], nn.Module]

# What a normalizer calls its channels, and what it calls whether it has a gain.
_CHANNELS = ("num_features", "num_channels", "normalized_shape")
_AFFINE = ("affine", "elementwise_affine")
_OPTIONS = ("eps", "momentum", "track_running_stats", "unbiased")
_LAST_DIMS = (nn.LayerNorm, nn.RMSNorm)


@final
@dataclass(frozen=True)
class Swap:
    """One layer that was replaced.

    Attributes:
        name: its name in the model; further names of a shared layer are in ``also``.
        old: the layer that was there.
        new: the layer that is there now.
        kept: what the new layer took over, each with how.
        lost: what the old layer had and the new one has no place for.
        fresh: what the new layer has and the old one had not, at its own default.
        also: further names of the same layer.
    """

    name: str
    old: nn.Module
    new: nn.Module
    kept: tuple[str, ...]
    lost: tuple[str, ...]
    fresh: tuple[str, ...]
    also: tuple[str, ...] = ()


@final
class Conversion:
    """What :func:`convert_norm` did: print it, iterate over it, undo it.

    Attributes:
        swaps: one per distinct layer.
    """

    def __init__(self, model: nn.Module, swaps: Iterable[Swap]) -> None:
        self.swaps = tuple(swaps)
        self._model = model
        self._done = True

    def __iter__(self) -> Iterator[Swap]:
        return iter(self.swaps)

    def __len__(self) -> int:
        return len(self.swaps)

    def undo(self) -> None:
        """Put the old layers back.

        Gains and biases are the same parameters as in the new layers, so they come back as they
        are now; running averages come back as they were at the conversion. Device, dtype and mode
        are those of the new layers.

        Raises:
            RuntimeError: it was undone already, or another layer has taken a place since; then
                nothing changes.
        """
        if not self._done:
            raise RuntimeError("this conversion was undone already")
        for swap in self.swaps:
            for name in (swap.name, *swap.also):
                if self._model.get_submodule(name) is not swap.new:
                    raise RuntimeError(
                        f"{name!r} is no longer the layer that the conversion put there; undo "
                        "later conversions first"
                    )
        for swap in self.swaps:
            _hand_over(swap.new, swap.old)
            for name in (swap.name, *swap.also):
                self._model.set_submodule(name, swap.old)
        self._done = False

    def __str__(self) -> str:
        counts = Counter(
            (
                f"{type(s.old).__name__} -> {type(s.new).__name__}",
                "; ".join(s.kept) or "nothing",
                "; ".join(s.lost) or "nothing",
                "; ".join(s.fresh) or "nothing",
            )
            for s in self.swaps
        )
        return "\n".join(
            f"{count} x {what}\n  kept: {kept}\n  lost: {lost}\n  new: {fresh}"
            for (what, kept, lost, fresh), count in counts.items()
        )


def convert_norm(
    model: nn.Module,
    source: type[nn.Module] | tuple[type[nn.Module], ...],
    target: type[nn.Module] | Factory,
    *,
    names: str | Iterable[str] | None = None,
    skip: str | Iterable[str] = (),
    **options: Any,
) -> Conversion:
    """Replace the normalizers of one kind by another, in place.

    Args:
        model: holds the layers; they may have several names (shared layers stay shared).
        source: class or classes of the layers to replace; subclasses count.
        target: class of the new layers, or a function old layer -> new layer. A class is called
            with the old layer's channels and those of its options that it has as well: eps,
            momentum, affine, bias, unbiased, and track_running_stats unless at its default.
        names: replace only layers whose name fits one of these globs, such as ``"layer1.*"``.
        skip: leave layers whose name fits one of these globs.
        options: given to ``target`` (a class), before the old layer's: ``k=10``, ``groups=8``.

    Returns:
        Conversion: per layer what was kept, lost and new; ``print`` shows it, ``undo()`` reverts.

    Raises:
        ValueError: no layer fits; ``model`` is itself such a layer; a layer normalizes other dims
            than ``target`` does (LayerNorm's last ones against dim 1), is for other inputs (2d
            against 1d), is parametrized, or has hooks; ``target`` needs an option. Nothing is
            replaced then.

    Notes:
        Gains and biases of the same shape are handed over as the parameters they are, so an
        optimizer that was made before goes on with them. Running averages are copied: a
        running scale from a running variance (by ``sqrt(var + eps)``) and back. That is the same
        number for Gaussian activations and an estimate otherwise; some forward passes in
        training mode settle it. A network that was trained with one normalizer is another
        function with another: fine-tune it, or convert before training. Which weights are
        scale-invariant may change as well (:data:`INVARIANCES`): find spheres again.

        Activations stay: after a conversion to EvoNorm, which includes one, take yours out.

    Example:
        >>> from sphereopt.nn import L1BatchNorm2d
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        >>> conversion = convert_norm(net, nn.BatchNorm2d, L1BatchNorm2d)
        >>> print(conversion)
        1 x BatchNorm2d -> L1BatchNorm2d
          kept: weight; bias; running_mean; running_scale from running_var; ...
          lost: nothing
          new: nothing
        >>> conversion.undo()
        >>> net[1]
        BatchNorm2d(8, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True)
    """
    swaps = []
    for old, (name, *also) in _found(model, source, names, skip).items():
        if isinstance(target, type):
            new = _built(name, old, target, options)
        elif options:
            raise ValueError(f"options {sorted(options)} go to a class; put them into the function")
        else:
            new = _made(name, old, target)
        swaps.append(_planned(name, old, new, tuple(also)))
    for swap in swaps:  # from here on nothing can fail
        _hand_over(swap.old, swap.new)
        for name, (_, value) in _averages(swap.old, swap.new).items():
            getattr(swap.new, name).copy_(value)
        for name in (swap.name, *swap.also):
            model.set_submodule(name, swap.new)
    return Conversion(model, swaps)


def _globs(patterns: str | Iterable[str]) -> list[str]:
    return [patterns] if isinstance(patterns, str) else list(patterns)


def _found(
    model: nn.Module,
    source: type[nn.Module] | tuple[type[nn.Module], ...],
    names: str | Iterable[str] | None,
    skip: str | Iterable[str],
) -> dict[nn.Module, list[str]]:
    """Return the layers to replace, with all the names each has in the model."""
    wanted, spared = ["*"] if names is None else _globs(names), _globs(skip)
    layers: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, source):
            layers.setdefault(module, []).append(name)
    if model in layers:
        raise ValueError(
            f"the model is itself a {type(model).__name__}; put it into nn.Sequential, so that "
            "there is a place to put another layer"
        )
    found = {
        module: called
        for module, called in layers.items()
        if any(fnmatchcase(name, glob) for name in called for glob in wanted)
        and not any(fnmatchcase(name, glob) for name in called for glob in spared)
    }
    if not found:
        there = Counter(type(m).__name__ for m in model.modules() if "Norm" in type(m).__name__)
        kinds = ", ".join(f"{n} {kind}" for kind, n in there.items()) or "no normalizer at all"
        kind = getattr(source, "__name__", source)
        raise ValueError(f"no {kind} fits names={names!r}, skip={skip!r}; the model has {kinds}")
    return found


def _built(
    name: str, old: nn.Module, target: type[nn.Module], options: dict[str, Any]
) -> nn.Module:
    """Make a layer of the class ``target`` with the channels and options of the old one."""
    what = f"{name!r} ({type(old).__name__})"
    _check_layout(what, old, target)
    takes = inspect.signature(target).parameters
    unknown = options.keys() - takes.keys()
    if unknown and not any(p.kind is p.VAR_KEYWORD for p in takes.values()):
        raise ValueError(f"{target.__name__} has no option {sorted(unknown)}; it has {list(takes)}")
    channels = [getattr(old, key) for key in _CHANNELS if hasattr(old, key)]
    places = [key for key in _CHANNELS if key in takes]
    if not channels or not places:
        raise ValueError(
            f"{what}: it is not clear how many channels {target.__name__} gets; give a function "
            "old layer -> new layer as the target"
        )
    arguments = {places[0]: channels[0], **_own_options(old, takes.keys()), **options}
    missing = [
        key
        for key, parameter in takes.items()
        if parameter.default is parameter.empty
        and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        and key not in arguments
    ]
    if missing:
        raise ValueError(f"{target.__name__} needs {missing}: give it to convert_norm as an option")
    return target(**arguments)


def _made(name: str, old: nn.Module, target: Factory) -> nn.Module:
    """Ask the function for a layer."""
    if not callable(target):
        raise TypeError(f"target={target!r} is neither a class nor a function of the old layer")
    new = target(old)
    if not isinstance(new, nn.Module):
        raise TypeError(f"target returned a {type(new).__name__} for {name!r}, not a module")
    return new


def _check_layout(what: str, old: nn.Module, target: type[nn.Module]) -> None:
    if isinstance(old, _LAST_DIMS) != issubclass(target, _LAST_DIMS):
        where = ("dim 1", "the last dims")
        raise ValueError(
            f"{what} normalizes {where[isinstance(old, _LAST_DIMS)]} and {target.__name__} "
            f"{where[issubclass(target, _LAST_DIMS)]}; give a function that returns a layer for "
            "the same layout, such as GroupNorm for LayerNorm over the channels of an image"
        )
    ranks = [re.search(r"[123]d$", cls.__name__) for cls in (type(old), target)]
    if all(ranks) and ranks[0][0] != ranks[1][0]:  # type: ignore[index]
        raise ValueError(f"{what} and {target.__name__} take inputs of different dims")


def _own_options(old: nn.Module, takes: Iterable[str]) -> dict[str, Any]:
    """Return the old layer's options that a new one takes."""
    own = _options(old)
    usual = inspect.signature(type(old)).parameters.get("track_running_stats")
    if usual is not None and own.get("track_running_stats") == usual.default:
        del own["track_running_stats"]  # batch norms average by default, instance norms do not
    affine = next((getattr(old, key) for key in _AFFINE if hasattr(old, key)), None)
    if affine is not None:
        own.update(dict.fromkeys(_AFFINE, affine))
    if affine:
        own["bias"] = getattr(old, "bias", None) is not None
    return {key: own[key] for key in takes if key in own}


def _options(layer: nn.Module) -> dict[str, Any]:
    """Return the options of a layer that are plain values; a learned eps is none."""
    found = {key: getattr(layer, key) for key in _OPTIONS if hasattr(layer, key)}
    return {key: value for key, value in found.items() if not isinstance(value, Tensor)}


def _a_tensor(layer: nn.Module) -> Tensor | None:
    """Return a floating-point tensor of the layer, to see where it lives."""
    tensors = (*layer.parameters(), *layer.buffers())
    return next((t for t in tensors if t.is_floating_point()), None)


def _shared(old: nn.Module, new: nn.Module) -> list[str]:
    """Return the names of the parameters that the new layer takes over."""
    theirs, ours = (dict(m.named_parameters(recurse=False)) for m in (old, new))
    return [name for name, p in ours.items() if name in theirs and theirs[name].shape == p.shape]


def _averages(old: nn.Module, new: nn.Module) -> dict[str, tuple[str, Tensor]]:
    """Return the running averages of the new layer: name -> (how, value)."""
    had = {name: b for name, b in old.named_buffers(recurse=False) if b is not None}
    eps = getattr(old, "eps", 0.0)
    values = {name: (name, buffer) for name, buffer in had.items()}
    if "running_var" in had:
        root = (had["running_var"] + eps).sqrt()
        values["running_scale"] = ("running_scale from running_var", root)
    elif "running_scale" in had:
        square = (had["running_scale"].square() - eps).clamp_min(0)
        values["running_var"] = ("running_var from running_scale", square)
    mine = dict(new.named_buffers(recurse=False))
    return {
        name: values[name]
        for name, buffer in mine.items()
        if name in values and values[name][1].shape == buffer.shape
    }


def _planned(name: str, old: nn.Module, new: nn.Module, also: tuple[str, ...]) -> Swap:
    """Say what a swap keeps, loses and adds, before it is done."""
    if parametrize.is_parametrized(old):
        raise ValueError(
            f"{name!r} ({type(old).__name__}) has parametrized tensors; remove the "
            "parametrizations first, and put them on the new layer"
        )
    shared, averages = _shared(old, new), _averages(old, new)
    options, others = _options(old), _options(new)
    same = [key for key in options if key in others and others[key] == options[key]]
    taken = {*shared, *averages, *same}
    if "running_scale" in averages:
        taken.add("running_var")
    if "running_var" in averages:
        taken.add("running_scale")
    had = [n for n, _ in (*old.named_parameters(), *old.named_buffers())]
    lost = [n for n in had if n not in taken]
    lost += [f"{key}={value}" for key, value in options.items() if key not in taken]
    hooks = len(old._forward_hooks) + len(old._forward_pre_hooks) + len(old._backward_hooks)
    lost += [f"{hooks} hook(s)"] if hooks else []
    has = [n for n, _ in (*new.named_parameters(), *new.named_buffers())]
    kept = [*shared, *(how for how, _ in averages.values())]
    return Swap(
        name,
        old,
        new,
        kept=(*kept, *(f"{key}={options[key]}" for key in same)),
        lost=tuple(lost),
        fresh=tuple(n for n in has if n not in taken),
        also=also,
    )


def _hand_over(old: nn.Module, new: nn.Module) -> None:
    """Give parameters, device, dtype and mode of one layer to the other."""
    tensor = _a_tensor(old)
    if tensor is not None:
        new.to(device=tensor.device, dtype=tensor.dtype)
    for name in _shared(old, new):
        setattr(new, name, getattr(old, name))
    new.train(old.training)
