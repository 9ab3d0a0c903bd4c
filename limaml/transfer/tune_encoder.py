"""The verb `tune-encoder`."""

from datetime import date
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from limaml.config import Config, TuningConfig, require_permitted
from limaml.errors import ConfigError, DataError, NothingToDo
from limaml.events.catalogue import item_vectors
from limaml.features.columns import Indices
from limaml.features.encoder import Encoder
from limaml.io.storage import Storage
from limaml.schema import tables
from limaml.tasks.sampling import TaskRows
from limaml.tasks.splits import split_events
from limaml.training.prepare import read_history
from limaml.training.warm_start import fit_items
from limaml.transfer.adapters import adapted, write_adapted
from limaml.transfer.bert import BertEncoder, minilm
from limaml.transfer.cost import TimeBudget
from limaml.transfer.embed_items import delivered_items
from limaml.transfer.encoders import require_there
from limaml.transfer.texts import texts_of
from limaml.transfer.tuning import Aligned, tune

_SALT = b"limaml-tuning"


def tune_encoder(cfg: Config, out: Path, through: date, today: date) -> dict[str, Any]:
    """Leave the encoder of `[tuning]`, adapted to the rows that train the twin, in `out`, and say what to declare.

    Raises NothingToDo, with the losses, if no adapter lowers the loss on held-out items; ConfigError if the settings do not fit
    the encoder or each other, or it is slower than they allow; DataError if there are too few rows.
    """
    require_permitted(cfg)
    settings = cfg.tuning
    if not settings.columns:
        raise ConfigError(
            f"tuning.template must name a column of the catalogue, got {settings.template!r}; write the item's text"
        )
    encoder = BertEncoder(require_there(settings.path, "the folder of an encoder")) if settings.path else minilm()
    if not encoder.origin.licence:
        raise ConfigError(
            f"the licence of {encoder.origin.label} must be declared before it is adapted, got none; write it into "
            "encoder.json beside its files"
        )
    items = delivered_items(cfg, today)
    budget = TimeBudget(settings.max_ms_per_item, [text for text in texts_of(settings, items) if text])
    budget.require(encoder, encoder.weights, "before tuning")
    logged = read_history(cfg, through)
    logged = split_events(logged, cfg.evaluation).train_rows(logged)
    found = tune(encoder, aligned_items(cfg, logged, items), settings)
    losses = {stage: round(loss, 4) for stage, loss in found.losses.items()}
    shown = ", ".join(f"{stage} {loss:.4f}" for stage, loss in losses.items())
    if not found.adapters:
        raise NothingToDo(f"no adapter lowers the loss on held-out items ({shown}); the encoder stays as it is")
    budget.require(encoder, adapted(encoder, found.adapters), "after tuning")
    said = {"tuned": settings.model_dump(mode="json") | {"through": through.isoformat(), "held_out_loss": losses}}
    origin = write_adapted(encoder, found.adapters, out, said)
    print(f"loss on held-out items after each stage: {shown}; kept: {', '.join(found.kept)}")
    print(f'provider = "folder", path = "{out}"; of the feature:')
    print(f'width = {origin.width}, encoder = "{origin.label}", licence = "{origin.licence}"')
    made = {"encoder": origin.label, "width": origin.width, "licence": origin.licence, "path": str(out)}
    spent = {"ms_per_item": budget.spent} if budget.spent else {}
    return made | {"kept": list(found.kept), "held_out_loss": losses} | spent


def aligned_items(cfg: Config, logged: pa.Table, items: pa.Table) -> Aligned:
    """The catalogue's items with a text and enough rows, in the order of the rows' vocabulary."""
    stored = item_vectors(Storage(cfg.storage.root), tables(cfg.features))
    encoder = Encoder.fit(logged, cfg, stored).with_items(stored)
    rows = TaskRows.of(logged, encoder, cfg)
    texts = dict(zip(items["item_id"].to_pylist(), texts_of(cfg.tuning, items), strict=True))
    num_rows = np.bincount(rows.encoded.item_index, minlength=len(encoder.items) + 1)[1:]
    used = [at for at, item in enumerate(encoder.items) if texts.get(item) and num_rows[at] >= cfg.tuning.min_item_rows]
    held = np.array([_is_held_out(encoder.items[at], cfg.tuning.held_out_items) for at in used], bool)
    vectors_IK = fit_items(rows, cfg, encoder.dims).vectors_IK[torch.tensor(used, dtype=torch.long)]
    partners = _partners(rows, cfg.tuning, used) if cfg.tuning.align == "pairs" else None
    ids = [encoder.items[at] for at in used]
    own = [texts[item] or "" for item in ids]
    domain = [text for item, text in texts.items() if text and not _is_held_out(item, cfg.tuning.held_out_items)]
    return Aligned(ids, own, np.flatnonzero(held), np.flatnonzero(~held), vectors_IK, partners, domain)


def _partners(rows: TaskRows, cfg: TuningConfig, used: list[int]) -> list[Indices]:
    """Of each used item those that a user took positively just before or after it."""
    place = np.full(int(rows.encoded.item_index.max(initial=0)) + 1, -1)
    place[np.array(used, np.int64) + 1] = np.arange(len(used))
    positive = np.flatnonzero(rows.label > 0)
    entity = np.repeat(np.arange(rows.num_entities), np.diff(rows.offsets))[positive]
    item, stamp = place[rows.encoded.item_index[positive]], rows.timestamp_us[positive]
    near = (entity[1:] == entity[:-1]) & (np.diff(stamp) <= cfg.pair_hours * 3.6e9) & (item[1:] != item[:-1])
    near &= (item[1:] >= 0) & (item[:-1] >= 0)
    first, second = item[:-1][near], item[1:][near]
    if not near.any():
        raise DataError(
            f"tuning.align = 'pairs' needs two items that one user took within {cfg.pair_hours:g} hours, there are none; raise "
            "tuning.pair_hours, or align with vectors"
        )
    own, other = np.concatenate([first, second]), np.concatenate([second, first])
    order = np.lexsort((other, own))
    return np.split(other[order], np.searchsorted(own[order], np.arange(1, len(used))))


def _is_held_out(item_id: str, share: float) -> bool:
    return int.from_bytes(blake2b(item_id.encode(), digest_size=8, salt=_SALT).digest(), "big") < share * 2**64
