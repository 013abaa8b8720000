"""constrain on what it cannot hold: an error that names the parameter, before anything changes."""

import pytest
import torch
from test_constrain import gradients, named, sgd, weights
from test_constrain_handle import held_sgd
from torch import nn

import sphereopt as so
from sphereopt.geometry import norm
from sphereopt.optim import SphereError
from sphereopt.optim.constrain import constrain


def test_weight_decay_on_a_held_sphere_is_refused_whenever_it_comes():
    (w,) = weights((4, 5))
    with pytest.raises(ValueError, match=r"weight_decay=0.01 on parameter 'w0' of shape \(4, 5\)"):
        constrain(torch.optim.AdamW(named([w])), {"w0": "row"})
    optimizer, _ = held_sgd([w])
    optimizer.param_groups[0]["weight_decay"] = torch.tensor(0.1)
    w.grad = torch.ones_like(w)
    kept = w.detach().clone()
    with pytest.raises(ValueError, match=r"with weight_decay=0, and raise lr there"):
        optimizer.step()
    assert torch.equal(w, kept)


def test_what_weight_decay_on_a_sphere_does_is_what_the_error_says():
    ours, theirs = weights((4, 5)), weights((4, 5))
    decayed, plain = (
        sgd(ours, lr=0.1, momentum=0),
        sgd(theirs, lr=0.1 / (1 - 0.1 * 0.5), momentum=0),
    )
    constrain(plain, {"w0": "row"})
    for (g,) in gradients([(4, 5)]):
        ours[0].grad = so.geometry.tangent(ours[0].detach(), g, "row")
        theirs[0].grad = g.clone()
        radius = norm(ours[0].detach(), "row")
        decayed.param_groups[0]["weight_decay"] = 0.5
        decayed.step()
        plain.step()
        with torch.no_grad():
            ours[0].mul_((radius / norm(ours[0].detach(), "row"))[:, None])
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-11, atol=1e-12)


def test_what_cannot_be_held_is_refused_by_name():
    w, b = weights((4, 5), (4,))
    optimizer = sgd([w, b])
    for specs, message in [
        ({"w3": "row"}, "no parameter 'w3'; did you mean 'w1' or 'w0'"),
        ({"w1": "row"}, "'w1' has shape .4,., but sphere='row' needs two or more"),
        ({"w0": "block:3"}, "'w0' has shape .4, 5., but"),
        ({("w0", "w1"): "row", "w1": "tensor"}, "'w1' is given two spheres"),
        ({("w0", "w1"): "col"}, "as many spheres in each of w0, w1"),
        ({}, "no parameter is on a sphere"),
        (None, "no parameter is on a sphere"),
    ]:
        with pytest.raises(ValueError, match=message):
            constrain(optimizer, specs)
    with pytest.raises(ValueError, match=r"transport='along' is none of 'project'"):
        constrain(optimizer, {"w0": "row"}, transport="along")
    with pytest.raises(ValueError, match=r"does not know its parameters' names.*named_parameters"):
        constrain(torch.optim.SGD([w], lr=0.1), {"w0": "row"})
    with pytest.raises(ValueError, match=r"'w0 \+ w1' has members of torch.float64 .*float32"):
        constrain(sgd([w, nn.Parameter(torch.zeros(4))]), {("w0", "w1"): "row"})
    assert torch.equal(w, weights((4, 5))[0])
    constrain(optimizer, {"w0": "row"})
    with pytest.raises(ValueError, match=r"SGD is constrained already"):
        constrain(optimizer, {"w1": "tensor"})


class Wrapper(torch.optim.Optimizer):
    """Hands step() on, as the wrappers of several trainers do."""

    def __init__(self, inner):
        self.inner = inner

    def step(self):
        self.inner.step()


def test_optimizers_that_hold_spheres_or_run_no_hooks_are_refused():
    (w,) = weights((4, 5))
    with pytest.raises(TypeError, match=r"SphereSGD holds its spheres itself"):
        constrain(so.SphereSGD(named([w]), lr=0.1, sphere="row"))
    with pytest.raises(TypeError, match=r"Wrapper does not run the step hooks.*constrain that one"):
        constrain(Wrapper(sgd([w])))


def test_a_sharded_parameter_is_refused_by_name():
    (w,) = weights((4, 5))
    w.placements = ()  # what marks a DTensor
    with pytest.raises(TypeError, match=r"'w0' is sharded \(DTensor\)"):
        constrain(sgd([w]), {"w0": "row"})


def test_sparse_gradients_are_refused_by_name_unless_not_projected():
    (w,) = weights((4, 5))
    optimizer, handle = held_sgd([w])
    w.grad = torch.ones(4, 5, dtype=torch.float64).to_sparse()
    kept = w.detach().clone()
    with pytest.raises(SphereError, match=r"'w0' of shape \(4, 5\) has a sparse gradient"):
        optimizer.step()
    assert torch.equal(w, kept)
    assert w.grad.is_sparse
    handle.remove()
    handle = constrain(optimizer, {"w0": "row"}, project=False)
    optimizer.step()
    torch.testing.assert_close(norm(w.detach(), "row"), handle.radius["w0"])
