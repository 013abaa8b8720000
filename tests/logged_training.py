"""A network trained by torch.optim, and what a careful logger would have written down."""

import numpy as np
import torch
from theory_nets import batches, network
from torch import nn
from torch.nn import functional


def logged_run(kind, optimizer, lrs, decay, *, name="0.weight", norm_eps=1e-30, **hyper):
    """Return |g|, |w| after the step, |u|, <buf, g>, <w, g>, <u, w>, and |w| at the start.

    Args:
        kind: ``"bn"``, whose blocks are rows, or ``"ln"``, whose block is the matrix.
        optimizer: ``torch.optim`` class; ``None`` for SGD with decoupled decay, by hand.
        lrs: Learning rates.
        decay: Weight decay.
        name: The weight that is logged.
        norm_eps: Of the normalization layers.
        **hyper: Of the optimizer.
    """
    model, _ = network(kind)
    for layer in model:
        if isinstance(layer, nn.BatchNorm1d | nn.LayerNorm):
            layer.eps = norm_eps
    params = list(model.parameters())
    w = dict(model.named_parameters())[name]
    coupled = 0.0 if optimizer is None else decay
    made = (optimizer or torch.optim.SGD)(params, lr=1.0, weight_decay=coupled, **hyper)

    def inner(a, b):
        return (a * b).sum(dim=1 if kind == "bn" else (0, 1)).detach().numpy()

    rows, start = [], np.sqrt(inner(w, w))
    for lr, (x, y) in zip(lrs, batches(len(lrs)), strict=True):
        made.param_groups[0]["lr"] = float(lr)
        made.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        old, buffer = w.detach().clone(), made.state[w].get("momentum_buffer")
        overlap = inner(buffer, w.grad) if buffer is not None else np.zeros_like(start)
        if optimizer is None:
            with torch.no_grad():
                torch._foreach_mul_(params, 1 - float(lr) * decay)
        made.step()
        u = ((1 - float(lr) * decay) * old - w.detach()) / float(lr)
        squares = inner(w.grad, w.grad), inner(w, w), inner(u, u)
        rows.append((*map(np.sqrt, squares), overlap, inner(old, w.grad), inner(u, old)))
    columns = (np.array(column) for column in zip(*rows, strict=True))
    names = ("grad", "norm", "update", "overlap", "radial", "update_overlap")
    return {"start": start} | dict(zip(names, columns, strict=True))
