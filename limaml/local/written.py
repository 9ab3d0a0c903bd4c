"""The configuration that `limaml init` writes."""

import re
from collections.abc import Sequence
from pathlib import Path

from limaml.config.whole import RESERVED
from limaml.events.table_guess import Feature
from limaml.events.table_scans import absolute

_AGGREGATES = (("events", "count"), ("positive_rate", "rate"))
_UNKNOWN = (
    'encoder = "unknown"  # correct it: what made these numbers, with its version',
    'licence = "unknown"  # correct it: under which licence they may be used',
)
"""What a column cannot tell of its vectors."""


def key_setting(entity: str) -> str:
    return f"{entity}_columns.{entity}_id"


def written(
    tables: dict[str, str],
    decimal: str,
    settled: dict[str, str],
    features: Sequence[Feature],
    out: Path,
) -> str:
    """The configuration, as TOML; `settled` holds what each setting is, `decimal` what CSV files write before the decimals."""
    lines = [
        f"# Written by `limaml init {tables['events']}`. Every value is a guess; what each means stands in limaml/config/.",
        "",
        "[source]",
        'kind = "table"',
        'licence = "unknown"  # correct it: under which licence the data may be used; nothing is trained without',
        'permitted_use = "research"  # what it permits: any, non_commercial, research or education',
        'attribution = ""',
        *(f"{name} = {_text(absolute(path))}" for name, path in tables.items()),
    ]
    if decimal == ",":
        lines.append('decimal = ","')
    if settled.get("timezone"):
        lines.append(f"timezone = {_text(settled['timezone'])}")
    lines += [
        "# Bounds of a normal day: `limaml check` suggests them from the data.",
        "# min_rows_ratio = 0.1",
        "# max_rows_ratio = 20.0",
        "# min_label_rate = 0.0",
        "# max_label_rate = 1.0",
        "",
        "[source.columns]",
    ]
    sampled = settled["label"] == "none"
    lines += [
        f"{name} = {_text(settled[name])}"
        for name in ("user_id", "item_id", "timestamp", "label")
        if not (name == "label" and sampled)
    ]
    if sampled:
        lines += ["", "# Every row happened: so many others are drawn for each.", "[source.negatives]", "per_positive = 4"]
    for entity in ("user", "item"):
        if settled.get(key_setting(entity)):
            lines += ["", f"[source.{entity}_columns]", f"{entity}_id = {_text(settled[key_setting(entity)])}"]
    lines += _features(features)
    return "\n".join([*lines, *_places(out)]) + "\n"


def _features(features: Sequence[Feature]) -> list[str]:
    lines: list[str] = []
    taken = {*RESERVED, "hour", "user_item_events"}
    taken |= {f"{entity}_{name}" for entity in ("user", "item") for name, _ in _AGGREGATES}
    names: dict[tuple[str, str], str] = {}
    for feature in features:
        if not feature.type:
            lines += ["", f"# {feature.entity} {feature.column}: left out: {feature.reason}"]
            continue
        name = _name(feature.entity, feature.column, taken)
        names[feature.entity, feature.column] = name
        column = {} if name == feature.column else {"column": feature.column}
        block = _block(entity=feature.entity, name=name, type=feature.type, **column)
        if feature.type == "vector":
            block += [f"width = {feature.width}", *_UNKNOWN]
        lines += ["", f"# {feature.reason}", *(block if feature.is_certain else [f"# {line}" for line in block])]
    lines += ["", "# What each user and item did before; what each user did with an item, and with items of a category."]
    for entity in ("user", "item"):
        for name, aggregate in _AGGREGATES:
            lines += ["", *_block(entity=entity, name=f"{entity}_{name}", type="number", aggregate=aggregate)]
    lines += ["", *_block(entity="user", name="user_item_events", type="number", aggregate="count", by="item_id")]
    for feature in features:
        if feature.entity == "item" and feature.type == "category":
            by = names["item", feature.column]
            name = _name("user", f"{by[:29]}_rate", taken, always=True)
            lines += ["", *_block(entity="user", name=name, type="number", aggregate="rate", by=by)]
        if feature.entity == "event" and feature.type:
            of = names["event", feature.column]
            name = _name("user", f"mean_{of[:29]}", taken, always=True)
            lines += ["", *_block(entity="user", name=name, type="number", aggregate="mean", of=of)]
    return [*lines, "", *_block(entity="context", name="hour", type="cycle", clock="hour")]


def _block(**values: str) -> list[str]:
    return ["[[features]]", *(f"{name} = {_text(value)}" for name, value in values.items())]


def _name(entity: str, column: str, taken: set[str], *, always: bool = False) -> str:
    """A new name: the column's in lower case and underscores, with the entity's before it where that tells it apart."""
    plain = re.sub(r"_+", "_", re.sub(r"[^a-z0-9]", "_", column.lower())).strip("_")
    plain = plain if re.match(r"[a-z]", plain) and not always else f"{entity}_{plain}".rstrip("_")
    names = [plain[:40], f"{entity}_{plain}"[:40], *(f"{plain[:36]}_{n}" for n in range(2, 1000))]
    name = next(name for name in names if name not in taken)
    taken.add(name)
    return name


def _places(out: Path) -> list[str]:
    """A folder of its own for everything that is kept, so that no other configuration's data is in the way."""
    base = f".run/{re.sub(r'[^A-Za-z0-9_-]', '_', out.stem)}"
    places = {
        "storage": {"root": f"{base}/data"},
        "registry": {"tracking_uri": f"sqlite:///{base}/mlflow/mlflow.db", "artifact_root": f"{base}/mlflow/artifacts"},
        "feast": {"registry": f"{base}/feast/registry.db", "online_connection": f"{base}/feast/online.db"},
        "embeddings": {"lease_url": f"sqlite:///{base}/lease.db"},
        "training": {"storage_path": f"{base}/ray_results"},
        "serving": {"log_path": f"{base}/requests"},
        "monitoring": {"textfile_dir": f"{base}/metrics"},
        "local": {"run_root": base},
    }
    lines = ["", "# Everything that is kept lies in a folder of its own."]
    for section, values in places.items():
        lines += [f"[{section}]", *(f"{name} = {_text(value)}" for name, value in values.items())]
    return lines


def _text(value: str) -> str:
    """A TOML string; a literal one where that reads better."""
    if '"' in value and "'" not in value and value.isprintable():
        return f"'{value}'"
    escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\t", "\\t")
    return f'"{escaped}"'
