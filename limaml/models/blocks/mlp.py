"""A ReLU network whose weights are adapted: of the entity's id, or of the support's rows.

S support rows, F features, I inputs, O outputs, D embedding width
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limaml.models.blocks.block import MetaBlock, Params, Support, age_days


class IdMlp(MetaBlock):
    """ID embedding -> MLP (LiMAML, section 3); the entity's own row and the MLP are adapted, all other rows stay.

    Row 0 is the unknown entity, trained by tasks whose entity is hidden; the prior is what the MLP makes of it.
    """

    def __init__(self, num_entities: int, id_dim: int, hidden: tuple[int, ...], embedding_dim: int) -> None:
        super().__init__(embedding_dim)
        self.table = nn.Parameter(torch.randn(num_entities + 1, id_dim) * id_dim**-0.5)
        self.mlp = mlp_parameters((id_dim, *hidden, embedding_dim))

    def start(self, support: Support) -> Params:
        return {"id": self.table[support.entity_index], **self.mlp}

    def embed(self, theta: Params, support: Support) -> Tensor:  # noqa: ARG002  rows speak through the inner gradient alone
        return mlp(theta, theta["id"])

    def prior(self) -> Tensor:
        return mlp(dict(self.mlp.items()), self.table[0])


class SupportMlp(MetaBlock):
    """An MLP over each support row's features, averaged over the support; an empty support gives a learned vector."""

    def __init__(self, num_features: int, hidden: tuple[int, ...], embedding_dim: int, *, row_age: bool) -> None:
        """`row_age`: the days from a row to the newest one, on a logarithmic scale, are one of the inputs."""
        super().__init__(embedding_dim)
        self.row_age = row_age
        self.mlp = mlp_parameters((num_features + int(row_age), *hidden, embedding_dim))
        self.empty = nn.Parameter(torch.zeros(embedding_dim))

    def start(self, support: Support) -> Params:  # noqa: ARG002
        return dict(self.mlp.items())

    def embed(self, theta: Params, support: Support) -> Tensor:
        x_SF, count = support.dense_SF, support.mask_S.sum()
        if self.row_age:
            x_SF = torch.cat([x_SF, torch.log1p(age_days(support)).unsqueeze(-1)], dim=-1)
        share_S1 = (support.mask_S / count.clamp(min=1.0)).unsqueeze(1)
        # The last layer is linear, so the mean of its outputs is its output for the mean of its inputs: one row a task.
        hidden_H = (share_S1 * _hidden(theta, x_SF)).sum(dim=0)
        return torch.where(count > 0, _last(theta, hidden_H), self.empty)

    def prior(self) -> Tensor:
        return self.empty


def mlp_parameters(widths: tuple[int, ...]) -> nn.ParameterDict:
    """Weights (in, out) and biases of a ReLU network, He-initialised."""
    params = nn.ParameterDict()
    for layer, (fan_in, fan_out) in enumerate(pairwise(widths)):
        params[f"weight{layer}"] = nn.Parameter(torch.randn(fan_in, fan_out) * (2.0 / fan_in) ** 0.5)
        params[f"bias{layer}"] = nn.Parameter(torch.zeros(fan_out))
    return params


def mlp(theta: Params, x: Tensor) -> Tensor:
    return _last(theta, _hidden(theta, x))


def _hidden(theta: Params, x: Tensor) -> Tensor:
    for layer in range(_num_layers(theta) - 1):
        x = F.relu(x @ theta[f"weight{layer}"] + theta[f"bias{layer}"])
    return x


def _last(theta: Params, x: Tensor) -> Tensor:
    layer = _num_layers(theta) - 1
    return x @ theta[f"weight{layer}"] + theta[f"bias{layer}"]


def _num_layers(theta: Params) -> int:
    return sum(name.startswith("weight") for name in theta)
