"""The text of an item: a template over the catalogue's columns."""

from typing import Any

import pyarrow as pa

from limaml.config import TransferConfig, TuningConfig
from limaml.errors import ConfigError


def texts_of(cfg: TransferConfig | TuningConfig, items: pa.Table) -> list[str | None]:
    """The text of every item; None where all columns that the template names are missing or empty.

    Raises ConfigError if the template names a column that the delivered catalogue does not have.
    """
    unknown = [name for name in cfg.columns if name not in items.column_names]
    if unknown:
        raise ConfigError(
            f"{cfg.place} must name columns of the delivered items, got {unknown[0]!r}; there are: "
            f"{', '.join(sorted(set(items.column_names) - {'item_id'}))}"
        )
    columns = [[_text(value) for value in items[name].to_pylist()] for name in cfg.columns]
    rows = zip(*columns, strict=True)
    return [cfg.template.format(**dict(zip(cfg.columns, row, strict=True))).strip() if any(row) else None for row in rows]


def _text(value: Any) -> str:
    if value is None or value != value:  # NaN
        return ""
    if isinstance(value, list | tuple):
        return ", ".join(filter(None, map(_text, value)))
    if isinstance(value, float) and value.is_integer():  # A whole number beside a null comes as a float.
        return str(int(value))
    return str(value).strip()
