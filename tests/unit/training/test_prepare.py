"""What the twin learns from and stops on: changing any other label changes nothing of it."""

import numpy as np
import pyarrow as pa
import pytest

from limaml.events.logged import write_logged
from limaml.features.encoder import Encoder
from limaml.io.storage import Storage
from limaml.models.network import build_network
from limaml.tasks.sampling import MICROSECONDS_PER_DAY, TaskRows
from limaml.tasks.splits import split_events
from limaml.training.prepare import fit_encoders, load_training_data, read_history
from limaml.training.step import Workers
from limaml.training.twin_and_refit import fit_twin
from limaml.training.validation import Validator
from tests import declared


@pytest.fixture
def fitted(planted_logged, small_config, tmp_path):
    """fitted(name, held_out, flip) -> (weights, history) of a twin; `flip(split, rows)` says which labels are turned round."""

    def fit(name, held_out, flip):
        cfg = small_config(
            storage={"root": str(tmp_path / name)},
            evaluation={"held_out": held_out, "held_out_users": 0.2},
            model={"dropout": 0.0},
        )
        labels = planted_logged["label"].to_numpy()
        turned = np.where(flip(split_events(planted_logged, cfg.evaluation), planted_logged), 1 - labels, labels)
        at = planted_logged.schema.get_field_index("label")
        logged = planted_logged.set_column(at, planted_logged.field(at), pa.array(turned, planted_logged.field(at).type))
        days = [stamp.date() for stamp in logged["timestamp"].to_pylist()]
        for day in sorted(set(days)):
            write_logged(Storage(cfg.storage.root), day, logged.filter(pa.array([each == day for each in days])), 1)
        through = max(days)
        history = read_history(cfg, through)
        assert history.schema.equals(declared.LOGGED_EVENTS.arrow)
        encoders = fit_encoders(cfg, history, split_events(history, cfg.evaluation))
        data = load_training_data(cfg, through, *encoders)
        network, progress = fit_twin(cfg, data.twin_rows, data.twin_dims, data.validator)
        weights = {name: value.numpy() for name, value in network.state_dict().items()}
        return weights, [{k: v for k, v in entry.items() if k != "tasks_per_s"} for entry in progress.history]

    return fit


def nothing(split, rows):
    return np.zeros(rows.num_rows, np.bool_)


def stamps(rows):
    return rows["timestamp"].cast(pa.int64()).to_numpy()


def held_out_or_tested(split, rows):
    held_out = set(split.held_out_users)
    return np.array([user in held_out for user in rows["user_id"].to_pylist()]) | (stamps(rows) >= split.validation_end_us)


def from_t1_on(split, rows):
    return stamps(rows) >= split.train_end_us


@pytest.mark.parametrize("held_out", ["hash", "late"])
def test_labels_of_held_out_users_and_from_t2_on_change_nothing(fitted, held_out):
    (weights, history), (others, same) = (
        fitted(str(n), held_out, flip) for n, flip in enumerate((nothing, held_out_or_tested))
    )
    assert history == same
    assert weights.keys() == others.keys()
    for name, value in weights.items():
        np.testing.assert_array_equal(value, others[name], err_msg=name)


def test_labels_from_t1_on_are_validated_on_and_not_learned(fitted):
    (_, history), (_, other) = (fitted(str(n), "hash", flip) for n, flip in enumerate((nothing, from_t1_on)))
    steps = min(len(history), len(other))
    assert [entry["train_loss"] for entry in history[:steps]] == [entry["train_loss"] for entry in other[:steps]]
    # Two of them may agree by chance: an AUC of few rows takes few values.
    pairs = [
        (one["validation_as_served_auc"], two["validation_as_served_auc"]) for one, two in zip(history, other, strict=False)
    ]
    assert any(one != two for one, two in pairs)
    assert set(history[0]) == {
        "step",
        "train_loss",
        "validation_auc",
        "validation_as_served_auc",
        "validation_as_served_user_auc",
    }


def test_known_users_validate_as_a_daily_refresh_serves_them(planted_logged, small_config):
    """Every row of users not held out between T1 and T2 once, with their last rows before its day, also those before T1."""
    cfg = small_config(evaluation={"held_out": "hash", "held_out_users": 0.2})
    split = split_events(planted_logged, cfg.evaluation)
    rows = TaskRows.from_logged(split.validation_rows(planted_logged), Encoder.fit(planted_logged, cfg), cfg.task_kind)
    [tasks] = Validator(rows, cfg, split.validate_from_us).tasks
    asked = np.concatenate([spec.query for spec in tasks])
    np.testing.assert_array_equal(np.sort(asked), np.flatnonzero(rows.timestamp_us >= split.train_end_us))
    assert max(rows.timestamp_us) < split.validation_end_us
    from_before = 0
    for spec in tasks:
        support = rows.timestamp_us[spec.support_start : spec.support_stop]
        day = rows.timestamp_us[spec.query[0]] // MICROSECONDS_PER_DAY * MICROSECONDS_PER_DAY
        earlier = rows.timestamp_us[rows.offsets[spec.entity] : rows.offsets[spec.entity + 1]]
        assert support.tolist() == earlier[earlier < day][-cfg.meta.support_rows :].tolist()
        from_before += int((support < split.train_end_us).sum())
    assert from_before


def test_few_rows_of_known_users_are_their_first_ones_on_rows_that_validate(planted_logged, small_config, monkeypatch):
    """What few rows say is tested on rows that trained nothing, as of the first of them."""
    cfg = small_config(evaluation={"held_out": "hash", "held_out_users": 0.2, "first_k": (0, 2, 5)})
    split = split_events(planted_logged, cfg.evaluation)
    encoder, lists = Encoder.fit(planted_logged, cfg), []
    rows = TaskRows.from_logged(split.validation_rows(planted_logged), encoder, cfg.task_kind)
    validator = Validator(rows, cfg, split.validate_from_us)

    def scored(network, rows, specs, others):
        lists.append(specs)
        return np.zeros(sum(len(spec.query) for spec in specs))

    monkeypatch.setattr("limaml.training.validation.score_specs", scored)
    assert validator.of_few_rows(build_network(cfg, encoder.dims), Workers()) == pytest.approx(0.5)
    [served] = validator.tasks
    assert lists[-1] == served
    asked = np.sort(np.concatenate([spec.query for spec in served]))
    for k, specs in zip((0, 2, 5), lists[:-1], strict=True):
        assert len({spec.entity for spec in specs}) == len(specs)
        np.testing.assert_array_equal(np.sort(np.concatenate([spec.query for spec in specs])), asked)
        for spec in specs:
            before = rows.first_row_at(spec.entity, split.train_end_us) - rows.offsets[spec.entity]
            assert (spec.support_start, spec.support_size) == (rows.offsets[spec.entity], min(k, before))
