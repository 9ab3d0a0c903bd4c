"""The fast engine against the plain reference, and the invariants that batching must keep."""

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from limaml.config import Config
from limaml.features.encoder import EncoderDims
from limaml.meta import engine, reference
from limaml.models.network import build_network

BLOCKS = ("task_vector", "id_mlp", "row_mlp")
INTERACTIONS = ("product", "concat", "both")
# Both sum the same terms in another order; more than this is a term missing.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}


def _gradients(network, loss):
    named = {name: p for name, p in network.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(named.items(), found, strict=True)}


def _assert_gradients_equal(network, tasks, num_steps, second_order, dtype=torch.float64):
    """In `dtype`, against the reference in float64 on the same numbers: ||g-g_ref|| / max(||g_ref||, eps) of each parameter."""
    cast, tasks = copy.deepcopy(network).to(dtype), tasks.to(dtype=dtype)
    ours = engine.outer_loss(cast, tasks, num_steps=num_steps, second_order=second_order)
    network, tasks = copy.deepcopy(cast).double(), tasks.to(dtype=torch.float64)
    loss, embeddings = reference.outer_loss(network, tasks, num_steps=num_steps, second_order=second_order)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(ours.loss.double(), loss, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(ours.embedding_TD.double(), embeddings, rtol=tolerance, atol=tolerance)
    expected = _gradients(network, loss)
    # A gradient of less than a hundredth of the largest can be a difference of terms as large as that, and has their rounding.
    eps = max(g.norm() for g in expected.values()) / 100
    for name, gradient in _gradients(cast, ours.loss).items():
        error = (gradient.double() - expected[name]).norm() / expected[name].norm().clamp(min=eps)
        assert error <= tolerance, f"{name}: {error}"


LENGTHS = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 4)), min_size=1, max_size=4).filter(
    lambda pairs: any(query for _, query in pairs)
)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("second_order", [True, False], ids=["second", "first"])
@pytest.mark.parametrize("block", BLOCKS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(
    lengths=LENGTHS,
    num_steps=st.integers(0, 5),
    seed=st.integers(0, 100),
    interaction=st.sampled_from(INTERACTIONS),
    hidden=st.sampled_from([(4,), (5, 6), ()]),
    learned=st.tuples(st.booleans(), st.booleans()),
    damped=st.booleans(),
    least=st.integers(1, 3),
    at_items=st.booleans(),
    vectors=st.sampled_from(["fitted", "learned"]),
)
def test_engine_equals_reference(
    config,
    network,
    batch,
    block,
    second_order,
    dtype,
    lengths,
    num_steps,
    seed,
    interaction,
    hidden,
    learned,
    damped,
    least,
    at_items,
    vectors,
):
    """Random networks and tasks: every block and interaction, Meta-SGD rates, damping learned, fixed or 0, tasks of 0, 1 and
    many rows (on both sides of where Gram matrices stop paying), padding, tasks that are not adapted, starts at the items."""
    learn_rate, learn_damping = learned
    meta = {"learn_inner_lr": learn_rate, "learn_damping": learn_damping and damped, "min_support_rows": least}
    meta |= {} if damped else {"damping": 0.0, "factor_damping": 0.0}
    start = "items" if at_items and block == "task_vector" and interaction != "concat" else "prior"
    model = {"meta_block": block, "interaction": interaction, "meta_hidden": hidden, "start": start, "item_vectors": vectors}
    net = network(config(model, meta), seed)
    tasks = batch([support for support, _ in lengths], [query for _, query in lengths], seed)
    _assert_gradients_equal(net, tasks, num_steps, second_order, dtype)


BENCHMARKED = {
    "reference": (
        EncoderDims(num_items=50, num_entities=9, item_dense=25, user_dense=36, context=3, item_static=20, item_sets=20),
        {
            "model": {
                "meta_block": "row_mlp",
                "row_age": False,
                "meta_hidden": (64,),
                "embedding_dim": 32,
                "interaction": "concat",
                "global_hidden": (128, 64),
            },
            "meta": {"learn_inner_lr": False, "learn_damping": False, "damping": 0.0, "inner_lr": 0.1},
        },
    ),
    "task_vector": (
        EncoderDims(num_items=1682, num_entities=9, item_dense=23, user_dense=33, context=3, item_static=18, item_sets=18),
        {},
    ),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("second_order", [True, False], ids=["second", "first"])
@pytest.mark.parametrize("model", BENCHMARKED)
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(
    lengths=st.lists(st.tuples(st.sampled_from([0, 1, 3, 16, 70]), st.integers(1, 16)), min_size=2, max_size=4),
    num_steps=st.integers(0, 5),
    seed=st.integers(0, 100),
)
def test_engine_equals_reference_on_the_benchmarked_networks(rows, batch, model, second_order, dtype, lengths, num_steps, seed):
    dims, values = BENCHMARKED[model]
    cfg = Config.model_validate({"source": {"kind": "synthetic"}} | values)
    net = build_network(cfg, dims, seed).double()
    support, query = ([pair[n] for pair in lengths] for n in (0, 1))
    tasks = replace(batch(support, query, seed), support=rows(support, seed, dims=dims), query=rows(query, seed + 1, dims=dims))
    _assert_gradients_equal(net, tasks, num_steps, second_order, dtype)


def test_damping_of_zero_divides_by_the_rows_alone_and_an_empty_support_stays_finite(config, network, batch):
    cfg = config(meta={"damping": 0.0, "factor_damping": 0.0, "learn_damping": False, "learn_inner_lr": False})
    net = network(cfg)
    _assert_gradients_equal(net, batch([3, 0, 1], [2, 2, 2]), 3, True)
    assert not net.log_damping["vector"].requires_grad
    assert torch.equal(net.damping()["vector"], torch.zeros(3, dtype=torch.float64))
    assert not net.log_rates["vector"].requires_grad


def test_a_task_that_starts_at_its_items_reads_no_label(config, network, batch):
    net = network(config({"start": "items"}))
    tasks = batch([3, 0, 5], [2, 2, 2])
    flipped = replace(tasks.support, label_TR=1.0 - tasks.support.label_TR)
    started = engine.embed_tasks(net, tasks.support, tasks.entity_index_T, num_steps=0)
    assert torch.equal(started, engine.embed_tasks(net, flipped, tasks.entity_index_T, num_steps=0))
    assert torch.equal(started[1], net.prior().detach())
    assert not torch.equal(started[0], net.prior().detach())
    assert not torch.equal(
        engine.embed_tasks(net, flipped, tasks.entity_index_T), engine.embed_tasks(net, tasks.support, tasks.entity_index_T)
    )
    mean_K = net.global_block.items(tasks.support)[0, :3].sum(dim=0) / 13.0
    expected_D = net.prior() + torch.cat([10.0 * net.meta.item_scale * mean_K, torch.zeros(1)])
    torch.testing.assert_close(started[0], expected_D.detach())


@pytest.mark.parametrize("model", [{"meta_block": "row_mlp"}, {"meta_block": "task_vector", "interaction": "concat"}])
def test_only_a_task_vector_beside_item_vectors_can_start_at_items(config, model):
    with pytest.raises(ValueError, match='start = "items" needs meta_block = "task_vector"'):
        config({"start": "items"} | model)


def test_a_task_of_too_few_rows_keeps_the_prior(config, network, batch):
    tasks = batch([1, 2, 3], [2, 2, 2])
    net = network(config({"start": "items"}, {"min_support_rows": 3}))
    embedding_TD = engine.embed_tasks(net, tasks.support, tasks.entity_index_T)
    assert torch.equal(embedding_TD[:2], net.prior().detach().expand(2, -1))
    free = network(config({"start": "items"}))
    assert torch.equal(embedding_TD[2], engine.embed_tasks(free, tasks.support, tasks.entity_index_T)[2])


@pytest.mark.parametrize("block", BLOCKS)
def test_embed_tasks_gives_the_embeddings_that_the_outer_loss_scores_with(config, network, batch, block):
    net = network(config({"meta_block": block}))
    tasks = batch([4, 0, 1], [2, 1, 3])
    outer = engine.outer_loss(net, tasks)
    with torch.no_grad():
        embedding = engine.embed_tasks(net, tasks.support, tasks.entity_index_T)
    assert not embedding.requires_grad
    torch.testing.assert_close(embedding, outer.embedding_TD, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("block", "start"), [*((block, "prior") for block in BLOCKS), ("task_vector", "items")])
def test_an_embedding_does_not_depend_on_its_batch(config, network, batch, rows, block, start):
    """In float32, as served: alone and unpadded, or among 300 others (contract 5)."""
    net = network(config({"meta_block": block, "start": start}))
    if start == "items":
        # As long as fitted ones: items of length 1 start a task at a logit of 10 and amplify rounding.
        net.global_block.item.data.mul_(0.1)
    net = net.float()
    lengths = [(7 * task) % 20 for task in range(300)]
    support = rows(lengths, seed=1, padding=11).to(dtype=torch.float32)
    entity = torch.arange(300) % 5
    together = engine.embed_tasks(net, support, entity)
    for task in (0, 1, 17, 299):
        width = max(lengths[task], 1)
        values = {name: getattr(support, name)[task : task + 1, :width] for name in support.__dataclass_fields__}
        alone = engine.embed_tasks(net, replace(support, **values), entity[task : task + 1])
        torch.testing.assert_close(together[task], alone[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("block", BLOCKS)
def test_padding_takes_no_part(config, network, batch, block):
    """Whatever stands in padded rows, and a task without query rows, changes neither loss nor gradient."""
    net = network(config({"meta_block": block}))
    tasks = batch([3, 1, 2], [2, 3, 0])

    def scrambled(rows):
        padding = rows.mask_TR == 0
        values = {n: getattr(rows, n) for n in ("item_dense_TRF", "user_dense_TRF", "context_TRF", "gap_s_TR", "label_TR")}
        changed = {n: torch.where(padding.view(*padding.shape, *[1] * (v.dim() - 2)), v + 50.0, v) for n, v in values.items()}
        return replace(rows, item_index_TR=torch.where(padding, 3, rows.item_index_TR), **changed)

    other = replace(tasks, support=scrambled(tasks.support), query=scrambled(tasks.query))
    first, second = engine.outer_loss(net, tasks), engine.outer_loss(net, other)
    torch.testing.assert_close(first.loss, second.loss, rtol=0, atol=1e-13)
    expected = _gradients(net, first.loss)
    for name, gradient in _gradients(net, second.loss).items():
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=1e-12)


def test_outer_loss_is_the_mean_over_tasks_of_the_mean_over_query_rows(config, network, batch):
    """Not the mean over rows: a task with many query rows counts as much as one with few."""
    net = network(config())
    tasks = batch([3, 2, 5], [1, 6, 0])
    outer = engine.outer_loss(net, tasks, num_steps=1)
    logits = net(tasks.query, outer.embedding_TD)
    terms = torch.nn.functional.softplus(logits) - tasks.query.label_TR * logits
    expected = [terms[0, :1].mean(), terms[1, :6].mean()]
    torch.testing.assert_close(outer.per_task_T, torch.stack([*expected, torch.zeros((), dtype=torch.float64)]).detach())
    torch.testing.assert_close(outer.loss, sum(expected) / 2)
    # As one worker's share of a meta-batch of eight tasks.
    torch.testing.assert_close(engine.outer_loss(net, tasks, num_steps=1, num_tasks=8).loss, sum(expected) / 8)


@pytest.mark.parametrize("block", BLOCKS)
def test_labels_reach_the_meta_block_through_gradients_alone(config, network, batch, block, monkeypatch):
    """The block is handed rows without labels; with no inner step, flipping them changes no embedding."""
    net = network(config({"meta_block": block}))
    tasks = batch([4, 2], [1, 1])
    start, seen = net.meta.start, []
    monkeypatch.setattr(net.meta, "start", lambda at, rows, *rest: (seen.append(rows.label_TR), start(at, rows, *rest))[1])
    flipped = replace(tasks.support, label_TR=1 - tasks.support.label_TR)
    same = [engine.embed_tasks(net, support, tasks.entity_index_T, num_steps=0) for support in (tasks.support, flipped)]
    other = [engine.embed_tasks(net, support, tasks.entity_index_T, num_steps=1) for support in (tasks.support, flipped)]
    assert torch.equal(*same)
    assert not torch.allclose(*other)
    engine.outer_loss(net, tasks)
    assert seen
    assert all(labels is None for labels in seen)


def test_the_inner_loop_leaves_theta_as_it_was(config, network, batch):
    net = network(config({"meta_block": "id_mlp"}))
    before = {name: p.clone() for name, p in net.named_parameters()}
    tasks = batch([4, 2], [1, 1])
    engine.adapt(net, tasks.support, tasks.entity_index_T)
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())


def test_unlabelled_rows_are_refused(config, network, batch):
    net = network(config())
    tasks = batch([2], [2])
    with pytest.raises(ValueError, match="support rows must carry labels"):
        engine.embed_tasks(net, tasks.support.unlabelled(), tasks.entity_index_T)
    with pytest.raises(ValueError, match="query rows must carry labels"):
        engine.outer_loss(net, replace(tasks, query=tasks.query.unlabelled()))


@pytest.mark.parametrize("second_order", [True, False])
@pytest.mark.parametrize("interaction", INTERACTIONS)
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("learned", [True, False])
def test_each_tasks_gradient_is_that_of_its_own_loss(config, network, batch, block, interaction, second_order, learned):
    """Of both blocks, rates and damping: against the reference, one task at a time; their mean is the meta-batch's gradient."""
    meta = {"learn_inner_lr": learned, "learn_damping": learned}
    net = network(config({"meta_block": block, "interaction": interaction}, meta))
    tasks = batch([3, 0, 1, 5], [2, 1, 4, 0])
    found = engine.task_gradients(net, tasks, num_steps=2, second_order=second_order, chunk_tasks=3)
    for task in range(3):
        alone = _only(tasks, task)
        loss, _ = reference.outer_loss(net, alone, num_steps=2, second_order=second_order)
        for name, gradient in _gradients(net, loss).items():
            torch.testing.assert_close(found[name][task], gradient, rtol=1e-9, atol=1e-11)
    assert all(not gradient[3].any() for gradient in found.values())
    whole = engine.outer_loss(net, tasks, num_steps=2, second_order=second_order)
    for name, gradient in _gradients(net, whole.loss).items():
        torch.testing.assert_close(found[name].sum(dim=0) / 3, gradient, rtol=1e-9, atol=1e-11)


def _only(tasks, task):
    def cut(rows):
        return replace(rows, **{name: getattr(rows, name)[task : task + 1] for name in rows.__dataclass_fields__})

    parts = {"entity_index_T": tasks.entity_index_T[task : task + 1], "entities": tasks.entities[task : task + 1]}
    return replace(tasks, support=cut(tasks.support), query=cut(tasks.query), **parts)


@pytest.mark.parametrize("interaction", INTERACTIONS)
def test_task_gradients_see_the_same_dropout(config, network, batch, interaction):
    """In the form that `torch.func` batches, layer by layer, and in the fused one that trains."""
    net = network(config({"dropout": 0.5, "interaction": interaction}))
    tasks = batch([3, 2], [4, 4])
    drawn = [torch.Generator().manual_seed(3) for _ in range(2)]
    found = engine.task_gradients(net, tasks, keep=net.global_block.draw_dropout(tasks.query, drawn[0]))
    for name, gradient in _gradients(net, engine.outer_loss(net, tasks, generator=drawn[1]).loss).items():
        torch.testing.assert_close(found[name].mean(dim=0), gradient, rtol=1e-9, atol=1e-11)


def test_task_gradients_are_clipped_over_all_parameters_before_they_are_summed(config, network, batch):
    net = network(config({"meta_block": "row_mlp"}))
    tasks = batch([3, 2, 4], [2, 1, 0])
    plain = engine.task_gradients(net, tasks)
    norms = torch.stack([g.flatten(1).square().sum(dim=1) for g in plain.values()]).sum(dim=0).sqrt()
    bound = float(norms[:2].mean())
    clipped = engine.task_gradients(net, tasks, max_norm=bound)
    after = torch.stack([g.flatten(1).square().sum(dim=1) for g in clipped.values()]).sum(dim=0).sqrt()
    torch.testing.assert_close(after, norms.clamp(max=bound))
    short, long = int(norms[:2].argmin()), int(norms[:2].argmax())
    for name, gradient in plain.items():
        torch.testing.assert_close(clipped[name][short], gradient[short])
        torch.testing.assert_close(clipped[name][long], gradient[long] * bound / norms[long])
