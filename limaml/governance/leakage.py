"""What data would tell a model that it will not know when it serves: checked before training.

One finding refuses: a feature that alone tells the labels of validation rows apart better than
`governance.max_single_feature_auc`. The others are warnings, on the card and in the log: features that differed between request
log and offline join, items whose catalogue row changed, and one text under several item ids.
"""

from collections import Counter, defaultdict
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from limaml import schema, telemetry
from limaml.config import Config
from limaml.errors import GateError
from limaml.events import catalogue
from limaml.features.encoder import Encoder
from limaml.io.storage import Storage
from limaml.metrics import auc, quantile_edges
from limaml.tasks.splits import Split

_BINS = 64
"""Of a number, of equal size in training: fine enough for a leak that is no step."""
_PRIOR_ROWS = 10.0
"""What the label rate weighs in a bin's: a value of a few rows says little."""
_MIN_ROWS = 10
"""Rows of either label that must validate: of fewer, chance alone tells many apart."""
_MAX_ROWS = 500_000
_SHOWN = 3
_SEPARATOR = "\x1f"
_log = telemetry.get_logger(__name__)

Floats = npt.NDArray[np.float64]


def check(cfg: Config, logged: pa.Table, split: Split, encoder: Encoder) -> dict[str, Any]:
    """Findings, as the card holds them. Raises GateError for a feature that tells the label too well alone."""
    storage, tables = Storage(cfg.storage.root), schema.tables(cfg.features)
    aucs = single_feature_aucs(logged, split, encoder)
    highest = sorted(aucs.items(), key=lambda one: (-one[1], one[0]))
    limit = cfg.governance.max_single_feature_auc
    failed = [(name, value) for name, value in highest if value > limit]
    if failed:
        found = ", ".join(f"{name} ({value:.4f})" for name, value in failed)
        raise GateError(
            f"a feature alone must tell the labels of validation rows apart with an AUC of at most {limit:g} "
            f"(governance.max_single_feature_auc), got {found}; it seems to hold what is known after the event only: remove "
            'its declaration or make it a feature of the event (entity = "event"), or raise the bound if it is rightly so good',
            [name for name, _ in failed],
        )
    findings = {
        "highest_single_feature_auc": {name: round(value, 4) for name, value in highest[:_SHOWN]},
        "bound": limit,
        "offline_online": _last_consistency(storage),
        "changed_items": _changed_items(storage, tables),
        "texts_of_several_items": _repeated_texts(storage, tables),
    }
    _warn(findings)
    return findings


def summary(findings: dict[str, Any]) -> dict[str, Any]:
    """What a verb's result of at most 4 KiB says of them."""
    differing = findings["offline_online"]
    return {
        "highest_single_feature_auc": max(findings["highest_single_feature_auc"].values(), default=None),
        "differing_views": len(differing["differing"]) if differing else None,
        "changed_items": findings["changed_items"]["items"],
        "texts_of_several_items": findings["texts_of_several_items"]["texts"],
    }


def single_feature_aucs(logged: pa.Table, split: Split, encoder: Encoder) -> dict[str, float]:
    """Feature -> AUC on the rows that validate of the label rates that its values have in training; null is a value.

    Empty where fewer than `_MIN_ROWS` rows of either label validate.
    """
    validating, from_us = split.validation_rows(logged), split.validate_from_us or 0
    validating = validating.filter(pc.greater_equal(validating["timestamp"].cast(pa.int64()), from_us))
    training, validating = spaced(split.train_rows(logged)), spaced(validating)
    train_labels, labels = (rows["label"].to_numpy().astype(np.float64) for rows in (training, validating))
    if min(labels.sum(), len(labels) - labels.sum()) < _MIN_ROWS:
        return {}
    before, now = encoder.values(training), encoder.values(validating)
    return {name: auc(labels, _rates(before[name], train_labels, now[name])) for name in before}


def spaced(rows: pa.Table) -> pa.Table:
    """At most `_MAX_ROWS` rows, evenly spaced: every feature of all rows at once would not fit."""
    step = -(-rows.num_rows // _MAX_ROWS)
    return rows.take(pa.array(np.arange(0, rows.num_rows, step))) if step > 1 else rows


def _rates(before: pa.Array, labels: Floats, now: pa.Array) -> Floats:
    """The label rate in training of each value of `now`."""
    codes, size = _codes(before, now)
    known, asked = codes[: len(before)], codes[len(before) :]
    rows, positives = np.bincount(known, minlength=size), np.bincount(known, labels, minlength=size)
    rates: Floats = (positives + labels.mean() * _PRIOR_ROWS) / (rows + _PRIOR_ROWS)
    return rates[asked]


def _codes(before: pa.Array, now: pa.Array) -> tuple[npt.NDArray[np.int64], int]:
    """A number for each value of both, and how many there may be; numbers are cut at quantiles of `before`."""
    if pa.types.is_list(before.type):
        before, now = (pc.binary_join(part, _SEPARATOR) for part in (before, now))
    if pa.types.is_string(before.type) or pa.types.is_dictionary(before.type):
        both = pa.concat_arrays([part.cast(pa.string()) for part in (before, now)]).dictionary_encode("encode")
        return both.indices.to_numpy().astype(np.int64), len(both.dictionary)
    numbers = [np.asarray(part.cast(pa.float64()).to_numpy(zero_copy_only=False), np.float64) for part in (before, now)]
    edges = quantile_edges(numbers[0][~np.isnan(numbers[0])], _BINS)
    values = np.concatenate(numbers)
    codes = np.where(np.isnan(values), len(edges) + 1, np.searchsorted(edges, values, side="right"))
    return codes.astype(np.int64), len(edges) + 2


def _last_consistency(storage: Storage) -> dict[str, Any] | None:
    """What `limaml consistency` found last: views whose values differed; None before its first run."""
    for name in reversed(storage.list("consistency")):
        path = f"consistency/{name}/summary.json"
        if storage.exists(path):
            found = storage.read_json(path)
            shares = {view["view"]: max(view["mismatch_ratio"] or 0.0, view["missing_ratio"] or 0.0) for view in found["views"]}
            differing = {view: share for view, share in shares.items() if share}
            return {"day": found["day"], "requests": found["requests"], "differing": differing}
    return None


def _changed_items(storage: Storage, tables: schema.Tables) -> dict[str, Any]:
    """Items that were delivered with other values later on."""
    history = catalogue.history(storage, catalogue.kinds(tables)["item"])
    changed = sorted(item for item, times in Counter(history["item_id"].to_pylist()).items() if times > 1)
    return {"items": len(changed), "of": len(pc.unique(history["item_id"])), "examples": changed[:_SHOWN]}


def _repeated_texts(storage: Storage, tables: schema.Tables) -> dict[str, Any]:
    """Texts that several items have, as last delivered."""
    history = catalogue.history(storage, catalogue.kinds(tables)["item"]).sort_by("day")
    texts = [feature.name for feature in tables.features if feature.entity == "item" and feature.type == "text"]
    groups: list[list[str]] = []
    for name in texts:
        items: dict[str, list[str]] = defaultdict(list)
        for item, text in dict(zip(history["item_id"].to_pylist(), history[name].to_pylist(), strict=True)).items():
            if text is not None:
                items[text].append(item)
        groups += [sorted(found) for found in items.values() if len(found) > 1]
    groups.sort()
    return {"texts": len(groups), "items": sum(map(len, groups)), "examples": groups[:_SHOWN]}


def _warn(findings: dict[str, Any]) -> None:
    counted = {"changed_items": "items", "texts_of_several_items": "texts"}
    for name, number in counted.items():
        if findings[name][number]:
            _log.warning("leakage_suspected", finding=name, **findings[name])
    if findings["offline_online"] and findings["offline_online"]["differing"]:
        _log.warning("leakage_suspected", finding="offline_online", **findings["offline_online"])
