"""The full adapted network against a plain loop over tasks and rows, and against stored embeddings."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from experiments.evidence.fit_data import FitData
from experiments.evidence.worlds import Origin
from experiments.methods.full_network import full, full_scores
from experiments.methods.rowwise import full_loss
from limaml.config import Config
from limaml.errors import TrainingError
from limaml.features.encoder import Encoder
from limaml.meta import reference
from limaml.models.blocks import Support
from limaml.models.network import build_network
from limaml.tasks.sampling import TaskRows, TaskSpec, build_batch
from limaml.training import shrinkage
from limaml.training.scoring import score_specs
from limaml.training.twin_and_refit import fit_twin

BLOCKS = ("task_vector", "id_mlp", "row_mlp")


@pytest.fixture
def made(planted_logged, small_config):
    """(network in float64 with no parameter at its first value, rows, specs) of a block; supports of 0 to 12 rows."""

    def make(seed=0, inner_steps=3, **model):
        model = {"item_vectors": "learned", "meta_hidden": [6], "id_dim": 3, "row_age": False, "dropout": 0.0} | model
        slow = {
            "inner_step": "gradient",
            "inner_lr": 0.5,
            "factor_inner_lr": 2.0,
            "damping": 2.0,
            "factor_damping": 3.0,
            "inner_steps": inner_steps,
        }
        cfg = small_config(model=model, meta=slow)
        encoder = Encoder.fit(planted_logged, cfg)
        rows = TaskRows.from_logged(planted_logged, encoder, cfg.task_kind)
        network = build_network(cfg, encoder.dims, seed).double()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_(noise * (0.1 if ".log_" in name else 0.3))
        return network, rows, [_spec(rows, *sizes) for sizes in ((0, 4, 3), (3, 0, 5), (7, 1, 2), (9, 12, 9), (11, 5, 1))]

    return make


def _spec(rows, entity, support, query):
    start = int(rows.offsets[entity])
    stop = start + support
    return TaskSpec(entity, int(rows.timestamp_us[stop]), start, stop, np.arange(stop, stop + query))


def _plain_logits(network, support, query, entity, second_order=True):
    """One task, one row after another, double backward."""
    block, step = network.block("user"), network.step("user")

    def as_support(rows):
        vectors = network.global_block.encode(rows).vectors.get("user", rows.dense[:, :1])[:, :-1]
        zeros = torch.zeros_like(rows.mask_TR)
        return Support(rows.dense, vectors, rows.mask_TR, zeros, zeros, entity)

    def run(phi, rows):
        def one(row):
            alone = replace(rows, **{name: getattr(rows, name)[row : row + 1] for name in rows.__dataclass_fields__})
            return reference.score(network, alone, "user", block.embed(phi, as_support(alone)).unsqueeze(0))

        return torch.cat([one(row) for row in range(len(rows.mask_TR))])

    def loss(phi):
        return F.binary_cross_entropy_with_logits(run(phi, support), support.label_TR, reduction="sum")

    phi, count = block.start(as_support(support)), support.mask_TR.sum()
    if count:
        steps = network.meta_config.inner_steps
        phi = reference.adapt(phi, loss, step.sizes(count), num_steps=steps, second_order=second_order)
    return run(phi, query)


def _plain(network, batch, second_order=True):
    """Every task's query logits."""
    sides = [[reference.real_rows(rows, task) for rows in (batch.support, batch.query)] for task in range(batch.num_tasks)]
    return sides, [
        _plain_logits(network, support, query, batch.entity_index_T[task], second_order)
        for task, (support, query) in enumerate(sides)
    ]


def _gradients(network, loss):
    named = [(name, p) for name, p in network.named_parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
    return {name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(named, found, strict=True)}


@pytest.mark.parametrize(("block", "interaction"), [*itertools.product(BLOCKS, ("product", "concat", "both"))])
@pytest.mark.parametrize("second_order", [True, False])
def test_loss_and_gradients_are_those_of_a_plain_loop(made, block, interaction, second_order):
    network, rows, specs = made(meta_block=block, interaction=interaction)
    batch = build_batch(rows, specs).to(dtype=torch.float64)
    sides, logits = _plain(network, batch, second_order)
    terms = [F.binary_cross_entropy_with_logits(part, query.label_TR) for part, (_, query) in zip(logits, sides, strict=True)]
    expected = torch.stack(terms).mean()
    loss = full_loss(network, batch, second_order=second_order).loss
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-12)
    found = _gradients(network, loss)
    moved = 0
    for name, gradient in _gradients(network, expected).items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-8, atol=1e-11)
        moved += int(gradient.abs().max() > 1e-6)
    assert moved > 6


@pytest.mark.parametrize("hidden", [[6], [5, 4]])
def test_scores_are_those_of_a_plain_loop_in_the_order_of_the_specs(made, hidden):
    network, rows, specs = made(meta_block="row_mlp", meta_hidden=hidden)
    _, logits = _plain(network, build_batch(rows, specs).to(dtype=torch.float64))
    scores = full_scores(network.float(), rows, specs)
    np.testing.assert_allclose(scores, torch.sigmoid(torch.cat(logits)).detach().numpy(), atol=1e-5)


@pytest.mark.parametrize(("block", "interaction"), [*itertools.product(BLOCKS, ("product", "both"))])
def test_full_equals_stored_for_a_task_level_block_and_for_no_other(made, block, interaction):
    network, rows, specs = made(meta_block=block, interaction=interaction)
    network.float()
    apart = np.abs(full_scores(network, rows, specs) - score_specs(network, rows, specs)).max()
    assert apart > 1e-3 if block == "row_mlp" else apart < 1e-5


def test_a_block_that_reads_the_age_of_a_row_is_refused(made):
    network, rows, specs = made(meta_block="row_mlp", row_age=True)
    with pytest.raises(ValueError, match="row_age"):
        full_scores(network.float(), rows, specs)


def _data(cfg, logged, **sections):
    values = cfg.model_dump(mode="json")
    for section, changes in sections.items():
        values[section] |= changes
    cfg = Config.model_validate(values)
    return FitData(cfg, Origin(cfg, logged))


def test_a_fit_learns_and_is_a_function_of_its_seed(planted_logged, small_config):
    def fitted(seed):
        training = {"max_steps": 24, "num_workers": 1, "tasks_per_step": 16, "validate_every": 6, "seed": seed}
        model, evaluation = {"embedding_dim": 3, "meta_block": "row_mlp", "row_age": False}, {"first_k": [0, 3, 6]}
        data = _data(small_config(), planted_logged, training=training, model=model, evaluation=evaluation)
        return data, *full(data)

    (data, score, progress), (_, _, again), (_, _, other) = (fitted(seed) for seed in (0, 0, 1))
    assert progress.best_value == again.best_value != other.best_value
    assert 0.5 < progress.best_value <= 1.0
    assert progress.best_step in (6, 12, 18, 24)
    assert data.validator.auc_of(score) == pytest.approx(progress.best_value, abs=1e-9)


def test_a_task_level_block_fitted_in_full_is_the_stored_network(make_planted, small_config):
    """Trained by either loss, in float32: the same scores up to rounding."""
    training, evaluation = {"max_steps": 4, "tasks_per_step": 8, "num_workers": 1}, {"first_k": [0, 3]}
    model = {"meta_block": "task_vector", "embedding_dim": 3, "dropout": 0.0}
    data = _data(small_config(), make_planted(num_users=60), training=training, model=model, evaluation=evaluation)
    network, _ = fit_twin(data.cfg, data.training.rows, data.encoder.dims, data.network_validator)
    # What is kept whole is not held back after few rows.
    shrinkage.apply_prior_rows(network, {"user.level": 0.0, "user.factors": 0.0})
    specs = data.validator.tasks[-1]
    np.testing.assert_allclose(
        full(data)[0](data.validation, specs), score_specs(network, data.validation.rows, specs), atol=1e-5
    )


def test_a_fit_that_diverges_says_so(planted_logged, small_config):
    training, evaluation = {"max_steps": 3, "tasks_per_step": 8, "num_workers": 1}, {"first_k": [0, 3]}
    meta, model = {"inner_step": "gradient", "inner_lr": 1e30}, {"meta_block": "row_mlp", "row_age": False}
    data = _data(small_config(), planted_logged, training=training, meta=meta, model=model, evaluation=evaluation)
    with pytest.raises(TrainingError, match="must stay finite"):
        full(data)
