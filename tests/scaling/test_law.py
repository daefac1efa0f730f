"""The fitted law: exact on exact data, and its interval covers the truth as often as it says."""

from __future__ import annotations

import numpy as np
import pytest

from megarl.scaling.law import fit

X = np.array([1.0, 2.0, 4.0, 8.0, 16.0])


def test_an_exact_law_is_found_with_a_band_of_no_width() -> None:
    law = fit(X, 3.0 * X**0.7)
    assert (law.a, law.b) == pytest.approx((3.0, 0.7))
    low, high = law.band(X)
    assert low == pytest.approx(3.0 * X**0.7)
    assert high == pytest.approx(3.0 * X**0.7)


def test_the_interval_covers_the_true_exponent_in_95_of_100_samples() -> None:
    """2,000 samples of 5 points with noise in the logarithm: 0.95 ± 0.016 (three standard errors)."""
    random, inside, covered = np.random.default_rng(0), 0, 0
    for _ in range(2000):
        law = fit(X, 2.0 * X**-0.5 * np.exp(random.normal(0, 0.2, len(X))))
        inside += abs(law.b + 0.5) <= law.b_error
        low, high = law.band(np.array([5.0]))
        covered += low[0] <= 2.0 * 5.0**-0.5 <= high[0]
    assert inside / 2000 == pytest.approx(0.95, abs=0.016)
    assert covered / 2000 == pytest.approx(0.95, abs=0.016)


def test_what_cannot_be_fitted_is_not() -> None:
    assert fit(np.array([2.0, 2.0]), np.array([1.0, 3.0])) is None
    assert fit(X, -X) is None
    assert fit(X[:2], X[:2]).b_error == float("inf")
