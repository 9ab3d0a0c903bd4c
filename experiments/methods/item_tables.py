"""Item vectors of the history MLP, fitted beforehand on other users than those they are read for.

A factor model that saw a training user's labels explains that user better than it will explain a new one, and a network
trained on such products trusts them too much. So the training users are dealt into folds, and the rows of a fold's users are
read with vectors that were fitted without them. Two fits agree up to a rotation only: products may be compared, vectors not.

    F tables, I items, C content features, K factors, T tasks, R rows
"""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from limaml.config import Config
from limaml.features.columns import UNKNOWN
from limaml.features.encoder import EncoderDims
from limaml.tasks.rows import Rows
from limaml.tasks.sampling import TaskRows
from limaml.training.item_vectors import ItemVectors
from limaml.training.warm_start import fit_items

ALL_USERS = 0
"""The table fitted to all training users: what new users are read with."""


class FittedItems(nn.Module):
    """Frozen vectors of several fits; an item outside the vocabulary has the vector of its static features."""

    item_FIK: Tensor
    content_FCK: Tensor
    bias_FK: Tensor

    def __init__(self, fits: list[ItemVectors]) -> None:
        super().__init__()
        width = fits[0].vectors_IK.shape[1]
        # Row 0 is never read.
        tables = [torch.cat([torch.zeros(1, width), fit.vectors_IK]) for fit in fits]
        self.register_buffer("item_FIK", torch.stack(tables))
        self.register_buffer("content_FCK", torch.stack([fit.content_weights_CK for fit in fits]))
        self.register_buffer("bias_FK", torch.stack([fit.bias_K for fit in fits]))

    def forward(self, rows: Rows, table_T: Tensor) -> Tensor:
        """(T, R, K) the vectors of each task's table."""
        known_TRK = self.item_FIK[table_T.unsqueeze(1), rows.item_index_TR]
        content_TCK = self.content_FCK[table_T]
        unknown_TRK = rows.item_dense_TRF[..., : content_TCK.shape[1]] @ content_TCK + self.bias_FK[table_T].unsqueeze(1)
        return torch.where((rows.item_index_TR == UNKNOWN).unsqueeze(2), unknown_TRK, known_TRK)


def fitted_items(rows: TaskRows, cfg: Config, dims: EncoderDims, folds: int) -> FittedItems:
    """A table of all users, and one without each fold's."""
    fits = [fit_items(rows, cfg, dims)]
    for fold in range(folds):
        others = [entity for entity in range(rows.num_entities) if entity % folds != fold]
        fits.append(fit_items(of_entities(rows, others), cfg, dims))
    return FittedItems(fits)


def table_of(entities: list[int], folds: int) -> Tensor:
    """(T,) the table that training tasks of these entities are read with."""
    return torch.tensor([entity % folds + 1 for entity in entities], dtype=torch.long)


def of_entities(rows: TaskRows, entities: list[int]) -> TaskRows:
    """The rows of some entities alone, in their order."""
    sizes = np.diff(rows.offsets)[entities]
    at = np.concatenate([np.arange(rows.offsets[entity], rows.offsets[entity + 1]) for entity in entities])
    return replace(
        rows,
        encoded=rows.encoded.take(at),
        label=rows.label[at],
        timestamp_us=rows.timestamp_us[at],
        source_row=rows.source_row[at],
        entities=tuple(rows.entities[entity] for entity in entities),
        offsets=np.r_[0, np.cumsum(sizes)],
        entity_index=rows.entity_index[entities],
    )
