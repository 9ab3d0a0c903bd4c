"""What the columns of a table seem to be: keys, time, label and features, each guess with its reason."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from limaml.events import table_columns as tc
from limaml.events import table_files as tf
from limaml.events import table_scans as ts
from limaml.events.table_columns import Mapped

_SAMPLE_ROWS = 50_000
_MAX_CATEGORIES = 1_000
_MAX_GRADES = 11
"""Distinct numbers of a rating at most: 0 to 5 in halves."""
_NUMBERS = re.compile(r"(TINYINT|SMALLINT|INTEGER|BIGINT|FLOAT|DOUBLE|DECIMAL\([\d,]+\))\[\d*\]")
"""duckdb's types that could be vectors."""
_PARSED = 0.99
_CONTAINED = 0.9
_EPOCHS = {"seconds": 1, "milliseconds": 10**3, "microseconds": 10**6, "nanoseconds": 10**9}
_PLAUSIBLE = (631_152_000, 4_102_444_800)
"""Seconds of the years 1990 to 2099."""
# Words of a column's name that speak for a role, the strongest first.
_USERS = ("user", "customer", "client", "member", "household", "visitor", "account", "person", "reader", "viewer", "uid")
_ITEMS = (
    "item",
    "product",
    "sku",
    "article",
    "movie",
    "film",
    "book",
    "song",
    "track",
    "video",
    "content",
    "offer",
    "ad",
    "iid",
)
_TIMES = ("timestamp", "datetime", "time", "ts", "date", "at", "when", "created", "day")
_LABELS = (
    "label",
    "clicked",
    "click",
    "bought",
    "purchased",
    "converted",
    "conversion",
    "liked",
    "target",
    "response",
    "taken",
)
_GRADES = ("rating", "stars", "score", "grade")
_TITLES = ("title", "name", "label", "description")


@dataclass(frozen=True)
class Profile:
    """One column of a sample."""

    name: str
    type: str
    rows: int
    nulls: int
    distinct: int
    lowest: Any
    highest: Any
    parsed: float
    """Text: the share that is a time."""
    width: int = 0
    """Lists of numbers, and text that writes them: how many each holds; 0 where they are no such lists, or not of one width."""

    @property
    def mapped(self) -> Mapped:
        return Mapped("", self.name, tf.quoted(self.name), self.type, True, (self.name,))

    @property
    def is_unique(self) -> bool:
        return self.distinct == self.rows and not self.nulls

    @property
    def text(self) -> str:
        """For people: type, distinct values, nulls, range."""
        span = f", {tc.cut(self.lowest)} to {tc.cut(self.highest)}" if self.lowest is not None else ""
        return f"{self.type}, {self.distinct} distinct, {self.nulls} null of {self.rows}{span}"


@dataclass(frozen=True)
class Guess:
    """What one setting should be, and why. `candidates` are given where it is not certain."""

    setting: str
    value: str
    reason: str
    candidates: tuple[str, ...] = ()

    @property
    def is_sure(self) -> bool:
        return not self.candidates


@dataclass(frozen=True)
class Feature:
    """A feature that a column could be; no type where it should be left out."""

    entity: str
    column: str
    type: str
    reason: str
    is_certain: bool = True
    """Otherwise its owner must know whether it is known before the event."""
    width: int = 0
    """vector: how many numbers it holds."""


def profiles(connection: Any, location: str, setting: str, view: str, decimal: str = ".") -> list[Profile]:
    """Sample a table into `view` and describe its columns."""
    files = ts.find(setting, location)
    if isinstance(files, tf.TableFiles):
        source = tf.relation(connection, files, {}, decimal)
        columns = tf.columns_of(connection, source, files)
        sample = f"SELECT * FROM {source} USING SAMPLE reservoir({_SAMPLE_ROWS} ROWS) REPEATABLE (1)"  # noqa: S608
        connection.execute(f"CREATE OR REPLACE TABLE {view} AS {sample}")
    else:
        ts.load(connection, view, files, files.sample(_SAMPLE_ROWS))
        columns = ts.columns_of(connection, view, files)
    rows = connection.execute(f"SELECT count(*) FROM {view}").fetchall()[0][0]  # noqa: S608
    return [_profile(connection, view, name, kind, rows) for name, kind in columns.items()]


def _profile(connection: Any, view: str, name: str, kind: str, rows: int) -> Profile:
    column = tf.quoted(name)
    ordered = not re.search(r"\[|STRUCT|MAP|UNION|BLOB|JSON", kind)
    span = f"min({column}), max({column})" if ordered else "NULL, NULL"
    time = f"count(TRY_CAST({column} AS TIMESTAMP)) / greatest(count({column}), 1)" if kind == "VARCHAR" else "0"
    statement = f"SELECT count(*) - count({column}), count(DISTINCT {column}), {span}, {time} FROM {view}"  # noqa: S608
    nulls, distinct, lowest, highest, parsed = connection.execute(statement).fetchall()[0]
    width = _width(connection, view, column, kind, rows - nulls)
    return Profile(name, kind, rows, nulls, distinct, lowest, highest, float(parsed), width)


def _width(connection: Any, view: str, column: str, kind: str, values: int) -> int:
    """How many numbers each of the column's lists holds; 0 if that differs, or is one, or they are not lists of numbers."""
    if kind != "VARCHAR" and not _NUMBERS.fullmatch(kind):
        return 0
    # Text that is no list of numbers becomes a null, which is not counted.
    lengths = f"len(TRY_CAST({column} AS DOUBLE[]))"
    statement = f"SELECT count({lengths}), min({lengths}), max({lengths}) FROM {view}"  # noqa: S608
    lists, least, most = connection.execute(statement).fetchall()[0]
    return int(least) if lists == values > 0 and least == most > 1 else 0


def decimal_comma_column(connection: Any, view: str, columns: Sequence[Profile]) -> str | None:
    """The first text column that holds numbers with a decimal comma, most of them at least; None if there is none."""
    for profile in (p for p in columns if p.type == "VARCHAR" and p.nulls < p.rows):
        column = tf.quoted(profile.name)
        share = connection.execute(
            f"SELECT avg(CAST(regexp_full_match({column}, '-?\\d+(,\\d+)?') AS INTEGER)) FROM {view}"  # noqa: S608
        ).fetchall()[0][0]
        if share >= _PARSED:
            return profile.name
    return None


def words(name: str) -> list[str]:
    """The words of a name, in lower case: `customerId2` is customer, id."""
    spaced = re.sub(r"([a-z])([A-Z])", r"\1 \2", name)
    return re.findall(r"[a-z]+", spaced.lower())


def _rank(profile: Profile, speaking: Sequence[str]) -> int | None:
    """How strongly a name speaks for a role: 0 is strongest; None: not at all."""
    found = words(profile.name)
    return next((n for n, word in enumerate(speaking) if word in found or f"{word}s" in found), None)


def _best(found: Sequence[Profile], speaking: Sequence[str]) -> list[Profile]:
    """Those whose names speak most strongly; all of them where none does."""
    ranked = [(rank, profile) for profile in found if (rank := _rank(profile, speaking)) is not None]
    least = min((rank for rank, _ in ranked), default=None)
    return [profile for rank, profile in ranked if rank == least] or list(found)


def guess_time(columns: Sequence[Profile]) -> tuple[Guess, Profile | None]:
    found = {profile.name: why for profile in columns if (why := _time_reason(profile))}
    timed = [profile for profile in columns if profile.name in found]
    stamped = [profile for profile in timed if profile.type.startswith("TIMESTAMP")] or timed
    best = _best(stamped, _TIMES)
    if not best:
        return Guess("timestamp", "", "no column holds times", tuple(p.name for p in columns)), None
    reason = f"{found[best[0].name]}; {best[0].text}"
    return Guess("timestamp", best[0].name, reason, tuple(p.name for p in best) if len(best) > 1 else ()), best[0]


def _time_reason(profile: Profile) -> str:
    if profile.type.startswith("TIMESTAMP") or profile.type == "DATE":
        return "its type is a time"
    if profile.parsed >= _PARSED:
        return f"{profile.parsed:.0%} of its texts are times"
    if profile.mapped.is_number and profile.lowest is not None and profile.distinct > _MAX_GRADES:
        for unit, times in _EPOCHS.items():
            if _PLAUSIBLE[0] * times <= profile.lowest and profile.highest <= _PLAUSIBLE[1] * times:
                return f"its numbers are {unit} since 1970, all of the years 1990 to 2099"
    return ""


def guess_zone(connection: Any, view: str, time: Profile) -> str | None:
    """The first time without a zone; None if all have one."""
    mapped = time.mapped
    if not (mapped.is_naive or mapped.is_text):
        return None
    naive = "true" if mapped.is_naive else f"NOT regexp_matches({mapped.sql}, {tc.ZONED})"
    where = f"{mapped.sql} IS NOT NULL AND {naive}"
    rows = connection.execute(f"SELECT CAST({mapped.sql} AS VARCHAR) FROM {view} WHERE {where} LIMIT 1").fetchall()  # noqa: S608
    return str(rows[0][0]) if rows else None


def guess_label(columns: Sequence[Profile]) -> Guess:
    """A boolean or 0/1 column; else a rating, from a threshold that only its owner knows; else every row happened."""
    binary = [p for p in columns if p.type == "BOOLEAN" or _is_zero_one(p)]
    best = _best(binary, _LABELS)
    if best:
        sure = len(best) == 1 and (len(binary) == 1 or _rank(best[0], _LABELS) is not None)
        why = f"its only values are {'true and false' if best[0].type == 'BOOLEAN' else '0 and 1'}; {best[0].text}"
        return Guess("label", best[0].name, why, () if sure else (*(p.name for p in best), "none"))
    grades = [p for p in columns if p.mapped.is_number and 2 < p.distinct <= _MAX_GRADES]
    if grades:
        grade = _best(grades, _GRADES)[0]
        column = grade.name if re.fullmatch(r"[a-z_][a-z0-9_]*", grade.name) else tf.quoted(grade.name)
        # Four of five, as most write it; the owner says.
        threshold = float(grade.lowest) + 0.75 * (float(grade.highest) - float(grade.lowest))
        value = f"{column} >= {threshold:g}"
        return Guess("label", value, f"{grade.name} looks like a rating; {grade.text}", (value, "none"))
    why = "no column is boolean or 0 and 1, so every row may be something that happened"
    return Guess("label", "none", why, ("none",))


def _is_zero_one(profile: Profile) -> bool:
    return bool(profile.mapped.is_number and profile.distinct == 2 and (profile.lowest, profile.highest) == (0, 1))


def guess_id(
    connection: Any, setting: str, columns: Sequence[Profile], catalogue: tuple[str, Profile] | None, taken: Sequence[str]
) -> Guess:
    """The column that names a user or an item: the one whose values a catalogue's key has, else the one whose name says so."""
    speaking = _USERS if setting == "user_id" else _ITEMS
    able = [p for p in columns if p.mapped.is_id and p.name not in taken and p.distinct > 1]
    if catalogue is not None:
        view, key = catalogue
        shares = {p.name: _share_in(connection, p, view, key) for p in able}
        equal = [p for p in able if shares[p.name] >= _CONTAINED and p.distinct > 2]
        named = [p for p in equal if p.name.casefold() == key.name.casefold()] or _best(equal, speaking)
        if len(named) == 1:
            share = shares[named[0].name]
            return Guess(setting, named[0].name, f"{share:.0%} of its values are in {key.name} of {view}; {named[0].text}")
    repeated = [p for p in able if not p.is_unique]
    found = [p for p in repeated if _rank(p, speaking) is not None]
    if found:
        best_named = _best(found, speaking)
        reason = f"its name says {setting.removesuffix('_id')}; {best_named[0].text}"
        return Guess(setting, best_named[0].name, reason, tuple(p.name for p in best_named) if len(best_named) > 1 else ())
    candidates = tuple(p.name for p in repeated) or tuple(p.name for p in able)
    return Guess(setting, candidates[0] if candidates else "", "no name says so", candidates or ("",))


def _share_in(connection: Any, profile: Profile, view: str, key: Profile) -> float:
    ours, theirs = tc.id_sql(profile.mapped), tc.id_sql(key.mapped)
    share = connection.execute(
        f"SELECT avg(CAST({ours} IN (SELECT {theirs} FROM {view}) AS INTEGER)) FROM events_sample WHERE {ours} IS NOT NULL"  # noqa: S608
    ).fetchall()[0][0]
    return float(share or 0)


def guess_key(connection: Any, columns: Sequence[Profile], events: Sequence[Profile], view: str) -> Guess:
    """The key of a catalogue: the unique column that has the ids of the events; of several, the one alike in name."""
    entity = view.removesuffix("s_sample")
    setting = f"{entity}_columns.{entity}_id"
    unique = [p for p in columns if p.is_unique and p.mapped.is_id]
    if not unique:
        return Guess(setting, "", "no column is unique without nulls", tuple(p.name for p in columns))
    able = [p for p in events if p.mapped.is_id and p.distinct > 1]
    shares = {p.name: max((_share_in(connection, e, view, p) for e in able), default=0.0) for p in unique}
    found = [p for p in unique if shares[p.name] >= max(max(shares.values()) - (1 - _CONTAINED), _CONTAINED)]
    if not found:
        why = "no unique column has the ids of the events"
        return Guess(setting, _best(unique, _USERS if entity == "user" else _ITEMS)[0].name, why, tuple(p.name for p in unique))
    names = {p.name.casefold() for p in able}
    alike = [p for p in found if p.name.casefold() in names] or _best(found, _USERS if entity == "user" else _ITEMS)
    reason = f"it is unique and has {shares[alike[0].name]:.0%} of the values of a column of the events; {alike[0].text}"
    return Guess(setting, alike[0].name, reason)


def guess_features(columns: Sequence[Profile], entity: str, key: str) -> list[Feature]:
    """What a catalogue's columns could be as features; a type is empty where a column should be left out."""
    found: list[Feature] = []
    for profile in columns:
        if profile.name != key:
            kind, reason = _feature_type(profile, entity, any(f.type == "text" for f in found))
            width = profile.width if kind == "vector" else 0
            found.append(Feature(entity, profile.name, kind, f"{reason}; {profile.text}", width=width))
    return found


def _feature_type(profile: Profile, entity: str, has_text: bool) -> tuple[str, str]:
    mapped = profile.mapped
    if profile.nulls == profile.rows or profile.distinct <= 1:
        return "", "it always says the same"
    if profile.width:
        if entity != "item":
            return "", f"each value is {profile.width} numbers, and only items have vectors"
        return "vector", f"each value is {profile.width} numbers; say what made them and under which licence"
    if profile.type == "VARCHAR[]":
        return "categories", "it holds lists of text"
    if profile.type == "BOOLEAN":
        return "category", "it is boolean"
    if mapped.is_whole and "id" in words(profile.name) and profile.distinct <= _MAX_CATEGORIES:
        return "category", "its numbers are names"
    if mapped.is_number:
        return "number", "its type is a number"
    if mapped.is_text and profile.parsed < _PARSED:
        titled = entity == "item" and not has_text and _rank(profile, _TITLES) is not None
        if titled and profile.distinct > profile.rows / 2:
            return "text", "it tells items apart for people"
        if profile.distinct <= min(_MAX_CATEGORIES, max(2, profile.rows // 2)):
            return "category", "its texts repeat"
        return "", "nearly every text is another one"
    return "", "its type makes no feature"


def guess_event_features(columns: Sequence[Profile]) -> list[Feature]:
    """What the other columns of events could be: numbers for aggregates; categories of the moment, if it knows them before."""
    found = []
    for profile in columns:
        kind, reason = _feature_type(profile, "event", True)
        if kind == "number" and profile.mapped.is_whole and profile.is_unique:
            found.append(Feature("event", profile.name, "", f"it numbers the rows; {profile.text}"))
        elif kind == "number":
            found.append(Feature("event", profile.name, kind, f"a number of what happened, for means; {profile.text}"))
        elif kind == "category":
            why = f"a category; declare it if a request can say it; {profile.text}"
            found.append(Feature("context", profile.name, kind, why, is_certain=False))
        else:
            found.append(Feature("event", profile.name, "", f"{reason}; {profile.text}"))
    return found
