"""Training, its evaluation, and what a candidate must show."""

from datetime import date
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from limaml.config.section import Count, OpenShare, Positive, PositiveCount, Section, Share


class TrainingConfig(Section):
    """Outer loop on Ray Train."""

    seed: Count = 0
    """Seed of the first weights, the tasks drawn and dropout."""
    num_workers: Annotated[int, Field(ge=1, le=1024)] = 2
    """Ray workers; the tasks of a step are shared among them."""
    use_gpu: bool = False
    """A GPU for each worker."""
    max_steps: PositiveCount = 200
    """Outer steps at most."""
    start_from: Literal["scratch", "champion"] = "scratch"
    """champion: a training begins with the weights, item vectors and encoders of the version that serves, and takes
    `champion_steps`. Where there is none, or it was made with other features, task kinds, model or split, it begins from
    scratch, and the log, the result and the bundle's lineage say why."""
    champion_steps: PositiveCount = 50
    """champion: outer steps at most, in place of max_steps."""
    champion_pull: Annotated[float, Field(ge=0.0)] = 0.0
    """champion: the loss has half of this times the squared distance from the champion's weights added; 0: none."""
    tasks_per_step: PositiveCount = 64
    """Over all workers; must be divisible by num_workers."""
    outer_lr: Positive = 3e-3
    """Rate after `warmup_steps`; it falls to a twentieth along a cosine over max_steps."""
    warmup_steps: Count = 20
    """Outer steps over which the rate rises."""
    inner_lr_scale: Positive = 0.1
    """Learned inner rates and damping move at this share of outer_lr: they overgrow otherwise, the items knowing the users."""
    average_decay: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.99
    """Validated, kept and served is a moving average of the weights with this decay; 0 takes the last weights."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 1e-4
    """AdamW's, on matrices only; not on learned rates and damping."""
    grad_clip: Positive = 5.0
    """Largest norm of an outer step's gradient."""
    validate_every: PositiveCount = 25
    """Outer steps between validations."""
    patience: PositiveCount = 6
    """Validations without a better AUC before training stops."""
    checkpoint_every: PositiveCount = 100
    """Outer steps between checkpoints, from which a run that died goes on."""
    storage_path: str = ".run/ray_results"
    """Folder or URL of runs' checkpoints."""
    max_failures: Count = 1
    """How often a failed worker group is started again."""
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


class RayConfig(Section):
    """A Ray cluster that is there. Without one, training starts its own Ray, and adaptation runs in the verb's process.

    Its nodes have this release installed, reach `storage.root` and `training.storage_path`, and have the keys for that in their
    own environment.
    """

    address: str = ""
    """`host:6379` for a process on a node of the cluster, `ray://host:10001` for one elsewhere; empty: that of RAY_ADDRESS, and
    without it none."""
    token_file: str = ""
    """File with the cluster's token; empty: RAY_AUTH_TOKEN or Ray's own file is used, where the cluster asks for one."""
    min_workers: Count = 0
    """Training starts with as few workers as this where the cluster has no room for `training.num_workers`, and goes on from
    its checkpoint with more or fewer as nodes come and go; 0: with all of them or not at all."""
    resize_interval_s: Positive = 60.0
    """How often it looks whether there is room for more."""
    job_template: str = ""
    """YAML file of a KubeRay RayJob: `train` runs as this job, on a cluster of its own for that time; empty: it does not."""
    job_poll_s: Positive = 5.0
    """How often the job's state is read."""
    adapt_tasks: PositiveCount = 4
    """Parts of a shard that are adapted at once; each takes a CPU of the cluster."""
    part_entities: PositiveCount = 16_384
    """Entities of one part at most; its rows and embeddings are what a task holds, and what is done again when one is lost."""


class EvaluationConfig(Section):
    """Who is held out, where training and validation end, the protocols and their intervals."""

    held_out: Literal["hash", "late"] = "hash"
    """hash: `held_out_users` of all users are held out; the others train before T1, validate from T1 to T2, and are judged from
    T2 on. For a service whose users come back. late: users in the order of their arrival train, validate, and are held out; T1
    and T2 are the arrivals of the first validation and of the first held-out user. For data whose users come once."""
    held_out_users: OpenShare = 0.1
    """hash: share of the users, by hash of the id, who neither train nor validate and are judged as new ones."""
    validate_from: date | None = None
    """hash: the day (UTC) that T1 is the start of. With `test_from`; without both: by the shares of the days."""
    test_from: date | None = None
    """hash: the day (UTC) that T2 is the start of."""
    train_share_of_days: OpenShare = 0.8
    """hash, without dates: T1 cuts the days from the first event's to the last one's at this share."""
    validation_share_of_days: OpenShare = 0.1
    """hash, without dates: share of the days between T1 and T2."""
    train_share_of_users: OpenShare = 0.7
    """late: share of the users who train."""
    validation_share_of_users: OpenShare = 0.1
    """late: share of the users who validate; those who come after them are held out."""
    first_k: tuple[Count, ...] = (0, 1, 2, 5, 10, 20)
    """Numbers of support rows at which held-out users are judged."""
    min_query_rows: PositiveCount = 5
    """Held-out users with fewer query rows after the largest k are left out of first-k."""
    bootstrap_draws: PositiveCount = 1000
    """Draws of users behind each interval."""
    seed: Count = 0
    """Seed of those draws."""
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
    per_user_margin: Share = 0.0
    """0: per-user AUC must be above the global MLP's, with an interval that excludes zero. Otherwise the interval may reach
    this far below it: a model is then served that is shown not to be worse by more, not to gain."""
    as_served_margin: Share = 0.01
    """As-served AUC of all users may be at most this much below the global MLP's."""
    champion_margin: Share = 0.01
    """Pooled as-served AUC may be at most this much below the champion's, on rows later than all its twin has seen."""
    min_champion_rows: PositiveCount = 2000
    """Fewer later rows than this: the comparison with the champion is skipped, with the reason."""
    max_refit_psi: Positive = 0.25
    """Largest population stability index between the twin's and the refit's scores; 0.25 is the usual alarm level."""
