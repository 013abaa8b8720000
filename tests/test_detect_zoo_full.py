"""find_spheres on the full zoo: what is known by hand, exactly, and against brute force."""

import functools
from typing import NamedTuple

import pytest
import torch
from brute_force import BruteForce, grades
from detection_zoo_attention import ATTENTION
from detection_zoo_full import BIASES, BLOCKS, GAINS
from detection_zoo_norms import NORMS
from detection_zoo_tokens import OTHERS, STREAMS
from detection_zoo_training import AROUND, TRAPS

from sphereopt.detect import SphereReport, find_spheres

GROUPS = (BIASES, GAINS, BLOCKS, AROUND, TRAPS, ATTENTION, STREAMS, OTHERS, NORMS)
CASES = {name: case for group in GROUPS for name, case in group.items()}
assert len(CASES) == sum(map(len, GROUPS)), "two cases of one name"


class Run(NamedTuple):
    report: SphereReport
    model: torch.nn.Module
    args: tuple
    kwargs: dict


@functools.cache
def run(name):
    torch.manual_seed(0)
    case = CASES[name]
    model, data = case.build(), case.data()
    kwargs = data if isinstance(data, dict) else {}
    args = () if kwargs else data if isinstance(data, tuple) else (data,)
    return Run(find_spheres(model, args, kwargs, loss=case.loss), model, args, kwargs)


@functools.cache
def oracle(name):
    case, (_, model, args, kwargs) = CASES[name], run(name)
    inner = getattr(model, "_orig_mod", model)
    inner = inner.module if isinstance(inner, torch.nn.DataParallel) else inner
    with torch.no_grad():  # the older weight_norm keeps a computed weight, which no copy may have
        inner(*args, **kwargs)
    options = {"output": lambda out: [case.loss(out)]} if case.loss else {}
    return BruteForce(inner, args, kwargs, **options)


@pytest.mark.parametrize("name", CASES)
def test_what_is_known_by_hand(name):
    case, report = CASES[name], run(name).report
    assert report.spheres == case.spheres, str(report)
    assert report.numerical == case.numerical, str(report)
    assert {n for n in report if report[n].status == "inert"} == set(case.inert), str(report)
    for parameter, words in case.reasons.items():
        assert words in report[parameter].reason


@pytest.mark.parametrize("name", CASES)
def test_every_claim_holds(name):
    report, truth = run(name).report, oracle(name)
    assert truth.conditioned(), "rounding alone moves the outputs: no ground truth here"
    assert not truth.false_claims(report.spheres)
    assert not truth.false_claims(report.numerical)
    inert = [n for n in report if report[n].status == "inert"]
    assert not [n for n in inert if not truth.inert([n])]


def finest(truth, name):
    """Return the truth about a vector as ``BruteForce.label`` says it of matrices."""
    bias, p = name.replace("weight", "bias"), truth.params[name]
    with_bias = (name, bias) if bias != name and bias in truth.params else None
    blocks = [f"block:{k}" for k in range(len(p) - 1, 1, -1) if len(p) % k == 0]
    for members in filter(None, ((name,), with_bias)):
        if truth.inert((name,)):
            return "inert", members
        # A block of one entry has no direction.
        specs = ["row", *blocks] if with_bias == members else [b for b in blocks if b != "1"]
        for spec in (*specs, "tensor"):
            if truth.invariant(members, spec):
                return spec, members
    return None, (name,)


@pytest.mark.parametrize("name", CASES)
def test_nothing_finer_holds(name):
    case, report, truth = CASES[name], run(name).report, oracle(name)
    graded = grades(truth, {**report.spheres, **report.numerical})
    assert {n: g for n, g in graded.items() if g != "exact"}.keys() == case.coarser.keys()
    for n, p in truth.params.items():
        if p.ndim == 1 and "bias" not in n and len(p) > 1:
            spec, members = finest(truth, n)
            found = report[n]
            if spec not in (None, "inert"):
                assert (found.sphere, set(found.members)) == (spec, set(members)), n


@pytest.mark.parametrize("name", CASES)
def test_findings_are_consistent(name):
    report = run(name).report
    assert SphereReport.from_json(report.to_json()) == report
    assert 0 <= report.share() <= 1
    for n, found in report.items():
        assert n == found.name
        assert found.reason
        on = found.status in ("proved", "numerical")
        assert on == (found.sphere is not None) == found.reason.startswith("scale-invariant")
        assert on or not found.joint
        assert (found.status == "inert") <= (found.evidence is None)
        for other in found.joint:
            assert other != n
            assert set(report[other].members) == set(found.members)
            assert (report[other].sphere, report[other].status) == (found.sphere, found.status)
        if on:
            assert ("; no proof" in found.reason) == (found.status == "numerical")
            assert found.evidence.euler < 1e-12
            assert found.evidence.rescaling < 1e-9


def test_an_eps_that_matters_shows():
    found = run("tiny_variance").report["0.weight"]
    assert found.status == "proved"
    assert found.evidence.euler < 1e-12
    assert found.evidence.at_real_eps > 0.1
    assert found.evidence.radial > 0.1
    assert found.evidence.rescaling_at_real_eps > 0.01
    usual = run("ln_linear_ln").report["1.weight"].evidence
    assert usual.at_real_eps < 1e-3
    assert usual.rescaling_at_real_eps < 1e-3
