"""What the calculator refuses, and what it warns of, on both sides of every threshold."""

import numpy as np
import pytest

from sphereopt.theory import OutOfRangeError, equilibrium, trajectory
from sphereopt.theory.shapes import newton_schulz

GIVEN = {"lr": 0.1, "weight_decay": 0.01}


@pytest.mark.parametrize(
    ("optimizer", "options", "message"),
    [
        ("lamb", {}, "optimizer='lamb' must be one of sgd, sgdw, adam, adamw, sign, signum, lion"),
        ("adamv", {}, r"optimizer='adamv' .*; did you mean 'adam"),
        ("sgd", {"betas": (0.9, 0.9)}, r"betas=\(0.9, 0.9\) is no option of sgd \(it has: moment"),
        ("sign", {"momentum": 0.9}, r"momentum=0.9 is no option of sign \(it has: none\)"),
        ("sgd", {"lr": 0}, "lr=0 must be positive and finite"),
        ("sgd", {"lr": 1e60}, "lr=1e+60 must be positive and below 1e+50".replace("+", r"\+")),
        ("sgd", {"lr": -1.0}, "lr=-1.0 must be positive"),
        ("sgd", {"lr": float("nan")}, "lr=nan must be positive"),
        ("sgd", {"lr": float("inf")}, "lr=inf must be positive"),
        ("sgd", {"lr": "fast"}, "lr='fast' must be a number"),
        ("sgd", {"weight_decay": 0.0}, "weight_decay=0.0 must be positive"),
        ("sgd", {"weight_decay": None}, "weight_decay=None must be a number"),
        ("sgd", {"lr": 100.0}, "lr=100.0 times weight_decay=0.01 must be below 1"),
        ("adamw", {"lr": 100.0}, "lr=100.0 times weight_decay=0.01 must be below 1"),
        ("sgd", {"momentum": 1.0}, "momentum=1.0 must be 0 or more and below 1"),
        ("sgd", {"momentum": -0.1}, "momentum=-0.1 must be 0 or more and below 1"),
        ("sgd", {"momentum": 0.9, "dampening": 1}, "dampening=1 must be 0 or more and below 1"),
        ("sgd", {"nesterov": True}, "nesterov=True needs a momentum and no dampening"),
        (
            "sgdw",
            {"momentum": 0.9, "dampening": 0.1, "nesterov": True},
            "nesterov=True needs a momentum and no dampening",
        ),
        ("adamw", {"betas": 0.9}, r"betas=0.9 must be two numbers in \[0, 1\)"),
        ("lion", {"betas": (0.9,)}, r"betas=\(0.9,\) must be two numbers"),
        ("adamw", {"betas": (0.9, 1.0)}, "betas=1.0 must be 0 or more and below 1"),
        ("adamw", {"eps": -1e-8}, "eps=-1e-08 must be 0 or more"),
        ("muon", {}, r"shape=None must be the \(rows, columns\) of the matrix"),
        ("muon", {"shape": (3, 4, 5)}, r"shape=\(3, 4, 5\) must be the \(rows, columns\)"),
        ("muon", {"shape": (3, 0)}, "shape=0 must be a whole number, 1 or more"),
        ("muon", {"shape": (3, 4), "dim": 13}, "dim=13 contradicts the shape, of 12 weights"),
        (
            "muon",
            {"shape": (3, 4), "adjust_lr_fn": "adamw"},
            "adjust_lr_fn='adamw' must be original or match_rms_adamw",
        ),
        ("sgd", {"dim": 0}, "dim=0 must be a whole number, 1 or more"),
        ("sgd", {"dim": 2.5}, "dim=2.5 must be a whole number"),
        ("sgd", {"dim": True}, "dim=True must be a whole number"),
        ("sgd", {"grad_norm": 0.0}, "grad_norm=0.0 must be positive"),
        ("sgd", {"dtype": "fp8"}, "dtype='fp8' must be one of float64, float32, float16, bfloat16"),
        ("adam", {"grad_norm": 1.0}, "dim=None must be given: with L2 the angle of adam depends"),
        ("adam", {"dim": 10}, "grad_norm=None must be given: with L2 the angle of adam depends"),
    ],
)
def test_equilibrium_refuses(optimizer, options, message):
    with pytest.raises(OutOfRangeError, match=message):
        equilibrium(optimizer, **{**GIVEN, **options})


RUN = {"lr": 0.1, "weight_decay": 0.01, "steps": 5, "norm0": 1.0, "grad_norm": 1.0}


@pytest.mark.parametrize(
    ("optimizer", "options", "message"),
    [
        ("sgd", {"grad_norm": None}, "grad_norm=None must be given: the norm under sgd depends"),
        ("sgd", {"grad_norm": 0.0}, "grad_norm=0.0 must be positive"),
        ("sgd", {"grad_norm": [1, 1, 1, 0, 1]}, "grad_norm=0.0 must be positive at every step"),
        ("sgd", {"lr": -0.1}, "lr=-0.1 must be finite and not negative"),
        ("sgd", {"lr": [0.1, np.nan, 0.1, 0.1, 0.1]}, "lr=nan must be finite and not negative"),
        ("sgd", {"lr": "fast"}, "lr='fast' must be a number, or one for each step"),
        ("sgd", {"weight_decay": np.inf}, "weight_decay=inf must be finite and not negative"),
        ("sgd", {"lr": np.ones((5, 2))}, r"lr=\(5, 2\) is the shape; must be a number, or one for"),
        ("sgd", {"steps": None}, "steps=None must be given, and lr, .*: they say nothing"),
        ("sgd", {"lr": [0.1] * 4}, "steps=5 must be given, and .* they say 4 and 5"),
        ("sgd", {"steps": 0}, "steps=0 must be a whole number, 1 or more"),
        ("sgd", {"rms0": 1.0}, "norm0=1.0 or rms0=1.0 must be given, not both"),
        ("sgd", {"norm0": None}, "norm0=None or rms0=None must be given"),
        ("sgd", {"norm0": 0.0}, "norm0=0.0 must be positive"),
        ("sgd", {"norm0": None, "rms0": 1.0}, "dim=None must be given with rms0; or give norm0"),
        ("sgd", {"lr": 200.0}, "lr=200.0 times weight_decay=0.01 must be below 1"),
        ("adamw", {}, "dim=None must be given with norm0; or give rms0"),
        ("adamw", {"norm0": None, "rms0": -1}, "rms0=-1 must be positive"),
        (
            "adamw",
            {"lr": [0.1, 200, 0, 0, 0], "dim": 3},
            "lr=200.0 times weight_decay=0.01 must be below",
        ),
    ],
)
def test_trajectory_refuses(optimizer, options, message):
    with pytest.raises(OutOfRangeError, match=message):
        trajectory(optimizer, **{**RUN, **options})


def warned(optimizer, **options):
    return [text.partition(" ")[0] for text in equilibrium(optimizer, **options).warnings]


def about(words, optimizer, **options):
    """Whether one warning begins with these words."""
    texts = equilibrium(optimizer, **options).warnings
    return sum(text.startswith(words) for text in texts) == 1


@pytest.mark.parametrize(
    ("words", "optimizer", "quiet", "loud"),
    [
        # (1 - sqrt(0.9))^2 = 0.002633
        (
            "momentum oscillation: lr*weight_decay is over (1 - sqrt(momentum))^2",
            "sgd",
            {"lr": 1.0, "weight_decay": 0.00263, "momentum": 0.9},
            {"lr": 1.0, "weight_decay": 0.00264, "momentum": 0.9},
        ),
        (
            "lr*weight_decay = 0.01: over 1 %",
            "sgd",
            {"lr": 1.0, "weight_decay": 0.0099},
            {"lr": 1.0, "weight_decay": 0.0101},
        ),
        # The norm relaxes at 2 lr weight_decay, and 0.1 (1 - beta2) is 1e-4.
        (
            "second moment: the norm would settle faster than 10/(1 - beta2) steps",
            "adamw",
            {"lr": 1e-3, "weight_decay": 0.0499},
            {"lr": 1e-3, "weight_decay": 0.0501},
        ),
        # The root mean square of the gradient is grad_norm / (norm sqrt(dim)), 0.45 here.
        (
            "eps = ",
            "adamw",
            {"lr": 1e-3, "weight_decay": 0.01, "dim": 100, "grad_norm": 10.0, "eps": 0.0044},
            {"lr": 1e-3, "weight_decay": 0.01, "dim": 100, "grad_norm": 10.0, "eps": 0.0046},
        ),
        # The decay is sqrt(kappa/2) of the gradient at equilibrium, and kappa about
        # (2 lr^2 weight_decay dim / grad_norm)^(2/3) / 2.
        (
            "L2: the decay is 5% of the gradient",
            "adam",
            {"lr": 1e-2, "weight_decay": 0.046, "dim": 100, "grad_norm": 1.0},
            {"lr": 1e-2, "weight_decay": 0.049, "dim": 100, "grad_norm": 1.0},
        ),
        # Half of a unit in the last place is 2**-8 of a weight at most.
        (
            "bfloat16: multiplying weights by 1 - 0.0039 changes nothing",
            "lion",
            {"lr": 1.0, "weight_decay": 0.00391, "dtype": "bfloat16"},
            {"lr": 1.0, "weight_decay": 0.0039, "dtype": "bfloat16"},
        ),
        # The angle is sqrt(2 lr weight_decay), and 2**-11 is 0.000488.
        (
            "float16: steps of 0.00049 of a weight round to nothing",
            "sgd",
            {"lr": 1e-3, "weight_decay": 0.0001195, "dtype": "float16"},
            {"lr": 1e-3, "weight_decay": 0.000119, "dtype": "float16"},
        ),
    ],
)
def test_warnings_begin_where_they_should(words, optimizer, quiet, loud):
    assert not about(words, optimizer, **quiet)
    assert about(words, optimizer, **loud)


def test_ordinary_settings_are_not_warned_of():
    assert warned("sgd", lr=0.1, weight_decay=5e-4, momentum=0.9) == []
    assert warned("adamw", lr=3e-4, weight_decay=0.1, betas=(0.9, 0.95)) == []
    assert warned("lion", lr=3e-5, weight_decay=1.0) == []
    assert warned("muon", lr=2e-2, weight_decay=0.01, shape=(512, 512)) == []
    assert warned("sgd", lr=0.1, weight_decay=5e-4, dtype="bfloat16") == []


def test_coupled_decay_is_not_lost_to_rounding_by_itself():
    assert warned("sgd", lr=0.1, weight_decay=1e-2, dtype="bfloat16") == []
    assert warned("sgdw", lr=0.1, weight_decay=1e-2, dtype="bfloat16") == ["bfloat16:"]


def test_warnings_are_printed():
    text = str(equilibrium("adamw", lr=1e-3, weight_decay=0.1))
    assert text.splitlines()[-1].startswith("  warning: second moment: ")


# Far from anything sensible, but numbers all the same.


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (3, 1), (2, 2), (1, 5000), (33, 33), (7, 4096)])
def test_muon_of_small_and_thin_matrices_is_a_number(shape):
    found = equilibrium("muon", lr=1e-2, weight_decay=0.1, shape=shape)
    assert 1 < found.K < 40
    assert found.norm > 0


def test_muon_of_a_vector_only_divides_by_the_norm():
    # The quintic takes 1 to 0.70, 1.21 and so on; what is left is momentum's, which is linear.
    x = 1.0
    for _ in range(5):
        x = 3.4445 * x - 4.7750 * x**3 + 2.0315 * x**5
    made = newton_schulz(1, 64)
    assert made.power == pytest.approx(x * x, rel=1e-12)
    assert made.share == pytest.approx(1, rel=1e-12)


def test_the_two_spectra_of_matrices_meet():
    small, large = newton_schulz(32, 64), newton_schulz(33, 66)
    # Both are over the shorter side; 1 % is that of the sampled spectrum and of the limit.
    assert small.power / 32 == pytest.approx(large.power / 33, rel=0.01)
    assert small.share == pytest.approx(large.share, rel=0.01)


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        ("adamw", {"lr": 9.5e-4, "rms0": 1e-6, "betas": (0.5, 0.999)}),
        ("signum", {"lr": 0.25, "rms0": 0.003}),
        ("lion", {"lr": np.geomspace(1e-3, 1e-200, 100), "rms0": 0.02, "steps": 100}),
        ("adam", {"lr": np.geomspace(1e-3, 1e-40, 100), "norm0": 1.0, "dim": 9, "grad_norm": 1.0}),
        ("sgd", {"lr": 1.0, "norm0": 1e-40, "grad_norm": 1e10}),
    ],
)
def test_extreme_runs_are_numbers(optimizer, options):
    run = trajectory(optimizer, **{"weight_decay": 0.1, "steps": 100, **options})
    size = run.norm if run.norm is not None else run.rms
    assert np.all(np.isfinite(run.angle) & (run.angle >= 0) & (run.angle < np.pi))
    assert np.all(np.isfinite(size) & (size > 0))
    assert np.all(np.isfinite(run.equilibrium))


def test_memories_beyond_all_runs_are_refused():
    message = "momentum=0.9999999 must be 0 or more and below 0.99999"
    with pytest.raises(OutOfRangeError, match=message):
        equilibrium("signum", lr=1e-3, weight_decay=0.1, momentum=0.9999999)
