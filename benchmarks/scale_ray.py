"""Outer steps on Ray with one worker and with two, and the part of a step that every worker repeats.

A worker has one thread, so two workers have twice the processors of one. Efficiency is their tasks/s over twice those of one.
"""

import time
from typing import Any

from benchmarks.scale_world import LAST, World
from limaml.config import Config

STEPS = 60
_EVERY = 20
_REPEATS = 10


def train(world: World, num_workers: int, tasks_per_step: int) -> float:
    """Tasks a second of the twin's outer steps, validation and start left out: the best of its stretches of 20 steps."""
    from limaml.tasks.splits import split_events
    from limaml.training.prepare import fit_encoders, read_history
    from limaml.training.ray_entry import train_on_ray

    cfg = _config(world, num_workers, tasks_per_step)
    logged = read_history(cfg, LAST)
    twin, refit = fit_encoders(cfg, logged, split_events(logged, cfg.evaluation))
    state = train_on_ray(cfg, LAST, twin, refit, name=f"scale-{num_workers}-{tasks_per_step}")
    assert state.twin_progress is not None
    return max(entry["tasks_per_s"] for entry in state.twin_progress.history)


def repeated_share(world: World, tasks_per_step: int) -> float:
    """Share of a worker's step, alone, that goes into drawing the meta-batch, which each of several workers does whole."""
    import torch

    from limaml.models.network import build_network
    from limaml.tasks.sampling import by_length, meta_batch
    from limaml.tasks.splits import split_events
    from limaml.training.prepare import fit_encoders, load_training_data, read_history
    from limaml.training.step import Workers, backward
    from limaml.training.twin_and_refit import network_objective

    cfg = _config(world, 1, tasks_per_step)
    logged = read_history(cfg, LAST)
    data = load_training_data(cfg, LAST, *fit_encoders(cfg, logged, split_events(logged, cfg.evaluation)))
    network = build_network(cfg, data.twin_dims, seed=1)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        objective = network_objective(network, data.twin_rows, cfg, Workers())
        whole = _best(lambda step: backward(network, objective, cfg.training, step, Workers()))
        drawn = _best(lambda step: by_length(meta_batch(data.twin_rows, cfg, seed=cfg.training.seed, step=step)))
    finally:
        torch.set_num_threads(before)
    return drawn / whole


def _best(call: Any) -> float:
    best = float("inf")
    for step in range(_REPEATS):
        start = time.perf_counter()
        call(step)
        best = min(best, time.perf_counter() - start)
    return best


def _config(world: World, num_workers: int, tasks_per_step: int) -> Config:
    training = {
        "num_workers": num_workers,
        "tasks_per_step": tasks_per_step,
        "max_steps": STEPS,
        "validate_every": _EVERY,
        "storage_path": str(world.folder / "ray_results"),
    }
    own = {"training": training, "evaluation": {"held_out": "hash"}, "local": {"run_root": str(world.folder)}}
    resolved = world.cfg.model_dump()
    return Config.model_validate(resolved | {name: resolved[name] | values for name, values in own.items()})
