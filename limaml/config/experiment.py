"""Users split into arms that are served differently, so that what a difference does can be measured."""

from typing import Any, Literal, Self

from pydantic import field_validator, model_validator

from limaml.config.section import Name, OpenShare, PositiveCount, Section

_SHARE_TOLERANCE = 1e-9
"""Of the sum of shares: thirds of sixteen digits are off by less."""


class ArmConfig(Section):
    """One way of serving a share of the users. Two arms that are alike are an A/A test of the split and of the comparison."""

    name: Name
    """The arm's name, in answers, in the request log and as a metric's label."""
    share: OpenShare
    """Share of the users, by a salted hash of their ids; all shares add up to 1."""
    version: Literal["champion", "previous"] = "champion"
    """champion: the version that serves. previous: the one before it, whose slot is kept published while it is `ready`; where
    there is none the champion answers, and the metric says so. Two versions may differ in all that is trained, also in their
    meta blocks."""
    personalise: bool = True
    """false: everybody is scored with the prior, whatever is stored (`fallback`: withheld)."""
    when_stale: Literal["prior", "use"] | None = None
    """What is done with a stale embedding of any task kind; without it the kind's own `when_stale`."""

    @field_validator("version", mode="before")
    @classmethod
    def _version_has_a_slot(cls, value: Any) -> Any:
        if value not in ("champion", "previous"):
            raise ValueError(
                'version must be "champion" or "previous": only these two have embeddings in a slot, and those of another '
                "version mean nothing to it (contract 4); cut over to that version, and compare it with the one before"
            )
        return value


class ExperimentConfig(Section):
    """Users split into arms, and how `limaml compare-arms` judges them; without arms everybody is served alike."""

    salt: str = ""
    """Part of what is hashed; another salt is another split, so each experiment has its own and keeps it."""
    arms: tuple[ArmConfig, ...] = ()
    """The first is the control, with which the others are compared."""
    level: OpenShare = 0.05
    """Probability, at most, of calling arms different that are not, over all arms and however often one looks."""
    outcome: Literal["any", "share"] = "any"
    """What a request's outcome is. any: 1 if any of its candidates got a positive label afterwards, else 0. share: the share of
    its candidates that did, for lists of which people like many. What was not shown counts as not liked."""
    outcome_days: PositiveCount = 7
    """A user's outcome is the mean over the requests of this many days from the first one on, by what followed in them."""

    @model_validator(mode="after")
    def _arms_divide_the_users(self) -> Self:
        if not self.arms:
            return self
        names = [arm.name for arm in self.arms]
        if len(names) < 2 or len(set(names)) != len(names):
            raise ValueError(f"arms must be two or more, each name once, got {names}; add a control, or remove the arm")
        total = sum(arm.share for arm in self.arms)
        if abs(total - 1.0) > _SHARE_TOLERANCE:
            raise ValueError(f"arms must have shares that add up to 1, got {total:.10g}; correct one of them")
        if not self.salt:
            raise ValueError('salt must be given where there are arms, got ""; the name of the experiment will do')
        return self
