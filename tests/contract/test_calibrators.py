"""Every calibrator turns a histogram into a range that a grid can cover."""

from __future__ import annotations

import numpy as np
import pytest

from edgekd.errors import UsageError
from edgekd.quantize.calibrators import BINS, Histogram, calibrator, calibrator_names

NAMES = calibrator_names()


def histogram(values: np.ndarray) -> tuple[Histogram, float, float]:
    low, high = float(values.min()), float(values.max())
    return np.histogram(values, BINS, (low, high))[0].astype(np.float64), low, high


def gaussian() -> np.ndarray:
    return np.random.default_rng(0).normal(0, 1, 200_000)


@pytest.mark.parametrize("name", NAMES)
def test_the_range_lies_within_what_was_seen(name: str) -> None:
    for values in (gaussian(), np.abs(gaussian()), gaussian() ** 3):
        seen, low, high = histogram(values)
        first, last = calibrator(name)(seen, low, high)
        assert low - 1e-5 <= first < last <= high + 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_zero_stays_an_end_of_a_tensor_that_is_never_negative(name: str) -> None:
    values = np.maximum(gaussian(), 0)
    assert calibrator(name)(*histogram(values))[0] == 0


@pytest.mark.parametrize("name", NAMES)
def test_the_range_scales_with_the_values(name: str) -> None:
    one = calibrator(name)(*histogram(gaussian()))
    ten = calibrator(name)(*histogram(10 * gaussian()))
    assert ten == pytest.approx(tuple(10 * end for end in one), rel=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_the_same_histogram_gives_the_same_range(name: str) -> None:
    assert calibrator(name)(*histogram(gaussian())) == calibrator(name)(*histogram(gaussian()))


@pytest.mark.parametrize("name", NAMES)
def test_uniform_values_keep_their_whole_range_nearly(name: str) -> None:
    first, last = calibrator(name)(*histogram(np.random.default_rng(0).uniform(-1, 1, 200_000)))
    assert first < -0.95
    assert last > 0.95


@pytest.mark.parametrize("name", NAMES)
def test_a_constant_tensor_has_a_range(name: str) -> None:
    """The caller widens the observed range; all values lie in one bin."""
    seen = np.zeros(BINS)
    seen[0] = 1000
    first, last = calibrator(name)(seen, 0.5, 0.5 + 1e-6)
    assert np.isfinite([first, last]).all()
    assert first < last


@pytest.mark.parametrize("name", [name for name in NAMES if name != "min-max"])
def test_an_outlier_is_clipped(name: str) -> None:
    values = np.append(gaussian(), 1000.0)
    _, last = calibrator(name)(*histogram(values))
    assert last < 950


def test_min_max_is_what_was_seen() -> None:
    assert calibrator("min-max")(np.ones(BINS), -0.25, 4.0) == (-0.25, 4.0)


def test_percentile_leaves_out_the_stated_tail() -> None:
    seen = np.ones(BINS)
    seen[-1] = 0.0  # one bin holds nothing, one in a thousand is above the middle
    seen[BINS // 2 :] = 1e-9
    _, last = calibrator("percentile")(seen, 0.0, 1.0)
    assert last == pytest.approx(0.5, abs=2 / BINS)


def test_mse_beats_min_max_on_long_tails() -> None:
    values = gaussian() ** 3

    def error(ends: tuple[float, float]) -> float:
        step = (ends[1] - ends[0]) / 255
        rounded = np.clip(np.round((values - ends[0]) / step), 0, 255) * step + ends[0]
        return float(np.mean((rounded - values) ** 2))

    seen, low, high = histogram(values)
    assert error(calibrator("mse")(seen, low, high)) < 0.8 * error((low, high))


def test_an_unknown_calibrator_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(UsageError) as caught:
        calibrator("entropi")
    assert caught.value.hint == "did you mean 'entropy'?"
