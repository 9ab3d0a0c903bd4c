"""What adapting an encoder of text gains, and what serving it costs: minilm, tuned, distilled, int8 and float16, side by side.

A share of the items is kept from tuning and from the ridge (`JUDGED`). Their rows are ranked with what a ridge from text
predicts of them, vector and rate, and the users' factors and levels; nothing in that has seen a row of theirs. R^2 is of a
ridge onto vectors fitted to all items together, judged ones included. Rows are those that train the twin. Intervals are of
bootstraps, over the judged items (per-user AUC: over users), the differences paired.

    python -m benchmarks.encoders --out experiments/results/encoders.json

    I items, R rows, K factors
"""

import argparse
import json
import logging
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch

from benchmarks.results import machine
from limaml import metrics, telemetry
from limaml.config import Config, load
from limaml.events.ingest import ingest_history
from limaml.events.sources import open_source
from limaml.tasks.splits import split_events
from limaml.training.prepare import read_history
from limaml.transfer.adapters import write_adapted
from limaml.transfer.bert import BertEncoder, minilm
from limaml.transfer.embed_items import delivered_items
from limaml.transfer.static import StaticEncoder, distil
from limaml.transfer.texts import texts_of
from limaml.transfer.tune_encoder import aligned_items
from limaml.transfer.tuning import tune

TODAY = date(2026, 11, 28)
JUDGED = 0.2
TEMPLATES = {"movielens": "{title}. {genres}", "grocery": "{title}. {department}, {product_category}, {product_type}, {brand}"}
VARIANTS: dict[str, dict[str, Any]] = {
    "vectors": {},
    "pairs": {"align": "pairs"},
    "domain, vectors": {"domain_epochs": 3},
}
"""Settings of `[tuning]`, by the name of the row."""
DRAWS, BATCH = 1000, 64
_LEVEL_VARIANCE = 0.03
_RATE_ROWS = 10.0
_PENALTIES = np.logspace(-4, 2, 13)

Floats = npt.NDArray[np.float64]
Vectors = npt.NDArray[np.float32]
Encode = Callable[[list[str]], Vectors]


@dataclass(frozen=True)
class WorldRows:
    """A world's rows that train its twin, and its catalogue; `known` without the judged items."""

    cfg: Config
    logged: pa.Table
    known: pa.Table
    items: pa.Table
    known_items: pa.Table
    texts: dict[str, str | None]
    """Of every item of the catalogue."""

    def rates(self, ids: Sequence[str]) -> Floats:
        """(I,) share of positive rows of known items, shrunk to that of all."""
        rows = self.known.select(["item_id", "label"]).to_pandas().groupby("item_id").label.agg(["size", "sum"]).loc[list(ids)]
        base = float(np.mean(self.known["label"].to_numpy()))
        found: Floats = ((rows["sum"] + base * _RATE_ROWS) / (rows["size"] + _RATE_ROWS)).to_numpy()
        return found


def world_rows(world: str, root: str) -> WorldRows:
    """Ingest a world into a folder of `root`, and read it."""
    cfg = load(f"configs/{world}.toml", [f"storage.root={root}/{world}", f'tuning.template="{TEMPLATES[world]}"'])
    through = open_source(cfg, TODAY).days()[-1]
    ingest_history(cfg, through, TODAY)
    logged = read_history(cfg, through)
    logged = split_events(logged, cfg.evaluation).train_rows(logged)
    items = delivered_items(cfg, TODAY)
    texts = dict(zip(items["item_id"].to_pylist(), texts_of(cfg.tuning, items), strict=True))
    ids = pa.array([item for item in texts if is_judged(item)], pa.string())
    known, known_items = (each.filter(pc.invert(pc.is_in(each["item_id"], value_set=ids))) for each in (logged, items))
    return WorldRows(cfg, logged, known, items, known_items, texts)


@dataclass(frozen=True)
class Judged:
    """Judged items, and their rows."""

    ids: list[str]
    texts: list[str]
    item_R: npt.NDArray[np.int64]
    user_R: npt.NDArray[np.int64]
    label_R: Floats
    users_RL: Floats
    """Of each row its user's factors and, last, level."""
    num_users: int


def judged_items(cfg: Config, logged: pa.Table, texts: dict[str, str | None], ids: list[str], vectors_IK: Floats) -> Judged:
    """Users are folded in from rows of `ids` alone."""
    frame = logged.select(["user_id", "item_id", "label"]).to_pandas()
    frame = frame.join(frame.groupby("item_id").label.agg(["size", "sum"]), on="item_id")
    place = {item: at for at, item in enumerate(ids)}
    base = frame[frame.item_id.isin(place)].label.mean()
    frame["rate"] = (frame["sum"] + base * _RATE_ROWS) / (frame["size"] + _RATE_ROWS)
    frame["user"] = frame.user_id.astype("category").cat.codes
    known = frame[frame.item_id.isin(place)]
    slope = float((known.rate * (1 - known.rate)).mean())
    num_users, width = int(frame.user.max()) + 1, vectors_IK.shape[1]
    x_RL = np.hstack([vectors_IK[known.item_id.map(place)] * slope, np.ones((len(known), 1))])
    prior = np.diag([*[1.0] * width, 1.0 / _LEVEL_VARIANCE])
    users_UL = _fold_in(x_RL, (known.label - known.rate).to_numpy(), known.user.to_numpy(), num_users, slope, prior)
    own = frame[[is_judged(item) for item in frame.item_id] & (frame["size"] >= cfg.tuning.min_item_rows)]
    own = own[own.item_id.map(lambda item: bool(texts.get(item)))]
    names = sorted(own.item_id.unique())
    at_R = own.item_id.map({item: at for at, item in enumerate(names)}).to_numpy()
    own_RL = users_UL[own.user.to_numpy()] * np.array([*[slope] * width, 1.0])
    user_R = own.user.to_numpy().astype(np.int64)
    return Judged(names, [texts[name] or "" for name in names], at_R, user_R, own.label.to_numpy(float), own_RL, num_users)


def _fold_in(x_RL: Floats, y_R: Floats, at_R: npt.NDArray[Any], num: int, noise: float, prior_LL: Floats) -> Floats:
    """(num, L) posterior means of Gaussian regressions, one for each value of `at_R`."""
    precision = np.broadcast_to(prior_LL, (num, *prior_LL.shape)).copy()
    shift = np.zeros((num, x_RL.shape[1]))
    for start in range(0, len(x_RL), 65536):
        part = slice(start, start + 65536)
        np.add.at(precision, at_R[part], x_RL[part, :, None] * x_RL[part, None, :] / noise)
        np.add.at(shift, at_R[part], x_RL[part] * y_R[part, None] / noise)
    return np.linalg.solve(precision, shift[..., None])[..., 0]


def is_judged(item: str) -> bool:
    return int.from_bytes(blake2b(item.encode(), digest_size=8, salt=b"judged").digest(), "big") < JUDGED * 2**64


def predicted(x_IH: Floats, y_IK: Floats, x_JH: Floats, held: npt.NDArray[np.int64], trained: npt.NDArray[np.int64]) -> Floats:
    """(J, K) by ridge; its penalty is the one of least error on the items that tuning held out."""

    def ridge(rows: npt.NDArray[np.int64] | slice, penalty: float, x_NH: Floats) -> Floats:
        mean_H, mean_K = x_IH[rows].mean(0), y_IK[rows].mean(0)
        x, y = x_IH[rows] - mean_H, y_IK[rows] - mean_K
        gram = x.T @ x
        gram += penalty * np.trace(gram) / len(gram) * np.eye(len(gram))
        return (x_NH - mean_H) @ np.linalg.solve(gram, x.T @ y) + mean_K

    scale_K = y_IK.std(0)
    errors = [np.mean(((ridge(trained, each, x_IH[held]) - y_IK[held]) / scale_K) ** 2) for each in _PENALTIES]
    return ridge(slice(None), float(_PENALTIES[int(np.argmin(errors))]), x_JH)


def in_batches(encode: Encode, texts: list[str]) -> Vectors:
    order = np.argsort([len(text) for text in texts], kind="stable")
    found = np.concatenate([encode([texts[at] for at in order[s : s + BATCH]]) for s in range(0, len(order), BATCH)])
    return found[np.argsort(order)]


def int8_weights(encoder: BertEncoder) -> tuple[Encode, int]:
    """Weights of two dimensions as int8, a scale a row; computed with in single precision. And their bytes."""
    weights, size = dict(encoder.weights), 0
    for name, value in weights.items():
        if value.ndim == 2:
            scale = value.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
            weights[name] = (value / scale).round().to(torch.int8).float() * scale
            size += value.numel() + 4 * len(value)
        else:
            size += 4 * value.numel()

    @torch.inference_mode()
    def encode(texts: list[str]) -> Vectors:
        found: Vectors = encoder.vectors_by(weights, encoder.tokens_of(texts)).numpy()
        return found

    return encode, size


def int8_vectors(vectors: Vectors) -> Vectors:
    """A scale a vector."""
    scale_J1 = np.abs(vectors).max(1, keepdims=True) / 127
    return (np.round(vectors / scale_J1) * scale_J1).astype(np.float32)


def measure(world: str, root: str, variants: list[str]) -> dict[str, Any]:
    read = world_rows(world, root)
    cfg = read.cfg
    teacher, tunings, encoders = minilm(), dict[str, Any](), dict[str, tuple[Encode, int]]()
    encoders["minilm"] = teacher.encode, size_of(teacher.folder)
    for variant in variants:
        changed = cfg.model_copy(update={"tuning": cfg.tuning.model_copy(update=VARIANTS[variant])})
        aligned = aligned_items(changed, read.known, read.known_items)
        started = time.monotonic()
        tuned = tune(teacher, aligned, changed.tuning)
        tunings[variant] = {"kept": tuned.kept, "losses": tuned.losses, "seconds": round(time.monotonic() - started)}
        print(world, variant, tunings[variant], flush=True)
        # Texts alone are judged whether or not the stage was kept.
        written = {variant: tuned.adapters, "texts alone": tuned.stages.get("domain", {})}
        for name, adapters in written.items():
            if adapters:
                folder = Path(root) / f"{world}-{name}"
                write_adapted(teacher, adapters, folder, {})
                encoders[f"tuned ({name})"] = BertEncoder(folder).encode, size_of(folder)
    best = next((Path(root) / f"{world}-{each}" for each in variants if f"tuned ({each})" in encoders), teacher.folder)
    whose = "minilm" if best == teacher.folder else "tuned"
    for name, source in {"minilm": teacher, "tuned": BertEncoder(best)}.items():
        if name == "tuned" and whose == "minilm":
            continue
        distil(source, Path(root) / f"{world}-{name}-static")
        student = StaticEncoder(Path(root) / f"{world}-{name}-static")
        encoders[f"static of {name}"] = student.encode, size_of(Path(root) / f"{world}-{name}-static")
    encoders[f"{whose}, int8 weights"] = int8_weights(BertEncoder(best))
    vectors_IK = aligned.vectors_IK.double().numpy()
    judged = judged_items(cfg, read.logged, read.texts, list(aligned.ids), vectors_IK)
    target_IK = np.hstack([vectors_IK, read.rates(aligned.ids)[:, None]])
    fitted = aligned_items(cfg, read.logged, read.items)
    fitted_at = {item: at for at, item in enumerate(fitted.ids)}
    fitted_IK, fitted_JK = (
        fitted.vectors_IK.double().numpy()[[fitted_at[i] for i in ids]] for ids in (aligned.ids, judged.ids)
    )
    rows: dict[str, Any] = {}
    draws: dict[str, dict[str, Floats]] = {}

    def judge(name: str, own: Vectors, other: Vectors, said: dict[str, Any]) -> None:
        found_JK = predicted(own.astype(float), target_IK, other.astype(float), aligned.held_out_I, aligned.trained_I)
        own_JK = predicted(own.astype(float), fitted_IK, other.astype(float), aligned.held_out_I, aligned.trained_I)
        errors_2J = [((vectors - fitted_JK) ** 2).sum(1) for vectors in (own_JK, fitted_IK.mean(0))]
        values, draws[name] = figures(judged, found_JK, *errors_2J)
        differences = {
            metric: metrics.interval(values[metric] - rows["minilm"]["value"][metric], draws[name][metric] - drawn).as_dict()
            for metric, drawn in draws["minilm"].items()
            if name != "minilm"
        }
        rows[name] = {"value": values, "over_minilm": differences, **said}
        print(world, name, json.dumps(rows[name]), flush=True)

    every = [*aligned.texts, *judged.texts]
    for name, (encode, size) in encoders.items():
        in_batches(encode, every[:BATCH])
        seconds = []
        for _ in range(3):
            started = time.perf_counter()
            found = in_batches(encode, every)
            seconds.append(time.perf_counter() - started)
        own, other = found[: len(aligned.texts)], found[len(aligned.texts) :]
        said = {"encoder_bytes": size, "items_per_s": round(len(every) / min(seconds), 1)}
        judge(name, own, other, {"bytes_an_item": 4 * found.shape[1], **said})
        if name in ("minilm", f"tuned ({best.name.removeprefix(f'{world}-')})"):
            halves = found.astype(np.float16).astype(np.float32)
            cut = {"float16": (halves, 2 * found.shape[1]), "int8": (int8_vectors(found), found.shape[1] + 4)}
            for kind, (narrow, size) in cut.items():
                parts = narrow[: len(own)], narrow[len(own) :]
                judge(f"{name}, {kind} vectors", *parts, {"bytes_an_item": size, **said})
    counts = {"items": len(aligned.ids), "judged_items": len(judged.texts), "judged_rows": len(judged.label_R)}
    return counts | {"machine": machine(), "threads": torch.get_num_threads(), "tuning": tunings, "encoders": rows}


def size_of(folder: Path) -> int:
    return (folder / "model.safetensors").stat().st_size


def figures(judged: Judged, found_JK: Floats, error_J: Floats, spread_J: Floats) -> tuple[dict[str, float], dict[str, Floats]]:
    """R^2 of the vectors (0: as good as the mean of all), pooled and per-user AUC of the items' rows; and their draws."""
    width, num_items = found_JK.shape[1] - 1, len(judged.texts)
    at_RK = found_JK[judged.item_R]
    score_R = (judged.users_RL[:, :-1] * at_RK[:, :width]).sum(1) + judged.users_RL[:, -1] + at_RK[:, -1]
    items_BJ = metrics.draw_users(num_items, draws=DRAWS, seed=0)
    users_BU = metrics.draw_users(judged.num_users, draws=DRAWS, seed=0)
    by_item, by_user = metrics.Bootstrap(judged.item_R, items_BJ), metrics.Bootstrap(judged.user_R, users_BU)
    drawn = {
        "r2": 1.0 - (items_BJ @ error_J) / (items_BJ @ spread_J),
        "pooled_auc": 100 * by_item.pooled_auc(judged.label_R, score_R),
        "per_user_auc": 100 * by_user.per_user_auc(judged.label_R, score_R),
    }
    value = {
        "r2": float(1.0 - error_J.sum() / spread_J.sum()),
        "pooled_auc": 100 * metrics.auc(judged.label_R, score_R),
        "per_user_auc": 100 * metrics.mean_per_user_auc(judged.label_R, score_R, judged.user_R, judged.num_users),
    }
    return value, drawn


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--world", action="append", choices=sorted(TEMPLATES))
    parser.add_argument("--variant", action="append", choices=sorted(VARIANTS), help="of tuning; all if none is named")
    given = parser.parse_args()
    telemetry.configure(level=logging.WARNING)
    kept = json.loads(given.out.read_text())["worlds"] if given.out.exists() else {}
    with tempfile.TemporaryDirectory(prefix="limaml-encoders-") as root:
        worlds = {world: measure(world, root, given.variant or list(VARIANTS)) for world in given.world or ["movielens"]}
    given.out.write_text(json.dumps({"worlds": kept | worlds}, indent=1) + "\n")


if __name__ == "__main__":
    main()
