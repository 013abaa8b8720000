"""Reasons in words."""

from __future__ import annotations

from .forms import Origin

_PHRASES = {
    "add": "a sum with something that does not scale with it",
    "sub": "a difference from something that does not scale with it",
    "rsub": "a difference from something that does not scale with it",
    "addmm": "a bias or summand that does not scale with it",
    "convolution": "the channels it convolves do not scale alike",
    "mm": "the products it sums do not scale alike",
    "bmm": "the products it sums do not scale alike",
    "cat": "a concatenation with something that does not scale with it",
    "gelu": "GELU is not homogeneous",
    "silu": "SiLU is not homogeneous",
    "sigmoid": "a sigmoid is not homogeneous",
    "tanh": "tanh is not homogeneous",
    "exp": "an exponential is not homogeneous",
    "log": "a logarithm is not homogeneous",
    "softplus": "softplus is not homogeneous",
    "_softmax": "softmax of scores that scale with it",
    "_safe_softmax": "softmax of scores that scale with it",
    "_log_softmax": "softmax of scores that scale with it",
    "hardtanh": "a clamp at a fixed value (ReLU6, hardtanh)",
    "clamp": "a clamp at a fixed value",
    "batch_norm_eval": "BatchNorm in eval mode: its statistics are constants",
    "native_batch_norm": "the values BatchNorm normalizes together do not scale alike",
    "native_layer_norm": "the values LayerNorm normalizes together do not scale alike",
    "native_group_norm": "the values GroupNorm normalizes together do not scale alike",
    "_fused_rms_norm": "the values RMSNorm normalizes together do not scale alike",
    "output": "the output itself scales with it",
    "_local_scalar_dense": "its scale leaves the graph through item() or a Python branch",
    "a value that leaves torch": "its scale leaves torch (numpy or a Python list)",
}


def in_words(origin: Origin) -> str:
    """Return what breaks an invariance, and where.

    Example:
        >>> in_words(Origin("gelu", "blocks.0.mlp.act"))
        'GELU is not homogeneous (in blocks.0.mlp.act)'
        >>> in_words(Origin("output", ""))
        'the output itself scales with it'
    """
    if origin.equality:
        plain = f"{origin.op} puts together what does not scale alike"
    else:
        plain = f"{origin.op} is not homogeneous"
    phrase = _PHRASES.get(origin.op, plain)
    return f"{phrase} (in {origin.module})" if origin.module else phrase
