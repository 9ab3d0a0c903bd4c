"""What a request has for each of its candidates beside the item: its context, and what the user did with the item before."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from limaml import schema
from limaml.features.columns import Floats
from serving.api import RankRequest
from serving.features import Fetched
from serving.loaded import Loaded


def columns(tables: schema.Tables, loaded: Loaded, request: RankRequest, fetched: Fetched) -> dict[str, Sequence[Any]]:
    """Columns of `schema.Tables.of_candidates` and of the items, one value a candidate; nothing where nothing is declared."""
    if not loaded.encoder.has_candidates:
        return {}
    found: dict[str, Sequence[Any]] = {"item_id": request.item_ids, **loaded.items.values(request.item_ids)}
    for column in tables.context(per_candidate=True).columns:
        found[column.name] = getattr(request.context, column.name)
    for affinity in tables.affinities:
        found |= _entries(affinity, found[affinity.by], fetched.affinities)
    return found


def encode(loaded: Loaded, found: Mapping[str, Sequence[Any]], request: RankRequest, at: datetime) -> Floats | None:
    """(R, F) what the network reads of `columns`; None where nothing is declared."""
    return loaded.encoder.encode_candidates(found, len(request.item_ids), at) if found else None


def _entries(affinity: schema.Affinity, keys: Sequence[Any], stored: Mapping[str, Any]) -> dict[str, Sequence[Any]]:
    """The user's entry for each candidate's key, None where the map has none."""
    place = {key: at for at, key in enumerate(stored.get(affinity.keys_column) or ())}
    at_R = [place.get(key) for key in keys]
    found: dict[str, Sequence[Any]] = {}
    for name in affinity.counts:
        numbers = stored.get(name) or ()
        found[name] = [None if at is None or numbers[at] == schema.NO_NUMBER else numbers[at] for at in at_R]
    return found
