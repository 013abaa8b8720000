"""What the last step did to each parameter, for those who ask afterwards."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor
from torch._compile import _disable_dynamo

from sphereopt.monitor.around import watched
from sphereopt.monitor.probes import PROBES
from sphereopt.monitor.summary import Summary
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
        self._means: dict[Tensor, dict[str, Tensor]] | None = None
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
        if self._means is None:
            self._means = self._found()
        found = self._means.get(param, {})
        return {f"sphereopt/{probe}/{name}": x for probe, x in found.items()}

    def _found(self) -> dict[Tensor, dict[str, Tensor]]:
        """Return the means of every parameter on spheres, by the parameter itself."""
        summary = Summary(PROBES)
        for reading in self._readings:
            summary.take(reading)
        means = summary.means()
        every = watched(self._optimizer, lambda name: True)
        return {p: means.get(name, {}) for name, _, params in every for p in params}
