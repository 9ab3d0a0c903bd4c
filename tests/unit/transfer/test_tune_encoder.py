"""The verb reads rows and catalogue, writes an encoder that `[[transfer]]` can read, or says that nothing was gained."""

import json
from datetime import date

import numpy as np
import pyarrow.compute as pc
import pytest

from limaml.errors import ConfigError, DataError, NothingToDo
from limaml.events.ingest import ingest_history
from limaml.events.sources import open_source
from limaml.tasks.splits import split_events
from limaml.training.prepare import read_history
from limaml.transfer.bert import BertEncoder
from limaml.transfer.embed_items import delivered_items
from limaml.transfer.tune_encoder import aligned_items, tune_encoder
from tests.contracts.small_world import config_of

TODAY = date(2026, 3, 2)


@pytest.fixture(scope="module")
def ingested(tmp_path_factory):
    """A folder with a generated world's rows, and their last day."""
    folder = tmp_path_factory.mktemp("world")
    through = open_source(config_of(folder), TODAY).days()[-1]
    ingest_history(config_of(folder), through, TODAY)
    return folder, through


@pytest.fixture
def through(ingested):
    return ingested[1]


@pytest.fixture
def cfg(ingested, tiny_bert):
    tuning = {"path": str(tiny_bert), "template": "{title}. {genres}", "min_item_rows": 1, "rank": 2, "layers": 2}
    return config_of(ingested[0], tuning=tuning | {"max_epochs": 3, "held_out_items": 0.4, "batch_items": 4})


def changed(cfg, **values):
    return cfg.model_copy(update={"tuning": cfg.tuning.model_copy(update=values)})


def rows_and_items(cfg, through):
    logged = read_history(cfg, through)
    return split_events(logged, cfg.evaluation).train_rows(logged), delivered_items(cfg, TODAY)


def test_it_leaves_an_encoder_or_says_that_nothing_was_gained(cfg, through, tmp_path, capsys):
    eager = changed(cfg, adapter_lr=0.05, max_epochs=20, patience=20, max_ms_per_item=10_000.0)
    done = tune_encoder(eager, tmp_path / "tuned", through, TODAY)
    origin = BertEncoder(tmp_path / "tuned").origin
    assert (done["encoder"], done["licence"], done["width"]) == (origin.label, "mit", 12)
    assert set(done["ms_per_item"]) == {"before tuning", "after tuning"}
    assert f'encoder = "{origin.label}"' in capsys.readouterr().out
    said = json.loads((tmp_path / "tuned" / "encoder.json").read_text())["tuned"]
    assert (said["rank"], said["through"], said["held_out_loss"]) == (2, through.isoformat(), done["held_out_loss"])
    with pytest.raises(NothingToDo, match=r"no adapter lowers the loss on held-out items \(head \d"):
        tune_encoder(changed(cfg, adapter_lr=1e-30, lr=1e-30), tmp_path / "none", through, TODAY)
    assert not (tmp_path / "none").exists()


def test_an_encoder_over_the_budget_of_time_is_refused_before_rows_are_read(cfg, tmp_path):
    with pytest.raises(ConfigError, match=r"takes before tuning, \d.* got 1e-06; name a smaller encoder"):
        tune_encoder(changed(cfg, max_ms_per_item=1e-6), tmp_path / "out", date(1, 1, 1), TODAY)


def test_items_are_held_out_by_a_hash_of_their_id(cfg, through):
    logged, items = rows_and_items(cfg, through)
    found = aligned_items(cfg, logged, items)
    fewer = aligned_items(changed(cfg, held_out_items=0.2), logged, items)
    assert {fewer.ids[at] for at in fewer.held_out_I} < {found.ids[at] for at in found.held_out_I}
    assert sorted([*found.held_out_I, *found.trained_I]) == list(range(len(found.ids)))
    texts = np.array(found.texts)
    assert set(texts[found.trained_I]) <= set(found.domain)
    assert not set(texts[found.held_out_I]) & set(found.domain)


def test_pairs_are_of_one_users_positive_rows_close_in_time(cfg, through):
    logged, items = rows_and_items(cfg, through)
    found = aligned_items(changed(cfg, align="pairs", pair_hours=30.0), logged, items)
    frame = logged.to_pandas().sort_values(["user_id", "timestamp", "event_id"])
    frame = frame[frame.label > 0]
    expected = {item: list[str]() for item in found.ids}
    for _, own in frame.groupby("user_id"):
        for (one, at), (other, then) in zip(
            own[["item_id", "timestamp"]].values[:-1], own[["item_id", "timestamp"]].values[1:], strict=True
        ):
            if one != other and (then - at).total_seconds() <= 30 * 3600:
                expected[one].append(other)
                expected[other].append(one)
    assert {found.ids[at]: sorted(found.ids[p] for p in each) for at, each in enumerate(found.partners)} == {
        item: sorted(others) for item, others in expected.items()
    }
    assert any(expected.values())


def test_rows_without_a_pair_are_refused(cfg, through):
    logged, items = rows_and_items(cfg, through)
    negative = logged.filter(pc.equal(logged["label"], 0))
    with pytest.raises(DataError, match=r"within 24 hours, there are none; raise tuning.pair_hours"):
        aligned_items(changed(cfg, align="pairs"), negative, items)


def test_vectors_are_the_fitted_ones_of_the_items(cfg, through):
    logged, items = rows_and_items(cfg, through)
    found = aligned_items(cfg, logged, items)
    assert found.vectors_IK.shape == (len(found.ids), cfg.model.embedding_dim - 1)
    assert np.isfinite(found.vectors_IK.numpy()).all()
    titles = dict(zip(items["item_id"].to_pylist(), items["title"].to_pylist(), strict=True))
    assert all(text.startswith(titles[item]) for item, text in zip(found.ids, found.texts, strict=True))


def test_a_template_is_asked_for(cfg, tmp_path):
    with pytest.raises(ConfigError, match=r"tuning.template must name a column of the catalogue, got ''"):
        tune_encoder(changed(cfg, template=""), tmp_path / "out", TODAY, TODAY)


def test_an_encoder_without_a_licence_is_refused(cfg, tiny_bert, tmp_path):
    (tiny_bert / "README.md").unlink()
    with pytest.raises(ConfigError, match=r"licence of tiny .* must be declared before it is adapted"):
        tune_encoder(cfg, tmp_path / "out", TODAY, TODAY)
