"""The meta block (theta_meta): what is adapted on one task's support, and how its output, the meta embedding, is computed.

A block is three functions: `rates` (the shape of one task's parameters), `start` (theta for each of T tasks, ready to be
adapted) and `prior` (the embedding of an empty support). `start` gets support rows without labels: a label reaches the block
only through the inner gradient, never while that row's own inner loss is taken. A block that `reads_items` also gets the rows'
item vectors from the global block, 0 for tasks that are not adapted.

    T tasks, S support rows, F features, K = D - 1 factors, D embedding width
"""

from itertools import pairwise
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limaml.config import ModelConfig
from limaml.errors import DataError
from limaml.features.encoder import EncoderDims
from limaml.models.adapted import Adapted, AdaptedMlp, AdaptedVector, Params
from limaml.models.dense import linear, linear_relu
from limaml.tasks.rows import Rows

FACTORS = "vector"
"""Name of the task vector among the adapted parameters: factors first, the level last."""

_SECONDS_PER_DAY = 86_400.0
_ITEM_WEIGHT, _ITEM_DAMPING = 10.0, 10.0
"""The first multiple of the items' mean, and the rows it is shrunk by. On MovieLens' validation users weights of 5 to 20 and
shrinkages of 1 to 20 rows did alike (experiments/LOG.md)."""


class MetaBlock(Protocol):
    """What the inner loop asks of a block."""

    reads_items: bool

    def rates(self) -> dict[str, torch.Size]: ...
    def start(self, entity_index_T: Tensor, support: Rows, sizes: Params, item_TSK: Tensor | None = None) -> Adapted: ...
    def prior(self) -> Tensor: ...


class TaskVector(nn.Module):
    """The embedding itself is what is adapted: phi is a vector of D numbers, the prior is theta.

    A task starts at theta or, if the block reads items, at theta + [w * sum of the support's item vectors / (rows + c), 0].
    """

    def __init__(self, embedding_dim: int, *, reads_items: bool) -> None:
        super().__init__()
        self.reads_items = reads_items
        self.vector = nn.Parameter(torch.zeros(embedding_dim))
        self.item_scale = nn.Parameter(torch.ones(1)) if reads_items else None

    def rates(self) -> dict[str, torch.Size]:
        return {FACTORS: self.vector.shape}

    def start(self, entity_index_T: Tensor, support: Rows, sizes: Params, item_TSK: Tensor | None = None) -> AdaptedVector:
        """The vector, moved towards the support's items if they are read; labels speak through the inner gradient alone."""
        vector_TD = self.vector.expand(len(entity_index_T), -1)
        if self.item_scale is not None:
            assert item_TSK is not None
            sum_TK = (support.mask_TR.unsqueeze(2) * item_TSK).sum(dim=1)
            mean_TK = sum_TK / (support.mask_TR.sum(dim=1, keepdim=True) + _ITEM_DAMPING)
            vector_TD = vector_TD + F.pad(_ITEM_WEIGHT * self.item_scale * mean_TK, (0, 1))
        return AdaptedVector(vector_TD, sizes[FACTORS])

    def prior(self) -> Tensor:
        return self.vector


class IdMlp(nn.Module):
    """ID embedding -> MLP (LiMAML, section 3); the entity's own row and the MLP are adapted, all other rows stay.

    Row 0 is the unknown entity, trained by tasks whose entity is hidden; the prior is what the MLP makes of it.
    """

    reads_items = False

    def __init__(self, num_entities: int, id_dim: int, hidden: tuple[int, ...], embedding_dim: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(num_entities + 1, id_dim) * id_dim**-0.5)
        self.mlp = _mlp_parameters((id_dim, *hidden, embedding_dim))

    def rates(self) -> dict[str, torch.Size]:
        return {"id": self.table.shape[1:]} | {name: p.shape for name, p in self.mlp.items()}

    def start(self, entity_index_T: Tensor, support: Rows, sizes: Params, item_TSK: Tensor | None = None) -> AdaptedMlp:  # noqa: ARG002
        """What the MLP makes of the entity's row; the support rows speak through the inner gradient alone."""
        return AdaptedMlp(dict(self.mlp.items()), sizes, self.table[entity_index_T].unsqueeze(1), input_moves=True)

    def prior(self) -> Tensor:
        return _mlp(self.mlp, self.table[:1])[0]


class RowMlp(nn.Module):
    """An MLP over each support row's features, averaged over the support; an empty support gives a learned vector."""

    reads_items = False

    def __init__(self, num_features: int, hidden: tuple[int, ...], embedding_dim: int, *, row_age: bool) -> None:
        super().__init__()
        self.row_age = row_age
        self.mlp = _mlp_parameters((num_features, *hidden, embedding_dim))
        self.empty = nn.Parameter(torch.zeros(embedding_dim))

    def features(self, support: Rows) -> Tensor:
        """(T, S, F): items, profile and context, and the row's age in days on a logarithmic scale."""
        if not self.row_age:
            return support.dense
        return torch.cat([support.dense, torch.log1p(support.gap_s_TR / _SECONDS_PER_DAY).unsqueeze(-1)], dim=-1)

    def rates(self) -> dict[str, torch.Size]:
        return {name: p.shape for name, p in self.mlp.items()}

    def start(self, entity_index_T: Tensor, support: Rows, sizes: Params, item_TSK: Tensor | None = None) -> AdaptedMlp:  # noqa: ARG002
        count_T1 = support.mask_TR.sum(dim=1, keepdim=True)
        pool_TS1 = (support.mask_TR / count_T1.clamp(min=1.0)).unsqueeze(2)
        return AdaptedMlp(dict(self.mlp.items()), sizes, self.features(support), pool_TS1=pool_TS1, empty_D=self.empty)

    def prior(self) -> Tensor:
        return self.empty


def build_meta_block(cfg: ModelConfig, dims: EncoderDims) -> TaskVector | IdMlp | RowMlp:
    """The configured block."""
    if cfg.meta_block == "task_vector":
        return TaskVector(cfg.embedding_dim, reads_items=cfg.start == "items")
    if cfg.meta_block == "id_mlp":
        return IdMlp(dims.num_entities, cfg.id_dim, cfg.meta_hidden, cfg.embedding_dim)
    if cfg.meta_block == "row_mlp":
        num_features = dims.item_dense + dims.user_dense + dims.context + int(cfg.row_age)
        return RowMlp(num_features, cfg.meta_hidden, cfg.embedding_dim, row_age=cfg.row_age)
    raise DataError(f"model.meta_block must be task_vector, id_mlp or row_mlp, got {cfg.meta_block!r}")


def _mlp_parameters(widths: tuple[int, ...]) -> nn.ParameterDict:
    """Weights (in, out) and biases of a ReLU network, He-initialised."""
    params = nn.ParameterDict()
    for layer, (fan_in, fan_out) in enumerate(pairwise(widths)):
        params[f"weight{layer}"] = nn.Parameter(torch.randn(fan_in, fan_out) * (2.0 / fan_in) ** 0.5)
        params[f"bias{layer}"] = nn.Parameter(torch.zeros(fan_out))
    return params


def _mlp(params: nn.ParameterDict, x: Tensor) -> Tensor:
    last = len(params) // 2 - 1
    for layer in range(last):
        x = linear_relu(x, params[f"weight{layer}"].t(), params[f"bias{layer}"])
    return linear(x, params[f"weight{last}"].t(), params[f"bias{last}"])
