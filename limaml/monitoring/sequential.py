"""Is one arm's mean outcome another's? A test that holds however often one looks, by betting (Waudby-Smith & Ramdas 2023).

# U users, in the order in which they came

A user's outcome y lies in [0, 1]; chance gave him the treatment (z = 1) with probability `share`. With c a guess made before he
came, the mean of all earlier outcomes,

    x = (z / share - (1 - z) / (1 - share)) * (y - c)

is on average the difference of the arms' means, whatever c is, and bounded. Against a difference m one bets on x - m, user by
user: with a stake s a fortune of 1 becomes prod(1 + s (x - m)), which is on average never more than 1 if m is the difference.
The evidence against m is the mean fortune over stakes of both signs, halved from the largest, which never loses more than half:
one of them is about the best for the difference there is. It exceeds 1 / level at any time with probability at most `level`
(Ville), for any number of users and any distribution of outcomes. Users may differ and come in any order where a treatment that
does nothing does nothing to each; nothing here is asymptotic.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

NUM_STAKES = 8
"""Of each sign: the smallest is about the best for a difference that only tens of millions of users would show."""
_BISECTIONS = 24
"""Of at most 2: the ends are known to 1e-7."""
_FACTORS = 32
"""Multiplied before a logarithm is taken: each lies between a half and one and a half."""
_FIRST_GUESS = 0.5


@dataclass(frozen=True)
class Difference:
    """Treated minus control."""

    value: float
    """Of the arms' plain means; NaN where an arm is empty."""
    low: float
    high: float
    """Differences that the users so far do not speak against: the true one lies in all such intervals of an experiment with
    probability at least 1 - level."""
    p: float
    """The smallest level at which equal means would have been rejected by now, or before: it never rises."""


def difference(outcome_U: npt.ArrayLike, is_treated_U: npt.ArrayLike, *, share: float, level: float) -> Difference:
    """Compare two arms; `share` is the treatment's probability, of these two. Raises ValueError for outcomes outside [0, 1]."""
    y, z = np.asarray(outcome_U, np.float64), np.asarray(is_treated_U, bool)
    if len(y) and not (y.min() >= 0.0 and y.max() <= 1.0):
        raise ValueError(f"outcomes must lie in [0, 1], got {y.min():g} to {y.max():g}; divide them by their largest value")
    x = contributions(y, z, share)
    value = float(y[z].mean() - y[~z].mean()) if z.any() and not z.all() else float("nan")
    low, high = _interval(x, share, level)
    strongest = max(0.0, float(log_evidence(x, 0.0, share).max(initial=0.0)))
    return Difference(value, low, high, float(np.exp(-strongest)))


def contributions(outcome_U: Floats, is_treated_U: npt.NDArray[np.bool_], share: float) -> Floats:
    """(U,) x of the module's text."""
    seen = np.arange(len(outcome_U))
    guess_U = (np.cumsum(outcome_U) - outcome_U + _FIRST_GUESS) / (seen + 1.0)
    found: Floats = np.where(is_treated_U, 1.0 / share, -1.0 / (1.0 - share)) * (outcome_U - guess_U)
    return found


def log_evidence(x_U: Floats, m: float, share: float) -> Floats:
    """(U,) logarithm of the mean fortune after each user, against a difference of `m` in [-1, 1]."""
    total = np.full(len(x_U), -np.inf)
    for stake in _stakes(share):
        total = np.logaddexp(total, np.cumsum(np.log1p(stake * (x_U - m))))
    found: Floats = total - np.log(2 * NUM_STAKES)
    return found


def _log_fortune(x_U: Floats, m: float, stake: float) -> float:
    """After all users."""
    factors = 1.0 + stake * (x_U - m)
    whole = len(factors) // _FACTORS * _FACTORS
    logs = np.log(factors[:whole].reshape(-1, _FACTORS).prod(axis=1)).sum()
    return float(logs + np.log(factors[whole:]).sum())


def _stakes(share: float) -> Floats:
    """Nobody loses more than half of the fortune: |y - c| <= 1 and |m| <= 1, so |x - m| <= 1 / min(share, 1 - share) + 1."""
    halves = 0.5 ** np.arange(1, NUM_STAKES + 1) / (1.0 / min(share, 1.0 - share) + 1.0)
    return np.concatenate([halves, -halves])


def _interval(x_U: Floats, share: float, level: float) -> tuple[float, float]:
    """Where the evidence is below 1 / level: an interval, as a product of positive falling, or rising, lines is convex in m.

    At the mean of x the evidence is at most 1, by Jensen's inequality, so the search goes from there to both ends.
    """
    if not len(x_U):
        return -1.0, 1.0
    stakes, bound = _stakes(share), np.log(2 * NUM_STAKES / level)

    def contradicted(m: float) -> bool:
        return bool(np.logaddexp.reduce([_log_fortune(x_U, m, stake) for stake in stakes]) >= bound)

    inside = float(np.clip(x_U.mean(), -1.0, 1.0))
    ends = []
    for outside in (-1.0, 1.0):
        near, far = inside, outside
        for _ in range(_BISECTIONS if contradicted(outside) else 0):
            middle = (near + far) / 2.0
            near, far = (near, middle) if contradicted(middle) else (middle, far)
        ends.append(far)
    return ends[0], ends[1]
