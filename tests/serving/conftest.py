"""A small world for the service: a feature store, a registry and a catalogue in a temporary folder, and the real
server (tests/conftest.py).

Eight items: i1 to i6 are in the model's vocabulary, i7 and i8 only in the catalogue (i8 without any features). Users:
`much` has features and an embedding, `old` an embedding from long ago, `other` one of another version, `bare` features but
no embedding; anybody else is unknown.
"""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pytest
import torch

from limaml import registry, schema
from limaml.config import Config
from limaml.features.encoder import Encoder
from limaml.features.feature_store import apply, open_store
from limaml.io.storage import Storage
from limaml.models import bundle
from limaml.models.network import build_network
from limaml.tasks.rows import Rows
from serving.features import OnlineFeatures
from tests import declared

ROOT = Path(__file__).parents[2]
ITEMS = [f"i{number}" for number in range(1, 9)]
IN_VOCABULARY = ITEMS[:6]
WITHOUT_FEATURES = "i8"
MAX_LAG_S = 3 * 86400.0

USER_FEATURES = {
    "much": {"age_band": "25_34", "gender": "F", "occupation": "artist", "user_events": 40, "user_positive_rate": 0.75},
    "old": {"age_band": "18_24", "gender": "M", "occupation": None, "user_events": 3, "user_positive_rate": 0.25},
    "other": {"age_band": None, "gender": None, "occupation": "artist", "user_events": 1, "user_positive_rate": 0.5},
    "bare": {"age_band": "35_44", "gender": "M", "occupation": "lawyer", "user_events": 0, "user_positive_rate": 0.5},
}
ITEM_FEATURES = {
    item: {
        "year": None if at == 2 else 1980 + at,
        "genres": ["Drama", "War"][: 1 + at % 2],
        "item_events": 5 * at,
        "item_positive_rate": at / 10,
    }
    for at, item in enumerate(ITEMS)
    if item != WITHOUT_FEATURES
}


class World:
    """Stores on disk as ingestion, publishing and cut-over would leave them."""

    items = ITEMS
    user_features = USER_FEATURES
    item_features = ITEM_FEATURES

    def __init__(self, folder, redis=None):
        """`redis`: host:port of an online store to use instead of SQLite."""
        self.folder = folder
        self.cfg = Config.model_validate(
            {
                "features": declared.FEATURES,
                "source": {"kind": "synthetic"},
                "storage": {"root": str(folder / "data")},
                "task_kinds": [{"name": "user", "max_lag_s": MAX_LAG_S}],
                "model": {"embedding_dim": 4, "global_hidden": [8]},
                "registry": {
                    "tracking_uri": f"sqlite:///{folder}/mlflow.db",
                    "artifact_root": str(folder / "artifacts"),
                },
                "feast": {
                    "repo_path": str(ROOT / "feature_repo"),
                    "registry": str(folder / "feast" / "registry.db"),
                    "online_store": "redis" if redis else "sqlite",
                    "online_connection": redis or str(folder / "feast" / "online.db"),
                },
                "embeddings": {"lease_url": f"sqlite:///{folder}/lease.db"},
                "serving": {"poll_interval_s": 0.1, "max_candidates": 5, "store_timeout_s": 2.0},
            }
        )
        self.registry = registry.Registry(self.cfg.registry)
        self.networks = {}
        self.encoder = Encoder.fit(logged_rows(), self.cfg)

    def build(self):
        """What `limaml apply` and ingestion leave; the server is started before it, as both take seconds."""
        self.write_catalogue(ITEMS)
        apply(self.cfg)
        self.store = open_store(self.cfg)
        self.publish_features()

    def write_catalogue(self, items):
        rows = [{"item_id": item, "title": item.upper(), "year": None, "genres": []} for item in items]
        Storage(self.cfg.storage.root).write_table("catalogue/items.parquet", pa.Table.from_pylist(rows, declared.ITEMS.arrow))

    def publish_features(self):
        at = datetime.now(UTC).replace(microsecond=0)
        for table, key, values in (
            (declared.USER_FEATURES, "user_id", USER_FEATURES),
            (declared.ITEM_FEATURES, "item_id", ITEM_FEATURES),
        ):
            rows = [{key: entity, "event_timestamp": at, **features} for entity, features in values.items()]
            self._write(table.name, pa.Table.from_pylist(rows, table.arrow))

    def publish(self, slot, version, vectors, *, as_of):
        """Write user -> vector into a slot's online view."""
        rows = [
            {
                "user_id": user,
                "as_of": as_of,
                "embedding": vector,
                "model_version": version,
                "support_size": 3,
                "last_event_at": as_of - timedelta(days=30),
            }
            for user, vector in vectors.items()
        ]
        self._write(schema.embedding_view("user", slot), pa.Table.from_pylist(rows))

    def _write(self, view, table):
        frame = table.to_pandas()
        for column in frame.select_dtypes("datetimetz"):
            frame[column] = pd.to_datetime(frame[column], utc=True)
        self.store.write_to_online_store(view, frame)

    def register(self, *, seed, slot, complete_through):
        """A version with random weights; returns its number."""
        network = build_network(self.cfg, self.encoder.dims, seed=seed)
        # Untrained parameters hardly move the scores: make them, so that a wrong feature or a fallback is seen.
        with torch.no_grad():
            for parameter in network.global_block.parameters():
                parameter.mul_(3.0)
        model = bundle.Model(network, self.encoder)
        folder = self.folder / f"bundle-{seed}"
        bundle.save(bundle.Bundle(config=self.cfg, refit=model, twin=model), folder)
        run_id = self.registry.start_run(f"seed-{seed}")
        tags = {registry.SLOT: slot, registry.STATE: "ready", registry.COMPLETE_THROUGH: complete_through.isoformat()}
        version = self.registry.register(folder, run_id, tags)
        self.registry.end_run(run_id)
        self.networks[version] = network.eval()
        return version

    def serve(self, server, version):
        """Point the champion at a version and wait until the server answers with it."""
        self.registry.set_champion(version)
        server.ranked_when(lambda answer: answer["model_version"] == version)

    def expected(self, version, user, items, vector=None, hour=12):
        """Item -> score, computed here: features looked up in the tables above, the prior where no vector is given."""
        network = self.networks[version]
        unknown = dict.fromkeys(declared.ITEM_FEATURE_NAMES)
        rows = [ITEM_FEATURES.get(item, unknown) for item in items]
        columns = {
            **USER_FEATURES.get(user, {}),
            **{name: [row[name] for row in rows] for name in declared.ITEM_FEATURE_NAMES},
            "item_id": list(items),
            "hour": hour,
        }
        embeddings = {} if vector is None else {"user": torch.tensor(vector)[None]}
        with torch.no_grad():
            logits = network(Rows.from_encoded(self.encoder.encode(columns, len(items))), embeddings)
        return dict(zip(items, torch.sigmoid(logits)[0].tolist(), strict=True))


def logged_rows():
    """Logged events that give the encoder its vocabulary."""
    rows = [
        {
            "event_id": f"e{at}",
            "user_id": "much",
            "item_id": item,
            "timestamp": datetime(2026, 1, 1, at, tzinfo=UTC),
            "label": at % 2,
            **USER_FEATURES["much"],
            "occupation": "lawyer" if at % 2 else "artist",
            "gender": "F" if at % 2 else "M",
            **ITEM_FEATURES[item],
        }
        for at, item in enumerate(IN_VOCABULARY)
    ]
    return pa.Table.from_pylist(rows, declared.LOGGED_EVENTS.arrow)


@pytest.fixture(scope="session")
def make_world():
    return World


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    world = World(tmp_path_factory.mktemp("world"))
    # Creates the registry's tables, which the server would otherwise do at the same time.
    assert world.registry.champion() is None
    return world


@pytest.fixture
def online(stored):
    """Reader of slot blue of the module's `stored` world."""
    features = OnlineFeatures(stored.cfg, "blue")
    features.open()
    return features


@pytest.fixture(scope="module")
def server(world, start_server):
    return start_server(world.cfg, world.folder)
