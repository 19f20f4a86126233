"""A table of one device, moved to another by a few measurements."""

from __future__ import annotations

import numpy as np
import pytest

from edgekd.transfer import fit_transfer

RNG = np.random.default_rng(0)
PARTS = RNG.uniform(0.1, 2.0, (200, 4))


def error(predicted: np.ndarray, exact: np.ndarray) -> float:
    return float(np.median(np.abs(predicted / exact - 1)))


def test_one_measurement_scales_the_table() -> None:
    """Nearly: the ridge has one number to fit, and the factor explains it."""
    found = fit_transfer(PARTS[:1], np.array([3 * PARTS[0].sum()]))
    assert found.predict(PARTS) == pytest.approx(3 * PARTS.sum(1))


def test_each_kind_of_layer_gets_a_factor_of_its_own() -> None:
    exact = PARTS @ np.array([1.0, 5.0, 0.5, 2.0])
    few = error(fit_transfer(PARTS[:3], exact[:3]).predict(PARTS[50:]), exact[50:])
    many = error(fit_transfer(PARTS[:30], exact[:30]).predict(PARTS[50:]), exact[50:])
    assert many < 0.01 < few


def test_noise_is_not_fitted() -> None:
    exact = 2 * PARTS.sum(1)
    noisy = exact * RNG.normal(1, 0.1, len(exact))
    found = fit_transfer(PARTS[:8], noisy[:8])
    assert error(found.predict(PARTS[50:]), exact[50:]) < 0.1
    assert 2 < found.error_percent < 25


def test_the_stated_error_is_that_on_unseen_rows() -> None:
    exact = PARTS @ np.array([1.0, 5.0, 0.5, 2.0]) * RNG.normal(1, 0.05, len(PARTS))
    found = fit_transfer(PARTS[:40], exact[:40])
    assert found.error_percent == pytest.approx(100 * error(found.predict(PARTS[50:]), exact[50:]), abs=2)
