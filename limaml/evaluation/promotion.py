"""The gate: which candidate may serve, and why not. Rules only; what they judge is measured by `evaluate`.

A value that could not be measured (NaN) fails its rule: not knowing is no reason to serve.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from limaml.config import PromotionConfig
from limaml.metrics import Interval

Outcome = Literal["passed", "failed", "skipped"]


@dataclass(frozen=True)
class ChampionEvidence:
    """Candidate's and champion's unrefitted twins on the same rows, all later than what either twin has seen."""

    version: str
    num_users: int
    num_rows: int
    candidate_auc: float
    champion_auc: float
    rows_from: str
    """First instant of those rows (ISO 8601, UTC)."""


@dataclass(frozen=True)
class PerUserEvidence:
    """Per-user AUC by the protocol of [promotion] minus the global MLP's, and of whom."""

    whose: str
    """The users, behind their number: `known users as served daily from 2026-05-01 on`."""
    num_users: int
    num_rows: int
    gain: Interval
    """With its paired interval."""


@dataclass(frozen=True)
class Evidence:
    """What the rules read. AUC in 0 .. 1; every value is of the unrefitted twin except `refit_psi`."""

    per_user: PerUserEvidence
    as_served_users: int
    """Everybody who has rows from T2 on."""
    as_served_auc: float
    as_served_global_auc: float
    refit_psi: float
    """Population stability index of the refit's scores against the twin's, same rows."""
    champion: ChampionEvidence | None
    no_champion_reason: str = "there is no champion yet"


@dataclass(frozen=True)
class Check:
    """One rule, its outcome and the sentence that explains it."""

    name: str
    outcome: Outcome
    reason: str


@dataclass(frozen=True)
class Decision:
    """All rules; one failure refuses."""

    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        return all(check.outcome != "failed" for check in self.checks)

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why the candidate was refused; empty if it passed."""
        return tuple(f"{check.name}: {check.reason}" for check in self.checks if check.outcome == "failed")

    def as_dict(self) -> dict[str, Any]:
        return {
            "decision": "passed" if self.passed else "refused",
            "reasons": list(self.reasons),
            "checks": [asdict(check) for check in self.checks],
        }


def decide(evidence: Evidence, cfg: PromotionConfig) -> Decision:
    """Apply every rule of [promotion] to the evidence."""
    return Decision(
        (
            _per_user(evidence.per_user, cfg),
            _as_served(evidence, cfg),
            _champion(evidence, cfg),
            _refit(evidence, cfg),
        )
    )


def _per_user(per_user: PerUserEvidence, cfg: PromotionConfig) -> Check:
    gain, margin = per_user.gain, cfg.per_user_margin
    remedy = "" if per_user.num_users else "; there are none: train on more days or choose another promotion.protocol"
    if margin:
        outcome, rule = _at_least(gain.low, -margin), f"at most {margin:g} below the global MLP's with its whole interval"
    else:
        outcome = "passed" if gain.value > 0.0 and gain.excludes_zero() else "failed"
        rule = "above the global MLP's with an interval that excludes zero"
    return Check(
        "per_user_auc",
        outcome,
        f"per-user AUC of {per_user.num_users} {per_user.whose} ({per_user.num_rows} rows) must be {rule}, "
        f"got {gain.value:+.4f} [{gain.low:+.4f}, {gain.high:+.4f}]{remedy}",
    )


def _as_served(evidence: Evidence, cfg: PromotionConfig) -> Check:
    difference = evidence.as_served_auc - evidence.as_served_global_auc
    return Check(
        "as_served_auc",
        _at_least(difference, -cfg.as_served_margin),
        f"pooled AUC of all {evidence.as_served_users} users as served daily must be at most {cfg.as_served_margin:g} below "
        f"the global MLP's ({evidence.as_served_global_auc:.4f}), got {evidence.as_served_auc:.4f} ({difference:+.4f})",
    )


def _champion(evidence: Evidence, cfg: PromotionConfig) -> Check:
    champion = evidence.champion
    if champion is None:
        return Check("champion", "skipped", evidence.no_champion_reason)
    if champion.num_rows < cfg.min_champion_rows:
        return Check(
            "champion",
            "skipped",
            f"comparing with champion {champion.version} needs at least {cfg.min_champion_rows} rows later than everything its "
            f"twin has seen (from {champion.rows_from}), there are {champion.num_rows}",
        )
    difference = champion.candidate_auc - champion.champion_auc
    return Check(
        "champion",
        _at_least(difference, -cfg.champion_margin),
        f"pooled AUC as served must be at most {cfg.champion_margin:g} below champion {champion.version}'s twin "
        f"({champion.champion_auc:.4f}) on the {champion.num_rows} rows of all {champion.num_users} users from "
        f"{champion.rows_from}, got {champion.candidate_auc:.4f} ({difference:+.4f})",
    )


def _refit(evidence: Evidence, cfg: PromotionConfig) -> Check:
    return Check(
        "refit_psi",
        _at_least(-evidence.refit_psi, -cfg.max_refit_psi),
        f"the refit's scores must be distributed like its twin's: population stability index at most {cfg.max_refit_psi:g}, "
        f"got {evidence.refit_psi:.4f}",
    )


def _at_least(value: float, bound: float) -> Outcome:
    # 1e-12: a difference that equals the margin passes whatever the last bit of the subtraction says.
    return "passed" if not math.isnan(value) and value >= bound - 1e-12 else "failed"
