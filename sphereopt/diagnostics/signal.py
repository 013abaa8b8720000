"""Signal propagation: variance, similarity, rank and gradient of every layer."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from sphereopt.diagnostics import _layers, _measure, findings
from sphereopt.diagnostics._text import Result, columns, number
from sphereopt.diagnostics._untouched import as_inputs, chosen, inner_model, untouched
from sphereopt.diagnostics.findings import Finding
from sphereopt.products import accumulator

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Layer", "Propagation", "propagation"]


@final
@dataclass(frozen=True)
class Layer:
    """One call of one module.

    Attributes:
        name: Its name in the model, without wrappers.
        call: 1 for the first time it ran, 2 for the second, ...
        kind: Name of its class.
        role: ``"weights"``, ``"embedding"``, ``"normalizer"``, ``"activation"`` or ``"other"``.
        shape: Shape of its output (of the first floating-point tensor in it).
        variance: Variance over all dims but the channels', mean over channels.
        similarity: Mean cosine of the outputs of two different samples; None if there are no two
            samples in it.
        stable_rank: Of the unit-normalised samples, between 1 and their number; None likewise.
        grad_norm: Frobenius norm of the loss's gradient with respect to the output; None where
            none is defined.
        dead: Share of the channels that are constant over batch and positions.
        lost: Share of the entries that are NaN or infinite.
        grad_lost: Likewise, of the gradient.
    """

    name: str
    call: int
    kind: str
    role: str
    shape: tuple[int, ...]
    variance: float
    similarity: float | None
    stable_rank: float | None
    grad_norm: float | None
    dead: float
    lost: float
    grad_lost: float | None

    @property
    def label(self) -> str:
        """The name, and the number of the call from the second on."""
        name = self.name or self.kind
        return name if self.call == 1 else f"{name}[{self.call}]"


@final
@dataclass(frozen=True, repr=False)
class Propagation(Result):
    """What :func:`propagation` measured; ``print`` it for a table.

    Attributes:
        layers: One row per call of an observed module, in the order they ran.
        samples: N, the samples of the batch.
        explosion: Gradient norm of the first pre-activation over that of the last.
        findings: What stands out.
        notes: What could not be measured, and what the loss was.
    """

    layers: tuple[Layer, ...]
    samples: int
    explosion: float | None
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]

    def __repr__(self) -> str:
        return f"Propagation({len(self.layers)} layers, {len(self.findings)} findings)"

    def __str__(self) -> str:
        header = ("layer", "kind", "variance", "similarity", "stable rank", "grad norm", "dead")
        rows = [
            (
                x.label,
                x.kind,
                number(x.variance),
                number(x.similarity),
                number(x.stable_rank),
                number(x.grad_norm),
                f"{x.dead:.0%}",
            )
            for x in self.layers
        ]
        lines = columns([header, *rows], names=2)
        if self.explosion is not None:
            lines.append(f"gradient norm, first over last pre-activation: {self.explosion:.3g}")
        lines += [f"! {finding}" for finding in self.findings]
        return "\n".join([*lines, *(f"Note: {note}" for note in self.notes)])

    def plot(self) -> Figure:
        """Return a matplotlib figure: the four statistics over depth."""
        from sphereopt.diagnostics.drawing import draw_propagation

        return draw_propagation({"": self})


@dataclass
class _Row:
    """A layer while it is measured: numbers stay on the device."""

    name: str
    call: int
    module: nn.Module
    shape: tuple[int, ...]
    numbers: Tensor
    gram: Tensor | None
    by_sample: bool
    gradient: list[Tensor] = field(default_factory=list)


@final
class _Recorder:
    """Forward hooks that reduce each output, and tensor hooks that reduce its gradient."""

    def __init__(
        self, names: dict[nn.Module, str], samples: int, batch_dim: int, most: int
    ) -> None:
        self.names, self.samples, self.batch_dim, self.most = names, samples, batch_dim, most
        self.calls: Counter[str] = Counter()
        self.rows: list[_Row] = []
        self.edges: list[GradientEdge] = []
        self.channels_first: bool | None = None
        self.handles = ExitStack()
        self.recording = True

    def attach(self) -> None:
        for module in self.names:
            handle = module.register_forward_hook(self._forward)
            self.handles.callback(handle.remove)

    def _forward(self, module: nn.Module, args: Any, output: Any) -> None:
        leaves = pytree.tree_leaves(output)
        floats = (t for t in leaves if isinstance(t, Tensor) and t.is_floating_point())
        x = next(floats, None)
        # Checkpointed parts run again in backward.
        if not self.recording or x is None or x.dim() == 0 or x.numel() == 0:
            return
        dim = _layers.channel_dim(module, x, self.channels_first)
        if x.dim() > 2:
            self.channels_first = dim == 1
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            numbers, gram = _measure.signal_numbers(
                x.detach(), self.samples, self.batch_dim, dim, self.most
            )
        name = self.names[module]
        self.calls[name] += 1
        row = _Row(name, self.calls[name], module, tuple(x.shape), numbers, gram, gram is not None)
        self.rows.append(row)
        if x.requires_grad:
            self._watch(x, row)

    def _watch(self, x: Tensor, row: _Row) -> None:
        def reduce(grad: Tensor) -> None:
            with torch.no_grad():
                row.gradient[:] = [_measure.gradient_numbers(grad)]

        handle: RemovableHandle = x.register_hook(reduce)  # type: ignore[no-untyped-call]
        self.handles.callback(handle.remove)
        # An edge, not the tensor: it outlives what is done to the tensor in place, and frees it.
        self.edges.append(get_gradient_edge(x))

    def backward(self, loss: Tensor) -> str | None:
        """Send the gradient through the observed layers; return why not, if not."""
        self.recording = False
        if loss.grad_fn is None or not self.edges:
            return "no gradients: the loss does not depend on any observed layer through autograd"
        leads = _below(loss.grad_fn, {edge.node for edge in self.edges})
        if any(node.name().startswith("CheckpointFunction") for node in leads):
            return (
                "no gradients: checkpointing with use_reentrant=True has no partial backward; "
                "use_reentrant=False has"
            )
        ends = [edge for edge in self.edges if not leads.get(edge.node, False)]
        # Of the layers nearest the input alone: the others' gradients pass by and are not kept.
        torch.autograd.grad(loss, ends, allow_unused=True)
        return None


def _below(root: Node, observed: set[Node]) -> dict[Node, bool]:
    """Return all nodes under a root, and whether an observed one is further under them."""
    leads: dict[Node, bool] = {}
    stack = [root]
    while stack:
        following = [node for node, _ in stack[-1].next_functions if node is not None]
        waiting = [node for node in following if node not in leads]
        if waiting:
            stack += waiting
        else:
            leads[stack.pop()] = any(node in observed or leads[node] for node in following)
    return leads


def propagation(
    model: nn.Module,
    args: tuple[Any, ...] | Tensor = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    loss: Callable[[Any], Tensor] | None = None,
    layers: _layers.Choice = None,
    batch_dim: int = 0,
    gram_samples: int = 128,
) -> Propagation:
    r"""Measure how a batch propagates forward, and a loss's gradient backward, layer by layer.

    With :math:`x_i` the output of a layer for sample i, flattened, :math:`m_i=x_i/|x_i|` and
    :math:`G_{ij}=\langle m_i,m_j\rangle`:

    .. math::
        \text{variance}=\operatorname*{mean}_c\operatorname{Var}(x_c),\qquad
        \text{similarity}=\frac{|\sum_i m_i|^2-\sum_i|m_i|^2}{N(N-1)},\qquad
        \text{stable rank}=\frac{\operatorname{tr}G}{|G|_2},\qquad
        \text{explosion}=\frac{|\partial L/\partial x^{(1)}|}{|\partial L/\partial x^{(last)}|}

    Args:
        model: Any module, in the mode to be measured. It is left as found: parameters and their
            ``.grad``, buffers, modes, attributes of modules, hooks and all random generators, also
            if it raises. Hooks of its own run as always.
        args: Positional inputs as a tuple, or a single tensor. N is the size of the first tensor.
        kwargs: Keyword inputs.
        loss: Maps the model's output to a scalar, such as ``lambda out: cross_entropy(out, y)``.
            By default the output's "loss" if it has one, else a fixed random linear functional
            :math:`\frac1N\sum_i\langle v_i,f(x_i)\rangle`, v standard normal, of its "logits",
            "last_hidden_state" or all of it: a gradient for batches without labels.
        layers: Patterns of module names, ``"blocks.*.mlp"``, or a function of name and module. By
            default modules with parameters of their own, normalizers and activations; functional
            activations are no modules and not seen.
        batch_dim: Where the samples lie in outputs: 1 for sequence-first recurrent networks. A
            first dim of k N entries is taken for k rows of each sample.
        gram_samples: Samples that the stable rank is taken of, at most; see Notes.

    Returns:
        Rows, explosion ratio (over the outputs of layers with weights that another observed layer
        follows: the last one of a classifier is no pre-activation), findings in words.

    Raises:
        TypeError: If ``args`` is neither tuple nor tensor.
        ValueError: If there is no tensor in the inputs, nothing to observe, no floating-point
            output, or the loss is not a scalar.

    Notes:
        Memory: a forward's, as in training, and one layer at a time in float32; gradients are
        reduced as they pass, and parameters get none. Per layer a Gram matrix of at most
        ``gram_samples`` by ``gram_samples`` stays until the end (64 KiB); its eigenvalues are taken
        on the host, which waits for the device once. Sums run in float32 or wider, scaled so that
        squares of float16 do not overflow. DataParallel, DistributedDataParallel and compiled
        modules are looked into: the module inside runs, uncompiled, on this process's batch.

        The authors' code takes similarity and rank of pre-selected layers every iteration, from
        the N by N matrix; here the sum of the unit vectors gives the similarity. A sample whose
        activation is zero has no direction and counts as orthogonal to all.

    References:
        Beyond BatchNorm: Towards a Unified Understanding of Normalization in Deep Learning,
        Lubana, Dick and Tanaka, 2021.

    Example:
        >>> from torch import nn
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> found = propagation(model, torch.randn(32, 8))
        >>> [layer.name for layer in found.layers]
        ['0', '1', '2']
        >>> 0 < found.layers[0].similarity < found.layers[1].similarity < 1
        True
    """
    inner = inner_model(model)
    tensors = [t for t in pytree.tree_leaves((args, dict(kwargs or {}))) if isinstance(t, Tensor)]
    sized = [t for t in tensors if t.dim() > batch_dim]
    if not sized:
        raise ValueError(f"no input tensor with a dim {batch_dim}: pass a batch as args or kwargs")
    samples = sized[0].shape[batch_dim]
    names = {module: name for name, module in _layers.observed(inner, layers).items()}
    recorder = _Recorder(names, samples, batch_dim, gram_samples)
    frozen = not any(p.requires_grad for p in inner.parameters())
    with untouched(inner), recorder.handles, torch.enable_grad():
        recorder.attach()
        positional, named = as_inputs(args, kwargs, frozen)
        output = inner(*positional, **named)
        value, note = _loss_of(output, loss, samples)
        trouble = recorder.backward(value)
    rows = _rows(recorder)
    explosion = _explosion(rows)
    found = findings.of_propagation(rows, samples, explosion)
    return Propagation(rows, samples, explosion, found, tuple(x for x in (note, trouble) if x))


def _loss_of(
    output: Any, loss: Callable[[Any], Tensor] | None, samples: int
) -> tuple[Tensor, str | None]:
    if loss is not None:
        value = loss(output)
        if not isinstance(value, Tensor) or value.numel() != 1:
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"loss returned {shape}; it must return a scalar tensor")
        return value.reshape(()), None
    parts = chosen(output)
    if not parts:
        raise ValueError("the model's output holds no floating-point tensor; pass loss=")
    if len(parts) == 1 and parts[0].dim() == 0:
        return parts[0], None
    generator = torch.Generator().manual_seed(0)
    total = parts[0].new_zeros((), dtype=accumulator(parts[0].dtype))
    for part in parts:
        v = torch.randn(part.shape, generator=generator).to(part.device, total.dtype)
        total = total + (part.to(total.dtype) * v).sum().to(total.device) / samples
    return total, "the loss is a fixed random linear functional of the output; pass loss= for yours"


def _rows(recorder: _Recorder) -> tuple[Layer, ...]:
    """Return the measured rows, moved to the host at once."""
    rows = recorder.rows
    numbers = _measure.gathered([row.numbers for row in rows])
    with_grad = [row for row in rows if row.gradient]
    gradients = _measure.gathered([row.gradient[0] for row in with_grad])
    grads = {id(row): g.tolist() for row, g in zip(with_grad, gradients, strict=True)}
    ranks = iter(_measure.stable_ranks([row.gram for row in rows if row.gram is not None]))
    layers = []
    for row, values in zip(rows, numbers, strict=True):
        scale, variance, similarity, dead, lost = values.tolist()
        g_scale, g_norm, g_lost = grads.get(id(row), (None, None, None))
        layers.append(
            Layer(
                row.name,
                row.call,
                type(row.module).__name__,
                _layers.role(row.module) or "other",
                row.shape,
                variance * scale**2,
                similarity if row.by_sample else None,
                next(ranks) if row.by_sample else None,
                None if g_norm is None else g_norm * g_scale,
                dead,
                lost,
                g_lost,
            )
        )
    return tuple(layers)


def _explosion(rows: tuple[Layer, ...]) -> float | None:
    norms = [x.grad_norm for x in rows[:-1] if x.role == "weights" and x.grad_norm is not None]
    if len(norms) < 2:
        return None
    return norms[0] / norms[-1] if norms[-1] else math.inf if norms[0] else None
