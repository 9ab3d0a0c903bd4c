"""The meta block (theta_meta): what is adapted on one task's support, and how its output, the meta embedding, is computed.

A block is four functions: `rates` (the shape of one task's parameters), `initial` (theta for each of T tasks), `embed`
(phi, support) -> (T, D), and `prior` (the embedding of an empty support). `embed` gets support rows without labels: a label
reaches the block only through the inner gradient, never while that row's own inner loss is taken.

    T tasks, S support rows, F features, D embedding width, H hidden width
"""

from itertools import pairwise
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limaml.config import ModelConfig
from limaml.data.encoding import EncoderDims
from limaml.data.rows import Rows
from limaml.errors import DataError

Params = dict[str, Tensor]
"""Parameters of T tasks: the task is every tensor's leading dimension."""

FACTORS = "vector"
"""Name of the task vector among the adapted parameters: factors first, the level last."""

_SECONDS_PER_DAY = 86_400.0


class MetaBlock(Protocol):
    """What the inner loop asks of a block."""

    def rates(self) -> dict[str, torch.Size]: ...
    def initial(self, entity_index_T: Tensor) -> Params: ...
    def embed(self, phi: Params, support: Rows) -> Tensor: ...
    def prior(self) -> Tensor: ...


class TaskVector(nn.Module):
    """The embedding itself is what is adapted: phi is a vector of D numbers, the prior is theta."""

    def __init__(self, embedding_dim: int) -> None:
        super().__init__()
        self.vector = nn.Parameter(torch.zeros(embedding_dim))

    def rates(self) -> dict[str, torch.Size]:
        return {FACTORS: self.vector.shape}

    def initial(self, entity_index_T: Tensor) -> Params:
        return {FACTORS: self.vector.expand(len(entity_index_T), -1)}

    def embed(self, phi: Params, support: Rows) -> Tensor:  # noqa: ARG002
        """The vector; the rows speak through the inner gradient alone."""
        return phi[FACTORS]

    def prior(self) -> Tensor:
        return self.vector


class IdMlp(nn.Module):
    """ID embedding -> MLP (LiMAML, section 3); the entity's own row and the MLP are adapted, all other rows stay.

    Row 0 is the unknown entity, trained by tasks whose entity is hidden; the prior is what the MLP makes of it.
    """

    def __init__(self, num_entities: int, id_dim: int, hidden: tuple[int, ...], embedding_dim: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(num_entities + 1, id_dim) * id_dim**-0.5)
        self.mlp = _mlp_parameters((id_dim, *hidden, embedding_dim))

    def rates(self) -> dict[str, torch.Size]:
        return {"id": self.table.shape[1:]} | {name: p.shape for name, p in self.mlp.items()}

    def initial(self, entity_index_T: Tensor) -> Params:
        return {"id": self.table[entity_index_T]} | _expand(self.mlp, len(entity_index_T))

    def embed(self, phi: Params, support: Rows) -> Tensor:  # noqa: ARG002
        """What the MLP makes of the entity's row; the support rows speak through the inner gradient alone."""
        return _mlp(phi, phi["id"].unsqueeze(1)).squeeze(1)

    def prior(self) -> Tensor:
        phi = {"id": self.table[:1]} | _expand(self.mlp, 1)
        return _mlp(phi, phi["id"].unsqueeze(1))[0, 0]


class RowMlp(nn.Module):
    """An MLP over each support row's features, averaged over the support; an empty support gives a learned vector."""

    def __init__(self, num_features: int, hidden: tuple[int, ...], embedding_dim: int) -> None:
        super().__init__()
        self.mlp = _mlp_parameters((num_features, *hidden, embedding_dim))
        self.empty = nn.Parameter(torch.zeros(embedding_dim))

    @staticmethod
    def num_features(dims: EncoderDims) -> int:
        return dims.item_dense + dims.user_dense + dims.context + 1

    @staticmethod
    def features(support: Rows) -> Tensor:
        """(T, S, F): items, profile and context, and the row's age in days on a logarithmic scale."""
        gap_TS1 = torch.log1p(support.gap_s_TR / _SECONDS_PER_DAY).unsqueeze(-1)
        return torch.cat([support.item_dense_TRF, support.user_dense_TRF, support.context_TRF, gap_TS1], dim=-1)

    def rates(self) -> dict[str, torch.Size]:
        return {name: p.shape for name, p in self.mlp.items()}

    def initial(self, entity_index_T: Tensor) -> Params:
        return _expand(self.mlp, len(entity_index_T))

    def embed(self, phi: Params, support: Rows) -> Tensor:
        rows_TSD = _mlp(phi, self.features(support))
        count_T1 = support.mask_TR.sum(dim=1, keepdim=True)
        pooled_TD = (rows_TSD * support.mask_TR.unsqueeze(-1)).sum(dim=1) / count_T1.clamp(min=1.0)
        return torch.where(count_T1 > 0, pooled_TD, self.empty)

    def prior(self) -> Tensor:
        return self.empty


def build_meta_block(cfg: ModelConfig, dims: EncoderDims) -> TaskVector | IdMlp | RowMlp:
    """The configured block."""
    if cfg.meta_block == "task_vector":
        return TaskVector(cfg.embedding_dim)
    if cfg.meta_block == "id_mlp":
        return IdMlp(dims.num_entities, cfg.id_dim, cfg.meta_hidden, cfg.embedding_dim)
    if cfg.meta_block == "row_mlp":
        return RowMlp(RowMlp.num_features(dims), cfg.meta_hidden, cfg.embedding_dim)
    raise DataError(f"model.meta_block must be task_vector, id_mlp or row_mlp, got {cfg.meta_block!r}")


def _mlp_parameters(widths: tuple[int, ...]) -> nn.ParameterDict:
    """Weights (in, out) and biases of a ReLU network, He-initialised."""
    params = nn.ParameterDict()
    for layer, (fan_in, fan_out) in enumerate(pairwise(widths)):
        params[f"weight{layer}"] = nn.Parameter(torch.randn(fan_in, fan_out) * (2.0 / fan_in) ** 0.5)
        params[f"bias{layer}"] = nn.Parameter(torch.zeros(fan_out))
    return params


def _expand(params: nn.ParameterDict, num_tasks: int) -> Params:
    return {name: p.expand(num_tasks, *p.shape) for name, p in params.items()}


def _mlp(phi: Params, x_TSF: Tensor) -> Tensor:
    """Each task's rows through that task's own weights: (T, S, F) -> (T, S, D)."""
    num_layers = sum(name.startswith("weight") for name in phi)
    for layer in range(num_layers):
        x_TSF = torch.baddbmm(phi[f"bias{layer}"].unsqueeze(1), x_TSF, phi[f"weight{layer}"])
        if layer < num_layers - 1:
            x_TSF = F.relu(x_TSF)
    return x_TSF
