"""Random interleavings of fill, publish, cut-over, roll-back, retry, correction and crash (contract 4).

A run dies before an arbitrary write: of a file, of rows, of a tag. After every step, finished or not, what a reader can see is
checked; at the end what was interrupted is run again, and what is online must be, byte for byte, what the same steps leave
that nothing disturbed. The same machine drives SQLite and, with `-m services`, a real Redis server.

The machine is never told to do something after a crash that would change the outcome by itself: to fill as of another day, or
to correct as of another one. Everything else may come before the interrupted step is run again, or instead of it.
"""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, date, datetime
from functools import cache, reduce
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from limaml import registry, schema
from limaml.embeddings import cutover
from limaml.embeddings.adapt import adapt
from limaml.embeddings.context import EmbeddingContext
from limaml.embeddings.daily import adapt_day, publish_day
from limaml.embeddings.fill import fill_shard, plan_fill
from limaml.embeddings.partition import read_covered
from limaml.embeddings.publish import OnlineView
from limaml.errors import DataError, NothingToDo, StoreError
from limaml.events.ingest import ingest_day, ingest_history
from limaml.features.online.rows import OnlineRow
from limaml.io.lease import Held
from limaml.io.storage import Storage
from tests import declared
from tests.contracts.embedding_world import FIRST, HISTORY_DAYS, ITEMS, ONE_DAY, TODAY, USERS, World, day_of_events, flipped

NUM_EXAMPLES = 6
NUM_STEPS = 12
LATER_DAYS = 5
VERSIONS = ("1", "2", "3")
SHARDS = (0, 1)
RUN = "run-of-a-test"
FILLED = FIRST + (HISTORY_DAYS - 1) * ONE_DAY
LAST = FILLED + LATER_DAYS * ONE_DAY
EMBEDDINGS = {slot: schema.embedding_view("user", slot) for slot in schema.SLOTS}

Op = tuple[Any, ...]
"""A step and its arguments: ("plan", version), ("shard", version, number), ("cut_over", version), ("rollback", version),
("publish", day), ("correct", day, users with other labels)."""
Refusal = type[Exception] | tuple[type[Exception], ...] | None
REFUSED = (StoreError, DataError)
Online = dict[str, list[OnlineRow | None]]
"""View -> the row of every user (of every item)."""


class Crash(BaseException):
    """The process is gone."""


@contextmanager
def crashing(after: int | None) -> Iterator[None]:
    """Die before the write that follows `after` others."""
    if after is None:
        yield
        return
    left = after

    def counted(original: Callable[..., Any]) -> Callable[..., Any]:
        def before_a_write(*arguments: Any, **named: Any) -> Any:
            nonlocal left
            if left == 0:
                raise Crash
            left -= 1
            return original(*arguments, **named)

        return before_a_write

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in [(Held, "check"), (Storage, "write_bytes"), (Storage, "write_batches")]:
            patch.setattr(owner, name, counted(getattr(owner, name)))
        yield


class Installation:
    """The world with two versions in their slots, a third registered, and days that wait to be published; can be set back."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.context = EmbeddingContext.of(world.cfg)
        for seed in range(len(VERSIONS)):
            world.new_version(seed)
        for version in VERSIONS[:2]:
            world.fill(version)
            cutover.cut_over(world.cfg, version, RUN)
        for n in range(LATER_DAYS):
            world.deliver(FILLED + (n + 1) * ONE_DAY)
        ingest_history(world.cfg, LAST, TODAY)
        self._folders = [world.delivered, world.root / "data"]
        for folder in self._folders:
            shutil.copytree(folder, f"{folder}-at-first")
        self._tags = {version: world.tags(version) for version in VERSIONS}
        self._online = self.online()

    def set_back(self) -> None:
        for folder in self._folders:
            shutil.rmtree(folder)
            shutil.copytree(f"{folder}-at-first", folder)
        for version, tags in self._tags.items():
            gone = dict.fromkeys(self.world.tags(version).keys() - tags.keys())
            self.world.registry.set_tags(version, tags | gone)
        self.world.registry.set_champion(VERSIONS[1])
        for view in self.views():
            view.clear()
            found = self._online[view.name]
            kept = [at for at, row in enumerate(found) if row is not None]
            keys = self.keys(view)
            view.write([keys[at] for at in kept], [row for row in found if row is not None])

    def views(self) -> list[OnlineView]:
        names = (*EMBEDDINGS.values(), declared.USER_FEATURES.name, declared.ITEM_FEATURES.name)
        return [OnlineView(self.context.store(), name) for name in names]

    def keys(self, view: OnlineView) -> list[bytes]:
        [column] = view.codec.key_names
        return view.keys(pa.table({column: ITEMS if column == "item_id" else USERS}))

    def online(self) -> Online:
        return {view.name: view.read(self.keys(view)) for view in self.views()}

    def perform(self, op: Op) -> Any:
        cfg = self.world.cfg
        match op:
            case ("plan", version):
                return plan_fill(cfg, version, FIRST, RUN)
            case ("shard", version, number):
                return fill_shard(cfg, version, number, RUN)
            case ("cut_over", version):
                return cutover.cut_over(cfg, version, RUN)
            case ("rollback", version):
                return cutover.rollback(cfg, version, RUN)
            case ("publish", day) | ("correct", day, _):
                adapt_day(cfg, day)
                return publish_day(cfg, day, RUN)
        raise AssertionError(op)

    def deliver(self, op: Op) -> None:
        """Bring the corrected day of a correction in; the same one again changes nothing."""
        if op[0] == "correct":
            _, day, relabelled = op
            self.world.deliver(day, reduce(flipped, sorted(relabelled), day_of_events(day)))
            ingest_day(self.world.cfg, day, TODAY)


class Model:
    """What should be online, by the words of the contract: for each version, who has a row as of which day's end."""

    def __init__(self) -> None:
        self.relabelled: dict[date, list[frozenset[str]]] = {}
        """Users with other labels than delivered first, for each revision of a day."""
        self.state: dict[str, str] = {}
        self.fill_day = FILLED
        self.shards: set[int] = set()
        self.through: dict[str, date] = {}
        self.covered: dict[str, dict[date, int]] = {}
        self.rows: dict[str, dict[str, date]] = {}
        self.champion = ""
        for version in VERSIONS[:2]:
            self._plan(version)
            self._switch(version)

    @property
    def last(self) -> date:
        """The day that the champion is complete through."""
        return self.through[self.champion]

    @property
    def ready(self) -> list[str]:
        return [version for version, state in self.state.items() if state == "ready"]

    @property
    def previous(self) -> str | None:
        return next((version for version in self.ready if version != self.champion), None)

    @property
    def filling(self) -> str | None:
        return next((version for version, state in self.state.items() if state == "filling"), None)

    def revision(self, day: date) -> int:
        return len(self.relabelled.get(day, [frozenset()]))

    def apply(self, op: Op) -> None:
        match op:
            case ("plan", version):
                self._plan(version)
            case ("shard", _, number):
                self.shards.add(number)
            case ("cut_over", version) | ("rollback", version):
                self._switch(version)
            case ("publish", day):
                for version in self.ready:
                    self._advance(version, day)
            case ("correct", day, relabelled):
                self.relabelled.setdefault(day, [frozenset()]).append(relabelled)
                for version in self.ready:
                    self._heal(version)

    def _plan(self, version: str) -> None:
        self.state = {self.champion: "ready", version: "filling"} if self.champion else {version: "filling"}
        self.shards = set()
        self.fill_day = self.last if self.champion else self.fill_day
        window = [self.fill_day - n * ONE_DAY for n in range(4)]
        self.rows[version] = {user: self.fill_day for day in window for user in users_of(day)}
        days = (self.fill_day - FIRST).days + 1
        self.covered[version] = {day: self.revision(day) for day in (FIRST + n * ONE_DAY for n in range(days))}

    def _switch(self, version: str) -> None:
        if self.state[version] == "filling":
            self.state[version], self.through[version] = "ready", self.fill_day
        self._heal(version)
        self._advance(version, self.last if self.champion else self.fill_day)
        self.champion = version

    def _advance(self, version: str, last: date) -> None:
        while self.through[version] < last:
            day = self.through[version] = self.through[version] + ONE_DAY
            self.rows[version].update(dict.fromkeys(users_of(day), day))
            self.covered[version][day] = self.revision(day)

    def _heal(self, version: str) -> None:
        for day, revision in self.covered[version].items():
            if revision != self.revision(day):
                contents = self.relabelled[day]
                changed = contents[revision - 1] ^ contents[-1]
                self.rows[version].update(dict.fromkeys(changed, self.through[version]))
                self.covered[version][day] = self.revision(day)


@cache
def users_of(day: date) -> frozenset[str]:
    return frozenset(day_of_events(day)["user_id"].to_pylist())


CRASH = st.one_of(st.none(), st.integers(0, 14))
"""How many writes a step does before it dies."""

MEANWHILE: dict[str, set[str]] = {
    "plan": {"plan", "shard", "cut_over", "rollback", "publish", "correct"},
    "cut_over": {"plan", "shard", "cut_over", "rollback", "publish"},
    "rollback": {"plan", "cut_over", "rollback", "publish"},
    "publish": {"shard", "cut_over", "rollback", "publish"},
    "correct": {"rollback"},
}
"""What may come between a step that died and its next run."""


def may(name: str, when: Callable[["Embeddings"], Any] = lambda _: True) -> Any:
    """A rule's precondition: what may come now, and what makes sense."""
    return precondition(lambda self: (not self.interrupted or name in MEANWHILE[self.interrupted[0]]) and bool(when(self)))


class Embeddings(RuleBasedStateMachine):
    """Every rule is one step, which may die; `interrupted` is the one that did and was not run again yet."""

    installation: ClassVar[Installation]

    def __init__(self) -> None:
        super().__init__()
        self.installation.set_back()
        self.model = Model()
        self.log: list[Op] = []
        self.interrupted: Op | None = None
        self.half_done: set[int] = set()
        """Shards of the fill that died; what they had to write may be there in full."""
        self.sound = True
        """Whether the last step and its checks ended as they should."""

    @may("plan")
    @rule(version=st.sampled_from(VERSIONS), crash=CRASH)
    def plan(self, version: str, crash: int | None) -> None:
        self.run(("plan", version), crash, NothingToDo if version == self.model.champion else None)

    @may("shard", lambda self: self.model.filling)
    @rule(numbers=st.sampled_from([(0,), (1,), (0, 1), (1, 0)]), crash=CRASH)
    def shards(self, numbers: tuple[int, ...], crash: int | None) -> None:
        for number in numbers:
            self.run(("shard", self.model.filling, number), crash, None)

    @may("cut_over")
    @rule(version=st.sampled_from(VERSIONS), crash=CRASH)
    def cut_over(self, version: str, crash: int | None) -> None:
        state = self.model.state.get(version)
        missing = set(SHARDS) - self.model.shards if state == "filling" else set()
        may_be_filled = missing and missing <= self.half_done
        if may_be_filled:
            for number in sorted(missing):
                self.run(("shard", version, number), None, None)
        refused = state is None or (missing and not may_be_filled)
        self.run(("cut_over", version), crash, REFUSED if refused else None)

    @may("rollback")
    @rule(crash=CRASH)
    def rollback(self, crash: int | None) -> None:
        previous = self.model.previous
        self.run(("rollback", previous), crash, None if previous else REFUSED)

    @may("publish", lambda self: self.model.last < LAST)
    @rule(days=st.integers(1, 2), crash=CRASH)
    def publish(self, days: int, crash: int | None) -> None:
        self.run(("publish", min(self.model.last + days * ONE_DAY, LAST)), crash, None)

    @may("correct")
    @rule(days_ago=st.integers(0, 5), at=st.integers(0, 20), crash=CRASH)
    def correct(self, days_ago: int, at: int, crash: int | None) -> None:
        day = max(FIRST, self.model.last - days_ago * ONE_DAY)
        users = sorted(users_of(day))
        before = self.model.relabelled.get(day, [frozenset()])[-1]
        self.run(("correct", day, before ^ {users[at % len(users)]}), crash, None)

    @precondition(lambda self: self.interrupted)
    @rule(crash=CRASH)
    def retry_what_was_interrupted(self, crash: int | None) -> None:
        assert self.interrupted is not None
        self.run(self.interrupted, crash, None)

    @precondition(lambda self: self.log and not self.interrupted and self.log[-1][0] != "plan")
    @rule()
    def repeat_the_last_step(self) -> None:
        """All of its effects are there already: nothing changes."""
        self.sound = False
        op, before = self.log[-1], self.installation.online()
        if op[0] == "shard" and self.model.filling == op[1]:
            self.installation.perform(op)
        elif op[0] in ("publish", "correct"):
            with pytest.raises(NothingToDo):
                self.installation.perform(op)
        elif op[0] in ("cut_over", "rollback"):
            assert self.installation.perform(op)["status"] == "unchanged"
        assert self.installation.online() == before

    def run(self, op: Op, crash: int | None, refusal: Refusal) -> None:
        """Take one step; `refusal` is how it must be refused, None if it must not be.

        Before an interrupted step is run again, both may happen to others; and others may have done all that it was to do.
        """
        again = op == self.interrupted
        if self.interrupted and not again:
            crash = None  # one step at a time is left half done
        self.sound = False
        self.installation.deliver(op)
        try:
            with crashing(crash):
                result = self.installation.perform(op)
        except Crash:
            if op[0] == "shard":  # one that died is one still to be done
                self.half_done.add(op[2])
            else:
                self.interrupted = op
        except NothingToDo:
            if again:
                self.interrupted = None
                if op[0] != "plan":
                    self.done(op, {}, again)
            elif not self.interrupted and refusal is not NothingToDo:
                raise
        except (StoreError, DataError):
            if again or not (self.interrupted or refusal == REFUSED):
                raise
        else:
            assert refusal is None or self.interrupted, f"{op} must be refused"
            self.done(op, result, again)

    def done(self, op: Op, result: dict[str, Any], again: bool) -> None:
        interrupted = self.interrupted
        if again:
            self.interrupted = None
        elif interrupted and self._settles(op, result, interrupted):
            self.interrupted = None
            if interrupted[0] == "cut_over":
                op = interrupted
        if result.get("status") != "unchanged":
            self.log.append(op)
            self.model.apply(op)
            self.half_done = set() if op[0] == "plan" else self.half_done

    @staticmethod
    def _settles(op: Op, result: dict[str, Any], interrupted: Op) -> bool:
        """Whether `op` leaves nothing of an interrupted step to be done."""
        if op[0] == "plan":  # it empties the slot that the step was about
            return interrupted[0] in ("plan", "cut_over", "rollback")
        if op[0] in ("cut_over", "rollback"):
            return interrupted[0] in ("cut_over", "rollback") and result["version"] == interrupted[1]
        return op[0] == "publish" == interrupted[0] and op[1] >= interrupted[1]

    @invariant()
    def what_can_be_read_is_whole(self) -> None:
        online, model = self.installation.online(), self.model
        tags = {version: self.installation.world.tags(version) for version in VERSIONS}
        states = {version: found[registry.STATE] for version, found in tags.items() if registry.STATE in found}
        ready = [version for version, state in states.items() if state == "ready"]
        assert self.installation.world.champion().version == model.champion
        assert states[model.champion] == "ready"
        holders = [tags[version][registry.SLOT] for version, state in states.items() if state != "retired"]
        assert len(holders) == len(set(holders))
        # No row of another version is in a slot that somebody reads, or will.
        for version, state in states.items():
            if state != "retired":
                found = {row.version for row in online[EMBEDDINGS[tags[version][registry.SLOT]]] if row}
                assert found <= {_stored(version)}
        if not self.interrupted:
            assert set(ready) == set(model.ready)
        for version in set(ready) & set(model.ready):
            rows = _rows(online[EMBEDDINGS[tags[version][registry.SLOT]]])
            through = datetime.fromisoformat(tags[version][registry.COMPLETE_THROUGH]).date() - ONE_DAY
            covered = read_covered(self.installation.world.storage, self.installation.world.cfg.task_kind, version)
            expected = {day.isoformat(): revision for day, revision in model.covered[version].items()}
            if not self.interrupted:
                assert (rows, through, covered) == (model.rows[version], model.through[version], expected)
            # No row is lost, none goes back in time, and complete_through has no gap behind it.
            assert all(rows[user] >= day for user, day in model.rows[version].items())
            days = [FIRST + n * ONE_DAY for n in range((through - FIRST).days + 1)]
            assert all(covered[day.isoformat()] >= model.covered[version].get(day, 1) for day in days)
        self.sound = True

    def teardown(self) -> None:
        if not self.sound:  # the failure that stopped the machine says more
            return
        if self.interrupted:
            self.run(self.interrupted, None, None)
            self.what_can_be_read_is_whole()
        if self.model.filling:
            version = self.model.filling
            for number in SHARDS:
                self.run(("shard", version, number), None, None)
            self.run(("cut_over", version), None, None)
        self.what_can_be_read_is_whole()
        online = self.installation.online()
        self.check_vectors(online)
        self.installation.set_back()
        for op in self.log:
            self.installation.deliver(op)
            self.installation.perform(op)
        undisturbed = self.installation.online()
        assert online == undisturbed

    def check_vectors(self, online: Online) -> None:
        """Every row is what its version gives for its user's events, as they are now, before its instant."""
        world, context = self.installation.world, self.installation.context
        for version in self.model.ready:
            bundle = context.bundle(version)
            name = EMBEDDINGS[world.tags(version)[registry.SLOT]]
            [view] = [view for view in self.installation.views() if view.name == name]
            rows = dict(zip(USERS, online[name], strict=True))
            for day in set(self.model.rows[version].values()):
                users = sorted(user for user, of in self.model.rows[version].items() if of == day)
                table = adapt(world.storage, bundle, version, world.cfg.task_kind, users, schema.day_end(day), 512).read_all()
                assert view.rows(table) == [rows[user] for user in users]


def _stored(version: str) -> bytes:
    from feast.protos.feast.types.Value_pb2 import Value

    stored: bytes = Value(string_val=version).SerializeToString()
    return stored


def _rows(found: list[OnlineRow | None]) -> dict[str, date]:
    """User -> the last day that the row knows."""
    rows = zip(USERS, found, strict=True)
    return {user: (datetime.fromtimestamp(row.timestamp_us / 1e6, UTC) - ONE_DAY).date() for user, row in rows if row}


@pytest.mark.parametrize("store", ["sqlite", pytest.param("redis", marks=pytest.mark.services)])
@pytest.mark.fault(
    "verbs that die before any of their writes, in any order, with corrections and roll-backs between",
    after="readers see one version throughout; rows equal an undisturbed run's, byte for byte",
)
def test_whatever_happens_readers_see_one_version_and_the_end_is_that_of_an_undisturbed_run(
    store: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    world = World(tmp_path, request.getfixturevalue("redis_server") if store == "redis" else "")
    # Any fill may be given up for another one at once.
    settled = world.cfg.embeddings.model_copy(update={"fill_timeout_s": 1e-6})
    world.cfg = world.cfg.model_copy(update={"embeddings": settled})

    class Machine(Embeddings):
        installation = Installation(world)

    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=NUM_EXAMPLES,
            stateful_step_count=NUM_STEPS,
            derandomize=True,
            deadline=None,
            database=None,
            # Not shrunk: an example takes seconds, and a failing one is a dozen steps at most.
            phases=(Phase.generate,),
            suppress_health_check=list(HealthCheck),
        ),
    )
