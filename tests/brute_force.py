"""Ground truth by brute force: rescale entries of a model exactly, run it, compare the outputs.

Shares no code with the library. The function that is tested is the training function in its ideal
form: float64, normalization eps near zero, noise (dropout) drawn from a fixed seed, at two random
points where nothing is zero or small by initialization.
"""

import copy
import math
import re
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

# Not 0: a dead channel or a padding token has variance 0, and 0/0 would hide everything behind it.
# But far below what a weight scaled by 1e-3 makes of a variance: 1e-24 after a square and a gate.
TINY = 1e-60
# Added constants up to this are an eps. The largest in use is 1e-3 (TensorFlow's BatchNorm).
LARGEST_EPS = 1.1e-3
# A change of the outputs, relative to their largest entry, that counts as none. Rounding reaches
# 3e-11 (deep network, factor 1e3); a wrong claim that moves all its spheres by 1e3 does over 1e-6.
TOLERANCE = 1e-9
# Up to this, a change may be rounding all the same. A weight scaled by 1e-3 before a bias that a
# norm removes again loses three digits, a squared one times a gate nine: 1e-7 was seen.
LARGEST_ROUNDING = 1e-3
# |sum w*df/dw| / sum |w*df/dw| over a set below which rescaling it is worth a try. Only saves
# work, and never decides.
WORTH_A_TRY = 1e-7
POINTS = 2

_EPS_PLACE = {"batch_norm": 7, "layer_norm": 4, "group_norm": 4, "instance_norm": 7, "rms_norm": 3}
_ADDITIONS = {"add", "add_", "__add__", "__radd__", "__iadd__"}
_FLOORS = {"clamp", "clamp_", "clamp_min", "clamp_min_", "clip", "clip_"}
_CASTS = {"float", "half", "bfloat16"}
_LOW = (torch.float32, torch.float16, torch.bfloat16)


class Truth(NamedTuple):
    """The finest partition that leaves the outputs alone, and the tensors that must share it."""

    spec: str | None  # None, "inert", or a sphere spec
    members: tuple[str, ...]


class Ideal(TorchFunctionMode):
    """Make every literal eps tiny, and keep in float64 what the model casts to less."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        args = list(args)
        if name in _EPS_PLACE:
            place = _EPS_PLACE[name]
            if len(args) > place:
                args[place] = TINY
            else:
                kwargs["eps"] = TINY
        if name in _ADDITIONS or name in _FLOORS:
            args = [args[0], *(TINY if _is_eps(a) else a for a in args[1:])]
            kwargs = {k: TINY if _is_eps(v) else v for k, v in kwargs.items()}
        if name in _CASTS and torch.is_tensor(args[0]):
            return args[0].double()
        args = [torch.float64 if any(a is low for low in _LOW) else a for a in args]
        if any(kwargs.get("dtype") is low for low in _LOW):
            kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


def _is_eps(value):
    return isinstance(value, float) and 0 < value <= LARGEST_EPS


def _clear_eps(model):
    """Set what the modules call an eps to a tiny one: it may get into formulas of any form."""
    for module in model.modules():
        for name, value in vars(module).items():
            if re.search(r"(^|_)eps", name) and (_is_eps(value) or value is None):
                setattr(module, name, TINY)


def generic(p, generator):
    """Return a random point not far from p but off every zero: no gain, bias or head is closed."""
    p = p.detach()
    noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
    if p.ndim < 2:
        return p + 0.2 * noise
    # At least the size that keeps a signal's: at an init of 0.02 every softmax and gate is linear.
    size = max(float(p.square().mean().sqrt()), p[0].numel() ** -0.5)
    return p + size * noise


def floating(out):
    """Return the tensors that are the function: as the library documents it."""
    if hasattr(out, "keys"):
        chosen = [k for k in ("loss", "logits", "last_hidden_state") if out.get(k) is not None]
        out = out[chosen[0]] if chosen else dict(out)
    leaves = pytree.tree_leaves(out)
    return [t for t in leaves if torch.is_tensor(t) and t.is_floating_point()]


@contextmanager
def _ideal(seed):
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.random.fork_rng(devices=[]), Ideal():
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_default_dtype(before)


def partition(spec, shape):
    """Return the sphere of every entry, -1 for none, in a shape that broadcasts to ``shape``."""
    if not shape:
        return torch.zeros((), dtype=torch.long)
    tail = (1,) * (len(shape) - 1)
    if spec == "col" and len(shape) > 1:
        return torch.arange(shape[1]).view(1, -1, *tail[1:])
    ids, first = torch.full((shape[0],), -1), 0
    for piece in spec.split(","):
        kind, _, span = piece.partition("@")
        start, stop = map(int, span.split(":")) if span else (0, shape[0])
        n = stop - start
        k = int(kind[6:]) if kind.startswith("block:") else {"tensor": 1}.get(kind, n)
        ids[start:stop] = first + torch.arange(n) // (n // k)
        first += k
    return ids.view(-1, *tail)


def same(one, two, shape):
    """Whether two partitions of a tensor of this shape have the same spheres."""
    a, b = (ids.expand(shape).flatten() for ids in (partition(one, shape), partition(two, shape)))
    if not torch.equal(a < 0, b < 0):
        return False
    pairs = torch.stack((a, b)).unique(dim=1).shape[1]
    return pairs == a.unique().numel() == b.unique().numel()


class BruteForce:
    """A model as an exact function of its parameters, and what leaves that function alone."""

    def __init__(self, model, args=(), kwargs=None, output=floating, seed=0):
        self.twin = copy.deepcopy(model).double()
        if not model.training:
            self.twin.train()
        _clear_eps(self.twin)
        self.inputs = pytree.tree_map(
            lambda t: t.double() if torch.is_tensor(t) and t.is_floating_point() else t,
            (tuple(args), dict(kwargs or {})),
        )
        self.output, self.forwards, self.rounded = output, 0, 0
        self.largest_pass, self.least_fail = 0.0, math.inf
        self.random, self.truths = torch.Generator().manual_seed(seed), None
        self.params = dict(self.twin.requires_grad_(True).named_parameters())
        self.buffers = {n: b.clone() for n, b in self.twin.named_buffers()}
        self.points = [
            {n: generic(p, self.random) for n, p in self.params.items()} for _ in range(POINTS)
        ]
        self.reference = [self._run(i, {}) for i in range(POINTS)]
        if not all(t.isfinite().all() for outs in self.reference for t in outs):
            raise ValueError("the outputs are not finite")

    def _forward(self, point):
        self.forwards += 1
        with torch.no_grad():
            for name, b in self.twin.named_buffers():
                b.copy_(self.buffers[name])
        with _ideal(point):
            args, kwargs = self.inputs
            return self.output(self.twin(*args, **kwargs))

    @torch.no_grad()
    def _run(self, point, changed):
        for name, p in self.params.items():
            p.copy_(changed.get(name, self.points[point][name]))
        return [t.clone() for t in self._forward(point)]

    def _rescaled(self, point, spheres, factors):
        """Return the change when every sphere, possibly of several tensors, gets its factor."""
        outputs = self._run(point, self._scaled(point, spheres, factors))
        change = _apart(self.reference[point], outputs)
        if change < TOLERANCE:
            self.largest_pass = max(self.largest_pass, change)
            return change
        # What another per mille of the factors changes as much is rounding: a function that does
        # depend on them, from 1 to here, depends on the last per mille a hundred times less.
        beside = factors * (1 + 1e-3 * self._near(len(factors)))
        rounding = _apart(outputs, self._run(point, self._scaled(point, spheres, beside)))
        if change < min(LARGEST_ROUNDING, 30 * rounding):
            self.rounded += 1
            return 0.0
        self.least_fail = min(self.least_fail, change)
        return change

    def _scaled(self, point, spheres, factors):
        table = torch.cat((factors, torch.ones(1, dtype=torch.float64)))  # -1 finds the last
        return {name: self.points[point][name] * table[ids] for name, ids in spheres.items()}

    def _near(self, k):
        """Return k factors in [1/3, 3], none of them near 1."""
        log = torch.rand(k, generator=self.random, dtype=torch.float64) * 0.8 + 0.3
        return torch.exp(log * self._signs(k))

    def _signs(self, k):
        return torch.randint(0, 2, (k,), generator=self.random).double() * 2 - 1

    def violation(self, spheres, near=True, far=True):
        """Return how much the outputs change when the spheres are rescaled, the first large one.

        Near: factors of the order of 1, at all points. Far, for kinks that the points do not reach
        (ReLU6): 1e3 and 1e-3 in a random pattern, and the reverse.
        """
        k = 1 + max(int(ids.max()) for ids in spheres.values())
        worst, signs = 0.0, self._signs(k)
        trials = [(point, self._near(k)) for point in range(POINTS) if near]
        trials += [(0, 1e3**sign) for sign in (signs, -signs) if far]
        for point, factors in trials:
            worst = max(worst, self._rescaled(point, spheres, factors))
            if worst > TOLERANCE:
                break
        return worst

    def invariant(self, members, spec):
        """Whether these spheres can be rescaled, those of equal index across the members as one."""
        return self.violation(self._spheres(members, spec)) < TOLERANCE

    def _spheres(self, members, spec):
        return {name: partition(spec, self.params[name].shape) for name in members}

    def false_claims(self, claims):
        """Return the claims that do not hold, and by how much.

        Args:
            claims: Name, or tuple of the names of joint tensors, -> spec.
        """
        each = {names: self._spheres(_tuple(names), spec) for names, spec in claims.items()}
        together, first = {}, 0
        for spheres in each.values():
            for name, ids in spheres.items():
                assert name not in together, f"{name} is claimed twice"
                together[name] = torch.where(ids < 0, ids, ids + first)
            first += 1 + max(int(ids.max()) for ids in spheres.values())
        if not together:
            return {}
        fine = self.violation(together, far=False) < TOLERANCE
        # Not all at once by 1e3: every layer with a bias costs three digits, and they add up.
        alone = {names: self.violation(s, near=not fine) for names, s in each.items()}
        wrong = {names: change for names, change in alone.items() if change > TOLERANCE}
        return wrong if fine or wrong else {"all at once, though each alone holds": math.nan}

    def inert(self, names):
        """Whether the outputs depend on none of these parameters, however they change."""
        for point in range(POINTS):
            here = self.points[point]
            changed = {n: here[n] + 0.3 * torch.randn_like(here[n]) for n in names}
            if _apart(self.reference[point], self._run(point, changed)) > TOLERANCE:
                return False
        return True

    def conditioned(self):
        """Whether rounding stays rounding: no norm divides by a variance that is itself noise."""
        for point in range(POINTS):
            here = self.points[point]
            changed = {n: w * (1 + 1e-14 * torch.randn_like(w)) for n, w in here.items()}
            if _apart(self.reference[point], self._run(point, changed)) > 1e-2 * TOLERANCE:
                return False
        return True

    def bias_of(self, name):
        """Return the bias beside a weight: of the same module, as long as its dim 0 or dim 1."""
        owner = name.rpartition(".")[0].partition(".parametrizations")[0]
        lengths = tuple(self.params[name].shape[:2])
        for other, p in self.params.items():
            beside = other.rpartition(".")[0] == owner and "bias" in other.rpartition(".")[2]
            if beside and p.ndim == 1 and len(p) in lengths:
                return other
        return None

    def label(self, name):
        """Return the truth about one matrix: the finest partition, with its bias if need be."""
        bias = self.bias_of(name)
        choices = [(name,)] if bias is None else [(name,), (name, bias)]
        for members in choices:
            # A partition into spheres that can be scaled implies that the whole can: test it first.
            whole = self._spheres(members, "tensor")
            if self._rescaled(0, whole, self._near(1)) < TOLERANCE:
                spec = "inert" if self.inert((name,)) else self._finest(members)
                if spec is not None:
                    return Truth(spec, members)
        parts = ((self._part(members), members) for members in choices)
        return next((Truth(*part) for part in parts if part[0] is not None), Truth(None, (name,)))

    def labels(self):
        """Return the truth about every parameter with at least two dimensions."""
        if self.truths is None:
            self.truths = {n: self.label(n) for n, p in self.params.items() if p.ndim > 1}
        return self.truths

    def _finest(self, members):
        shape = self.params[members[0]].shape
        along = [d for d in (0, 1) if len(members) == 1 or len(self.params[members[1]]) == shape[d]]
        several = [d for d in along if shape[d] > 1 and _entries(shape, d) > 1]
        tries = [spec for d, spec in ((0, "row"), (1, "col")) if d in several]
        if 0 in along:
            tries += [f"block:{k}" for k in range(shape[0] - 1, 1, -1) if shape[0] % k == 0]
        return next((spec for spec in (*tries, "tensor") if self.invariant(members, spec)), None)

    def _part(self, members):
        """Return the pieces of dim 0 that are invariant although the tensor is not, or None."""
        n = len(self.params[members[0]])
        if any(len(self.params[m]) != n for m in members):
            return None
        signed, total = self._pull(members)
        seen = total > 1e-13 * total.max()  # not the embeddings of unused tokens
        size = torch.zeros(n, dtype=torch.long)
        smallest = 1 if _entries(self.params[members[0]].shape, 0) > 1 else 2
        for k in [k for k in range(smallest, n) if n % k == 0]:
            for rows in torch.arange(n).split(k):
                balanced = abs(signed[rows].sum()) < WORTH_A_TRY * total[rows].sum()
                if balanced and seen[rows].any() and (size[rows] == 0).all():
                    size[rows] = k
        found = [piece for piece in _runs(size.tolist()) if self.invariant(members, piece)]
        return ",".join(found) or None

    def _pull(self, members):
        """Return the sum over each row, and over the members, of w*df/dw, and of its absolutes."""
        if not hasattr(self, "_grads"):
            self._run(0, {})
            outs = [t for t in self._forward(0) if t.requires_grad]
            cotangents = [torch.randn(t.shape, dtype=t.dtype) for t in outs]
            torch.autograd.backward(outs, cotangents)
            self._grads = {n: p.grad for n, p in self.params.items()}
            self.twin.zero_grad(set_to_none=True)
        pairs = [(self.points[0][m], self._grads[m]) for m in members]
        products = [w * (0 * w if grad is None else grad.to_dense()) for w, grad in pairs]
        pull = torch.cat([p.reshape(len(p), -1) for p in products], 1)
        return pull.sum(1), pull.abs().sum(1)


def _apart(these, those):
    """Return the largest change of an output, relative to that output's largest entry."""
    worst = 0.0
    for one, two in zip(these, those, strict=True):
        size = float(one.abs().max()) if one.numel() else 0.0
        change = float((one - two).abs().max()) / size if size else 0.0
        worst = max(worst, change if math.isfinite(change) else math.inf)
    return worst


def _tuple(names):
    return (names,) if isinstance(names, str) else names


def _entries(shape, dim):
    return math.prod(shape) // shape[dim]


def _runs(sizes):
    """Turn a block size per row (0: none) into pieces: [2, 2, 2, 2, 0] -> ["block:2@0:4"]."""
    start, pieces = 0, []
    for i in range(1, len(sizes) + 1):
        if i == len(sizes) or sizes[i] != sizes[start]:
            k = (i - start) // sizes[start] if sizes[start] else 0
            if k:
                kind = "row" if sizes[start] == 1 else "tensor" if k == 1 else f"block:{k}"
                pieces.append(f"{kind}@{start}:{i}")
            start = i
    return pieces


def grades(oracle, spheres):
    """Return, of every invariant matrix, how good a claim ``report.spheres`` has: name -> grade.

    A claim that holds is "exact", or "coarser": another partition, or with more tensors.
    """
    claims = {n: (_tuple(names), spec) for names, spec in spheres.items() for n in _tuple(names)}
    found = {}
    for name, truth in oracle.labels().items():
        if truth.spec in (None, "inert"):
            continue
        members, spec = claims.get(name, ((), None))
        equal = set(members) == set(truth.members)
        equal = equal and same(spec, truth.spec, oracle.params[name].shape)
        found[name] = "exact" if equal else "coarser" if spec else "missed"
    return found


def as_inputs(data):
    """Return (args, kwargs) of a table's inputs: a tensor or a dict of keywords."""
    return ((), data) if isinstance(data, dict) else ((data,), {})


def holds(model, inputs, claim):
    """Whether outputs stay when every claimed sphere is rescaled: {name or names: spec}."""
    return not BruteForce(model, *as_inputs(inputs)).false_claims(claim)
