"""The rivals against plain computations; choices are made on validation users."""

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F

from limaml.evaluation import baselines, trained_baselines
from limaml.evaluation.rival_networks import GlobalMlp, WideDeep
from limaml.evaluation.scoring_method import MethodInput, MethodValidator
from limaml.evaluation.trained_baselines import choose_fit, fit_vectors, score_as_trained, score_with_vectors, train
from limaml.features.encoder import Encoder
from limaml.tasks.protocols import as_served, first_k
from limaml.tasks.sampling import build_batch
from limaml.tasks.splits import split_events


@pytest.fixture
def inputs(planted_logged, small_config):
    cfg = small_config()
    encoder = Encoder.fit(planted_logged, cfg)
    return cfg, encoder, MethodInput.from_logged(planted_logged, encoder, cfg)


def test_the_item_rate_stays_with_its_row_whatever_the_order(planted_logged, inputs):
    cfg, encoder, one = inputs
    shuffled = planted_logged.take(np.random.default_rng(0).permutation(planted_logged.num_rows))
    two = MethodInput.from_logged(shuffled, encoder, cfg)
    np.testing.assert_array_equal(one.item_rate, two.item_rate)
    assert one.item_rate[7] == pytest.approx(planted_logged["item_positive_rate"][7].as_py())


def test_an_item_without_a_snapshot_has_the_prior_rate(planted_logged, inputs):
    cfg, encoder, _ = inputs
    at = planted_logged.schema.get_field_index("item_positive_rate")
    nothing = planted_logged.set_column(at, "item_positive_rate", pa.nulls(planted_logged.num_rows, pa.float32()))
    assert set(MethodInput.from_logged(nothing, encoder, cfg).item_rate) == {0.5}


def test_user_residual_equals_a_plain_loop(inputs):
    _, _, rows = inputs
    specs = first_k(rows.rows, rows.rows.entities, (5,), min_query_rows=3, support_rows=64)[5]
    scores = baselines.user_residual(10.0)(rows, specs)
    expected = []
    for spec in specs:
        support = range(spec.support_start, spec.support_stop)
        residual = sum(float(rows.rows.label[row]) - rows.item_rate[row] for row in support) / (len(support) + 10.0)
        expected += [min(max(rows.item_rate[row] + residual, 0.02), 0.98) for row in spec.query]
    np.testing.assert_allclose(scores, expected, atol=1e-9)


def test_without_support_the_residual_is_the_item_mean(inputs):
    _, _, rows = inputs
    specs = first_k(rows.rows, rows.rows.entities, (0,), min_query_rows=3, support_rows=64)[0]
    np.testing.assert_array_equal(baselines.user_residual(5.0)(rows, specs), baselines.item_mean(rows, specs))


def test_the_shrinkage_is_the_one_that_validates_best(planted_logged, inputs):
    cfg, encoder, _ = inputs
    split = split_events(planted_logged, cfg.evaluation)
    validator = MethodValidator(MethodInput.from_logged(split.validation_rows(planted_logged), encoder, cfg), cfg)
    values = [validator.auc_of(baselines.user_residual(c)) for c in baselines.SHRINKAGES]
    assert len(set(values)) > 1
    chosen = baselines.choose_shrinkage(validator)
    assert validator.auc_of(chosen) == max(values)


def test_what_cannot_be_measured_is_worse_than_anything_that_can(planted_logged, inputs):
    """Validation rows of one class only have no AUC; NaN would win or lose a comparison by its place in it."""
    cfg, encoder, _ = inputs
    at = planted_logged.schema.get_field_index("label")
    ones = planted_logged.set_column(at, planted_logged.schema.field(at), pa.array([1] * planted_logged.num_rows, pa.int8()))
    validator = MethodValidator(MethodInput.from_logged(ones, encoder, cfg), cfg)
    assert validator.auc_of(baselines.item_mean) == -np.inf


def test_the_fit_of_a_new_users_vector_is_the_one_that_validates_best(planted_logged, inputs, monkeypatch):
    cfg, encoder, _ = inputs
    monkeypatch.setattr(trained_baselines, "RATES", (0.1, 1.0))
    monkeypatch.setattr(trained_baselines, "STEPS", (1, 3))
    split = split_events(planted_logged, cfg.evaluation)
    validator = MethodValidator(MethodInput.from_logged(split.validation_rows(planted_logged), encoder, cfg), cfg)
    model, values = WideDeep(cfg, encoder.dims), []
    for rate in (0.1, 1.0):
        fits = [fit_vectors(cfg, model, validator.inputs.rows, specs, rate, (1, 3)) for specs in validator.tasks]
        for steps in (1, 3):
            parts = zip(validator.tasks, fits, strict=True)
            values.append(
                validator.auc([score_with_vectors(model, validator.inputs, specs, fit[steps]) for specs, fit in parts])
            )
    assert len(set(values)) > 1
    assert validator.auc_of(choose_fit(cfg, model, validator)) == max(values)


def test_a_new_users_vector_equals_gradient_descent_task_by_task(inputs):
    cfg, encoder, rows = inputs
    model = WideDeep(cfg, encoder.dims)
    specs = [spec for spec in as_served(rows.rows, from_us=0, support_rows=12) if spec.support_size != 1][:20]
    assert {0, 12} <= {spec.support_size for spec in specs}
    fitted = fit_vectors(cfg, model, rows.rows, specs, rate=0.5, steps=(1, 3))
    before = {name: p.clone() for name, p in model.state_dict().items()}
    for task, spec in enumerate(specs):
        batch = build_batch(rows.rows, [spec])
        vector = model.vectors(batch.entity_index_T).detach()
        for step in range(1, 4):
            at = vector.clone().requires_grad_()
            if spec.support_size:
                logits = model(batch.support, at)
                loss = F.binary_cross_entropy_with_logits(logits, batch.support.label_TR, reduction="sum")
                (loss / (spec.support_size + cfg.meta.damping)).backward()
                vector = vector - 0.5 * at.grad
            if step in fitted:
                # float32, padded to another width.
                torch.testing.assert_close(fitted[step][task], vector[0], atol=1e-5, rtol=1e-4)
    for name, p in model.state_dict().items():
        assert torch.equal(p, before[name])  # the network is frozen


def test_the_global_mlp_reads_no_support_and_no_user(inputs):
    cfg, encoder, rows = inputs
    scores = score_as_trained(GlobalMlp(cfg, encoder.dims))
    tasks = first_k(rows.rows, rows.rows.entities, (0, 5), min_query_rows=3, support_rows=64)
    np.testing.assert_array_equal(scores(rows, tasks[0]), scores(rows, tasks[5]))


def test_a_trained_rival_is_the_step_that_validates_best_and_repeats(planted_logged, inputs):
    cfg, encoder, rows = inputs
    split = split_events(planted_logged, cfg.evaluation)
    validator = MethodValidator(MethodInput.from_logged(split.validation_rows(planted_logged), encoder, cfg), cfg)
    seen = []
    quality = validator.auc
    validator.auc = lambda scores: seen.append(quality(scores)) or seen[-1]
    models = [train(cfg, GlobalMlp(cfg, encoder.dims), rows.rows, validator) for _ in range(2)]
    assert len(seen) == 2 * cfg.evaluation.baseline_steps // cfg.training.validate_every
    assert validator.auc_of(score_as_trained(models[0])) == pytest.approx(max(seen), abs=1e-12)
    for one, two in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(one, two)


def test_a_rivals_loss_is_the_networks(planted_logged, inputs):
    cfg, encoder, rows = inputs
    split = split_events(planted_logged, cfg.evaluation)
    validator = MethodValidator(MethodInput.from_logged(split.validation_rows(planted_logged), encoder, cfg), cfg)
    shares = [cfg.model_copy(update={"meta": cfg.meta.model_copy(update={"pairwise_share": each})}) for each in (0.0, 0.5, 1.0)]
    found = [train(each, GlobalMlp(each, encoder.dims), rows.rows, validator) for each in shares]
    first = [model.global_block.mlp.linears[0].weight.detach().numpy() for model in found]
    assert not np.allclose(first[0], first[1], atol=1e-4)
    assert not np.allclose(first[1], first[2], atol=1e-4)
