"""A planted leak is found and refused; what only looks odd is counted, named, and let through."""

from datetime import date

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from structlog.testing import capture_logs

from limaml import schema
from limaml.config import Config
from limaml.errors import GateError
from limaml.events import catalogue
from limaml.features.encoder import Encoder
from limaml.governance import leakage
from limaml.io.storage import Storage
from limaml.tasks.splits import split_events

DAY = date(2026, 1, 5)


def found(cfg: Config, logged: pa.Table) -> dict:
    split = split_events(logged, cfg.evaluation)
    return leakage.check(cfg, logged, split, Encoder.fit(split.train_rows(logged), cfg, None))


def with_column(logged: pa.Table, name: str, values: object) -> pa.Table:
    at = logged.column_names.index(name)
    return logged.set_column(at, logged.schema.field(at), pa.array(values, logged.schema.field(at).type))


@pytest.fixture
def cfg(small_config, tmp_path) -> Config:
    return small_config(storage={"root": str(tmp_path)})


def test_honest_features_stay_far_below_the_bound(cfg, planted_logged):
    aucs = found(cfg, planted_logged)["highest_single_feature_auc"]
    assert len(aucs) == 3
    assert max(aucs.values()) < 0.8


def test_a_handful_of_rows_is_not_judged(cfg, planted_logged):
    """Of 43 rows that validate 5 or fewer are left here: one label each day would be enough to look like a leak."""
    split = split_events(planted_logged, cfg.evaluation)
    few = split.validation_rows(planted_logged)["event_id"].to_pylist()[5:]
    rest = planted_logged.filter(pc.invert(pc.is_in(planted_logged["event_id"], value_set=pa.array(few))))
    leaking = with_column(rest, "year", [1990.0 + label for label in rest["label"].to_pylist()])
    findings = leakage.check(cfg, leaking, split, Encoder.fit(split.train_rows(leaking), cfg, None))
    assert findings["highest_single_feature_auc"] == {}
    assert leakage.summary(findings)["highest_single_feature_auc"] is None


@pytest.mark.parametrize("kind", ["near the label", "far from it either way", "null where negative", "a category"])
def test_a_feature_that_holds_the_label_is_refused_whatever_its_form(cfg, planted_logged, kind):
    labels = planted_logged["label"].to_numpy().astype(float)
    noise = np.random.default_rng(0).normal(size=len(labels))
    name, values = {
        "near the label": ("year", 1990 + labels + 0.01 * noise),
        "far from it either way": ("year", 1990 + np.where(labels, np.sign(noise) * 50, noise)),
        "null where negative": ("year", [1990.0 if label else None for label in labels]),
        "a category": ("occupation", ["paid" if label else "idle" for label in labels]),
    }[kind]
    with pytest.raises(GateError, match=rf"AUC of at most 0\.98 .*got {name} \([01]\.\d+\); .*remove its declaration") as error:
        found(cfg, with_column(planted_logged, name, values))
    assert error.value.failed == (name,)


def test_the_bound_is_a_setting(cfg, planted_logged):
    values = [1990.0 + label for label in planted_logged["label"].to_pylist()]
    raised = cfg.model_copy(update={"governance": cfg.governance.model_copy(update={"max_single_feature_auc": 1.0})})
    assert found(raised, with_column(planted_logged, "year", values))["highest_single_feature_auc"]["year"] == 1.0


def test_changed_items_and_repeated_texts_are_counted_and_named(cfg, planted_logged):
    storage, kind = Storage(cfg.storage.root), catalogue.kinds(schema.tables(cfg.features))["item"]
    items = [
        {"item_id": f"i{n}", "title": "Twin" if n < 2 else f"Title {n}", "genres": ["Drama"], "year": 1990} for n in range(5)
    ]
    catalogue.record(storage, kind, pa.Table.from_pylist(items, kind.catalogue.arrow), DAY)
    items[3]["year"] = 2001
    catalogue.record(storage, kind, pa.Table.from_pylist(items, kind.catalogue.arrow), date(2026, 1, 9))
    with capture_logs() as lines:
        findings = found(cfg, planted_logged)
    assert findings["changed_items"] == {"items": 1, "of": 5, "examples": ["i3"]}
    assert findings["texts_of_several_items"] == {"texts": 1, "items": 2, "examples": [["i0", "i1"]]}
    assert leakage.summary(findings)["changed_items"] == 1
    assert [line["event"] for line in lines].count("leakage_suspected") == 2


def test_the_last_comparison_of_logged_and_offline_values_is_named(cfg, planted_logged):
    assert found(cfg, planted_logged)["offline_online"] is None
    storage = Storage(cfg.storage.root)
    for day, ratio in (("2026-01-05", 0.5), ("2026-01-06", 0.25)):
        views = [{"view": "user_features", "mismatch_ratio": ratio, "missing_ratio": None}]
        views.append({"view": "item_features", "mismatch_ratio": 0.0, "missing_ratio": 0.0})
        storage.write_json(f"consistency/dt={day}/summary.json", {"day": day, "requests": 7, "views": views})
    findings = found(cfg, planted_logged)
    assert findings["offline_online"] == {"day": "2026-01-06", "requests": 7, "differing": {"user_features": 0.25}}
    assert leakage.summary(findings)["differing_views"] == 1


def test_a_leak_is_found_in_a_sample_of_many_rows(cfg, planted_logged, monkeypatch):
    monkeypatch.setattr(leakage, "_MAX_ROWS", 100)
    assert 50 < leakage.spaced(planted_logged).num_rows <= 100
    leaking = with_column(planted_logged, "year", [1990.0 + label for label in planted_logged["label"].to_pylist()])
    with pytest.raises(GateError, match="got year"):
        found(cfg, leaking)
