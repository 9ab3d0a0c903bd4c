"""A training that starts from the champion: where it begins, what is refused, how it goes on, and by which name."""

import hashlib
import json
import re
from dataclasses import replace
from datetime import UTC, timedelta

import numpy as np
import pyarrow.compute as pc
import pytest
import torch

from limaml import schema
from limaml.events.logged import write_logged
from limaml.io.storage import Storage
from limaml.models import bundle as bundles
from limaml.models.network import build_network
from limaml.registry import FINGERPRINT, Registry
from limaml.tasks.protocols import as_served
from limaml.tasks.sampling import TaskRows
from limaml.tasks.splits import split_events
from limaml.training import candidate
from limaml.training.candidate import Candidate, fingerprint, fit_candidate, lineage_of, save_candidate
from limaml.training.champion import pull, read_champion, why_not
from limaml.training.checkpoint import load_state, save_state
from limaml.training.prepare import fit_encoders, load_training_data, read_history
from limaml.training.scoring import score_specs
from limaml.training.step import OuterObjective, Workers, backward
from limaml.training.twin_and_refit import train_twin_and_refit
from limaml.training.warm_start import start_from_champion, take_weights

CPU = torch.device("cpu")
DAYS_LESS = 8
"""The champion is trained through so many days before the last one."""


@pytest.fixture(scope="module")
def place(make_planted, tmp_path_factory):
    """Days in a storage, some of whose items are new in the last ones, and a folder for champions."""
    folder = tmp_path_factory.mktemp("world")
    rows = make_planted(num_users=40, num_items=30, rows_per_user=20)
    last = pc.max(rows["timestamp"]).as_py() - timedelta(days=DAYS_LESS)
    new = pc.greater_equal(rows["item_id"], "i25")
    rows = rows.filter(pc.invert(pc.and_(new, pc.less(rows["timestamp"], schema.day_end(last.date())))))
    stamps = rows["timestamp"]
    for day in sorted({stamp.astimezone(UTC).date() for stamp in stamps.to_pylist()}):
        mine = pc.and_(pc.greater_equal(stamps, schema.day_start(day)), pc.less(stamps, schema.day_end(day)))
        write_logged(Storage(str(folder / "data")), day, rows.filter(mine), 1)
    return folder, day


@pytest.fixture
def world(place, small_config, tmp_path):
    """world(**sections) -> (cfg, last day), with a registry of its own."""

    def make(**sections):
        places = {
            "storage": {"root": str(place[0] / "data")},
            "registry": {"tracking_uri": f"sqlite:///{tmp_path}/mlflow.db", "artifact_root": str(tmp_path / "artifacts")},
            "local": {"run_root": str(tmp_path / "run")},
        }
        training = {"start_from": "champion", "champion_steps": 10, "max_steps": 10, "storage_path": str(tmp_path / "results")}
        training |= sections.pop("training", {})
        evaluation = {"held_out": "hash", "held_out_users": 0.2} | sections.pop("evaluation", {})
        return small_config(**places, training=training, evaluation=evaluation, **sections), place[1]

    return make


def trained(cfg, through, folder, champion=None):
    """A candidate trained in this process; its bundle's folder."""
    history = read_history(cfg, through)
    split = split_events(history, cfg.evaluation)
    encoders = fit_encoders(cfg, history, split, champion)
    data = load_training_data(cfg, through, *encoders)
    state = train_twin_and_refit(cfg, data, Workers(), CPU, resume=None, save=lambda _: None, champion=champion)
    mark = fingerprint(cfg, through)
    found = Candidate(mark, "no-run", through.isoformat(), state.twin_progress.best_step, 0.5, 1.0)
    save_candidate(cfg, folder, state, encoders, lineage_of(cfg, through, mark, split), found, {})
    return folder / "bundle"


@pytest.fixture
def before(world, place):
    """before(**sections) -> (cfg, last day, champion of `model` trained without the last days), which is trained once."""

    def make(**sections):
        cfg, last = world(**sections)
        folder = place[0] / hashlib.sha256(repr(sections.get("model")).encode()).hexdigest()
        if not folder.exists():
            trained(world(model=sections.get("model", {}))[0], last - timedelta(days=DAYS_LESS), folder)
        return cfg, last, read_champion(folder / "bundle")

    return make


def refit_rows(cfg, last, champion):
    history = read_history(cfg, last)
    encoder = champion.refit.encoder.grown(history, cfg)
    return encoder, TaskRows.of(history, encoder, cfg), TaskRows.of(history, champion.refit.encoder, cfg)


@pytest.mark.parametrize(
    "model",
    [{}, {"item_vectors": "learned"}, {"meta_block": "id_mlp", "interaction": "both"}, {"content_factors": 1}],
    ids=["fitted", "learned", "ids", "content apart"],
)
def test_before_its_first_step_it_scores_every_row_as_the_champion_does(before, model):
    """Known rows and new ones: what the champion calls unknown has begun as its unknown is."""
    cfg, last, champion = before(model=model)
    encoder, rows, theirs = refit_rows(cfg, last, champion)
    assert len(encoder.items) > len(champion.refit.encoder.items)
    network = build_network(cfg, encoder.dims, cfg.training.seed)
    take_weights(network, champion.refit.network, rows)
    n = cfg.support_rows_of("user")
    for mine, other in zip(
        as_served(rows, from_us=0, support_rows=n), as_served(theirs, from_us=0, support_rows=n), strict=True
    ):
        assert (mine.entity, mine.as_of_us) == (other.entity, other.as_of_us)
    scores = score_specs(network, rows, as_served(rows, from_us=0, support_rows=n))
    expected = score_specs(champion.refit.network, theirs, as_served(theirs, from_us=0, support_rows=n))
    # float32 sums of another order: batches are padded alike, tables are not.
    np.testing.assert_allclose(scores, expected, rtol=0.0, atol=1e-6)
    new = rows.encoded.item_index > len(champion.refit.encoder.items)
    assert new.any()
    assert np.isfinite(scores).all()


def test_fitted_vectors_go_on_in_the_champions_space(before):
    """Refitted from the champion's they point where they did; from scratch they do not. An item without rows keeps its own."""
    cfg, last, champion = before()
    encoder, rows, _ = refit_rows(cfg, last, champion)
    gone = rows.encoded.item_index[0]
    kept = np.flatnonzero(rows.encoded.item_index != gone)
    network = build_network(cfg, encoder.dims, cfg.training.seed)
    start_from_champion(network, champion.refit.network, rows, cfg)
    mine, theirs = (each.global_block.items.item.detach() for each in (network, champion.refit.network))
    known = slice(1, len(theirs))
    cosine = torch.nn.functional.cosine_similarity(mine[known], theirs[known], dim=1)
    assert cosine.mean() > 0.8
    assert not torch.equal(mine[known], theirs[known])
    assert torch.isfinite(mine).all()
    without = replace(
        rows,
        encoded=rows.encoded.take(kept),
        label=rows.label[kept],
        timestamp_us=rows.timestamp_us[kept],
        source_row=rows.source_row[kept],
        offsets=np.searchsorted(kept, rows.offsets),
    )
    start_from_champion(network, champion.refit.network, without, cfg)
    torch.testing.assert_close(network.global_block.items.item[gone], theirs[gone], atol=1e-7, rtol=0.0)


def test_with_content_apart_each_part_goes_on_in_its_own_factors(before):
    """Content alone gives the first factor and nothing of the others, before and after; both stay in the champion's space."""
    cfg, last, champion = before(model={"content_factors": 1, "embedding_dim": 5})
    encoder, rows, _ = refit_rows(cfg, last, champion)
    network, theirs = build_network(cfg, encoder.dims, cfg.training.seed), champion.refit.network.global_block.items
    start_from_champion(network, champion.refit.network, rows, cfg)
    mine = network.global_block.items
    item_R, at_R = np.unique(rows.encoded.item_index, return_index=True)
    features = torch.from_numpy(rows.encoded.item_features(at_R))
    by_content = mine(torch.zeros(len(at_R), dtype=torch.long), features)
    # Products of float32 weights that were fitted in float64.
    torch.testing.assert_close(mine.item[item_R, 0], by_content[:, 0], atol=1e-5, rtol=1e-5)
    assert not by_content[:, 1:].any()
    known = torch.arange(1, len(theirs.item))
    for part in (slice(0, 1), slice(1, None)):
        before_it, after = theirs.item[known, part], mine.item[known, part]
        assert torch.isfinite(after).all()
        assert not torch.equal(after, before_it)
        assert torch.nn.functional.cosine_similarity(after.flatten(), before_it.flatten(), dim=0) > 0.8


@pytest.mark.parametrize(
    ("sections", "reason"),
    [
        ({"model": {"global_hidden": [8]}}, r"model.global_hidden must be the champion's, \[16\], got \[8\]"),
        ({"task_kinds": [{"name": "user", "support_rows": 3}]}, "task_kinds.user must be the champion's"),
        ({"meta": {"inner_step": "gradient"}}, "meta.inner_step must be the champion's, 'newton', got 'gradient'"),
        ({"evaluation": {"held_out_users": 0.3}}, "evaluation.held_out_users must be the champion's, 0.2, got 0.3"),
    ],
)
def test_a_champion_that_is_of_another_make_is_refused_with_the_reason(before, world, sections, reason):
    cfg, last, champion = before()
    split = split_events(read_history(cfg, last), cfg.evaluation)
    assert why_not(champion, cfg, split) is None
    other = world(**sections)[0]
    found = why_not(champion, other, split)
    assert re.match(reason, found), found


def test_features_must_be_the_same_and_what_is_only_said_of_them_need_not(before):
    cfg, last, champion = before()
    split = split_events(read_history(cfg, last), cfg.evaluation)
    said = cfg.features[0].model_copy(update={"purpose": "another one", "retention_days": 9})
    assert why_not(champion, cfg.model_copy(update={"features": (said, *cfg.features[1:])}), split) is None
    name = cfg.features[-1].name
    fewer = cfg.model_copy(update={"features": cfg.features[:-1]})
    assert why_not(champion, fewer, split).startswith(f"features.{name} must be the champion's, {{")


def test_a_champion_that_has_seen_what_judges_is_refused(before, tmp_path):
    """The twin of a later day was fitted on rows that an earlier day's split validates on."""
    cfg, last, _ = before()
    late = read_champion(trained(cfg, last, tmp_path / "late"))
    early = split_events(read_history(cfg, last - timedelta(days=DAYS_LESS)), cfg.evaluation)
    assert "must have seen nothing of what judges this one, but its train_end" in why_not(late, cfg, early)


def test_the_pull_is_half_its_strength_times_the_squared_distance_and_counts_once(before):
    cfg, last, champion = before(model={"item_vectors": "learned"})
    encoder, rows, _ = refit_rows(cfg, last, champion)
    network = build_network(cfg, encoder.dims, 1)
    penalty = pull(champion.refit.network, 0.3)
    distance = 0.0
    theirs = dict(champion.refit.network.named_parameters())
    for name, weight in network.named_parameters():
        if weight.requires_grad:
            known = weight if weight.shape == theirs[name].shape else weight[: len(theirs[name])]
            distance += float((known.detach().double() - theirs[name].detach().double()).square().sum())
    # float32 sums.
    assert float(penalty(network).detach()) == pytest.approx(0.15 * distance, rel=1e-4)
    # Where it is: nothing, whatever new items are.
    take_weights(network, champion.refit.network, rows)
    assert float(penalty(network).detach()) == 0.0

    def none(step):
        return []

    found = []
    for rank in (0, 1):
        torch.nn.init.ones_(network.global_block.items.unknown_item)
        _, loss = backward(network, OuterObjective(none, None, penalty=penalty), cfg.training, 0, Workers(rank, 1))
        found.append(float(loss))
    assert found[0] > 0.0
    assert found[1] == 0.0


def test_a_strong_pull_stays_nearer_and_a_start_takes_the_steps_it_is_given(before):
    cfg, last, champion = before(training={"patience": 100})
    split = split_events(read_history(cfg, last), cfg.evaluation)
    data = load_training_data(cfg, last, *fit_encoders(cfg, read_history(cfg, last), split, champion))

    def moved(strength):
        own = cfg.model_copy(update={"training": cfg.training.model_copy(update={"champion_pull": strength})})
        done = train_twin_and_refit(own, data, Workers(), CPU, resume=None, save=lambda _: None, champion=champion)
        assert done.twin_progress.step == cfg.training.champion_steps
        weight = "global_block.mlp.layers.0.weight"
        return float((done.twin[weight] - champion.twin.network.state_dict()[weight]).norm())

    assert moved(100.0) < 0.5 * moved(0.0)


def test_what_was_shrunk_before_is_chosen_anew_not_shrunk_again(before, monkeypatch):
    """Widths are multiplied by what this training chose, of the width as trained."""
    cfg, last, champion = before(training={"champion_steps": 1, "outer_lr": 1e-9})
    history = read_history(cfg, last)
    data = load_training_data(cfg, last, *fit_encoders(cfg, history, split_events(history, cfg.evaluation), champion))
    done = train_twin_and_refit(cfg, data, Workers(), CPU, resume=None, save=lambda _: None, champion=champion)
    assert set(champion.shrinkage) == set(done.twin_progress.shrinkage) == {"user.factors", "user.level"}
    for name in ("factors", "level"):
        key = f"inner_steps.user.log_std.{name}"
        wide = champion.refit.network.state_dict()[key].exp() / champion.shrinkage[f"user.{name}"]
        chosen = done.network[key].exp() / done.twin_progress.shrinkage[f"user.{name}"]
        torch.testing.assert_close(chosen, wide, atol=1e-5, rtol=1e-5)


@pytest.mark.fault(
    "a training from the champion that dies after any of its checkpoints",
    after="resumed, its weights equal an uninterrupted run's, bit for bit",
)
def test_a_start_from_the_champion_resumes_bit_for_bit(before, tmp_path):
    cfg, last, champion = before(training={"validate_every": 4, "checkpoint_every": 3, "champion_pull": 0.1})
    history = read_history(cfg, last)
    data = load_training_data(cfg, last, *fit_encoders(cfg, history, split_events(history, cfg.evaluation), champion))
    folders = []

    def save(state):
        folders.append(tmp_path / f"state{len(folders)}")
        folders[-1].mkdir()
        save_state(state, folders[-1])

    def run(resume=None, save=lambda _: None):
        return train_twin_and_refit(cfg, data, Workers(), CPU, resume=resume, save=save, champion=champion)

    whole = run(save=save)
    assert len(folders) > 3
    for folder in folders:
        again = run(resume=load_state(folder))
        for part in ("network", "twin"):
            for name, value in getattr(whole, part).items():
                assert torch.equal(value, getattr(again, part)[name]), (folder, name)


def test_the_verb_names_a_training_by_its_champion_and_says_where_it_began(before, world, monkeypatch):
    """Workers read the champion's bundle from the storage, from where it is gone afterwards; a champion that does not fit is
    said not to, and the training is from scratch.
    """
    cfg, last, _ = before()
    seen = []

    def here(cfg, through, twin, refit, *, name, champion=None):
        seen.append((name, champion))
        found = read_champion(champion) if champion else None
        data = load_training_data(cfg, through, twin, refit)
        return train_twin_and_refit(cfg, data, Workers(), CPU, resume=None, save=lambda _: None, champion=found)

    monkeypatch.setattr(candidate, "train_on_ray", here)
    registry = Registry(cfg.registry)
    earlier = last - timedelta(days=DAYS_LESS)
    first = fit_candidate(cfg, earlier)
    assert (first["started_from"], seen[0][1]) == ({}, None)

    def serve(result):
        version = registry.register(f"{result['candidate']}/bundle", result["run_id"], {FINGERPRINT: result["fingerprint"]})
        registry.set_champion(version)

    serve(first)
    second = fit_candidate(cfg, last)
    assert second["started_from"]["version"] == "1"
    assert seen[1][1] == f"{second['candidate']}/champion"
    assert not Storage(second["candidate"]).exists("champion")
    bundle = bundles.load(f"{second['candidate']}/bundle")
    assert bundle.lineage["started_from"] == second["started_from"]
    known = bundles.load(f"{first['candidate']}/bundle").refit.encoder
    assert bundle.refit.encoder.items[: len(known.items)] == known.items
    assert bundle.refit.encoder.columns == known.columns
    # The same again is the same folder; another champion of the same data is another training.
    assert fit_candidate(cfg, last) == second
    assert len(seen) == 2
    serve({**first, "fingerprint": "other"})
    third = fit_candidate(cfg, last)
    assert third["fingerprint"] == second["fingerprint"] == fingerprint(cfg, last)
    assert third["started_from"]["version"] == "2"
    assert third["candidate"] != second["candidate"]
    assert seen[2][0] != seen[1][0]
    changed = world(model={"global_hidden": [8]})[0]
    fourth = fit_candidate(changed, last)
    assert seen[3][1] is None
    assert "model.global_hidden must be the champion's, [16], got [8]" in fourth["started_from"]["scratch"]
    assert json.loads(Storage(fourth["candidate"]).read_bytes("candidate.json"))["started_from"] == fourth["started_from"]
