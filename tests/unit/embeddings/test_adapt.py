"""Adaptation in a stream: which rows an embedding sees, that its batch does not matter, and that a re-run is the same bytes.

No ingestion, no registry.
"""

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import fields
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch

from benchmarks.adapt import measure
from benchmarks.scale_world import LAST, World, write
from limaml import schema
from limaml.config import TaskKindConfig
from limaml.embeddings import stream
from limaml.embeddings.adapt import _planned_rows, active_entities, adapt, adapt_sorted
from limaml.embeddings.stream import precision
from limaml.errors import DataError
from limaml.events import recent
from limaml.events.logged import read_logged, write_logged
from limaml.events.recent import shard_of
from limaml.io.storage import Storage
from limaml.meta.engine import embed_tasks
from limaml.models import blocks
from limaml.models.bundle import Bundle
from limaml.tasks import supports
from limaml.tasks.rows import Rows
from limaml.tasks.sampling import TaskRows, build_batch, microseconds, support_spec
from limaml.tasks.supports import Supports, cut_by_entity
from tests import declared
from tests.adapting import FIRST_DAY, NUM_USERS, SUPPORT_ROWS, bundle_of, events_of

NUM_DAYS = 6


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    stored = Storage(str(tmp_path / "data"))
    for offset in range(NUM_DAYS):
        day = FIRST_DAY + timedelta(days=offset)
        write_logged(stored, day, events_of(day, offset), 1)
    return stored


@pytest.fixture(scope="session")
def bundle() -> Bundle:
    return bundle_of({"embedding_dim": 4})


_GRADIENT: dict[str, object] = {"inner_step": "gradient", "inner_steps": 5}
_NEWTON: dict[str, object] = {"inner_step": "newton", "inner_steps": 3}


def _one(block: str, **model: object) -> dict[str, object]:
    return {"meta_block": block, **model}


# With the rates that suit each block; all of them, those whose weights are adapted and the factors in both precisions.
BLOCKS: dict[str, tuple[dict[str, object], dict[str, object], torch.dtype]] = {
    "task_vector": ({}, _GRADIENT, torch.float32),
    "task_vector by Newton": ({}, _NEWTON, torch.float64),
    "task_vector of odd width": ({"embedding_dim": 20}, _GRADIENT, torch.float64),
    "task_vector from its items": ({"start": "items"}, _GRADIENT | {"min_support_rows": 2}, torch.float32),
    "posterior": (_one("posterior"), {}, torch.float64),
    "row_mlp": (_one("row_mlp"), _GRADIENT | {"inner_lr": 0.3}, torch.float64),
    # A fixed rate is one number; what is adapted is as wide as ever.
    "row_mlp of odd width, fixed rates": (
        _one("row_mlp", embedding_dim=20, interaction="concat"),
        _GRADIENT | {"inner_lr": 0.3, "learn_inner_lr": False, "learn_damping": False},
        torch.float64,
    ),
    "row_mlp beside": (
        _one("row_mlp", embedding_dim=32, interaction="concat"),
        _GRADIENT | {"inner_lr": 0.3},
        torch.float32,
    ),
    "id_mlp": (_one("id_mlp"), _GRADIENT | {"inner_lr": 1.0}, torch.float64),
    # An id's own width is that of a vector, not of a matrix.
    "id_mlp beside": (
        _one("id_mlp", embedding_dim=32, interaction="concat", id_dim=10),
        _GRADIENT | {"inner_lr": 1.0},
        torch.float32,
    ),
    "set": (_one("set"), _NEWTON, torch.float32),
    "set of odd width": (_one("set", embedding_dim=20), _NEWTON, torch.float64),
    "hybrid": (_one("hybrid"), _GRADIENT, torch.float32),
    "hybrid by Newton": (_one("hybrid"), _NEWTON, torch.float64),
    "sequence": (_one("sequence"), _GRADIENT | {"inner_lr": 0.3}, torch.float64),
    "sequence beside": (_one("sequence", embedding_dim=32, interaction="concat"), _GRADIENT, torch.float64),
    "sequence, all of it": (
        _one("sequence", sequence_adapts="all"),
        _GRADIENT | {"inner_steps": 1, "inner_lr": 0.1},
        torch.float64,
    ),
}


@pytest.fixture(params=BLOCKS, scope="session")
def any_bundle(request: pytest.FixtureRequest) -> Bundle:
    model, meta, _ = BLOCKS[request.param]
    return bundle_of(model, meta)


LAST_DAY = FIRST_DAY + timedelta(days=NUM_DAYS - 1)
AS_OF = schema.day_end(LAST_DAY)
USERS = sorted(f"u{user}" for user in range(1, NUM_USERS + 1))
KIND = TaskKindConfig()
# What contract 5 allows between batches.
BATCH_TOLERANCE = 1e-6
# Embeddings of size 5 out of 5 steps in float32, one of the paths with other shapes and so with another order of sums.
PATH_TOLERANCE = 5e-6


def adapted(
    storage: Storage, bundle: Bundle, entities: Sequence[str] = USERS, as_of: datetime = AS_OF, batch_entities: int = 8
) -> pa.Table:
    return adapt(storage, bundle, "7", KIND, entities, as_of, batch_entities).read_all()


def vectors(table: pa.Table) -> npt.NDArray[np.float32]:
    return np.array(table["embedding"].to_pylist(), np.float32)


def test_the_rows_follow_the_schema_and_are_sorted_by_entity(storage: Storage, bundle: Bundle) -> None:
    table = adapted(storage, bundle, USERS[::-1], batch_entities=8)
    assert table.schema.equals(schema.embeddings("user_id", 4).arrow)
    assert table["user_id"].to_pylist() == USERS
    assert set(table["model_version"].to_pylist()) == {"7"}
    assert set(table["as_of"].to_pylist()) == {AS_OF}
    assert np.isfinite(vectors(table)).all()


@pytest.mark.parametrize(
    "as_of",
    [
        pytest.param(schema.day_end(LAST_DAY - timedelta(days=2)), id="a day's end"),
        # Users' events of a day are a second apart from noon on: this instant parts them, and equals some.
        pytest.param(schema.day_start(FIRST_DAY + timedelta(days=1)) + timedelta(hours=12, seconds=8), id="inside a day"),
    ],
)
def test_support_is_the_last_n_events_before_as_of_ties_by_event_id(
    storage: Storage, any_bundle: Bundle, as_of: datetime
) -> None:
    """Against the plain path: all of a user's events in memory, one task at a time."""
    table = adapted(storage, any_bundle, as_of=as_of, batch_entities=4)
    rows = TaskRows.from_logged(read_logged(storage, declared.TABLES, through=LAST_DAY), any_bundle.encoder, KIND)
    for at, user in enumerate(USERS):
        spec = support_spec(rows, rows.entities.index(user), as_of, SUPPORT_ROWS)
        batch = build_batch(rows, [spec])
        expected = embed_tasks(any_bundle.network, "user", batch.support, batch.entity_index_T).numpy()[0]
        np.testing.assert_allclose(vectors(table)[at], expected, atol=PATH_TOLERANCE, rtol=0)
        last_us = int(rows.timestamp_us[spec.support_stop - 1])
        assert table["support_size"][at].as_py() == spec.support_size
        assert table["last_event_at"].cast(pa.int64())[at].as_py() == last_us
    sizes = table["support_size"].to_pylist()
    assert max(sizes) == SUPPORT_ROWS
    assert min(sizes) < SUPPORT_ROWS


def test_every_block_is_among_those_whose_embeddings_are_compared() -> None:
    assert {model.get("meta_block", "task_vector") for model, _, _ in BLOCKS.values()} == set(blocks.BLOCKS)


@pytest.mark.parametrize("name", BLOCKS)
def test_an_embedding_does_not_depend_on_its_batch(storage: Storage, name: str) -> None:
    """float32 is taken where the bits are the same, and float64 leaves 1e-6 far behind."""
    model, meta, dtype = BLOCKS[name]
    made = bundle_of(model, meta)
    assert precision(made.network, "user") == dtype
    whole = vectors(adapted(storage, made, batch_entities=512))
    parts = [vectors(adapted(storage, made, batch_entities=number)) for number in (1, 5)]
    others = [vectors(adapted(storage, made, USERS[skip:])) for skip in (1, 2, 7)]
    for found, expected in [(part, whole) for part in parts] + [(other, whole[-len(other) :]) for other in others]:
        if dtype == torch.float32:
            assert np.array_equal(found, expected)
        np.testing.assert_allclose(found, expected, atol=BATCH_TOLERANCE / 10, rtol=0)


def test_a_rerun_writes_the_same_bytes_however_many_threads_there_are(
    storage: Storage, any_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, threads in enumerate((2, 2, 1, 5)):
        monkeypatch.setattr(stream, "_NUM_THREADS", threads)
        storage.write_batches(f"run-{number}.parquet", adapt(storage, any_bundle, "7", KIND, USERS, AS_OF, 3))
    first, *others = [storage.read_bytes(f"run-{number}.parquet") for number in range(4)]
    assert all(other == first for other in others)


def test_torch_has_its_threads_again_after_an_adaptation_and_after_one_that_failed(storage: Storage, bundle: Bundle) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        adapted(storage, bundle)
        assert torch.get_num_threads() == 3
        storage.write_table("broken.parquet", read_logged(storage, declared.TABLES, through=LAST_DAY).take(pa.array([5, 0])))
        with pytest.raises(DataError, match="must be sorted"):
            adapt_sorted(storage, bundle, "7", KIND, "broken.parquet", AS_OF, 2).read_all()
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_rows_that_stand_one_after_another_are_what_gathering_gives(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full call of tasks without a gap is not copied; calls of two tasks here, with a gap between them or without."""
    monkeypatch.setattr(supports, "MAX_TASKS", 2)
    as_of_us = microseconds(schema.day_end(FIRST_DAY))
    made = Supports.from_sorted(events_of(FIRST_DAY, seed=1), bundle.encoder, "user_id", as_of_us, SUPPORT_ROWS)
    seen = set()
    for tasks, rows, _ in made.calls():
        width = rows.mask_TR.shape[1]
        if len(tasks) < 2 or set(made.size[tasks].tolist()) != {width}:
            continue
        seen.add(bool(made.first[tasks[1]] == made.first[tasks[0]] + width))
        at_TR = made.first[tasks][:, None] + np.arange(width)
        gathered = Rows.gather(made, at_TR, np.ones(at_TR.shape, np.float32), np.full(2, as_of_us))
        for field in fields(Rows):
            assert torch.equal(getattr(rows, field.name), getattr(gathered, field.name)), field.name
    assert seen == {True, False}


def test_a_sorted_file_gives_what_the_day_partitions_give(storage: Storage, any_bundle: Bundle) -> None:
    """Rows at and after the instant, and more rows than a support holds, are in the file too."""
    as_of = schema.day_end(LAST_DAY - timedelta(days=2))
    logged = read_logged(storage, declared.TABLES, through=LAST_DAY)
    storage.write_batches(
        "sorted.parquet", pa.RecordBatchReader.from_batches(logged.schema, logged.to_batches(max_chunksize=7))
    )
    found = adapt_sorted(storage, any_bundle, "7", KIND, "sorted.parquet", as_of, 4).read_all()
    assert found.equals(adapted(storage, any_bundle, as_of=as_of, batch_entities=8))


@pytest.mark.parametrize("column", ["user_id", "timestamp"])
def test_rows_out_of_order_are_refused_and_nothing_half_written_is_seen(storage: Storage, bundle: Bundle, column: str) -> None:
    logged = read_logged(storage, declared.TABLES, through=LAST_DAY)
    order = np.arange(logged.num_rows)
    # The last user's rows first, or in reverse: many batches of embeddings are written before that is found.
    last = order[-int(pc.sum(pc.equal(logged["user_id"], USERS[-1])).as_py()) :]
    broken = np.concatenate([order[: last[0] - 9], last, order[last[0] - 9 : last[0]]]) if column == "user_id" else order
    broken = np.concatenate([order[: last[0]], last[::-1]]) if column == "timestamp" else broken
    storage.write_table("broken.parquet", logged.take(broken))
    storage.write_bytes("out/embeddings.parquet", b"what was there")
    with pytest.raises(DataError, match=rf"must be sorted by ({column}, got|time within an entity, those of {USERS[-1]})"):
        storage.write_batches("out/embeddings.parquet", adapt_sorted(storage, bundle, "7", KIND, "broken.parquet", AS_OF, 2))
    assert storage.list("out") == ["embeddings.parquet"]
    assert storage.read_bytes("out/embeddings.parquet") == b"what was there"


def test_a_row_of_the_as_of_instant_itself_neither_enters_a_support_nor_displaces_a_row(
    storage: Storage, any_bundle: Bundle
) -> None:
    """Of a user with more rows than a support holds. The day before is whole, so only the instant parts the rows."""
    mine = read_logged(storage, declared.TABLES, through=LAST_DAY, entities=("user_id", ["u12"]))
    as_of = mine["timestamp"][-1].as_py()
    earlier = mine.filter(pc.less(mine["timestamp"], mine["timestamp"][-1]))
    assert earlier.num_rows > SUPPORT_ROWS
    storage.write_table("earlier.parquet", earlier)
    found = adapted(storage, any_bundle, ["u12"], as_of=as_of)
    assert found["support_size"].to_pylist() == [SUPPORT_ROWS]
    assert found["last_event_at"].to_pylist() == [earlier["timestamp"][-1].as_py()]
    assert found.equals(adapt_sorted(storage, any_bundle, "7", KIND, "earlier.parquet", as_of, 8).read_all())


def test_a_later_day_changes_nothing_before_it(storage: Storage, bundle: Bundle) -> None:
    as_of = schema.day_end(LAST_DAY - timedelta(days=1))
    before = adapted(storage, bundle, as_of=as_of, batch_entities=8)
    write_logged(storage, LAST_DAY, events_of(LAST_DAY, seed=99), 2)
    assert adapted(storage, bundle, as_of=as_of, batch_entities=8).equals(before)


def test_an_entity_without_events_gets_the_prior(storage: Storage, any_bundle: Bundle) -> None:
    table = adapted(storage, any_bundle, ["a-stranger", "u12", "zz-stranger"], batch_entities=2)
    prior = any_bundle.prior["user"].numpy()
    assert prior.any(), "a prior of zeros is no evidence"
    assert table["support_size"].to_pylist() == [0, SUPPORT_ROWS, 0]
    assert table["last_event_at"].null_count == 2
    assert np.array_equal(vectors(table)[[0, 2]], np.stack([prior, prior]))
    assert not np.allclose(vectors(table)[1], prior)


def test_no_entity_gives_an_empty_table(storage: Storage, bundle: Bundle) -> None:
    table = adapted(storage, bundle, [], batch_entities=8)
    assert table.num_rows == 0
    assert table.schema.equals(schema.embeddings("user_id", 4).arrow)


def test_active_are_those_with_an_event_in_the_window(storage: Storage) -> None:
    last_two_days = TaskKindConfig(active_days=2)
    expected = pc.unique(
        read_logged(storage, declared.TABLES, first=LAST_DAY - timedelta(days=1), through=LAST_DAY)["user_id"]
    ).to_pylist()
    assert active_entities(storage, declared.TABLES, last_two_days, AS_OF) == sorted(expected)
    assert active_entities(storage, declared.TABLES, TaskKindConfig(active_days=365), AS_OF) == USERS


def test_the_window_of_active_entities_has_its_first_instant_and_not_its_last(storage: Storage) -> None:
    """An event at midnight belongs to the day that begins: of two days, of which one is LAST_DAY."""
    first, end = schema.day_start(LAST_DAY - timedelta(days=1)), AS_OF
    one = read_logged(storage, declared.TABLES, through=FIRST_DAY).slice(0, 1)
    at = one.schema.get_field_index("timestamp")
    for user, instant in [
        ("before", first - timedelta(microseconds=1)),
        ("first", first),
        ("last", end - timedelta(microseconds=1)),
        ("end", end),
    ]:
        moved = one.set_column(at, one.schema.field(at), pa.array([instant], schema.TIMESTAMP))
        moved = moved.set_column(one.schema.get_field_index("user_id"), one.schema.field("user_id"), pa.array([user]))
        storage.write_table(f"logged/dt={instant.date()}/{user}.parquet", moved)
    kind, strangers = TaskKindConfig(active_days=2), {"before", "first", "last", "end"}
    assert strangers & set(active_entities(storage, declared.TABLES, kind, end)) == {"first", "last"}
    # A microsecond earlier, so inside a day, whose later rows are there to be read.
    assert strangers & set(active_entities(storage, declared.TABLES, kind, end - timedelta(microseconds=1))) == {
        "before",
        "first",
    }


def test_shards_partition_the_entities_the_same_way_in_every_process() -> None:
    mine = [shard_of(user, 4) for user in USERS]
    assert set(mine) == set(range(4))
    code = f"from limaml.events.recent import shard_of; print([shard_of(u, 4) for u in {USERS}])"
    environment = {"PYTHONHASHSEED": "1"}
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert other.stdout.strip() == str(mine)


@pytest.mark.parametrize("rows_per_batch", [1, 3, 7, 1000])
@pytest.mark.parametrize("num_entities", [1, 4, 23, 100])
def test_a_stream_is_cut_at_entities_however_its_batches_fall(rows_per_batch: int, num_entities: int) -> None:
    table = events_of(FIRST_DAY, seed=0)
    parts = list(cut_by_entity(table.to_batches(max_chunksize=rows_per_batch), "user_id", num_entities))
    assert pa.concat_tables(parts).equals(table)
    found = [pc.unique(part["user_id"]).to_pylist() for part in parts]
    assert [len(users) for users in found[:-1]] == [num_entities] * (len(parts) - 1)
    assert [user for users in found for user in users] == USERS


def test_nothing_ingested_is_named(tmp_path: Path, bundle: Bundle) -> None:
    with pytest.raises(DataError, match=r"logged must hold a partition to adapt from, got none; run limaml ingest first"):
        adapted(Storage(str(tmp_path)), bundle)


def test_memory_does_not_follow_the_number_of_entities() -> None:
    """16 rows each: in memory at once, 120,000 entities more would be 600 MB of rows.

    Allocators take 50 to 100 MB in the first 80,000 entities, and then stay (530 to 560 MB up to 600,000).
    """
    few, many = (measure("paper", entities)["peak_rss_bytes"] for entities in (60_000, 180_000))
    assert many - few < 80 * 2**20


def test_rows_of_a_large_shard_go_to_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """640,000 rows, a sixth of those of 250,000 entities, in about a quarter of duckdb's memory; a hash table of them fails."""
    world = World(tmp_path, 40_000, "127.0.0.1:1", num_shards=1)
    write(world)
    rows, as_of = world.cfg.meta.support_rows, schema.day_end(LAST)
    recent_rows = recent.Recent(world.storage, world.tables, "user_id", as_of, rows)
    monkeypatch.setattr(recent, "_DUCKDB", recent._DUCKDB | {"memory_limit": "110MB"})
    with recent.logged_rows(world.storage, recent_rows.files(world.users.to_pylist()), recent_rows.columns) as connection:
        connection.register("planned", pa.table({"entity": world.users}))
        query, params = _planned_rows(world.tables, world.cfg.task_kind), {"as_of": as_of, "support_rows": rows}
        found = sum(batch.num_rows for batch in connection.sql(query, params=params).to_arrow_reader(65_536))
    counts = read_logged(world.storage, world.tables, through=LAST)["user_id"].value_counts().field("counts")
    assert found == sum(min(count, rows) for count in counts.to_pylist()) > 500_000
