"""Generated events with a known answer: what the best possible ranker scores is computed, not estimated.

    logit P(label = 1) = c + b_i + SCALE * <u_t, v_i> + LEVEL * l_t

u_t is the user's planted factor on day t, v_i the item's, b_i its popularity, l_t the user's planted level. With drift delta
factor and level move from day to day as u_{t+1} = sqrt(1 - delta^2) u_t + delta * noise, so that (u, l) stays a standard
normal vector; `true_items` gives the rest, from which a posterior can be computed. c is 0, or what gives labels another rate
than a half. Profiles are drawn independently of the factors; an item's genre is the sign of its first factor, so content tells
something about new items. Everything is a function of the settings, and a day can be made without making the others.
"""

from datetime import date, timedelta
from functools import cached_property
from math import ceil

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from limaml import schema
from limaml.config import SourceConfig

FIRST_DAY = date(2000, 1, 3)
SCALE = 2.0
"""Weight of the factors' product; popularity has weight 1, so most of what can be known is personal."""

VECTOR_NOISE = 0.5
"""Of an item's vector, in standard deviations of its factors: it tells the direction of a taste, and not all of it."""

_LAST_SECOND = 86_399
_NODES, _FAR = 64, 50.0
"""Of the quadrature, and the largest intercept."""
_AGE_BANDS = ("under_18", "18_24", "25_34", "35_44", "45_49", "50_55", "56_and_over")
_OCCUPATIONS = ("artist", "engineer", "student", "writer")

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


class SyntheticSource:
    """A users x items world seen for a number of days; a share of a user's rows falls on the day of arrival."""

    name = "synthetic"
    left_out: tuple[str, ...] = ()

    def __init__(self, cfg: SourceConfig, shift: timedelta = timedelta(0)) -> None:
        self._cfg = cfg
        self._first = FIRST_DAY + shift

    def moved(self, shift: timedelta) -> "SyntheticSource":
        return SyntheticSource(self._cfg, self._first - FIRST_DAY + shift)

    def catalogue(self, through: date | None = None) -> tuple[pa.Table, pa.Table]:  # noqa: ARG002
        rng = self._rng("profiles")
        num_users, num_items = self._cfg.synthetic_users, self._cfg.synthetic_items
        users = {
            "user_id": [f"u{n}" for n in range(num_users)],
            "age_band": rng.choice(_AGE_BANDS, num_users).tolist(),
            "gender": rng.choice(["F", "M"], num_users).tolist(),
            "occupation": rng.choice(_OCCUPATIONS, num_users).tolist(),
        }
        told = self._item_factors[:, 0] if self._cfg.synthetic_factors else self._drawn_popularity
        items = {
            "item_id": [f"i{n}" for n in range(num_items)],
            "title": [f"Title {n}" for n in range(num_items)],
            "year": rng.integers(1950, 2000, num_items).tolist(),
            "genres": [["sunny"] if factor > 0 else ["gloomy"] for factor in told],
            # Nobody's taste depends on it, and some items have none.
            "studio": [None if n % 9 == 8 else f"studio {n % 5}" for n in range(num_items)],
        }
        if self._cfg.synthetic_vector_scale:
            items["taste_vector"] = self._vectors.tolist()
        return pa.table(users), pa.table(items)

    def days(self) -> list[date]:
        return [self._first + timedelta(days=n) for n in range(self._cfg.synthetic_days)]

    def unread(self, day: date) -> tuple[str, ...]:  # noqa: ARG002
        return ()

    def read_day(self, day: date) -> pa.Table | None:
        number = (day - self._first).days
        if not 0 <= number < self._cfg.synthetic_days:
            return None
        users, items, seconds = self._draws(number)
        probability = self._probability(number, users, items)
        label = self._rng("labels", number).random(users.size) < probability
        midnight = int(schema.day_start(day).timestamp())
        columns = [
            pa.array([f"synthetic-{number}-{n}" for n in range(users.size)]),
            pa.array([f"u{n}" for n in users]),
            pa.array([f"i{n}" for n in items]),
            pa.array((midnight + seconds) * 1_000_000, schema.TIMESTAMP),
            pa.array(label.astype(np.int8)),
        ]
        return pa.Table.from_arrays(columns, schema=schema.EVENTS.arrow)

    def true_probability(self, events: pa.Table) -> Floats:
        """P(label = 1) of each event, in row order: no model can score these rows better than this does."""
        day = events["timestamp"].cast(pa.int64()).to_numpy() // 86_400_000_000 - (self._first - date(1970, 1, 1)).days
        users = np.array([int(text[1:]) for text in events["user_id"].to_pylist()])
        items = np.array([int(text[1:]) for text in events["item_id"].to_pylist()])
        probability = np.empty(events.num_rows)
        for number in np.unique(day):
            rows = day == number
            probability[rows] = self._probability(int(number), users[rows], items[rows])
        return probability

    def true_items(self) -> tuple[Floats, Floats]:
        """(I,) b_i + c and (I, L) loadings, item i0 first: the logit is popularity + <z, loading>, z standard normal."""
        return self._popularity, self._loadings

    @cached_property
    def _loadings(self) -> Floats:
        """(I, L), L = synthetic_factors and, where a level is planted, one more."""
        level = np.full((self._cfg.synthetic_items, self._num_levels), self._cfg.synthetic_level)
        return np.concatenate([SCALE * self._item_factors, level], axis=1)

    @property
    def _num_levels(self) -> int:
        return int(self._cfg.synthetic_level > 0.0)

    @cached_property
    def _item_factors(self) -> Floats:
        shape = self._cfg.synthetic_items, self._cfg.synthetic_factors
        factors: Floats = self._rng("items").standard_normal(shape) / np.sqrt(max(1, self._cfg.synthetic_factors))
        return factors

    @property
    def _vectors(self) -> Floats:
        """(I, K) what a text or a picture might tell of an item: its factors and noise of a stream of its own, scaled."""
        noise = self._rng("vectors").standard_normal(self._item_factors.shape) / np.sqrt(self._cfg.synthetic_factors)
        vectors: Floats = self._cfg.synthetic_vector_scale * (self._item_factors + VECTOR_NOISE * noise)
        return vectors

    @cached_property
    def _popularity(self) -> Floats:
        """(I,) b_i + c."""
        return self._drawn_popularity + self._intercept

    @property
    def _drawn_popularity(self) -> Floats:
        return self._rng("popularity").standard_normal(self._cfg.synthetic_items)

    @property
    def _intercept(self) -> float:
        """c, at which P(label = 1) is `synthetic_label_rate` in the mean over users and items; 0 for a half.

        An item's logit is normal over users with the length of its loadings as its deviation: Gauss-Hermite quadrature, then
        bisection, the rate rising with c.
        """
        rate = self._cfg.synthetic_label_rate
        if rate == 0.5:  # By symmetry, but for the items drawn.
            return 0.0
        node, weight = np.polynomial.hermite_e.hermegauss(_NODES)
        logit = self._drawn_popularity[:, None] + np.linalg.norm(self._loadings, axis=1)[:, None] * node
        low, high = -_FAR, _FAR
        while high - low > 1e-9:
            middle = (low + high) / 2
            found = (weight / (1.0 + np.exp(-(logit + middle)))).sum() / weight.sum() / len(logit)
            low, high = (middle, high) if found < rate else (low, middle)
        return low

    @cached_property
    def _user_factors(self) -> list[Floats]:
        """(U, L) factors and level of all users on each day."""
        drift = min(self._cfg.synthetic_drift, 1.0)
        factors = [self._user_noise("users", "levels")]
        for number in range(1, self._cfg.synthetic_days):
            noise = self._user_noise("drift", "level_drift", number)
            factors.append(np.sqrt(1.0 - drift**2) * factors[-1] + drift * noise)
        return factors

    def _user_noise(self, of_factors: str, of_level: str, number: int = 0) -> Floats:
        """(U, L) standard normal; the level has its own stream, so that planting one changes no factor."""
        users = self._cfg.synthetic_users
        factors = self._rng(of_factors, number).standard_normal((users, self._cfg.synthetic_factors))
        level = self._rng(of_level, number).standard_normal((users, self._num_levels))
        return np.concatenate([factors, level], axis=1)

    def _probability(self, number: int, users: Ints, items: Ints) -> Floats:
        product = (self._user_factors[number][users] * self._loadings[items]).sum(axis=1)
        probability: Floats = 1.0 / (1.0 + np.exp(-(self._popularity[items] + product)))
        return probability

    def _draws(self, number: int) -> tuple[Ints, Ints, Ints]:
        """Users, items and seconds of the day's rows; two rows of a visit share each second, as in recorded data."""
        cfg = self._cfg
        arrival_days = max(1, int(cfg.synthetic_days * cfg.synthetic_arrival_share))
        arrivals = np.arange(cfg.synthetic_users) * arrival_days // cfg.synthetic_users
        first_rows = ceil(cfg.synthetic_rows_per_user * cfg.synthetic_first_share)
        remaining = np.maximum(cfg.synthetic_days - 1 - arrivals, 1)
        returns = (cfg.synthetic_rows_per_user - first_rows) / cfg.synthetic_session_rows / remaining
        rng = self._rng("rows", number)
        visits = (arrivals < number) & (rng.random(cfg.synthetic_users) < returns)
        rows = np.where(arrivals == number, first_rows, np.where(visits, cfg.synthetic_session_rows, 0))
        users = np.repeat(np.arange(cfg.synthetic_users), rows)
        # A long visit starts early enough to end on its day.
        latest = np.maximum(_LAST_SECOND - (rows - 1) // 2 * cfg.synthetic_pace_s, 0)
        start = np.repeat(np.minimum(rng.integers(0, 86_000, cfg.synthetic_users), latest), rows)
        within = np.arange(users.size) - np.repeat(np.cumsum(rows) - rows, rows)
        seconds = np.minimum(start + within // 2 * cfg.synthetic_pace_s, _LAST_SECOND)
        return users, rng.integers(0, cfg.synthetic_items, users.size), seconds

    def _rng(self, purpose: str, number: int = 0) -> np.random.Generator:
        """An own stream of random numbers a purpose and day."""
        return np.random.default_rng([self._cfg.synthetic_seed, *purpose.encode(), number])


def bayes_auc(probability: Floats) -> float:
    """Expected AUC of the true probabilities used as scores, over labels drawn from them: the best that can be reached."""
    return expected_auc(probability, probability)


def expected_auc(probability: Floats, score: Floats) -> float:
    """Expected AUC of any scores (R,) over labels drawn from the true probabilities (R,): free of the labels' noise.

    The chance that a random positive row is ranked above a random negative one, ties counted half:
    sum over pairs of p_i (1 - p_j) [s_i > s_j], divided by sum over pairs of p_i (1 - p_j), for i != j.
    """
    order = np.argsort(score, kind="stable")
    p, s = probability[order], score[order]
    below = np.concatenate([[0.0], np.cumsum(1.0 - p)])  # negatives expected among the first n rows
    low, high = np.searchsorted(s, s, side="left"), np.searchsorted(s, s, side="right")
    ties = below[high] - below[low] - (1.0 - p)
    wins = float(np.sum(p * (below[low] + 0.5 * ties)))
    return wins / float(np.sum(p * (below[-1] - (1.0 - p))))
