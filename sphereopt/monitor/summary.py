"""From one value per sphere to a few numbers per parameter, in one transfer to the host."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from sphereopt.monitor.probes import Probe
from sphereopt.optim._reading import Reading, joined

__all__ = ["QUANTILES", "STATS", "Summary"]

#: The quantiles of each probe over the spheres of a parameter.
QUANTILES = {"min": 0.0, "q25": 0.25, "median": 0.5, "q75": 0.75, "max": 1.0}
#: What is logged of each probe, in this order.
STATS = ("mean", *QUANTILES)
#: Sorting makes two copies: tables of like shape are sorted together up to so many entries.
_TOGETHER = 1 << 15
#: Readings wait until there are so many spheres to evaluate the probes on.
_WAITING = 1024


class Summary:
    """The readings of one step, reduced to mean and quantiles.

    Args:
        probes: Name to probe.
        keep: Whether to keep a parameter, by its name.

    Notes:
        Tables are as wide as the weights, so that their memory is to that of the model as one over
        the number of weights in a sphere.
    """

    def __init__(
        self, probes: Mapping[str, Probe], keep: Callable[[str], bool] = lambda name: True
    ) -> None:
        self._probes, self._keep = probes, keep
        self._waiting: list[Reading] = []
        self._spheres = 0
        self._about: dict[str, dict[str, Any]] = {}
        # By parameter, and by what was measured of its spheres.
        self._tables: dict[tuple[str, tuple[str, ...]], list[Tensor]] = {}

    def take(self, reading: Reading) -> None:
        """Take a reading, for the probes to be evaluated on it, together with others like it.

        Args:
            reading: The numbers of some spheres.

        Raises:
            ValueError: If a probe does not return one value per sphere.
        """
        if not any(map(self._keep, reading.names)):
            return
        if self._waiting and not _alike(self._waiting[0], reading):
            self._evaluate()
        self._waiting.append(reading)
        self._spheres += sum(reading.counts)
        if self._spheres >= _WAITING:
            self._evaluate()

    def add(self, name: str, group: Mapping[str, Any], key: str, values: Tensor) -> None:
        """Add what was measured otherwise.

        Args:
            name: Of the parameter.
            group: Its group.
            key: What was measured.
            values: One for each of some spheres.
        """
        self._evaluate()
        self._put(name, group, (key,), values[None])

    def _evaluate(self) -> None:
        """Evaluate the probes on the readings that wait."""
        if not self._waiting:
            return
        reading = joined(self._waiting)
        self._waiting, self._spheres = [], 0
        known = {}
        for key, probe in self._probes.items():
            value = probe(reading)
            if value is not None:
                _check(key, value, reading)
                known[key] = value.detach()
        if not known:
            return
        group = reading.group
        wide = group["params"][0].dtype in (torch.float64, torch.complex128)
        table = torch.stack(list(known.values())).to(torch.float64 if wide else torch.float32)
        parts = torch.split(table, reading.counts, dim=1)
        for name, part in zip(reading.names, parts, strict=True):
            if self._keep(name):
                self._put(name, group, tuple(known), part)

    def _put(
        self, name: str, group: Mapping[str, Any], keys: tuple[str, ...], table: Tensor
    ) -> None:
        if name not in self._about:
            self._about[name] = {
                "sphere": group["sphere"],
                "kind": group.get("kind", "proved"),
                "lr": group["lr"],
                "weight_decay": group.get("weight_decay", 0.0),
            }
        if table.shape[1]:
            self._tables.setdefault((name, keys), []).append(table)

    def means(self) -> dict[str, dict[str, Tensor]]:
        """Return for each parameter the mean of every probe, still on the device."""
        self._evaluate()
        found: dict[str, dict[str, Tensor]] = {}
        for (name, keys), parts in self._tables.items():
            values = torch.cat(parts, 1).mean(dim=1).unbind()
            found.setdefault(name, {}).update(zip(keys, values, strict=True))
        return found

    def parameters(self, metrics: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, float]]:
        """Return the entries of a row, and its metrics, after one transfer to the host.

        Args:
            metrics: Numbers or tensors of one element.

        Returns:
            Name to entry, and metric to number.
        """
        self._evaluate()
        tables = {key: torch.cat(parts, 1) for key, parts in self._tables.items()}
        self._tables.clear()
        wide = {key: x.dtype == torch.float64 for key, x in tables.items()}
        order, values = _transferred(tables, metrics)
        entries: dict[str, Any] = {
            name: {key: _number(x) for key, x in about.items()}
            for name, about in self._about.items()
        }
        for name, keys in order:
            entry, count = entries[name], tables[name, keys].shape[1]
            entry["count"] = max(entry.get("count", 0), count)
            digits = 17 if wide[name, keys] else 9
            for key in keys:
                entry[key] = {stat: _rounded(next(values), digits) for stat in STATS}
        return (
            {name: entry for name, entry in entries.items() if "count" in entry},
            {key: next(values) for key in metrics},
        )


def _alike(one: Reading, other: Reading) -> bool:
    """Return whether the probes mean the same for both: Muon's only matrices have a law."""
    dims = [{len(shape) for shape in reading.shapes} for reading in (one, other)]
    return one.group is other.group and dims[0] == dims[1]


def _check(key: str, value: Tensor, reading: Reading) -> None:
    wanted = reading.travel.norm.shape
    if value.shape != wanted:
        raise ValueError(
            f"probe {key!r} returned shape {tuple(value.shape)}, not one value per sphere, "
            f"{tuple(wanted)}"
        )


def _transferred(
    tables: Mapping[tuple[str, tuple[str, ...]], Tensor], metrics: Mapping[str, Any]
) -> tuple[list[tuple[str, tuple[str, ...]]], Iterator[float]]:
    """Return the tables' keys in the order of the values, and the values: tables, then metrics."""
    buckets: dict[object, list[tuple[str, tuple[str, ...]]]] = {}
    for key, table in tables.items():
        buckets.setdefault((table.shape, table.dtype, table.device), []).append(key)
    order, parts = [], []
    for keys in buckets.values():
        step = max(1, _TOGETHER // tables[keys[0]].numel())
        for at in range(0, len(keys), step):
            some = keys[at : at + step]
            order += some
            parts.append(_summarize(torch.stack([tables[key] for key in some])).flatten())
    parts += [torch.as_tensor(x).detach().reshape(1) for x in metrics.values()]
    if not parts:
        return [], iter(())
    first, dtype = parts[0].device, torch.float32 if parts[0].device.type == "mps" else torch.double
    return order, iter(torch.cat([x.to(first, dtype) for x in parts]).tolist())


def _summarize(tables: Tensor) -> Tensor:
    """Return mean and quantiles of the last dim, by sorting: ``torch.quantile`` stops at 2**24."""
    ordered = tables.sort(dim=-1).values
    place = [q * (tables.shape[-1] - 1) for q in QUANTILES.values()]
    found = [
        torch.lerp(ordered[..., int(at)], ordered[..., -int(-at // 1)], at % 1) for at in place
    ]
    return torch.stack([tables.mean(dim=-1), *found], dim=-1)


def _number(value: Any) -> Any:
    """Return a learning rate or weight decay, which may be a tensor, as a number."""
    return value if isinstance(value, str) else float(value)


def _rounded(value: float, digits: int) -> float:
    """Return the digits that the table has: 0.1 instead of 0.10000000149011612."""
    return float(f"{value:.{digits}g}")
