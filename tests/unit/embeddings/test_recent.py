"""Adaptation reads the newest rows from a base and the days after it, and gets what a scan of all days gives."""

import functools
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date, datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from limaml import schema
from limaml.config import Config, TaskKindConfig
from limaml.embeddings.adapt import adapt
from limaml.embeddings.partition import Partition, write_partition
from limaml.events import recent
from limaml.events.logged import logged_path, read_logged, write_logged
from limaml.events.recent import NUM_BUCKETS, Recent, shard_of
from limaml.io.storage import Storage
from limaml.models.bundle import Bundle
from tests import declared
from tests.adapting import FIRST_DAY, NUM_USERS, SUPPORT_ROWS, bundle_of, events_of

NUM_DAYS = 12
MOST, KEPT = 4, 2
"""Days read beside a base, and those that a move leaves: few, so that days of a test make bases and move them."""
USERS = sorted(f"u{user}" for user in range(1, NUM_USERS + 1))
ITEMS = sorted(f"i{item}" for item in range(1, 12))
IDS = {"user_id": [*USERS, "a stranger"], "item_id": [*ITEMS, "a stranger"]}


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    stored = Storage(str(tmp_path))
    for offset in range(NUM_DAYS):
        write_logged(stored, day_of(offset), events_of(day_of(offset), offset), 1)
    return stored


@pytest.fixture(autouse=True)
def few_days(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recent, "_MOST_OPEN_DAYS", MOST)
    monkeypatch.setattr(recent, "_KEPT_OPEN_DAYS", KEPT)


def day_of(offset: int) -> date:
    return FIRST_DAY + timedelta(days=offset)


def of(storage: Storage, offset: int = NUM_DAYS - 1, rows: int = SUPPORT_ROWS, column: str = "user_id") -> Recent:
    return Recent(storage, declared.TABLES, column, schema.day_end(day_of(offset)), rows)


def config(storage: Storage) -> Config:
    return Config.model_validate({"storage": {"root": storage.root}, "source": {"kind": "synthetic"}})


def moved(storage: Storage, offset: int = NUM_DAYS - 1, rows: int = SUPPORT_ROWS, column: str = "user_id") -> Recent:
    of(storage, offset, rows, column).move_on(config(storage))
    return of(storage, offset, rows, column)


def last_rows(table: pa.Table, columns: pa.Schema, as_of: datetime, rows: int) -> dict[str, list[dict[str, Any]]]:
    """Each entity's last rows before an instant, the plain way."""
    found: dict[str, list[dict[str, Any]]] = {}
    entity = columns.names[0]
    ordered = table.select(columns.names).sort_by([(name, "ascending") for name in (entity, "timestamp", "event_id")])
    for row in ordered.to_pylist():
        if row["timestamp"] < as_of:
            found.setdefault(row[entity], []).append(row)
    return {entity: mine[-rows:] for entity, mine in found.items()}


def require_same_as_scan(storage: Storage, asked: Recent) -> None:
    read = storage.dataset(asked.files(IDS[asked.entity_column]), asked.columns).to_table()
    scan = read_logged(storage, declared.TABLES, through=day_of(NUM_DAYS))
    found, wanted = (last_rows(table, asked.columns, asked.as_of, asked.support_rows) for table in (read, scan))
    assert found == wanted


def current(storage: Storage, column: str = "user_id") -> dict[str, Any]:
    value: dict[str, Any] = storage.read_json(f"recent/{column}/current.json")
    return value


def files_of_base(storage: Storage) -> dict[str, bytes]:
    folder = current(storage)["folder"]
    return {name: storage.read_bytes(f"{folder}/{name}") for name in storage.list(folder)}


@pytest.mark.parametrize("column", ["user_id", "item_id"])
def test_buckets_hold_the_last_rows_of_their_entities_in_order(storage: Storage, column: str) -> None:
    moved(storage, column=column)
    base, columns = current(storage, column), of(storage, column=column).columns
    through = day_of(NUM_DAYS - 1 - KEPT)
    assert base["through"] == through.isoformat()
    scan = read_logged(storage, declared.TABLES, through=through)
    wanted = last_rows(scan, columns, schema.day_end(through), SUPPORT_ROWS)
    assert max(map(len, wanted.values())) == SUPPORT_ROWS
    seen = []
    for name in storage.list(base["folder"]):
        table = storage.read_table(f"{base['folder']}/{name}")
        entities = sorted(set(table[column].to_pylist()))
        assert {f"bucket={shard_of(each, NUM_BUCKETS):02d}.parquet" for each in entities} == {name}
        assert table.to_pylist() == [row for entity in entities for row in wanted[entity]]
        seen += entities
    assert sorted(seen) == sorted(wanted)


def test_a_short_history_has_no_base(storage: Storage) -> None:
    moved(storage, MOST - 1)
    assert not storage.exists("recent")
    moved(storage, MOST)
    assert current(storage)["through"] == day_of(MOST - KEPT).isoformat()


def test_only_the_buckets_of_the_entities_and_the_open_days_are_read(storage: Storage) -> None:
    asked, user = moved(storage), USERS[0]
    bucket = f"{current(storage)['folder']}/bucket={shard_of(user, NUM_BUCKETS):02d}.parquet"
    days = [logged_path(day_of(NUM_DAYS - n), 1) for n in range(KEPT, 0, -1)]
    assert asked.files([user]) == [bucket, *days]
    assert asked.files([]) == days


def test_a_move_goes_on_from_the_base_and_gives_the_bytes_of_one_from_scratch(storage: Storage) -> None:
    moved(storage, MOST)
    first = current(storage)
    asked = moved(storage)
    assert current(storage)["through"] > first["through"]
    went_on = files_of_base(storage)
    require_same_as_scan(storage, asked)
    storage.delete_dir("recent")
    moved(storage)
    assert files_of_base(storage) == went_on


def test_a_move_does_not_read_covered_days_again(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    moved(storage, MOST)
    covered = date.fromisoformat(current(storage)["through"])
    read: list[str] = []
    before = Storage.scanner

    def scanner(self: Storage, files: list[str], columns: pa.Schema, *span: Any) -> Any:
        read.extend(files)
        return before(self, files, columns, *span)

    monkeypatch.setattr(Storage, "scanner", scanner)
    moved(storage)
    days = {name.split("/")[1] for name in read if name.startswith("logged/")}
    assert days == {f"dt={day_of(n)}" for n in range(NUM_DAYS - KEPT) if day_of(n) > covered}


def test_a_base_of_fewer_rows_or_other_columns_is_made_again_and_one_of_more_serves(storage: Storage) -> None:
    moved(storage, rows=2)
    assert of(storage, rows=4).files(USERS) == [logged_path(day_of(n), 1) for n in range(NUM_DAYS)], "all days"
    require_same_as_scan(storage, moved(storage, rows=4))
    assert current(storage)["support_rows"] == 4
    of_four = files_of_base(storage)
    require_same_as_scan(storage, moved(storage, rows=3))
    assert files_of_base(storage) == of_four
    value = current(storage)
    storage.write_json("recent/user_id/current.json", value | {"columns": value["columns"][1:]})
    assert len(of(storage, rows=4).files(USERS)) == NUM_DAYS
    moved(storage, rows=4)
    assert files_of_base(storage) == of_four


def test_an_older_instant_reads_all_days_and_leaves_the_base(storage: Storage) -> None:
    moved(storage)
    value = current(storage)
    through = date.fromisoformat(value["through"])
    for offset in range(NUM_DAYS):
        asked = moved(storage, offset)
        require_same_as_scan(storage, asked)
        assert any(name.startswith("recent/") for name in asked.files(USERS)) == (day_of(offset) >= through)
    assert current(storage) == value
    # Inside the base's last day.
    inside = Recent(storage, declared.TABLES, "user_id", schema.day_start(through) + timedelta(hours=12, seconds=15), 5)
    inside.move_on(config(storage))
    require_same_as_scan(storage, inside)
    assert current(storage) == value


class Dying:
    """A lock whose holder dies at the given write."""

    def __init__(self, writes: int) -> None:
        self.writes = writes

    def check(self) -> None:
        self.writes -= 1
        if self.writes < 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize("start", [None, MOST], ids=["from scratch", "a base goes on"])
@pytest.mark.fault(
    "a process that dies before any write of the newest rows' files", after="what is read from them is the same, byte for byte"
)
def test_a_move_that_died_anywhere_changes_nothing_and_is_done_again(
    storage: Storage, monkeypatch: pytest.MonkeyPatch, start: int | None
) -> None:
    if start is not None:
        moved(storage, start)
    expected = {name: storage.read_bytes(name) for name in storage.walk("recent")}
    writes, died = 0, True
    while died:

        @contextmanager
        def exclusive(cfg: Config, name: str, wait_s: float, writes: int = writes) -> Iterator[Dying]:
            yield Dying(writes)

        with monkeypatch.context() as patched:
            patched.setattr(recent, "exclusive", exclusive)
            try:
                of(storage).move_on(config(storage))
                died = False
            except KeyboardInterrupt:
                pass
        require_same_as_scan(storage, of(storage))
        if died:
            assert {name: storage.read_bytes(name) for name in expected} == expected
        writes += 1
    assert writes > 3
    made = files_of_base(storage)
    storage.delete_dir("recent")
    moved(storage)
    assert files_of_base(storage) == made


PROCESS = f"""
import json, sys
from datetime import datetime
from limaml.config import Config
from limaml.events import recent
from limaml.io.storage import Storage
from tests import declared

recent._MOST_OPEN_DAYS, recent._KEPT_OPEN_DAYS = {MOST}, {KEPT}
root, as_of, users = json.loads(sys.argv[1])
cfg = Config.model_validate({{"storage": {{"root": root}}, "source": {{"kind": "synthetic"}}}})
asked = [recent.Recent(Storage(root), declared.TABLES, "user_id", datetime.fromisoformat(as_of), {SUPPORT_ROWS}) for _ in "12"]
print("ready", flush=True)
sys.stdin.readline()
asked[0].move_on(cfg)
print(json.dumps(asked[1].files(users)))
"""


def test_of_many_processes_one_makes_the_base_and_all_read_the_same(storage: Storage) -> None:
    given = json.dumps([storage.root, of(storage).as_of.isoformat(), USERS])
    root, pipe = Path(__file__).parents[3], subprocess.PIPE
    command = [sys.executable, "-c", PROCESS, given]
    running = [subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=root) for _ in range(3)]
    for each in running:
        assert each.stdout
        assert each.stdout.readline() == "ready\n"
    for each in running:
        assert each.stdin
        each.stdin.write("go\n")
        each.stdin.flush()
    lines = [each.communicate(timeout=600)[0].splitlines() for each in running]
    assert [json.loads(mine[-1]) for mine in lines] == [of(storage).files(USERS)] * 3
    # The log line of who made it.
    assert sorted(len(mine) for mine in lines) == [1, 1, 2]
    require_same_as_scan(storage, of(storage))


@functools.cache
def bundle_of_rows(support_rows: int) -> Bundle:
    return bundle_of({"embedding_dim": 4}, {"support_rows": support_rows})


ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(["day", "day", "day", "late", "correct", "again"]),
        st.integers(0, NUM_DAYS - 1),
        st.integers(2, 6),
        st.booleans(),
    ),
    min_size=8,
    max_size=16,
)


# An example adapts up to 32 times.
@settings(max_examples=8, deadline=None)
@given(ACTIONS)
def test_after_any_deliveries_partitions_have_the_bytes_of_a_scan(actions: list[tuple[str, int, int, bool]]) -> None:
    """Days in order and late ones, corrections, and a revision that an ingestion which died writes again otherwise."""
    with TemporaryDirectory() as folder:
        storage, revisions, seed = Storage(folder), dict[int, int](), 0
        for action, number, rows, is_old in actions:
            left = [offset for offset in range(NUM_DAYS) if offset not in revisions]
            if action in ("day", "late") and left:
                # Every third day is late: it comes, if it does, after later ones.
                on_time = [offset for offset in left if offset % 3 != 1]
                offset = left[number % len(left)] if action == "late" or not on_time else on_time[0]
                revisions[offset] = 1
            elif revisions:
                offset = sorted(revisions)[number % len(revisions)]
                revisions[offset] += action != "again"
            else:
                continue
            seed += 1
            write_logged(storage, day_of(offset), events_of(day_of(offset), seed), revisions[offset])
            last = sorted(revisions)[number % len(revisions)] if is_old else max(revisions)
            for column in IDS:
                require_same_as_scan(storage, moved(storage, last, rows, column))
            require_same_bytes(storage, bundle_of_rows(rows), schema.day_end(day_of(last)))


def require_same_bytes(storage: Storage, bundle: Bundle, as_of: datetime) -> None:
    """Of the embeddings adapted from a base, where there is one, and from a scan."""
    kind, users = TaskKindConfig(), IDS["user_id"]
    storage.write_batches("adapted.parquet", adapt(storage, bundle, "7", kind, users, as_of, 8))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Recent, "_base", None)
        storage.write_batches("scanned.parquet", adapt(storage, bundle, "7", kind, users, as_of, 8))
    assert storage.read_bytes("adapted.parquet") == storage.read_bytes("scanned.parquet")


def test_a_partition_is_written_from_a_base(storage: Storage) -> None:
    bundle = bundle_of_rows(SUPPORT_ROWS)
    as_of, users = schema.day_end(day_of(NUM_DAYS - 1)), IDS["user_id"]
    where = Partition(TaskKindConfig(), "7", as_of.date(), "shard-000")
    storage.write_batches("scanned.parquet", adapt(storage, bundle, "7", where.kind, users, as_of, 8))
    assert not storage.exists("recent")
    write_partition(config(storage), storage, bundle, where, users, as_of, {})
    assert storage.exists("recent/user_id/current.json")
    assert any(name.startswith("recent/") for name in of(storage).files(USERS))
    # Written in the same way, so equal bytes.
    assert storage.read_bytes(where.path) == storage.read_bytes("scanned.parquet")
    require_same_bytes(storage, bundle, as_of)
