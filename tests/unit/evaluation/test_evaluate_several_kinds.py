"""A candidate of users and items: trained, judged, and replayed day by day, with both embeddings of every row."""

from datetime import timedelta

import numpy as np
import pyarrow.compute as pc
import pytest

from limaml import schema
from limaml.evaluation.daily_replay import score_as_served
from limaml.evaluation.evaluate import evaluate_candidate
from limaml.io.storage import Storage
from limaml.metrics import auc
from limaml.models import bundle as bundles
from limaml.monitoring.drift import _scores
from limaml.tasks.protocols import as_served, query_rows
from limaml.tasks.sampling import TaskRows
from limaml.tasks.splits import split_events
from limaml.training.prepare import read_history, validating_rows
from limaml.training.scoring import score_specs

KINDS = [{"name": "user"}, {"name": "item", "entity_column": "item_id", "support_rows": 6}]


@pytest.mark.parametrize("held_out", ["late", "hash"])
def test_a_candidate_of_two_kinds_is_trained_and_judged(make_candidate, held_out):
    promotion = {"protocol": "first_k" if held_out == "late" else "as_served_known"}
    cfg, folder, through = make_candidate("two", task_kinds=KINDS, evaluation={"held_out": held_out}, promotion=promotion)
    result = evaluate_candidate(cfg, folder)
    assert result["as_served"]["all"]["methods"]["limaml"]["pooled_auc"] > 0.5
    bundle = bundles.load(folder / "bundle")
    assert bundle.prior.keys() == {"user", "item"}
    # The evaluation's number is that of the twin's scores with both embeddings.
    logged = read_history(cfg, through)
    split = split_events(logged, cfg.evaluation)
    rows = TaskRows.of(logged, bundle.twin.encoder, cfg)
    specs = as_served(rows, from_us=split.validation_end_us, support_rows=12)
    found = auc(query_rows(rows, specs).labels, score_specs(bundle.twin.network, rows, specs))
    assert result["as_served"]["all"]["methods"]["limaml"]["pooled_auc"] == pytest.approx(found, abs=1e-9)


@pytest.mark.parametrize("held_out", ["late", "hash"])
def test_items_validate_with_rows_of_everybody_who_is_not_held_out_before_the_test(
    planted_logged_large, small_config, held_out
):
    cfg = small_config(task_kinds=KINDS, evaluation={"held_out": held_out})
    split = split_events(planted_logged_large, cfg.evaluation)
    rows, users = validating_rows(cfg, planted_logged_large, split)
    found = set(rows["user_id"].to_pylist())
    assert users == split.validation_users
    assert not found & set(split.held_out_users)
    assert found == {*split.train_users, *split.validation_users}
    assert pc.max(rows["timestamp"].cast("int64")).as_py() < split.validation_end_us
    alone, nobody = validating_rows(small_config(evaluation={"held_out": held_out}), planted_logged_large, split)
    assert nobody is None
    assert alone.equals(split.validation_rows(planted_logged_large))


def test_a_replayed_day_and_the_scores_that_drift_is_measured_on_are_those_of_the_evaluation(make_candidate):
    """Drift reads the last rows of each item only."""
    cfg, folder, through = make_candidate("two", task_kinds=KINDS)
    model = bundles.load(folder / "bundle", parts=("refit",))
    logged = read_history(cfg, through)
    expected = []
    for day in (through - timedelta(days=1), through):
        start, end = schema.day_start(day), schema.day_end(day)
        at_day = pc.and_(pc.greater_equal(logged["timestamp"], start), pc.less(logged["timestamp"], end))
        day_rows = logged.filter(at_day)
        history = logged.filter(pc.less(logged["timestamp"], start))
        scores = score_as_served(model.network, model.encoder, day_rows, history, day=day, cfg=cfg)
        rows = TaskRows.of(logged, model.encoder, cfg)
        specs = [
            spec
            for spec in as_served(rows, from_us=int(start.timestamp() * 1e6), support_rows=12)
            if spec.as_of_us < int(end.timestamp() * 1e6)
        ]
        events = logged["event_id"].take(rows.source_row[query_rows(rows, specs).rows]).to_pylist()
        whole = dict(zip(events, score_specs(model.network, rows, specs), strict=True))
        assert whole.keys() == set(day_rows["event_id"].to_pylist())
        np.testing.assert_allclose(scores, [whole[event] for event in day_rows["event_id"].to_pylist()], atol=1e-6)
        expected += scores.tolist()
    found = _scores(Storage(cfg.storage.root), model, through - timedelta(days=1), through).to_numpy()
    assert len(found) > 20
    np.testing.assert_allclose(sorted(found), sorted(expected), atol=1e-6)
