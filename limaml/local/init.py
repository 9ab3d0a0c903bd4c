"""`limaml init`: from a table to a commented configuration. Every guess is printed with its reason; what is unsure is asked."""

import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import typer

from limaml import config
from limaml.config.whole import RESERVED
from limaml.errors import ConfigError
from limaml.events import table_files as tf
from limaml.events import table_guess as tg
from limaml.events.table_guess import Feature, Guess, Profile
from limaml.io import atomic

_AGGREGATES = (("events", "count"), ("positive_rate", "rate"))


@dataclass(frozen=True)
class Answers:
    """What the caller said; empty: guess it."""

    user_id: str = ""
    item_id: str = ""
    timestamp: str = ""
    label: str = ""
    timezone: str = ""


def init(events: str, users: str, items: str, out: Path, answers: Answers, ask: bool) -> dict[str, Any]:
    """Guess, ask where `ask` allows it, and write `out`.

    Raises ConfigError if `out` is there already, or if a guess is unsure and nobody can be asked: it names the flags.
    """
    if out.exists():
        raise ConfigError(f"--out must name a new file, got {out}, which is there; name another, or move it away")
    with tempfile.TemporaryDirectory(prefix="limaml-init-") as folder:
        connection = tf.connect(folder)
        tables = {"events": events} | {name: path for name, path in (("users", users), ("items", items)) if path}
        columns, comma = _profiles(connection, tables)
        guesses = _guess(connection, columns, answers)
        connection.close()
    if comma:
        print(f"decimal = ',': {comma} holds numbers with decimal commas")
    for guess in guesses:
        print(f"{guess.setting} = {guess.value!r}: {guess.reason}{'' if guess.is_sure else ' (unsure)'}")
    settled = _settle(guesses, ask)
    features = [
        feature
        for entity in ("user", "item")
        for feature in tg.guess_features(columns.get(f"{entity}s", ()), entity, settled.get(_key(entity), ""))
    ]
    for feature in features:
        print(f"{feature.entity} {feature.column}: {feature.type or 'left out'}: {feature.reason}")
    mapped = {value for value in settled.values() if value}
    unread = [p for p in columns["events"] if p.name not in mapped and not _reads(settled["label"], p)]
    for profile in unread:
        print(f"event {profile.name}: left out: features of events' own columns are not guessed; {profile.text}")
    atomic.write(out, _toml(tables, "," if comma else ".", settled, features, unread, out))
    config.load(out)
    print(f"wrote {out}; look through it, then: limaml check --config {out}")
    return {"config": str(out), "features": sum(bool(feature.type) for feature in features)}


def _profiles(connection: Any, tables: dict[str, str]) -> tuple[dict[str, list[Profile]], str | None]:
    """Every table's columns; and one that holds decimal commas, with which all are then read."""
    columns = _read(connection, tables, ".")
    commas = (tg.decimal_comma_column(connection, f"{name}_sample", found) for name, found in columns.items())
    comma = next((column for column in commas if column), None)
    return (_read(connection, tables, ",") if comma else columns), comma


def _read(connection: Any, tables: dict[str, str], decimal: str) -> dict[str, list[Profile]]:
    return {name: tg.profiles(connection, path, f"source.{name}", f"{name}_sample", decimal) for name, path in tables.items()}


def _key(entity: str) -> str:
    return f"{entity}_columns.{entity}_id"


def _reads(expression: str, profile: Profile) -> bool:
    return re.search(rf"(?<!\w){re.escape(profile.name)}(?!\w)", expression) is not None


def _guess(connection: Any, columns: dict[str, list[Profile]], answers: Answers) -> list[Guess]:
    events, said = columns["events"], asdict(answers)
    guesses: list[Guess] = []
    keys: dict[str, tuple[str, Profile] | None] = {}
    for entity in ("user", "item"):
        keys[entity] = None
        if f"{entity}s" in columns:
            key = tg.guess_key(connection, columns[f"{entity}s"], events, f"{entity}s_sample")
            guesses.append(key)
            found = next((p for p in columns[f"{entity}s"] if p.name == key.value), None)
            keys[entity] = None if found is None else (f"{entity}s_sample", found)
    time, stamp = tg.guess_time(events)
    label = tg.guess_label(events)
    taken = [time.value, *(p.name for p in events if _reads(label.value, p))]
    user = tg.guess_id(connection, "user_id", events, keys["user"], taken)
    item = tg.guess_id(connection, "item_id", events, keys["item"], [*taken, user.value])
    guesses += [_said(guess, said) for guess in (user, item, time, label)]
    if answers.timestamp:
        stamp = next((p for p in events if p.name == answers.timestamp), None)
    naive = tg.guess_zone(connection, "events_sample", stamp) if stamp else None
    if naive is not None:
        reason = f"times of {stamp.name if stamp else ''} carry no zone, the first is {naive!r}"
        guesses.append(_said(Guess("timezone", "UTC", reason, ("UTC", "Europe/Berlin")), said))
    elif answers.timezone:
        guesses.append(Guess("timezone", answers.timezone, "as you said"))
    return guesses


def _said(guess: Guess, said: dict[str, str]) -> Guess:
    return Guess(guess.setting, said[guess.setting], "as you said") if said[guess.setting] else guess


def _settle(guesses: Sequence[Guess], ask: bool) -> dict[str, str]:
    """Every setting with its value; unsure ones are asked for."""
    settled = {guess.setting: guess.value for guess in guesses}
    unsure = [guess for guess in guesses if not guess.is_sure]
    if unsure and not ask:
        missing = "; ".join(
            f"{_flag(guess)} (guess {guess.value!r}, of {', '.join(guess.candidates[:8])}): {guess.reason}" for guess in unsure
        )
        raise ConfigError(f"init must be told what it is unsure of where it cannot ask, missing: {missing}; name these flags")
    for guess in unsure:
        print(f"{guess.setting}: {guess.reason}; among {', '.join(guess.candidates[:8])}")
        settled[guess.setting] = str(typer.prompt(guess.setting, default=guess.value or None))
    return settled


def _flag(guess: Guess) -> str:
    """The flag that answers; a catalogue's key has none: it must be unique."""
    if "." in guess.setting:
        return f"a unique column for {guess.setting}"
    return f"--{guess.setting.replace('_', '-')}"


def _toml(
    tables: dict[str, str],
    decimal: str,
    settled: dict[str, str],
    features: Sequence[Feature],
    unread: Sequence[Profile],
    out: Path,
) -> str:
    lines = [
        f"# Written by `limaml init {tables['events']}`. Every value is a guess; what each means stands in limaml/config/.",
        "",
        "[source]",
        'kind = "table"',
        *(f"{name} = {_text(_absolute(path))}" for name, path in tables.items()),
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
    lines += [f"# not read: {p.name} ({p.text})" for p in unread]
    if sampled:
        lines += ["", "# Every row happened: so many others are drawn for each.", "[source.negatives]", "per_positive = 4"]
    for entity in ("user", "item"):
        if settled.get(_key(entity)):
            lines += ["", f"[source.{entity}_columns]", f"{entity}_id = {_text(settled[_key(entity)])}"]
    lines += _features(features)
    return "\n".join([*lines, *_places(out)]) + "\n"


def _features(features: Sequence[Feature]) -> list[str]:
    lines: list[str] = []
    taken = {*RESERVED, *(f"{entity}_{name}" for entity in ("user", "item") for name, _ in _AGGREGATES), "hour"}
    for entity in ("user", "item"):
        for feature in (f for f in features if f.entity == entity):
            if not feature.type:
                lines += ["", f"# {entity} {feature.column}: left out: {feature.reason}"]
                continue
            name = _name(feature, taken)
            taken.add(name)
            lines += [
                "",
                f"# {feature.reason}",
                "[[features]]",
                f'entity = "{entity}"',
                f'name = "{name}"',
                f'type = "{feature.type}"',
            ]
            lines += [f"column = {_text(feature.column)}"] if name != feature.column else []
        for name, aggregate in _AGGREGATES:
            lines += ["", "[[features]]", f'entity = "{entity}"', f'name = "{entity}_{name}"', 'type = "number"']
            lines += [f'aggregate = "{aggregate}"']
    return [*lines, "", "[[features]]", 'entity = "context"', 'name = "hour"', 'type = "cycle"', 'clock = "hour"']


def _name(feature: Feature, taken: set[str]) -> str:
    """A feature's name: the column's in lower case and underscores, told apart from others."""
    plain = re.sub(r"_+", "_", re.sub(r"[^a-z0-9]", "_", feature.column.lower())).strip("_")
    plain = plain if re.match(r"[a-z]", plain) else f"{feature.entity}_{plain}".rstrip("_")
    names = [plain[:40], f"{feature.entity}_{plain}"[:40], *(f"{plain[:36]}_{n}" for n in range(2, 1000))]
    return next(name for name in names if name not in taken)


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


def _absolute(location: str) -> str:
    return location if "://" in location else os.path.abspath(location)


def _text(value: str) -> str:
    """A TOML string; a literal one where that reads better."""
    if '"' in value and "'" not in value and value.isprintable():
        return f"'{value}'"
    escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\t", "\\t")
    return f'"{escaped}"'
