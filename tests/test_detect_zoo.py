"""find_spheres against brute force: single spheres scaled one by one, by code of its own."""

import copy

import pytest
import torch
from detection_zoo import CASES
from torch import nn

from sphereopt.detect import find_spheres


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def brute_force(model, x):
    """Label every matrix by scaling each sphere of each partition alone, one after the other."""
    twin = copy.deepcopy(model).double()
    for module in twin.modules():
        for name in ("eps", "tiny"):
            if hasattr(module, name):
                setattr(module, name, 1e-30)
        if hasattr(module, "upcast"):
            module.upcast = torch.float64
        if isinstance(module, nn.Dropout):
            module.train()
    x = x.double() if x.is_floating_point() else x
    twin.requires_grad_(False)
    for p in twin.parameters():
        p += 0.2 * torch.randn_like(p)
    state = {name: b.clone() for name, b in twin.named_buffers()}

    def outputs():
        torch.manual_seed(5)
        for name, b in twin.named_buffers():
            b.copy_(state[name])
        out = twin(x)
        return torch.cat(
            [t.flatten() for t in ([out[0], out[1]["tap"]] if type(out) is tuple else [out])]
        )

    reference = outputs()

    def invariant(block, factors=(0.5, 2.0, 1e3)):
        before = block.clone()
        change = 0.0
        for factor in factors:
            block.copy_(factor * before)
            change = max(change, float((outputs() - reference).abs().max()))
            block.copy_(before)
        # Rounding stays below 1e-12 here; the least a wrong sphere of these models does is 1e-6.
        return change < 1e-10 * float(reference.abs().max())

    def label(p):
        n = p.shape[0]
        yield "row", p.split(1, 0)
        if p.shape[1] > 1:
            yield "col", p.split(1, 1)
        for k in range(n - 1, 1, -1):
            if n % k == 0:
                yield f"block:{k}", p.chunk(k, 0)
        yield "tensor", (p,)

    found = {}
    for name, p in twin.named_parameters():
        for spec, blocks in label(p) if p.ndim > 1 else ():
            if blocks[0].numel() > 1 and all(invariant(b) for b in blocks):
                found[name] = spec
                break
    return found


@pytest.mark.parametrize("name", CASES)
def test_labels_are_the_brute_force_ones(name):
    build, data, expected = CASES[name]
    model, x = build(), data()
    report = find_spheres(model, x)
    matrices = {n: s for n, s in report.spheres.items() if type(n) is str and report[n].shape[1:]}
    assert matrices == expected, str(report)
    assert report.notes == ()  # no rule met what it did not expect
    assert brute_force(model, x) == expected
    for finding in report.values():
        assert finding.status != "numerical"  # all of them have a proof
        if finding.sphere is not None:
            assert finding.evidence.euler < 1e-12  # observed 1e-15; the tolerance is 1e-8
            assert finding.evidence.rescaling < 1e-11


def refuted(finding):
    """Return whether a kink speaks against it, not its gradient."""
    return finding.reason.startswith("refuted")


def test_the_threshold_lies_in_a_wide_gap():
    accepted, rejected = [], []
    for build, data, _ in CASES.values():
        for finding in find_spheres(build(), data()).values():
            if finding.sphere is not None:
                accepted.append(finding.evidence.euler)
            elif finding.status == "none" and finding.shape[1:] and not refuted(finding):
                rejected.append(finding.evidence.euler)
    # Measured 4e-15 and 4e-3 against a threshold of 1e-8: room for other seeds and machines.
    assert max(accepted) < 1e-12
    assert min(rejected) > 1e-4
