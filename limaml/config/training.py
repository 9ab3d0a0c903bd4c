"""Training, its evaluation, and what a candidate must show."""

from datetime import date
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from limaml.config.section import Count, OpenShare, Positive, PositiveCount, Section, Share


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
