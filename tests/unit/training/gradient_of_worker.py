"""One worker's gradient of one outer step: imported by test_step, and run as a process for each of several workers.

Usage: gradient_of_worker.py RANK SIZE FOLDER, where FOLDER holds config.json and logged.parquet; writes FOLDER/RANK.json.
"""

import json
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist

from limaml.config import Config
from limaml.features.encoder import Encoder
from limaml.models.network import build_network
from limaml.tasks.sampling import TaskRows
from limaml.training.step import Workers, backward
from limaml.training.twin_and_refit import network_objective


def gradient(cfg: Config, logged: pa.Table, workers: Workers) -> tuple[list[str], list[float], float]:
    """This worker's tasks, and the flat gradient and the loss of step 3 after the all-reduce."""
    encoder = Encoder.fit(logged, cfg)
    rows = TaskRows.of(logged, encoder, cfg)
    network = build_network(cfg, encoder.dims, seed=1).double()
    losses, loss = backward(network, network_objective(network, rows, cfg, workers), cfg.training, 3, workers)
    flat = torch.cat([p.grad.flatten() for p in network.parameters() if p.requires_grad])
    return [entity for entity, _ in losses], flat.tolist(), float(loss)


def main(rank: int, size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=size)
    try:
        cfg = Config.model_validate(json.loads((folder / "config.json").read_text()))
        found = gradient(cfg, pq.read_table(folder / "logged.parquet"), Workers.current())
        (folder / f"{rank}.json").write_text(json.dumps(found))
        dist.barrier()
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
