"""Logged events made by hand and a small untrained model on them, for tests of adaptation."""

from datetime import UTC, date, datetime, timedelta

import numpy as np
import pyarrow as pa
import torch

from limaml.config import Config, MetaConfig, ModelConfig, SourceConfig
from limaml.features.encoder import Encoder
from limaml.models.bundle import Bundle, Model
from limaml.models.network import build_network
from tests import declared

FIRST_DAY = date(2026, 1, 1)
NUM_USERS = 23
SUPPORT_ROWS = 5


def events_of(day: date, seed: int) -> pa.Table:
    """A day of logged events: user u has rows on every day that u divides; several share their second."""
    rng = np.random.default_rng(seed)
    number = (day - FIRST_DAY).days + 1
    rows = []
    for user in [u for u in range(1, NUM_USERS + 1) if u % number == 0 or number == 1]:
        for k in range(int(rng.integers(1, 5))):
            rows.append(
                {
                    "event_id": f"e{number}-{user}-{k}",
                    "user_id": f"u{user}",
                    "item_id": f"i{rng.integers(1, 12)}",
                    "timestamp": datetime(day.year, day.month, day.day, 12, tzinfo=UTC) + timedelta(seconds=user + k // 2),
                    "label": int(rng.integers(0, 2)),
                    "age_band": "25_34",
                    "gender": str(rng.choice(["F", "M"])),
                    "occupation": "writer",
                    "user_events": int(rng.integers(0, 50)),
                    "user_positive_rate": float(rng.random()),
                    "year": 1995,
                    "genres": ["Drama"],
                    "item_events": int(rng.integers(0, 50)),
                    "item_positive_rate": float(rng.random()),
                }
            )
    return pa.Table.from_pylist(rows, schema=declared.LOGGED_EVENTS.arrow).sort_by(
        [("user_id", "ascending"), ("timestamp", "ascending"), ("event_id", "ascending")]
    )


def bundle_of(model: dict[str, object], meta: dict[str, object] | None = None) -> Bundle:
    cfg = Config(
        features=declared.FEATURES,
        source=SourceConfig(kind="synthetic"),
        model=ModelConfig.model_validate({"global_hidden": (16,), **model}),
        meta=MetaConfig.model_validate({"support_rows": SUPPORT_ROWS, **(meta or {})}),
    )
    logged = pa.concat_tables([events_of(FIRST_DAY, 0), events_of(FIRST_DAY + timedelta(days=1), 1)])
    encoder = Encoder.fit(logged, cfg)
    network = build_network(cfg, encoder.dims, seed=3)
    with torch.no_grad():
        # Items as training leaves them: vectors of length 1.
        items = network.global_block.items
        if items is not None:
            items.item.div_(items.item.norm(dim=1, keepdim=True))
        # A prior as training leaves it; at first it is all zeros, which nothing could be told apart from.
        block = network.block("user")
        for start in (getattr(block, name) for name in ("vector", "empty", "bias") if hasattr(block, name)):
            start.copy_(torch.linspace(-0.5, 0.5, len(start)))
    return Bundle(config=cfg, refit=Model(network, encoder))
