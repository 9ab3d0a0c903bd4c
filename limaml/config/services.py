"""The service, monitoring, and everything on one machine."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from limaml.config.section import Positive, PositiveCount, Section, Share


class ServingConfig(Section):
    """The BentoML service."""

    host: str = "127.0.0.1"
    """Address that the service listens on."""
    port: Annotated[int, Field(ge=1, le=65535)] = 3000
    """Its port."""
    workers: PositiveCount = 1
    """Processes; each holds its own copy of the model."""
    poll_interval_s: Positive = 5.0
    """How often the registry's champion and its tags are read."""
    max_candidates: PositiveCount = 1000
    """A request may name at most so many items."""
    timeout_s: Positive = 5.0
    """A request that takes longer is answered with 504."""
    max_in_flight: PositiveCount = 64
    """Requests a worker works on or lets wait; one more is answered with 503 and Retry-After at once."""
    store_timeout_s: Positive = 0.02
    """Waiting for the online store ends after this; the request goes on with the prior."""
    store_threads: PositiveCount = 4
    """Reads that a hanging online store can hold, a process; SQLite's block, and have so many threads."""
    breaker_failures: PositiveCount = 5
    """After this many failed or late look-ups in a row the store is left alone for `breaker_open_s`; then one look-up tries."""
    breaker_open_s: Positive = 1.0
    """How long the store is then left alone."""
    items_refresh_s: Positive = 60.0
    """Item features are held in memory and read anew this often, in the background."""
    token_file: str = ""
    """File with the bearer token that `/rank` asks for; empty: none is asked for."""
    allow_remote_without_token: bool = False
    """Without a token the service listens on loopback only, unless this says that something else keeps strangers out."""
    log_share: Share = 0.0
    """Share of users, by hash of the id, whose requests are logged with the features fetched, for `limaml consistency`."""
    log_path: str = ".run/requests"
    """Folder or URL of the logged requests, in day partitions."""

    @model_validator(mode="after")
    def _store_answers_first(self) -> Self:
        if self.store_timeout_s >= self.timeout_s:
            raise ValueError(
                f"store_timeout_s must be < timeout_s ({self.timeout_s:g}), got {self.store_timeout_s:g}; "
                "otherwise a hanging store fails requests that the prior could answer"
            )
        return self


class MonitoringConfig(Section):
    """How batch verbs, which end before anybody could scrape them, export their metrics."""

    textfile_dir: str = ".run/metrics"
    """Folder of one `<verb>.prom` a verb, for the textfile collector of a node exporter; empty: none is written."""
    pushgateway: str = ""
    """`host:port` of a Prometheus Pushgateway to push the same metrics to; empty: none."""
    max_mismatch_ratio: Share = 0.001
    """`limaml consistency` fails above this share of logged values that differ from the offline join."""
    min_drift_rows: PositiveCount = 200
    """Drift is not measured on days with fewer rows: of 200 rows in ten bins, chance alone gives an index of about 0.05."""


class LocalConfig(Section):
    """Everything on one machine (`make run`)."""

    run_root: str = ".run"
    """State, logs and what packages keep at home."""
    airflow_port: Annotated[int, Field(ge=1, le=65535)] = 8080
    """Port of Airflow's pages and API, on loopback."""
    mlflow_port: Annotated[int, Field(ge=1, le=65535)] = 5000
    """Port of MLflow's pages, on loopback."""
    prometheus_port: Annotated[int, Field(ge=0, le=65535)] = 19090
    """Port of Prometheus and the dashboards' page, on loopback, where Prometheus is installed; 0: they are not started."""
    exporter_port: Annotated[int, Field(ge=1, le=65535)] = 19100
    """Port of the node exporter that shows Prometheus the batch verbs' metrics, on loopback."""
    airflow_database: str = ""
    """SQLAlchemy URL of Airflow's database, `postgresql+psycopg2://…`, a `${NAME}` in it percent-encoded; empty: SQLite in
    `run_root`."""
    mlflow_database: str = ""
    """The same of the MLflow server that is started where `registry.tracking_uri` is its http address; empty: with such an
    address none is started, it is somebody else's."""
    daily_days: PositiveCount = 7
    """The last days of the source: not trained on, taken in one by one by `limaml_daily`."""
    ready_timeout_s: Positive = 120.0
    """A process that is waited for may be silent this long: its log does not grow, and it uses less than a hundredth of a core.
    Requests to Airflow, its heartbeats and the locks of its database have as long."""
    start_timeout_s: Positive = 1800.0
    """A process that is waited for must be ready after this long, whatever it does. Airflow gives up a DAG file it is reading,
    a task that waits in the queue and one without a sign of life after as long."""
