"""Small random networks and batches in float64."""

from collections.abc import Callable, Sequence

import pytest
import torch

from limaml.config import Config
from limaml.features.encoder import EncoderDims
from limaml.models.network import Network, build_network
from limaml.tasks.rows import Rows, TaskBatch
from limaml.training.warm_start import measure_gains

DIMS = EncoderDims(num_items=5, num_entities=4, item_dense=3, user_dense=2, context=3, item_static=2, vectors=2)
VECTOR = {"entity": "item", "name": "text", "type": "vector", "width": 1, "encoder": "noise-1", "licence": "MIT"}
"""What a pool needs declared; its numbers are random here."""


def make_config(model: dict[str, object] | None = None, meta: dict[str, object] | None = None) -> Config:
    # Small rates and a narrow prior: random items are longer than fitted ones, and a wild step amplifies rounding.
    slow = {"inner_lr": 0.5, "factor_inner_lr": 0.7, "damping": 1.0, "factor_damping": 2.0, "prior_std": 0.3}
    small = {
        "item_vectors": "learned",
        "embedding_dim": 3,
        "id_dim": 2,
        "meta_hidden": (4,),
        "global_hidden": (5, 4),
        "sequence_width": 4,
        "dropout": 0.0,
    }
    sections = {"model": small | (model or {}), "meta": slow | (meta or {})}
    return Config.model_validate({"source": {"kind": "synthetic"}, "features": [VECTOR], **sections})


def make_network(cfg: Config, seed: int = 0) -> Network:
    """Every parameter random, so that no term is zero by its initial value; gains as measured on random rows."""
    network = build_network(cfg, DIMS, seed).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(noise * (0.1 if ".log_" in name else 0.5))
    measure_gains(network, "user", make_rows([6, 6], seed), torch.tensor([0, 1]))
    return network


def make_rows(lengths: Sequence[int], seed: int, padding: int = 0, dims: EncoderDims = DIMS) -> Rows:
    """Rows of len(lengths) tasks; padding holds random values too, which must change nothing."""
    generator = torch.Generator().manual_seed(seed)
    num_tasks, width = len(lengths), max(1, *lengths, 1) + padding

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return Rows(
        item_index_TR=torch.randint(0, dims.num_items + 1, (num_tasks, width), generator=generator),
        item_dense_TRF=normal(num_tasks, width, dims.item_dense),
        user_dense_TRF=normal(num_tasks, width, dims.user_dense),
        context_TRF=normal(num_tasks, width, dims.context),
        mask_TR=(torch.arange(width)[None] < torch.tensor(lengths)[:, None]).double(),
        gap_s_TR=(normal(num_tasks, width).exp() * 86_400).sort(dim=1, descending=True).values,
        label_TR=(normal(num_tasks, width) > 0).double(),
    )


def make_batch(support: Sequence[int], query: Sequence[int], seed: int = 0) -> TaskBatch:
    entity_index_T = torch.tensor([(task + seed) % (DIMS.num_entities + 1) for task in range(len(support))])
    entities = tuple(f"entity-{task}" for task in range(len(support)))
    return TaskBatch(make_rows(support, seed), make_rows(query, seed + 1), entity_index_T, entities)


@pytest.fixture
def config() -> Callable[..., Config]:
    return make_config


@pytest.fixture
def network() -> Callable[..., Network]:
    return make_network


@pytest.fixture
def rows() -> Callable[..., Rows]:
    return make_rows


@pytest.fixture
def batch() -> Callable[..., TaskBatch]:
    return make_batch
