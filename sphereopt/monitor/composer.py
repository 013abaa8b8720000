"""What the last step did to each parameter, for those who ask afterwards."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor
from torch._compile import _disable_dynamo

from sphereopt.monitor.probes import PROBES
from sphereopt.monitor.summary import Summary
from sphereopt.optim._checks import parameter_name, units
from sphereopt.optim._reading import Reading

if TYPE_CHECKING:
    from sphereopt.optim.base import SphereOptimizer

__all__ = ["LastStep"]


class LastStep:
    """Keeps the readings of an optimizer's last step: a few numbers per sphere, on their device.

    Args:
        optimizer: One of ours.
    """

    def __init__(self, optimizer: SphereOptimizer) -> None:
        self._optimizer = optimizer
        self._readings: list[Reading] = []
        self._means: dict[str, dict[str, Tensor]] | None = None
        optimizer.listeners = (*optimizer.listeners, self._readings.append)
        optimizer.register_step_pre_hook(self._begin)

    @_disable_dynamo
    def _begin(self, *_: object) -> None:
        self._readings.clear()
        self._means = None

    def metrics(self, param: Tensor, name: str) -> dict[str, Tensor]:
        """Return the mean of every probe over a parameter's spheres.

        Args:
            param: A parameter of the optimizer.
            name: Its name, for the keys.

        Returns:
            ``sphereopt/<probe>/<name>`` to a tensor of no dimension.
        """
        for index, group in enumerate(self._optimizer.param_groups):
            for start, params in units(group) if group["sphere"] is not None else ():
                if any(p is param for p in params):
                    found = self._found().get(parameter_name(group, index, start, len(params)), {})
                    return {f"sphereopt/{probe}/{name}": x for probe, x in found.items()}
        return {}

    def _found(self) -> dict[str, dict[str, Tensor]]:
        """Return the means of all parameters; made once per step."""
        if self._means is None:
            summary = Summary(PROBES)
            for reading in self._readings:
                summary.take(reading)
            self._means = summary.means()
        return self._means
