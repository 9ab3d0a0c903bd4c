"""What many entities cost: a fill, a daily run, and Ray's workers, by the product's own verbs on two cores.

    seconds.<entities>      from the partitions of logged rows to embeddings in Redis: listing the entities, then every shard of
                            the fill, two at a time, each adapted, gated, written, published and read back by a sample
    peak_mib.<entities>     of the processes that run at one time, added up, the highest of all verbs; Redis' own apart
    exponent                of seconds in entities, by least squares on logarithms
    daily_share             processor seconds of a day in which 2 % of the entities have new rows (adapt, publish) over those of
                            plan-fill, fill and cut-over, at the most entities
    ray_efficiency.2        tasks/s of training with two Ray workers over twice those with one

    verbs.<entities>        seconds, processor seconds and peak of every verb, features and cut-over included
    parts.<entities>        seconds inside the verbs, of both processes together

Entities have 16 rows in the mean and a long tail (lognormal) over 28 days. The network is an untrained one of
configs/movielens.toml. MLflow is on SQLite, Redis a server of our own. Imports are done before anything is timed.

    python -m benchmarks.scale [--quick]        writes benchmarks/results/scale.json
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import results
from benchmarks.options import ROOT
from benchmarks.publish import redis_server
from benchmarks.scale_worker import Measured, Worker
from benchmarks.scale_world import CHANGED_SHARE, NUM_DAYS, ROWS_A_ENTITY, World

SIZES, QUICK_SIZES = (10_000, 100_000, 1_000_000), (1_000, 4_000, 10_000)
NUM_SHARDS = 4
"""More than processes, so that one adapts while the other publishes: the lease lets one shard publish at a time."""
_NUM_PROCESSES = 2
_RAY_ENTITIES, _TASKS = 2_000, (64, 512)
_WARM_UP = 500


def measure(sizes: Sequence[int], *, ray: bool) -> dict[str, Any]:
    """Everything, from the smallest size on."""
    found: dict[str, Any] = {"machine": results.machine(), "versions": results.versions(), "settings": _settings()}
    found |= {name: {} for name in ("seconds", "peak_mib", "verbs", "parts", "redis_mib", "rows", "load")}
    with _workers() as (folder, workers):
        _filled(workers, folder / "warm", _WARM_UP)
        for size in sizes:
            for name, value in _filled(workers, folder / str(size), size).items():
                found[name][str(size)] = value
            took = (f"{verb} {one['seconds']:.1f} s" for verb, one in found["verbs"][str(size)].items())
            _say(f"{size:,} entities: {', '.join(took)}")
        found |= _ray(workers[0], folder / "ray") if ray else {}
    seconds = [found["seconds"][str(size)] for size in sizes]
    found["exponent"] = float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])
    largest = found["verbs"][str(sizes[-1])]
    day, fill = (sum(largest[verb]["cpu_s"] for verb in verbs) for verbs in (_DAILY, _FILL))
    return found | {"daily_share": day / fill, "daily_share_of_seconds": _wall(largest, _DAILY) / _wall(largest, _FILL)}


_FILL, _DAILY = ("plan", "fill", "cut_over"), ("adapt_day", "publish_day")


def _filled(workers: list[Worker], folder: Path, entities: int) -> dict[str, Any]:
    """A world made, filled, cut over, and one day more."""
    folder.mkdir()
    with redis_server(folder) as connection:
        world, one = World(folder, entities, connection, NUM_SHARDS), workers[0]
        rows = one.run("write", world)["result"]
        version = one.run("register", world)["result"]
        verbs = {"recent": one.run("recent", world), "plan": one.run("plan", world, version=version)}
        verbs["fill"] = _fill(workers, world, version)
        verbs["cut_over"] = one.run("cut_over", world, version=version)
        one.run("check", world)
        verbs |= {verb: one.run(verb, world) for verb in _DAILY}
        redis_mib, redis_cpu_s = _redis_figures(connection)
    shutil.rmtree(folder)
    return {
        "seconds": verbs["plan"]["parts"]["list_entities"] + verbs["fill"]["seconds"],
        "peak_mib": max(verb["peak_mib"] for name, verb in verbs.items() if name != "recent"),
        "verbs": {name: {key: verb[key] for key in ("seconds", "cpu_s", "peak_mib")} for name, verb in verbs.items()},
        "parts": {name: verb["parts"] for name, verb in verbs.items()},
        "redis_mib": redis_mib,
        "rows": rows,
        "load": {"one_minute": os.getloadavg()[0], "redis_cpu_s": redis_cpu_s},
    }


def _fill(workers: list[Worker], world: World, version: str) -> Measured:
    """All shards, each by the first process that is free."""
    shards, start = iter(range(world.num_shards)), time.perf_counter()
    done: list[Measured] = []

    def work(worker: Worker) -> float:
        peaks = [0.0]
        for shard in shards:
            done.append(worker.run("fill", world, version=version, shard=shard))
            peaks.append(done[-1]["peak_mib"])
        return max(peaks)

    with ThreadPoolExecutor(len(workers)) as pool:
        peaks = list(pool.map(work, workers))
    names = {name for one in done for name in one["parts"]}
    return {
        "seconds": time.perf_counter() - start,
        "cpu_s": sum(one["cpu_s"] for one in done),
        "peak_mib": sum(peaks),
        "parts": {name: sum(one["parts"].get(name, 0.0) for one in done) for name in sorted(names)},
    }


def _ray(worker: Worker, folder: Path) -> dict[str, Any]:
    folder.mkdir()
    world = World(folder, _RAY_ENTITIES, "127.0.0.1:1", NUM_SHARDS)
    worker.run("write", world)
    speeds: dict[str, dict[str, float]] = {}
    for tasks in _TASKS:
        speeds[str(tasks)] = {
            str(size): worker.run("train", world, num_workers=size, tasks_per_step=tasks)["result"] for size in (1, 2)
        }
    shares = {str(tasks): worker.run("share", world, tasks_per_step=tasks)["result"] for tasks in _TASKS}
    _say(f"training on Ray, tasks/s: {json.dumps(speeds)}")
    efficiency = {tasks: one["2"] / (2 * one["1"]) for tasks, one in speeds.items()}
    return {
        "ray_efficiency": {"1": 1.0, "2": efficiency[str(_TASKS[0])]},
        "ray": {"tasks_per_s": speeds, "efficiency": efficiency, "repeated_share": shares},
    }


@contextmanager
def _workers() -> Iterator[tuple[Path, list[Worker]]]:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="limaml-scale-")))
        workers = [Worker(folder / f"worker-{number}.log") for number in range(_NUM_PROCESSES)]
        for worker in workers:
            stack.callback(worker.close)
        yield folder, workers


def _redis_figures(connection: str) -> tuple[float, float]:
    """Peak MiB and processor seconds of the server."""
    import redis

    host, port = connection.split(":")
    with redis.Redis(host, int(port)) as client:
        info: Any = client.info()
    return info["used_memory_peak"] / 2**20, info["used_cpu_user"] + info["used_cpu_sys"]


def _wall(verbs: dict[str, Measured], names: Sequence[str]) -> float:
    return float(sum(verbs[name]["seconds"] for name in names))


def _settings() -> dict[str, Any]:
    return {
        "configuration": "configs/movielens.toml",
        "rows_a_entity": ROWS_A_ENTITY,
        "days": NUM_DAYS,
        "changed_share": CHANGED_SHARE,
        "shards": NUM_SHARDS,
        "processes": _NUM_PROCESSES,
    }


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="1,000, 4,000 and 10,000 entities, without Ray, written to build/")
    parser.add_argument("--sizes", type=int, nargs="+", help="numbers of entities, at least two, ascending")
    parser.add_argument("--no-ray", action="store_true", help="leave Ray out")
    parser.add_argument("--out", type=Path, help="where the results go")
    arguments = parser.parse_args()
    sizes = arguments.sizes or (QUICK_SIZES if arguments.quick else SIZES)
    out = arguments.out or ROOT / ("build/scale-quick.json" if arguments.quick else "benchmarks/results/scale.json")
    found = measure(sizes, ray=not (arguments.quick or arguments.no_ray))
    results.write(found, out)
    _say(f"written to {out}")
    print(json.dumps({name: found[name] for name in ("seconds", "peak_mib", "exponent", "daily_share")}, indent=1))


if __name__ == "__main__":
    main()
