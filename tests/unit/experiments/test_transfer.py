"""New items with and without vectors of text, small: arms are judged on the same rows, and no new item has an early event."""

from datetime import date, timedelta

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from experiments import transfer
from limaml.config import load


def test_all_arms_share_rows_and_new_items_have_no_event_before_they_begin(tmp_path):
    steps = ["training.max_steps=2", "training.validate_every=1", "training.num_workers=1", "training.tasks_per_step=4"]
    cfg = load("configs/movielens.toml", [*transfer.OVERRIDES["movielens"], *steps])
    found = transfer.measure(cfg, "movielens", tmp_path)
    assert found["rows"]["all"] == sum(found["rows"][group] for group in ("unseen", "few", "rare", "warm"))
    assert found["rows"]["unseen"] > 100
    assert set(found["validation_auc_unseen"]) == {
        "none",
        *(f"{p}_{w}" for p in ("outside", "inside") for w in transfer.WIDTHS),
    }
    assert found["chosen"] in found["arms"]
    for group in transfer.GROUPS:
        for gain in found["gains"][group].values():
            assert gain["low"] <= gain["mean"] <= gain["high"]
            assert gain["low"] < gain["high"]
        assert found["gains"][group] == found["arms"][found["chosen"]]["over_none"][group]
        assert set(found["arms"]["none"]["over_none"][group]["pooled_auc"].values()) == {0.0}
    events = pq.read_table(tmp_path / "delivered" / "events")
    first: dict[str, date] = {}
    for item, at in zip(events["item_id"].to_pylist(), events["timestamp"].to_pylist(), strict=True):
        first[item] = min(first.get(item, date.max), at.date())
    starts = transfer._dates(cfg)
    begins = {item: transfer._begins(item, starts) for item in first}
    assert all(first[item] >= begin for item, begin in begins.items())
    shares = [np.mean([begin == start for begin in begins.values()]) for start in starts]
    assert shares == pytest.approx([transfer.VALIDATION_ITEMS, transfer.JUDGED_ITEMS], abs=0.04)


def test_what_an_item_had_before_the_day_is_counted():
    days = [0, 0, 1, 1, 3, 0]
    events = pa.table(
        {
            "user_id": ["b", "a", "a", "b", "a", "a"],
            "item_id": ["x", "x", "x", "y", "x", "y"],
            "timestamp": pa.array([date(2026, 1, 1) + timedelta(days=day) for day in days]).cast(pa.timestamp("us", tz="UTC")),
            "label": [1, 0, 1, 1, 0, 0],
        }
    )
    rows = transfer._rows(events, np.array([2, 3, 4, 0]))
    assert rows.seen_R.tolist() == [2, 1, 3, 0]
    assert rows.user_R.tolist() == [0, 1, 0, 1]
    assert len(set(rows.list_R.tolist())) == 4
    assert rows.label_R.tolist() == [1, 1, 0, 1]


def test_ndcg_is_that_of_scikit_learn():
    from sklearn.metrics import ndcg_score

    rng = np.random.default_rng(0)
    label, score, lists = (rng.random(120) < 0.3).astype(float), rng.random(120), np.repeat(np.arange(6), 20)
    found, draws = transfer._ndcg(label, score, lists // 2, lists, np.ones((2, 3)))
    expected = np.mean([ndcg_score([label[lists == at]], [score[lists == at]], k=10) for at in range(6)])
    assert found == pytest.approx(expected)
    assert draws == pytest.approx([expected, expected])
