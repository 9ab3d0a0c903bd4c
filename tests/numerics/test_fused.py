"""The compiled kernel against the plain reference, built here from its source; and what is left to the portable form."""

import copy
import shutil
import subprocess
from dataclasses import replace

import pytest
import structlog
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from limaml.features.encoder import EncoderDims
from limaml.meta import engine, fused, reference
from limaml.models.network import build_network

# Both sum the same terms in another order; more than this is a term missing.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}
ROW_MLP = {"meta_block": "row_mlp", "interaction": "concat"}
FIXED = {"learn_inner_lr": False, "learn_damping": False}
SMALL = EncoderDims(num_items=5, num_entities=4, item_dense=3, user_dense=2, context=3, item_static=2, item_sets=2)
"""Of the rows that `batch` makes."""


@pytest.fixture(scope="module")
def kernel(tmp_path_factory, request):
    """Built with the flags of the installation, so that no test depends on how the package was installed."""
    source = request.config.rootpath / "limaml/meta/fused.c"
    library = tmp_path_factory.mktemp("fused") / "fused.so"
    flags = ["-O3", "-std=gnu11", "-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    subprocess.run(["cc", *flags, str(source), "-o", str(library), "-lm"], check=True)
    return fused.load(library)


@pytest.fixture
def compiled(kernel):
    with fused.use(kernel):
        yield kernel


def test_the_kernel_is_installed_wherever_there_is_a_compiler():
    assert fused.available() or shutil.which("cc") is None, "not built; run `python setup.py build_ext --inplace` and read why"


def test_a_library_of_another_version_is_refused(tmp_path):
    """Its struct would be read wrongly."""
    (tmp_path / "other.c").write_text(
        "int limaml_fused_call_bytes(void) { return 8; } int limaml_fused_run(void) { return 0; }"
    )
    subprocess.run(["cc", "-shared", "-fPIC", "other.c", "-o", "other.so"], check=True, cwd=tmp_path)
    with pytest.raises(OSError, match="built from another version"):
        fused.load(tmp_path / "other.so")


def test_without_the_kernel_the_portable_form_is_used_and_says_so(config, batch, monkeypatch):
    monkeypatch.setattr(fused, "installed", lambda: None)
    monkeypatch.setattr(engine, "_told", set())
    net, tasks = _make(config, SMALL, {}, {}, 3), batch([3, 1], [2, 4])
    with structlog.testing.capture_logs() as lines:
        ours = engine.outer_loss(net, tasks)
    with engine.portable():
        assert torch.equal(ours.loss, engine.outer_loss(net, tasks).loss)
    assert [line["why_not_compiled"] for line in lines] == ["the kernel is not built or not loaded"]


def _make(config, dims, model, meta, seed):
    """Every parameter random; small, so that five steps through wide layers do not amplify rounding."""
    net = build_network(config(ROW_MLP | model, FIXED | {"inner_lr": 0.2} | meta), dims, seed).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if not name.startswith("log_"):
                parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.1)
    return net


def _gradients(network, loss):
    named = {name: p for name, p in network.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(named.items(), found, strict=True)}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("second_order", [True, False], ids=["second", "first"])
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(
    lengths=st.lists(
        st.tuples(st.sampled_from([0, 1, 2, 5, 9, 16, 40]), st.sampled_from([0, 1, 3, 16])), min_size=1, max_size=9
    ).filter(lambda pairs: any(query for _, query in pairs)),
    widths=st.tuples(*[st.integers(1, 40)] * 4),
    features=st.tuples(st.integers(2, 20), st.integers(1, 20)),
    row_age=st.booleans(),
    damping=st.sampled_from([0.0, 1.5]),
    num_steps=st.integers(0, 5),
    seed=st.integers(0, 100),
    below=st.integers(0, 2),
)
def test_the_kernel_equals_the_reference(
    config, batch, rows, kernel, dtype, second_order, lengths, widths, features, row_age, damping, num_steps, seed, below
):
    """Random widths, odd ones too, with fewer and with more rows than features; every instruction set that this machine has."""
    hidden, dim, *above = widths
    dims = EncoderDims(
        num_items=5, num_entities=4, item_dense=features[0], user_dense=features[1], context=3, item_static=2, item_sets=2
    )
    model = {"meta_hidden": (hidden,), "embedding_dim": dim + 1, "global_hidden": tuple(above), "row_age": row_age}
    net = _make(config, dims, model, {"damping": damping}, seed).to(dtype)
    support, query = ([pair[n] for pair in lengths] for n in (0, 1))
    tasks = replace(batch(support, query, seed), support=rows(support, seed, 2, dims), query=rows(query, seed + 1, 1, dims))
    tasks = tasks.to(dtype=dtype)
    with fused.use(replace(kernel, level=max(kernel.level - below, 0))):
        assert fused.reason(net, (tasks.support, tasks.query), dropout=False) is None
        ours = engine.outer_loss(net, tasks, num_steps=num_steps, second_order=second_order)
        again = engine.embed_tasks(net, tasks.support, tasks.entity_index_T, num_steps=num_steps)
    assert torch.equal(ours.embedding_TD, again)
    truth, tasks = copy.deepcopy(net).double(), tasks.to(dtype=torch.float64)
    loss, embeddings = reference.outer_loss(truth, tasks, num_steps=num_steps, second_order=second_order)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(ours.loss.double(), loss, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(ours.embedding_TD.double(), embeddings, rtol=tolerance, atol=tolerance)
    expected = _gradients(truth, loss)
    # A gradient of less than a hundredth of the largest can be a difference of terms as large as that, and has their rounding.
    eps = max(g.norm() for g in expected.values()) / 100
    for name, gradient in _gradients(net, ours.loss).items():
        error = (gradient.double() - expected[name]).norm() / expected[name].norm().clamp(min=eps)
        assert error <= tolerance, f"{name}: {error}"


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("below", [0, 1, 2])
def test_an_embedding_depends_on_its_own_rows_alone_bit_for_bit(config, rows, kernel, two_threads, below):
    """Alone, among others, unpadded, and on one or two threads (contract 5)."""
    dims = EncoderDims(num_items=5, num_entities=4, item_dense=30, user_dense=31, context=3, item_static=2, item_sets=2)
    model = {"meta_hidden": (64,), "embedding_dim": 32, "global_hidden": (128, 64), "row_age": False}
    net = _make(config, dims, model, {}, 1).float()
    lengths = [(7 * task) % 23 for task in range(60)] + [150, 1, 70]
    support = rows(lengths, seed=1, padding=3, dims=dims).to(dtype=torch.float32)
    entity = torch.zeros(len(lengths), dtype=torch.int64)
    with fused.use(replace(kernel, level=max(kernel.level - below, 0))):
        together = engine.embed_tasks(net, support, entity, num_steps=3)
        torch.set_num_threads(1)
        assert torch.equal(engine.embed_tasks(net, support, entity, num_steps=3), together)
        for task, length in enumerate(lengths):
            values = {name: getattr(support, name)[task : task + 1, : max(length, 1)] for name in support.__dataclass_fields__}
            assert torch.equal(engine.embed_tasks(net, replace(support, **values), entity[:1], num_steps=3)[0], together[task])


def test_the_outer_loss_is_the_portable_one(config, batch, compiled, two_threads):
    """Per task, as a worker's share, scaled on the way back, without a graph, and with threads' gradients summed."""
    net = _make(config, SMALL, {}, {}, 3)
    tasks = batch([4, 0, 1, 9, 3], [2, 1, 0, 5, 30])
    assert fused.reason(net, (tasks.support, tasks.query), dropout=False) is None
    ours = engine.outer_loss(net, tasks, num_tasks=8)
    with engine.portable():
        theirs = engine.outer_loss(net, tasks, num_tasks=8)
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(ours.per_task_T, theirs.per_task_T, rtol=1e-12, atol=0)
    expected = _gradients(net, 3 * theirs.loss)
    for name, gradient in _gradients(net, 3 * ours.loss).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-12)
    with torch.no_grad():
        unseen = engine.outer_loss(net, tasks, num_tasks=8)
    assert not unseen.loss.requires_grad
    assert torch.equal(unseen.loss, ours.loss)


@pytest.mark.parametrize("side", ["support", "query"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_rows_that_are_not_finite_give_such_a_loss_and_leave_other_tasks_alone(config, batch, compiled, side, value):
    net = _make(config, SMALL, {}, {}, 3)
    tasks = batch([4, 3, 2], [2, 2, 2])
    assert fused.reason(net, (tasks.support, tasks.query), dropout=False) is None
    right = engine.outer_loss(net, tasks).per_task_T
    getattr(tasks, side).user_dense_TRF[1, 0, 0] = value
    wrong = engine.outer_loss(net, replace(tasks, support=replace(tasks.support), query=replace(tasks.query)))
    with engine.portable():
        portable = engine.outer_loss(net, replace(tasks, support=replace(tasks.support), query=replace(tasks.query)))
    assert not portable.loss.isfinite()
    assert not wrong.loss.isfinite()
    assert wrong.per_task_T.isfinite().tolist() == [True, False, True]
    assert torch.equal(wrong.per_task_T[::2], right[::2])


def _holes(rows):
    return replace(rows, mask_TR=rows.mask_TR.flip(1))


LEFT = {
    "rates or damping are learned": ({}, {"learn_inner_lr": True}),
    "the global block is not a concatenation with two hidden layers": ({"interaction": "product"}, {}),
    "dropout is on": ({"dropout": 0.5}, {}),
    "the meta block is not a row MLP of one hidden layer": ({"meta_hidden": (4, 4)}, {}),
    "padding stands before a row": ({}, {}),
    "a layer's weights have different rates": ({}, {}),
}


@pytest.mark.parametrize("why", LEFT)
def test_what_the_kernel_cannot_do_is_left_to_the_portable_form_with_a_log_line(config, batch, compiled, monkeypatch, why):
    model, meta = LEFT[why]
    net, tasks = _make(config, SMALL, model, meta, 3), batch([3, 1], [2, 4])
    if why == "a layer's weights have different rates":
        net.log_rates["weight0"].data[0, 0] += 0.5
    if why == "padding stands before a row":
        tasks = replace(tasks, support=_holes(tasks.support))
    monkeypatch.setattr(engine, "_told", set())
    with structlog.testing.capture_logs() as lines:
        ours = engine.outer_loss(net, tasks, generator=torch.Generator().manual_seed(1))
    with engine.portable():
        theirs = engine.outer_loss(net, tasks, generator=torch.Generator().manual_seed(1))
    assert torch.equal(ours.loss, theirs.loss)
    assert [(line["form"], line["why_not_compiled"]) for line in lines] == [("portable", why)]


def test_the_form_in_use_is_logged_once(config, batch, compiled, monkeypatch):
    net, tasks = _make(config, SMALL, {}, {}, 3), batch([3, 1], [2, 4])
    monkeypatch.setattr(engine, "_told", set())
    with structlog.testing.capture_logs() as lines:
        for _ in range(2):
            engine.outer_loss(net, tasks)
    assert [line["form"] for line in lines] == ["compiled"]
