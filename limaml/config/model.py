"""Architecture, and what is adapted of it."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from limaml.config.names import MetaBlockName
from limaml.config.section import Count, Name, Positive, PositiveCount, Section, Share


class TaskKindConfig(Section):
    """One kind of task: whose block is adapted."""

    name: Name = "user"
    """The kind's name, in views, partitions, metric labels and answers."""
    entity_column: str = "user_id"
    """What the tasks are: user_id, item_id or, behind the kind of users, a declared category of items (an ad's advertiser) or
    of the context, which events bring and requests name (a shop, a city). Rows that have none are scored with the kind's
    prior."""
    active_days: PositiveCount = 365
    """The first fill takes entities with at least one event in this many days before its as-of."""
    max_lag_s: Positive = 3 * 86400.0
    """Beyond this freshness lag an embedding is stale (contract 3)."""
    when_stale: Literal["prior", "use"] = "prior"
    """prior: a stale embedding is not used. use: it is, and the response and a metric say that it is stale."""
    meta_block: MetaBlockName | None = None
    """What is adapted of this kind; without it `model.meta_block`."""
    support_rows: PositiveCount | None = None
    """N of this kind; without it `meta.support_rows`."""
    prior_std: Positive | None = None
    """How far an entity of this kind may move a row's logit; without it `meta.prior_std`. What features leave unsaid of an item
    is mostly less than what they leave unsaid of a user."""


class ModelConfig(Section):
    """Architecture of the two blocks."""

    meta_block: MetaBlockName = "task_vector"
    """What is adapted. task_vector: the embedding itself. posterior: the same, by Newton's steps whatever `meta.inner_step`
    says. id_mlp: an MLP of the entity's id. row_mlp: an MLP of the support's rows, whose outputs are pooled. sequence: a causal
    transformer over the support. set: an encoder of the support, without inner steps. hybrid: the embedding itself, from where
    such an encoder puts it. Or one that is registered (docs/extend.md)."""
    embedding_dim: Annotated[int, Field(ge=2, le=1024)] = 17
    """D, width of the meta embedding: D - 1 factors, which are multiplied with the item's vector, and the task's level."""
    meta_hidden: tuple[PositiveCount, ...] = (32,)
    """Hidden widths of `id_mlp`, `row_mlp`, `set` and `hybrid`."""
    sequence_width: Annotated[int, Field(ge=2, le=1024)] = 32
    """`sequence`: width of its states; must be divisible by `sequence_heads`."""
    sequence_layers: PositiveCount = 1
    """`sequence`: layers of attention."""
    sequence_heads: PositiveCount = 2
    """`sequence`: heads of each layer."""
    sequence_adapts: Literal["all", "last", "bias"] = "last"
    """`sequence`: what the inner loop adapts: every weight, the last layer, or its bias alone."""
    row_age: bool = True
    """`row_mlp`: the days from a row to the newest one are one of its inputs."""
    start: Literal["prior", "items"] = "prior"
    """Where the adaptation of `task_vector` starts. items: at the prior plus a learned multiple of the shrunk mean of the
    support's item vectors, labels unread: what somebody chose says what they like before any label does (SVD++, Koren 2008)."""
    pool_half_life_days: Positive | None = None
    """With it, `task_vector`, `posterior`, `sequence`, `set` and `hybrid` read a pool of the support: a shrunk mean over
    positive rows of their items' declared vectors, in which a row weighs half as much as one this many days newer. A task
    vector's start is moved by a learned map of it, which is zero before training; the others read it as an input."""
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
    content_factors: PositiveCount | None = None
    """fitted: with it, content alone (an item's static features) gives so many of an item vector's factors, and what an item's
    own rows say of it lies in the others, orthogonal to all that content can say (AlphaFuse, Hu et al. 2025). Without it, both
    share all factors."""
    content_ridge: Positive = 3.0
    """fitted: decay of the weights that map content to an item vector, by ridge: the more, the closer an item that nobody has
    touched stays to zero."""
    mlp_reads_vectors: bool = True
    """Whether item vectors that are declared are inputs of the global block's MLP. If not, they reach a score through the
    interaction alone: the factor model fits the prior of an item's vector to them."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1
    """Share of the global block's hidden units that a training step drops."""
    profile_dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.5
    """Share of training tasks whose user profile is hidden: a demographic vector acts as a user id otherwise."""
    unknown_item_share: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.02
    """Share of training rows whose item is replaced by the unknown row, which trains it."""
    hidden_item_share: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Share of training rows whose item is shown as before anybody touched it (DropoutNet, Volkovs et al. 2017): no id, its
    counts and rates without an event, no entry of the user for it; what the catalogue says of it stays. Above 0 the numbers
    of items and context are held twice."""
    unknown_entity_share: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1
    """`id_mlp`: share of training tasks whose entity is replaced by the unknown row."""

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if self.sequence_width % self.sequence_heads:
            raise ValueError(
                f"sequence_width must be divisible by sequence_heads ({self.sequence_heads}), got {self.sequence_width}; "
                "choose a multiple"
            )
        if self.start == "items" and (self.meta_block not in ("task_vector", "posterior") or self.interaction == "concat"):
            raise ValueError(
                'start = "items" needs meta_block = "task_vector" or "posterior" and an interaction with item vectors (product '
                "or both), got "
                f'meta_block = "{self.meta_block}", interaction = "{self.interaction}"; set start = "prior"'
            )
        most = self.embedding_dim - 2 if self.item_vectors == "fitted" and self.interaction != "concat" else 0
        if self.content_factors is not None and self.content_factors > most:
            raise ValueError(
                "content_factors must leave a factor to the items' own rows, at most embedding_dim - 2 of fitted item vectors "
                f"({most} here), got {self.content_factors} with embedding_dim = {self.embedding_dim}, "
                f'item_vectors = "{self.item_vectors}", interaction = "{self.interaction}"; lower it, or leave it out'
            )
        if self.interaction == "concat" and not self.mlp_reads_vectors:
            raise ValueError(
                "mlp_reads_vectors = false needs an interaction with item vectors (product or both), got "
                'interaction = "concat", where nothing else reads them; set mlp_reads_vectors = true'
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
    inner_step: Literal["gradient", "newton"] = "newton"
    """gradient: rate / (rows + c) times the gradient of the rows' summed loss. newton: towards the most likely parameters,
    given the rows and a Gaussian prior at theta; it asks for no rate that fits the table."""
    prior_std: Positive = 0.7
    """newton: how far a parameter tensor moves the logit of a row, as a standard deviation over entities; its start where it is
    learned (`learn_damping`)."""
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
    """With fewer rows a task is not adapted. How much few rows count beyond that is chosen in training."""
    query_rows: PositiveCount = 32
    """At most this many query rows of a training task, drawn at random from those after its as-of instant."""
    pairwise_share: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    """Share of the outer loss that is over pairs of a task's query rows, one positive and one negative: softplus of how much
    higher the negative one scores (RankNet, Burges et al. 2005). The rest is the rows' cross-entropy. 1: pairs alone; the level
    of all scores is then fitted on the rows that validate."""
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
    instants_per_step: PositiveCount = 64
    """With several kinds: as-of instants of a step. The first task of each is drawn as with one kind; its other tasks are users
    with events in the horizon after it. As many as tasks validate best: users who come once have no support at the instants of
    others. Fewer let tasks share the items that are adapted."""
    max_other_tasks: PositiveCount = 512
    """With several kinds: entities of a kind behind the first (items, say) that a step adapts at most, drawn from those of its
    query rows; the other rows are scored with the kind's prior. An entity counts once an instant."""

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
