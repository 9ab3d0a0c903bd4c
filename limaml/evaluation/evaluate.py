"""Judge a candidate: score its twin and the rivals by both protocols, compare with the champion, decide, report.

Nothing is tuned here on what is judged: rivals are chosen on the rows that validate, and every rule stands in [promotion].
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch

from limaml import schema, telemetry
from limaml.config import Config, PromotionConfig
from limaml.evaluation import report, slices
from limaml.evaluation.agreement import versions_agree
from limaml.evaluation.baselines import fit_baselines
from limaml.evaluation.promotion import ChampionEvidence, Decision, Evidence, PerUserEvidence, decide
from limaml.evaluation.scoring_method import MethodInput, MethodValidator, ScoringMethod
from limaml.evaluation.tables import LIMAML, calibration, gain, measure, measure_groups
from limaml.events.catalogue import item_vectors
from limaml.governance import card
from limaml.io.storage import Storage
from limaml.metrics import auc, population_stability_index
from limaml.models import bundle as bundles
from limaml.tasks.protocols import QueryRows, as_served, first_k, query_rows
from limaml.tasks.sampling import TaskRows, TaskSpec, microseconds
from limaml.tasks.splits import Split, split_events
from limaml.training.candidate import BUNDLE, read_candidate, read_training_history
from limaml.training.prepare import read_history, validating_rows
from limaml.training.scoring import score_specs

CARD = "card.json"
Floats = npt.NDArray[np.float64]
_log = telemetry.get_logger(__name__)


@dataclass(frozen=True)
class ChampionBundle:
    """The version that serves, as far as the gate reads it."""

    version: str
    bundle_dir: Path


def evaluate_candidate(cfg: Config, candidate_dir: str | Path, champion: ChampionBundle | None = None) -> dict[str, Any]:
    """Write evaluation.json, report.html and card.json into the candidate's folder, result and card into its bundle; return the
    result.

    Split, protocols and model are those of the candidate's own configuration; storage and the gate's rules are `cfg`'s.
    Raises DataError or BundleError if the folder or the data behind it is not as training left it.
    """
    # The networks are small: more threads than one only wait for each other, and starve whoever shares the cores.
    torch.set_num_threads(1)
    started, folder = time.monotonic(), Path(candidate_dir)
    candidate = read_candidate(folder)
    bundle = bundles.load(folder / BUNDLE)
    own = bundle.config.model_copy(update={"storage": cfg.storage, "promotion": cfg.promotion})
    bundle = bundle.with_items(_item_vectors(own))
    logged = read_history(own, date.fromisoformat(candidate.through))
    split = split_events(logged, own.evaluation)
    result = _measure(own, bundle, logged, split, champion)
    result |= {"through": candidate.through, "seconds": round(time.monotonic() - started, 1), "lineage": bundle.lineage}
    history = read_training_history(folder)
    (folder / "evaluation.json").write_text(json.dumps(result, indent=1, sort_keys=True, allow_nan=False) + "\n")
    (folder / "report.html").write_text(report.render(result, history))
    said = card.judged(bundle.card, result) if bundle.card else {}
    (folder / CARD).write_text(json.dumps(said, indent=1, sort_keys=True) + "\n")
    bundles.save(replace(bundle.with_metrics({**bundle.metrics, "evaluation": result}), card=said), folder / BUNDLE)
    _log.info("candidate_judged", decision=result["decision"], reasons=result["reasons"], seconds=result["seconds"])
    return result


def _measure(
    cfg: Config, bundle: bundles.Bundle, logged: pa.Table, split: Split, champion: ChampionBundle | None
) -> dict[str, Any]:
    assert bundle.twin is not None
    encoder = bundle.twin.encoder
    training = MethodInput.from_logged(split.train_rows(logged), encoder, cfg, to_train=True)
    validating, users = validating_rows(cfg, logged, split)
    validation = MethodInput.from_logged(validating, encoder, cfg)
    validator = MethodValidator(validation, cfg, split.validate_from_us, users)
    inputs = MethodInput.from_logged(logged, encoder, cfg)
    methods: dict[str, ScoringMethod] = fit_baselines(cfg, training, validator, encoder)
    methods[LIMAML] = _score_network(bundle.twin)
    by_k, curves = _first_k(cfg, inputs, split, methods)
    num_rows = cfg.support_rows_of(cfg.task_kind.name)
    served = as_served(inputs.rows, from_us=split.validation_end_us, support_rows=num_rows)
    scores = {name: method(inputs, served) for name, method in methods.items()}
    groups = measure_groups(inputs.rows, served, scores, split, cfg.evaluation)
    queries = query_rows(inputs.rows, served)
    psi = population_stability_index(scores[LIMAML], _score_refit(bundle, logged, cfg, split))
    evidence = Evidence(
        per_user=_per_user(cfg.promotion, split, by_k, groups),
        as_served_users=groups["all"]["users"],
        as_served_auc=_number(groups["all"]["methods"][LIMAML]["pooled_auc"]),
        as_served_global_auc=_number(groups["all"]["methods"]["global_mlp"]["pooled_auc"]),
        refit_psi=psi,
        champion=_compare(champion, cfg, logged, split, inputs.rows, served, scores[LIMAML]),
    )
    decision: Decision = decide(evidence, cfg.promotion)
    return decision.as_dict() | {
        "split": _describe(split, logged),
        "gate": {"protocol": cfg.promotion.protocol, "k": cfg.promotion.gate_k},
        "first_k": by_k,
        "as_served": groups,
        "by_category": slices.by_category(cfg, logged, inputs.rows, queries, scores),
        "limits": slices.limits(cfg, logged, split, encoder, queries, inputs.rows),
        "calibration": curves | {"as served": calibration(queries, scores)},
        "refit_psi": None if np.isnan(psi) else psi,
        "agreement": _agreement(champion, cfg, bundle, logged, split),
    }


def _score_network(model: bundles.Model) -> ScoringMethod:
    def scores(inputs: MethodInput, specs: Sequence[TaskSpec]) -> Floats:
        return score_specs(model.network, inputs.rows, specs)

    return scores


def _first_k(
    cfg: Config, inputs: MethodInput, split: Split, methods: Mapping[str, ScoringMethod]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tables by k (JSON keys are strings), and calibration curves at the gate's k."""
    ks = sorted({*cfg.evaluation.first_k, cfg.promotion.gate_k})
    tasks = first_k(
        inputs.rows,
        split.held_out_users,
        ks,
        min_query_rows=cfg.evaluation.min_query_rows,
        support_rows=cfg.support_rows_of(cfg.task_kind.name),
    )
    tables, curves = {}, {}
    for k, specs in tasks.items():
        queries: QueryRows = query_rows(inputs.rows, specs)
        scores = {name: method(inputs, specs) for name, method in methods.items()}
        tables[str(k)] = measure(queries, scores, cfg.evaluation)
        if k == cfg.promotion.gate_k:
            curves[f"first {k}"] = calibration(queries, scores)
    return tables, curves


def _per_user(cfg: PromotionConfig, split: Split, by_k: Mapping[str, Any], groups: Mapping[str, Any]) -> PerUserEvidence:
    """What the protocol of [promotion] says."""
    served = f"as served daily from {_iso(split.validation_end_us)} on"
    whose, table = {
        "first_k": (f"held-out users after their first {cfg.gate_k} rows", by_k[str(cfg.gate_k)]),
        "as_served_known": (f"known users {served}", groups["known"]),
        "as_served_held_out": (f"held-out users {served}", groups["held_out"]),
    }[cfg.protocol]
    return PerUserEvidence(whose, table["users"], table["rows"], gain(table, "per_user_auc", "global_mlp"))


def _score_refit(bundle: bundles.Bundle, logged: pa.Table, cfg: Config, split: Split) -> Floats:
    """The refit's scores of the same as-served rows, seen through its own encoder."""
    rows = TaskRows.of(logged, bundle.refit.encoder, cfg)
    served = as_served(rows, from_us=split.validation_end_us, support_rows=cfg.support_rows_of(cfg.task_kind.name))
    return score_specs(bundle.refit.network, rows, served)


def _compare(
    champion: ChampionBundle | None,
    cfg: Config,
    logged: pa.Table,
    split: Split,
    rows: TaskRows,
    served: Sequence[TaskSpec],
    candidate_scores: Floats,
) -> ChampionEvidence | None:
    """Both twins on the as-served rows that are later than what either has seen, fitted or chosen on."""
    if champion is None:
        return None
    theirs = bundles.load(champion.bundle_dir)
    assert theirs.twin is not None
    seen_until = microseconds(datetime.fromisoformat(theirs.lineage["validation_end"]))
    from_us = max(seen_until, split.validation_end_us)
    mine = query_rows(rows, served)
    later = rows.timestamp_us[mine.rows] >= from_us
    their_rows = TaskRows.of(logged, theirs.twin.encoder.with_items(_item_vectors(cfg)), theirs.config)
    n = theirs.config.support_rows_of(theirs.config.task_kind.name)
    their_served = as_served(their_rows, from_us=from_us, support_rows=n)
    theirs_later = query_rows(their_rows, their_served)
    return ChampionEvidence(
        version=champion.version,
        num_users=theirs_later.num_users,
        num_rows=len(theirs_later),
        candidate_auc=auc(mine.labels[later], candidate_scores[later]),
        champion_auc=auc(theirs_later.labels, score_specs(theirs.twin.network, their_rows, their_served)),
        rows_from=_iso(from_us),
    )


def _agreement(
    champion: ChampionBundle | None, cfg: Config, bundle: bundles.Bundle, logged: pa.Table, split: Split
) -> dict[str, Any] | None:
    """Of the two networks that serve, of entities with rows from T2 on, as of the last row."""
    if champion is None:
        return None
    theirs = bundles.load(champion.bundle_dir, parts=(bundles.REFIT,)).with_items(_item_vectors(cfg))
    column, stamps = cfg.task_kind.entity_column, logged["timestamp"].cast(pa.int64())
    late = pc.unique(logged.filter(pc.greater_equal(stamps, split.validation_end_us))[column])
    mine = logged.filter(pc.is_in(logged[column], value_set=late))
    found = versions_agree((theirs.config, theirs.refit), (cfg, bundle.refit), mine, pc.max(stamps).as_py() + 1)
    return {"champion": champion.version, **found}


def _describe(split: Split, logged: pa.Table) -> dict[str, Any]:
    validation = split.validation_rows(logged)["timestamp"].cast(pa.int64())
    validating = pc.sum(pc.greater_equal(validation, split.validate_from_us or 0)).as_py()
    users = {"train": split.train_users, "validation": split.validation_users, "held_out": split.held_out_users}
    return {
        "held_out": split.held_out,
        "users": {name: len(part) for name, part in users.items()},
        "rows": {"train": split.train_rows(logged).num_rows, "validation": validating, "all": logged.num_rows},
        "train_end": _iso(split.train_end_us),
        "validation_end": _iso(split.validation_end_us),
    }


def _item_vectors(cfg: Config) -> pa.Table | None:
    return item_vectors(Storage(cfg.storage.root), schema.tables(cfg.features))


def _iso(instant_us: int) -> str:
    return datetime.fromtimestamp(instant_us / 1e6, UTC).isoformat()


def _number(value: float | None) -> float:
    return float("nan") if value is None else value
