"""Which features a storage root was ingested with: `features.json`, written once (contract 10)."""

from typing import Any

from limaml import schema
from limaml.config import FeatureConfig
from limaml.errors import DataError
from limaml.io.storage import Storage

_PATH = "features.json"
_STORED = {"entity", "type", "aggregate", "window_days", "of", "by", "positive"}


def require_declared(storage: Storage, tables: schema.Tables) -> None:
    """Write down what is declared at the first ingestion. Raises DataError where what was ingested was declared otherwise."""
    now = {feature.name: _stored(feature) for feature in tables.features if feature.entity != "context"}
    if not storage.exists(_PATH):
        if storage.list("days"):
            raise DataError(
                f"{storage.path(_PATH)} must say which features the days were ingested with, but is not there: they are of an "
                "older release; give this configuration its own storage.root and ingest again"
            )
        storage.write_json(_PATH, now)
        return
    before = storage.read_json(_PATH)
    changed = {
        "added": sorted(now.keys() - before.keys()),
        "removed": sorted(before.keys() - now.keys()),
        "changed": sorted(name for name in now.keys() & before.keys() if now[name] != before[name]),
    }
    found = "; ".join(f"{how}: {', '.join(names)}" for how, names in changed.items() if names)
    if found:
        raise DataError(
            f"features must be declared as {storage.root} was ingested with, got {found}; restore the declaration, or give "
            "this configuration its own storage.root and ingest again"
        )


def _stored(feature: FeatureConfig) -> dict[str, Any]:
    """What decides the values that are stored; allowed ones and bounds only decide what is refused."""
    parts = feature.model_dump(mode="json", include=_STORED) | {"column": feature.source_column}
    parts |= {"max_keys": feature.max_keys} if feature.by else {}
    parts |= {"width": feature.width, "encoder": feature.encoder} if feature.type == "vector" else {}
    return parts | ({"prior": feature.prior, "prior_rows": feature.prior_rows} if feature.aggregate == "rate" else {})
