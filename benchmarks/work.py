"""The two benchmark models as plain numbers: weights and rows that every engine starts from, and limaml's form of them.

reference: meta block 64 -> 64 -> 32 (ReLU) on each support row, averaged over the task's support to its embedding e; global
block 96 -> 128 -> 64 -> 1 (ReLU) on [features, e]. task_vector: the embedding is a vector of 17 numbers, which is itself what
is adapted; logit = MLP(features), 60 -> 64 -> 32 -> 1 (SiLU), + <e[:16], item vector> + e[16], the item vectors frozen. It is
the kind of block that configs/movielens.toml ships, not that network: what ships has hidden layers of 128 and 64, learns its
rates and damping, starts at the support's items and trains with dropout.

In both, phi starts as the meta block's weights and takes K steps of inner_lr on the mean cross-entropy of the task's support
rows; the loss is the mean over tasks of the mean over their query rows, with e = embed(phi_K).

    T tasks, R rows (S support, Q query), F features, I items, K factors
"""

import math
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from benchmarks.kinks import MARGIN, smallest_hidden
from limaml.config import Config
from limaml.features.columns import CycleEncoder
from limaml.features.encoder import EncoderDims
from limaml.models.meta_blocks import RowMlp
from limaml.models.network import LiMAML, build_network
from limaml.tasks.rows import Rows, TaskBatch

Model = Literal["reference", "task_vector"]
MODELS: tuple[Model, ...] = get_args(Model)
Gradients = dict[str, Any]
"""Weight name -> gradient, shaped as the weight: torch tensors, or arrays that numpy can read."""

ROWS = 16
"""Support rows, and query rows, of a task."""
NUM_ITEMS = 1682
"""MovieLens-100K's."""

# About what Encoder.dims gives on MovieLens-100K: 24 numbers of an item, 33 of
# a user. Together with the context 60 features.
_GENRES, _ITEM, _USER = 19, 24, 33
_FEATURES: dict[Model, int] = {"reference": 64, "task_vector": _ITEM + _USER + CycleEncoder.width}
_META: dict[Model, tuple[int, ...]] = {"reference": (64, 64, 32), "task_vector": ()}
_GLOBAL: dict[Model, tuple[int, ...]] = {"reference": (96, 128, 64, 1), "task_vector": (60, 64, 32, 1)}
_EMBEDDING: dict[Model, int] = {"reference": 32, "task_vector": 17}
# Large enough to move the loss within five steps, small enough that no task diverges and amplifies rounding.
_INNER_LR: dict[Model, float] = {"reference": 0.1, "task_vector": 0.5}


@dataclass(frozen=True)
class Side:
    """The support rows or the query rows of T tasks, all of the same number."""

    x_TRF: Tensor
    item_TR: Tensor
    """Index into `Work.items_IK`."""
    label_TR: Tensor

    def to(self, device: str) -> "Side":
        """Copy to a device."""
        return Side(self.x_TRF.to(device), self.item_TR.to(device), self.label_TR.to(device))


@dataclass(frozen=True)
class Work:
    """One meta-batch and the weights to differentiate."""

    model: Model
    inner_lr: float
    weights: dict[str, Tensor]
    """`meta.*` are adapted. A layer is x @ weight + bias, its weight (in, out)."""
    items_IK: Tensor
    """Frozen; (NUM_ITEMS, 0) where the model has none."""
    support: Side
    query: Side

    @property
    def num_tasks(self) -> int:
        return len(self.support.label_TR)

    def block(self, name: Literal["meta", "global"]) -> dict[str, Tensor]:
        """Weights of one block, named within it."""
        return {key.removeprefix(f"{name}."): value for key, value in self.weights.items() if key.startswith(f"{name}.")}

    def to(self, device: str) -> "Work":
        """Copy to a device."""
        weights = {name: weight.to(device) for name, weight in self.weights.items()}
        return replace(
            self,
            weights=weights,
            items_IK=self.items_IK.to(device),
            support=self.support.to(device),
            query=self.query.to(device),
        )


def make_work(model: Model, num_tasks: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Work:
    """The same arguments give the same numbers, whichever library reads them; no task comes near a ReLU's kink (kinks.py)."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * std).to(dtype)

    def layers(block: str, widths: tuple[int, ...]) -> dict[str, Tensor]:
        found = {}
        for layer, (fan_in, fan_out) in enumerate(pairwise(widths)):
            found[f"{block}.weight{layer}"] = normal(fan_in, fan_out, std=(2.0 / fan_in) ** 0.5)
            found[f"{block}.bias{layer}"] = normal(fan_out, std=0.1)
        return found

    def side(num: int) -> Side:
        item_TR = torch.randint(NUM_ITEMS, (num, ROWS), generator=generator)
        label_TR = (torch.rand(num, ROWS, generator=generator) < 0.5).to(dtype)
        return Side(normal(num, ROWS, _FEATURES[model]), item_TR, label_TR)

    meta = layers("meta", _META[model]) or {"meta.vector": normal(_EMBEDDING[model], std=0.3)}
    weights = meta | layers("global", _GLOBAL[model])
    items_IK = normal(NUM_ITEMS, _EMBEDDING[model] - 1 if model == "task_vector" else 0, std=0.3)
    work = Work(model, _INNER_LR[model], weights, items_IK, side(num_tasks), side(num_tasks))
    again_N = torch.arange(num_tasks if model == "reference" else 0)
    while len(again_N := again_N[_near_kink(work, again_N)]):
        work.support.x_TRF[again_N] = normal(len(again_N), ROWS, _FEATURES[model])
        work.query.x_TRF[again_N] = normal(len(again_N), ROWS, _FEATURES[model])
    return work


def _near_kink(work: Work, tasks_N: Tensor) -> Tensor:
    """(N,) whether a task comes so near a ReLU's kink that correct engines may differ in float32; it is drawn again."""
    if not len(tasks_N):
        return tasks_N.bool()
    support, query = work.support, work.query
    rows = support.x_TRF[tasks_N], support.label_TR[tasks_N], query.x_TRF[tasks_N]
    return smallest_hidden(work.weights, work.inner_lr, *rows) < MARGIN


def limaml_network(work: Work) -> LiMAML:
    """limaml's network with the work's weights, on its device and of its type."""
    network = build_network(_config(work), _dims(work.model)).to(work.items_IK.device, work.items_IK.dtype)
    with torch.no_grad():
        for name, (parameter, transposed) in _parameters(network).items():
            parameter.copy_(work.weights[name].T if transposed else work.weights[name])
        # Again, in the work's own precision.
        for log_rate in network.log_rates.values():
            log_rate.fill_(math.log(work.inner_lr))
        if work.model == "task_vector":
            network.global_block.item[1:] = work.items_IK
    return network


def limaml_batch(work: Work) -> TaskBatch:
    """The work's rows as limaml reads them; item 0 is its unknown item, which no row has."""
    entity_index_T = torch.zeros(work.num_tasks, dtype=torch.int64, device=work.items_IK.device)
    entities = tuple(str(task) for task in range(work.num_tasks))
    return TaskBatch(_rows(work.support, work.model), _rows(work.query, work.model), entity_index_T, entities)


def limaml_gradients(network: LiMAML) -> Gradients:
    """Gradients of the last backward pass, by the work's names."""
    return {
        name: p.grad.T if transposed else p.grad for name, (p, transposed) in _parameters(network).items() if p.grad is not None
    }


def _config(work: Work) -> Config:
    shared = {"embedding_dim": _EMBEDDING[work.model], "global_hidden": _GLOBAL[work.model][1:-1], "dropout": 0.0}
    # Without damping a step is rate / rows times the gradient of the sum: the mean's.
    meta = {"learn_damping": False, "damping": 0.0, "factor_damping": 0.0}
    meta |= {"inner_lr": work.inner_lr, "factor_inner_lr": work.inner_lr, "learn_inner_lr": False}
    if work.model == "reference":
        model = {"meta_block": "row_mlp", "meta_hidden": _META[work.model][1:-1], "interaction": "concat", "row_age": False}
    else:
        model = {"meta_block": "task_vector"}
    return Config.model_validate({"source": {"kind": "synthetic"}, "model": shared | model, "meta": meta})


def _dims(model: Model) -> EncoderDims:
    item_dense = _FEATURES[model] - _USER - CycleEncoder.width
    return EncoderDims(NUM_ITEMS, 0, item_dense, _USER, CycleEncoder.width, item_static=_GENRES, item_sets=_GENRES)


def _rows(side: Side, model: Model) -> Rows:
    dims = _dims(model)
    item_TRF, user_TRF, context_TRF = side.x_TRF.split([dims.item_dense, dims.user_dense, dims.context], dim=2)
    return Rows(
        item_index_TR=side.item_TR + 1,
        item_dense_TRF=item_TRF.contiguous(),
        user_dense_TRF=user_TRF.contiguous(),
        context_TRF=context_TRF.contiguous(),
        mask_TR=torch.ones_like(side.label_TR),
        gap_s_TR=torch.zeros_like(side.label_TR),
        label_TR=side.label_TR,
    )


def _parameters(network: LiMAML) -> dict[str, tuple[nn.Parameter, bool]]:
    """Weight name -> limaml's parameter, and whether it is stored as (out, in)."""
    adapted = network.meta.mlp if isinstance(network.meta, RowMlp) else {"vector": network.meta.vector}
    found = {f"meta.{name}": (parameter, False) for name, parameter in adapted.items()}
    for index, layer in enumerate(network.global_block.layers):
        found[f"global.weight{index}"] = (layer.weight, True)
        found[f"global.bias{index}"] = (layer.bias, False)
    return found
