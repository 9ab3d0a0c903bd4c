"""docs/extend.md, run as it stands: what each example defines is trained, stored, ingested, and held to the engine."""

import copy
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import date, timedelta
from itertools import product
from pathlib import Path
from types import CodeType
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from structlog.testing import capture_logs
from torch import Tensor

from limaml import schema
from limaml.config import Config, FeatureConfig, ModelConfig, SourceConfig
from limaml.config.names import FEATURE_TYPES, META_BLOCKS, SOURCE_KINDS
from limaml.errors import BundleError, ConfigError, GateError
from limaml.events import sources
from limaml.events.ingest import ingest_day, ingest_history
from limaml.events.logged import read_logged
from limaml.events.synthetic import SyntheticSource
from limaml.features import columns
from limaml.io.storage import Storage
from limaml.meta import accelerators, engine, reference
from limaml.models import blocks, bundle
from limaml.models.network import Network
from limaml.schema import declared as stored_types
from limaml.tasks.rows import Rows, TaskBatch
from limaml.tasks.sampling import TaskRows, build_batch, sample_tasks
from limaml.training.candidate import BUNDLE
from tests.contracts.small_world import config_of, train
from tests.numerics.conftest import make_batch, make_config, make_network

PAGE = Path(__file__).parents[2] / "docs" / "extend.md"
TODAY = date(2026, 3, 2)
MOST_LINES = 40
"""Of a block."""
# Another order of the same sums; more than this is a term missing.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}
REGISTRIES = [
    (blocks, "BLOCKS"),
    (columns, "_ENCODERS"),
    (stored_types, "_TYPES"),
    (sources, "SOURCES"),
    (accelerators, "ACCELERATORS"),
    *((names, "_known") for names in (META_BLOCKS, FEATURE_TYPES, SOURCE_KINDS)),
]

Section = Mapping[str, Any]


def code_of(title: str) -> list[str]:
    """The Python below a heading of the page, one text a fence."""
    [body] = re.findall(rf"^## {title}\n(.*?)(?=^## |\Z)", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    found = re.findall(r"^```python\n(.*?)^```", body, re.MULTILINE | re.DOTALL)
    assert len(found) == 2, f"{title}: the example, and its registration"
    return found


def run(title: str) -> Section:
    namespace: dict[str, Any] = {"__name__": "extension"}
    for text in code_of(title):
        code: CodeType = compile(text, f"{PAGE.name}, {title}", "exec")
        exec(code, namespace)  # the page's own text
    return namespace


@pytest.fixture(scope="module")
def page() -> Iterator[dict[str, Section]]:
    """What each section defines, registered for this module only."""
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in REGISTRIES:
            patch.setattr(owner, name, copy.copy(getattr(owner, name)))
        yield {title: run(title) for title in ("A meta block", "A feature type", "An accelerator", "A source")}


@pytest.fixture(scope="module")
def delivered(page: dict[str, Section], tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Path]:
    """A generated world as a click log delivers it, with two features of the page's type."""
    folder = tmp_path_factory.mktemp("extend")
    cfg = config_of(folder)
    made = {"entity": "user", "name": "income", "type": "rank"}, {"entity": "item", "name": "price", "type": "rank"}
    features = tuple(f for f in cfg.features if f.name != "year") + tuple(FeatureConfig.model_validate(f) for f in made)
    source, log = SyntheticSource(cfg.source), folder / "log"
    users, items = source.moved(sources.week_shift(source.days()[-1], TODAY)).catalogue()
    write(log / "users.jsonl", users.append_column("income", pa.array(skewed(users.num_rows, every=4))).to_pylist())
    write(log / "items.jsonl", items.append_column("price", pa.array(skewed(items.num_rows, every=5))).to_pylist())
    moved = source.moved(sources.week_shift(source.days()[-1], TODAY))
    for day in moved.days()[:12]:
        write(log / "days" / f"{day}.jsonl", [clicked(row) for row in moved.read_day(day).to_pylist()])
    own = {"kind": "click_log", "path": str(log), "min_rows_ratio": 0.01, "licence": "CC0-1.0"}
    return cfg.model_copy(update={"features": features, "source": SourceConfig.model_validate(own)}), log


def skewed(count: int, every: int) -> list[float | None]:
    """Prices, of which every so many is not known."""
    return [None if at % every == 0 else float(np.exp(at % 7)) for at in range(count)]


def clicked(row: Mapping[str, Any]) -> dict[str, Any]:
    named = {"id": row["event_id"], "who": row["user_id"], "what": row["item_id"]}
    return named | {"at": int(row["timestamp"].timestamp()), "clicked": row["label"]}


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def ingested(delivered: tuple[Config, Path]) -> tuple[Config, pa.Table]:
    """The world after its gates, and its logged rows."""
    cfg, _ = delivered
    days = sources.open_source(cfg, TODAY).days()
    assert ingest_history(cfg, days[9], TODAY)["days"] == 10
    assert ingest_day(cfg, days[10], TODAY)["status"] == "ingested"
    return cfg, read_logged(Storage(cfg.storage.root), schema.tables(cfg.features), through=days[10])


@pytest.fixture(scope="module")
def trained(ingested: tuple[Config, pa.Table], tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Path]:
    """A candidate with the page's block, of rows with its feature type from its source: the folder of the bundle."""
    cfg, logged = ingested
    model = ModelConfig.model_validate(cfg.model.model_dump() | {"meta_block": "low_rank"})
    cfg = cfg.model_copy(update={"model": model})
    last = max(logged["timestamp"].to_pylist()).date()
    return cfg, train(cfg, last, tmp_path_factory.mktemp("trained") / "candidate") / BUNDLE


def test_the_block_of_the_page_is_short() -> None:
    assert len(code_of("A meta block")[0].splitlines()) <= MOST_LINES


def test_a_block_is_trained_stored_and_loaded(page: dict[str, Section], trained: tuple[Config, Path]) -> None:
    cfg, folder = trained
    found = bundle.load(folder)
    block = found.network.block("user")
    assert isinstance(block, page["A meta block"]["LowRank"])
    fresh = blocks.build_block(cfg.model, found.encoder.dims)
    assert not torch.equal(block.code, torch.zeros_like(block.code)), "the code was trained"
    assert block.basis.shape == fresh.state_dict()["basis"].shape
    torch.testing.assert_close(found.prior["user"], block.prior().detach())


def test_a_block_embeds_and_is_differentiated_as_the_reference_is(
    ingested: tuple[Config, pa.Table], trained: tuple[Config, Path]
) -> None:
    cfg, folder = trained
    model = bundle.load(folder).refit
    network, rows = model.network.double(), TaskRows.of(ingested[1], model.encoder, cfg)
    specs = sample_tasks(rows, cfg, np.random.default_rng(0), 6)
    batch = build_batch(rows, specs).to(dtype=torch.float64)
    loss, embedding_TD = reference.outer_loss(network, batch, num_steps=2, second_order=True)
    outer = engine.outer_loss(network, batch, num_steps=2, second_order=True)
    torch.testing.assert_close(outer.embedding_TD, embedding_TD, rtol=0, atol=TOLERANCE[torch.float64])
    for found, expected in zip(gradients(network, outer.loss), gradients(network, loss), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=TOLERANCE[torch.float64])
    moved = engine.embed_tasks(network, "user", batch.support, batch.entity_index_T) - network.block("user").prior()
    assert moved.abs().max() > 1e-3


def gradients(network: Network, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [p for p in network.parameters() if p.requires_grad], materialize_grads=True))


def test_a_bundle_whose_block_is_not_registered_is_refused(trained: tuple[Config, Path], tmp_path: Path) -> None:
    """It names one, and that is all: nothing is imported for it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(META_BLOCKS, "_known", [name for name in META_BLOCKS.known if name != "low_rank"])
        with pytest.raises(BundleError, match=r"(?s)model\.meta_block.*must be one of \['task_vector', .*register"):
            bundle.load(trained[1])


def test_a_name_that_is_taken_or_unknown_is_refused(page: dict[str, Section]) -> None:
    with pytest.raises(ConfigError, match=r"none of .*'low_rank'.*, got 'low_rank'; choose another"):
        blocks.register("low_rank", blocks.BLOCKS["low_rank"])
    with pytest.raises(ConfigError, match=r"feature type money must be stored as one of .*double.*, got uint8; choose"):
        columns.register("money", page["A feature type"]["RankEncoder"], stored=pa.uint8())
    with pytest.raises(ValidationError, match=r"must be one of \['movielens', .*'click_log'\]; correct it"):
        SourceConfig(kind="clicklog")
    with pytest.raises(ValidationError, match=r"must be one of \['number', .*'rank'\]; correct it"):
        FeatureConfig(entity="item", name="price", type="ranks")


def test_a_feature_type_goes_from_its_column_to_the_network(
    ingested: tuple[Config, pa.Table], trained: tuple[Config, Path]
) -> None:
    logged, encoder = ingested[1], bundle.load(trained[1]).encoder
    prices = dict(zip([f"i{at}" for at in range(20)], skewed(20, every=5), strict=True))
    assert logged["price"].to_pylist() == [prices[item] for item in logged["item_id"].to_pylist()]
    # The shares of training rows that cost no more, in steps of 1/32, by hand.
    known = np.array([price for price in logged["price"].to_pylist() if price is not None])
    edges = np.quantile(known, np.arange(1, 33) / 32)
    assert encoder.columns["price"].edges == tuple(edges.tolist())
    plain = replace(encoder, features=tuple(f for f in encoder.features if f.type != "rank"))
    assert encoder.dims.num_features == plain.dims.num_features + 4


@pytest.mark.parametrize("income", [None, float("nan"), -1.0, 1.0, 20.0, 1e9])
def test_a_column_and_a_single_value_are_encoded_alike(
    ingested: tuple[Config, pa.Table], trained: tuple[Config, Path], income: float | None
) -> None:
    encoder, at = bundle.load(trained[1]).encoder, max(ingested[1]["timestamp"].to_pylist())
    user = {"income": income, "age_band": "25_34", "user_events": 3}
    column = encoder.encode({"item_id": ["i1"], **{name: [value] for name, value in user.items()}}, 1).user_dense[0]
    assert encoder.encode_user(user, at).tolist() == column.tolist()


def test_what_is_no_number_does_not_pass_the_gate(delivered: tuple[Config, Path], tmp_path: Path) -> None:
    cfg, log = delivered
    cfg = cfg.model_copy(update={"storage": cfg.storage.model_copy(update={"root": str(tmp_path / "data")})})
    items = [json.loads(line) for line in (log / "items.jsonl").read_text().splitlines()]
    before = (log / "items.jsonl").read_bytes()
    write(log / "items.jsonl", [item | {"price": "cheap"} for item in items])
    try:
        with pytest.raises(GateError, match="price"):
            ingest_history(cfg, sources.open_source(cfg, TODAY).days()[1], TODAY)
    finally:
        (log / "items.jsonl").write_bytes(before)


def test_a_source_is_ingested(delivered: tuple[Config, Path], ingested: tuple[Config, pa.Table]) -> None:
    (cfg, log), (_, logged) = delivered, ingested
    source = sources.open_source(cfg, TODAY)
    rows = [json.loads(line) for day in source.days()[:11] for line in (log / "days" / f"{day}.jsonl").read_text().splitlines()]
    found = {row["event_id"]: row for row in logged.to_pylist()}
    assert len(rows) == len(found) > 100
    for row in rows:
        mine = found[row["id"]]
        assert clicked(mine) == row


def test_a_source_names_what_it_leaves_out_and_what_it_cannot_read(delivered: tuple[Config, Path]) -> None:
    cfg, log = delivered
    day = sources.open_source(cfg, TODAY).days()[11]
    lines = (log / "days" / f"{day}.jsonl").read_bytes()
    (log / "days" / "notes.txt").write_text("not a day")
    (log / "days" / f"{day}.jsonl").write_bytes(lines[:-9])
    try:
        source = sources.open_source(cfg, TODAY)
        assert source.left_out == ["days/notes.txt: must be a day YYYY-MM-DD.jsonl; rename it"]
        assert source.read_day(day + timedelta(days=1)) is None
        with pytest.raises(GateError, match=f"{day}.jsonl must hold an event a line"):
            ingest_day(cfg, day, TODAY)
    finally:
        (log / "days" / "notes.txt").unlink()
        (log / "days" / f"{day}.jsonl").write_bytes(lines)


def all_of_them() -> list[accelerators.Accelerator]:
    """Those of the list, and the page's, for a test that is collected before the page is run."""
    return [*accelerators.ACCELERATORS, run_apart("An accelerator")["TaskVectorSteps"]()]


def run_apart(title: str) -> Section:
    """What the example defines, without its registration."""
    namespace: dict[str, Any] = {"__name__": "extension"}
    exec(compile(code_of(title)[0], PAGE.name, "exec"), namespace)  # the page's own text
    return namespace


CASES = [
    ({"meta_block": block, "interaction": interaction, "start": start}, {"inner_step": step})
    for block, interaction, start, step in product(
        META_BLOCKS.known, ("product", "concat", "both"), ("prior", "items"), ("gradient", "newton")
    )
    if start == "prior" or (block in ("task_vector", "posterior") and interaction != "concat")
]


def applicable(accelerator: accelerators.Accelerator) -> list[tuple[dict[str, object], dict[str, object]]]:
    """Configurations that it takes."""
    batch = make_batch([2], [1])
    return [(m, i) for m, i in CASES if accelerator.applies(make_network(make_config(m, i)), batch, "user") is None]


@pytest.mark.parametrize("accelerator", all_of_them(), ids=lambda accelerator: accelerator.name)
def test_an_accelerator_equals_the_engine(accelerator: accelerators.Accelerator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss, embeddings and the gradient by every parameter; what it does not know it says."""
    monkeypatch.setattr(accelerators, "ACCELERATORS", [])
    taken = applicable(accelerator)
    assert 0 < len(taken) < len(CASES)

    @settings(max_examples=60, deadline=None)
    @given(
        case=st.sampled_from(taken),
        more=st.fixed_dictionaries(
            {
                "learn_inner_lr": st.booleans(),
                "learn_damping": st.booleans(),
                "min_support_rows": st.integers(1, 4),
                "pairwise_share": st.sampled_from([0.0, 0.5]),
            }
        ),
        width=st.integers(2, 6),
        dropout=st.sampled_from([0.0, 0.5]),
        lengths=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 4)), min_size=1, max_size=5),
        steps=st.integers(0, 4),
        second_order=st.booleans(),
        num_tasks=st.sampled_from([None, 8]),
        seed=st.integers(0, 1000),
    )
    def equal(
        case: tuple[dict[str, object], dict[str, object]],
        more: dict[str, object],
        width: int,
        dropout: float,
        lengths: list[tuple[int, int]],
        steps: int,
        second_order: bool,
        num_tasks: int | None,
        seed: int,
    ) -> None:
        model, meta = case
        cfg = make_config(model | {"embedding_dim": width, "dropout": dropout}, meta | more)
        network, batch = make_network(cfg, seed), make_batch(*(list(part) for part in zip(*lengths, strict=True)), seed=seed)
        assert accelerator.applies(network, batch, "user") is None
        how = {"num_steps": steps, "second_order": second_order, "num_tasks": num_tasks}
        for dtype, tolerance in TOLERANCE.items():
            truth = measured(engine, network.to(dtype), batch.to(dtype=dtype), seed, how)
            found = measured(accelerator, network, batch.to(dtype=dtype), seed, how)
            for name, value in found.items():
                scale = max(1.0, float(truth[name].abs().max())) if truth[name].numel() else 1.0
                difference = float((value - truth[name]).abs().max()) if truth[name].numel() else 0.0
                assert difference <= tolerance * scale, f"{name} in {dtype}"

    equal()


def measured(by: Any, network: Network, batch: TaskBatch, seed: int, how: dict[str, Any]) -> dict[str, Tensor]:
    """Everything that an outer step reads of `by`, the engine or an accelerator, dropout drawn alike."""
    outer = by.outer_loss(network, batch, generator=drawn(seed), **how)
    embed = engine.embed_tasks if by is engine else by.embed
    stored_TD = embed(network, "user", batch.support, batch.entity_index_T, num_steps=how["num_steps"])
    found = {"loss": outer.loss, "per_task": outer.per_task_T, "embedding": outer.embedding_TD, "stored": stored_TD}
    named = [(name, p) for name, p in network.named_parameters() if p.requires_grad]
    by_parameter = torch.autograd.grad(outer.loss, [p for _, p in named], materialize_grads=True)
    found |= {name: gradient for (name, _), gradient in zip(named, by_parameter, strict=True)}
    return {name: value.detach().clone() for name, value in found.items()}


def drawn(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_an_accelerator_says_once_that_it_runs_and_why_others_did_not(page: dict[str, Section]) -> None:
    example, batch = accelerators.ACCELERATORS[-1], make_batch([2], [1])
    assert example.name == "task_vector_steps"
    gradient = make_network(make_config({}, {"inner_step": "gradient"}))
    newton = make_network(make_config({}, {"inner_step": "newton"}))
    with capture_logs() as logs:
        for _ in range(2):
            engine.outer_loss(gradient, batch)
            engine.embed_tasks(gradient, "user", batch.support, batch.entity_index_T)
            engine.outer_loss(newton, batch)
    told = [(entry["runs_on"], entry["why_not"]) for entry in logs if entry["event"] == "inner_loop"]
    assert told == [
        ("task_vector_steps", []),
        ("engine", ["task_vector_steps: the inner step must be the gradient's"]),
    ]
    seen: list[Rows] = []
    prior_1D = gradient.block("user").prior().detach().unsqueeze(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(example, "embed", lambda *arguments, **_: seen.append(arguments[2]) or prior_1D, raising=False)
        engine.embed_tasks(gradient, "user", batch.support, batch.entity_index_T)
    assert seen == [batch.support], "the engine hands the work over"


# Module, its section, and what is entered where: as the page's table says.
ENTERED = {
    "models/blocks/low_rank.py": "A meta block",
    "features/rank.py": "A feature type",
    "meta/accelerators/task_vector_steps.py": "An accelerator",
    "events/click_log.py": "A source",
}
LINES = [
    ("config/names.py", "META_BLOCKS = Names(", 'META_BLOCKS = Names("low_rank", '),
    ("config/names.py", "FEATURE_TYPES = Names(", 'FEATURE_TYPES = Names("rank", '),
    ("config/names.py", "SOURCE_KINDS = Names(", 'SOURCE_KINDS = Names("click_log", '),
    ("models/blocks/__init__.py", "from limaml.models.blocks.mlp", "from limaml.models.blocks.low_rank import LowRank\n"),
    ("models/blocks/__init__.py", '    "posterior":', '    "low_rank": lambda cfg, _: LowRank(cfg.embedding_dim, 2),\n'),
    ("features/columns.py", "from limaml.schema", "from limaml.features.rank import RankEncoder\n"),
    ("features/columns.py", '    "cycle": CycleEncoder', '    "rank": RankEncoder,\n'),
    ("schema/declared.py", '    "category": pa.string()', '    "rank": pa.float64(),\n'),
    ("events/sources.py", "from limaml.io", "from limaml.events.click_log import ClickLogSource\n"),
    ("events/sources.py", '    "table": _table', '    "click_log": ClickLogSource,\n'),
    (
        "meta/accelerators/__init__.py",
        "from limaml.meta.losses",
        "from limaml.meta.accelerators.task_vector_steps import TaskVectorSteps\n",
    ),
    (
        "meta/accelerators/__init__.py",
        "ACCELERATORS: list[Accelerator] = [",
        "ACCELERATORS: list[Accelerator] = [TaskVectorSteps(), ",
    ),
]
USES = """
from limaml.config import Config, FeatureConfig
from limaml.events.sources import SOURCES
from limaml.features.columns import fit_column
from limaml.features.encoder import EncoderDims
from limaml.meta import engine
from limaml.meta.accelerators import ACCELERATORS
from limaml.models.network import build_network
import pyarrow as pa

cfg = Config.model_validate({"source": {"kind": "click_log"}, "model": {"meta_block": "low_rank"}})
network = build_network(cfg, EncoderDims(num_items=3, num_entities=2, item_dense=2, user_dense=2, context=1))
price = fit_column(FeatureConfig(entity="item", name="price", type="rank"), pa.chunked_array([[1.0, 2.0]]))
print(engine.__file__, type(network.block("user")).__name__, price.width, ACCELERATORS[0].name, cfg.source.kind in SOURCES)
"""


def test_the_table_of_the_page_names_all_that_is_touched(tmp_path: Path) -> None:
    """In a copy of the package, by a process of its own: nothing imports in a circle, and nothing else is needed."""
    copied = tmp_path / "limaml"
    shutil.copytree(PAGE.parents[1] / "limaml", copied, ignore=shutil.ignore_patterns("__pycache__"))
    for module, title in ENTERED.items():
        (copied / module).write_text(code_of(title)[0])
    for module, at, line in LINES:
        text = (copied / module).read_text()
        assert text.count(at) == 1, f"{module}: {at}"
        (copied / module).write_text(text.replace(at, line if line.startswith(at) else line + at))
    touched = {module for module, _, _ in LINES}
    assert all(f"limaml/{module}" in PAGE.read_text() for module in touched)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    ran = subprocess.run(
        [sys.executable, "-c", USES], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == [str(copied / "meta" / "engine.py"), "LowRank", "2", "task_vector_steps", "True"]


def test_names_and_registries_agree() -> None:
    """What the configuration takes is what can be built, encoded and opened."""
    assert set(META_BLOCKS.known) == set(blocks.BLOCKS)
    assert set(FEATURE_TYPES.known) == {*columns._ENCODERS, "text"}
    assert set(stored_types._TYPES) == set(FEATURE_TYPES.known) - {"vector"}
    assert set(SOURCE_KINDS.known) == set(sources.SOURCES)
