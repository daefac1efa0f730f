"""A power law through measurements, with its confidence band."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

# Student's t at 97.5%, by degrees of freedom from 1 on; beyond the table the normal distribution is near enough.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
      2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)  # fmt: skip


def student(free: int) -> float:
    """Half of a 95% interval in standard errors, with `free` degrees of freedom."""
    return _T[free - 1] if free <= len(_T) else 1.96


@dataclass(frozen=True, slots=True)
class Law:
    """y = a * x^b by least squares in the logarithms. Bands are pointwise, 95%, of the law itself, not of a new point.

    They assume deviations that are independent and equally large at every x; a true curve that bends breaks that.
    """

    a: float
    b: float
    b_error: float  # half of the exponent's 95% interval; inf with two measurements
    _spread: float
    _middle: float
    _square: float
    _count: int

    def __call__(self, x: np.ndarray) -> np.ndarray:
        return self.a * np.asarray(x, np.float64) ** self.b

    def band(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The band (low, high) of the law at x."""
        away = (np.log(np.asarray(x, np.float64)) - self._middle) ** 2 / self._square
        half = self._spread * np.sqrt(1 / self._count + away)
        return self(x) * np.exp(-half), self(x) * np.exp(half)

    def as_dict(self) -> dict[str, float | None]:
        """Scale, exponent and half of the exponent's 95% interval, for a file."""
        return {"a": self.a, "b": self.b, "b_error": self.b_error if math.isfinite(self.b_error) else None}

    def __str__(self) -> str:
        return f"{self.a:.4g} · x^({self.b:.3f} ± {self.b_error:.3f})"


def fit(x: np.ndarray, y: np.ndarray) -> Law | None:
    """The law of positive measurements; None without two different x, or if some value is not positive."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if len(x) < 2 or (x <= 0).any() or (y <= 0).any() or len(np.unique(x)) < 2:
        return None
    u, v = np.log(x), np.log(y)
    middle, square = u.mean(), ((u - u.mean()) ** 2).sum()
    b = ((u - middle) * (v - v.mean())).sum() / square
    a = np.exp(v.mean() - b * middle)
    free = len(x) - 2
    if free == 0:
        return Law(float(a), float(b), float("inf"), float("inf"), float(middle), float(square), len(x))
    spread = student(free) * np.sqrt(((v - np.log(a) - b * u) ** 2).sum() / free)
    return Law(float(a), float(b), float(spread / np.sqrt(square)), float(spread), float(middle), float(square), len(x))
