"""Normalization layers: equal degrees in, the degree of the gain out."""

from __future__ import annotations

import torch
from torch import Tensor

from sphereopt.detect.degrees import Call, Degree, Offset
from sphereopt.detect.forms import ZERO
from sphereopt.detect.propagate import Propagation, Rule

from .contractions import with_bias
from .reductions import centred


def _affine(
    p: Propagation, gain: Tensor | None, bias: Tensor | None, shape: torch.Size, dim: int
) -> Degree:
    """Return the degree of ``normalized * gain + bias``, both along ``dim``."""
    form = [-1 if d == dim else 1 for d in range(len(shape))]
    ids = torch.full([1] * len(shape), ZERO) if gain is None else p.ids(gain).reshape(form)
    return Degree(ids) if bias is None else with_bias(p, Degree(ids), bias, shape, dim)


def batch_norm(p: Propagation, call: Call) -> list[Degree | None]:
    """BatchNorm: per channel over the batch; with running statistics it is an affine map."""
    x = call["input"]
    dims = [d for d in range(x.ndim) if d != 1]
    out = _affine(p, call.get("weight"), call.get("bias"), x.shape, 1)
    if not call.get("training", call.op == "_batch_norm_with_update"):
        p.say("batch_norm_eval")
        p.zero(p.ids(x))
        return [out]
    statistics = centred(p, x, dims).reshape(-1)
    means = [(call.get("running_mean"), 1.0), (call.get("running_var"), 2.0)]
    for running, power in means:
        if isinstance(running, Tensor):
            # A mixture of the old value and this batch's: of no degree, should anything read it.
            old = Offset(torch.full([1], ZERO), p.fresh_labels(list(running.shape)))
            p.set(running, Degree(p.forms.scale(statistics, power), (old,)))
    return [out]


def layer_norm(p: Propagation, call: Call) -> list[Degree | None]:
    """LayerNorm over the last dims; also returns mean and 1/std."""
    x, gain, bias = call["input"], call["weight"], call["bias"]
    k = len(call["normalized_shape"])
    dims = list(range(x.ndim - k, x.ndim))
    inner = centred(p, x, dims)
    rstd = Degree(p.forms.scale(inner, -1.0))
    if k == 1 or bias is None:
        ids = torch.full([1] * x.ndim, ZERO) if gain is None else p.ids(gain, x.ndim)
        out = Degree(ids)
        return [out if bias is None else with_bias(p, out, bias, x.shape, x.ndim - 1), None, rstd]
    ids = p.ids(bias, x.ndim)
    p.equal(ids, torch.full([1] * x.ndim, ZERO) if gain is None else p.ids(gain, x.ndim))
    return [Degree(ids), None, rstd]


def rms_norm(p: Propagation, call: Call) -> list[Degree | None]:
    """RMSNorm over the last dims; also returns 1/rms."""
    x, gain = call["input"], call.get("weight")
    dims = list(range(x.ndim - len(call["normalized_shape"]), x.ndim))
    rstd = Degree(p.forms.scale(p.along(p.ids(x), dims), -1.0))
    ids = torch.full([1] * x.ndim, ZERO) if gain is None else p.ids(gain, x.ndim)
    return [Degree(ids), rstd]


def group_norm(p: Propagation, call: Call) -> list[Degree | None]:
    """GroupNorm: over the channels of a group and all places."""
    x, groups = call["input"], call["group"]

    def grouped(ids: Tensor) -> Tensor:
        if ids.shape[1] == 1:
            return ids.unsqueeze(2)
        return ids.reshape(ids.shape[0], groups, -1, *ids.shape[2:])

    degree = p.degree(x) or Degree(p.ids(x))
    labels = [grouped(o.labels) for o in degree.offsets]
    if any(n > 1 for label in labels for n in label.shape[2:]):
        degree = Degree(p.settled(degree))  # else offsets are one number per group, and gone
    inside = grouped(degree.ids)
    p.along(inside, list(range(2, inside.ndim)))
    return [_affine(p, call["weight"], call["bias"], x.shape, 1)]


def weight_norm(p: Propagation, call: Call) -> list[Degree | None]:
    """``g * v / |v|``, one norm per index of ``dim``."""
    v, g, dim = call["v"], call["g"], call["dim"]
    ids = p.ids(v)
    norm = p.along(ids, [d for d in range(v.ndim) if d != dim])
    return [Degree(p.forms.add(p.ids(g), p.forms.add(ids, norm, -1.0))), Degree(norm)]


RULES: dict[str, Rule] = {
    **dict.fromkeys(
        [
            "native_batch_norm",
            "_native_batch_norm_legit",
            "_native_batch_norm_legit_functional",
            "_native_batch_norm_legit_no_training",
            "_batch_norm_with_update",
            "cudnn_batch_norm",
            "miopen_batch_norm",
        ],
        batch_norm,
    ),
    "native_layer_norm": layer_norm,
    **dict.fromkeys(["_fused_rms_norm", "rms_norm"], rms_norm),
    "native_group_norm": group_norm,
    "_weight_norm_interface": weight_norm,
}
