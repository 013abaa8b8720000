"""The published optimizers that their generic tests run over: one more is one more row."""

from dataclasses import dataclass, field
from typing import Any

from sphereopt.optim import literature


@dataclass(frozen=True)
class Row:
    """An optimizer and options to run it with."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    #: Takes sphere="row", and steps a row without looking at the others.
    by_row: bool = True
    #: Keeps the norm that a sphere has at the first step.
    keeps_norm: bool = False

    def __str__(self) -> str:
        return "-".join([self.name, *map(str, self.options.values())])

    def make(self, params: Any, **more: Any) -> literature._common.LiteratureOptimizer:
        options = {**self.options, **more}
        if self.name in ("AdamP", "SGDP"):
            options.pop("sphere", None)
        return getattr(literature, self.name)(params, **options)


ROWS = [
    Row("AdamP", {"lr": 0.01, "weight_decay": 0.1}, by_row=False),
    Row("AdamP", {"lr": 0.01, "nesterov": True}, by_row=False),
    Row("SGDP", {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}, by_row=False),
    Row("SGDP", {"lr": 0.05, "momentum": 0.9, "project_buffer": False}, by_row=False),
    Row("AdamH", {"lr": 0.02, "sphere": "row"}, keeps_norm=True),
    Row("MuonH", {"lr": 0.02, "sphere": "row"}, by_row=False, keeps_norm=True),
    Row("RotationalAdamW", {"lr": 0.01, "weight_decay": 0.1}, keeps_norm=True),
    Row("RotationalSGD", {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}, keeps_norm=True),
    Row("RotationalLion", {"lr": 0.01, "weight_decay": 0.1, "zero_mean": False}, keeps_norm=True),
    Row("AdamS", {"lr": 0.01, "weight_decay": 0.01}),
    Row("AdamSRT", {"lr": 0.01, "weight_decay": 0.01}),
    Row("SGDG", {"lr": 0.1, "momentum": 0.9}),
    Row("AdamG", {"lr": 0.05, "momentum": 0.9, "grad_clip": 1.0}),
]
