"""Registry, feature store and what is published into it."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from limaml.config.secret import is_named
from limaml.config.section import Name, Positive, PositiveCount, Section


class RegistryConfig(Section):
    """MLflow."""

    tracking_uri: str = "sqlite:///.run/mlflow/mlflow.db"
    """MLflow's tracking server, or its database; a `${NAME}` in the latter's URL is percent-encoded."""
    artifact_root: str = ".run/mlflow/artifacts"
    """Folder or URL of runs and bundles."""
    experiment: str = "limaml"
    """MLflow experiment of the runs."""
    model_name: str = "limaml"
    """Name of the registered model, whose versions and alias `champion` are these."""


class FeastConfig(Section):
    """Feast. A secret is named, never written here: `${NAME}` stands for the environment's variable of that name or, without
    it, for the text of the file that NAME_FILE names."""

    project: Name = "limaml"
    """Feast's project; part of every online key."""
    repo_path: str = "feature_repo"
    """Folder of the feature definitions."""
    registry: str = ".run/feast/registry.db"
    """File path or URL; `registry_type` says which. A `${NAME}` in a URL is percent-encoded."""
    registry_type: Literal["file", "sql"] = "file"
    """What `registry` names."""
    online_store: Literal["sqlite", "redis"] = "sqlite"
    """Where features and embeddings are read from at serve time."""
    online_connection: str = ".run/feast/online.db"
    """sqlite: the file. redis: `host:port[,ssl=true[,ssl_ca_certs=FILE]][,username=NAME]`, as Feast reads it. Of a cluster some
    nodes, `host:port,host:port,…`; with Sentinel the sentinels, which Feast asks without TLS and password."""
    redis_mode: Literal["single", "cluster", "sentinel"] = "single"
    """redis: one server, a cluster, or the master that sentinels name."""
    sentinel_master: str = "mymaster"
    """redis, sentinel: what the sentinels call the master."""
    online_password: str = ""
    """redis: `${NAME}`, whose value may be any text; empty: none is asked for."""

    @model_validator(mode="after")
    def _password_is_named(self) -> Self:
        # The values stay out of the messages: they may be what should not be there.
        if "password=" in self.online_connection:
            raise ValueError(
                "online_connection must not hold a password, whose commas would cut it; "
                'take it out and set feast.online_password = "${NAME}", with the password in that environment variable'
            )
        if self.online_password and not is_named(self.online_password):
            raise ValueError(
                'online_password must be "${NAME}", which names an environment variable, got another text; '
                "put the password into the environment, not into the configuration"
            )
        return self


class EmbeddingsConfig(Section):
    """Adapting entities and publishing their embeddings."""

    num_shards: Annotated[int, Field(ge=1, le=256)] = 2
    """Mapped Airflow tasks of one fill; stays under Airflow's map limit of 1,024 and far below where it slows."""
    batch_entities: PositiveCount = 2048
    """Entities that one thread encodes and adapts at a time; memory follows it, embeddings do not."""
    write_batch_rows: Annotated[int, Field(ge=1, le=10_000)] = 2000
    """Rows per write to the online store, short: 2,000 rows take SQLite 40 ms. With 500, 2,000 and 4,000 rows a write, a row
    costs 30, 26 and 25 us there, and 22, 19 and 18 us on Redis. At most 10,000: SQLite binds 32,766 values a read."""
    read_back_rows: PositiveCount = 100
    """So many embeddings of a filled shard are read back and compared; a daily publication reads all of its own."""
    min_norm: Annotated[float, Field(ge=0.0)] = 1e-6
    """The gate refuses embeddings shorter than this."""
    max_norm: Positive = 1e3
    """The gate refuses embeddings longer than this."""
    min_dwell_s: Annotated[float, Field(ge=0.0)] = 30.0
    """A fill is refused until this long after the last cut-over, so that servers have switched."""
    fill_timeout_s: Positive = 3600.0
    """A fill that has not finished a shard for this long counts as dead; another version may then be filled in its slot."""
    lease_url: str = "sqlite:///.run/lease.db"
    """SQLAlchemy URL of the database that holds the lease, of SQLite or Postgres; one database per online store. A `${NAME}` in
    it is percent-encoded."""
    lease_ttl_s: Positive = 60.0
    """A holder renews three times in this span; after it a dead holder's lease may be taken."""
    lease_wait_s: Annotated[float, Field(ge=0.0)] = 30.0
    """Waiting for the lease ends after this, with 'busy: <who> since <when>'."""
