r"""Schedules of the radius: the norm that a sphere optimizer believes, set from outside.

Under ``radius="free"`` an optimizer of ours carries one number per sphere, the norm :math:`\rho`
that it believes the weights to have; the stored weights keep theirs. The effective learning rate
is :math:`lr/\rho^2` for SGD and :math:`lr/\rho` for Adam, so whoever sets :math:`\rho` schedules
training without touching ``lr``. The objects here are used like learning rate schedulers::

    optimizer.step()
    scheduler.step()   # of lr, if there is one: first
    schedule.step()

Left alone, :math:`\rho` follows the plain optimizer; these objects overwrite it for the next step.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from sphereopt import spheres
from sphereopt.optim._held import Held, by_groups
from sphereopt.optim.base import SphereError, SphereOptimizer
from sphereopt.optim.recorder import believed, checked_norms

__all__ = ["RadiusReplay", "RadiusSchedule"]

State = dict[str, Any]

#: Buffers that fall with the square of the norm; first moments fall with the norm itself.
_SQUARES = ("exp_avg_sq", "max_exp_avg_sq", "sphere_avg_sq", "max_sphere_avg_sq")


def _check_ours(optimizer: object) -> None:
    if not isinstance(optimizer, SphereOptimizer):
        raise TypeError(
            f"{type(optimizer).__name__} knows one norm of its weights, the one they have; use a "
            "sphere optimizer with radius='free'"
        )


class _Schedule(ABC):
    """Sets the believed norm of the next step: the part that schedules share."""

    def __init__(self, optimizer: SphereOptimizer, groups: Iterable[int] | None) -> None:
        _check_ours(optimizer)
        self.optimizer = optimizer
        free = [
            index
            for index, group in enumerate(optimizer.param_groups)
            if group["sphere"] is not None and group["radius"] == "free"
        ]
        wanted = free if groups is None else list(groups)
        for index in wanted:
            if index not in free:
                raise ValueError(
                    f"group {index} has no believed norm; give it a sphere and radius='free'"
                )
        if not wanted:
            raise ValueError("no group has a sphere and radius='free': there is nothing to set")
        self._held = [held for held in by_groups(optimizer) if held.groups[0] in wanted]
        self._start = self._clock()

    @property
    def last_step(self) -> int:
        """How many steps the optimizer has made since this was attached, by its own count."""
        return self._clock() - self._start

    @abstractmethod
    def step(self) -> None:
        """Set the believed norms for the next step of the optimizer."""

    def _clock(self) -> int:
        states = [self.optimizer.state.get(p, {}) for x in self._held for p in x.params]
        return max((int(state["step"]) for state in states if "step" in state), default=0)

    @torch.no_grad()
    def _believe(self, held: Held, rho: Tensor) -> None:
        states = [self.optimizer.state[p] for p in held.params]
        kept = states[0].get("virtual_radius")
        kept = rho.clone() if kept is None else kept.copy_(rho)
        for state in states:
            state["virtual_radius"] = kept


class RadiusReplay(_Schedule):
    r"""Let the believed norms follow a recorded run.

    .. math:: \rho_t = (1-lr_t\,\lambda)^{1/(1+h)}\;\rho_t^{\text{recorded}}

    with h the homogeneity of the direction: 1 for SGD, 0 for Adam. A run *without* weight decay
    then has the effective learning rate of the recorded one *with*.

    Args:
        optimizer: A sphere optimizer with groups of ``radius="free"``.
        norms: Name to norms ``(steps, k)``, row t from before step t: ``NormRecorder(...).norms``.
        weight_decay: :math:`\lambda` of the recorded run. 0 replays the norms as they are, which is
            the correction of Hoffer et al.
        groups: Numbers of the groups to set; by default all that are free.

    Raises:
        TypeError: If the optimizer is not one of ours.
        ValueError: If a sphere has no norms of its shape, a group is not free, or has weight decay
            of its own beside ``weight_decay``, or is Adam with L2.

    Notes:
        Call ``step()`` after the scheduler of lr: the factor has the lr of the next step. It counts
        steps by the optimizer's own count: one that the GradScaler left out does not advance it.

        With decay, SGD without momentum turns by :math:`lr/((1-lr\lambda)\rho^2)` times the
        gradient at norm 1, so the replay is exact under any schedule of lr; without the factor, as
        Hoffer et al. have it, lr is too small by :math:`1-lr\,\lambda`. It is exact for AdamW and
        Lion at constant lr, but for ``eps``. With heavy ball no norm makes it exact, because L2
        enters the buffer. Past its first :math:`1/(1-\mu)` steps a run of constant lr is that of
        ``momentum`` :math:`\mu/\alpha` and ``weight_decay`` :math:`(1-\alpha)/lr` here, with
        :math:`\alpha` the larger root of :math:`\alpha^2-(1+\mu-lr\,\lambda)\,\alpha+\mu=0`.

    References:
        Norm matters: efficient and accurate normalization schemes in deep networks, Hoffer et
        al., 2018, section 2 (learning rate correction).
        An Exponential Learning Rate Schedule for Deep Learning, Li and Arora, 2020 (the root
        :math:`\alpha`).

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([[3.0, 4.0]]))
        >>> optimizer = sphereopt.SphereSGD([("w", w)], lr=0.1, sphere="row", radius="free")
        >>> replay = RadiusReplay(optimizer, {"w": torch.tensor([[5.0], [6.0]])})
        >>> w.grad = torch.ones(1, 2)
        >>> optimizer.step()
        >>> replay.step()
        >>> optimizer.state[w]["virtual_radius"], w.detach().norm()
        (tensor([6.], dtype=torch.float64), tensor(5.))
    """

    def __init__(
        self,
        optimizer: SphereOptimizer,
        norms: Mapping[str, Tensor],
        *,
        weight_decay: float = 0.0,
        groups: Iterable[int] | None = None,
    ) -> None:
        super().__init__(optimizer, groups)
        self._norms = checked_norms(norms, self._held)
        self._weight_decay = weight_decay
        for held in self._held if weight_decay != 0 else ():
            self._check_decay(held)
        self.step()

    def _check_decay(self, held: Held) -> None:
        group = self.optimizer.param_groups[held.groups[0]]
        own, asked = group["weight_decay"], self._weight_decay
        if own != 0:
            raise ValueError(
                f"parameter {held.name!r} has weight_decay={own!r}, and the replay is to stand for "
                f"weight_decay={asked!r}: set one of them to 0"
            )
        if self.optimizer.homogeneity == 0 and self._decays(group)[0] != 0:
            raise ValueError(
                f"weight_decay={asked!r} of {type(self.optimizer).__name__} is L2 in the gradient "
                f"of {held.name!r}, which no norm stands for; use decoupled weight decay"
            )

    def _decays(self, group: State) -> tuple[float, float | Tensor]:
        return self.optimizer.decay({**group, "weight_decay": self._weight_decay})

    def _factor(self, held: Held) -> float | Tensor:
        group = self.optimizer.param_groups[held.groups[0]]
        l2, shrink = self._decays(group)
        left = shrink * (1 - group["lr"] * l2)
        if not isinstance(left, Tensor) and left <= 0:
            raise ValueError(
                f"lr={group['lr']!r} times weight_decay={self._weight_decay!r} is 1 or more for "
                f"parameter {held.name!r}: a step of the recorded run would leave nothing of it"
            )
        factor: float | Tensor = left ** (1 / (1 + self.optimizer.homogeneity))
        return factor

    def step(self) -> None:
        """Set the believed norms to those from before the recorded run's next step.

        Raises:
            SphereError: If the recording has no such step.
        """
        row = self.last_step
        for held in self._held:
            norms = self._norms[held.name]
            if not 0 <= row < len(norms):
                raise SphereError(
                    f"the recording of {held.name!r} has norms for steps 0 to {len(norms) - 1}, "
                    f"and none for step {row}; record a longer run, or load the replay's state "
                    "with the optimizer's"
                )
            self._believe(held, norms[row] * self._factor(held))

    def state_dict(self) -> State:
        """Return where the replay began; the norms are not part of it."""
        return {"start": self._start}

    def load_state_dict(self, state_dict: State) -> None:
        """Go on from a checkpoint; load the optimizer's first.

        Args:
            state_dict: What ``state_dict()`` returned.
        """
        self._start = state_dict["start"]
        self.step()


class RadiusSchedule(_Schedule):
    r"""Schedule the radius in place of the learning rate.

    .. math:: \rho_t = \rho_0\,f(t)

    Args:
        optimizer: A sphere optimizer with groups of ``radius="free"``.
        factor: :math:`f`: from the number of steps made to a positive number.
        rescale_moments: Let the momentum and second moments follow, as if all gradients had been
            taken at the new norm. False leaves them as they are, as rescaled weights would.
        groups: Numbers of the groups to set; by default all that are free.

    Raises:
        TypeError: If the optimizer is not one of ours.
        ValueError: If a group is not free, or a factor is not positive.

    Notes:
        Between steps the norm does not grow: growth and ``weight_decay`` are overwritten.
        :math:`f = \varphi^{-1/(1+h)}`, with h the homogeneity of the direction, is the schedule
        :math:`\varphi` of lr at a fixed radius: dividing lr by 10 is a radius times
        :math:`\sqrt{10}` for SGD, and times 10 for Adam. This is exact with ``rescale_moments``
        (for Adam up to ``eps``), with any momentum. Without it, a gradient of k steps ago weighs
        :math:`\sqrt{\varphi_{t-k}/\varphi_t}` times what it would under SGD's lr schedule: exact
        without momentum only. Adam's second moment remembers the larger gradients for
        :math:`1/(1-\beta_2)` steps, so that for so long a radius times 10 is lr divided by up to
        100.

        Steps are counted by the optimizer's own count, so one that the GradScaler left out does
        not advance the schedule, and ``step()`` may be called at any time.

    References:
        Norm matters: efficient and accurate normalization schemes in deep networks, Hoffer et
        al., 2018, section 2 (norm scheduling; their code rescales weights and leaves momentum).

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([[3.0, 4.0]]))
        >>> optimizer = sphereopt.SphereSGD([("w", w)], lr=0.1, sphere="row", radius="free")
        >>> schedule = RadiusSchedule.from_lr(optimizer, lambda t: 0.25 if t >= 1 else 1.0)
        >>> w.grad = torch.ones(1, 2)
        >>> optimizer.step()
        >>> schedule.step()
        >>> optimizer.state[w]["virtual_radius"], w.detach().norm()
        (tensor([10.], dtype=torch.float64), tensor(5.))
    """

    def __init__(
        self,
        optimizer: SphereOptimizer,
        factor: Callable[[int], float],
        *,
        rescale_moments: bool = True,
        groups: Iterable[int] | None = None,
    ) -> None:
        super().__init__(optimizer, groups)
        self._function = factor
        self._rescale_moments = rescale_moments
        self._radius = {held.name: believed(optimizer, held) for held in self._held}
        self._factor = self._next_factor()
        self._set()

    @classmethod
    def from_lr(
        cls,
        optimizer: SphereOptimizer,
        lr_factor: Callable[[int], float],
        *,
        rescale_moments: bool = True,
        groups: Iterable[int] | None = None,
    ) -> RadiusSchedule:
        r"""Return the schedule of the radius that does what a schedule of lr does.

        Args:
            optimizer: As above; its ``homogeneity`` decides.
            lr_factor: :math:`\varphi`, as for ``torch.optim.lr_scheduler.LambdaLR``, positive.
            rescale_moments: As above.
            groups: As above.

        Returns:
            A ``RadiusSchedule`` with :math:`f = \varphi^{-1/(1+h)}`.

        Raises:
            TypeError: If the optimizer is not one of ours.
            ValueError: If :math:`\varphi` is not positive, now or at a later step.
        """
        _check_ours(optimizer)
        power = -1 / (1 + optimizer.homogeneity)

        def factor(step: int) -> float:
            phi = lr_factor(step)
            if not phi > 0:
                raise ValueError(
                    f"lr_factor({step}) is {phi!r}, which no finite radius stands for; let it end "
                    "above 0"
                )
            return float(phi**power)

        return cls(optimizer, factor, rescale_moments=rescale_moments, groups=groups)

    def step(self) -> None:
        """Set the believed norms for the next step of the optimizer.

        Raises:
            ValueError: If the factor is not positive. Nothing has been changed then.
        """
        factor = self._next_factor()
        ratio, self._factor = factor / self._factor, factor
        if self._rescale_moments and ratio != 1:
            self._rescale(ratio)
        self._set()

    def _next_factor(self) -> float:
        step = self.last_step
        factor = float(self._function(step))
        if not 0 < factor < math.inf:
            raise ValueError(f"factor({step}) is {factor!r}; a radius needs a positive number")
        return factor

    def _set(self) -> None:
        for held in self._held:
            self._believe(held, self._radius[held.name] * self._factor)

    @torch.no_grad()
    def _rescale(self, ratio: float) -> None:
        """Bring the moments to gradients at norms that are ``ratio`` times as large."""
        powers = {
            **dict.fromkeys(self.optimizer.tangent_buffers, -1),
            **dict.fromkeys(_SQUARES, -2),
        }
        for held in self._held:
            for i, p in enumerate(held.params):
                state = self.optimizer.state[p]
                for key in powers.keys() & state.keys():
                    if key in self.optimizer.sphere_numbers:
                        # Joint members share these, and the first member's count.
                        parts = [state[key]] if i == 0 else []
                    else:
                        parts = spheres.split(state[key], held.sphere)
                    for part in parts:
                        part.mul_(ratio ** powers[key])

    def state_dict(self) -> State:
        """Return where the schedule began and stands; the function is not part of it."""
        radius = {name: rho.clone() for name, rho in self._radius.items()}
        return {"start": self._start, "factor": self._factor, "radius": radius}

    def load_state_dict(self, state_dict: State) -> None:
        """Go on from a checkpoint; load the optimizer's first.

        Args:
            state_dict: What ``state_dict()`` returned.

        Raises:
            ValueError: If it was made for other spheres. Nothing has been changed then.
        """
        saved = state_dict["radius"]
        shapes = {name: rho.shape for name, rho in self._radius.items()}
        if {name: rho.shape for name, rho in saved.items()} != shapes:
            raise ValueError(
                f"the checkpoint is of the radii of {', '.join(saved)}, and this schedule sets "
                f"those of {', '.join(shapes)}"
            )
        self._start, self._factor = state_dict["start"], state_dict["factor"]
        for name, rho in self._radius.items():
            rho.copy_(saved[name])
        self.step()
