"""A process that runs the product's verbs for `benchmarks.scale`, one command a line, with everything imported beforehand.

A verb's seconds, processor seconds and peak memory are of this process; `parts` are wall seconds inside it, by function.
"""

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from benchmarks.options import ROOT, BenchmarkError
from benchmarks.scale_world import LAST, NEXT, World

Measured = dict[str, Any]
_ERROR_CHARACTERS = 4000


class Worker:
    """The process, as the one that measures sees it."""

    def __init__(self, log: Path) -> None:
        self._log = log
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.scale_worker"],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )

    def run(self, verb: str, world: World, **arguments: Any) -> Measured:
        """Raises BenchmarkError, with the end of the process' log, if the verb fails."""
        place = [str(world.folder), world.entities, world.redis, world.num_shards]
        reading, writing = self._process.stdout, self._process.stdin
        assert reading is not None
        assert writing is not None
        writing.write(json.dumps({"verb": verb, "world": place, "arguments": arguments}) + "\n")
        writing.flush()
        answer = reading.readline()
        if not answer:
            self._process.wait()
            raise BenchmarkError(f"{verb} of {world.entities} entities failed:\n{self._log.read_text()[-_ERROR_CHARACTERS:]}")
        found: Measured = json.loads(answer)
        return found

    def close(self) -> None:
        """End it; it has nothing left to do once it was told everything."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        self._process.wait()


def _verbs() -> dict[str, Callable[..., Any]]:
    from benchmarks import scale_ray, scale_world
    from limaml import schema
    from limaml.embeddings import cutover, daily, fill
    from limaml.events.recent import Recent

    def recent(world: World) -> None:
        support_rows = world.cfg.meta.support_rows
        as_of = schema.day_end(LAST)
        Recent(world.storage, world.tables, world.cfg.task_kind.entity_column, as_of, support_rows).move_on(world.cfg)

    return {
        "write": scale_world.write,
        "register": scale_world.register,
        "recent": recent,
        "plan": lambda world, version: fill.plan_fill(world.cfg, version, LAST, "bench"),
        "fill": lambda world, version, shard: fill.fill_shard(world.cfg, version, shard, "bench"),
        "cut_over": lambda world, version: cutover.cut_over(world.cfg, version, "bench"),
        "adapt_day": lambda world: daily.adapt_day(world.cfg, NEXT),
        "publish_day": lambda world: daily.publish_day(world.cfg, NEXT, "bench"),
        "check": scale_world.check,
        "train": scale_ray.train,
        "share": scale_ray.repeated_share,
    }


def _timers(seconds: dict[str, float]) -> None:
    """From here on these functions add the seconds they take to `seconds`; one that calls another has the other's as well."""
    from limaml.embeddings import cutover, daily, fill, publish
    from limaml.events import gates
    from limaml.events.recent import Recent
    from limaml.io import lease

    timed: list[tuple[Any, str, str]] = [
        (fill, "active_entities", "list_entities"),
        (fill, "publish_features", "publish_features"),
        (fill, "write_partition", "adapt_and_gate"),
        (gates, "check_embeddings", "gate"),
        (fill, "publish", "publish_embeddings"),
        (fill, "require_published", "read_back"),
        (cutover, "require_published", "read_back"),
        (publish, "publish", "publish_embeddings"),
        (publish, "require_published", "read_back"),
        (daily, "write_partition", "adapt_and_gate"),
        (daily, "publish", "publish_embeddings"),
        (daily, "require_published", "read_back"),
        (daily, "publish_features", "publish_features"),
        (Recent, "move_on", "recent"),
        (lease._LeaseTable, "acquire", "lease"),
    ]
    for owner, name, part in timed:
        setattr(owner, name, _timed(getattr(owner, name), part, seconds))


def _timed(function: Callable[..., Any], part: str, seconds: dict[str, float]) -> Callable[..., Any]:
    def call(*arguments: Any, **named: Any) -> Any:
        start = time.perf_counter()
        try:
            return function(*arguments, **named)
        finally:
            seconds[part] = seconds.get(part, 0.0) + time.perf_counter() - start

    return call


def _imported() -> None:
    """What a verb imports when it needs it."""
    import duckdb  # noqa: F401
    import pyarrow as pa
    import torch  # noqa: F401

    import limaml.embeddings.stream
    import limaml.models.bundle
    import limaml.training.ray_entry  # noqa: F401
    from limaml import schema
    from limaml.events import gates
    from limaml.features.feature_store import import_feast

    import_feast()
    import mlflow.artifacts  # noqa: F401

    # Great Expectations imports at its first suite.
    gates.check_features(pa.table({"event_id": ["a"]}), schema.EVENTS, "nothing")


def _measure(function: Callable[[], Any]) -> Measured:
    # 5: the peak starts anew at what is held now.
    Path("/proc/self/clear_refs").write_text("5")
    wall, cpu = time.perf_counter(), _cpu_s()
    result = function()
    return {
        "seconds": time.perf_counter() - wall,
        "cpu_s": _cpu_s() - cpu,
        "peak_mib": _peak_mib(),
        "result": result if isinstance(result, str | int | float) else None,
    }


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _peak_mib() -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 1024


def _serve(commands: IO[str], answers: IO[str]) -> None:
    from limaml import telemetry

    telemetry.configure()
    _imported()
    verbs, parts = _verbs(), dict[str, float]()
    _timers(parts)
    worlds: dict[str, World] = {}
    for line in commands:
        command = json.loads(line)
        folder, *rest = command["world"]
        world = worlds.setdefault(folder, World(Path(folder), *rest))
        parts.clear()
        found = _measure(lambda: verbs[command["verb"]](world, **command["arguments"]))  # noqa: B023  called at once
        answers.write(json.dumps(found | {"parts": parts}) + "\n")
        answers.flush()


def main() -> None:
    # Answers have a descriptor of their own: what verbs and their libraries print goes to the log.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    os.environ["TZ"] = "UTC"
    time.tzset()
    _serve(sys.stdin, answers)


if __name__ == "__main__":
    main()
