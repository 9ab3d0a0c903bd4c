"""`limaml init`: from a table to a commented configuration. Every guess is printed with its reason; what is unsure is asked."""

import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from limaml import config
from limaml.errors import ConfigError
from limaml.events import table_files as tf
from limaml.events import table_guess as tg
from limaml.events.table_guess import Guess, Profile
from limaml.io import atomic
from limaml.local.written import key_setting, written

Ask = Callable[[str, str], str]


@dataclass(frozen=True)
class Answers:
    """What the caller said; empty: guess it."""

    user_id: str = ""
    item_id: str = ""
    timestamp: str = ""
    label: str = ""
    timezone: str = ""


def init(events: str, users: str, items: str, out: Path, answers: Answers, ask: Ask | None) -> dict[str, Any]:
    """Guess, `ask` (a question, a guess) where that is unsure, and write `out`.

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
        for feature in tg.guess_features(columns.get(f"{entity}s", ()), entity, settled.get(key_setting(entity), ""))
    ]
    mapped = {value.casefold() for value in settled.values()}
    features += tg.guess_event_features([p for p in columns["events"] if p.name.casefold() not in mapped])
    for feature in features:
        kind = f"{feature.type}{'' if feature.is_certain else ' (not declared)'}" if feature.type else "left out"
        print(f"{feature.entity} {feature.column}: {kind}: {feature.reason}")
    atomic.write(out, written(tables, "," if comma else ".", settled, features, out))
    config.load(out)
    print(f"wrote {out}; look through it, then: limaml check --config {out}")
    return {"config": str(out), "features": sum(bool(f.type) and f.is_certain for f in features)}


def _profiles(connection: Any, tables: dict[str, str]) -> tuple[dict[str, list[Profile]], str | None]:
    """Every table's columns; and one that holds decimal commas, with which all are then read."""
    columns = _read(connection, tables, ".")
    commas = (tg.decimal_comma_column(connection, f"{name}_sample", found) for name, found in columns.items())
    comma = next((column for column in commas if column), None)
    return (_read(connection, tables, ",") if comma else columns), comma


def _read(connection: Any, tables: dict[str, str], decimal: str) -> dict[str, list[Profile]]:
    return {name: tg.profiles(connection, path, f"source.{name}", f"{name}_sample", decimal) for name, path in tables.items()}


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


def _settle(guesses: Sequence[Guess], ask: Ask | None) -> dict[str, str]:
    """Every setting with its value; unsure ones are asked for."""
    settled = {guess.setting: guess.value for guess in guesses}
    unsure = [guess for guess in guesses if not guess.is_sure]
    if unsure and ask is None:
        missing = "; ".join(
            f"{_flag(guess)} (guess {guess.value!r}, of {', '.join(guess.candidates[:8])}): {guess.reason}" for guess in unsure
        )
        raise ConfigError(f"init must be told what it is unsure of where it cannot ask, missing: {missing}; name these flags")
    for guess in unsure:
        print(f"{guess.setting}: {guess.reason}; among {', '.join(guess.candidates[:8])}")
        assert ask is not None
        settled[guess.setting] = ask(guess.setting, guess.value)
    return settled


def _flag(guess: Guess) -> str:
    """The flag that answers; a catalogue's key has none: it must be unique."""
    if "." in guess.setting:
        return f"a unique column for {guess.setting}"
    return f"--{guess.setting.replace('_', '-')}"
