"""The recursion of three moments against two independent ways to the same moments, in float64."""

import math

import numpy as np
import pytest

from sphereopt.theory import equilibrium, schedule, trajectory


def sgd_step(w, buffer, g, *, lr, wd, mu, damp=0.0, nesterov=False, decoupled=False, first=False):
    """Step as the documentation of torch.optim.SGD says it; ``decoupled``: decay as in AdamW."""
    shrink = 1 - lr * wd if decoupled else 1.0
    grad = g if decoupled else g + wd * w
    if mu == 0:
        return shrink * w - lr * grad, buffer
    buffer = grad if first else mu * buffer + (1 - damp) * grad
    return shrink * w - lr * (grad + mu * buffer if nesterov else buffer), buffer


def by_matrices(rates, decays, grads, start, **options):
    """Run ``S' = F S F^T + h h^T |g|^2`` for the covariance S of weights and buffer."""
    S = np.diag([start**2, 0.0])
    norms, angles = [], []
    for t, (lr, wd, ghat) in enumerate(zip(rates, decays, grads, strict=True)):
        # A step is linear: what it makes of unit vectors is its matrix.
        columns = [
            sgd_step(*unit, lr=lr, wd=wd, first=t == 0, **options) for unit in np.eye(3).tolist()
        ]
        F, h = np.array(columns[:2]).T, np.array(columns[2])
        after = F @ S @ F.T + np.outer(h, h) * ghat**2 / S[0, 0]
        ahead = (F @ S)[0, 0]
        across = after[0, 0] * S[0, 0] - ahead**2
        norms.append(math.sqrt(after[0, 0]))
        angles.append(math.atan2(math.sqrt(across), ahead))
        S = after
    return np.array(norms), np.array(angles)


@pytest.mark.parametrize("start", [0.3, 3.0])
@pytest.mark.parametrize(
    ("mu", "options"),
    [
        (0.0, {}),
        (0.9, {}),
        (0.5, {}),
        (0.9, {"nesterov": True}),
        (0.9, {"damp": 0.4}),
        (0.0, {"decoupled": True}),
        (0.9, {"decoupled": True}),
        (0.9, {"decoupled": True, "nesterov": True}),
        (0.9, {"decoupled": True, "damp": 0.9}),
    ],
)
def test_the_sgd_family_is_a_two_by_two_lyapunov_recursion(mu, options, start):
    rates = schedule("cosine", 0.1, 300, warmup=20)
    decays = np.linspace(0.02, 0.005, 300)
    grads = 1 + 0.5 * np.sin(np.arange(300))
    norms, angles = by_matrices(rates, decays, grads, start, mu=mu, **options)
    run = trajectory(
        "sgdw" if options.get("decoupled") else "sgd",
        lr=rates,
        weight_decay=decays,
        grad_norm=grads,
        norm0=start,
        momentum=mu,
        dampening=options.get("damp", 0.0),
        nesterov=options.get("nesterov", False),
    )
    np.testing.assert_allclose(run.norm, norms, rtol=1e-12)
    # The oracle's is a difference of near equals, rounded to 1e-15 or so.
    np.testing.assert_allclose(run.angle**2, angles**2, rtol=1e-9, atol=1e-13)


def by_arcsine(rates, wd, start, *, beta, inner):
    """Sign of ``inner m + (1 - inner) g``, ``m`` averaging at ``beta``: all pairs of steps.

    One weight in units of its root mean square; signs of Gaussians with correlation r correlate
    as ``2/pi arcsin r``, and every pair of steps is kept.
    """
    steps = len(rates)
    filters, sizes, corr = np.zeros((steps, steps)), np.zeros(steps), np.eye(steps)
    kept = np.zeros(steps)  # What decay has left of every update.
    square, initial = start**2, start**2
    norms, angles = [], []
    for t, lr in enumerate(rates):
        lags = np.arange(t - 1, -1, -1.0)
        filters[t, :t] = inner * (1 - beta) * beta**lags
        filters[t, t] = 1 - inner
        sizes[t] = 1 / math.sqrt(square)
        c = filters[: t + 1] * sizes
        cov = c @ c[t]
        own = np.sqrt((c**2).sum(1))
        rho = np.clip(cov / (own * own[t]), -1, 1)
        corr[t, : t + 1] = corr[: t + 1, t] = 2 / math.pi * np.arcsin(rho)
        back = -(kept[:t] @ corr[t, :t])  # of the weights along the coming update
        a = 1 - lr * wd
        after = a * a * square - 2 * a * lr * back + lr * lr
        ahead = a * square - lr * back
        across = after * square - ahead**2
        angles.append(math.atan2(math.sqrt(across), ahead))
        norms.append(math.sqrt(after))
        kept *= a
        kept[t] = lr
        initial *= a * a
        square = after
    assert initial + kept @ corr @ kept == pytest.approx(square, rel=1e-9)
    return np.array(norms), np.array(angles)


@pytest.mark.parametrize(
    ("name", "hyper", "beta", "inner"),
    [
        ("sign", {}, 0.0, 0.0),
        ("signum", {"momentum": 0.9}, 0.9, 0.9),
        ("lion", {"betas": (0.9, 0.99)}, 0.99, 0.9),
        ("lion", {"betas": (0.95, 0.98)}, 0.98, 0.95),
    ],
)
@pytest.mark.parametrize("start", [0.3, 1.0, 3.0])
def test_sign_optimizers_follow_the_arcsine_law_of_all_pairs(name, hyper, beta, inner, start):
    lr, wd = 0.01, 0.2
    rms0 = start * equilibrium(name, lr=lr, weight_decay=wd, **hyper).rms
    rates = schedule("cosine", lr, 250, warmup=25, final=0.1)
    # signum's buffer includes the gradient, with weight 1 - beta as here.
    norms, angles = by_arcsine(rates, wd, rms0, beta=beta, inner=inner)
    run = trajectory(name, lr=rates, weight_decay=wd, rms0=rms0, **hyper)
    # The recursion takes the lags beyond the linear share from a filter that has settled.
    close = {"sign": 1e-9, "signum": 7e-3, "lion": 2e-2}[name]
    np.testing.assert_allclose(run.rms, norms, rtol=close)
    np.testing.assert_allclose(run.angle[10:], angles[10:], rtol=2 * close)


@pytest.mark.parametrize(
    ("name", "hyper", "beta", "inner"),
    [("sign", {}, 0.0, 0.0), ("signum", {"momentum": 0.8}, 0.8, 0.8)],
)
def test_sign_equilibria_are_those_of_all_pairs(name, hyper, beta, inner):
    settled = equilibrium(name, lr=0.01, weight_decay=1.0, **hyper)
    norms, angles = by_arcsine([0.01] * 350, 1.0, settled.rms, beta=beta, inner=inner)
    # 350 steps are seven relaxation times.
    assert norms[-1] == pytest.approx(settled.rms, rel=3e-3)
    assert angles[-1] == pytest.approx(settled.angle, rel=3e-3)
