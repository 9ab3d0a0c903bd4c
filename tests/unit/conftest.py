"""Logged events with a planted structure, without a feature store: what training and evaluation are tested on."""

from collections import defaultdict
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from limaml.config import Config
from tests import declared

START = datetime(2026, 1, 5, tzinfo=UTC)


def make_logged(
    num_users: int = 40, num_items: int = 30, rows_per_user: int = 30, num_days: int = 40, seed: int = 0
) -> pa.Table:
    """Label ~ Bernoulli(sigmoid(item bias + user level + user factor * item factor)).

    Users arrive one after another over the first three quarters of the days and come back on later days; several rows share
    a second. Aggregates are those of earlier days, as the point-in-time join gives them.
    """
    rng = np.random.default_rng(seed)
    level, taste = rng.normal(0, 0.7, num_users), rng.normal(0, 1.5, num_users)
    bias, kind = rng.normal(0, 0.7, num_items), rng.normal(0, 1.0, num_items)
    rows = []
    for user in range(num_users):
        day = int(user * num_days * 0.75 / num_users)
        for _ in range(rows_per_user):
            if rng.random() < 0.15:
                day = min(day + int(rng.integers(1, 4)), num_days - 1)
            second = int(rng.integers(0, 40)) * 2000
            item = int(rng.integers(num_items))
            positive = rng.random() < 1 / (1 + np.exp(-(bias[item] + level[user] + taste[user] * kind[item])))
            rows.append((START + timedelta(days=day, seconds=second), f"u{user:03d}", f"i{item:02d}", int(positive)))
    return _with_aggregates(rows)


def _with_aggregates(rows: list[tuple[datetime, str, str, int]]) -> pa.Table:
    seen: dict[str, list[int]] = defaultdict(list)
    pending: list[tuple[str, int]] = []
    today, logged = None, []
    for event, (stamp, user, item, label) in enumerate(sorted(rows)):
        if stamp.date() != today:
            for key, value in pending:
                seen[key].append(value)
            today, pending = stamp.date(), []
        values = {"event_id": f"e{event:06d}", "user_id": user, "item_id": item, "timestamp": stamp, "label": label}
        values |= {"age_band": "25_34", "gender": "F", "occupation": "artist", "year": 1990, "genres": ["Drama"]}
        for name, key in (("user", user), ("item", item)):
            values[f"{name}_events"] = len(seen[key])
            values[f"{name}_positive_rate"] = (sum(seen[key]) + 5.0) / (len(seen[key]) + 10.0)
        logged.append(values)
        pending += [(user, label), (item, label)]
    logged.sort(key=lambda row: (row["user_id"], row["timestamp"], row["event_id"]))
    return pa.Table.from_pylist(logged, schema=declared.LOGGED_EVENTS.arrow)


@pytest.fixture(scope="session")
def planted_logged() -> pa.Table:
    """1,200 rows of 40 users over 40 days."""
    return make_logged()


@pytest.fixture(scope="session")
def make_planted() -> Callable[..., pa.Table]:
    """`make_logged`, for a test that needs more or fewer rows."""
    return make_logged


@pytest.fixture
def small_config() -> Callable[..., Config]:
    """A configuration small enough for a test; sections are overridden by keyword."""

    def make(**sections: Any) -> Config:
        values: dict[str, Any] = {
            "features": declared.FEATURES,
            "source": {"kind": "synthetic"},
            "model": {"embedding_dim": 4, "global_hidden": [16]},
            "meta": {"support_rows": 12, "query_rows": 8},
            "training": {
                "num_workers": 1,
                "max_steps": 20,
                "tasks_per_step": 8,
                "validate_every": 5,
                "checkpoint_every": 5,
                "patience": 3,
            },
            "evaluation": {"held_out": "late", "first_k": [0, 2, 5], "bootstrap_draws": 50, "baseline_steps": 20},
            "promotion": {"protocol": "first_k", "gate_k": 5},
        }
        for name, section in sections.items():
            values[name] = values.get(name, {}) | section if isinstance(section, dict) else section
        return Config.model_validate(values)

    return make
