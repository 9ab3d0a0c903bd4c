"""What the services serve, in a temporary folder: items, users, a model of the shipped shape with random weights, full stores.

Both of ours share registry, catalogue and model version; each online store is filled through Feast's own write path. The plain
service gets the same bundle, the same items and one packed value a user.
"""

import json
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import torch

from benchmarks.drawn import draw
from benchmarks.options import ROOT
from benchmarks.serving.client import post
from limaml import config, registry, schema
from limaml.config import Config
from limaml.features.encoder import Encoder
from limaml.features.feature_store import apply, open_store
from limaml.io.storage import Storage
from limaml.models import bundle
from limaml.models.network import build_network

CONFIG = ROOT / "configs" / "movielens.toml"
SLOT = "blue"
HOUR = 12
CANDIDATES = 100


@dataclass(frozen=True)
class Size:
    items: int = 2_000
    users: int = 1_000
    requests: int = 1_000
    """Distinct requests, sent in turn."""


class World:
    """Made in `folder`; `redis` is host:port of an empty server."""

    def __init__(self, folder: Path, redis: str, size: Size) -> None:
        self.folder, self.redis, self._rng = folder, redis, np.random.default_rng(0)
        self.now = datetime.now(UTC).replace(microsecond=0)
        self.configs = {
            "ours_sqlite": self._config("sqlite", str(folder / "sqlite" / "online.db")),
            "ours_redis": self._config("redis", redis),
        }
        self._cfg = self.configs["ours_sqlite"]
        self._tables = schema.tables(self._cfg.features)
        self.items = self._drawn("item", size.items)
        self.users = self._drawn("user", size.users)
        dim = self._cfg.model.embedding_dim
        self.vectors = dict(zip(self.users, self._rng.normal(0, 0.5, (size.users, dim)).astype(np.float32), strict=True))
        self.bodies = [self._body() for _ in range(size.requests)]
        self.requests = [post("/rank", body) for body in self.bodies]

    def build(self) -> None:
        """Fill registry, catalogue and stores."""
        self.version = self._register()
        names = self._tables.catalogue("item").names
        catalogue = [{"item_id": item, **{name: row.get(name) for name in names[1:]}} for item, row in self.items.items()]
        storage = Storage(self._cfg.storage.root)
        storage.write_table("catalogue/items.parquet", pa.Table.from_pylist(catalogue, self._tables.catalogue("item").arrow))
        for cfg in self.configs.values():
            apply(cfg)
            self._publish(cfg)
        self.items_path.write_text(json.dumps(self.items))
        self._pack_users()

    @property
    def bundle_path(self) -> Path:
        return self.folder / "bundle"

    @property
    def items_path(self) -> Path:
        return self.folder / "items.json"

    def _config(self, store: str, connection: str) -> Config:
        """The shipped configuration, with everything that is written inside `folder`."""
        shipped = config.load(CONFIG).model_dump(mode="json")
        shipped["storage"]["root"] = str(self.folder / "data")
        shipped["registry"] |= {
            "tracking_uri": f"sqlite:///{self.folder}/mlflow.db",
            "artifact_root": str(self.folder / "artifacts"),
        }
        shipped["feast"] |= {
            "repo_path": str(ROOT / "feature_repo"),
            "registry_type": "file",
            "registry": str(self.folder / store / "registry.db"),
            "online_store": store,
            "online_connection": connection,
        }
        shipped["embeddings"]["lease_url"] = f"sqlite:///{self.folder}/{store}-lease.db"
        shipped["serving"] |= {"host": "127.0.0.1", "workers": 1, "token_file": "", "log_share": 0.0}
        return Config.model_validate(shipped)

    def _drawn(self, entity: str, number: int) -> dict[str, dict[str, Any]]:
        """Id -> feature -> value."""
        columns = {feature.name: draw(feature, self._rng, number).to_pylist() for feature in self._tables.of(entity)}
        return {f"{at + 1}": {name: values[at] for name, values in columns.items()} for at in range(number)}

    def _body(self) -> dict[str, Any]:
        items = self._rng.choice(list(self.items), CANDIDATES, replace=False)
        return {
            "user_id": str(self._rng.choice(list(self.users))),
            "item_ids": [str(item) for item in items],
            "context": {"hour": HOUR},
        }

    def _register(self) -> str:
        """The champion: a bundle with random weights, large enough that a wrong feature shows in the scores."""
        encoder = Encoder.fit(self._logged(), self._cfg)
        network = build_network(self._cfg, encoder.dims, seed=0)
        with torch.no_grad():
            for parameter in network.global_block.parameters():
                parameter.mul_(3.0)
        model = bundle.Model(network, encoder)
        bundle.save(bundle.Bundle(config=self._cfg, refit=model, twin=model), self.bundle_path)
        models = registry.Registry(self._cfg.registry)
        run_id = models.start_run("bench-serving")
        tags = {registry.SLOT: SLOT, registry.STATE: "ready", registry.COMPLETE_THROUGH: self.now.isoformat()}
        version = models.register(self.bundle_path, run_id, tags)
        models.end_run(run_id)
        models.set_champion(version)
        return version

    def _logged(self) -> pa.Table:
        """Every item and every user once or more, for the encoder's vocabularies."""
        users = list(self.users)
        rows = [
            {
                "event_id": f"{at}",
                "user_id": users[at % len(users)],
                "item_id": item,
                "timestamp": self.now - timedelta(days=30),
                "label": at % 2,
                **self.users[users[at % len(users)]],
                **features,
            }
            for at, (item, features) in enumerate(self.items.items())
        ]
        return pa.Table.from_pylist(rows, self._tables.logged_events.arrow)

    def _publish(self, cfg: Config) -> None:
        store = open_store(cfg)
        for table, key, values in (
            (self._tables.snapshots("user"), "user_id", self.users),
            (self._tables.snapshots("item"), "item_id", self.items),
        ):
            rows = [{key: entity, "event_timestamp": self.now, **features} for entity, features in values.items()]
            store.write_to_online_store(table.name, _frame(pa.Table.from_pylist(rows, table.arrow)))
        embeddings = [
            {
                "user_id": user,
                "as_of": self.now,
                "embedding": vector.tolist(),
                "model_version": self.version,
                "support_size": 20,
                "last_event_at": self.now - timedelta(days=1),
            }
            for user, vector in self.vectors.items()
        ]
        view = schema.embedding_view(cfg.task_kind.name, SLOT)
        store.write_to_online_store(view, _frame(pa.Table.from_pylist(embeddings)))

    def _pack_users(self) -> None:
        """The plain service's rows, beside Feast's in the same Redis."""
        import msgspec
        import redis

        from benchmarks.serving.plain import KEY, UserRow

        at_s = self.now.timestamp()
        packed = {
            KEY + user: msgspec.msgpack.encode(
                UserRow(
                    features=features,
                    embedding=self.vectors[user].tobytes(),
                    model_version=self.version,
                    as_of_s=at_s,
                    last_event_s=at_s - 86_400.0,
                )
            )
            for user, features in self.users.items()
        }
        host, port = self.redis.split(":")
        with redis.Redis(host=host, port=int(port)) as client:
            client.mset(packed)


def _frame(table: pa.Table) -> pd.DataFrame:
    frame = table.to_pandas()
    for column in frame.select_dtypes("datetimetz"):
        frame[column] = pd.to_datetime(frame[column], utc=True)
    return frame
