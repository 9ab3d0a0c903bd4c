"""Train RecTools' SASRec and score rows; a program of its own, in the environment experiments/.sequence.

    experiments/.sequence/bin/python experiments/sequence/sasrec.py FOLDER

Reads `rows.npz` (experiments/sequence_rival.py makes it) and `options.json` of the folder, and leaves `scores.npz` and
`report.json`. The network trains on the positives that train; the rows that validate stop it, and calibrate its logits.

# P positives, S states (a user after so many positives), R rows, V of them validate, L items of a sequence, D width, F features
"""

import json
import logging
import sys
import time
import warnings
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from pytorch_lightning import Callback, LightningModule, Trainer, seed_everything
from rectools import Columns
from rectools.dataset import Dataset
from rectools.models import SASRecModel
from rectools.models.nn.transformers.lightning import TransformerLightningModule
from rectools.models.nn.transformers.ligr import LiGRLayers
from rectools.models.nn.transformers.sasrec import SASRecTransformerLayers
from scipy.stats import rankdata

FORMS = ("sasrec_daily", "sasrec_request")
SEQUENCES_PER_LOOK = 32_000
"""Sequences after which a look at the rows that validate is due, however few epochs they are."""
Arrays = dict[str, npt.NDArray[Any]]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Options:
    """Chosen on rows that validate, see experiments/LOG.md."""

    seed: int = 0
    factors: int = 64
    blocks: int = 2
    heads: int = 2
    dropout: float = 0.2
    length: int = 50
    """At most: what 95 % of the users reach in training is enough."""
    layers: str = "sasrec"
    """sasrec, or ligr (eSASRec)."""
    lr: float = 5e-3
    batch: int = 16
    epochs: int = 40
    every: int = 4
    """Epochs from one look at the rows that validate to the next; fewer where an epoch is long."""
    patience: int = 2
    """Looks without a better value before it stops."""


class Offset(TransformerLightningModule):  # type: ignore[misc]
    """While it trains, an item's logit has the logarithm of its positives on top: a state learns what they do not say."""

    offset_I: torch.Tensor
    """Of internal numbers."""

    def get_batch_logits(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        logits: torch.Tensor = super().get_batch_logits(batch)
        return logits + self.offset_I


@dataclass
class Rows:
    """Rows to score by one form, as states and items of the network."""

    session_SL: torch.Tensor
    state_R: npt.NDArray[np.int64]
    item_R: npt.NDArray[np.int64]
    """0: unknown to the network."""

    @classmethod
    def of(cls, arrays: Arrays, form: str, internal_I: npt.NDArray[np.int64], length: int) -> "Rows":
        known = internal_I[arrays["item_P"]]
        before = np.r_[0, np.cumsum(known > 0)]
        known = known[known > 0]
        first = before[np.searchsorted(arrays["user_P"], arrays["user_R"])]
        states, state_R = np.unique(np.c_[first, before[arrays[f"{form}.seen"]]], axis=0, return_inverse=True)
        at_SL = states[:, 1:] + np.arange(-length, 0)
        inside = at_SL >= states[:, :1]
        session_SL = np.where(inside, known[np.where(inside, at_SL, 0)], 0)
        return cls(torch.from_numpy(session_SL), state_R.ravel(), internal_I[arrays["item_R"]])

    def logits(self, module: LightningModule) -> Floats:
        """NaN where the user has no positive yet, or the item is unknown."""
        network = module.torch_model
        network.eval()
        with torch.no_grad():
            item_ID = network.item_model.get_all_embeddings()
            parts = [network.encode_sessions({"x": x}, item_ID)[:, -1] for x in torch.split(self.session_SL, 512)]
            state_SD = network.similarity_module.session_tower_forward(torch.cat(parts)).double().numpy()
            item_ID = network.similarity_module.item_tower_forward(item_ID).double().numpy()
        found = np.empty(len(self.state_R))
        for at in np.array_split(np.arange(len(found)), len(found) // 100_000 + 1):
            found[at] = np.einsum("rd,rd->r", state_SD[self.state_R[at]], item_ID[self.item_R[at]])
        cold = (self.session_SL[:, -1] == 0).numpy()[self.state_R] | (self.item_R == 0)
        return np.where(cold, np.nan, found)


class KeepBest(Callback):  # type: ignore[misc]
    """Every so many epochs a look at the rows that validate; what was best is what stays."""

    def __init__(self, arrays: Arrays, options: Options) -> None:
        self.arrays, self.options = arrays, options
        self.rows: Rows | None = None
        self.best: dict[str, Any] = {}
        self.values: list[float] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> "KeepBest":
        return self  # RecTools copies its trainer; what is kept is read afterwards.

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        del trainer
        positives_I = np.bincount(self.arrays["item_P"][self.arrays["trains_P"]])
        known = pl_module.data_preparator.get_known_item_ids().astype(np.int64)
        padding = np.zeros(pl_module.data_preparator.n_item_extra_tokens)
        pl_module.offset_I = torch.from_numpy(np.r_[padding, np.log(positives_I[known])]).float()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        epoch = trainer.current_epoch + 1
        if epoch % self.options.every and epoch < self.options.epochs:
            return
        num_rows, form = len(self.arrays["validation_labels"]), FORMS[0]
        if self.rows is None:
            part = self.arrays | {name: self.arrays[name][:num_rows] for name in ("user_R", "item_R", f"{form}.seen")}
            self.rows = Rows.of(part, form, internal_ids(pl_module, self.arrays), self.options.length)
        logit_V = self.rows.logits(pl_module)
        pl_module.train()
        score_V = calibrated(logit_V, self.arrays, form, num_rows)
        value = measured(self.arrays["validation_labels"], score_V, self.arrays["user_R"][:num_rows])
        if not self.values or value > max(self.values):
            self.best = deepcopy(pl_module.state_dict())
        self.values.append(value)
        trainer.should_stop = len(self.values) - int(np.argmax(self.values)) > self.options.patience

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        del trainer
        pl_module.load_state_dict(self.best)


def internal_ids(module: LightningModule, arrays: Arrays) -> npt.NDArray[np.int64]:
    """Of each item the network's number, 0 if it does not know it."""
    found = np.zeros(len(arrays["shown_I"]), np.int64)
    known = module.data_preparator.get_known_item_ids().astype(np.int64)
    found[known] = module.data_preparator.get_known_items_sorted_internal_ids()
    return found


def auc(labels: npt.NDArray[Any], scores: Floats) -> float:
    positives = labels.sum()
    if positives in (0, len(labels)):
        return float("nan")
    return float(
        (rankdata(scores)[labels == 1].sum() - positives * (positives + 1) / 2) / (positives * (len(labels) - positives))
    )


def measured(labels_V: npt.NDArray[Any], score_V: Floats, user_V: npt.NDArray[np.int64]) -> float:
    """Mean of the pooled AUC and the mean of users' own."""
    order = np.argsort(user_V, kind="stable")
    parts = np.split(order, np.flatnonzero(np.diff(user_V[order])) + 1)
    return (auc(labels_V, score_V) + float(np.nanmean([auc(labels_V[part], score_V[part]) for part in parts]))) / 2


def calibrated(logit_R: Floats, arrays: Arrays, form: str, num_validating: int) -> Floats:
    """Probabilities: two logistic regressions, with the logit and where it is missing, which the rows that validate fit."""
    names = ("item_rate_R", "item_shown_R", f"{form}.user_rate")
    features = [np.ones(len(logit_R)), *(arrays[name][: len(logit_R)] for name in names)]
    cold_RF, warm_RF = np.stack(features, axis=1), np.stack([np.nan_to_num(logit_R), *features], axis=1)
    warm = ~np.isnan(logit_R)
    validates = np.arange(len(logit_R)) < num_validating
    labels = arrays["validation_labels"]
    found = np.empty(len(logit_R))
    for rows, features_RF in ((warm, warm_RF), (~warm, cold_RF)):
        fits = rows & validates
        if min(labels[fits[:num_validating]].sum(), (1 - labels[fits[:num_validating]]).sum()) < 20:
            fits, features_RF = validates, cold_RF  # Too few of their own: as anybody without a state.
        weights_F = logistic(features_RF[fits], labels[fits[:num_validating]])
        found[rows] = 1 / (1 + np.exp(-features_RF[rows] @ weights_F))
    return found


def logistic(features_RF: Floats, labels_R: npt.NDArray[Any], ridge: float = 1.0) -> Floats:
    """Newton's steps; a small ridge, for features that hardly differ."""
    weights_F = np.zeros(features_RF.shape[1])
    for _ in range(30):
        rate_R = 1 / (1 + np.exp(-features_RF @ weights_F))
        hessian_FF = (features_RF * (rate_R * (1 - rate_R))[:, None]).T @ features_RF + ridge * np.eye(len(weights_F))
        step_F = np.linalg.solve(hessian_FF, features_RF.T @ (labels_R - rate_R) - ridge * weights_F)
        weights_F += step_F
        if np.abs(step_F).max() < 1e-8:
            break
    return weights_F


def interactions(arrays: Arrays, length: int) -> pd.DataFrame:
    """Positives that train. RecTools reads the last `length` + 1 of a user only, so a longer sequence is cut into several."""
    trains = arrays["trains_P"]
    user_T = arrays["user_P"][trains]
    stop_T = np.searchsorted(user_T, user_T, side="right")
    part_T = (stop_T - 1 - np.arange(len(user_T))) // (length + 1)
    return pd.DataFrame(
        {
            Columns.User: user_T * (int(part_T.max()) + 1) + part_T,
            Columns.Item: arrays["item_P"][trains],
            Columns.Weight: 1.0,
            Columns.Datetime: pd.to_datetime(np.arange(len(user_T)), unit="s"),
        }
    )


def fitted(arrays: Arrays, options: Options) -> tuple[LightningModule, KeepBest]:
    seed_everything(options.seed, verbose=False)
    sequences = interactions(arrays, options.length)
    every = max(1, min(options.every, SEQUENCES_PER_LOOK // sequences[Columns.User].nunique()))
    options = replace(options, every=every)
    keep = KeepBest(arrays, options)
    settings = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(max_epochs=options.epochs, accelerator="cpu", devices=1, callbacks=[keep], **settings)
    model = SASRecModel(
        n_blocks=options.blocks,
        n_heads=options.heads,
        n_factors=options.factors,
        dropout_rate=options.dropout,
        session_max_len=options.length,
        loss="softmax",
        lr=options.lr,
        batch_size=options.batch,
        transformer_layers_type=LiGRLayers if options.layers == "ligr" else SASRecTransformerLayers,
        lightning_module_type=Offset,
        get_trainer_func=lambda: trainer,
    )
    model.fit(Dataset.construct(sequences))
    return model.lightning_model, keep


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    with np.load(folder / "rows.npz", allow_pickle=False) as found:
        arrays: Arrays = {name: found[name] for name in found.files}
    options = Options(**json.loads((folder / "options.json").read_text()))
    reached_U = np.unique(arrays["user_P"][arrays["trains_P"]], return_counts=True)[1]
    options = replace(options, length=min(options.length, int(np.quantile(reached_U, 0.95))))
    started = time.perf_counter()
    module, keep = fitted(arrays, options)
    trained = time.perf_counter()
    num_validating, scores, validation = len(arrays["validation_labels"]), {}, {}
    for form in FORMS:
        rows = Rows.of(arrays, form, internal_ids(module, arrays), options.length)
        logit_R = rows.logits(module)
        score_R = calibrated(logit_R, arrays, form, num_validating)
        scores[form] = score_R[num_validating:]
        validating = score_R[:num_validating], arrays["user_R"][:num_validating]
        validation[form] = measured(arrays["validation_labels"], *validating)
    np.savez(folder / "scores.npz", **scores)  # type: ignore[arg-type]
    report = {
        "validation": validation,
        "looks": keep.values,
        "best_epoch": min(keep.options.every * (1 + int(np.argmax(keep.values))), options.epochs),
        "train_seconds": trained - started,
        "score_seconds": time.perf_counter() - trained,
    }
    (folder / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
