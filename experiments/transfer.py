"""What vectors of text give items that nobody has touched: with and without them, as a daily refresh serves the same rows.

    python -m experiments.transfer --out experiments/results/transfer.json [--world NAME ...]

Two shares of the items, by hash, have no event before validation begins (T1) and before the judged days begin (T2): theirs are
the rows of new items, whatever is counted of them. On the first share's rows before T2 the projection is chosen; the second
share's and all other rows from T2 on are judged, by an item's rows before the day. Differences are paired over users.
"""

import json
from dataclasses import dataclass
from datetime import date, timedelta
from hashlib import blake2b
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import typer
from rich.console import Console

from experiments.data import TODAY
from experiments.inner_loop import fit_world
from limaml import schema
from limaml.config import Config, FeatureConfig, load
from limaml.events.sources import open_source
from limaml.metrics import (
    Bootstrap,
    Floats,
    Ints,
    auc,
    draw_users,
    expected_calibration_error,
    interval,
    mean_per_user_auc,
)
from limaml.tasks.protocols import as_served
from limaml.tasks.sampling import microseconds
from limaml.training.scoring import score_specs
from limaml.transfer.bert import minilm

VALIDATION_ITEMS, JUDGED_ITEMS = 0.15, 0.2
"""Shares of the items that are new at T1 and at T2."""
TEXTS = {"movielens": "{title}. {genres}", "grocery": "{title}. {department}, {product_category}, {product_type}, {brand}"}
OVERRIDES = {
    "movielens": ("evaluation.held_out=hash",),
    "grocery": ("source.completejourney_share=0.15", "training.max_steps=400"),
}
WIDTHS = (8, 32)
"""Principal components of the whitened text; the validation items choose one."""
GROUPS = {"unseen": (0, 0), "few": (1, 5), "rare": (6, 50), "warm": (51, np.inf), "all": (0, np.inf)}
"""Rows of the item before the day."""
_DRAWS, _TOP, _ENCODED_AT_ONCE = 1000, 10, 64


@dataclass(frozen=True)
class Arm:
    """Scores of the rows from T1 on, by the event's id."""

    event_ids: pa.Array
    score_R: Floats


@dataclass(frozen=True)
class Rows:
    """Rows that are judged alike for every arm, one value each."""

    label_R: Floats
    user_R: Ints
    list_R: Ints
    """A user's day."""
    item_R: Ints
    seen_R: Ints
    """Rows of the item before the day."""


def measure(cfg: Config, name: str, folder: Path) -> dict[str, Any]:
    """All arms of a world."""
    test_from = _dates(cfg)[1]
    delivered = _deliver(cfg, name, folder / "delivered")
    arms = {"none": _arm(delivered, folder / "none")}
    for width in WIDTHS:
        for place, reads in (("outside", False), ("inside", True)):
            arms[f"{place}_{width}"] = _arm(_with_text(delivered, width, mlp_reads_vectors=reads), folder / f"{place}_{width}")
    events = pq.read_table(folder / "delivered" / "events").sort_by("event_id")
    first_us = microseconds(schema.day_start(test_from))
    before_test = events["timestamp"].cast(pa.int64()).to_numpy() < first_us
    common = pc.is_in(events["event_id"], value_set=arms["none"].event_ids).to_numpy()
    at_R = np.flatnonzero(common & before_test)
    rows = _rows(events, at_R)
    validated = {key: _auc_of(rows, _scores(arm, events, at_R), rows.seen_R == 0) for key, arm in arms.items()}
    chosen = [max((key for key in arms if key.startswith(place)), key=validated.__getitem__) for place in ("outside", "inside")]
    best = max(chosen, key=validated.__getitem__)
    at_R = np.flatnonzero(common & ~before_test)
    rows = _rows(events, at_R)
    scores = {key: _scores(arms[key], events, at_R) for key in ("none", *chosen)}
    vectors = pq.read_table(folder / "delivered" / "items.parquet")
    return {
        "validation_auc_unseen": validated,
        "chosen": best,
        "rows": {group: int(_inside(rows, group).sum()) for group in GROUPS},
        "gains": _gains(rows, scores["none"], scores[best]),
        "arms": {
            key: _values(rows, scores["none"], score_R) | _lists(rows, score_R, vectors) for key, score_R in scores.items()
        },
    }


def _dates(cfg: Config) -> tuple[date, date]:
    """T1 and T2."""
    days = open_source(cfg, TODAY).days()
    ends = np.cumsum([cfg.evaluation.train_share_of_days, cfg.evaluation.validation_share_of_days])
    return tuple(days[0] + timedelta(days=round(len(days) * share)) for share in ends.tolist())  # type: ignore[return-value]


def _deliver(cfg: Config, name: str, folder: Path) -> Config:
    """Day folders without the first rows of new items, and the catalogue with its texts' vectors; how to read them."""
    source, starts = open_source(cfg, TODAY), _dates(cfg)
    users, items = source.catalogue()
    folder.mkdir(parents=True)
    pq.write_table(users, folder / "users.parquet")
    texts = [TEXTS[name].format(**{key: _words(value) for key, value in row.items()}) for row in items.to_pylist()]
    encoder = minilm()
    parts = [encoder.encode(texts[start : start + _ENCODED_AT_ONCE]) for start in range(0, len(texts), _ENCODED_AT_ONCE)]
    pq.write_table(items.append_column("text_vector", pa.array(np.concatenate(parts).tolist())), folder / "items.parquet")
    for day in source.days():
        rows = source.read_day(day)
        if rows is not None:
            late = [item for item in pc.unique(rows["item_id"]).to_pylist() if _begins(item, starts) > day]
            (folder / "events" / f"dt={day}").mkdir(parents=True)
            kept = rows.filter(pc.invert(pc.is_in(rows["item_id"], value_set=pa.array(late, pa.string()))))
            pq.write_table(kept, folder / "events" / f"dt={day}" / "events.parquet")
    own = {
        "kind": "parquet",
        "path": str(folder),
        "licence": "its package's",
        "permitted_use": "research",
        "min_rows_ratio": 0.0,
    }
    split = {"held_out": "hash", "validate_from": starts[0], "test_from": starts[1]}
    update = {"source": cfg.source.model_copy(update=own), "evaluation": cfg.evaluation.model_copy(update=split)}
    return cfg.model_copy(update=update)


def _words(value: Any) -> str:
    return ", ".join(value) if isinstance(value, list) else str(value or "")


def _begins(item_id: str, starts: tuple[date, date]) -> date:
    """The first day that an item has events on."""
    place = int.from_bytes(blake2b(item_id.encode(), digest_size=8, salt=b"transfer").digest(), "big") / 2**64
    if place < VALIDATION_ITEMS:
        return starts[0]
    return starts[1] if place < VALIDATION_ITEMS + JUDGED_ITEMS else date.min


def _with_text(cfg: Config, width: int, *, mlp_reads_vectors: bool) -> Config:
    origin = minilm().origin
    declared = {"entity": "item", "name": "text_vector", "type": "vector", "width": origin.width, "project_to": width}
    feature = FeatureConfig.model_validate(declared | {"encoder": origin.label, "licence": origin.licence})
    model = cfg.model.model_copy(update={"mlp_reads_vectors": mlp_reads_vectors})
    return cfg.model_copy(update={"features": (*cfg.features, feature), "model": model})


def _arm(cfg: Config, root: Path) -> Arm:
    fitted = fit_world(cfg, str(root))
    assert cfg.evaluation.validate_from is not None
    first_us = microseconds(schema.day_start(cfg.evaluation.validate_from))
    specs = as_served(fitted.rows, from_us=first_us, support_rows=cfg.support_rows_of(cfg.task_kind.name))
    scores = score_specs(fitted.network, fitted.rows, specs)
    at_R = fitted.rows.source_row[np.concatenate([spec.query for spec in specs])]
    return Arm(fitted.logged["event_id"].take(pa.array(at_R)).combine_chunks(), scores)


def _scores(arm: Arm, events: pa.Table, at_R: Ints) -> Floats:
    ids = events["event_id"].take(pa.array(at_R)).combine_chunks()
    found: Floats = arm.score_R[pc.index_in(ids, value_set=arm.event_ids).to_numpy()]
    return found


def _rows(events: pa.Table, at_R: Ints) -> Rows:
    user_E, item_E = (_codes(events[column]) for column in ("user_id", "item_id"))
    day_E = events["timestamp"].cast(pa.int64()).to_numpy() // 86_400_000_000
    order = np.lexsort((day_E, item_E))
    keys = item_E[order] * 100_000 + day_E[order]
    seen_E = np.searchsorted(keys, item_E * 100_000 + day_E) - np.searchsorted(keys, item_E * 100_000)
    label_R = events["label"].to_numpy()[at_R].astype(np.float64)
    users = np.unique(user_E[at_R], return_inverse=True)[1]
    lists = np.unique(np.stack([user_E[at_R], day_E[at_R]], axis=1), axis=0, return_inverse=True)[1].reshape(-1)
    return Rows(label_R, users, lists, item_E[at_R], seen_E[at_R])


def _codes(column: pa.ChunkedArray) -> Ints:
    """Place of each string among the sorted distinct ones."""
    return np.unique(column.to_numpy(), return_inverse=True)[1].astype(np.int64)


def _inside(rows: Rows, group: str) -> Any:
    low, high = GROUPS[group]
    return (rows.seen_R >= low) & (rows.seen_R <= high)


def _auc_of(rows: Rows, score_R: Floats, inside_R: Any) -> float:
    return 100 * auc(rows.label_R[inside_R], score_R[inside_R])


def _gains(rows: Rows, before_R: Floats, after_R: Floats) -> dict[str, Any]:
    """Group -> metric -> what `after` has over `before`, in points, with an interval over users."""
    found: dict[str, Any] = {}
    for group in GROUPS:
        inside = _inside(rows, group)
        label_R, user_R = rows.label_R[inside], np.unique(rows.user_R[inside], return_inverse=True)[1]
        num_users = int(user_R.max(initial=-1)) + 1
        weights_BU = draw_users(num_users, draws=_DRAWS, seed=0)
        bootstrap = Bootstrap(user_R, weights_BU)
        list_R = rows.list_R[inside]
        pair = [score_R[inside] for score_R in (before_R, after_R)]
        pooled = [(auc(label_R, each), bootstrap.pooled_auc(label_R, each)) for each in pair]
        own = [(mean_per_user_auc(label_R, each, user_R, num_users), bootstrap.per_user_auc(label_R, each)) for each in pair]
        ranked = [_ndcg(label_R, each, user_R, list_R, weights_BU) for each in pair]
        found[group] = {
            metric: _points(after[0] - before[0], after[1] - before[1])
            for metric, (before, after) in {"pooled_auc": pooled, "per_user_auc": own, "ndcg10": ranked}.items()
        }
    return found


def _points(value: float, draws_B: Floats) -> dict[str, float]:
    found = interval(100 * value, 100 * draws_B)
    return {"mean": found.value, "low": found.low, "high": found.high}


def _ndcg(label_R: Floats, score_R: Floats, user_R: Ints, list_R: Ints, weights_BU: Floats) -> tuple[float, Floats]:
    """Mean NDCG@10 over users' days with both labels, and of each draw of users."""
    sum_U, number_U = np.zeros(weights_BU.shape[1]), np.zeros(weights_BU.shape[1])
    for rows in _by_list(list_R):
        labels = label_R[rows]
        if 0 < labels.sum() < len(labels):
            discount = 1 / np.log2(np.arange(2, _TOP + 2))[: len(rows)]
            gained = labels[np.argsort(-score_R[rows], kind="stable")][:_TOP] @ discount
            sum_U[user_R[rows[0]]] += gained / (np.sort(labels)[::-1][:_TOP] @ discount)
            number_U[user_R[rows[0]]] += 1
    with np.errstate(invalid="ignore"):
        return float(sum_U.sum() / number_U.sum()), (weights_BU @ sum_U) / (weights_BU @ number_U)


def _by_list(list_R: Ints) -> list[Ints]:
    order = np.argsort(list_R, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(list_R[order])) + 1)


def _values(rows: Rows, none_R: Floats, score_R: Floats) -> dict[str, Any]:
    own = {
        group: {
            "pooled_auc": _auc_of(rows, score_R, _inside(rows, group)),
            "calibration_error": expected_calibration_error(rows.label_R[inside], score_R[inside]),
        }
        for group in GROUPS
        if (inside := _inside(rows, group)).any()
    }
    return {"groups": own, "over_none": _gains(rows, none_R, score_R)}


def _lists(rows: Rows, score_R: Floats, items: pa.Table) -> dict[str, float]:
    """Of the ten best of every user's day: how alike they are, how rare, and whom they show."""
    ids = sorted(items["item_id"].to_pylist())
    order = pc.index_in(pa.array(ids), value_set=items["item_id"].combine_chunks()).to_numpy()
    vector_IW = np.array(items["text_vector"].to_pylist(), np.float64)[order]
    tops = [each[np.argsort(-score_R[each], kind="stable")][:_TOP] for each in _by_list(rows.list_R) if len(each) > _TOP]
    shown = np.concatenate(tops) if tops else np.zeros(0, np.int64)
    alike = []
    for top in tops:
        cosine = vector_IW[rows.item_R[top]] @ vector_IW[rows.item_R[top]].T
        alike.append((cosine.sum() - np.trace(cosine)) / (len(top) * (len(top) - 1)))
    counts = np.sort(np.bincount(rows.item_R[shown], minlength=int(rows.item_R.max()) + 1)[np.unique(rows.item_R)])
    place = np.arange(1, len(counts) + 1)
    return {
        "diversity": 1 - float(np.mean(alike)),
        "novelty": float(np.mean(-np.log2((rows.seen_R[shown] + 1) / (rows.seen_R.max() + 1)))),
        "coverage": float((counts > 0).mean()),
        "exposure_gini": float((2 * place - len(counts) - 1) @ counts / (len(counts) * counts.sum())),
        "unseen_share": float((rows.seen_R[shown] == 0).mean()),
    }


def main(
    out: Annotated[Path, typer.Option(help="File of the results; worlds that are there already are kept.")],
    world: Annotated[list[str] | None, typer.Option(help="movielens or grocery; both by default.")] = None,
    max_steps: Annotated[int | None, typer.Option(help="Of training; the world's own by default.")] = None,
) -> None:
    """Measure worlds one after another, and write after each."""
    console = Console()
    results: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {"gains": {}, "worlds": {}}
    for name in world or TEXTS:
        steps = (
            ()
            if max_steps is None
            else (f"training.max_steps={max_steps}", f"training.validate_every={max(max_steps // 4, 1)}")
        )
        cfg = load(f"configs/{name}.toml", ["training.num_workers=1", *OVERRIDES[name], *steps])
        with TemporaryDirectory() as folder:
            found = measure(cfg, name, Path(folder))
        results["gains"][name] = found.pop("gains")
        results["worlds"][name] = found
        out.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
        console.print(name, results["gains"][name], found)


if __name__ == "__main__":
    typer.run(main)
