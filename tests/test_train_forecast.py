"""The calculator beside the first arm of the comparison run."""

import numpy as np
import pytest
import torch

from sphereopt.theory import trajectory
from sphereopt.train import Config, learning_rate, train
from sphereopt.train.forecast import forecast

pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return train(Config(steps=40), tmp_path_factory.mktemp("run"))


def test_forecast_is_close_to_what_was_measured(results):
    measured = {point.step: point.stored.median for point in results.arms["sgd"].norms}
    # From the initial norms and the size of the gradients only; early gradients are not yet noise,
    # and 13 % is the most that the 2,000 steps of the demo show.
    for point in results.forecast:
        assert point.norm == pytest.approx(measured[point.step], rel=0.2)
    assert [point.step for point in results.forecast] == [step for step, _ in results.predicted]


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
