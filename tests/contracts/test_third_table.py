"""A table that nobody here has seen: from `limaml init` to an answer over HTTP, by the verbs that a person types.

A library's loans: a semicolon CSV file with a byte order mark, integer keys, ratings in halves, naive local times, no table
of readers; and a Parquet file of books with a text, a price, a category and vectors of 32 numbers. The configuration is the
one that `init` writes, with the two edits that it asks for. Its days end yesterday, so that what is published is fresh.
"""

import csv
import json
import os
import random
import subprocess
import sys
from datetime import UTC, datetime, time, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from limaml import config, schema
from limaml.events import catalogue
from limaml.events.logged import read_logged
from limaml.io.storage import Storage
from limaml.registry import Registry
from limaml.training.candidate import BUNDLE, read_candidate

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
YESTERDAY = datetime.now(UTC).date() - timedelta(days=1)
DAYS = [YESTERDAY - timedelta(days=13 - n) for n in range(14)]
READERS = [7000 + 13 * n for n in range(60)]
BOOKS = [100_000 + n for n in range(40)]
SHELVES = ("crime", "travel", "poetry", "history")
# What `init` offers in comments: a request can say it, so it is declared.
OFFERED = '# [[features]]\n# entity = "context"\n# name = "desk"\n# type = "category"\n'
CONTEXT = {"at": f"{YESTERDAY}T12:00:00Z", "desk": "north"}
# Few steps: what is shown is that the chain holds, not how well it ranks.
SMALL = (
    "training.num_workers=1",
    "training.max_steps=20",
    "training.tasks_per_step=8",
    "training.validate_every=10",
    "model.embedding_dim=4",
    "model.global_hidden=[16]",
    "meta.support_rows=20",
    "embeddings.num_shards=1",
    "embeddings.min_dwell_s=0.0",
    "serving.poll_interval_s=0.1",
    "serving.store_timeout_s=2.0",
)


def write_loans(path):
    """Readers prefer one of the shelves, each another one."""
    drawn = random.Random(3)
    lines = ["loan;reader_no;book_no;returned_at;stars;days_kept;desk"]
    for day in DAYS:
        for _ in range(120):
            reader, book = drawn.choice(READERS), drawn.choice(BOOKS)
            likes = (reader + book) % len(SHELVES) == 0
            stars = min(5.0, max(1.0, (4.5 if likes else 2.5) + drawn.choice((-1.0, -0.5, 0.0, 0.5))))
            # Within the libraries' hours, so that Berlin's day is also the UTC day.
            at = datetime.combine(day, time(9 + drawn.randrange(10), drawn.randrange(60), drawn.randrange(60)))
            desk = drawn.choice(("north", "south"))
            lines.append(f"{len(lines)};{reader};{book};{at:%Y-%m-%d %H:%M:%S};{stars};{drawn.randrange(1, 29)};{desk}")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8-sig")


def write_books(path):
    numbers = np.random.default_rng(4).normal(size=(len(BOOKS), 32))
    table = {
        "book_no": BOOKS,
        "title": [f"The book of {n}" for n in range(len(BOOKS))],
        "shelf": [SHELVES[n % len(SHELVES)] for n in range(len(BOOKS))],
        "price": [None if n == 5 else 4.95 + n for n in range(len(BOOKS))],
        "blurb_vector": pa.array(numbers.tolist(), pa.list_(pa.float64())),
    }
    pq.write_table(pa.table(table), path)


class Library:
    """The folder of somebody who has two files and this package, and what the verbs said there."""

    def __init__(self, folder):
        self.folder, self.config = folder, folder / "library.toml"
        write_loans(folder / "loans.csv")
        write_books(folder / "books.parquet")

    def limaml(self, verb, *arguments):
        """Run one verb; returns what it said."""
        command = [sys.executable, "-m", "limaml.cli", verb, *arguments]
        done = subprocess.run(command, cwd=ROOT, env=os.environ, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        assert done.returncode == 0, f"{verb}: {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
        return done.stdout

    def verb(self, name, *arguments):
        """Run a DAG's verb with small settings; returns its result."""
        path, settings = self.folder / "result.json", [word for setting in SMALL for word in ("--set", setting)]
        self.limaml(name, *arguments, "--config", str(self.config), "--result", str(path), *settings)
        return json.loads(path.read_text())

    def init(self):
        answers = ("--label", "stars >= 4", "--timezone", "Europe/Berlin")
        tables = (str(self.folder / "loans.csv"), "--items", str(self.folder / "books.parquet"))
        self.guesses = self.limaml("init", *tables, *answers, "--out", str(self.config))
        self.written = self.config.read_text()
        edited = self.written.replace(OFFERED, OFFERED.replace("# ", ""))
        for name, value in (("encoder", "hash-32 1.0"), ("licence", "CC0-1.0")):
            edited = edited.replace(f'{name} = "unknown"', f'{name} = "{value}"')
        # The folder for what is kept is relative to where a verb runs: here the repository, which must stay as it is.
        self.config.write_text(edited.replace(".run/", f"{self.folder}/.run/"))
        self.cfg = config.load(self.config, SMALL)

    def run(self):
        """Through the day before yesterday as history, and yesterday as a day that arrives."""
        history, yesterday = str(DAYS[-2]), str(DAYS[-1])
        self.screen = self.limaml("check", "--config", str(self.config))
        self.verb("apply")
        self.ingested = self.verb("ingest", "--through", history)
        folder = self.verb("train", "--through", history)["candidate"]
        # As `evaluate` does, whatever it decides: of so few rows and steps its gate need not be convinced.
        self.version = Registry(self.cfg.registry).register(Path(folder) / BUNDLE, read_candidate(folder).run_id, {})
        for shard in self.verb("plan-fill", "--version", self.version, "--through", history)["shards"]:
            self.verb("fill", "--version", self.version, "--shard", str(shard))
        self.verb("cut-over", "--version", self.version)
        self.verb("ingest", "--day", yesterday)
        self.verb("adapt", "--day", yesterday)
        self.verb("publish", "--day", yesterday)


@pytest.fixture(scope="module")
def library(tmp_path_factory, start_server):
    library = Library(tmp_path_factory.mktemp("library"))
    library.init()
    library.run()
    library.server = start_server(library.cfg, library.folder)
    library.server.wait_until("/readyz", 200)
    return library


def loans(library):
    with (library.folder / "loans.csv").open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file, delimiter=";"))


def test_init_guesses_what_the_files_hold_and_asks_for_two_edits(library):
    columns = library.cfg.source.columns
    assert (columns.user_id, columns.item_id, columns.timestamp) == ("reader_no", "book_no", "returned_at")
    assert (library.cfg.source.users, library.cfg.source.item_columns.item_id) == ("", "book_no")
    declared = {f.name: (f.entity, f.type, f.width) for f in library.cfg.features if not f.aggregate}
    assert declared == {
        "title": ("item", "text", None),
        "shelf": ("item", "category", None),
        "price": ("item", "number", None),
        "blurb_vector": ("item", "vector", 32),
        "stars": ("event", "number", None),
        "days_kept": ("event", "number", None),
        "desk": ("context", "category", None),
        "hour": ("context", "cycle", None),
    }
    assert "item blurb_vector: vector: each value is 32 numbers; say what made them and under which licence" in library.guesses
    assert "context desk: category (not declared)" in library.guesses
    assert "event loan: left out: it numbers the rows" in library.guesses
    assert library.written.count("# correct it: ") == 3
    assert OFFERED in library.written


def test_check_finds_nothing_wrong_and_suggests_bounds(library):
    first, *_, last = library.screen.splitlines()
    assert first == f"14 days ({DAYS[0]} to {DAYS[-1]}, 0 without rows), 1680 events, 60 users, 40 items"
    assert "  min_label_rate = " in library.screen
    assert last == "Nothing is wrong."


def test_every_loan_is_logged_as_its_row_says(library):
    tables, storage = schema.tables(library.cfg.features), Storage(library.cfg.storage.root)
    logged = read_logged(storage, tables, through=DAYS[-1])
    names = ("user_id", "item_id", "timestamp", "label", "desk", "days_kept", "price", "shelf")
    found = sorted(tuple(row.values()) for row in logged.select(names).to_pylist())
    books = {str(row["book_no"]): row for row in pq.read_table(library.folder / "books.parquet").to_pylist()}
    berlin = ZoneInfo("Europe/Berlin")
    expected = []
    for row in loans(library):
        at = datetime.fromisoformat(row["returned_at"]).replace(tzinfo=berlin)
        book = books[row["book_no"]]
        values = (at.astimezone(UTC), int(float(row["stars"]) >= 4), row["desk"], float(row["days_kept"]))
        expected.append((row["reader_no"], row["book_no"], *values, book["price"], book["shelf"]))
    assert found == sorted(expected)
    vectors = catalogue.item_vectors(storage, tables)
    assert dict(zip(vectors["item_id"].to_pylist(), vectors["blurb_vector"].to_pylist(), strict=True)) == {
        book: np.float32(row["blurb_vector"]).tolist() for book, row in books.items()
    }


def scores(answer):
    return {item["item_id"]: item["score"] for item in answer["items"]}


def test_a_reader_is_answered_with_scores_of_their_own(library):
    books = [str(book) for book in BOOKS]
    answers = [library.server.ranked(str(reader), books, context=CONTEXT) for reader in READERS[:4]]
    lag_s = (datetime.now(UTC) - schema.day_end(YESTERDAY)).total_seconds()
    for answer in answers:
        used = answer["embeddings"]["user"]
        assert (answer["model_version"], used["fallback"], used["stale"]) == (library.version, None, False)
        assert used["age_s"] < lag_s + 3600  # Of yesterday's end, so the day that arrived was published; another day is 86,400.
        assert len(set(scores(answer).values())) == len(books)
    assert len({tuple(scores(answer)) for answer in answers}) == len(answers)
    nobody = library.server.ranked("1", books, context=CONTEXT)
    assert nobody["embeddings"]["user"]["fallback"] == "missing"
    assert set(scores(nobody)) == set(books)
    assert scores(nobody) != scores(answers[0])


def test_a_request_must_say_the_context_that_the_configuration_declares(library):
    refused = library.server.rank(str(READERS[0]), [str(BOOKS[0])], context={})
    assert refused.status_code == 400
    assert refused.json()["error"] == {"field": "context.desk", "rule": "is required", "value": None, "remedy": "add it"}
    unknown = library.server.ranked(str(READERS[0]), [str(BOOKS[0])], context=CONTEXT | {"desk": "west"})
    assert library.server.metric("limaml_unknown_categories_total", feature="desk") == 1
    assert scores(unknown) != scores(library.server.ranked(str(READERS[0]), [str(BOOKS[0])], context=CONTEXT))
