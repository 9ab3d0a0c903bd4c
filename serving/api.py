"""What a client sends and gets: request and response models, and the one shape every refusal has.

The context's fields and ranges are those of the declared context features.
"""

import re
from collections import Counter
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError, create_model

from limaml import schema
from limaml.errors import LimamlError

MAX_BODY_BYTES = 1 << 20
"""A thousand candidates with ids of 256 characters are a quarter of this."""

Id = Annotated[str, Field(min_length=1, max_length=schema.MAX_ID_LENGTH)]
Fallback = Literal["stale", "missing", "version_mismatch", "store_error", "withheld"]


class RequestError(LimamlError):
    """A request that is answered with an error: `status` and the body `{"error": {field, rule, value, remedy}}`."""

    def __init__(
        self, status: int, *, field: str, rule: str, value: Any, remedy: str, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(f"{field} {rule}, got {value!r}; {remedy}")
        self.status = status
        self.headers = headers or {}
        self.body = {"error": {"field": field, "rule": rule, "value": value, "remedy": remedy}}


class _Strict(BaseModel):
    """Nothing is converted: a number sent as a string is a wrong type."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class _Context(_Strict):
    """The moment of the request; what its time says is taken from it where it is not given."""

    at: AwareDatetime | None = Field(default=None, description="When it is, with a zone; the service's clock if not given.")


def _context_model(tables: schema.Tables) -> type[_Strict]:
    fields: dict[str, Any] = {}
    clocks = {feature.name for feature in tables.of("context") if feature.clock}
    for column in tables.context(per_candidate=False).columns:
        fields[column.name] = (_value(column), None if column.name in clocks else ...)
    for column in tables.context(per_candidate=True).columns:
        fields[column.name] = (list[_value(column)], Field(description="One value a candidate, in their order."))  # type: ignore[misc]
    model: type[_Strict] = create_model("RankContext", __base__=_Context, __doc__=_Context.__doc__, **fields)
    return model


def _value(column: schema.Column) -> Any:
    """Type of a column's values in a request, null for what is not known."""
    python_types: dict[str, type] = {"int64": int, "double": float, "string": str}
    bounds = Field(
        ge=_whole(column.minimum), le=_whole(column.maximum), allow_inf_nan=False if column.type == "double" else None
    )
    return Annotated[python_types[str(column.type)], bounds] | None


def _whole(bound: float | None) -> float | None:
    return int(bound) if bound is not None and bound == int(bound) else bound


class RankRequest(_Strict):
    """Rank `item_ids` for `user_id`; a user nobody knows gets the unpersonalised ranking."""

    user_id: Id
    item_ids: list[Id] = Field(min_length=1, description="Candidates, each once, all from the catalogue.")
    context: _Context


class RankedItem(BaseModel):
    """One candidate and its score."""

    item_id: str
    score: float = Field(description="Estimated probability of a positive label, 0 to 1.")


class EmbeddingUsed(BaseModel):
    """Which meta embedding of one task kind the scores rest on, where all candidates share it: the user's, or a shop's."""

    age_s: float | None = Field(description="Freshness lag of the stored embedding in seconds; null where none was found.")
    inactivity_s: float | None = Field(description="Seconds since the entity's last event; reported only.")
    fallback: Fallback | None = Field(
        description="Why the prior was used, withheld: by the arm alone; null where the stored embedding was."
    )
    stale: bool = Field(
        description="Whether the stored embedding lags more than the configuration allows; by configuration (`when_stale`) "
        "it is used all the same, with `fallback` null, or the prior is, with `fallback` stale."
    )


class EmbeddingsUsed(BaseModel):
    """Which meta embeddings of one task kind the scores rest on, where each candidate has one: an item's, or its maker's."""

    age_s: float | None = Field(
        description="Freshness lag of the oldest stored embedding in seconds; null where none was found."
    )
    inactivity_s: float | None = Field(description="Seconds since the last event of the most silent one; reported only.")
    statuses: dict[str, int] = Field(
        description="Candidates by what was found of them: fresh, stale, missing, version_mismatch, store_error or withheld."
    )
    prior: int = Field(description="Candidates that were scored with the prior.")


class RankResponse(BaseModel):
    """Candidates by descending score (equal scores by item id), all scored by one model version."""

    model_config = ConfigDict(protected_namespaces=())

    items: list[RankedItem]
    model_version: str
    embeddings: dict[str, EmbeddingUsed | EmbeddingsUsed] = Field(
        description="By task kind: of the user, of what the context names, or of the candidates."
    )
    arm: str | None = Field(
        default=None, description="Arm of the experiment that the user is in; not there where none is configured."
    )


class ErrorDetail(BaseModel):
    """Why a request was refused."""

    field: str = Field(description="Path of the field at fault; in parentheses where it is none.")
    rule: str = Field(description="What must hold.")
    value: Any = Field(description="What was sent; a long text is cut, a list or an object is given by its size.")
    remedy: str = Field(description="What to do.")


class ErrorResponse(BaseModel):
    """Body of every refusal."""

    error: ErrorDetail


def request_model(max_candidates: int, tables: schema.Tables) -> type[RankRequest]:
    """`RankRequest` with the configured limit and the declared context, so that the check and the OpenAPI page agree."""
    items = Field(min_length=1, max_length=max_candidates, description=RankRequest.model_fields["item_ids"].description)
    context = _context_model(tables)
    model: type[RankRequest] = create_model(
        "RankRequest",
        __base__=RankRequest,
        __doc__=RankRequest.__doc__,
        item_ids=(list[Id], items),
        context=(context, ... if any(field.is_required() for field in context.model_fields.values()) else context()),
    )
    return model


def parse_request(body: bytes, request_type: type[RankRequest]) -> RankRequest:
    """Read and check a request's shape. Raises RequestError (400) that names the first field at fault."""
    try:
        request = request_type.model_validate_json(body)
    except ValidationError as error:
        raise _refusal(error) from None
    if len(set(request.item_ids)) != len(request.item_ids):
        twice = next(item for item, count in Counter(request.item_ids).items() if count > 1)
        raise RequestError(
            400, field="item_ids", rule="must name each item once", value=twice, remedy="send each candidate once"
        )
    for name, values in request.context:
        if isinstance(values, list) and len(values) != len(request.item_ids):
            raise RequestError(
                400,
                field=f"context.{name}",
                rule=f"must have one value a candidate, {len(request.item_ids)}",
                value=f"list of {len(values)}",
                remedy="send the values in the order of item_ids, null for what is not known",
            )
    return request


def _refusal(error: ValidationError) -> RequestError:
    first = error.errors(include_url=False, include_context=True)[0]
    field = ".".join(str(part) for part in first["loc"]) or "(body)"
    value: Any = first["input"]
    if first["type"] == "extra_forbidden":
        rule, remedy = "is not a known field", "remove it or correct its spelling"
    elif first["type"] == "missing":
        rule, value, remedy = "is required", None, "add it"
    elif first["type"] == "json_invalid":
        rule, value, remedy = f"must be JSON: {first['ctx']['error']}", None, "send a JSON object encoded as UTF-8"
    else:
        # pydantic: "Input should be a valid string", "List should have at most 3 items after validation, not 4".
        rule = re.sub(r"^\w+ should ", "must ", first["msg"]).split(" after validation")[0]
        remedy = "see /docs.json for the types and ranges"
    return RequestError(400, field=field, rule=rule, value=_short(value), remedy=remedy)


def _short(value: Any) -> Any:
    """Echo a scalar as it came (long text cut), a container by its type and size."""
    if isinstance(value, str):
        return value if len(value) <= 100 else value[:100] + "…"
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, list | dict):
        return f"{'list' if isinstance(value, list) else 'object'} of {len(value)}"
    return repr(value)
