"""Arithmetic in which scale invariance is exact: normalization eps -> 0, one dtype throughout.

With a real eps no weight is exactly invariant, only ``f(c*w; c**2*eps) = f(w; eps)`` holds. So the
question "does the norm of this weight carry function" is decided in the limit eps -> 0, by a tiny
eps rather than zero: constant channels and padding tokens have variance 0, and 0/0 would be NaN.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  torch's own documentation calls it F
from torch.overrides import TorchFunctionMode

TINY_EPS = 1e-30


@final
@dataclass(frozen=True, slots=True)
class Precision:
    """A dtype for the copy, and what can be told apart in it.

    Attributes:
        dtype: Of parameters, inputs and activations.
        certificate_eps: The norm eps while spheres are rescaled.
        noise: Entries whose ``|w * df/dw|`` is this far below the typical one are rounding.
        euler: Euler ratios up to this pass.
        rescaling: Relative output changes up to this pass, for factors in [1/3, 3].
        far: Likewise for factors of 1000, which sink layers below the biases around them.
        unit: Size of a perturbation that is about one rounding.
    """

    dtype: torch.dtype
    certificate_eps: float
    noise: float
    euler: float
    rescaling: float
    far: float
    unit: float


# Rounding leaves Euler ratios below 1e-12 on true spheres, while others have 1e-4 and more (a test
# holds that gap on the small networks): 1e-8 is in the middle. Exact invariance leaves output
# changes of 1e-15 to 1e-12; a wrong claim moves the outputs by its share of the function. (A single
# row deep in a network may have a share of 1e-11: telling those is the Euler test's work.)
# The certificate's eps is smaller still, because a chain of k layers rescaled by 1e-3 scales its
# variance by 1e-6**k; a forward alone does not mind the huge 1/sqrt(eps) that a gradient would.
DOUBLE = Precision(torch.float64, 1e-100, 1e-9, 1e-8, 1e-9, 1e-6, 1e-15)
SINGLE = Precision(torch.float32, 1e-35, 1e-5, 1e-4, 1e-3, 1e-2, 1e-7)
# The largest constant taken for an eps: TensorFlow-style BatchNorm uses 1e-3.
LARGEST_EPS = 1.1e-3

_EPS_NAME = re.compile(r"(^|_)(eps|epsilon)(_|$|\d)")
_LOW_PRECISION = (torch.float32, torch.float16, torch.bfloat16)

_NORMS = (F.batch_norm, F.layer_norm, F.group_norm, F.instance_norm, F.rms_norm, F.normalize)
# Position of the eps argument; the built-in functions have no signature to ask.
_EPS_POSITION: dict[Any, int] = {
    **{f: list(inspect.signature(f).parameters).index("eps") for f in _NORMS},
    torch.cosine_similarity: 3,
    torch.batch_norm: 7,
    torch.instance_norm: 7,
    torch.layer_norm: 4,
    torch.group_norm: 4,
    torch.rms_norm: 3,
    torch.native_layer_norm: 4,
    torch.native_batch_norm: 7,
    torch.native_group_norm: 7,
}
_ADDITIONS = {torch.add, Tensor.add, Tensor.add_}
_CLAMPS = {
    torch.clamp,
    torch.clamp_min,
    torch.clip,
    Tensor.clamp,
    Tensor.clamp_,
    Tensor.clamp_min,
    Tensor.clamp_min_,
    Tensor.clip,
    Tensor.clip_,
}
_ESCAPES = {Tensor.numpy, Tensor.__array__, Tensor.tolist, Tensor.data_ptr, Tensor.__dlpack__}
_DATA = Tensor.data.__get__  # type: ignore[attr-defined]
_DOWN_CASTS = {Tensor.float, Tensor.half, Tensor.bfloat16}
_CASTS = {Tensor.to, Tensor.type}


def is_eps(value: object) -> bool:
    """Return whether a Python number looks like a normalization eps."""
    return isinstance(value, float) and 0 < value <= LARGEST_EPS


def eps_attributes(model: nn.Module) -> list[tuple[nn.Module, str, float]]:
    """Return (module, attribute name, value) of every float attribute that is named like an eps."""
    return [
        (module, name, value)
        for module in model.modules()
        for name, value in vars(module).items()
        if _EPS_NAME.search(name) and is_eps(value)
    ]


@final
class IdealArithmetic(TorchFunctionMode):
    """Inside this context torch functions keep to one dtype and, if asked to, see a tiny eps.

    Args:
        dtype: what floating-point tensors are kept in.
        eps: replaces the eps of every normalization; ``None`` leaves each its own.
        twins: ``id`` of a tensor -> the tensor to use in its place. A loss that closes over the
            model (an L2 term, say) then sees the float64 copy's parameters, not the user's.
        on_escape: called with tensors whose values are about to leave torch (numpy, tolist).
    """

    def __init__(
        self,
        dtype: torch.dtype,
        eps: float | None,
        twins: Mapping[int, Tensor],
        on_escape: Callable[[Tensor], None] | None = None,
    ) -> None:
        super().__init__()
        self._dtype = dtype
        self._eps = eps
        self._twins = twins
        self._on_escape = on_escape

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        args = tuple(self._twin(arg) for arg in args)
        named = {key: self._twin(value) for key, value in (kwargs or {}).items()}
        if func in _ESCAPES and self._on_escape is not None:
            self._on_escape(args[0])
        if self._eps is not None:
            args, named = _with_eps(func, args, named, self._eps)
        if func == _DATA:
            return args[0].detach()  # the same, seen by dispatch modes
        if func in _DOWN_CASTS:
            return args[0].to(self._dtype)
        if func in _CASTS:
            args = tuple(self._wide(arg) for arg in args)
        if "dtype" in named:
            named["dtype"] = self._wide(named["dtype"])
        return func(*args, **named)

    def _wide(self, value: Any) -> Any:
        narrow = isinstance(value, torch.dtype) and value in _LOW_PRECISION
        return self._dtype if narrow else value

    def _twin(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._twins.get(id(value), value)
        if type(value) in (list, tuple):
            return type(value)(self._twin(item) for item in value)
        return value


def _with_eps(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], eps: float
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if func in _EPS_POSITION:
        at = _EPS_POSITION[func]
        if len(args) > at:
            return (*args[:at], eps, *args[at + 1 :]), kwargs
        return args, {**kwargs, "eps": eps}
    # Hand-written layers: rsqrt(var + 1e-6) and norm.clamp(min=1e-12).
    key = "other" if func in _ADDITIONS else "min" if func in _CLAMPS else None
    if key is not None:
        if len(args) > 1 and is_eps(args[1]):
            args = (args[0], eps, *args[2:])
        if is_eps(kwargs.get(key)):
            kwargs = {**kwargs, key: eps}
    return args, kwargs
