"""A feature, declared once (contract 10)."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from limaml.config.governance import Use
from limaml.config.names import FeatureType
from limaml.config.section import Count, Name, Positive, PositiveCount, Section, Share

_CLOCK_PERIODS = {"hour": 24, "weekday": 7}


SAID = ("licence", "permitted_use", "attribution", "purpose", "consent", "retention_days")
"""What is declared of a feature and changes nothing that is computed."""
_LARGEST = 1e15
"""Of a number of events, either way: a billion of them still add up exactly; and infinity is none."""


class FeatureConfig(Section):
    """One feature, declared once: its columns, gates, Feast fields, encoding, API fields, log and drift follow from it."""

    entity: Literal["user", "item", "context", "event"]
    """context: of the moment and the place; it comes with an event, and with a request. event: what is known of an event only
    once it has happened (what was paid, how long was watched); it is kept for aggregates, no network reads it."""
    name: Name
    """Its column, everywhere."""
    type: FeatureType
    """category: one text of several; categories: a set of texts; cycle: a whole number that comes round, 0 to period - 1; text:
    kept in the catalogue for people to read (the first one of items is shown by `make run`), no network reads it; vector:
    numbers of an item, what an encoder made of its text or picture, held once an item and never copied to an event. The vector
    of a known item never changes within one storage.root: what was trained and adapted with it would be another function.
    Or one that is registered (docs/extend.md)."""
    column: str = ""
    """The column it is read from, of the catalogue (user, item) or of the events (context, event); empty: the one of its own
    name."""
    aggregate: Literal["count", "rate", "mean", "days_since"] | None = None
    """user, item, instead of a column, of the events that the entity had before the day. count: how many. rate: the smoothed
    share of positive ones, (positives + prior * prior_rows) / (events + prior_rows). mean: of the number `of`. days_since: days
    from the last one's to that of use."""
    of: str = ""
    """mean: a number of the event or the context."""
    positive: bool = False
    """days_since: of the last positive event, not of the last one."""
    by: str = ""
    """Aggregate of a user (count, rate, days_since): of the user's events with one item, `item_id`, or with items of one
    category, the name of an item's category. A candidate gets the entry of its own; a rate is shrunk to the candidate's own."""
    max_keys: PositiveCount = 256
    """by: so many keys of a user are kept, those with the newest events; what is dropped starts anew when it comes again."""
    window_days: Count = 0
    """count, rate, mean: of the events of so many days before the row's only; 0: of all before it."""
    prior: Share = 0.5
    """rate: what it is without events."""
    prior_rows: Positive = 10.0
    """rate: how many events that weighs."""
    clock: Literal["hour", "weekday"] | None = None
    """context, instead of a column: what an event's timestamp says (UTC; weekday 0 is Monday), and a request's where it does
    not say it itself."""
    per_candidate: bool = False
    """context: a request gives one value a candidate, in the order of its candidates, not one for all."""
    period: PositiveCount | None = None
    """cycle: how many values there are; known for a clock."""
    minimum: float | None = None
    """number: least value; one below is refused."""
    maximum: float | None = None
    """number: largest value; one above is refused."""
    values: tuple[str, ...] = ()
    """category, categories: the allowed ones; empty: those seen in training, and one that is not is unknown."""
    width: Annotated[int, Field(ge=1, le=4096)] | None = None
    """vector: how many numbers it holds."""
    encoder: str = ""
    """vector: what made it, with its version."""
    licence: str = ""
    """vector: under which licence it may be used."""
    project_to: Annotated[int, Field(ge=1, le=4096)] | None = None
    """vector: so many whitened principal components of the training items' vectors are read instead of the vector: an
    encoder's numbers repeat each other, and a few directions drown the others."""
    whitening_shrinkage: Share = 0.1
    """vector, with `project_to`: this share of every component's variance is the mean of all, so that what hardly varies is
    not blown up."""
    norm: Literal["none", "length"] = "none"
    """vector: length: each is scaled, after the projection, to the length at which its numbers' mean square is 1, so that its
    direction counts and not how far it lies from the mean of all. A vector that is the mean stays zero."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """vector: share of its numbers, after the projection, that a training step sets to zero, drawn for each support and
    query row of the first task kind; the others count 1 / (1 - dropout) times."""
    permitted_use: Use = "research"
    """vector: what that permits, at least `governance.intended_use`."""
    attribution: str = ""
    """vector: whom to name."""
    purpose: str = ""
    """What it is for; on the card of every model, and in `limaml audit`."""
    consent: str = ""
    """On what basis it may be used (consent, contract, public record); there as well."""
    retention_days: Count = 0
    """So many days rows keep its values, then `limaml retain` drops them; as long after the last event an aggregate is null.
    0: as long as the rows."""

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        moment = self.entity in ("context", "event")
        if self.aggregate and (moment or self.type != "number" or self.column):
            raise ValueError(self._not("an aggregate must be a number of a user or an item, without a column"))
        if self.window_days and self.aggregate in (None, "days_since"):
            raise ValueError(self._not("window_days must be of a count, a rate or a mean"))
        if self.positive and self.aggregate != "days_since":
            raise ValueError(self._not("positive must be of days_since"))
        if bool(self.of) != (self.aggregate == "mean"):
            raise ValueError(self._not("a mean, and nothing else, must say what it is the mean of"))
        if self.by and (self.entity != "user" or self.aggregate not in ("count", "rate", "days_since")):
            raise ValueError(self._not("by must be of a user's count, rate or days_since"))
        if self.clock and (self.entity != "context" or self.type != "cycle" or self.column or self.per_candidate):
            raise ValueError(self._not("a clock must be a cycle of the context, without a column, one for all candidates"))
        if self.type == "cycle" and (self.entity != "context" or not (self.clock or self.period)):
            raise ValueError(self._not("a cycle must be of the context, and have a clock or a period"))
        if moment and self.type in ("categories", "text"):
            raise ValueError(self._not("what comes with an event must be a number, a category or a cycle"))
        if self.entity == "event" and self.type != "number":
            raise ValueError(self._not("a feature of the event must be a number, for aggregates"))
        if self.per_candidate and self.entity != "context":
            raise ValueError(self._not("per_candidate must be of the context"))
        if (self.minimum is not None or self.maximum is not None) and (self.type != "number" or self.aggregate):
            raise ValueError(self._not("minimum and maximum must be of a number that is no aggregate"))
        if self.values and self.type not in ("category", "categories"):
            raise ValueError(self._not("values must be of a category or categories"))
        described = self.width and self.encoder.strip() and self.licence.strip()
        if self.type == "vector" and (self.entity != "item" or not described):
            raise ValueError(self._not("a vector must be of an item and have width, encoder and licence"))
        if self.type != "vector" and (self.width or self.encoder or self.licence or self.attribution):
            raise ValueError(self._not("width, encoder, licence and attribution must be of a vector"))
        if self.retention_days and (self.type in ("text", "vector") or self.by or self.clock):
            raise ValueError(
                self._not("retention_days must be of values that rows hold: no text, vector, clock or value by a key")
            )
        if self.project_to is not None and (self.width is None or self.project_to > self.width):
            raise ValueError(self._not(f"project_to must be of a vector and at most its width, {self.width}"))
        if self.type != "vector" and (self.norm != "none" or self.dropout):
            raise ValueError(self._not(f"norm and dropout must be of a vector, got {self.norm} and {self.dropout:g}"))
        if self.period and self.clock and self.period != _CLOCK_PERIODS[self.clock]:
            raise ValueError(self._not(f"period of the clock {self.clock} must be {_CLOCK_PERIODS[self.clock]}, or left out"))
        return self

    def _not(self, rule: str) -> str:
        return f"{rule}; got the {self.type} {self.name} of {self.entity}; correct its declaration"

    @property
    def source_column(self) -> str:
        """The catalogue's or the events' column."""
        return self.column or self.name

    @property
    def is_read(self) -> bool:
        """Whether networks read it."""
        return self.type != "text" and self.entity != "event"

    @property
    def is_item_category(self) -> bool:
        """Whether it is one category of an item, which items can be put together by."""
        return self.entity == "item" and self.type == "category"

    @property
    def is_entity(self) -> bool:
        """Whether a kind of task may hang on it: one category of a row, of its item or of its moment."""
        return self.entity in ("item", "context") and self.type == "category"

    @property
    def is_delivered(self) -> bool:
        """Whether a column of events holds it, and a request."""
        return self.entity in ("context", "event") and not self.clock

    @property
    def num_steps(self) -> int:
        """cycle: its period."""
        return self.period or _CLOCK_PERIODS[self.clock or "hour"]

    @property
    def lowest(self) -> float | None:
        """Least value there can be."""
        if self.aggregate == "mean":
            return None
        if self.aggregate or self.type == "cycle":
            return 0.0
        return -_LARGEST if self.minimum is None and self._is_summed else self.minimum

    @property
    def highest(self) -> float | None:
        if self.type == "cycle":
            return float(self.num_steps - 1)
        if self.aggregate == "rate":
            return 1.0
        return _LARGEST if self.maximum is None and self._is_summed else self.maximum

    @property
    def _is_summed(self) -> bool:
        """Whether there may be means of it, which are sums of whole millionths."""
        return self.is_delivered and self.type == "number"


# What any table of events has.
DEFAULT_FEATURES = (
    FeatureConfig(entity="user", name="user_events", type="number", aggregate="count"),
    FeatureConfig(entity="user", name="user_positive_rate", type="number", aggregate="rate"),
    FeatureConfig(entity="item", name="item_events", type="number", aggregate="count"),
    FeatureConfig(entity="item", name="item_positive_rate", type="number", aggregate="rate"),
    FeatureConfig(entity="context", name="hour", type="cycle", clock="hour"),
)
