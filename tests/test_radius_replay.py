"""Runs that follow the recorded norms of another, against that other run by torch.optim."""

import math
import re
from pathlib import Path

import pytest
import torch
from small_model import continue_training, model_and_groups, run
from test_constrain import gradients, named, weights
from test_radius_schedules import (
    ADAM,
    apart,
    batch_norm_net,
    constant,
    cosine,
    drop,
    through_file,
    train,
)

import sphereopt as so
from sphereopt.geometry import norm
from sphereopt.optim import SphereAdam, SphereError, SphereSGD
from sphereopt.optim.recorder import NormRecorder
from sphereopt.optim.schedules import RadiusReplay, RadiusSchedule


def replayed(plain, ours, options, decay, lr_factor, replay_decay=None):
    """Return how far a replay without weight decay strays from the run with, in radians."""
    model, groups = batch_norm_net(decay, on_spheres=True)
    optimizer = plain(groups, **options)
    recorder = NormRecorder(optimizer)
    reference = train(model, optimizer, lr_factor)
    model, groups = batch_norm_net(decay, on_spheres=False)
    optimizer = ours(groups, radius="free", **options)
    replay_decay = decay if replay_decay is None else replay_decay
    replay = RadiusReplay(optimizer, recorder.norms, weight_decay=replay_decay)
    return apart(reference, train(model, optimizer, lr_factor, replay))


@pytest.mark.parametrize("lr_factor", [constant, cosine, drop])
def test_sgd_without_weight_decay_follows_the_run_with(lr_factor):
    options = {"lr": 0.1}
    assert replayed(torch.optim.SGD, SphereSGD, options, 5e-3, lr_factor) < 1e-10
    # The paper's correction leaves out 1/(1 - lr*wd): lr is 5e-4 too small at every step.
    uncorrected = replayed(torch.optim.SGD, SphereSGD, options, 5e-3, lr_factor, 0.0)
    assert 1e-3 < uncorrected < 1


@pytest.mark.parametrize(("lr_factor", "limit"), [(constant, 1e-10), (cosine, 5e-3)])
def test_adamw_without_weight_decay_follows_the_run_with_at_constant_lr(lr_factor, limit):
    # While lr changes so does the factor, and with it the scale of the gradients in the moments.
    options = {"lr": 0.01, **ADAM}
    off = replayed(torch.optim.AdamW, SphereAdam, options, 0.1, lr_factor)
    assert off < limit
    uncorrected = replayed(torch.optim.AdamW, SphereAdam, options, 0.1, lr_factor, 0.0)
    assert uncorrected > 10 * off


def regression(optimizer, w, schedule=None):
    """Return the path of rows that predict by their direction, on 300 batches of noise.

    Unlike a network it does not magnify differences: what is left is of the method.
    """
    generator = torch.Generator().manual_seed(0)
    path = []
    for _ in range(300):
        x = torch.randn(6, w.shape[1], generator=generator, dtype=w.dtype)
        y = torch.randn(6, 1, generator=generator, dtype=w.dtype)
        optimizer.zero_grad()
        (x @ (w / w.norm(dim=1, keepdim=True)).t() - y).square().mean(0).sum().backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()
        path.append([w.detach().clone()])
    return path


def heavy_ball(lr, decay, momentum, replay_decay, replay_momentum):
    (w,), (v,) = weights((8, 20)), weights((8, 20))
    plain = torch.optim.SGD(named([w]), lr=lr, momentum=momentum, weight_decay=decay)
    recorder = NormRecorder(plain, {"w0": "row"})
    reference = regression(plain, w)
    options = {"lr": lr, "momentum": replay_momentum, "sphere": "row", "radius": "free"}
    optimizer = SphereSGD(named([v]), **options)
    replay = RadiusReplay(optimizer, recorder.norms, weight_decay=replay_decay)
    return apart(reference, regression(optimizer, v, replay))


@pytest.mark.parametrize(
    ("lr", "decay", "mu", "without", "with_factor", "with_momentum"),
    [  # the figures of docs/radius_schedules.md, in radians
        (0.1, 5e-3, 0.0, 3.3e-4, 0.0, 0.0),
        (0.05, 5e-4, 0.9, 2.2e-3, 2.1e-3, 4.4e-4),
        (0.05, 5e-3, 0.9, 2.7e-2, 2.6e-2, 4.9e-3),
        (0.05, 5e-3, 0.5, 6.6e-4, 4.9e-4, 1.9e-5),
    ],
)
def test_with_heavy_ball_no_factor_is_exact_and_a_larger_momentum_is_closer(
    lr, decay, mu, without, with_factor, with_momentum
):
    b = 1 + mu - lr * decay
    alpha = (b + math.sqrt(b * b - 4 * mu)) / 2
    close = {"rel": 0.05, "abs": 1e-12}  # of a figure with two digits
    assert heavy_ball(lr, decay, mu, 0.0, mu) == pytest.approx(without, **close)
    assert heavy_ball(lr, decay, mu, decay, mu) == pytest.approx(with_factor, **close)
    off = heavy_ball(lr, decay, mu, (1 - alpha) / lr, mu / alpha)
    assert off == pytest.approx(with_momentum, **close)


def test_a_recording_has_the_norm_before_every_step_and_the_present_one():
    model, groups = model_and_groups()
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=0.1)
    expected = []

    def look(*_):
        joint = torch.cat([model[3].weight.detach(), model[3].bias.detach()[:, None]], dim=1)
        expected.append((norm(model[0].weight.detach(), "row"), norm(joint)))

    with NormRecorder(optimizer) as recorder:
        look()
        assert [len(x) for x in recorder.norms.values()] == [1, 1]
        optimizer.register_step_post_hook(look)
        continue_training(model, optimizer, 5)
        norms = recorder.norms
    continue_training(model, optimizer, 1)
    assert list(norms) == ["0.weight", "3.weight + 3.bias"]
    for rows, wanted in zip(norms.values(), zip(*expected[:6], strict=True), strict=True):
        # Two sums of float32 in another order.
        torch.testing.assert_close(rows, torch.stack(wanted), rtol=1e-6, atol=0)


def test_a_recording_of_a_free_optimizer_is_of_the_believed_norm():
    model, groups = model_and_groups()
    optimizer = SphereSGD(groups, lr=0.1, momentum=0.9, weight_decay=0.1, radius="free")
    plain_model, plain_groups = model_and_groups()
    plain = torch.optim.SGD(plain_groups, lr=0.1, momentum=0.9, weight_decay=0.1)
    recorders = [NormRecorder(o) for o in (optimizer, plain)]
    continue_training(model, optimizer, 20)
    continue_training(plain_model, plain, 20)
    one, two = (recorder.norms["0.weight"] for recorder in recorders)
    assert one.shape == (21, 8)
    # float32 and eps of BatchNorm are what parts the two.
    torch.testing.assert_close(one, two, rtol=1e-3, atol=0)
    assert (one[-1] / one[0] - 1).abs().min() > 1e-3


def test_a_recording_goes_on_from_a_file():
    model, groups = model_and_groups()
    optimizer = torch.optim.SGD(groups, lr=0.1, weight_decay=0.1)
    whole, first = NormRecorder(optimizer), NormRecorder(optimizer)
    continue_training(model, optimizer, 4)
    saved = through_file(first.state_dict())
    first.remove()
    second = NormRecorder(optimizer)
    second.load_state_dict(saved)
    continue_training(model, optimizer, 3)
    for name, rows in whole.norms.items():
        assert rows.shape[0] == 8
        assert torch.equal(second.norms[name], rows)
    short = {"norms": {"0.weight": torch.ones(3, 5)}}
    with pytest.raises(ValueError, match=r"'0.weight' needs norms of shape \(steps, 8\)"):
        second.load_state_dict(short)


def test_the_end_of_a_recording_is_an_error_that_says_so():
    (w,) = weights((4, 5))
    optimizer = SphereSGD(named([w]), lr=0.1, sphere="row", radius="free")
    replay = RadiusReplay(optimizer, {"w0": torch.ones(3, 4)})
    grads = gradients([(4, 5)], steps=3)
    for g in grads[:2]:
        run(optimizer, [w], [g])
        replay.step()
    run(optimizer, [w], grads[2:])
    with pytest.raises(SphereError, match=r"'w0' has norms for steps 0 to 2, and none for step 3"):
        replay.step()


def test_the_page_of_the_docs_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parents[1] / "docs/radius_schedules.md").read_text()
    usage, replay, schedules = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    model, groups = model_and_groups()
    names = {"so": so, "torch": torch, "model": model, "groups": groups}
    names |= {"NormRecorder": NormRecorder, "RadiusReplay": RadiusReplay}
    names |= {"RadiusSchedule": RadiusSchedule}
    names["train"] = lambda model, optimizer: continue_training(model, optimizer, 5)
    names["torch_optimizer"] = torch.optim.SGD(model_and_groups()[1], lr=0.1)
    exec(replay, names)
    exec(schedules, names)
    names["scheduler"] = torch.optim.lr_scheduler.ConstantLR(names["optimizer"])
    exec(usage, names)
    assert names["replay"].last_step == 1
