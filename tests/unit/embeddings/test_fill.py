"""When a slot may be filled: the two spans that a fill waits for, to the microsecond."""

from datetime import UTC, datetime, timedelta

import pytest

from limaml import registry
from limaml.config import Config, EmbeddingsConfig, SourceConfig
from limaml.embeddings import fill
from limaml.errors import BusyError
from limaml.registry import ModelVersion

SINCE = datetime(2026, 1, 10, 12, tzinfo=UTC)
SPAN_S = 40.0
TICK = timedelta(microseconds=1)
CFG = Config(source=SourceConfig(kind="synthetic"), embeddings=EmbeddingsConfig(min_dwell_s=SPAN_S, fill_timeout_s=SPAN_S))


def version(**tags: str) -> ModelVersion:
    return ModelVersion("3", "run", {getattr(registry, name): value for name, value in tags.items()})


def at(monkeypatch: pytest.MonkeyPatch, instant: datetime) -> None:
    monkeypatch.setattr(fill, "now", lambda: instant)


def test_a_slot_rests_for_min_dwell_s_after_a_switch_and_not_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    champion, end = version(CUT_OVER_AT=SINCE.isoformat()), SINCE + timedelta(seconds=SPAN_S)
    at(monkeypatch, end - TICK)
    with pytest.raises(BusyError, match=r"until 12:00:40Z \(embeddings\.min_dwell_s = 40\)"):
        fill._refuse_before_dwell(CFG, champion)
    at(monkeypatch, end)
    fill._refuse_before_dwell(CFG, champion)


def test_a_fill_forgets_what_an_earlier_one_left_and_is_open_only_then() -> None:
    """Tags are written in this order: a run that dies between two leaves no version that could be filled or cut over to."""
    tags = fill._filling_tags(Config(source=SourceConfig(kind="synthetic")), "green", SINCE.date(), "run-1")
    assert list(tags)[-1] == registry.STATE
    assert {name for name, value in tags.items() if value is None} == {registry.COMPLETE_THROUGH, registry.CUT_OVER_AT}


def test_a_fill_holds_its_slot_for_fill_timeout_s_after_its_last_shard_and_not_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    filling = version(STATE=fill.FILLING, FILL_SEEN_AT=SINCE.isoformat(), FILLED_BY="run-1")
    end = SINCE + timedelta(seconds=SPAN_S)
    at(monkeypatch, end - TICK)
    with pytest.raises(BusyError, match=r"busy: fill of version 3 by run-1 since .*fill_timeout_s = 40$"):
        fill._refuse_if_filling(CFG, [filling])
    at(monkeypatch, end)
    fill._refuse_if_filling(CFG, [filling])
