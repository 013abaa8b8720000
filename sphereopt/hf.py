"""Our optimizers inside the ``Trainer`` of transformers."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from sphereopt.detect import SphereReport, find_spheres
from sphereopt.detect.copying import unwrap
from sphereopt.groups import param_groups
from sphereopt.names import plain
from sphereopt.optim import SphereAdam, SphereOptimizer

__all__ = ["trainer_kwargs"]

Group = dict[str, Any]
Inputs = Tensor | Sequence[Any] | Mapping[str, Any]


def trainer_kwargs(
    model: nn.Module,
    example_inputs: Inputs | None = None,
    *,
    optimizer: type[Optimizer] = SphereAdam,
    report: SphereReport | Mapping[Any, str | None] | None = None,
    groups: Iterable[Group] | None = None,
    **options: Any,
) -> dict[str, tuple[Any, dict[str, Any]]]:
    """Return what makes a ``transformers.Trainer`` train with one of our optimizers.

    Args:
        model: The model to train, or one like those that ``model_init`` makes.
        example_inputs: A batch, to find the spheres with: keyword inputs as the data collator
            makes them, positional ones as a tuple, or one tensor.
        optimizer: Any ``torch.optim`` class.
        report: Instead of a batch: what ``find_spheres`` found, or names to specs.
        groups: Instead of both: groups of ``param_groups`` for this model, with your own ``lr``,
            constrained weights and so on.
        **options: Options of the optimizer; ``lr`` is needed.

    Returns:
        ``{"optimizer_cls_and_kwargs": (factory, options)}``, for ``Trainer(..., **kwargs)``. It
        serves any number of trainers: the optimizer is made when a trainer asks for it, from the
        parameters that its model then has, found by name.

    Raises:
        TypeError: If ``lr`` is missing, or not exactly one of ``example_inputs``, ``report`` and
            ``groups`` is given.
        ValueError: As of ``param_groups`` and of the optimizer; when the optimizer is made, also if
            the trainer's model has other trainable parameters than ``model``.
        RuntimeError: When the optimizer is made, under FSDP, DeepSpeed or Megatron-LM.

    Notes:
        The trainer's scheduler multiplies ``lr``, as ever. ``TrainingArguments.learning_rate`` and
        ``weight_decay`` are not read: transformers shows them to optimizers of its own only, and on
        spheres lr is an angle. Weight decay goes to ordinary weights (not to norm gains and
        biases), and to spheres only under ``radius="free"``: on a sphere of fixed radius it has no
        meaning. With ``torch.optim`` classes it goes to weights on spheres as well.

        Groups in ``optimizer_cls_and_kwargs`` itself are taken out by the first trainer that makes
        its optimizer; the next one would silently train without spheres.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
        >>> result = trainer_kwargs(model, torch.randn(8, 4), lr=3e-3, weight_decay=0.1)
        >>> factory, options = result["optimizer_cls_and_kwargs"]
        >>> optimizer = factory()(model, **options)  # as the trainer does
        >>> [(group["sphere"], group["weight_decay"]) for group in optimizer.param_groups]
        [('row', 0.0), (None, 0.0)]
    """
    if "lr" not in options:
        raise TypeError(
            "lr is missing: trainer_kwargs(model, batch, lr=3e-3); it replaces "
            "TrainingArguments.learning_rate"
        )
    if sum(x is not None for x in (example_inputs, report, groups)) != 1:
        raise TypeError("give one of example_inputs, report and groups: where the spheres are")
    if example_inputs is not None:
        report = _found(model, example_inputs)
    if report is not None:
        groups = param_groups(model, report)
    factory = _Factory(model, optimizer, groups or ())
    return {"optimizer_cls_and_kwargs": (factory, options)}


def _found(model: nn.Module, inputs: Inputs) -> SphereReport:
    if isinstance(inputs, Mapping):
        return find_spheres(model, (), dict(inputs))
    return find_spheres(model, inputs if isinstance(inputs, Tensor) else tuple(inputs))


class _Factory:
    """Make the optimizer of a trainer: ``factory()(model, **options)``, the trainer's protocol."""

    def __init__(
        self, model: nn.Module, optimizer: type[Optimizer], groups: Iterable[Group]
    ) -> None:
        self.optimizer = optimizer
        names: dict[Tensor, str] = {p: name for name, p in unwrap(model).named_parameters()}
        self._groups = [_by_name(group, names) for group in groups]

    def __call__(self, model: object = None, **options: Any) -> Any:
        """Return itself, or, for a model, the optimizer."""
        if model is None and not options:
            return self
        if not isinstance(model, nn.Module):
            raise RuntimeError(
                "this version of transformers does not hand its model to an optimizer's factory; "
                'run: pip install --upgrade "sphereopt[hf]"'
            )
        _refuse_sharding()
        params = {plain(name): p for name, p in unwrap(model).named_parameters()}
        groups = [_completed(group, params, options, self.optimizer) for group in self._groups]
        _check_covered(groups, params)
        return self.optimizer(groups, **options)


def _by_name(group: Group, names: Mapping[Tensor, str]) -> Group:
    """Return a group with names instead of parameters."""
    given = [p[1] if isinstance(p, tuple) else p for p in group["params"]]
    for p in given:
        if p not in names:
            raise ValueError(
                f"a group has a tensor of shape {tuple(p.shape)} that is no parameter of the "
                "model; build the groups from this model"
            )
    kept = {k: v for k, v in group.items() if k != "param_names"}
    return {**kept, "params": [plain(names[p]) for p in given]}


def _completed(
    group: Group, params: Mapping[str, Tensor], options: Group, optimizer: type[Optimizer]
) -> Group:
    """Return a group with the parameters of a model."""
    absent = [name for name in group["params"] if name not in params]
    if absent:
        raise ValueError(
            f"the trainer's model has no parameter {absent[0]!r}; call trainer_kwargs for a model "
            "like the one that is trained"
        )
    fixed = group.get("radius", options.get("radius", "fixed")) == "fixed"
    ours = issubclass(optimizer, SphereOptimizer)
    decay = {"weight_decay": 0.0} if ours and fixed and group.get("sphere") else {}
    return {**decay, **group, "params": [(name, params[name]) for name in group["params"]]}


def _check_covered(groups: Sequence[Group], params: Mapping[str, Tensor]) -> None:
    covered = {name for group in groups for name, _ in group["params"]}
    missing = [name for name, p in params.items() if p.requires_grad and name not in covered]
    if missing:
        raise ValueError(
            f"{len(missing)} trainable parameter(s) of the trainer's model are in none of the "
            f"groups: {', '.join(missing)}; call trainer_kwargs when it is known what is trained"
        )


def _refuse_sharding() -> None:
    state = sys.modules.get("accelerate.state")  # a trainer has loaded it
    if state is None or not state.is_initialized():
        return
    kind = state.AcceleratorState().distributed_type.value
    if kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        raise RuntimeError(
            f"{kind} cuts parameters into shards, and a sphere needs its weights whole; use one "
            "device or DDP (torchrun without fsdp= and deepspeed=)"
        )
