"""The verb `embed-items`: a vector for every item that is new, by what `[[transfer]]` names; known items stay as they are."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any

import pyarrow as pa

from limaml import telemetry
from limaml.config import Config, TransferConfig
from limaml.errors import DataError, NothingToDo
from limaml.events.embedded import ids_of
from limaml.events.sources import open_source
from limaml.io.locks import Lock, exclusive
from limaml.io.storage import Storage
from limaml.progress import progress
from limaml.transfer.encoders import ItemVectors, TextEncoder, Vectors, require_declared
from limaml.transfer.providers import open_provider
from limaml.transfer.texts import texts_of
from limaml.transfer.vector_store import VectorStore, digest_of

_LOCK_WAIT_S = 120.0
_PART_ITEMS = 16_384
"""New items that are kept together: what a killed run loses at most."""
_NAMED = 5
"""How many of many are named in a result of at most 4 KiB."""
_log = telemetry.get_logger(__name__)


@dataclass(frozen=True)
class _Delivered:
    """The catalogue's items, and what a vector of each is made of."""

    ids: list[str]
    digests: list[bytes]
    texts: Sequence[str | None]
    """Of an encoder of text; None: there is nothing to encode."""
    vectors: Sequence[Vectors | None]
    """Of vectors that are there."""


def embed_items(cfg: Config, today: date) -> dict[str, Any]:
    """Make the vectors of items that have none yet, each once; returns counts a feature.

    An item whose text has changed since keeps its vector and is named. Raises NothingToDo if no item is new, ConfigError if an
    encoder is not what its feature declares, DataError if what made the first vectors was another.
    """
    if not cfg.transfer:
        raise NothingToDo("no [[transfer]] is declared, so no vector is made here")
    declared = {feature.name: feature for feature in cfg.features}
    with exclusive(cfg, "embed-items", _LOCK_WAIT_S) as lock:
        opened = [(each, open_provider(each, declared[each.feature])) for each in cfg.transfer]
        for each, provider in opened:
            require_declared(declared[each.feature], provider.origin)
        items = delivered_items(cfg, today)
        done = {each.feature: _embed(cfg, lock, each, provider, items) for each, provider in opened}
    named = [f"{item} ({name})" for name, (_, changed) in done.items() for item in changed][:_NAMED]
    counts = {name: said for name, (said, _) in done.items()}
    if not any(said["items"] for said in counts.values()):
        kept = f"; texts that changed leave theirs as they are: {', '.join(named)}" if named else ""
        raise NothingToDo(f"all {items.num_rows} items have their vectors{kept}")
    return {"status": "embedded", "features": counts} | ({"first_changed": named} if named else {})


def delivered_items(cfg: Config, today: date) -> pa.Table:
    """Every item of the source once, by id. A replayed source notes its shift under the lock of ingestion."""
    with exclusive(cfg, "ingest", _LOCK_WAIT_S):
        _, items = open_source(cfg, today).catalogue()
    ids = ids_of(items)
    if ids is None:
        raise DataError(
            f"items must have a column item_id of texts or whole numbers, got {', '.join(items.column_names)}; deliver them so"
        )
    first = {item: place for place, item in reversed(list(enumerate(ids.to_pylist()))) if item is not None}
    places = pa.array([first[item] for item in sorted(first)], pa.int64())
    at = items.column_names.index("item_id")
    return items.set_column(at, "item_id", ids).take(places)


def _embed(
    cfg: Config, lock: Lock, transfer: TransferConfig, provider: TextEncoder | ItemVectors, items: pa.Table
) -> tuple[dict[str, int], list[str]]:
    """One feature's new items, a part at a time; returns counts, and which known items are made of something else now."""
    store = VectorStore(Storage(cfg.storage.root), transfer.feature, provider.origin)
    delivered = _delivered(transfer, provider, items)
    pairs = zip(delivered.ids, delivered.digests, strict=True)
    changed = [item for item, digest in pairs if store.known.get(item, digest) != digest]
    new = [place for place, item in enumerate(delivered.ids) if item not in store.known]
    without, encoded = list[str](), 0
    with progress(f"embedding {transfer.feature}", "items", len(new)) as advance:
        for start in range(0, len(new), _PART_ITEMS):
            part = new[start : start + _PART_ITEMS]
            if isinstance(provider, ItemVectors):
                num_fresh, made = 0, [delivered.vectors[place] for place in part]
            else:
                texts = {delivered.digests[place]: text for place in part if (text := delivered.texts[place]) is not None}
                cached = store.made_from(set(texts))
                fresh = {digest: text for digest, text in texts.items() if digest not in cached}
                cached |= _encode(provider, fresh, transfer.batch_items, advance)
                num_fresh, made = len(fresh), [cached.get(delivered.digests[place]) for place in part]
            encoded += num_fresh
            lock.check()
            store.append([delivered.ids[place] for place in part], [delivered.digests[place] for place in part], made)
            advance(len(part) - num_fresh)
            without += [delivered.ids[place] for place, vector in zip(part, made, strict=True) if vector is None]
    said = {"items": len(new), "encoded": encoded, "without": len(without), "changed": len(changed)}
    _log.info("items_embedded", feature=transfer.feature, encoder=provider.origin.label, **said)
    if changed:
        _log.warning("changed_items_keep_their_vectors", feature=transfer.feature, items=len(changed), first=changed[:_NAMED])
    if without:
        _log.warning("items_without_vector", feature=transfer.feature, items=len(without), first=without[:_NAMED])
    return said, changed[:_NAMED]


def _delivered(transfer: TransferConfig, provider: TextEncoder | ItemVectors, items: pa.Table) -> _Delivered:
    ids: list[str] = items["item_id"].to_pylist()
    if isinstance(provider, ItemVectors):
        vectors = provider.look_up(ids)
        digests = [digest_of(provider.origin, b"" if vector is None else vector.tobytes()) for vector in vectors]
        return _Delivered(ids, digests, (), vectors)
    texts = texts_of(transfer, items)
    return _Delivered(ids, [digest_of(provider.origin, (text or "").encode()) for text in texts], texts, ())


def _encode(
    encoder: TextEncoder, texts: Mapping[bytes, str], batch_items: int, advance: Callable[[int], None]
) -> dict[bytes, Vectors]:
    """Texts of one length together: a batch is as wide as its longest."""
    ordered = sorted(texts.items(), key=lambda pair: (len(pair[1]), pair[1]))
    made: dict[bytes, Vectors] = {}
    for start in range(0, len(ordered), batch_items):
        batch = ordered[start : start + batch_items]
        made |= zip((digest for digest, _ in batch), encoder.encode([text for _, text in batch]), strict=True)
        advance(len(batch))
    return made
