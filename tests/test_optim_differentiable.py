"""differentiable=True: autograd through steps, against finite differences."""

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck

import sphereopt as so

MOVES = ["retract", "exp", "renorm", "hyperball", "rotate"]
POLICIES = [{"move": move} for move in MOVES]
POLICIES += [{"transport": how} for how in ("project", "parallel", "rescale")]
POLICIES += [{"radius": "free"}, {"radius": "free", "weight_decay": 0.1}, {"sphere": None}]
POLICIES += [{"sphere": "row@0:2,tensor@2:4"}, {"sphere": "tensor"}]

RULES = [
    (so.SphereSGD, {}),
    (so.SphereSGD, {"momentum": 0.9}),
    (so.SphereSGD, {"momentum": 0.9, "nesterov": True}),
    (so.SphereSGD, {"momentum": 0.9, "dampening": 0.5, "maximize": True}),
    (so.SphereAdam, {}),
    (so.SphereAdam, {"amsgrad": True}),
    (so.SphereAdam, {"second_moment": "sphere"}),
    (so.SphereAdam, {"decoupled_weight_decay": False}),
]


def double(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def train(cls, options, w, grads, lr):
    """Return the weights after a few steps, as a function of all that they depend on."""
    p = w.clone()  # a leaf cannot be overwritten under autograd
    optimizer = cls([p], **{"sphere": "row", **options}, lr=lr, differentiable=True)
    for g in grads:
        p.grad = g
        optimizer.step()
    return p


@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: "-".join(map(str, p.values())))
@pytest.mark.parametrize(
    ("cls", "options"), RULES, ids=lambda x: "-".join(x) if isinstance(x, dict) else x.__name__
)
def test_three_steps_have_the_derivative_of_finite_differences(cls, options, policy):
    w, grads = double(4, 3).requires_grad_(), [double(4, 3).requires_grad_() for _ in range(3)]
    # eps away from zero keeps Adam's root smooth for the differences.
    smooth = {"eps": 0.1} if cls is so.SphereAdam else {}
    options = {"sphere": "row", **options, **smooth, **policy}

    def end(w, *grads):
        return train(cls, options, w, grads, 0.1)

    if "amsgrad" in options:
        # The larger of two second moments has a kink: keep the first one larger.
        grads[0].data *= 10
    # The radius is what it was at the first step: a constant of the run, as in the step itself.
    if options["sphere"] is not None:  # torch's own steps detach the first buffer
        assert gradcheck(lambda *gs: end(w.detach(), *gs), grads)
    later = [double(4, 3) for _ in range(2)]
    start = train(cls, options, double(4, 3), later, 0.1).detach()
    g = double(4, 3).requires_grad_()
    assert gradcheck(lambda g: end(start, later[0], g), [g])


@pytest.mark.parametrize("name", ["SphereSGD", "SphereAdam"])
@pytest.mark.parametrize("move", MOVES)
def test_the_learning_rate_has_a_derivative(name, move):
    w, grads = double(4, 3), [double(4, 3) for _ in range(3)]
    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda lr: train(getattr(so, name), {"move": move}, w, grads, lr), [lr])


def test_gradients_that_depend_on_the_weights_are_followed():
    # The meta-gradient of an unrolled run: gradients come from a loss of the moving weights.
    target, scale = double(4, 3), torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    start = double(4, 3)

    def unrolled(scale):
        p = start.clone().requires_grad_()
        q = p.clone()
        optimizer = so.SphereSGD([q], lr=0.1, momentum=0.9, sphere="row", differentiable=True)
        for _ in range(4):
            loss = (scale * (q - target) ** 2).sum()
            (q.grad,) = torch.autograd.grad(loss, q, create_graph=True)
            optimizer.step()
        return ((q - target) ** 2).sum()

    assert gradcheck(unrolled, [scale])


@pytest.mark.parametrize(("cls", "options"), RULES[1:5], ids=str)
def test_the_numbers_are_those_of_the_ordinary_step(cls, options):
    w, grads = double(4, 3), [double(4, 3) for _ in range(10)]
    p = nn.Parameter(w.clone())
    optimizer = cls([p], lr=0.1, sphere="row", **options)
    for g in grads:
        p.grad = g.clone()
        optimizer.step()
    torch.testing.assert_close(train(cls, options, w, grads, 0.1), p.detach(), rtol=0, atol=1e-13)


@pytest.mark.parametrize("cls", [so.SphereLion, so.SphereMuon])
def test_a_direction_without_a_derivative_is_refused(cls):
    group = {"params": [nn.Parameter(torch.ones(2, 2))], "differentiable": True}
    with pytest.raises(ValueError, match=f"no meaning for {cls.__name__}.*use SphereSGD"):
        cls([group], sphere="row")


def test_pure_functions_of_geometry_serve_torch_func():
    # vmap over starts and grad through a step of the pure functions.
    w, g = double(5, 4, 3), double(5, 4, 3)

    def after(w, g, lr):
        return so.geometry.retract(w, -lr * so.geometry.tangent(w, g, "row"), "row")

    each = torch.stack([after(x, y, 0.1) for x, y in zip(w, g, strict=True)])
    torch.testing.assert_close(torch.func.vmap(after, (0, 0, None))(w, g, 0.1), each)
    slope = torch.func.grad(lambda lr: after(w[0], g[0], lr)[0, 0])(torch.tensor(0.1).double())
    h = 1e-6
    numeric = (after(w[0], g[0], 0.1 + h) - after(w[0], g[0], 0.1 - h))[0, 0] / (2 * h)
    torch.testing.assert_close(slope, numeric, rtol=1e-6, atol=1e-8)
