"""The norms of a run, step by step, for a later run to follow."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from sphereopt import products, spheres
from sphereopt.optim._held import Held, Specs, find

__all__ = ["NormRecorder", "believed", "checked_norms"]

State = dict[str, Any]


def believed(optimizer: Optimizer, held: Held) -> Tensor:
    """Return a copy of the norms that the next step goes by."""
    rho: Tensor | None = optimizer.state.get(held.params[0], {}).get("virtual_radius")
    return held.norm() if rho is None else rho.clone()


class NormRecorder:
    r"""Record the norms of all spheres at every step of any optimizer.

    Args:
        optimizer: Any ``torch.optim`` optimizer, or one of ours.
        spheres: As in :func:`sphereopt.optim.constrain.constrain`: by default the spheres that the
            groups ask for.

    Raises:
        ValueError: If there is no sphere, or a name or a shape does not fit.

    Notes:
        A row is taken before each step, by a step hook, so that row t has the norms that step t
        went by, whoever set them; :attr:`norms` adds the present ones. Under ``radius="free"``
        they are the believed norms. A step that the GradScaler leaves out has no row, but a fused
        optimizer decides that on the device, and gives one. Hooks do not survive deepcopy and
        pickle: attach a new recorder, and load the state of the first. Groups that are added to the
        optimizer later are not recorded.

    References:
        Norm matters: efficient and accurate normalization schemes in deep networks, Hoffer et
        al., 2018, section 2 (norms of a run with weight decay, for one without).

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([[3.0, 4.0]]))
        >>> optimizer = torch.optim.SGD([("w", w)], lr=0.5)
        >>> with NormRecorder(optimizer, {"w": "row"}) as recorder:
        ...     w.grad = torch.tensor([[4.0, -3.0]])
        ...     optimizer.step()
        >>> recorder.norms["w"]
        tensor([[5.0000], [5.5902]], dtype=torch.float64)
    """

    def __init__(self, optimizer: Optimizer, spheres: Specs | None = None) -> None:
        self._optimizer = optimizer
        self._held = find(optimizer, spheres)
        if not self._held:
            raise ValueError("no parameter is on a sphere; build the groups with param_groups")
        self._rows: dict[str, list[Tensor]] = {held.name: [] for held in self._held}
        self._hook = optimizer.register_step_pre_hook(self._before_step)

    def __enter__(self) -> NormRecorder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()

    def remove(self) -> None:
        """Detach from the optimizer; the rows stay."""
        self._hook.remove()

    @property
    def norms(self) -> dict[str, Tensor]:
        """Name to norms, ``(T + 1, k)`` after T steps, on the device; joint names by " + "."""
        with torch.no_grad():
            return {
                held.name: torch.stack([*self._rows[held.name], believed(self._optimizer, held)])
                for held in self._held
            }

    def state_dict(self) -> State:
        """Return what has been recorded, to be saved by ``torch.save``."""
        return {"norms": self.norms}

    def load_state_dict(self, state_dict: State) -> None:
        """Go on from a saved recording: its last row is taken anew before the next step.

        Raises:
            ValueError: If it was made for other spheres.
        """
        norms = checked_norms(state_dict["norms"], self._held)
        self._rows = {name: list(rows[:-1]) for name, rows in norms.items()}

    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer, args: object, kwargs: object) -> None:
        for held in self._held:
            self._rows[held.name].append(believed(optimizer, held))


def checked_norms(norms: Mapping[str, Tensor], held: Iterable[Held]) -> dict[str, Tensor]:
    """Return the norms of the spheres that are wanted, on their devices."""
    result, lengths = {}, set()
    for x in held:
        k = spheres.count(x.sphere, x.params[0].shape)
        if x.name not in norms:
            raise ValueError(
                f"parameter {x.name!r} has no recorded norms; the recording has "
                f"{', '.join(map(repr, norms)) or 'none'}"
            )
        rows = norms[x.name]
        if rows.ndim != 2 or rows.shape[1] != k or len(rows) == 0:
            raise ValueError(
                f"parameter {x.name!r} needs norms of shape (steps, {k}), one row or more, and "
                f"the recording has {tuple(rows.shape)}"
            )
        lengths.add(len(rows))
        device = x.params[0].device
        result[x.name] = rows.to(device, products.scalar_dtype(device))
    if len(lengths) > 1:
        raise ValueError(f"the recording has unlike numbers of rows: {sorted(lengths)}")
    return result
