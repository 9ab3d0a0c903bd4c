"""Who asks: the groups of judged rows, by what is known before the row's day."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from experiments.evidence.measure import Judged, Mask
from experiments.evidence.worlds import Origin
from limaml.config import Config
from limaml.metrics import Ints
from limaml.tasks.sampling import MICROSECONDS_PER_DAY

ALL, RETURNING, NEW, FIRST_20, WHOLE = "served_all", "served_returning", "served_new", "first_k20", "whole_catalogue"
MAIN = (ALL, RETURNING, NEW, FIRST_20, WHOLE)
HALF = "first_half"
_LAST = 2**31
VISITS = {"1": (1, 1), "2-4": (2, 4), "5-9": (5, 9), "10+": (10, _LAST)}
"""Days with rows before."""
DAYS_AWAY = {"1": (1, 1), "2-7": (2, 7), "8-30": (8, 30), "more": (31, _LAST)}
DAYS_KNOWN = {"1-7": (1, 7), "8-30": (8, 30), "31-90": (31, 90), "more": (91, _LAST)}
"""Since the first row."""
TASTE = ("narrow", "middle", "broad")
"""Thirds of the returning users, by the entropy of the categories of what they took before T2."""


def served(origin: Origin, place_R: Ints, users: pa.Array) -> Judged:
    """Rows as served from T2 on; `users` are the world's."""
    logged = origin.logged
    before_N, away_N, known_N = visits(logged, users)
    user_N, day_N = _users_and_days(logged, users)
    before_R, away_R, known_R = before_N[place_R], away_N[place_R], known_N[place_R]
    trained = pc.is_in(logged["user_id"], value_set=pa.array(origin.split.train_users, pa.string())).to_numpy()[place_R]
    returning = trained & (before_R > 0)
    groups = {ALL: np.ones(len(place_R), np.bool_), RETURNING: returning, NEW: ~trained}
    for title, parts, value_R in (
        ("visits before", VISITS, before_R),
        ("days away", DAYS_AWAY, away_R),
        ("days known", DAYS_KNOWN, known_R),
    ):
        groups |= {f"{title}: {name}": returning & _between(value_R, ends) for name, ends in parts.items()}
    groups |= _by_taste(origin, user_N, place_R, returning)
    labels = logged["label"].to_numpy()[place_R].astype(np.float64)
    return Judged(labels, user_N[place_R], day_N[place_R] - day_N.min(), groups, _first_category(origin, place_R))


def alone(name: str, origin: Origin, place_R: Ints, users: pa.Array) -> Judged:
    """Rows that are one group: of whole lists the candidates of sampled visits, else logged ones."""
    rows = origin.logged
    if name == WHOLE:
        assert origin.lists is not None
        rows = origin.lists.candidates
    rows, (_, day_N) = rows.take(pa.array(place_R)), _users_and_days(origin.logged, users)
    user_R, day_R = _users_and_days(rows, users)
    labels = rows["label"].to_numpy().astype(np.float64)
    groups = {name: np.ones(len(place_R), np.bool_)}
    return Judged(labels, user_R, day_R - day_N.min(), groups, np.zeros(len(place_R), np.int64))


def visits(logged: pa.Table, users: pa.Array) -> tuple[Ints, Ints, Ints]:
    """Of each row the number of its user's earlier days with rows, and the days since the last and the first; 0 without."""
    user_N, day_N = _users_and_days(logged, users)
    order = np.lexsort((day_N, user_N))
    is_user = np.r_[True, np.diff(user_N[order]) != 0]
    is_visit = is_user | np.r_[True, np.diff(day_N[order]) != 0]
    visit = np.cumsum(is_visit) - 1
    before_N, away_N, known_N = (np.empty(len(order), np.int64) for _ in range(3))
    before_N[order] = visit - np.maximum.accumulate(np.where(is_user, visit, 0))
    away_N[order] = np.r_[0, np.diff(day_N[order][is_visit])][visit]
    away_N[before_N == 0] = 0
    starts = np.maximum.accumulate(np.where(is_user, np.arange(len(order)), 0))
    known_N[order] = day_N[order] - day_N[order][starts]
    return before_N, away_N, known_N


def _by_taste(origin: Origin, user_N: Ints, place_R: Ints, returning_R: Mask) -> dict[str, Mask]:
    """Nothing where the world's items have no category, or fewer than three users took anything."""
    logged, category = origin.logged, _category(origin.cfg)
    if category is None:
        return {}
    before = pc.and_(
        pc.less(logged["timestamp"].cast(pa.int64()), origin.split.validation_end_us), pc.equal(logged["label"], 1)
    ).to_numpy()
    column = logged[category].combine_chunks().filter(pa.array(before))
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        user_E = np.repeat(user_N[before], pc.fill_null(pc.list_value_length(column), 0).to_numpy())
        column = column.flatten()
    else:
        user_E = user_N[before]
    code_E = column.dictionary_encode().indices.fill_null(-1).to_numpy().astype(np.int64)
    pairs, count = np.unique(np.stack([user_E, code_E]), axis=1, return_counts=True)
    num_users = int(user_N.max()) + 1
    total_U = np.bincount(pairs[0], weights=count, minlength=num_users)
    share = count / total_U[pairs[0]]
    entropy_R = np.bincount(pairs[0], weights=-share * np.log2(share), minlength=num_users)[user_N[place_R]]
    judged = returning_R & (total_U[user_N[place_R]] > 0)
    owners = np.unique(user_N[place_R][judged])
    if len(owners) < len(TASTE):
        return {}
    entropy_U = np.zeros(num_users)
    entropy_U[user_N[place_R]] = entropy_R
    low, high = np.quantile(entropy_U[owners], [1 / 3, 2 / 3])
    third_R = (entropy_R > low).astype(np.int64) + (entropy_R > high)
    return {f"taste: {name}": judged & (third_R == number) for number, name in enumerate(TASTE)}


def _first_category(origin: Origin, place_R: Ints) -> Ints:
    """(R,) which category a row's item has, of several the first; 0: none."""
    name = _category(origin.cfg)
    if name is None:
        return np.zeros(len(place_R), np.int64)
    values = origin.logged[name].take(pa.array(place_R)).to_pylist()
    firsts = pa.array([value[0] if isinstance(value, list) and value else value or None for value in values], pa.string())
    found: Ints = 1 + firsts.dictionary_encode().indices.fill_null(-1).to_numpy().astype(np.int64)
    return found


def _category(cfg: Config) -> str | None:
    """The categories that a history feature is counted by, or the first that items declare."""
    types, counted_by = ("categories", "category"), {feature.by for feature in cfg.features}
    names = [feature.name for feature in cfg.features if feature.entity == "item" and feature.type in types]
    return next((name for name in names if name in counted_by), names[0] if names else None)


def _users_and_days(logged: pa.Table, users: pa.Array) -> tuple[Ints, Ints]:
    user_N = pc.index_in(logged["user_id"], value_set=users).to_numpy().astype(np.int64)
    return user_N, logged["timestamp"].cast(pa.int64()).to_numpy() // MICROSECONDS_PER_DAY


def _between(value_R: Ints, ends: tuple[int, int]) -> Mask:
    return (value_R >= ends[0]) & (value_R <= ends[1])
