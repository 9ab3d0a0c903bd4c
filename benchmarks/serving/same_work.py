"""Before anything is timed: for a sample of requests every service that ranks gives the same scores, from stored embeddings."""

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.options import BenchmarkError
from benchmarks.serving.processes import Service

SAMPLE = 50
TOLERANCE = 1e-5
"""Contract 7's; both compute in float32, summed in another order."""
_LATE_TRIES = 50


def check(services: Mapping[str, Service], bodies: Sequence[dict[str, Any]]) -> float:
    """The largest difference between two services' scores of one item. Raises BenchmarkError if they do different work."""
    largest = 0.0
    rankers = [service for name, service in services.items() if name != "noop"]
    for body in bodies[:SAMPLE]:
        scores = {service.name: _scores(service, body) for service in rankers}
        wanted = scores[rankers[0].name]
        for name, found in scores.items():
            differences = [abs(found[item] - wanted[item]) for item in body["item_ids"]]
            # Asked this way round, because the largest of numbers and a NaN may be a number.
            if not all(difference <= TOLERANCE for difference in differences):
                raise BenchmarkError(
                    f"{name} must score as {rankers[0].name} does to {TOLERANCE:g}, got differences of up to "
                    f"{max(differences):.2g} for user {body['user_id']}: they do not do the same work"
                )
            largest = max(largest, *differences)
    return largest


def _scores(service: Service, body: dict[str, Any]) -> dict[str, float]:
    """Item -> score of a personalised answer; where the look-up came late (`store_error`) it is asked for again."""
    for _ in range(_LATE_TRIES):
        answer = service.rank(body)
        reasons = {used["fallback"] for used in answer["embeddings"].values()}
        if reasons == {None}:
            break
        if reasons != {"store_error"}:
            raise BenchmarkError(f"{service.name} must answer from the stored embedding, got the fallback {reasons}")
    else:
        raise BenchmarkError(
            f"{service.name} must answer from the stored embedding, but {_LATE_TRIES} look-ups in a row were late"
        )
    order = [entry["score"] for entry in answer["items"]]
    scores = {entry["item_id"]: entry["score"] for entry in answer["items"]}
    if order != sorted(order, reverse=True) or set(scores) != set(body["item_ids"]):
        raise BenchmarkError(f"{service.name} must return the candidates best first, each once, got {answer['items'][:3]} ...")
    return scores
