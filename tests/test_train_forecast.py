"""The calculator beside the first arm of the comparison run."""

import numpy as np
import pytest
import torch

from sphereopt.geometry import angle, norm, tangent
from sphereopt.theory import trajectory
from sphereopt.train import Config, learning_rate, train
from sphereopt.train.forecast import forecast

pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return train(Config(steps=40), tmp_path_factory.mktemp("run"))


def test_forecast_follows_torch_where_gradients_are_noise():
    config = Config(steps=300, lr=0.2, weight_decay=0.02)
    generator = torch.Generator().manual_seed(0)
    w = torch.nn.Parameter(torch.randn(20, 200, generator=generator, dtype=torch.float64) / 30)
    start = norm(w.detach(), "row")
    optimizer = torch.optim.SGD([w], lr=1.0, momentum=0.9, weight_decay=config.weight_decay)
    steps, sizes, norms, angles = [], [], [], []
    for step in range(1, config.steps + 1):
        old = w.detach().clone()
        noise = tangent(old, torch.randn(w.shape, generator=generator, dtype=w.dtype), "row")
        # Gradients shrink to a quarter on the way, as when a loss is learned.
        size = (1 - 0.75 * step / config.steps) / 14
        w.grad = size * noise / norm(old, "row")[:, None]
        optimizer.param_groups[0]["lr"] = learning_rate(step - 1, config)
        optimizer.step()
        if step % 5 == 0:
            steps.append(step)
            sizes.append(norm(w.grad, "row") * norm(old, "row"))
            norms.append(norm(w.detach(), "row").median().item())
            angles.append(angle(old, w.detach(), "row").square().mean().sqrt().item())
    points = forecast(config, start, steps, torch.stack(sizes))
    # 20 rows leave 1 % of noise in the norm. The steps' angles have 10 % of noise each.
    assert [point.norm for point in points] == pytest.approx(norms, rel=0.05)
    assert max(norms) > 1.5 * min(norms)
    found = np.array([point.angle for point in points]).reshape(6, 10).mean(axis=1)
    assert found == pytest.approx(np.reshape(angles, (6, 10)).mean(axis=1), rel=0.05)


def test_forecast_has_a_point_for_every_logged_step(results):
    assert [point.step for point in results.forecast] == [step for step, _ in results.predicted]
    first = results.forecast[0]
    assert first.norm == pytest.approx(results.arms["sgd"].norms[1].stored.median, rel=0.01)


def test_forecast_is_the_calculator_s_for_gradients_of_one_size():
    config = Config(steps=40, lr=0.05)
    norms = torch.tensor([0.5, 2.0], dtype=torch.float64)
    points = forecast(config, norms, [1, 20, 40], torch.full((3, 2), 0.3))
    lr = [learning_rate(step, config) for step in range(40)]
    options = {"lr": lr, "weight_decay": 0.01, "momentum": 0.9, "grad_norm": np.float32(0.3)}
    runs = [trajectory("sgd", norm0=norm, **options) for norm in (0.5, 2.0)]
    for point in points:
        t = point.step - 1
        assert point.norm == pytest.approx((runs[0].norm[t] + runs[1].norm[t]) / 2, rel=1e-12)
        assert point.angle == pytest.approx((runs[0].angle[t] + runs[1].angle[t]) / 2, rel=1e-12)


def test_forecast_of_a_silent_filter_only_shrinks():
    config = Config(steps=20)
    points = forecast(config, torch.ones(1), [10, 20], torch.zeros(2, 1))
    assert points[1].norm < points[0].norm < 1
    assert points[1].angle < 1e-8  # the root of what float64 rounds
