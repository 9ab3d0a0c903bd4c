"""Rows as tensors: what every block of the network reads, padded to one width with a mask.

T tasks, R rows (S support, Q query), F features
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from limaml.features.columns import UNKNOWN, Floats, Indices
from limaml.features.encoder import EncodedRows


class SourceRows(Protocol):
    """Rows that tasks are gathered from, of any number of entities end to end."""

    @property
    def encoded(self) -> EncodedRows: ...
    @property
    def label(self) -> Floats: ...
    @property
    def timestamp_us(self) -> Indices: ...


@dataclass(frozen=True)
class Rows:
    """R rows of each of T tasks, oldest first; padded rows have mask 0 and change nothing."""

    item_index_TR: Tensor
    item_dense_TRF: Tensor
    user_dense_TRF: Tensor
    context_TRF: Tensor
    mask_TR: Tensor
    """1.0 for a row, 0.0 for padding."""
    gap_s_TR: Tensor
    """Seconds from the row to the task's as-of instant; 0 where there is none (a request)."""
    label_TR: Tensor | None = None
    """0.0 or 1.0; None in a request."""

    @property
    def num_tasks(self) -> int:
        return int(self.mask_TR.shape[0])

    @cached_property
    def dense(self) -> Tensor:
        """(T, R, F) features of item, user and context side by side."""
        return torch.cat([self.item_dense_TRF, self.user_dense_TRF, self.context_TRF], dim=-1)

    def dense_without(self, left_out: slice) -> Tensor:
        """(T, R, F) `dense` but for a range of the item's features."""
        if left_out.start == left_out.stop:
            return self.dense
        item = self.item_dense_TRF
        return torch.cat([item[..., : left_out.start], item[..., left_out.stop :], self.beside_item], dim=-1)

    @property
    def beside_item(self) -> Tensor:
        """(T, R, F) features of user and context side by side."""
        return torch.cat([self.user_dense_TRF, self.context_TRF], dim=-1)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """Copy to a device and floating type; indices keep theirs."""
        moved = {}
        for each in fields(self):
            tensor = getattr(self, each.name)
            if tensor is not None:
                moved[each.name] = tensor.to(device, dtype if tensor.is_floating_point() else None)
        return replace(self, **moved)

    @classmethod
    def gather(cls, source: SourceRows, at_TR: Indices, mask_TR: Floats, as_of_us_T: Indices) -> Self:
        """Padded rows of `source`, numbered by `at_TR`; where the mask is 0 the number is any row's and all values become 0."""
        encoded, real = source.encoded, mask_TR > 0
        gap_s = (as_of_us_T[:, None] - source.timestamp_us[at_TR]) / 1e6
        return cls(
            item_index_TR=torch.from_numpy(np.where(real, encoded.item_index[at_TR], UNKNOWN)),
            item_dense_TRF=torch.from_numpy(encoded.item_features(at_TR) * mask_TR[:, :, None]),
            user_dense_TRF=torch.from_numpy(encoded.user_dense[at_TR] * mask_TR[:, :, None]),
            context_TRF=torch.from_numpy(encoded.context[at_TR] * mask_TR[:, :, None]),
            mask_TR=torch.from_numpy(mask_TR),
            gap_s_TR=torch.from_numpy((gap_s * real).astype(np.float32)),
            label_TR=torch.from_numpy(source.label[at_TR] * mask_TR),
        )

    @classmethod
    def consecutive(cls, source: SourceRows, first: int, num_tasks: int, num_rows: int, as_of_us: int) -> Self:
        """What `gather` makes of tasks whose rows stand one after another from `first` on, none missing; vectors alone
        are copied.
        """
        encoded, part = source.encoded, slice(first, first + num_tasks * num_rows)
        shape = (num_tasks, num_rows)

        def tensor(values: npt.NDArray[Any]) -> Tensor:
            return torch.from_numpy(values).view(*shape, *values.shape[1:])

        return cls(
            item_index_TR=tensor(encoded.item_index[part]),
            item_dense_TRF=tensor(encoded.item_features(part)),
            user_dense_TRF=tensor(encoded.user_dense[part]),
            context_TRF=tensor(encoded.context[part]),
            mask_TR=torch.ones(shape),
            gap_s_TR=torch.from_numpy(((as_of_us - source.timestamp_us[part]) / 1e6).astype(np.float32)).view(shape),
            label_TR=tensor(source.label[part]),
        )

    @classmethod
    def from_encoded(cls, encoded: EncodedRows) -> Self:
        """One unlabelled task of all the encoded rows, for a request: shapes (1, R, ...)."""
        mask_TR = torch.ones(1, len(encoded))
        return cls(
            item_index_TR=torch.from_numpy(encoded.item_index)[None],
            item_dense_TRF=torch.from_numpy(encoded.item_features())[None],
            user_dense_TRF=torch.from_numpy(encoded.user_dense[:])[None],
            context_TRF=torch.from_numpy(encoded.context)[None],
            mask_TR=mask_TR,
            gap_s_TR=torch.zeros_like(mask_TR),
        )


@dataclass(frozen=True)
class OtherTasks:
    """Tasks of a second kind, whose embeddings the query rows of a batch are scored with: the items of users' rows."""

    support: Rows
    """U tasks, as of the same instant."""
    entity_index_U: Tensor
    task_TQ: Tensor
    """Which of the tasks each query row belongs to, from 1; 0: none, and the row is scored with the kind's prior."""

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        support, index = self.support.to(device, dtype), (self.entity_index_U.to(device), self.task_TQ.to(device))
        return replace(self, support=support, entity_index_U=index[0], task_TQ=index[1])


@dataclass(frozen=True)
class TaskBatch:
    """Support and query of T tasks of the first kind, and what the query rows need of other kinds."""

    support: Rows
    query: Rows
    entity_index_T: Tensor
    """Index into the entity vocabulary, 0 for one that training never saw."""
    entities: tuple[str, ...]
    """Entity ids, so that a task can be named when its loss is not finite."""
    others: Mapping[str, OtherTasks] = field(default_factory=dict)
    """By kind; a kind that is not here is scored with its prior."""

    @property
    def num_tasks(self) -> int:
        return len(self.entities)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        support, query = self.support.to(device, dtype), self.query.to(device, dtype)
        others = {kind: tasks.to(device, dtype) for kind, tasks in self.others.items()}
        return replace(self, support=support, query=query, entity_index_T=self.entity_index_T.to(device), others=others)
