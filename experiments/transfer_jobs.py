"""Draws of new items, arms that may help them, and one arm fitted and scored on one draw, catalogues included.

Two shares of the items, by hash, have no event before validation begins (T1) and before the judged days begin (T2): theirs are
the rows of new items, whatever is counted of them. Each draw trains with a seed of its own. Catalogues are those that a shop
would have ranked for its judged users' days.

E events, P positives of the lists, C candidates of the lists; a list is of a user's day
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from functools import cache, cached_property
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from experiments.cached_jobs import Job, JobOutput
from experiments.data import TODAY
from experiments.evidence.catalogue import joined, with_columns
from experiments.evidence.fit_data import FitData
from experiments.evidence.measure import TOP, Mask
from experiments.evidence.worlds import Origin, ingested
from limaml.config import Config, FeatureConfig, TransferConfig
from limaml.events.sources import open_source
from limaml.io import atomic
from limaml.metrics import Floats, Ints
from limaml.models.network import Network
from limaml.tasks.protocols import as_served, query_rows
from limaml.tasks.sampling import MICROSECONDS_PER_DAY, TaskRows, TaskSpec
from limaml.training.scoring import embed_specs, score_specs, score_with_embeddings
from limaml.training.twin_and_refit import fit_twin
from limaml.transfer.bert import minilm
from limaml.transfer.texts import texts_of

VALIDATION_ITEMS, JUDGED_ITEMS = 0.15, 0.2
"""Shares of the items that are new at T1 and at T2."""
GROUPS = {"unseen": (0, 0), "few": (1, 5), "rare": (6, 50), "warm": (51, np.inf), "all": (0, np.inf)}
"""Rows of the item before the day."""
LISTS = 100
"""Of each draw and group, user's days whose catalogue is ranked."""
_DAYS = 100_000


@dataclass(frozen=True)
class World:
    kind: str
    """Of its source."""
    text: str
    """Of an item's columns."""
    components: int
    """Principal components of the whitened text, read by the factor model alone."""
    offered: bool
    """Whether a day's rows are what was on offer, and so the day's catalogue; otherwise that is every item."""
    overrides: tuple[str, ...]

    def with_text(self, cfg: Config) -> Config:
        """With vectors of its items' texts, which `embed_items` makes."""
        made = TransferConfig(feature="text_vector", provider="minilm", template=self.text)
        features, model = (*cfg.features, text_feature(self.components)), {"mlp_reads_vectors": False}
        return cfg.model_copy(update={"features": features, "transfer": (made,), "model": cfg.model.model_copy(update=model)})


WORLDS = {
    # Without its new items' rows a day may be a hole, and so the next one a peak: the gates' bounds are of whole days.
    "movielens": World(
        "movielens",
        "{title}. {genres}",
        32,
        False,
        ("source.max_rows_ratio=1000", "source.min_label_rate=0", "source.max_label_rate=1"),
    ),
    "grocery": World(
        "completejourney",
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
            vectors = _vectors(tuple(text or "" for text in texts_of(WORLDS[name].with_text(cfg).transfer[0], items)))
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


def inside(seen: Ints, group: str) -> Mask:
    low, high = GROUPS[group]
    return (seen >= low) & (seen <= high)


class Draw:
    """What a world delivers when some of its items are new, one value an event; users and items by place in the catalogue."""

    def __init__(self, events: pa.Table, users: pa.Array, items: pa.Table, first_judged: int) -> None:
        """`first_judged` is a day, since 1970."""
        self.events, self.users, self.items, self.first_judged = events, users, items, first_judged
        self.item_ids = items["item_id"].combine_chunks()
        self.user_E, self.item_E = (
            pc.index_in(events[name].combine_chunks(), value_set=ids).to_numpy().astype(np.int64)
            for name, ids in (("user_id", users), ("item_id", self.item_ids))
        )
        self.day_E: Ints = events["timestamp"].cast(pa.int64()).to_numpy() // MICROSECONDS_PER_DAY
        self.label_E: Floats = events["label"].to_numpy().astype(np.float64)

    @classmethod
    def read(cls, cfg: Config) -> "Draw":
        """As `deliver` wrote it, events by their ids."""
        folder, first_judged = Path(cfg.source.path), cfg.evaluation.test_from
        assert first_judged is not None
        events = pq.read_table(folder / "events").sort_by("event_id").combine_chunks()
        users, items = (pq.read_table(folder / f"{name}s.parquet").sort_by(f"{name}_id") for name in ("user", "item"))
        return cls(events, users["user_id"].combine_chunks(), items, (first_judged - date(1970, 1, 1)).days)

    def before(self, code_E: Ints, code: Ints, day: Ints) -> Ints:
        """Rows of each of these items (users) before the day; `code_E` are the events' own."""
        keys = np.sort(code_E * _DAYS + self.day_E)
        found: Ints = np.searchsorted(keys, code * _DAYS + day) - np.searchsorted(keys, code * _DAYS)
        return found

    @cached_property
    def lists(self) -> "list[UserDay]":
        """Of each group of items, judged users' days with a positive of it, at most `LISTS`."""
        at_P = np.flatnonzero((self.day_E >= self.first_judged) & (self.label_E > 0))
        user_P, day_P, item_P = np.unique(np.stack([self.user_E[at_P], self.day_E[at_P], self.item_E[at_P]]), axis=1)
        (user_L, day_L), list_P = np.unique(np.stack([user_P, day_P]), axis=1, return_inverse=True)
        seen_P, rng, groups = self.before(self.item_E, item_P, day_P), np.random.default_rng(0), [set[str]() for _ in user_L]
        for group in GROUPS:
            for at in rng.permutation(np.unique(list_P[inside(seen_P, group)]))[:LISTS]:
                groups[at].add(group)
        items, seen = (np.split(each_P, np.flatnonzero(np.diff(list_P)) + 1) for each_P in (item_P, seen_P))
        each = zip(user_L.tolist(), day_L.tolist(), items, seen, groups, strict=True)
        return [one for one in (UserDay(*fields) for fields in each) if one.sampled]


@dataclass(frozen=True)
class UserDay:
    """A list with its positives."""

    user: int
    day: int
    item_P: Ints
    seen_P: Ints
    sampled: set[str]
    """Groups whose sample it is of."""


def candidates(draw: Draw, *, offered: bool) -> tuple[Ints, Ints, Ints]:
    """(C,) list, item, and the event whose context is the candidate's.

    `offered`: those that anybody has a row with on that day, the user's own row before others'. Otherwise the whole catalogue,
    but for what the user had before where nobody has an item twice.
    """
    pairs = np.unique(np.stack([draw.user_E, draw.item_E]), axis=1)
    once, parts = pairs.shape[1] == len(draw.user_E), []
    for number, one in enumerate(draw.lists):
        today = np.flatnonzero(draw.day_E == one.day)
        own = draw.user_E[today] == one.user
        if offered:
            today = today[np.argsort(~own, kind="stable")]
            items, first = np.unique(draw.item_E[today], return_index=True)
            context = today[first]
        else:
            had = draw.item_E[(draw.user_E == one.user) & (draw.day_E < one.day)] if once else []
            items = np.setdiff1d(np.arange(draw.items.num_rows), had)
            context = np.full(len(items), today[own][0])
        parts.append((np.full(len(items), number), items, context))
    lists, items, context = (np.concatenate(each) for each in zip(*parts, strict=True))
    return lists, items, context


def as_logged(draw: Draw, cfg: Config, list_C: Ints, item_C: Ints, context_C: Ints) -> pa.Table:
    """Candidates as events with the features that they would have been logged with (`cfg`'s root holds the draw ingested)."""
    columns = {
        "event_id": pa.array(np.arange(len(list_C)).astype(str)),
        "user_id": draw.users.take(pa.array([draw.lists[at].user for at in list_C.tolist()])),
        "item_id": draw.item_ids.take(pa.array(item_C)),
    }
    return joined(cfg, with_columns(draw.events.take(pa.array(context_C)), columns))


def rank(draw: Draw, data: FitData, network: Network, specs: Sequence[TaskSpec], *, offered: bool) -> dict[str, Ints]:
    """Score every candidate with its user's embedding of that day; `specs` are users' days among `data.test`.

    Returns `above` of each positive, list by list: the candidates with a higher score that are no positives of the day; and
    `top` (lists, TOP), the items of the first places, -1 where there are fewer.
    """
    list_C, item_C, context_C = candidates(draw, offered=offered)
    logged, rows = as_logged(draw, data.cfg, list_C, item_C, context_C), data.test.rows
    ranked = TaskRows.from_logged(logged, data.encoder, data.cfg.task_kind)
    query = np.argsort(ranked.source_row)
    spec_of = {(rows.entities[spec.entity], spec.as_of_us // MICROSECONDS_PER_DAY): spec for spec in specs}
    served = [spec_of[draw.users[one.user].as_py(), one.day] for one in draw.lists]
    ends = list(pairwise(np.searchsorted(list_C, np.arange(len(served) + 1))))
    asked = [
        TaskSpec(spec.entity, spec.as_of_us, 0, 0, query[start:end]) for spec, (start, end) in zip(served, ends, strict=True)
    ]
    score_C = score_with_embeddings(network, ranked, asked, embed_specs(network, rows, served))
    above, top = [], []
    for one, (start, end) in zip(draw.lists, ends, strict=True):
        items, found = item_C[start:end], score_C[start:end]
        best = np.argsort(-found, kind="stable")[:TOP]
        top.append(np.pad(items[best], (0, TOP - len(best)), constant_values=-1))
        positive = np.isin(items, one.item_P)
        others = np.sort(found[~positive])
        above.append(len(others) - np.searchsorted(others, found[positive], side="right"))
    return {"above": np.concatenate(above), "top": np.stack(top)}
