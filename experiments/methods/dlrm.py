"""DLRM (Naumov et al. 2019): ids and dense features meet in dot products.

T tasks, R rows, F features, D embedding width, V width of a user's vector
"""

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.methods.history import dropped
from limaml.config import Config
from limaml.evaluation.rival_networks import WideDeep
from limaml.features.encoder import EncoderDims
from limaml.tasks.rows import Rows


class Dlrm(WideDeep):
    """logit = top(z, <z, user>, <z, item>, <user, item>) where z = bottom(features).

    A user's vector (V = D) is the id's embedding. It is looked up, and fitted for a new user, as `WideDeep`'s is. SiLU as in
    our MLPs, not ReLU: it validates better on MovieLens (0.720 for 0.710, mean of two seeds).
    """

    def __init__(self, cfg: Config, dims: EncoderDims) -> None:
        nn.Module.__init__(self)  # None of WideDeep's layers.
        self.dropout, width, hidden = cfg.model.dropout, cfg.model.embedding_dim, cfg.model.global_hidden
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(cfg.training.seed)
            self.bottom = _layers(dims.num_features, *hidden, width)
            self.top = _layers(width + 3, *hidden, 1)
            self.users = nn.Embedding(dims.num_entities + 1, width)
            self.items = nn.Embedding(dims.num_items + 1, width)
            for table in (self.users, self.items):
                nn.init.normal_(table.weight, std=0.1)

    def encode(self, rows: Rows, generator: torch.Generator | None = None) -> Any:
        return F.silu(self._through(self.bottom, rows.dense, generator)), self.items(rows.item_index_TR), generator

    def score(self, encoded: Any, vector_TV: Tensor) -> Tensor:
        (z_TRD, item_TRD, generator), user_T1D = encoded, vector_TV[:, None]
        pairs = ((z_TRD, user_T1D), (z_TRD, item_TRD), (user_T1D, item_TRD))
        products_TR3 = torch.stack([(one * other).sum(dim=2) for one, other in pairs], dim=2)
        return self._through(self.top, torch.cat([z_TRD, products_TR3], dim=2), generator).squeeze(2)

    def _through(self, layers: nn.ModuleList, x: Tensor, generator: torch.Generator | None) -> Tensor:
        for layer in layers[:-1]:
            x = dropped(F.silu(layer(x)), self.dropout, generator)
        found: Tensor = layers[-1](x)
        return found


def _layers(*widths: int) -> nn.ModuleList:
    return nn.ModuleList(nn.Linear(fan_in, fan_out) for fan_in, fan_out in pairwise(widths))
