"""The only settings: one TOML file, frozen, unknown keys rejected, every value checked where it is declared.

Read by `load`; single values are overridden with `section.key=value` strings (the command line's `--set`). Relative
paths are taken from the working directory. Secrets are never here: they come by environment variable or file.
Over 400 lines, because it is read from top to bottom as the reference of every setting.
"""

import hashlib
import json
import re
import tomllib
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from limaml.errors import ConfigError

Share = Annotated[float, Field(ge=0.0, le=1.0)]
OpenShare = Annotated[float, Field(gt=0.0, lt=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
Count = Annotated[int, Field(ge=0)]
PositiveCount = Annotated[int, Field(ge=1)]
Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,39}$")]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class StorageConfig(Section):
    """Where partitions, snapshots and quarantine live."""

    root: str = ".run/data"
    """Folder or fsspec/pyarrow URL (`s3://bucket/prefix`)."""


class SourceConfig(Section):
    """Where events come from, and what a normal day of that source looks like."""

    kind: Literal["movielens", "synthetic", "parquet"]
    path: str = ""
    """parquet: folder or URL with `events/dt=*/`, `users.parquet`, `items.parquet`. movielens: the installed wheel if empty."""
    min_rows_ratio: Share = 0.1
    """A day must have at least this share of the median of the days before it (`rows_window_days`)."""
    rows_window_days: PositiveCount = 14
    max_rows_ratio: Positive = 20.0
    max_gap_days: PositiveCount = 366
    """parquet: after more days than this without a folder, what lies beyond counts as misplaced: it is named and left out."""
    min_label_rate: Share = 0.0
    max_label_rate: Share = 1.0
    min_rows_for_label_rate: PositiveCount = 30
    """Label rate is not judged on days with fewer rows: a rate of 5 rows says nothing."""
    synthetic_users: PositiveCount = 200
    synthetic_items: PositiveCount = 100
    synthetic_days: PositiveCount = 30
    synthetic_rows_per_user: PositiveCount = 40
    synthetic_factors: Count = 1
    synthetic_level: Annotated[float, Field(ge=0.0)] = 0.0
    """Planted: dimensions of the taste, and standard deviation of what a user adds to every item's logit alike; 0: none."""
    synthetic_drift: Annotated[float, Field(ge=0.0)] = 0.0
    synthetic_session_rows: PositiveCount = 4
    synthetic_pace_s: PositiveCount = 1
    """Rows of one visit after the day of arrival (a user comes at most once a day), and seconds between its pairs of rows."""
    synthetic_seed: Count = 0


class FeatureConfig(Section):
    """One feature, declared once: its columns, gates, Feast fields, encoding, API fields, log and drift follow from it."""

    entity: Literal["user", "item", "context"]
    name: Name
    type: Literal["number", "category", "categories", "cycle", "text"]
    """category: one text of several; categories: a set of texts; cycle: a whole number that comes round, 0 to period - 1; text:
    kept in the catalogue for people to read (the first one of items is shown by `make run`), no network reads it."""
    column: str = ""
    """user, item: the catalogue's column it is read from; empty: the one of its own name."""
    aggregate: Literal["count", "rate"] | None = None
    """user, item, instead of a column: how many events the entity had before the day, or their smoothed share of positive ones,
    (positives + prior * prior_rows) / (events + prior_rows)."""
    window_days: Count = 0
    """aggregate: of the events of so many days before the row's only; 0: of all before it."""
    prior: Share = 0.5
    prior_rows: Positive = 10.0
    clock: Literal["hour", "weekday"] | None = None
    """context: what an event's timestamp says (UTC; weekday 0 is Monday), and a request's where it does not say it itself."""
    period: PositiveCount | None = None
    """cycle: how many values there are; known for a clock."""
    minimum: float | None = None
    maximum: float | None = None
    """number: bounds of a value; one outside is refused."""
    values: tuple[str, ...] = ()
    """category, categories: the allowed ones; empty: those seen in training, and one that is not is unknown."""

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if self.aggregate and (self.entity == "context" or self.type != "number" or self.column):
            raise ValueError(self._not("an aggregate must be a number of a user or an item, without a column"))
        if self.window_days and not self.aggregate:
            raise ValueError(self._not("window_days must be of an aggregate"))
        if self.entity == "context" and (self.clock is None or self.type != "cycle"):
            raise ValueError(self._not("a context feature must be a cycle with a clock"))
        if self.entity != "context" and (self.clock or self.type == "cycle"):
            raise ValueError(self._not("a clock and a cycle must be of the context"))
        if (self.minimum is not None or self.maximum is not None) and (self.type != "number" or self.aggregate):
            raise ValueError(self._not("minimum and maximum must be of a number that is no aggregate"))
        if self.values and self.type not in ("category", "categories"):
            raise ValueError(self._not("values must be of a category or categories"))
        if self.period and self.clock and self.period != _CLOCK_PERIODS[self.clock]:
            raise ValueError(self._not(f"period of the clock {self.clock} must be {_CLOCK_PERIODS[self.clock]}, or left out"))
        return self

    def _not(self, rule: str) -> str:
        return f"{rule}; got the {self.type} {self.name} of {self.entity}; correct its declaration"

    @property
    def source_column(self) -> str:
        """The catalogue's column."""
        return self.column or self.name

    @property
    def num_steps(self) -> int:
        """cycle: its period."""
        return self.period or _CLOCK_PERIODS[self.clock or "hour"]

    @property
    def lowest(self) -> float | None:
        """Least value there can be."""
        return 0.0 if self.aggregate or self.type == "cycle" else self.minimum

    @property
    def highest(self) -> float | None:
        if self.type == "cycle":
            return float(self.num_steps - 1)
        return 1.0 if self.aggregate == "rate" else self.maximum


_CLOCK_PERIODS = {"hour": 24, "weekday": 7}
_RESERVED = ("event_id", "user_id", "item_id", "timestamp", "event_timestamp", "label", "context", "entity")

# What any table of events has.
DEFAULT_FEATURES = (
    FeatureConfig(entity="user", name="user_events", type="number", aggregate="count"),
    FeatureConfig(entity="user", name="user_positive_rate", type="number", aggregate="rate"),
    FeatureConfig(entity="item", name="item_events", type="number", aggregate="count"),
    FeatureConfig(entity="item", name="item_positive_rate", type="number", aggregate="rate"),
    FeatureConfig(entity="context", name="hour", type="cycle", clock="hour"),
)


class TaskKindConfig(Section):
    """One kind of task: whose block is adapted."""

    name: Name = "user"
    entity_column: Literal["user_id", "item_id"] = "user_id"
    active_days: PositiveCount = 365
    """The first fill takes entities with at least one event in this many days before its as-of."""
    max_lag_s: Positive = 3 * 86400.0
    """Beyond this freshness lag an embedding is stale (contract 3)."""
    when_stale: Literal["prior", "use"] = "prior"
    """prior: a stale embedding is not used. use: it is, and the response and a metric say that it is stale."""


class ModelConfig(Section):
    """Architecture of the two blocks."""

    meta_block: Literal["task_vector", "id_mlp", "row_mlp"] = "task_vector"
    embedding_dim: Annotated[int, Field(ge=2, le=1024)] = 17
    """D, width of the meta embedding: D - 1 factors, which are multiplied with the item's vector, and the task's level."""
    meta_hidden: tuple[PositiveCount, ...] = (32,)
    row_age: bool = True
    """`row_mlp`: the row's age is one of its inputs."""
    start: Literal["prior", "items"] = "prior"
    """Where the adaptation of `task_vector` starts. items: at the prior plus a learned multiple of the shrunk mean of the
    support's item vectors, labels unread: what somebody chose says what they like before any label does (SVD++, Koren 2008)."""
    id_dim: PositiveCount = 16
    """Width of the entity-ID embedding of `id_mlp`."""
    global_hidden: tuple[PositiveCount, ...] = (64, 32)
    interaction: Literal["product", "concat", "both"] = "product"
    """How the embedding meets the row. product: <embedding, [item vector, 1]> beside the MLP's logit. concat: an input of the
    global block's MLP (Wang et al. 2024, section 3), which then has ReLUs instead of SiLUs: with second derivatives of zero,
    inner steps through it cost half. Items are then known by their features only, unless both."""
    item_vectors: Literal["fitted", "learned"] = "fitted"
    """fitted: a factor model gives them before meta-training, and they stay. learned: trained with the rest from random."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1
    profile_dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.5
    """Share of training tasks whose user profile is hidden: a demographic vector acts as a user id otherwise."""
    unknown_item_share: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.02
    """Share of training rows whose item is replaced by the unknown row, which trains it."""
    unknown_entity_share: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1
    """`id_mlp`: share of training tasks whose entity is replaced by the unknown row."""

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if self.start == "items" and (self.meta_block != "task_vector" or self.interaction == "concat"):
            raise ValueError(
                'start = "items" needs meta_block = "task_vector" and an interaction with item vectors (product or both), got '
                f'meta_block = "{self.meta_block}", interaction = "{self.interaction}"; set start = "prior"'
            )
        if self.interaction != "product" and not self.global_hidden:
            raise ValueError(
                f"global_hidden must hold at least one width where interaction is {self.interaction}, got none; "
                "without a hidden layer an embedding beside the features could only shift all scores alike"
            )
        return self


class MetaConfig(Section):
    """Inner loop and task sampling."""

    inner_steps: Annotated[int, Field(ge=0, le=50)] = 3
    inner_lr: Positive = 1.5
    """Starting rate of every adapted parameter but the task vector's factors. 1.5 suits the task vector's level; an MLP that is
    adapted wants less: about 1.0 for `id_mlp`, and 0.3 for `row_mlp`, where a task of 652 diverged with 1.5."""
    factor_inner_lr: Positive = 40.0
    """Starting rate of the task vector's factors."""
    learn_inner_lr: bool = True
    """Meta-SGD (Li et al. 2017): one learned rate per parameter."""
    second_order: bool = True
    learn_damping: bool = True
    """Inner loss is divided by (rows + c), with one c per parameter; learned if true, fixed otherwise."""
    damping: Annotated[float, Field(ge=0.0)] = 5.0
    factor_damping: Annotated[float, Field(ge=0.0)] = 100.0
    support_rows: PositiveCount = 64
    """N: support = the entity's last N events before the as-of instant."""
    min_support_rows: PositiveCount = 1
    """With fewer rows a task is not adapted. On MovieLens one row says less of its user than the noise it brings."""
    query_rows: PositiveCount = 32
    """At most this many query rows of a training task, drawn at random from those after its as-of instant."""
    horizon_days: Count = 0
    """Query rows lie less than this many days after the as-of instant: a task is asked about the days that its embedding will
    serve, 1 with a daily refresh of users who come every day. 0: about all that came later."""
    day_boundary_probability: Share = 0.1
    """Share of training tasks whose as-of instant is a day boundary; the others lie inside the history."""
    zero_support_probability: Share = 0.1
    """Share of training tasks with an empty support; they train the prior."""
    early_probability: Share = 0.6
    """Of the as-of instants inside the history, the share drawn among the first `early_rows` rows: short supports."""
    early_rows: PositiveCount = 40

    @model_validator(mode="after")
    def _shares_and_damping_fit(self) -> Self:
        total = self.day_boundary_probability + self.zero_support_probability
        if total > 1.0:
            raise ValueError(f"day_boundary_probability + zero_support_probability must be <= 1, got {total:g}; lower one")
        if self.learn_damping and min(self.damping, self.factor_damping) == 0.0:
            raise ValueError(
                "damping and factor_damping must be > 0 where their logarithm is learned, got 0; raise it or do not learn it"
            )
        return self


class TrainingConfig(Section):
    """Outer loop on Ray Train."""

    seed: Count = 0
    num_workers: Annotated[int, Field(ge=1, le=1024)] = 2
    use_gpu: bool = False
    max_steps: PositiveCount = 200
    tasks_per_step: PositiveCount = 64
    """Over all workers; must be divisible by num_workers."""
    outer_lr: Positive = 3e-3
    """Rate after `warmup_steps`; it falls to a twentieth along a cosine over max_steps."""
    warmup_steps: Count = 20
    inner_lr_scale: Positive = 0.1
    """Learned inner rates and damping move at this share of outer_lr: they overgrow otherwise, the items knowing the users."""
    average_decay: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.99
    """Validated, kept and served is a moving average of the weights with this decay; 0 takes the last weights."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 1e-4
    grad_clip: Positive = 5.0
    validate_every: PositiveCount = 25
    patience: PositiveCount = 6
    """Validations without a better AUC before training stops."""
    checkpoint_every: PositiveCount = 100
    storage_path: str = ".run/ray_results"
    max_failures: Count = 1
    ray_start_timeout_s: PositiveCount = 600
    """Each process of Ray, and each step by which they find one another, may take this long to start. Ray's own limits are 5 to
    60 s, which a loaded machine passes. A worker that dies before it has come up is noticed only after it."""

    @model_validator(mode="after")
    def _tasks_divide(self) -> Self:
        if self.tasks_per_step % self.num_workers:
            raise ValueError(
                f"tasks_per_step must be divisible by num_workers ({self.num_workers}), got {self.tasks_per_step}; "
                "choose a multiple, so that every worker draws the same number of tasks"
            )
        return self


class EvaluationConfig(Section):
    """Who is held out, where training and validation end, the protocols and their intervals."""

    held_out: Literal["hash", "late"] = "hash"
    """hash: `held_out_users` of all users are held out; the others train before T1, validate from T1 to T2, and are judged from
    T2 on. For a service whose users come back. late: users in the order of their arrival train, validate, and are held out; T1
    and T2 are the arrivals of the first validation and of the first held-out user. For data whose users come once."""
    held_out_users: OpenShare = 0.1
    """hash: share of the users, by hash of the id, who neither train nor validate and are judged as new ones."""
    validate_from: date | None = None
    test_from: date | None = None
    """hash: the days (UTC) that T1 and T2 are the start of. Both or neither; neither: by the shares of the days."""
    train_share_of_days: OpenShare = 0.8
    validation_share_of_days: OpenShare = 0.1
    """hash, without dates: T1 and T2 cut the days from the first event's to the last one's at these shares."""
    train_share_of_users: OpenShare = 0.7
    validation_share_of_users: OpenShare = 0.1
    """late: the shares of users who train and who validate; the others are held out."""
    first_k: tuple[Count, ...] = (0, 1, 2, 5, 10, 20)
    min_query_rows: PositiveCount = 5
    """Held-out users with fewer query rows after the largest k are left out of first-k."""
    bootstrap_draws: PositiveCount = 1000
    seed: Count = 0
    baseline_steps: PositiveCount = 200
    """Outer steps of the rivals that are networks; validates better than 600 (experiments/LOG.md)."""

    @model_validator(mode="after")
    def _shares_leave_a_test_set(self) -> Self:
        for what, left in (("days", "days"), ("users", "users to hold out")):
            train, validation = (f"{part}_share_of_{what}" for part in ("train", "validation"))
            total = getattr(self, train) + getattr(self, validation)
            if total >= 1.0:
                raise ValueError(f"{train} + {validation} must be < 1, got {total:g}; leave {left} for the test")
        return self

    @model_validator(mode="after")
    def _dates_fit(self) -> Self:
        dates = f"validate_from = {self.validate_from}, test_from = {self.test_from}"
        if (self.validate_from is None) != (self.test_from is None):
            raise ValueError(f"validate_from and test_from must both be set or neither, got {dates}; set the other one, too")
        if self.validate_from is None or self.test_from is None:
            return self
        if self.held_out == "late":
            raise ValueError(
                'validate_from and test_from must not be set where held_out = "late", whose instants are arrivals, got '
                f'{dates}; remove them or set held_out = "hash"'
            )
        if self.validate_from >= self.test_from:
            raise ValueError(f"validate_from must be before test_from, got {dates}; leave days between them to validate on")
        return self


class PromotionConfig(Section):
    """What a candidate must show before it serves."""

    protocol: Literal["first_k", "as_served_known", "as_served_held_out"] = "as_served_known"
    """Where per-user AUC must lie above the global MLP's. as_served_known: users whose rows trained, on their rows from T2 on,
    as a daily refresh serves them. as_served_held_out: the same of held-out users. first_k: held-out users after their first
    `gate_k` rows, which is what counts where most users are new."""
    gate_k: Count = 20
    """Support rows of `first_k` at the gate, and in the tables that show one k."""
    as_served_margin: Share = 0.01
    """As-served AUC of all users may be at most this much below the global MLP's."""
    champion_margin: Share = 0.01
    min_champion_rows: PositiveCount = 2000
    """Fewer later rows than this: the comparison with the champion is skipped, with the reason."""
    max_refit_psi: Positive = 0.25
    """Largest population stability index between the twin's and the refit's scores; 0.25 is the usual alarm level."""


class RegistryConfig(Section):
    """MLflow."""

    tracking_uri: str = "sqlite:///.run/mlflow/mlflow.db"
    artifact_root: str = ".run/mlflow/artifacts"
    experiment: str = "limaml"
    model_name: str = "limaml"


class FeastConfig(Section):
    """Feast. A secret is named, never written here: `${NAME}` stands for the environment's variable of that name."""

    project: Name = "limaml"
    repo_path: str = "feature_repo"
    registry: str = ".run/feast/registry.db"
    """File path or URL; `registry_type` says which. A `${NAME}` in a URL is percent-encoded."""
    registry_type: Literal["file", "sql"] = "file"
    online_store: Literal["sqlite", "redis"] = "sqlite"
    online_connection: str = ".run/feast/online.db"
    """sqlite: the file. redis: `host:port[,ssl=true][,username=NAME]`, as Feast reads it."""
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
        if self.online_password and not re.fullmatch(r"\$\{[A-Za-z_][A-Za-z0-9_]*\}", self.online_password):
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
    min_norm: Annotated[float, Field(ge=0.0)] = 1e-6
    max_norm: Positive = 1e3
    min_dwell_s: Annotated[float, Field(ge=0.0)] = 30.0
    """A fill is refused until this long after the last cut-over, so that servers have switched."""
    fill_timeout_s: Positive = 3600.0
    """A fill that has not finished a shard for this long counts as dead; another version may then be filled in its slot."""
    lease_url: str = "sqlite:///.run/lease.db"
    """SQLAlchemy URL of the database that holds the lease; one database per online store."""
    lease_ttl_s: Positive = 60.0
    """A holder renews three times in this span; after it a dead holder's lease may be taken."""
    lease_wait_s: Annotated[float, Field(ge=0.0)] = 30.0


class ServingConfig(Section):
    """The BentoML service."""

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=1, le=65535)] = 3000
    workers: PositiveCount = 1
    """Processes; each holds its own copy of the model."""
    poll_interval_s: Positive = 5.0
    """How often the registry's champion and its tags are read."""
    max_candidates: PositiveCount = 1000
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
    mlflow_port: Annotated[int, Field(ge=1, le=65535)] = 5000
    daily_days: PositiveCount = 7
    """The last days of the source: not trained on, taken in one by one by `limaml_daily`."""
    ready_timeout_s: Positive = 120.0
    """A process that is waited for may be silent this long: its log does not grow, and it uses less than a hundredth of a core.
    Requests to Airflow, its heartbeats and the locks of its database have as long."""
    start_timeout_s: Positive = 1800.0
    """A process that is waited for must be ready after this long, whatever it does. Airflow gives up a DAG file it is reading,
    a task that waits in the queue and one without a sign of life after as long."""


_WAITS = {"training": {"ray_start_timeout_s"}}
"""How long is waited changes nothing that is computed: not part of a fingerprint."""


class Config(Section):
    """Everything."""

    storage: StorageConfig = StorageConfig()
    source: SourceConfig
    features: tuple[FeatureConfig, ...] = DEFAULT_FEATURES
    task_kinds: tuple[TaskKindConfig, ...] = (TaskKindConfig(),)
    model: ModelConfig = ModelConfig()
    meta: MetaConfig = MetaConfig()
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    promotion: PromotionConfig = PromotionConfig()
    registry: RegistryConfig = RegistryConfig()
    feast: FeastConfig = FeastConfig()
    embeddings: EmbeddingsConfig = EmbeddingsConfig()
    serving: ServingConfig = ServingConfig()
    monitoring: MonitoringConfig = MonitoringConfig()
    local: LocalConfig = LocalConfig()

    @model_validator(mode="after")
    def _task_kinds_are_distinct(self) -> Self:
        names = [kind.name for kind in self.task_kinds]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"task_kinds must hold at least one kind, each name once, got {names}")
        return self

    @model_validator(mode="after")
    def _features_are_distinct(self) -> Self:
        names = [feature.name for feature in self.features]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(
                f"features must be declared once each, got {', '.join(twice)} more than once; rename or remove one"
            )
        taken = sorted(set(names) & set(_RESERVED))
        if taken:
            raise ValueError(f"features must not be named as the columns of events are, got {', '.join(taken)}; rename them")
        return self

    @property
    def task_kind(self) -> TaskKindConfig:
        """The first kind; models with several kinds iterate `task_kinds`."""
        return self.task_kinds[0]

    def fingerprint(self, *sections: str) -> str:
        """SHA-256 (hex) of the named sections' resolved values (all if none is named)."""
        resolved = self.model_dump(mode="json", include=set(sections) or None, exclude=_WAITS)
        return hashlib.sha256(json.dumps(resolved, sort_keys=True).encode()).hexdigest()


def require_features(trained: Config, now: Config, version: str) -> None:
    """Raises ConfigError where a model version was trained on other features than are declared now."""
    before, after = ({feature.name: feature for feature in cfg.features} for cfg in (trained, now))
    changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    if changed:
        raise ConfigError(
            f"features must be declared as version {version} was trained with, but {', '.join(changed)} changed; restore the "
            "declaration, or train a new version in a storage.root of its own"
        )


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read and check the configuration at `path` (TOML, or a resolved one as JSON).

    `overrides` are `section.key=value` strings, values in TOML syntax.
    Raises ConfigError naming the key, the rule, the value and the file.
    """
    path = Path(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
        values = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except FileNotFoundError:
        raise ConfigError(f"configuration {path} does not exist; name one with --config, e.g. configs/movielens.toml") from None
    except UnicodeDecodeError as error:
        found = error.object[error.start]
        raise ConfigError(
            f"configuration {path} must be UTF-8, got byte 0x{found:02x} at position {error.start}; save it as UTF-8"
        ) from None
    except OSError as error:
        raise ConfigError(
            f"configuration {path} must be a file that can be read, but: {error.strerror}; name one with --config"
        ) from None
    except (tomllib.TOMLDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"configuration {path} is not {path.suffix.lstrip('.').upper() or 'TOML'}: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"configuration {path} must hold sections, got a JSON {type(values).__name__}; see configs/")
    for override in overrides:
        _apply_override(values, override)
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"configuration {path}: " + "; ".join(_explain(item) for item in error.errors())) from None


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or len(parts) != 2 or not all(parts):
        raise ConfigError(f"override must be section.key=value, got {override!r}; e.g. --set meta.inner_steps=3")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    section = values.setdefault(parts[0], {})
    if not isinstance(section, dict):
        raise ConfigError(
            f"override must name a key of a section, got {override!r}, but {parts[0]} is a {type(section).__name__}; "
            "change it in the configuration file"
        )
    section[parts[1]] = value


def _explain(error: Any) -> str:
    key = ".".join(str(part) for part in error["loc"]) or "(whole)"
    if error["type"] == "extra_forbidden":
        return f"{key} is not a known key (value {error['input']!r}); remove it or correct its spelling"
    if error["type"] == "missing":
        return f"{key} is required; add it"
    message = error["msg"].removeprefix("Value error, ")
    return f"{key}: {message}" + ("" if isinstance(error["input"], dict) else f", got {error['input']!r}")
