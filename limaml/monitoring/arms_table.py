"""What `limaml compare-arms` found, as text."""

from collections.abc import Mapping
from typing import Any

from limaml.evaluation.console_table import aligned, difference, number

_HEADER = [
    "arm",
    "users",
    "of them counted",
    "requests",
    "outcome",
    "against the first",
    "p",
    "decision",
    "positive rate",
    "AUC",
]


def lines(found: Mapping[str, Any]) -> list[str]:
    """A sentence on what is compared, a row an arm, and what is wrong, if anything is."""
    of = {"any": "share of requests followed by a positive label", "share": "share of candidates with a positive label"}
    said = [
        f"Requests from {found['from']} through {found['through']}, events through {found['complete_through']}; outcome: "
        f"{of[found['outcome']]}, of a user in {found['outcome_days']} days; level {found['level']:g} over all looks and arms",
        *aligned([_HEADER, *(_row(arm) for arm in found["arms"])]),
    ]
    if found["split_is_broken"]:
        said.append(
            f"THE SPLIT IS BROKEN: so many users an arm come by chance with probability {found['split_p']:.2g}. What differs "
            "between the arms may be who is in them: find out why before you read on (docs/ab.md)."
        )
    if found["missing_days"]:
        said.append(f"Not ingested, and so without outcomes: {', '.join(found['missing_days'])}.")
    return said


def _row(arm: Mapping[str, Any]) -> list[str]:
    beside = ["-", "-", "control"]
    if "p" in arm:
        beside = [difference({**arm, "value": arm["difference"]}), f"{arm['p']:.2g}", arm["decision"]]
    counts = [str(arm[name]) for name in ("users", "users_counted", "requests")]
    return [arm["arm"], *counts, number(arm["outcome"]), *beside, number(arm["positive_rate"]), number(arm["auc"])]
