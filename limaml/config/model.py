"""Architecture, and what is adapted of it."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from limaml.config.section import Count, Name, Positive, PositiveCount, Section, Share


class TaskKindConfig(Section):
    """One kind of task: whose block is adapted."""

    name: Name = "user"
    """The kind's name, in views, partitions, metric labels and answers."""
    entity_column: Literal["user_id", "item_id"] = "user_id"
    """Column of events whose entities are the tasks."""
    active_days: PositiveCount = 365
    """The first fill takes entities with at least one event in this many days before its as-of."""
    max_lag_s: Positive = 3 * 86400.0
    """Beyond this freshness lag an embedding is stale (contract 3)."""
    when_stale: Literal["prior", "use"] = "prior"
    """prior: a stale embedding is not used. use: it is, and the response and a metric say that it is stale."""


class ModelConfig(Section):
    """Architecture of the two blocks."""

    meta_block: Literal["task_vector", "id_mlp", "row_mlp"] = "task_vector"
    """What is adapted. task_vector: the embedding itself. id_mlp: an MLP of the entity's id. row_mlp: an MLP of the
    support's rows, whose outputs are pooled."""
    embedding_dim: Annotated[int, Field(ge=2, le=1024)] = 17
    """D, width of the meta embedding: D - 1 factors, which are multiplied with the item's vector, and the task's level."""
    meta_hidden: tuple[PositiveCount, ...] = (32,)
    """Hidden widths of `id_mlp` and `row_mlp`."""
    row_age: bool = True
    """`row_mlp`: the row's age is one of its inputs."""
    start: Literal["prior", "items"] = "prior"
    """Where the adaptation of `task_vector` starts. items: at the prior plus a learned multiple of the shrunk mean of the
    support's item vectors, labels unread: what somebody chose says what they like before any label does (SVD++, Koren 2008)."""
    id_dim: PositiveCount = 16
    """Width of the entity-ID embedding of `id_mlp`."""
    global_hidden: tuple[PositiveCount, ...] = (64, 32)
    """Hidden widths of the global block's MLP."""
    interaction: Literal["product", "concat", "both"] = "product"
    """How the embedding meets the row. product: <embedding, [item vector, 1]> beside the MLP's logit. concat: an input of the
    global block's MLP (Wang et al. 2024, section 3), which then has ReLUs instead of SiLUs: with second derivatives of zero,
    inner steps through it cost half. Items are then known by their features only, unless both."""
    item_vectors: Literal["fitted", "learned"] = "fitted"
    """fitted: a factor model gives them before meta-training, and they stay. learned: trained with the rest from random."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1
    """Share of the global block's hidden units that a training step drops."""
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
    """Gradient steps that adapt a block."""
    inner_lr: Positive = 1.5
    """Starting rate of every adapted parameter but the task vector's factors. 1.5 suits the task vector's level; an MLP that is
    adapted wants less: about 1.0 for `id_mlp`, and 0.3 for `row_mlp`, where a task of 652 diverged with 1.5."""
    factor_inner_lr: Positive = 40.0
    """Starting rate of the task vector's factors."""
    learn_inner_lr: bool = True
    """Meta-SGD (Li et al. 2017): one learned rate per parameter."""
    second_order: bool = True
    """Training differentiates through the inner steps; false: their gradient counts as a constant."""
    learn_damping: bool = True
    """Inner loss is divided by (rows + c), with one c per parameter; learned if true, fixed otherwise."""
    damping: Annotated[float, Field(ge=0.0)] = 5.0
    """c of every adapted parameter but the task vector's factors; where learned, its start."""
    factor_damping: Annotated[float, Field(ge=0.0)] = 100.0
    """c of the task vector's factors."""
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
    """What counts as the first rows."""

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
