"""The fast engine against the plain reference, and the invariants that batching must keep."""

import copy
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from limaml.config import load
from limaml.features.encoder import EncoderDims
from limaml.meta import engine, reference
from limaml.models.inner_step import NewtonStep
from limaml.models.network import build_network

BLOCKS = {
    "task_vector": {"meta_block": "task_vector"},
    "posterior": {"meta_block": "posterior"},
    "id_mlp": {"meta_block": "id_mlp"},
    "row_mlp": {"meta_block": "row_mlp"},
    "sequence-all": {"meta_block": "sequence", "sequence_adapts": "all"},
    "sequence-last": {"meta_block": "sequence", "sequence_adapts": "last"},
    "sequence-bias": {"meta_block": "sequence", "sequence_adapts": "bias"},
    "set": {"meta_block": "set"},
    "hybrid": {"meta_block": "hybrid"},
}
POOL = {"pool_half_life_days": 0.5}
POOLED = {f"{name}-pool": BLOCKS[name] | POOL for name in ("task_vector", "sequence-last", "set")}
READ_LABELS = ("sequence", "set", "hybrid")
INTERACTIONS = ("product", "concat", "both")
STEPS = ("gradient", "newton")
# Both sum the same terms in another order; more than this is a term missing.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}
PER_CONDITION = 10
"""Newton's steps solve systems, and a solution is off by its system's condition times the rounding error (Higham 2002, theorem
10.4). A random network's widths are measured on twelve rows, on which units of an adapted MLP may hardly be active; the step
that wakes one meets a condition of 3e4, where the plain loop in float32 is off by 1.3e-4 and the engine by 9e-4. Of 490
draws of MLPs three are off by more than 1e-4: two by at most 2.5 times this share, gradients included, and one whose gradient
is as far off in the plain loop."""


def _gradients(network, loss):
    named = {name: p for name, p in network.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(named.items(), found, strict=True)}


def _assert_equal(network, tasks, num_steps, second_order, dtype=torch.float64):
    """In `dtype`, against the reference in float64 on the same numbers: ||g-g_ref|| / max(||g_ref||, eps) of each parameter.

    The reference has Newton's steps in second order alone: in first order their values are the same, and their gradients are
    not compared. What their systems amplify is allowed for, as measured in float64.
    """
    cast, tasks = copy.deepcopy(network).to(dtype), tasks.to(dtype=dtype)
    ours = engine.outer_loss(cast, tasks, num_steps=num_steps, second_order=second_order)
    network, tasks = copy.deepcopy(cast).double(), tasks.to(dtype=torch.float64)
    with _conditions(network) as conditions:
        loss, embeddings = reference.outer_loss(network, tasks, num_steps=num_steps, second_order=second_order)
    tolerance = max(TOLERANCE[dtype], PER_CONDITION * torch.finfo(dtype).eps * max(conditions, default=1.0))
    torch.testing.assert_close(ours.loss.double(), loss, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(ours.embedding_TD.double(), embeddings, rtol=tolerance, atol=tolerance)
    if isinstance(network.step("user"), NewtonStep) and not second_order:
        return
    expected = _gradients(network, loss)
    # A gradient of less than a hundredth of the largest can be a difference of terms as large as that, and has their rounding.
    eps = max(g.norm() for g in expected.values()) / 100

    def errors(found):
        return {n: (g.double() - expected[n]).norm() / expected[n].norm().clamp(min=eps) for n, g in found.items()}

    wrong = {name: error for name, error in errors(_gradients(cast, ours.loss)).items() if error > tolerance}
    if wrong and dtype == torch.float32:
        # Five steps of a row block amplify rounding to 1.3e-4 in the plain loop, too: then twice its own error is allowed.
        plain = copy.deepcopy(network).to(dtype)
        again, _ = reference.outer_loss(plain, tasks.to(dtype=dtype), num_steps=num_steps, second_order=second_order)
        own = errors(_gradients(plain, again))
        wrong = {name: error for name, error in wrong.items() if error > min(2 * own[name], 10 * tolerance)}
    assert not wrong


@contextmanager
def _conditions(network):
    """Largest eigenvalues of the systems that the reference solves meanwhile, in units of the prior: the least is 1 or more."""
    step, found, solve = network.step("user"), [], torch.linalg.solve

    def recorded(system_PP, right_P):
        scale_P = torch.cat([step.scales()[name].expand(rates.numel()) for name, rates in step.log_rates.items()])
        found.append(float(torch.linalg.eigvalsh((scale_P[:, None] * system_PP * scale_P).detach())[-1]))
        return solve(system_PP, right_P)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.linalg, "solve", recorded)
        yield found


class Case(NamedTuple):
    """What every comparison draws."""

    lengths: list[tuple[int, int]]
    """Support and query rows of each task."""
    num_steps: int
    second_order: bool
    seed: int
    interaction: str
    least: int

    def tasks(self, batch):
        return batch([support for support, _ in self.lengths], [query for _, query in self.lengths], self.seed)


CASES = st.builds(
    Case,
    lengths=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 4)), min_size=1, max_size=4).filter(
        lambda pairs: any(query for _, query in pairs)
    ),
    num_steps=st.integers(0, 5),
    second_order=st.booleans(),
    seed=st.integers(0, 100),
    interaction=st.sampled_from(INTERACTIONS),
    least=st.integers(1, 3),
)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("inner_step", STEPS)
@pytest.mark.parametrize("block", BLOCKS)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(
    case=CASES,
    hidden=st.sampled_from([(4,), (5, 6), ()]),
    learned=st.tuples(st.booleans(), st.booleans()),
    damped=st.booleans(),
    at_items=st.booleans(),
    vectors=st.sampled_from(["fitted", "learned"]),
)
def test_engine_equals_reference(
    config, network, batch, block, inner_step, dtype, case, hidden, learned, damped, at_items, vectors
):
    """Random networks and tasks: every block, interaction and inner step, both orders, rates and damping learned, fixed or 0,
    tasks of 0, 1 and many rows (on both sides of where Newton's system is solved in the space of rows), padding, tasks that
    are not adapted, starts at the items."""
    learn_rate, learn_damping = learned
    meta = {"learn_inner_lr": learn_rate, "learn_damping": learn_damping and damped, "min_support_rows": case.least}
    meta |= {"inner_step": inner_step} | ({} if damped else {"damping": 0.0, "factor_damping": 0.0})
    start = "items" if at_items and block in ("task_vector", "posterior") and case.interaction != "concat" else "prior"
    model = BLOCKS[block] | {"interaction": case.interaction, "meta_hidden": hidden, "start": start, "item_vectors": vectors}
    net = network(config(model, meta), case.seed)
    _assert_equal(net, case.tasks(batch), case.num_steps, case.second_order, dtype)


@pytest.mark.parametrize("inner_step", STEPS)
@pytest.mark.parametrize("block", POOLED)
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(case=CASES)
def test_engine_equals_reference_with_a_pool(config, network, batch, block, inner_step, case):
    meta = {"inner_step": inner_step, "min_support_rows": case.least}
    net = network(config(POOLED[block] | {"interaction": case.interaction}, meta), case.seed)
    _assert_equal(net, case.tasks(batch), case.num_steps, case.second_order)


SHIPPED = {"task_vector": "configs/movielens.toml", "paper": "configs/paper.toml"}
SHIPPED_DIMS = EncoderDims(
    num_items=1682, num_entities=9, item_dense=23, user_dense=33, context=3, item_static=18, item_sets=18
)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("second_order", [True, False], ids=["second", "first"])
@pytest.mark.parametrize("model", SHIPPED)
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(
    lengths=st.lists(st.tuples(st.sampled_from([0, 1, 3, 16, 70]), st.integers(1, 16)), min_size=2, max_size=4),
    num_steps=st.integers(0, 5),
    seed=st.integers(0, 100),
)
def test_engine_equals_reference_on_what_ships(rows, batch, model, second_order, dtype, lengths, num_steps, seed):
    dims = SHIPPED_DIMS
    net = build_network(load(SHIPPED[model]), dims, seed).double()
    support, query = ([pair[n] for pair in lengths] for n in (0, 1))
    tasks = replace(batch(support, query, seed), support=rows(support, seed, dims=dims), query=rows(query, seed + 1, dims=dims))
    _assert_equal(net, tasks, num_steps, second_order, dtype)


def test_damping_of_zero_divides_by_the_rows_alone_and_an_empty_support_stays_finite(config, network, batch):
    cfg = config(
        meta={"inner_step": "gradient", "damping": 0.0, "factor_damping": 0.0, "learn_damping": False, "learn_inner_lr": False}
    )
    net = network(cfg)
    _assert_equal(net, batch([3, 0, 1], [2, 2, 2]), 3, True)
    step = net.step("user")
    assert not any(p.requires_grad for p in step.parameters())
    for name, size in step.sizes(torch.tensor(4.0, dtype=torch.float64)).items():
        torch.testing.assert_close(size, step.log_rates[name].exp() / 4.0)


@pytest.mark.parametrize("block", BLOCKS)
def test_first_order_of_newton_gives_the_same_values_and_another_gradient(config, network, batch, block):
    net = network(config(BLOCKS[block], {"inner_step": "newton"}))
    tasks = batch([4, 0, 1], [2, 1, 3])
    second, first = (engine.outer_loss(net, tasks, num_steps=2, second_order=order) for order in (True, False))
    assert torch.equal(first.loss, second.loss)
    assert torch.equal(first.embedding_TD, second.embedding_TD)
    mine, other = _gradients(net, first.loss), _gradients(net, second.loss)
    same = all(torch.allclose(mine[name], other[name], rtol=1e-3, atol=1e-6) for name in mine)
    assert same == (block == "set")
    # What scores the query alone has its gradient in either order.
    output = "global_block.mlp.layers.2.bias"
    assert mine[output].abs() > 0


def test_a_task_that_starts_at_its_items_reads_no_label(config, network, batch):
    net = network(config({"start": "items"}))
    tasks = batch([3, 0, 5], [2, 2, 2])
    flipped = replace(tasks.support, label_TR=1.0 - tasks.support.label_TR)
    started, again = (_embed(net, tasks, support, num_steps=0) for support in (tasks.support, flipped))
    prior = net.priors()["user"].detach()
    assert torch.equal(started, again)
    assert torch.equal(started[1], prior)
    assert not torch.equal(started[0], prior)
    assert not torch.equal(_embed(net, tasks, flipped), _embed(net, tasks))
    items = net.global_block.items(tasks.support.item_index_TR, tasks.support.item_dense_TRF)
    mean_K = items[0, :3].sum(dim=0) / 13.0
    expected_D = prior + torch.cat([10.0 * net.block("user").item_scale * mean_K, torch.zeros(1)])
    torch.testing.assert_close(started[0], expected_D.detach())


def _embed(net, tasks, support=None, **steps):
    return engine.embed_tasks(net, "user", support or tasks.support, tasks.entity_index_T, **steps)


@pytest.mark.parametrize("model", [{"meta_block": "row_mlp"}, {"meta_block": "task_vector", "interaction": "concat"}])
def test_only_a_task_vector_beside_item_vectors_can_start_at_items(config, model):
    with pytest.raises(ValueError, match='start = "items" needs meta_block = "task_vector" or "posterior"'):
        config({"start": "items"} | model)


@pytest.mark.parametrize("inner_step", STEPS)
@pytest.mark.parametrize(
    ("block", "start"), [*((block, "prior") for block in BLOCKS), ("task_vector", "items"), ("posterior", "items")]
)
def test_a_task_of_too_few_rows_keeps_the_prior(config, network, batch, block, start, inner_step):
    tasks = replace(batch([1, 2, 3], [2, 2, 2]), entity_index_T=torch.zeros(3, dtype=torch.long))
    model = BLOCKS[block] | {"start": start}
    net = network(config(model, {"min_support_rows": 3, "inner_step": inner_step}))
    embedding_TD = _embed(net, tasks)
    # The mean over the rows of a block and the prior are the same numbers by other sums.
    torch.testing.assert_close(embedding_TD[:2], net.priors()["user"].detach().expand(2, -1), rtol=0, atol=1e-14)
    free = network(config(model, {"inner_step": inner_step}))
    assert torch.equal(embedding_TD[2], _embed(free, tasks)[2])
    assert not torch.allclose(embedding_TD[:2], _embed(free, tasks)[:2], rtol=0, atol=1e-3)


@pytest.mark.parametrize("block", BLOCKS)
def test_embed_tasks_gives_the_embeddings_that_the_outer_loss_scores_with(config, network, batch, block):
    net = network(config(BLOCKS[block]))
    tasks = batch([4, 0, 1], [2, 1, 3])
    outer = engine.outer_loss(net, tasks)
    embedding = _embed(net, tasks)
    assert not embedding.requires_grad
    torch.testing.assert_close(embedding, outer.embedding_TD, rtol=0, atol=1e-10)


@pytest.mark.parametrize("inner_step", STEPS)
@pytest.mark.parametrize(("block", "start"), [*((block, "prior") for block in BLOCKS | POOLED), ("task_vector", "items")])
def test_an_embedding_does_not_depend_on_its_batch(config, network, rows, block, start, inner_step):
    """In float32, as served: alone and unpadded, or among 149 others (contract 5)."""
    net = network(config((BLOCKS | POOLED)[block] | {"start": start}, {"inner_step": inner_step}))
    # As long as fitted ones: items of length 1 start a task at a logit of 10 and amplify rounding.
    net.global_block.items.item.data.mul_(0.1)
    net = net.float()
    # Embeddings are longer than 1 here, where float32's rounding is relative; Newton steps on all of a random transformer's
    # weights amplify it 100 times and more, measured by a change of the weights of 1e-9 in float64.
    tolerance = 1e-5 if (block, inner_step) == ("sequence-all", "newton") else 1e-6
    lengths = [(7 * task) % 20 for task in range(150)]
    support = rows(lengths, seed=1, padding=11).to(dtype=torch.float32)
    entity = torch.arange(150) % 5
    together = engine.embed_tasks(net, "user", support, entity)
    for task in (0, 1, 17, 149):
        width = max(lengths[task], 1)
        values = {name: getattr(support, name)[task : task + 1, :width] for name in support.__dataclass_fields__}
        alone = engine.embed_tasks(net, "user", replace(support, **values), entity[task : task + 1])
        torch.testing.assert_close(together[task], alone[0], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("inner_step", STEPS)
@pytest.mark.parametrize("block", BLOCKS | POOLED)
def test_padding_takes_no_part(config, network, batch, block, inner_step):
    """Whatever stands in padded rows, and a task without query rows, changes neither loss nor gradient."""
    net = network(config((BLOCKS | POOLED)[block], {"inner_step": inner_step}))
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
    logits = net(tasks.query, {"user": outer.embedding_TD})
    terms = torch.nn.functional.softplus(logits) - tasks.query.label_TR * logits
    expected = [terms[0, :1].mean(), terms[1, :6].mean()]
    torch.testing.assert_close(outer.per_task_T, torch.stack([*expected, torch.zeros((), dtype=torch.float64)]).detach())
    torch.testing.assert_close(outer.loss, sum(expected) / 2)
    # As one worker's share of a meta-batch of eight tasks.
    torch.testing.assert_close(engine.outer_loss(net, tasks, num_steps=1, num_tasks=8).loss, sum(expected) / 8)


@pytest.mark.parametrize("block", [name for name, model in BLOCKS.items() if model["meta_block"] not in READ_LABELS])
def test_labels_reach_a_block_that_does_not_read_them_through_gradients_alone(config, network, batch, block, monkeypatch):
    """The block is handed zeros for labels; with no inner step, flipping them changes no embedding."""
    net = network(config(BLOCKS[block]))
    tasks = batch([4, 2], [1, 1])
    read, seen = net.block("user").read, []
    monkeypatch.setattr(net.block("user"), "read", lambda support: (seen.append(support.label_S), read(support))[1])
    flipped = replace(tasks.support, label_TR=1 - tasks.support.label_TR)
    same = [_embed(net, tasks, support, num_steps=0) for support in (tasks.support, flipped)]
    other = [_embed(net, tasks, support, num_steps=1) for support in (tasks.support, flipped)]
    assert torch.equal(*same)
    assert not torch.allclose(*other)
    assert len(seen) == 4
    state = net.global_block.encode(tasks.support)
    handed = engine.supports(net, "user", tasks.support, tasks.entity_index_T, state)
    assert not handed.label_S.any()


def test_labels_reach_a_block_that_reads_them(config, network, batch):
    for model in (*({"meta_block": block} for block in READ_LABELS), POOLED["task_vector-pool"]):
        net = network(config(model))
        tasks = batch([4, 2], [1, 1])
        state = net.global_block.encode(tasks.support)
        handed = engine.supports(net, "user", tasks.support, tasks.entity_index_T, state)
        assert torch.equal(handed.label_S, tasks.support.label_TR)
        flipped = replace(tasks.support, label_TR=1 - tasks.support.label_TR)
        assert not torch.allclose(_embed(net, tasks, num_steps=0), _embed(net, tasks, flipped, num_steps=0))


@pytest.mark.parametrize("inner_step", STEPS)
@pytest.mark.parametrize("block", BLOCKS)
def test_the_inner_loop_leaves_theta_as_it_was(config, network, batch, block, inner_step):
    net = network(config(BLOCKS[block], {"inner_step": inner_step}))
    before = {name: p.clone() for name, p in net.state_dict().items()}
    tasks = batch([4, 2], [1, 1])
    engine.adapt(net, "user", tasks.support, tasks.entity_index_T)
    assert all(torch.equal(p, before[name]) for name, p in net.state_dict().items())


def test_unlabelled_rows_are_refused(config, network, batch):
    net = network(config())
    tasks = batch([2], [2])
    with pytest.raises(ValueError, match="support rows must carry labels"):
        _embed(net, tasks, replace(tasks.support, label_TR=None))
    with pytest.raises(ValueError, match="query rows must carry labels"):
        engine.outer_loss(net, replace(tasks, query=replace(tasks.query, label_TR=None)))


@pytest.mark.parametrize("second_order", [True, False], ids=["second", "first"])
@pytest.mark.parametrize("inner_step", STEPS)
@pytest.mark.parametrize("interaction", INTERACTIONS)
@pytest.mark.parametrize("block", BLOCKS)
def test_each_tasks_gradient_is_that_of_its_own_loss(config, network, batch, block, interaction, inner_step, second_order):
    """Of both blocks, rates and damping, one task at a time: of the reference, or of the engine where that has no first order;
    their mean is the meta-batch's gradient."""
    net = network(config(BLOCKS[block] | {"interaction": interaction}, {"inner_step": inner_step}))
    order = {"num_steps": 2, "second_order": second_order}
    tasks = batch([3, 0, 1, 5], [2, 1, 4, 0])
    found = engine.task_gradients(net, tasks, chunk_tasks=3, **order)
    for task in range(3):
        alone = _only(tasks, task)
        if second_order or not isinstance(net.step("user"), NewtonStep):
            loss, _ = reference.outer_loss(net, alone, **order)
        else:
            loss = engine.outer_loss(net, alone, **order).loss
        for name, gradient in _gradients(net, loss).items():
            torch.testing.assert_close(found[name][task], gradient, rtol=1e-9, atol=1e-11)
    assert all(not gradient[3].any() for gradient in found.values())
    whole = engine.outer_loss(net, tasks, **order)
    for name, gradient in _gradients(net, whole.loss).items():
        torch.testing.assert_close(found[name].sum(dim=0) / 3, gradient, rtol=1e-9, atol=1e-11)


def _only(tasks, task):
    def cut(rows):
        return replace(rows, **{name: getattr(rows, name)[task : task + 1] for name in rows.__dataclass_fields__})

    parts = {"entity_index_T": tasks.entity_index_T[task : task + 1], "entities": tasks.entities[task : task + 1]}
    return replace(tasks, support=cut(tasks.support), query=cut(tasks.query), **parts)


@pytest.mark.parametrize("interaction", INTERACTIONS)
def test_task_gradients_see_the_same_dropout(config, network, batch, interaction):
    net = network(config({"dropout": 0.5, "interaction": interaction}))
    tasks = batch([3, 2], [4, 4])
    drawn = [torch.Generator().manual_seed(3) for _ in range(2)]
    found = engine.task_gradients(net, tasks, keep=net.global_block.draw_dropout(tasks.query, drawn[0]))
    plain = engine.task_gradients(net, tasks)
    for name, gradient in _gradients(net, engine.outer_loss(net, tasks, generator=drawn[1]).loss).items():
        torch.testing.assert_close(found[name].mean(dim=0), gradient, rtol=1e-9, atol=1e-11)
    assert any(not torch.allclose(found[name], plain[name]) for name in found)


def _norms(gradients):
    return torch.stack([g.reshape(len(g), -1).square().sum(dim=1) for g in gradients.values()]).sum(dim=0).sqrt()


@pytest.mark.parametrize("block", ["posterior", "row_mlp", "sequence-last", "hybrid"])
def test_task_gradients_are_clipped_over_all_parameters_before_they_are_summed(config, network, batch, block):
    net = network(config(BLOCKS[block]))
    tasks = batch([3, 2, 4], [2, 1, 0])
    plain = engine.task_gradients(net, tasks)
    norms = _norms(plain)
    bound = float(norms[:2].mean())
    clipped = engine.task_gradients(net, tasks, max_norm=bound)
    after = _norms(clipped)
    torch.testing.assert_close(after, norms.clamp(max=bound))
    short, long = int(norms[:2].argmin()), int(norms[:2].argmax())
    for name, gradient in plain.items():
        torch.testing.assert_close(clipped[name][short], gradient[short])
        torch.testing.assert_close(clipped[name][long], gradient[long] * bound / norms[long])


@pytest.mark.parametrize("interaction", INTERACTIONS)
def test_the_level_of_rows_whose_embedding_is_not_given_is_their_priors(config, network, batch, interaction):
    net = network(config({"interaction": interaction}))
    rows = batch([1, 1], [3, 2]).query
    assert torch.equal(net(rows, {}), net(rows, {"user": net.priors()["user"].expand(2, -1)}))
