"""What every engine does: one meta-batch of a configuration that ships, on MovieLens' widths, and the weights to differentiate.

Weights, rows and dropout are random: none of them changes what there is to compute.

    T tasks, R rows (S support, Q query), F features, H hidden width
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from limaml import config
from limaml.config import Config
from limaml.features.encoder import EncoderDims
from limaml.meta.engine import outer_loss
from limaml.models.network import Network, build_network
from limaml.tasks.rows import Rows, TaskBatch

Gradients = dict[str, Any]
"""Name of a trained parameter -> gradient: torch tensors, or arrays that numpy can read."""

_CONFIGS = Path(__file__).parents[1] / "configs"
_MOVIELENS = _CONFIGS / "movielens.toml"
_GRADIENT = ['meta.inner_step="gradient"', "meta.damping=100", "meta.factor_inner_lr=60", "meta.min_support_rows=2"]
ROWS: dict[str, tuple[Path, list[str]]] = {
    "task_vector": (_MOVIELENS, _GRADIENT),
    "paper": (_CONFIGS / "paper.toml", []),
    "sequence": (_MOVIELENS, [*_GRADIENT, 'model.meta_block="sequence"', 'model.start="prior"']),
}
"""Row of the tables -> a configuration that ships, and what is set on top of it: the step that peers have, the gradient's."""

DIMS = EncoderDims(num_items=1670, num_entities=932, item_dense=25, user_dense=34, context=3, item_static=21, item_sets=19)
"""Of an encoder fitted on MovieLens-100K's rows (the refit of configs/movielens.toml)."""
TASK_ROWS = 16
"""Support rows, and query rows, of a task."""


@dataclass(frozen=True)
class Work:
    """One meta-batch of a row of the tables."""

    row: str
    cfg: Config
    network: Network
    batch: TaskBatch
    keep: tuple[Tensor, ...]
    """Dropout's masks of the query rows, for the comparison of gradients; who is timed draws its own."""

    @property
    def weights(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Trained and frozen parameters, by name."""
        found = {name: p.detach() for name, p in self.network.named_parameters()}
        trained = {name for name, p in self.network.named_parameters() if p.requires_grad}
        return {n: p for n, p in found.items() if n in trained}, {n: p for n, p in found.items() if n not in trained}

    def draw(self) -> tuple[Tensor, ...]:
        """New masks, drawn as ours are: faster than `torch.nn.functional.dropout` on a CPU."""
        return self.network.global_block.draw_dropout(self.batch.query, generator_of(self.batch.query.mask_TR.device))


def make_work(row: str, num_tasks: int, dtype: torch.dtype = torch.float32, lengths: Tensor | None = None) -> Work:
    """The same arguments give the same numbers; `lengths`: (T,) support rows, and query rows, of tasks that differ."""
    path, settings = ROWS[row]
    cfg = config.load(path, settings)
    generator = torch.Generator().manual_seed(0)
    network = build_network(cfg, DIMS).to(dtype)
    with torch.no_grad():
        for name, p in network.named_parameters():
            # Nothing is zero by its first value, and rates stay as they are: a wild step amplifies rounding.
            if ".log_" not in name:
                p.add_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.05)
    lengths = torch.full((num_tasks,), TASK_ROWS) if lengths is None else lengths
    support, query = (_rows(lengths, generator).to(dtype=dtype) for _ in range(2))
    batch = TaskBatch(support, query, torch.zeros(num_tasks, dtype=torch.int64), tuple(map(str, range(num_tasks))))
    return Work(row, cfg, network, batch, network.global_block.draw_dropout(query, torch.Generator().manual_seed(1)))


def _rows(lengths: Tensor, generator: torch.Generator) -> Rows:
    mask_TR = (torch.arange(int(lengths.max()))[None] < lengths[:, None]).float()

    def normal(*last: int) -> Tensor:
        return torch.randn(*mask_TR.shape, *last, generator=generator)

    return Rows(
        item_index_TR=torch.randint(0, DIMS.num_items + 1, mask_TR.shape, generator=generator),
        item_dense_TRF=normal(DIMS.item_dense),
        user_dense_TRF=normal(DIMS.user_dense),
        context_TRF=normal(DIMS.context),
        mask_TR=mask_TR,
        gap_s_TR=normal().exp().cumsum(dim=1).flip(1) * 86_400,
        label_TR=(normal() > 0).float() * mask_TR,
    )


def limaml_gradients(work: Work, steps: int, generator: torch.Generator | None = None) -> Gradients:
    """Ours; with a generator in place of the work's masks, as training calls it."""
    work.network.zero_grad(set_to_none=True)
    outer_loss(
        work.network, work.batch, num_steps=steps, generator=generator or torch.Generator().manual_seed(1)
    ).loss.backward()
    return {name: p.grad for name, p in work.network.named_parameters() if p.requires_grad}


def generator_of(device: torch.device) -> torch.Generator:
    """The device's own."""
    return torch.cuda.default_generators[torch.cuda.current_device()] if device.type == "cuda" else torch.default_generator


def on(work: Work, device: torch.device | str) -> Work:
    """A copy on a device."""
    moved = build_network(work.cfg, DIMS).to(device, work.batch.support.mask_TR.dtype)
    moved.load_state_dict(work.network.state_dict())
    return replace(work, network=moved, batch=work.batch.to(device), keep=tuple(mask.to(device) for mask in work.keep))
