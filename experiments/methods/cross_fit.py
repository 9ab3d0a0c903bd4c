"""Item vectors that did not see the user they are read for, for meta-training.

The training users are dealt into folds; a fold's users read vectors fitted without them, turned to lie over those of all users
(orthogonal Procrustes), so that a task vector means the same with either. New users read the vectors of all.

    I items, K factors, F folds
"""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from experiments.methods.item_tables import of_entities
from limaml.config import Config
from limaml.features.columns import UNKNOWN
from limaml.models.network import Network
from limaml.tasks.sampling import TaskRows
from limaml.training.warm_start import fit_items


def cross_fitted(network: Network, rows: TaskRows, cfg: Config, folds: int) -> TaskRows:
    """Put the folds' vectors behind those that `network` has, and return `rows` with their items' indices in those tables."""
    items = network.global_block.items
    assert items is not None
    all_users_IK = items.item.detach()
    tables = [all_users_IK]
    counts_I1 = torch.bincount(torch.from_numpy(rows.encoded.item_index), minlength=len(all_users_IK)).unsqueeze(1)
    for fold in range(folds):
        others = [entity for entity in range(rows.num_entities) if entity % folds != fold]
        fitted_IK = fit_items(of_entities(rows, others), cfg, network.dims).vectors_IK
        tables.append(_turned(torch.cat([torch.zeros(1, fitted_IK.shape[1]), fitted_IK]), all_users_IK, counts_I1))
    items.item = nn.Parameter(torch.cat(tables), requires_grad=False)
    fold_R = np.repeat(np.arange(rows.num_entities) % folds, np.diff(rows.offsets)) if folds else -1
    index = rows.encoded.item_index
    shifted = np.where(index == UNKNOWN, UNKNOWN, index + (fold_R + 1) * len(all_users_IK))
    return replace(rows, encoded=replace(rows.encoded, item_index=shifted))


def _turned(table_IK: Tensor, onto_IK: Tensor, weight_I1: Tensor) -> Tensor:
    """The rotation of a table that lies nearest to another, frequent items weighing more."""
    left, _, right = torch.linalg.svd((weight_I1 * table_IK).t() @ onto_IK)
    turned_IK: Tensor = table_IK @ (left @ right)
    return turned_IK
