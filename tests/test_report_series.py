"""Running medians: of short logs to the row, of long ones in bounded memory."""

import tracemalloc

import numpy as np
import pytest

from sphereopt.report.series import smoothed, window


def brute_force(values):
    width = window(len(values))
    every = -(-width // 100)
    padded = np.concatenate([np.repeat(values[:1], width - 1, axis=0), values])
    rows = [padded[i : i + width][::-1][::every] for i in range(len(values))]
    return np.array([np.nanmedian(row, axis=0) for row in rows])


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (7, 2), (60, 3), (1999, 2), (5000, 2)])
def test_running_medians_are_those_of_the_rows_before(rows, columns):
    values = np.random.default_rng(0).normal(size=(rows, columns))
    values[rows // 3] = np.nan if rows > 20 else 1e9
    np.testing.assert_allclose(smoothed(values), brute_force(values), rtol=1e-12)


def test_a_step_in_a_long_log_is_seen_half_a_window_late():
    values = np.repeat([0.0, 1.0], 20_000)[:, None]
    first = int(np.argmax(smoothed(values)[:, 0] > 0.5))
    assert 20_000 <= first <= 20_000 + 0.51 * window(len(values))


def test_running_medians_of_a_long_log_need_little_memory():
    """A copy of every window would be four gigabytes."""
    tracemalloc.start()
    try:
        smoothed(np.zeros((97_000, 1)))
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert most < 400e6
