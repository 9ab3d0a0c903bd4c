"""Services that do different work are found before they are timed."""

from dataclasses import dataclass, field

import pytest

from benchmarks.options import BenchmarkError
from benchmarks.serving import same_work

BODIES = [{"user_id": "u", "item_ids": ["a", "b", "c"]}]


def answer(scores, fallback=None):
    items = [{"item_id": item, "score": score} for item, score in scores.items()]
    return {"items": items, "model_version": "1", "embeddings": {"user": {"age_s": 1.0, "fallback": fallback}}}


@dataclass
class Ranker:
    """Gives its answers in turn, the last one for ever."""

    name: str
    answers: list
    asked: list = field(default_factory=list)

    def rank(self, body):
        self.asked.append(body)
        return self.answers[min(len(self.asked), len(self.answers)) - 1]


GOOD = answer({"b": 0.75, "a": 0.5, "c": 0.25})


def check(*answers):
    ours = Ranker("ours_redis", [GOOD])
    return same_work.check({"noop": None, "ours_redis": ours, "plain": Ranker("plain", list(answers))}, BODIES)


def test_the_largest_difference_is_told():
    assert check(answer({"b": 0.75, "a": 0.5, "c": 0.250004})) == pytest.approx(4e-6)


def test_a_late_look_up_is_asked_for_again():
    assert check(answer({"b": 0.1, "a": 0.1, "c": 0.1}, "store_error"), GOOD) == 0.0
    with pytest.raises(BenchmarkError, match="look-ups in a row were late"):
        check(answer({}, "store_error"))


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (
            answer({"b": 0.75, "a": 0.5, "c": 0.2501}),
            "plain must score as ours_redis does to 1e-05, got differences of up to 0.0001",
        ),
        (answer({"b": 0.75, "a": 0.5, "c": float("nan")}), "must score as"),
        (answer({"a": 0.5, "b": 0.75, "c": 0.25}), "must return the candidates best first"),
        (answer({"b": 0.75, "a": 0.5}), "must return the candidates best first, each once"),
        (answer({"b": 0.75, "a": 0.5, "c": 0.25}, "missing"), "must answer from the stored embedding, got the fallback"),
    ],
)
def test_other_work_is_an_error(wrong, why):
    with pytest.raises(BenchmarkError, match=why):
        check(wrong)
