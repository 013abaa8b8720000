"""constrain around a step: gradients, closures, GradScaler, checkpoints, copies, hooks, errors."""

import copy
import io
import pickle
import re
from pathlib import Path

import pytest
import torch
from small_model import continue_training, model_and_groups, run
from test_constrain import gradients, named, sgd, weights
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import sphereopt as so
from sphereopt.geometry import norm
from sphereopt.optim.constrain import constrain


def held_sgd(params, spec="row", **options):
    optimizer = sgd(params)
    names = [f"w{i}" for i in range(len(params))]
    return optimizer, constrain(optimizer, dict.fromkeys(names, spec), **options)


def through_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("fused", [True, False])
def test_grad_scaler_scales_skips_and_unscales_as_without_constraint(fused):
    def train(scaled):
        (w,) = weights((5, 6), dtype=torch.float32)
        optimizer = torch.optim.AdamW(named([w]), lr=0.02, weight_decay=0, fused=fused)
        constrain(optimizer, {"w0": "row"}, transport="parallel")
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=scaled)
        for t, (g,) in enumerate(gradients([(5, 6)], dtype=torch.float32)):
            bad = scaled and t % 7 == 3
            w.grad = scaler.scale(g).clone() if scaled else g.clone()
            if bad:
                w.grad[2, 1] = torch.inf
                kept = w.detach().clone()
                moments = copy.deepcopy(optimizer.state[w])
            elif t % 7 == 3:
                continue
            scaler.step(optimizer)
            scaler.update()
            if bad:
                assert torch.equal(w, kept)
                assert torch.equal(optimizer.state[w]["exp_avg"], moments["exp_avg"])
        return w.detach()

    # Scales are powers of two, so scaling is exact; both halve alike where a step is left out.
    torch.testing.assert_close(train(True), train(False), rtol=1e-5, atol=1e-6)


def test_closures_see_to_their_gradients_themselves():
    grads = gradients([(4, 5), (3, 3)])
    with_closure, without = weights((4, 5), (3, 3)), weights((4, 5), (3, 3))
    one, _ = held_sgd(with_closure, transport="project")
    two, _ = held_sgd(without, transport="project")
    for t, g in enumerate(grads):

        def closure(t=t, g=g):
            one.zero_grad()
            for p, x in zip(with_closure, g, strict=True):
                p.grad = x
            return torch.tensor(float(t))

        loss = one.step(closure) if t % 2 else one.step(closure=closure)
        assert loss == t
        assert all(p.grad is x for p, x in zip(with_closure, g, strict=True))
    run(two, without, grads)
    for p, q in zip(with_closure, without, strict=True):
        assert torch.equal(p, q)


class TwiceASteps(torch.optim.Optimizer):
    """Calls the closure twice, and goes by the second gradient: extragradient."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure):
        params = [p for group in self.param_groups for p in group["params"]]
        start = [p.clone() for p in params]
        for _ in range(2):
            with torch.enable_grad():
                loss = closure()
            for p, x in zip(params, start, strict=True):
                p.copy_(x - self.param_groups[0]["lr"] * p.grad)
        return loss


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_closure_may_run_twice_in_a_step(set_to_none):
    (w,) = weights((4, 5))
    target = torch.randn(4, 5, dtype=torch.float64)
    optimizer = TwiceASteps([("w0", w)], lr=0.1)
    handle = constrain(optimizer, {"w0": "row"})

    def closure():
        optimizer.zero_grad(set_to_none=set_to_none)
        loss = (w - target).square().sum()
        loss.backward()
        return loss

    def tangent_grad(x):
        return so.geometry.tangent(x, 2 * (x - target), "row")

    x = w.detach().clone()
    w.grad = mine = torch.zeros_like(w)
    for _ in range(50):
        optimizer.step(closure)
        assert (w.grad is mine) is not set_to_none, "zeroed and filled, not replaced"
        # w.grad is the user's own, ambient one, of where the closure ran last.
        halfway = x - 0.1 * tangent_grad(x)
        torch.testing.assert_close(w.grad, 2 * (halfway - target))
        x = x - 0.1 * tangent_grad(halfway)
        x = x * (handle.radius["w0"] / norm(x, "row"))[:, None]
        torch.testing.assert_close(w.detach(), x, rtol=1e-12, atol=1e-12)


def test_a_step_that_raises_gives_the_gradients_back_at_the_next():
    (w,) = weights((4, 5))
    optimizer, _ = held_sgd([w])

    def fails():
        w.grad = torch.ones_like(w)
        raise KeyError("lost")

    with pytest.raises(KeyError):
        optimizer.step(fails)
    assert torch.equal(w.grad, torch.ones_like(w))
    mine = w.grad
    optimizer.param_groups[0]["lr"] = None  # makes torch raise inside the step
    with pytest.raises(TypeError):
        optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.1
    optimizer.step()
    assert w.grad is mine
    assert torch.equal(mine, torch.ones_like(w))
    optimizer.param_groups[0]["lr"] = None
    with pytest.raises(TypeError):
        optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.1
    optimizer.zero_grad()
    optimizer.step()
    assert w.grad is None, "what the user has dropped does not come back"


def test_hooks_run_in_the_order_they_were_registered():
    ours, theirs = weights((4, 5)), weights((4, 5))
    one = sgd(ours)
    one.register_step_pre_hook(lambda *_: nn.utils.clip_grad_norm_(ours, 0.5) and None)
    handle = constrain(one, {"w0": "row"})
    two, _ = held_sgd(theirs)
    grads = gradients([(4, 5)])
    run(one, ours, grads)
    for (g,) in grads:
        theirs[0].grad = g.clone()
        nn.utils.clip_grad_norm_(theirs, 0.5)
        two.step()
    assert torch.equal(ours[0], theirs[0])
    assert norm(ours[0].detach(), "row").sub(handle.radius["w0"]).abs().max() < 1e-12


def test_a_tracker_that_came_after_sees_the_weights_on_their_spheres():
    model, groups = model_and_groups()
    for group in groups:
        group["weight_decay"] = 0.0
    optimizer = torch.optim.AdamW(groups, lr=0.01)
    rows = []
    with constrain(optimizer) as handle, so.track(optimizer, rows.append):
        continue_training(model, optimizer, 5)
    for row in rows:
        for name, values in row["parameters"].items():
            radius = handle.radius[name]
            assert values["norm"]["max"] == pytest.approx(float(radius.max()), rel=1e-6)
            assert values["angle"]["mean"] > 0


def test_resuming_by_the_optimizers_state_dict_is_exact_bit_for_bit():
    model, groups = model_and_groups()
    optimizer = torch.optim.NAdam(groups, lr=0.01)
    handle = constrain(optimizer, transport="parallel")
    continue_training(model, optimizer, 7)
    saved = through_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    fresh, groups = model_and_groups()
    with torch.no_grad():
        for p in fresh.parameters():
            p.mul_(1.7)  # radii that the checkpoint must replace
    resumed = torch.optim.NAdam(groups, lr=1.0)
    other = constrain(resumed, transport="parallel")
    fresh.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    for name, radius in handle.radius.items():
        assert torch.equal(other.radius[name], radius)
    for net, opt in ((model, optimizer), (fresh, resumed)):
        continue_training(net, opt, 5)
    for p, q in zip(model.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(p, q)


def test_the_radius_of_bf16_weights_keeps_its_digits_through_a_checkpoint():
    # torch casts floating state of a parameter to the dtype of the parameter; this is not that.
    (w,), (v,) = (
        weights((4, 8), dtype=torch.bfloat16),
        weights((4, 8), dtype=torch.bfloat16, seed=2),
    )
    one, first = held_sgd([w])
    two, second = held_sgd([v])
    run(one, [w], gradients([(4, 8)], steps=3, dtype=torch.bfloat16))
    two.load_state_dict(through_file(one.state_dict()))
    assert torch.equal(second.radius["w0"], first.radius["w0"])
    assert second.radius["w0"].dtype == torch.float64
    saved = one.state_dict()["constrain"]["radius"]["w0"]
    second.radius["w0"].zero_()
    first.radius["w0"].mul_(2)
    assert torch.equal(2 * saved, first.radius["w0"]), "a copy"
    second.load_state_dict(first.state_dict())
    assert torch.equal(second.radius["w0"], first.radius["w0"])


def test_a_checkpoint_without_radii_leaves_them():
    ours, theirs = weights((4, 8)), weights((4, 8), seed=2)
    optimizer, handle = held_sgd(ours)
    before = handle.radius["w0"].clone()
    optimizer.load_state_dict(sgd(theirs).state_dict())
    assert torch.equal(handle.radius["w0"], before)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"w0": "tensor", "w1": "row"}, "'w0' is held with sphere='row' here .*'tensor' in"),
        ({"w0": "row"}, "'w1' is held with sphere='row' here and with sphere=None"),
    ],
)
def test_a_checkpoint_of_other_spheres_is_refused_and_nothing_is_changed(other, message):
    optimizer, handle = held_sgd(weights((4, 8), (4, 8)))
    strange = sgd(weights((4, 8), (4, 8), seed=2), lr=7.0)
    constrain(strange, other)
    before = copy.deepcopy(handle.radius)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(strange.state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.05
    for name, radius in handle.radius.items():
        assert torch.equal(radius, before[name])


def test_another_number_of_spheres_is_refused_by_name():
    _, handle = held_sgd(weights((4, 8)))
    _, other = held_sgd(weights((6, 8)))
    with pytest.raises(ValueError, match=r"'w0' has 4 spheres here and 6 in the checkpoint"):
        handle.load_state_dict(other.state_dict())


@pytest.mark.parametrize("how", [copy.deepcopy, pickle.dumps, through_file])
def test_a_copy_would_have_no_hooks_and_is_refused(how):
    (w,) = weights((4, 5))
    optimizer, handle = held_sgd([w])
    for thing in (optimizer, handle, (w, optimizer)):
        with pytest.raises(TypeError, match=r"cannot be copied or pickled.*call remove"):
            how(thing)
    handle.remove()
    copy.deepcopy((w, optimizer))


def test_copying_as_the_error_says_gives_the_same_run_twice():
    (w,) = weights((4, 5))
    optimizer, handle = held_sgd([w], transport="rescale")
    grads = gradients([(4, 5)])
    run(optimizer, [w], grads[:30])
    radii = handle.state_dict()
    handle.remove()
    v, twin = copy.deepcopy((w, optimizer))
    for one in (optimizer, twin):
        constrain(one, {"w0": "row"}, transport="rescale").load_state_dict(radii)
    run(optimizer, [w], grads[30:])
    run(twin, [v], grads[30:])
    assert torch.equal(w, v)


def test_the_guard_shows_nowhere():
    (w,) = weights((4, 5))
    optimizer, plain = sgd([w]), sgd([w])
    with constrain(optimizer, {"w0": "row"}):
        assert optimizer.defaults == plain.defaults
        assert repr(optimizer) == repr(plain)
        optimizer.add_param_group({"params": [("late", weights((2,))[0])]})
        assert set(optimizer.param_groups[1]) == set(plain.param_groups[0])
        state = through_file(optimizer.state_dict())
        assert set(state) == {"state", "param_groups", "constrain"}
    assert type(optimizer.defaults) is dict
    assert set(optimizer.state_dict()) == {"state", "param_groups"}


def test_after_remove_the_optimizer_is_torchs_own_bit_for_bit():
    ours, theirs = weights((4, 5)), weights((4, 5))
    grads = gradients([(4, 5)])
    optimizer, handle = held_sgd(ours)
    run(optimizer, ours, grads[:10])
    handle.remove()
    handle.remove()
    with torch.no_grad():
        theirs[0].copy_(ours[0])
    plain = sgd(theirs)
    plain.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run(optimizer, ours, grads[10:])
    run(plain, theirs, grads[10:])
    assert torch.equal(ours[0], theirs[0])
    with constrain(optimizer, {"w0": "row"}):
        pass


def test_groups_that_come_later_are_held_from_their_first_step_if_they_ask():
    first, late, plain = weights((4, 5), (3, 5), (2, 5))
    optimizer = torch.optim.SGD([{"params": [first], "sphere": "row"}], lr=0.1)
    handle = constrain(optimizer)
    grads = gradients([(4, 5), (3, 5), (2, 5)])
    run(optimizer, [first], [g[:1] for g in grads[:5]])
    optimizer.add_param_group({"params": [late], "sphere": "tensor"})
    optimizer.add_param_group({"params": [plain]})
    before = norm(late.detach()), norm(plain.detach())
    run(optimizer, [first, late, plain], grads)
    assert list(handle.radius) == ["group 0, parameter 0", "group 1, parameter 0"]
    assert (norm(late.detach()) - before[0]).abs().max() < 1e-12
    assert (norm(plain.detach()) - before[1]).abs().max() > 0.1


def test_a_report_gives_its_proved_spheres():
    model = nn.Sequential(
        nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4)
    )
    optimizer = torch.optim.Adam(model.named_parameters(), lr=0.01)
    report = so.find_spheres(model, torch.randn(16, 6))
    with constrain(optimizer, report) as handle:
        assert list(handle.radius) == ["0.weight"]
        assert handle.radius["0.weight"].shape == (8,)


class ScalarReads(TorchDispatchMode):
    """Counts the values that Python reads off tensors: each would stop the host on a GPU."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("transport", ["none", "project", "rescale", "parallel"])
def test_a_held_step_never_waits_for_the_device(transport):
    params = weights((4, 5), (3, 5))
    optimizer, _ = held_sgd(params, transport=transport)
    run(optimizer, params, gradients([(4, 5), (3, 5)], steps=1))
    with ScalarReads() as reads:
        optimizer.step()
    assert reads.count == 0


def test_the_page_of_the_docs_runs():
    text = (Path(__file__).parents[1] / "docs/constrain.md").read_text()
    model = nn.Sequential(nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8), nn.Linear(8, 4))
    names = {"so": so, "torch": torch, "model": model, "example_input": torch.randn(16, 6)}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(block, names)
    model(names["example_input"]).square().mean().backward()
    names["optimizer"].step()
    radius = names["handle"].radius["0.weight"]
    assert (norm(model[0].weight.detach(), "row") / radius - 1).abs().max() < 3e-7
