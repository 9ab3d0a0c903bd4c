"""How often `limaml compare-arms` is wrong, and what it finds, on simulated traffic: experiments/results/arms.json.

    python -m experiments.arms

Users come over four weeks, early ones with higher rates; each has a rate of success of their own and one request or many. They
are split by the service's own hash, with another salt a run, and counted when their days are over. Somebody looks after every
day and stops at the first p at or below the level. Beside it, on the same users, stands what is often done instead: a t-test of
users' means or of requests, looked at once at the end or after every day.
"""

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import binomtest, norm

from experiments.results import RESULTS, plain
from limaml.arms import Arms
from limaml.config import ArmConfig, ExperimentConfig
from limaml.io import atomic
from limaml.metrics import Floats, Ints
from limaml.monitoring.sequential import contributions, log_evidence

NUM_RUNS = 1000
NUM_POWER_RUNS = 200
NUM_USERS, MANY_USERS = 4000, 16_000
NUM_DAYS, OUTCOME_DAYS = 28, 7
LEVEL = 0.05
EFFECTS = (0.01, 0.02, 0.04, 0.06)
"""Added to the rate of a treated user."""
SPLITS = {"two": (0.5, 0.5), "one_in_ten": (0.9, 0.1), "three": (0.4, 0.3, 0.3)}


@dataclass(frozen=True)
class Traffic:
    """U users of one run, in the order in which they came."""

    arm_U: Ints
    successes_U: Ints
    requests_U: Ints
    looked_at: Ints
    """(days,) users that are counted at each look."""

    @property
    def outcomes(self) -> Floats:
        """(U,)"""
        return self.successes_U / self.requests_U


def simulate(number: int, num_users: int, shares: Sequence[float], effect: float) -> Traffic:
    """Run `number`; the users of all arms but the first have `effect` added to their rates."""
    rng = np.random.default_rng((number, num_users))
    day_U = np.sort(rng.triangular(0.0, 0.0, NUM_DAYS - OUTCOME_DAYS, num_users))
    arm_U = _split(number, num_users, tuple(shares))
    rate_U = rng.beta(2.0, 4.0 + day_U / 7.0) + effect * (arm_U > 0)
    requests_U = rng.geometric(0.3, num_users)
    successes_U = rng.binomial(requests_U, np.clip(rate_U, 0.0, 1.0))
    days = np.arange(1, NUM_DAYS + 1)
    return Traffic(arm_U, successes_U, requests_U, np.searchsorted(day_U + OUTCOME_DAYS, days, side="right"))


@functools.cache
def _split(number: int, num_users: int, shares: tuple[float, ...]) -> Ints:
    """(U,) places of the users' arms."""
    declared = tuple(ArmConfig(name=f"arm_{at}", share=share) for at, share in enumerate(shares))
    arms = Arms(ExperimentConfig(salt=f"run {number}", arms=declared))
    return np.array([declared.index(arm) for user in range(num_users) if (arm := arms.of(f"u{user}"))])


def first_rejection(traffic: Traffic, shares: Sequence[float]) -> int | None:
    """Day of the first look at which any arm differs from the first one, by the sequential test."""
    level, days = LEVEL / (len(shares) - 1), []
    for arm in range(1, len(shares)):
        both = np.flatnonzero((traffic.arm_U == 0) | (traffic.arm_U == arm))
        share = shares[arm] / (shares[0] + shares[arm])
        x = contributions(traffic.outcomes[both], traffic.arm_U[both] == arm, share)
        strong = both[log_evidence(x, 0.0, share) >= np.log(1.0 / level)]
        days += (np.searchsorted(traffic.looked_at, strong[:1], side="right") + 1).tolist()
    return min((day for day in days if day <= NUM_DAYS), default=None)


def t_tests(traffic: Traffic) -> dict[str, bool]:
    """Whether a two-sample t-test of the first two arms rejects, at the last look and at any."""
    treated = traffic.arm_U == 1
    seen = traffic.looked_at[traffic.looked_at > 1] - 1
    found: dict[str, bool] = {}
    of_users = np.ones(len(treated)), traffic.outcomes, traffic.outcomes**2
    # A request succeeds or not, so its square is itself.
    of_requests = traffic.requests_U, traffic.successes_U, traffic.successes_U
    for name, sums in (("users", of_users), ("requests", of_requests)):
        n, total, squares = ([np.cumsum(each * side)[seen] for side in (treated, ~treated)] for each in sums)
        with np.errstate(invalid="ignore", divide="ignore"):
            means = [total[side] / n[side] for side in (0, 1)]
            errors = [(squares[side] / n[side] - means[side] ** 2) / n[side] for side in (0, 1)]
            rejected = np.abs(means[0] - means[1]) / np.sqrt(errors[0] + errors[1]) > norm.ppf(1.0 - LEVEL / 2.0)
        # From a hundred users on: the first handful would reject by the normal approximation alone.
        found |= {f"t_test_of_{name}_once": bool(rejected[-1])}
        found |= {f"t_test_of_{name}_daily": bool(rejected[seen >= 100].any())}
    return found


def false_positives(num_runs: int = NUM_RUNS) -> dict[str, Any]:
    """Of arms that are alike: rejections of the sequential test by split, and of t-tests of two halves."""
    found: dict[str, Any] = {}
    for name, shares in SPLITS.items():
        runs = [first_rejection(simulate(number, NUM_USERS, shares, 0.0), shares) for number in range(num_runs)]
        found[name] = _share(sum(day is not None for day in runs), num_runs)
    tests = [t_tests(simulate(number, NUM_USERS, SPLITS["two"], 0.0)) for number in range(num_runs)]
    return {**found, **{name: _share(sum(test[name] for test in tests), num_runs) for name in tests[0]}}


def power(num_runs: int = NUM_POWER_RUNS) -> dict[str, Any]:
    """Users -> effect -> share of runs in which two halves are told apart, by which day (median), and a t-test's at the end."""
    found: dict[str, Any] = {}
    for num_users in (NUM_USERS, MANY_USERS):
        for effect in EFFECTS:
            runs = [simulate(number, num_users, SPLITS["two"], effect) for number in range(num_runs)]
            days = [day for run in runs if (day := first_rejection(run, SPLITS["two"])) is not None]
            once = sum(t_tests(run)["t_test_of_users_once"] for run in runs)
            found.setdefault(str(num_users), {})[f"{effect:g}"] = {
                "sequential": _share(len(days), num_runs),
                "t_test_of_users_once": _share(once, num_runs),
                "median_day": float(np.median(days)) if days else None,
            }
    return found


def _share(count: int, of: int) -> dict[str, float]:
    """With its exact 95 % interval (Clopper & Pearson 1934)."""
    exact = binomtest(count, of).proportion_ci()
    return {"count": count, "of": of, "share": count / of, "low": float(exact.low), "high": float(exact.high)}


def main() -> None:
    about = {"level": LEVEL, "users": NUM_USERS, "days": NUM_DAYS, "outcome_days": OUTCOME_DAYS, "splits": SPLITS}
    rate = float(simulate(0, MANY_USERS, SPLITS["two"], 0.0).outcomes.mean())
    found = plain({**about, "rate": rate, "false_positives": false_positives(), "power": power()})
    atomic.write(RESULTS / "arms.json", json.dumps(found, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
