"""The claims of the issue's "What it must show", judged by the results: a goal, what was reached, and whether it holds.

A gain holds if its mean reaches the goal *and* its interval excludes zero. Goals and values are in points (hundredths).
"""

from dataclasses import dataclass

from experiments.reporting.text import (
    DASH,
    METRICS,
    Interval,
    Results,
    by_number,
    change,
    name_of,
    negated,
    pick,
    points,
    signed,
    table,
)

_SHORT = {
    "global_mlp": "the global MLP",
    "user_level": "one shrunk number per user",
    "user_id": "wide & deep user ids",
    "history_mlp": "the history MLP",
}
_GAINS = (
    ("global_mlp", "auc", "20+", 2.0),
    ("global_mlp", "peruser_auc", "20+", 0.5),
    ("user_level", "peruser_auc", "20+", 0.5),
    ("user_id", "auc", "20", 1.0),
    ("history_mlp", "auc", "20+", 0.5),
    ("history_mlp", "peruser_auc", "20+", 0.3),
)
"""Rival, metric, k, goal in points."""
STORED_COSTS, FEW_LOW, SHARE, ENOUGH_ROWS = -0.2, -0.5, 80.0, 5


@dataclass(frozen=True)
class Claim:
    text: str
    goal: str
    reached: str
    holds: bool | None
    """None: not measured."""
    reason: str = ""

    @property
    def verdict(self) -> str:
        if self.holds is None:
            return "not measured"
        word = "holds" if self.holds else "**does not hold**"
        return f"{word}: {self.reason}" if self.reason else word


def claims(results: Results) -> list[Claim]:
    """All of the shipped method's claims whose table is there."""
    found = gains(results, "stored")
    if "delta_auc" in results:
        found += [_stored_costs(results, metric) for metric in METRICS]
    if "few_rows" in results:
        found += [_few_rows(results, metric) for metric in METRICS]
    if "recovered_share" in results:
        found.append(_recovered(results))
    return found


def gains(results: Results, ours: str) -> list[Claim]:
    """What one of ours must gain over rivals."""
    return [_gain(results, ours, *each) for each in _GAINS] if "delta_auc" in results else []


def claim_table(found: list[Claim]) -> list[str]:
    rows = [(claim.text, claim.goal, claim.reached, claim.verdict) for claim in found]
    return table(("claim", "goal", "reached", "verdict"), rows)


def section(results: Results) -> list[str]:
    found = claims(results)
    if not found:
        return []
    text = [
        "## What it must show, and whether it does",
        "",
        "A gain holds if its mean reaches the goal and its 95 % interval excludes zero. Points are hundredths of AUC. Bold: the"
        " interval excludes zero. Pooled AUC ranks all rows together; per-user AUC ranks inside each user, which alone can"
        " change what somebody is shown first.",
        "",
        f"{name_of('stored')}:",
        "",
        *claim_table(found),
    ]
    for ours in ("history", "full"):
        if pick(results, "delta_auc", ours) is not None:
            text += [f"The same gains by {name_of(ours)}:", "", *claim_table(gains(results, ours))]
    return text


def _gain(results: Results, ours: str, rival: str, metric: str, k: str, goal: float) -> Claim:
    found: Interval | None = pick(results, f"delta_{metric}", ours, rival, k)
    at = "k >= 20" if k == "20+" else f"k = {k}"
    text = f"over {_SHORT[rival]}, {METRICS[metric]}, {at}"
    holds, reason = _judge_gain(found, goal)
    return Claim(text, f"{goal:+.1f}, interval above zero", change(found, 2), holds, reason)


def _judge_gain(found: Interval | None, goal: float) -> tuple[bool | None, str]:
    if found is None or found["mean"] is None or found["low"] is None:
        return None, ""
    reaches, above = 100 * found["mean"] >= goal, found["low"] > 0.0
    if reaches and above:
        return True, ""
    if above:
        return False, "above zero, short of the goal"
    return False, "the interval includes zero" if (found["high"] or 0.0) >= 0.0 else "it is a loss"


def _stored_costs(results: Results, metric: str) -> Claim:
    """The goal bounds the mean; where the interval reaches further, the verdict says so."""
    found = negated(pick(results, f"delta_{metric}", "full", "row_mlp", "20+"))
    text = f"stored less full, row-level block, {METRICS[metric]}, k >= 20"
    goal = f"mean at least {STORED_COSTS:+.1f}"
    if found is None or found["mean"] is None or found["low"] is None:
        return Claim(text, goal, DASH, None)
    further = f"the interval reaches {signed(found['low'], 2)}" if 100 * found["low"] < STORED_COSTS else ""
    return Claim(text, goal, change(found, 2), 100 * found["mean"] >= STORED_COSTS, further)


def _few_rows(results: Results, metric: str) -> Claim:
    """Of all k and origins the lowest lower end."""
    lows = [each["low"] for by_metric in results["few_rows"].values() for each in by_metric[metric]]
    text = f"with the user's rows less with the prior, {METRICS[metric]}, k <= 5, every origin"
    goal = f"every lower end above {FEW_LOW:+.1f}"
    if not lows or None in lows:
        return Claim(text, goal, DASH, None)
    return Claim(text, goal, f"lowest {signed(min(lows), 2)}", 100 * min(lows) > FEW_LOW)


def _recovered(results: Results) -> Claim:
    shares = {k: share for k, share in results["recovered_share"].items() if int(k) >= ENOUGH_ROWS}
    text = f"share of a planted taste recovered, every taste, k >= {ENOUGH_ROWS}"
    if not shares or None in shares.values():
        return Claim(text, f"{SHARE:.0f} %", DASH, None)
    worst = min(by_number(shares), key=lambda k: shares[k])
    return Claim(
        text, f"at least {SHARE:.0f} %", f"least {points(shares[worst])} % (k = {worst})", 100 * shares[worst] >= SHARE
    )
