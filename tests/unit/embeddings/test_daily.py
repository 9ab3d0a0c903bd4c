"""Which days a version still lacks, and which of those it has were corrected; from manifests alone."""

from datetime import date, timedelta
from pathlib import Path

import pytest

from limaml import registry, schema
from limaml.config import Config, SourceConfig, TaskKindConfig
from limaml.embeddings import daily
from limaml.embeddings.context import EmbeddingContext
from limaml.embeddings.partition import write_covered
from limaml.errors import DataError
from limaml.events.day_store import DayManifest, Status
from limaml.io.storage import Storage
from limaml.registry import ModelVersion, Registry

FIRST = date(2026, 1, 5)
USER, ITEM = TaskKindConfig(), TaskKindConfig(name="item", entity_column="item_id")


def day(number: int) -> date:
    return FIRST + timedelta(days=number)


def manifests(*status: Status, revision: int = 1) -> daily.Manifests:
    """Of consecutive days from FIRST on."""
    return {day(at): DayManifest(day(at), each, revision, failed=("a rule",)) for at, each in enumerate(status)}


def complete(num_days: int) -> ModelVersion:
    """A version that has the first `num_days` days."""
    tags = registry.complete_through_tags([USER.name, ITEM.name]).values()
    return ModelVersion("3", "run", dict.fromkeys(tags, schema.day_start(day(num_days)).isoformat()))


@pytest.fixture
def context(tmp_path: Path) -> EmbeddingContext:
    """Two task kinds; nothing is published of either."""
    cfg = Config(source=SourceConfig(kind="synthetic"), task_kinds=(USER, ITEM))
    return EmbeddingContext(cfg, Storage(str(tmp_path)), Registry(cfg.registry))


def corrected(context: EmbeddingContext, known: daily.Manifests, version: ModelVersion) -> list[date]:
    return [step.day for step in daily._corrections(context, known, version)]


def test_new_days_are_those_from_complete_through_to_the_asked_one(context: EmbeddingContext) -> None:
    known = manifests("passed", "passed", "no_data", "passed", "passed")
    steps = daily._new_days(context, known, complete(2), day(3))
    assert [(step.day, step.as_of, step.is_new) for step in steps] == [
        (day(2), schema.day_end(day(2)), True),
        (day(3), schema.day_end(day(3)), True),
    ]
    assert [step.revision for step in steps] == [0, 1], "a day without data has no revision"
    assert daily._new_days(context, known, complete(4), day(3)) == []


@pytest.mark.parametrize(("gap", "state"), [("quarantined", r"is in quarantine \(a rule\)"), (None, "was not ingested")])
def test_a_gap_stops_at_the_day_to_run_first(context: EmbeddingContext, gap: Status | None, state: str) -> None:
    known = manifests("passed", gap or "passed", "passed")
    if gap is None:
        del known[day(1)]
    with pytest.raises(
        DataError, match=rf"complete through {day(0)}, and {day(1)} {state}; run limaml_daily for {day(1)} first"
    ):
        daily._new_days(context, known, complete(1), day(2))


def test_a_day_that_is_not_complete_yet_is_no_correction(context: EmbeddingContext) -> None:
    known = manifests("passed", "passed", "passed")
    assert corrected(context, known, complete(2)) == [day(0), day(1)]
    for kind in (USER, ITEM):
        write_covered(context.storage, kind, "3", {str(day(0)): 1})
    assert corrected(context, known, complete(2)) == [day(1)]
    assert [step.as_of for step in daily._corrections(context, known, complete(2))] == [schema.day_start(day(2))]


def test_a_run_for_a_day_corrects_that_day_alone(context: EmbeddingContext) -> None:
    known = manifests("passed", "passed", "passed")
    for at in (0, 1):
        assert [step.day for step in daily._steps(context, known, complete(2), day(at))] == [day(at)]
    assert [(step.day, step.is_new) for step in daily._steps(context, known, complete(2), day(2))] == [(day(2), True)]


def test_a_correction_that_one_kind_lacks_is_still_to_do(context: EmbeddingContext) -> None:
    known = manifests("passed", revision=2)
    write_covered(context.storage, USER, "3", {str(day(0)): 2})
    write_covered(context.storage, ITEM, "3", {str(day(0)): 1})
    [step] = daily._corrections(context, known, complete(1))
    assert (step.day, step.covered, step.revision) == (day(0), 1, 2)
    write_covered(context.storage, ITEM, "3", {str(day(0)): 2})
    assert corrected(context, known, complete(1)) == []


def test_refused_deliveries_of_a_day_without_data_are_no_correction(context: EmbeddingContext) -> None:
    """A refused day counts its refusals in `revision`: taken for an accepted one, it would count as covered."""
    assert corrected(context, manifests("quarantined", revision=3), complete(1)) == []
    assert corrected(context, manifests("passed", revision=3), complete(1)) == [day(0)]


def test_what_rows_are_made_from_ends_with_their_as_of_instant(context: EmbeddingContext) -> None:
    """A day ingested meanwhile changes nothing; a correction before the instant does."""
    known = manifests("passed", "passed", "passed")
    [step] = daily._new_days(context, known, complete(1), day(1))
    later = manifests("passed", "passed")
    assert daily._new_days(context, later, complete(1), day(1))[0].events == step.events
    later[day(0)] = DayManifest(day(0), "passed", 2)
    assert daily._new_days(context, later, complete(1), day(1))[0].events != step.events
