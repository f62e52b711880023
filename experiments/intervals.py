"""Means with their 95 % intervals, by Student's t distribution."""

from typing import Any, NamedTuple

import numpy as np
from scipy.special import stdtrit

LEVEL = 0.95


class Interval(NamedTuple):
    """A mean and how far its 95 % interval reaches on both sides; NaN of a single value."""

    mean: float
    reach: float

    @property
    def excludes_zero(self) -> bool:
        """Whether the whole interval is on one side of zero."""
        return abs(self.mean) > self.reach


def interval(values: np.ndarray) -> Interval:
    """Return the mean of independent values (n,), as one of each seed, with its interval.

    ``mean +- t_{n-1, 0.975} s / sqrt(n)``, s the standard deviation with n - 1 in its denominator.
    """
    n = len(values)
    if n == 0:
        return Interval(np.nan, np.nan)
    t = stdtrit(n - 1, (1 + LEVEL) / 2) if n > 1 else np.nan
    return Interval(float(np.mean(values)),
                    float(t * np.std(values, ddof=1) / np.sqrt(n)) if n > 1 else np.nan)


def number(found: Interval, digits: int = 1) -> str:
    """Return a mean with its interval, if there is one."""
    return f"{found.mean:,.{digits}f}" + ("" if np.isnan(found.reach) else
                                          f" +-{found.reach:,.{digits}f}")


def percent(values: Any) -> str:
    """Return the mean of shares (n,) in %, with its interval if there is one."""
    return number(interval(100 * np.asarray(values, np.float64)))


def signed(found: Interval) -> str:
    """Return a difference, with its interval if there is one."""
    return f"{found.mean:+.1f}" + ("" if np.isnan(found.reach) else f" +- {found.reach:.1f}")


def advantage(one: np.ndarray, other: np.ndarray, sign: int) -> Interval:
    """Return by how much `one` (n,) is better, paired: points of accuracy, or % less error.

    sign : of the metric, 1 if more of it is better. NaN if there are no pairs.
    """
    if not len(one):
        return interval(one)
    return interval(100 * (one - other) if sign > 0 else 100 * (other - one) / other.mean())
