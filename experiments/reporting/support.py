"""Tables 4 and 5: few rows of support, and support of another age."""

from collections.abc import Mapping
from typing import Any

from experiments.reporting.claims import FEW_LOW
from experiments.reporting.text import (
    CADENCES,
    DASH,
    METRICS,
    Results,
    by_number,
    change,
    name_of,
    pick,
    points,
    signed,
    table,
)

REFRESHED = ("stored", "user_level", "history_mlp", "global_mlp")
_GROUPS = {"all": "all rows", "returning": "returning users"}
_DRIFT_METHODS = {"limaml": "LiMAML", "user_level": "one shrunk number per user"}


def few_rows(results: Results) -> list[str]:
    """Table 4."""
    if "few_rows" not in results:
        return []
    lines = ["## Table 4: few rows", "", "The shipped network with a user's k rows, less the same network with its prior.", ""]
    for metric, title in METRICS.items():
        by_k = {k: found[metric] for k, found in results["few_rows"].items()}
        origins = max(len(found) for found in by_k.values())
        header = (title, *(f"origin {at + 1}" for at in range(origins)), f"lower ends above {FEW_LOW:+.1f}")
        rows = [(f"k = {k}", *(change(each, 2) for each in by_k[k]), _above(by_k[k])) for k in by_number(by_k)]
        lines += table(header, rows)
    return lines


def _above(found: list[Mapping[str, float | None]]) -> str:
    lows = [each["low"] for each in found]
    if None in lows:
        return DASH
    return "yes" if all(100 * low > FEW_LOW for low in lows if low is not None) else "**no**"


def refresh(results: Results) -> list[str]:
    """Table 5 on MovieLens."""
    if "refresh_auc_by_method" not in results:
        return []
    lines = [
        "## Table 5: refresh",
        "",
        "MovieLens, pooled / per-user AUC: the daily value, and the other cadences as differences to it.",
        "",
    ]
    pair = {metric: results[f"refresh_{metric}_by_method"] for metric in METRICS}
    for group, title in _GROUPS.items():
        there = [name for name in REFRESHED if name in pair["auc"]]
        rows = [(name_of(m), *(_by_cadence({v: pair[v][m] for v in METRICS}, c, group) for c in CADENCES)) for m in there]
        lines += table((title, *CADENCES.values()), rows)
    lines += ["The shipped LiMAML, less itself refreshed daily:", ""]
    header = ("refreshed", *(f"{title}: {name}" for title in _GROUPS.values() for name in METRICS.values()))
    rows = [
        (title, *(change(pick(results, "refresh_delta", v, c, g)) for g in _GROUPS for v in METRICS))
        for c, title in CADENCES.items()
        if c != "daily"
    ]
    return [*lines, *table(header, rows), "![AUC by cadence](refresh.png)", ""]


def _by_cadence(found: Mapping[str, Any], cadence: str, group: str) -> str:
    """`71.8 / 69.9` daily, `-1.0 / +0.1` otherwise."""
    shown = []
    for by_cadence in found.values():
        value, daily = pick(by_cadence, cadence, group), pick(by_cadence, "daily", group)
        if cadence == "daily" or value is None or daily is None:
            shown.append(points(value))
        else:
            shown.append(signed(value - daily))
    return " / ".join(shown)


def drift(results: Results) -> list[str]:
    """Table 5 on synthetic users whose taste drifts."""
    if "synthetic_drift" not in results:
        return []
    found = results["synthetic_drift"]
    scales = sorted(found, key=lambda scale: -(found[scale]["half_life_days"] or float("inf")))
    lines = [] if "refresh_auc_by_method" in results else ["## Table 5: refresh", ""]
    lines += [
        "Synthetic users whose taste and level drift; expected AUC, pooled / per-user, daily and differences to it:",
        "",
    ]
    for group, title in _GROUPS.items():
        rows = []
        for scale in scales:
            for method, name in _DRIFT_METHODS.items():
                both = {metric: found[scale][metric][method] for metric in METRICS}
                cells = [_by_cadence(both, cadence, group) for cadence in CADENCES]
                rows.append(
                    (_half_life(found[scale]), name, *cells, *(_bound(found[scale], m, group) for m in ("none", "truth")))
                )
        header = (f"{title}: half-life", "method", *CADENCES.values(), "not personalised", "true probabilities")
        lines += table(header, rows)
    return [*lines, "![Synthetic drift](drift.png)", ""]


def _half_life(scale: Mapping[str, Any]) -> str:
    days = scale["half_life_days"]
    return "no drift" if days is None else f"{days:g} days"


def _bound(scale: Mapping[str, Any], method: str, group: str) -> str:
    return " / ".join(points(pick(scale, metric, method, "daily", group)) for metric in METRICS)
