"""Plain optimizers that torch lacks, for the tests that compare with torch.optim."""

from collections import ChainMap

import torch
from torch.optim import Optimizer


class Lion(Optimizer):
    """Lion in the order of operations of its authors' code."""

    def __init__(
        self, params, lr, betas=(0.9, 0.99), weight_decay=0.0, maximize=False, foreach=None
    ):
        options = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, options)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                g = -p.grad if group["maximize"] else p.grad
                m = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                update = m * beta1 + g * (1 - beta1)
                p.add_(torch.sign(update), alpha=-group["lr"])
                m.mul_(beta2).add_(g, alpha=1 - beta2)


class Muon(Optimizer):
    """``torch.optim.Muon`` on matrices and flattened filters, ``torch.optim.AdamW`` on the rest."""

    def __init__(
        self, params, lr, weight_decay=0.0, maximize=False, foreach=None, adamw=(), **options
    ):
        params = list(params)
        super().__init__(params, {"lr": lr, "maximize": maximize})
        self.pairs = [
            (p, torch.nn.Parameter(p.detach().flatten(min(1, p.ndim - 1)))) for p in params
        ]
        rest = [p for p in params if p.ndim < 2 or any(p is q for q in adamw)]
        self.pairs = [(p, m) for p, m in self.pairs if not any(p is q for q in rest)]
        muon = torch.optim.Muon([m for _, m in self.pairs], lr, weight_decay, **options)
        self.parts = [muon]
        if rest:
            self.parts.append(
                torch.optim.AdamW(rest, lr, weight_decay=weight_decay, maximize=maximize)
            )
        for p, matrix in self.pairs:
            assert matrix.data_ptr() == p.data_ptr()

    def step(self):
        for part in self.parts:
            part.param_groups[0]["lr"] = self.param_groups[0]["lr"]
        for p, matrix in self.pairs:
            sign = -1 if self.defaults["maximize"] else 1
            matrix.grad = None if p.grad is None else sign * p.grad.flatten(1)
        for part in self.parts:
            part.step()
        muon = self.parts[0]
        matrices = {
            p: {"momentum_buffer": muon.state[m]["momentum_buffer"].view_as(p)}
            for p, m in self.pairs
            if muon.state[m]
        }
        self.state = ChainMap(matrices, *[part.state for part in self.parts[1:]])
