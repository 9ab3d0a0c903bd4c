"""The small installation of `embedding_world`, in every state that it passes through while a day and a second version come in.

Each step is a verb. It was run once, undisturbed: `begin` puts all back to where it was before a step, and `left_by` is all
that a fault in it could have changed, as the undisturbed step left it. At first one version serves from slot blue.
"""

import gc
import json
import shutil
import sqlite3
from contextlib import closing
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from limaml import registry
from limaml.embeddings.cutover import cut_over
from limaml.registry import Registry
from tests.contracts.embedding_world import ONE_DAY, TODAY, World
from tests.faults.process import Point, Verb

State = dict[str, Any]
STEPS = ("ingest", "plan-fill", "fill 0", "fill 1", "adapt", "publish", "cut-over")
SETTINGS = {"lease_ttl_s": 2.0, "lease_wait_s": 60.0}
"""A holder that was killed is succeeded soon."""
_TAGS = (registry.SLOT, registry.STATE, registry.COMPLETE_THROUGH)


@dataclass
class Installation:
    """Verbs run on it as processes; nothing of it is open in this one."""

    world: World
    day: date
    """Delivered, and taken in by the steps."""
    second: str
    """Version that the steps fill into slot green and make the champion."""
    started: list[Verb] = field(default_factory=list)
    _left: dict[str, State] = field(default_factory=dict)

    @classmethod
    def build(cls, root: Path, redis: str = "", postgres: str = "") -> "Installation":
        """`redis` (host:port) and `postgres` (URL, of registry and lease) in the place of SQLite's files."""
        root.mkdir(parents=True)
        world = World(root, redis)
        embeddings, stores = SETTINGS | ({"lease_url": postgres} if postgres else {}), world.cfg.registry
        world.cfg = world.cfg.model_copy(
            update={
                "embeddings": world.cfg.embeddings.model_copy(update=embeddings),
                "registry": stores.model_copy(update={"tracking_uri": postgres}) if postgres else stores,
            }
        )
        world.registry = Registry(world.cfg.registry)
        first = world.new_version(seed=1)
        world.fill(first)
        cut_over(world.cfg, first, "train-run")
        return cls(world, world.last + ONE_DAY, world.new_version(seed=2))

    def undisturbed(self, steps: tuple[str, ...] = STEPS) -> "Installation":
        """Run the steps, and keep what there is before and after each."""
        self.world.deliver(self.day)
        # A connection of SQLite that waits for the collector is one too many: copying its file would drop its locks.
        gc.collect()
        (self.root / "config.json").write_text(json.dumps(self.world.cfg.model_dump(mode="json")))
        for step in steps:
            self.keep(step)
            self.start(step).done()
            self._left[step] = self.state()
        return self

    @property
    def root(self) -> Path:
        return self.world.root

    def keep(self, step: str) -> None:
        shutil.copytree(self.root, self._kept(step))

    def begin(self, step: str) -> None:
        """End what still runs, and put every file back to where it was before this step."""
        self.end()
        shutil.rmtree(self.root)
        shutil.copytree(self._kept(step), self.root)

    def left_by(self, step: str) -> State:
        return self._left[step]

    def end(self) -> None:
        for verb in self.started:
            verb.end()
        self.started.clear()

    def start(self, step: str, *more: str, at: Point | None = None, clock_back_s: float = 0.0, **environment: str) -> Verb:
        """The step's verb, as its DAG calls it, with `more` arguments."""
        own = {
            "ingest": (f"--day={self.day}", f"--today={TODAY}"),
            "plan-fill": (f"--version={self.second}", f"--through={self.day - ONE_DAY}"),
            "fill 0": (f"--version={self.second}", "--shard=0"),
            "fill 1": (f"--version={self.second}", "--shard=1"),
            "adapt": (f"--day={self.day}",),
            "publish": (f"--day={self.day}",),
            "cut-over": (f"--version={self.second}",),
        }[step]
        argv = [step.split()[0], "--config", str(self.root / "config.json"), *own, *more]
        self.started.append(Verb(self.root, argv, at, clock_back_s, **environment))
        return self.started[-1]

    def state(self) -> State:
        """Every stored value online, every file that is not hidden, and what the registry says; not when it was said."""
        return {"online": self.online(), "files": self.files(), "registry": self.registered()}

    def online(self) -> dict[str, Any]:
        return dict(self.world.everything())

    def files(self, root: Path | None = None) -> dict[str, bytes]:
        """Of the storage root. A killed writer leaves a hidden file, which nobody reads."""
        root = root or self.root / "data"
        names = sorted(path.relative_to(root) for path in root.rglob("*") if path.is_file() and path.suffix != ".lock")
        return {str(name): (root / name).read_bytes() for name in names if not name.name.startswith(".")}

    def registered(self) -> set[tuple[str, ...]]:
        """Tags of the versions, and the alias."""
        with closing(sqlite3.connect(self.root / "mlflow.db")) as database:
            return registered_in(database)

    def _kept(self, step: str) -> Path:
        return self.root.with_name(f"{self.root.name} before {step}")


def registered_in(database: Any) -> set[tuple[str, ...]]:
    """The same, of an open database of MLflow's."""
    cursor = database.cursor()
    cursor.execute("SELECT version, key, value FROM model_version_tags")
    tags = {(str(version), key, value) for version, key, value in cursor.fetchall() if key in _TAGS}
    cursor.execute("SELECT version, alias FROM registered_model_aliases")
    return tags | {(str(version), alias) for version, alias in cursor.fetchall()}


def require_same(found: State, expected: State) -> None:
    """Names what differs, where pytest would print every byte."""
    for part in expected:
        if isinstance(expected[part], set):
            assert found[part] == expected[part], part
            continue
        differing = [key for key in {**expected[part], **found[part]} if found[part].get(key) != expected[part].get(key)]
        assert not differing, f"{part}: {sorted(differing)}"
