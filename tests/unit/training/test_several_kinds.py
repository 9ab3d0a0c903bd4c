"""Users and items adapted at once: the step, where it starts from, and what is scored with both embeddings."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from limaml.features.encoder import Encoder
from limaml.meta.engine import embed_tasks, outer_loss, task_gradients
from limaml.metrics import mean_per_user_auc
from limaml.models.network import build_network
from limaml.tasks.other_entities import NOBODY
from limaml.tasks.protocols import as_served, first_k, query_rows
from limaml.tasks.rows import Rows
from limaml.tasks.sampling import TaskRows, build_batch, meta_batch
from limaml.training.fit import fit
from limaml.training.optimizer import make_optimizer
from limaml.training.scoring import embed_others, embed_specs, score_specs
from limaml.training.step import Workers, backward, outer_step
from limaml.training.twin_and_refit import network_objective
from limaml.training.validation import Validator
from limaml.training.warm_start import warm_start
from tests import declared

KINDS = [
    {"name": "user"},
    {"name": "item", "entity_column": "item_id", "support_rows": 9, "meta_block": "row_mlp"},
]

_spec = importlib.util.spec_from_file_location("gradient_of_worker", Path(__file__).with_name("gradient_of_worker.py"))
worker_script = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(worker_script)


@pytest.fixture
def fitted(planted_logged, small_config):
    def make(**sections):
        model = {"dropout": 0.0, "meta_hidden": [8]} | sections.pop("model", {})
        meta = {"max_other_tasks": 20, "inner_step": "gradient", "inner_lr": 0.3} | sections.pop("meta", {})
        cfg = small_config(task_kinds=KINDS, model=model, meta=meta, **sections)
        encoder = Encoder.fit(planted_logged, cfg)
        return cfg, encoder, TaskRows.of(planted_logged, encoder, cfg)

    return make


def trained(network, rows, cfg, steps=15):
    optimizer, objective = make_optimizer(network, cfg.training), network_objective(network, rows, cfg, Workers())
    for step in range(steps):
        outer_step(network, optimizer, objective, cfg.training, step, Workers())
    return network


def test_workers_divide_the_tasks_of_one_and_get_its_gradient(fitted, planted_logged, tmp_path):
    cfg, _, _ = fitted()
    tasks, flat, loss = worker_script.gradient(cfg, planted_logged, Workers())
    (tmp_path / "config.json").write_text(cfg.model_dump_json())
    pq.write_table(planted_logged, tmp_path / "logged.parquet")
    commands = [[sys.executable, worker_script.__file__, str(rank), "2", str(tmp_path)] for rank in range(2)]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE) for command in commands]
    for process in processes:
        _, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors.decode()
    for rank in range(2):
        mine, theirs, their_loss = json.loads((tmp_path / f"{rank}.json").read_text())
        assert mine == tasks[rank::2]
        # float64 sums in another order.
        assert theirs == pytest.approx(flat, abs=1e-12, rel=0)
        assert their_loss == pytest.approx(loss, abs=1e-12, rel=0)


@pytest.mark.parametrize("interaction", ["product", "concat"])
def test_a_step_s_gradient_is_the_mean_of_its_tasks_alone_and_reaches_both_blocks(fitted, interaction):
    cfg, encoder, rows = fitted(model={"interaction": interaction})
    network = build_network(cfg, encoder.dims, seed=1).double()
    trained(network, rows, cfg, steps=3)  # The first one leaves the items' vectors at zero, through which nothing passes.
    network.zero_grad()
    backward(network, network_objective(network, rows, cfg, Workers()), cfg.training, 5, Workers())
    found = {name: p.grad.clone() for name, p in network.named_parameters() if p.requires_grad}
    network.zero_grad()
    specs = meta_batch(rows, cfg, seed=cfg.training.seed, step=5)
    for spec in specs:
        loss = outer_loss(network, build_batch(rows, [spec]).to(dtype=torch.float64)).loss / len(specs)
        torch.autograd.backward(loss)
    for name, p in network.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(found[name], torch.zeros_like(p) if p.grad is None else p.grad, rtol=1e-9, atol=1e-12)
    parts = ["meta_blocks.user", "meta_blocks.item", "inner_steps.item"]
    for part in [*parts, "global_block.product.others.item"] if interaction == "product" else parts:
        assert any(float(g.abs().max()) > 1e-9 for name, g in found.items() if name.startswith(part)), part


def test_steps_lower_the_loss(fitted):
    cfg, encoder, rows = fitted(training={"outer_lr": 0.01, "max_steps": 40})
    fixed = build_batch(rows, meta_batch(rows, cfg, seed=9, step=0) + meta_batch(rows, cfg, seed=9, step=1))
    network = build_network(cfg, encoder.dims, seed=1)
    before = float(outer_loss(network, fixed).loss.detach())
    trained(network, rows, cfg, steps=40)
    assert float(outer_loss(network, fixed).loss.detach()) < before - 0.01


def test_a_row_is_scored_with_its_user_s_and_its_item_s_embedding_as_of_one_instant(fitted):
    cfg, encoder, rows = fitted()
    network = trained(build_network(cfg, encoder.dims, seed=1), rows, cfg)
    other = rows.others["item"]
    specs = as_served(rows, from_us=int(np.median(rows.timestamp_us)), support_rows=12)[::9]
    scores = score_specs(network, rows, specs)
    prior = network.block("item").prior().detach()
    expected, num_priors, moved = [], 0, []
    for spec in specs:
        for row in spec.query:
            entity, as_of_us = other.entity[[row]], np.array([spec.as_of_us])
            first, stop = other.supports(entity, as_of_us)
            item = prior[None]
            if stop[0] > first[0]:
                index = torch.from_numpy(other.entity_index[entity])
                item = embed_tasks(network, "item", other.gather(rows, entity, as_of_us), index)
            num_priors += int(stop[0] == first[0])
            one = Rows.gather(rows, np.array([[row]]), np.ones((1, 1), np.float32), as_of_us)
            user = embed_specs(network, rows, [spec])
            expected.append(torch.sigmoid(network(one, {"user": user, "item": item}))[0, 0].item())
            moved.append(abs(expected[-1] - torch.sigmoid(network(one, {"user": user}))[0, 0].item()))
    # float32, in batches of other sizes.
    np.testing.assert_allclose(scores, expected, atol=1e-6)
    assert num_priors < len(expected) / 2
    assert np.median(moved) > 1e-4


def test_lists_of_specs_share_embeddings_of_items(fitted):
    cfg, encoder, rows = fitted()
    network = trained(build_network(cfg, encoder.dims, seed=1), rows, cfg)
    by_k = first_k(rows, rows.entities, (0, 2, 5), min_query_rows=5, support_rows=12)
    others = embed_others(network, rows, by_k[5] + as_served(rows, from_us=0, support_rows=12))
    for specs in by_k.values():
        np.testing.assert_allclose(score_specs(network, rows, specs, others), score_specs(network, rows, specs), atol=1e-6)


def test_validation_judges_its_users_alone_with_items_that_everybody_s_rows_adapted(fitted, planted_logged):
    cfg, encoder, rows = fitted()
    network = trained(build_network(cfg, encoder.dims, seed=1), rows, cfg)
    users = rows.entities[5:15]
    found = Validator(rows, cfg, users=users)
    assert {rows.entities[spec.entity] for specs in found.tasks for spec in specs} <= set(users)
    alone = planted_logged.filter(torch.tensor([u in users for u in planted_logged["user_id"].to_pylist()]).numpy())
    fewer = Validator(TaskRows.of(alone, encoder, cfg), cfg)
    assert [len(specs) for specs in found.tasks] == [len(specs) for specs in fewer.tasks]
    assert found(network, Workers()) != fewer(network, Workers())


def test_the_start_measures_each_kind_s_gains(fitted):
    cfg, encoder, rows = fitted(meta={"inner_step": "newton"})
    network = build_network(cfg, encoder.dims, seed=1)
    warm_start(network, rows, cfg)
    for kind, name in (("user", "factors"), ("item", "weight1")):
        assert float(network.step(kind).gain(name)) != 1.0


def test_a_kind_has_its_own_block_and_support(fitted):
    cfg, encoder, rows = fitted()
    network = build_network(cfg, encoder.dims)
    assert [type(network.block(kind)).__name__ for kind in ("user", "item")] == ["TaskVector", "SupportMlp"]
    assert network.support_rows == {"user": 12, "item": 9}
    batch = build_batch(rows, meta_batch(rows, cfg, seed=0, step=0))
    assert batch.others["item"].support.mask_TR.shape[1] <= 9
    with pytest.raises(ValueError, match="of a batch of one kind, got one with item"):
        task_gradients(network, batch)


def test_a_kind_has_its_own_prior(planted_logged, small_config):
    kinds = [{"name": "user"}, {"name": "item", "entity_column": "item_id", "prior_std": 0.2}]
    cfg = small_config(task_kinds=kinds, meta={"inner_step": "newton", "prior_std": 0.6})
    network = build_network(cfg, Encoder.fit(planted_logged, cfg).dims)
    for kind, std in (("user", 0.6), ("item", 0.2)):
        assert {round(float(p.detach().exp()), 6) for p in network.step(kind).log_std.values()} == {std}


def test_an_item_kind_s_id_block_knows_the_items(planted_logged, small_config):
    kinds = [{"name": "user"}, {"name": "item", "entity_column": "item_id", "meta_block": "id_mlp"}]
    cfg = small_config(task_kinds=kinds)
    encoder = Encoder.fit(planted_logged, cfg)
    network, rows = build_network(cfg, encoder.dims), TaskRows.of(planted_logged, encoder, cfg)
    assert network.block("item").table.shape[0] == len(encoder.items) + 1
    assert rows.others["item"].entity_index.tolist() == list(range(1, len(encoder.items) + 1))


@pytest.mark.parametrize("per_candidate", [False, True])
def test_a_kind_of_the_context_knows_its_values_and_rows_that_have_none(planted_logged, small_config, per_candidate):
    place = {"entity": "context", "name": "place", "type": "category", "per_candidate": per_candidate}
    kinds = [{"name": "user"}, {"name": "where", "entity_column": "place", "meta_block": "id_mlp"}]
    cfg = small_config(features=[*declared.FEATURES, place], task_kinds=kinds, meta={"zero_support_probability": 0.0})
    places = pa.array([[None, "north", "south"][at % 3] for at in range(planted_logged.num_rows)], pa.string())
    logged = planted_logged.append_column("place", places)
    encoder = Encoder.fit(logged, cfg)
    network, rows = build_network(cfg, encoder.dims), TaskRows.of(logged, encoder, cfg)
    assert network.block("where").table.shape[0] == 3
    assert (rows.others["where"].entities, rows.others["where"].entity_index.tolist()) == (("north", "south"), [1, 2])
    # One for all candidates of a request would only shift their scores if it met what they share.
    assert set(network.global_block.product.others) == ({"where"} if per_candidate else set())
    specs = meta_batch(rows, cfg, seed=0, step=0)
    of_query = np.concatenate([rows.source_row[spec.query] for spec in specs])
    tasks = np.concatenate([spec.others["where"] for spec in specs])
    assert (tasks[of_query % 3 == 0] == NOBODY).all()
    assert (tasks != NOBODY).mean() > 0.4
    before = network.block("where").table.detach().clone()
    trained(network, rows, cfg, steps=1)
    moved = (network.block("where").table != before).any(dim=1)
    assert moved[1:].all()


def test_what_features_leave_unsaid_of_items_is_learnt_from_their_rows(make_planted, small_config):
    """The planted items differ in how they are liked, and by whom; without their rates no feature says how."""
    logged, found = make_planted(num_users=150, num_items=40, rows_per_user=40, seed=3), {}
    unsaid = [feature for feature in declared.FEATURES if feature.entity != "item" or not feature.aggregate]
    for kinds in (KINDS[:1], [KINDS[0], {"name": "item", "entity_column": "item_id"}]):
        training = {"max_steps": 60, "tasks_per_step": 16, "outer_lr": 0.01}
        cfg = small_config(features=unsaid, task_kinds=kinds, meta={"support_rows": 32}, training=training)
        encoder = Encoder.fit(logged, cfg)
        rows = TaskRows.of(logged, encoder, cfg)
        network = build_network(cfg, encoder.dims, seed=0)
        warm_start(network, rows, cfg)
        network, _ = fit(network, cfg.training, network_objective(network, rows, cfg, Workers()))
        specs = as_served(rows, from_us=int(np.median(rows.timestamp_us)), support_rows=32)
        asked = query_rows(rows, specs)
        scores = score_specs(network, rows, specs)
        found[len(kinds)] = mean_per_user_auc(asked.labels, scores, asked.users, asked.num_users)
    # 62.4 % for users alone, 70.7 % for both.
    assert found[2] > found[1] + 0.04


def test_what_a_place_likes_is_learnt_from_the_rows_of_all_who_were_there(make_planted, small_config):
    """Which items people like depends on who they are and where; no feature says how."""
    logged, rng = make_planted(num_users=80, num_items=30, rows_per_user=40, seed=3), np.random.default_rng(1)
    user, item = (np.array([int(name[1:]) for name in logged[column].to_pylist()]) for column in ("user_id", "item_id"))
    place = rng.integers(4, size=logged.num_rows)
    taste = rng.normal(0, 1, 80)[user] + np.array([-3.0, -1.0, 1.0, 3.0])[place]
    label = rng.random(logged.num_rows) < 1 / (1 + np.exp(-taste * rng.normal(0, 1, 30)[item]))
    logged = logged.set_column(logged.column_names.index("label"), "label", pa.array(label.astype(np.int8)))
    logged = logged.append_column("place", pa.array([f"p{n}" for n in place]))
    features = [*declared.FEATURES, {"entity": "context", "name": "place", "type": "category"}]
    kinds = [{"name": "user"}, {"name": "where", "entity_column": "place", "support_rows": 200}]
    training = {"max_steps": 30, "tasks_per_step": 16, "outer_lr": 0.01}
    cfg = small_config(features=features, task_kinds=kinds, meta={"support_rows": 16}, training=training)
    encoder = Encoder.fit(logged, cfg)
    network, rows = build_network(cfg, encoder.dims, seed=0), TaskRows.of(logged, encoder, cfg)
    warm_start(network, rows, cfg)
    network, _ = fit(network, cfg.training, network_objective(network, rows, cfg, Workers()))
    specs = as_served(rows, from_us=int(np.median(rows.timestamp_us)), support_rows=16)
    asked = query_rows(rows, specs)
    found = [score_specs(network, rows, specs, others) for others in ({}, embed_others(network, rows, specs))]
    without, together = (mean_per_user_auc(asked.labels, each, asked.users, asked.num_users) for each in found)
    # 51.0 % with the places' prior, 77.1 % with their embeddings.
    assert together > without + 0.1


def test_kinds_start_from_the_share_of_positive_rows(fitted):
    """Each would explain it by itself otherwise, and both together overshoot."""
    cfg, encoder, rows = fitted()
    rows.label[:] = np.arange(len(rows.label)) % 10 == 0
    started, plain = build_network(cfg, encoder.dims, seed=1), build_network(cfg, encoder.dims, seed=1)
    warm_start(started, rows, cfg)
    batch = build_batch(rows, meta_batch(rows, cfg, seed=0, step=0))
    with torch.no_grad():
        moved = started(batch.query, {}) - plain(batch.query, {})
    torch.testing.assert_close(moved, torch.full_like(moved, -np.log(9.0)), atol=0.02, rtol=0)
    assert float(outer_loss(started, batch).loss.detach()) < float(outer_loss(plain, batch).loss.detach())
