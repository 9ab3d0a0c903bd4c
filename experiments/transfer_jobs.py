"""Draws of new items, arms that may help them, and one arm fitted and scored on one draw.

Two shares of the items, by hash, have no event before validation begins (T1) and before the judged days begin (T2): theirs are
the rows of new items, whatever is counted of them. Each draw trains with a seed of its own.
"""

from dataclasses import dataclass
from datetime import date, timedelta
from functools import cache
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from experiments.cached_jobs import Job, JobOutput
from experiments.data import TODAY
from experiments.evidence.fit_data import FitData
from experiments.evidence.worlds import Origin, ingested
from experiments.transfer_rows import Draw, rank
from limaml.config import Config, FeatureConfig, TransferConfig
from limaml.events.sources import open_source
from limaml.io import atomic
from limaml.tasks.protocols import as_served, query_rows
from limaml.training.scoring import score_specs
from limaml.training.twin_and_refit import fit_twin
from limaml.transfer.bert import minilm
from limaml.transfer.texts import texts_of

VALIDATION_ITEMS, JUDGED_ITEMS = 0.15, 0.2
"""Shares of the items that are new at T1 and at T2."""


@dataclass(frozen=True)
class World:
    text: str
    """Of an item's columns."""
    components: int
    """Principal components of the whitened text, read by the factor model alone."""
    offered: bool
    """Whether a day's rows are what was on offer, and so the day's catalogue; otherwise that is every item."""
    overrides: tuple[str, ...]

    @property
    def transfer(self) -> TransferConfig:
        return TransferConfig(feature="text_vector", provider="minilm", template=self.text)


WORLDS = {
    # Without its new items' rows a day may be a hole, and so the next one a peak: the gates' bounds are of whole days.
    "movielens": World(
        "{title}. {genres}", 32, False, ("source.max_rows_ratio=1000", "source.min_label_rate=0", "source.max_label_rate=1")
    ),
    "grocery": World(
        "{title}. {department}, {product_category}, {product_type}, {brand}",
        8,
        True,
        ("source.completejourney_share=0.15", "training.max_steps=400"),
    ),
}


@dataclass(frozen=True)
class Arm:
    text: bool = False
    hidden: float = 0.0

    @property
    def name(self) -> str:
        parts = ([f"hidden {self.hidden:g}"] if self.hidden else []) + (["text"] if self.text else [])
        return ", ".join(parts) or "none"


def fit_and_score(job: Job) -> JobOutput:
    """One arm of one draw: scores of its events from T1 on, and the judged days' catalogues as it ranks them."""
    cfg, arm, world = Config.model_validate(job.params["config"]), Arm(**job.params["arm"]), WORLDS[job.params["world"]]
    model = cfg.model.model_copy(update={"hidden_item_share": arm.hidden, "mlp_reads_vectors": not arm.text})
    features = (*cfg.features, text_feature(world.components)) if arm.text else cfg.features
    root = Path(cfg.storage.root, "text" if arm.text else "plain")
    cfg = ingested(cfg.model_copy(update={"features": features, "model": model}), root)
    data = FitData(cfg, Origin.read(cfg, open_source(cfg, TODAY).days()[-1]))
    network, progress = fit_twin(cfg, data.training.rows, data.encoder.dims, data.network_validator)
    rows, support_rows = data.test.rows, cfg.support_rows_of(cfg.task_kind.name)
    specs = as_served(rows, from_us=data.origin.split.train_end_us, support_rows=support_rows)
    draw, place_R = Draw.read(cfg), rows.source_row[query_rows(rows, specs).rows]
    ids = data.origin.logged["event_id"].take(pa.array(place_R)).combine_chunks()
    event_R = pc.index_in(ids, value_set=draw.events["event_id"].combine_chunks()).to_numpy()
    order = np.argsort(event_R)
    arrays = {"event_R": event_R[order], "score_R": score_specs(network, rows, specs)[order]}
    ranked = rank(draw, data, network, specs, offered=world.offered)
    return JobOutput({"best_step": progress.best_step}, arrays | ranked)


def text_feature(components: int) -> FeatureConfig:
    """Vectors of text, as an arm declares them."""
    origin = minilm().origin
    declared = {"entity": "item", "name": "text_vector", "type": "vector", "width": origin.width, "project_to": components}
    return FeatureConfig.model_validate(declared | {"encoder": origin.label, "licence": origin.licence})


def deliver(cfg: Config, name: str, number: int, folder: Path) -> Config:
    """Write a draw where it is not yet: day folders without its new items' first rows, the catalogue with its texts' vectors.

    Returns how to read it; `folder` is its storage.
    """
    cfg = cfg.model_copy(update={"storage": cfg.storage.model_copy(update={"root": str(folder)})})
    source = open_source(cfg, TODAY)
    days = source.days()
    ends = np.cumsum([cfg.evaluation.train_share_of_days, cfg.evaluation.validation_share_of_days]).tolist()
    starts = [days[0] + timedelta(days=round(len(days) * share)) for share in ends]
    delivered = folder / "delivered"
    if not delivered.exists():
        with atomic.replacing_folder(delivered) as temporary:
            users, items = source.catalogue()
            pq.write_table(users, temporary / "users.parquet")
            vectors = _vectors(tuple(text or "" for text in texts_of(WORLDS[name].transfer, items)))
            pq.write_table(items.append_column("text_vector", vectors), temporary / "items.parquet")
            begins = {item: begin(item, number, starts[0], starts[1]) for item in items["item_id"].to_pylist()}
            for day in days:
                rows = source.read_day(day)
                if rows is None:
                    continue
                begun = [begins[item] <= day for item in rows["item_id"].to_pylist()]
                if any(begun):
                    (temporary / "events" / f"dt={day}").mkdir(parents=True)
                    pq.write_table(rows.filter(pa.array(begun)), temporary / "events" / f"dt={day}" / "events.parquet")
    own = {"kind": "parquet", "path": str(delivered), "licence": "its package's", "permitted_use": "research"}
    source_cfg = cfg.source.model_copy(update=own | {"min_rows_ratio": 0.0})
    evaluation = cfg.evaluation.model_copy(update={"held_out": "hash", "validate_from": starts[0], "test_from": starts[1]})
    training = cfg.training.model_copy(update={"seed": number})
    return cfg.model_copy(update={"source": source_cfg, "evaluation": evaluation, "training": training})


def begin(item_id: str, number: int, validate_from: date, test_from: date) -> date:
    """The first day that an item has events on, in the draw of this number."""
    digest = blake2b(item_id.encode(), digest_size=8, salt=f"transfer{number}".encode()).digest()
    place = int.from_bytes(digest, "big") / 2**64
    if place < VALIDATION_ITEMS:
        return validate_from
    return test_from if place < VALIDATION_ITEMS + JUDGED_ITEMS else date.min


@cache
def _vectors(texts: tuple[str, ...]) -> pa.Array:
    encoder, at_once = minilm(), 64
    parts = [encoder.encode(list(texts[start : start + at_once])) for start in range(0, len(texts), at_once)]
    return pa.array(np.concatenate(parts).tolist())
