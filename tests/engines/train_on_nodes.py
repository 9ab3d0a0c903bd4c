"""One outer step's gradient on Ray Train, a worker a node: what `test_ray_cluster` runs as the driver of a cluster.

Usage: train_on_nodes.py SIZE FOLDER, where FOLDER holds config.json, whose ray.address is the cluster's, and logged.parquet;
each worker writes FOLDER/RANK.json.
"""

import json
import sys
from pathlib import Path

from limaml.config import load
from limaml.io import cluster


def step(job: dict[str, str]) -> None:
    """What a worker does."""
    import pyarrow.parquet as pq
    import ray

    from limaml.training.step import Workers
    from tests.unit.training.gradient_of_worker import gradient

    folder, workers = Path(job["folder"]), Workers.current()
    found = gradient(load(folder / "config.json"), pq.read_table(folder / "logged.parquet"), workers)
    node = ray.get_runtime_context().get_node_id()
    (folder / f"{workers.rank}.json").write_text(json.dumps([*found, workers.size, node]))


def main(size: int, folder: Path) -> None:
    with cluster.connected(load(folder / "config.json")):
        import ray.train
        from ray.train.torch import TorchTrainer

        trainer = TorchTrainer(
            step,
            train_loop_config={"folder": str(folder)},
            scaling_config=ray.train.ScalingConfig(num_workers=size, placement_strategy="STRICT_SPREAD"),
            run_config=ray.train.RunConfig(storage_path=str(folder / "results")),
        )
        trainer.fit()


if __name__ == "__main__":
    # As a module, so that workers import `step` instead of being sent it.
    from tests.engines import train_on_nodes

    train_on_nodes.main(int(sys.argv[1]), Path(sys.argv[2]))
