"""The parts of the proof by themselves: forms, the solver, partitions and their specs."""

import itertools
import random

import numpy as np
import pytest
import torch

from sphereopt import spheres
from sphereopt.detect.claims import Claim, bias_of
from sphereopt.detect.forms import ANY, ZERO, Forms, Origin, compressed, joined
from sphereopt.detect.partition import Partition
from sphereopt.detect.solve import solve

HERE = Origin("op", "module")


def equations(rng, n):
    """Equations like those of a network: equal degrees, zeros, and sums of products."""
    made = {}
    for _ in range(rng.randint(1, n + 2)):
        units = rng.sample(range(n), rng.randint(1, min(4, n)))
        signs = [1.0] + [rng.choice([-1.0, -1.0, 1.0, 2.0, -0.5]) for _ in units[1:]]
        made.setdefault(tuple(sorted(zip(units, signs, strict=True))), HERE)
    return made


def as_matrix(forms, n):
    matrix = np.zeros((len(forms), n))
    for row, form in zip(matrix, forms, strict=True):
        for unit, k in form:
            row[unit] += k
    return matrix


@pytest.mark.parametrize("seed", range(300))
def test_solutions_solve_and_span_everything(seed):
    rng = random.Random(seed)
    n = rng.randint(1, 9)
    asked = equations(rng, n)
    matrix = as_matrix(asked, n)
    solution = solve(n, asked, {unit: rng.random() for unit in range(n)})
    vectors = []
    for sphere in solution.spheres:
        vectors.append(np.isin(np.arange(n), sphere).astype(float))
    on = [unit for sphere in solution.spheres for unit in sphere]
    assert len(on) == len(set(on))  # disjoint
    assert set(on) | solution.origins.keys() == set(range(n))
    for symmetry in solution.symmetries:
        vectors.append(np.array([symmetry.get(unit, 0.0) for unit in range(n)]))
    for vector in vectors:
        assert np.allclose(matrix @ vector, 0)
    nullity = n - np.linalg.matrix_rank(matrix)
    assert np.linalg.matrix_rank(np.array(vectors).reshape(len(vectors), n)) == nullity
    # A unit that no equation mentions is a sphere by itself.
    for unit in range(n):
        assert ([unit] in solution.spheres) >= (not matrix[:, unit].any())


@pytest.mark.parametrize("seed", range(100))
def test_spheres_of_equalities_are_the_finest(seed):
    """With nothing but a = b and a = 0, brute force over all sets of units says what is right."""
    rng = random.Random(seed)
    n = rng.randint(2, 7)
    asked = {}
    for _ in range(rng.randint(1, n)):
        a, b = rng.sample(range(n), 2)
        form = ((a, 1.0),) if rng.random() < 0.2 else tuple(sorted([(a, 1.0), (b, -1.0)]))
        asked[form] = HERE
    matrix = as_matrix(asked, n)
    solving = [
        set(units)
        for size in range(1, n + 1)
        for units in itertools.combinations(range(n), size)
        if np.allclose(matrix @ np.isin(np.arange(n), units), 0)
    ]
    finest = [s for s in solving if not any(other < s for other in solving)]
    found = [set(s) for s in solve(n, asked, {}).spheres]
    assert sorted(map(sorted, found)) == sorted(map(sorted, finest))


def test_the_last_factor_is_the_writer():
    """Residual stream e = v + o: scaling e and the later of v and o together is the sphere."""
    e, v, o, bias = range(4)
    asked = {((e, 1.0), (v, -1.0), (o, -1.0)): HERE, ((e, 1.0), (bias, -1.0)): HERE}
    solution = solve(4, asked, {e: 0, v: 1, o: 2, bias: 3})
    assert solution.spheres == [[e, o, bias]]
    assert solution.symmetries == [{v: 1.0, o: -1.0}]
    assert solution.origins == {v: HERE}
    late_v = solve(4, asked, {e: 0, o: 1, v: 2, bias: 3})
    assert late_v.spheres == [[e, v, bias]]


def test_forms_are_exact_and_interned():
    forms = Forms()
    a, b = forms.unit(0), forms.unit(1)
    ids = torch.tensor([a, b, ZERO, ANY])
    half = forms.scale(ids, 0.5)
    assert torch.equal(forms.add(half, half), ids)
    assert torch.equal(forms.add(ids, ids, -1.0), torch.tensor([ZERO, ZERO, ZERO, ANY]))
    assert forms.table[int(forms.add(ids[:1], ids[1:2]))] == ((0, 1.0), (1, 1.0))
    forms.demand_equal(ids, ids.flip(0), HERE)  # a-ANY asks nothing, b-ZERO asks b = 0
    assert {forms.table[x] for x in forms.equations} == {((1, 1.0),), ((1, -1.0),)}
    assert forms.units_in([a, int(forms.add(ids[:1], ids[1:2]))]) == {0, 1}


def test_joined_and_compressed():
    a = torch.tensor([[2, ANY], [2, ANY]])
    assert torch.equal(joined(a, torch.tensor([[ANY, 3]])), torch.tensor([[2, 3], [2, 3]]))
    assert compressed(a).shape == (1, 2)
    assert compressed(torch.full((3, 4), 7)).shape == (1, 1)
    assert compressed(torch.zeros(0, 3, dtype=torch.long)).shape[0] == 0


def partition(spec, shape):
    """Return the partition of a spec without pieces."""
    axis = 1 if spec == "col" else 0
    return Partition.blocks(shape[axis], spheres.count(spec, shape), axis)


@pytest.mark.parametrize(
    ("spec", "shape"),
    [
        *(("row", s) for s in [(6, 3), (2, 1, 3)]),
        *(("col", s) for s in [(3, 6), (1, 4, 2)]),
        *((f"block:{k}", (12, 2)) for k in (2, 3, 6)),
        *(("tensor", s) for s in [(6, 3), (4,)]),
    ],
)
def test_specs_there_and_back(spec, shape):
    part = partition(spec, shape)
    assert part.spec(shape) == spec
    assert part.full
    values = torch.randn(2, shape[part.axis])
    sizes = [int((part.labels == i).sum()) for i in range(part.count)]
    by_hand = torch.stack([x.sum(1) for x in values.split(sizes, 1)], 1)
    torch.testing.assert_close(part.sums(values), by_hand)
    assert part.along(len(shape), torch.arange(part.count + 1)).ndim == len(shape)


@pytest.mark.parametrize(
    ("labels", "spec"),
    [
        ([0, 0, 1, 1, -1, -1], "block:2@0:4"),
        ([-1, -1, 0, 1, 2, 3], "row@2:6"),
        ([-1, 0, 0, 0, -1, -1], "tensor@1:4"),
        ([0, 0, -1, 1, 1, 2], "tensor@0:2,tensor@3:5,row@5:6"),
        ([0, 1, 0, 1, 0, 1], None),  # channels shuffled: in no spec
        ([-1] * 6, None),
    ],
)
def test_specs_of_pieces(labels, spec):
    part = Partition(0, torch.tensor(labels))
    assert part.spec((6, 4)) == spec
    if spec is not None:
        tensor = torch.arange(24.0).reshape(6, 4)
        views = [v for piece in spheres.split(tensor, spec) for v in piece]
        assert len(views) == part.count
        for number, view in enumerate(views):
            assert torch.equal(view.flatten(), tensor[part.labels == number].flatten())
        values = torch.randn(6)
        sums = [values[part.labels == i].sum() for i in range(part.count)]
        torch.testing.assert_close(part.sums(values), torch.stack(sums))


def test_claims_speak_one_spec_for_all_members():
    shapes = {"w": (6, 4), "b": (6,), "t": (4, 6), "cls": (1, 1, 8), "pos": (5, 8)}
    rows = Claim({"w": Partition.blocks(6, 6), "b": Partition.blocks(6, 6)})
    assert rows.spec(shapes) == "row"
    columns = Claim({"t": Partition.blocks(6, 6, axis=1), "b": Partition.blocks(6, 6)})
    assert columns.spec(shapes) == "col"
    whole = Claim({n: Partition.whole(shapes[n]) for n in ("cls", "pos")})
    assert whole.spec(shapes) == "tensor"
    assert Claim({"w": Partition.blocks(6, 6), "b": Partition.whole((6,))}).spec(shapes) is None
    assert not Claim({"b": Partition.blocks(6, 6)}).has_directions(shapes)
    assert rows.has_directions(shapes)
    assert rows.coarser().spec(shapes) == "tensor"


def test_the_bias_beside_a_weight():
    names = dict.fromkeys(["a.weight", "a.bias", "m.in_proj_weight", "m.in_proj_bias", "bias"])
    assert bias_of("a.weight", names) == "a.bias"
    assert bias_of("a.parametrizations.weight.original1", names) == "a.bias"
    assert bias_of("a.weight_v", names) == "a.bias"
    assert bias_of("m.in_proj_weight", names) == "m.in_proj_bias"
    assert bias_of("weight", names) == "bias"
    assert bias_of("a.bias", names) is None
    assert bias_of("x.weight", names) is None
