"""Ask the running service to rank candidates for three users, and show what came back."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import httpx
import pyarrow as pa
from rich.console import Console
from rich.table import Table

from limaml.config import Config
from limaml.errors import LimamlError
from limaml.events import catalogue
from limaml.events.day_store import EventStore
from limaml.io.storage import Storage
from limaml.schema import tables

CANDIDATES = 100
SHOWN = 5
NEVER_SEEN = "nobody-yet"
LATE = (httpx.codes.SERVICE_UNAVAILABLE, httpx.codes.GATEWAY_TIMEOUT)
RETRY_S = 0.5


@dataclass(frozen=True)
class DemoUser:
    """Who is asked for: `rows` events known of them, and candidates they have not rated."""

    user_id: str
    description: str
    rows: int
    candidates: tuple[str, ...]
    context: dict[str, Any] = field(default_factory=dict)
    """What a request must say of its moment: that it is not known."""


def choose_users(cfg: Config) -> list[DemoUser]:
    """One user with much history, the one with the fewest rows, one never seen; ties go to the smaller id."""
    storage = Storage(cfg.storage.root)
    store = EventStore(storage)
    events = store.read(store.days())
    by_user = _counts(events, "user_id")
    users = [
        (by_user[0], "much history"),
        (by_user[-1], "fewest rows"),
        ((NEVER_SEEN, 0), "never seen"),
    ]
    found = [(user, what, rows, _candidates(storage, events, user)) for (user, rows), what in users]
    return [DemoUser(*each, _unknown_context(cfg, len(each[-1]))) for each in found]


def bearer(cfg: Config) -> dict[str, str]:
    """The header with the token that the service asks for, where it asks for one."""
    path = cfg.serving.token_file
    return {"Authorization": f"Bearer {Path(path).read_text().strip()}"} if path else {}


def ask(url: str, user: DemoUser, timeout_s: float = 30.0, headers: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The service's answer; where it is late (503, 504 or none) it is asked again, for `timeout_s`.

    Raises LimamlError with its refusal, or with what kept it.
    """
    request = {"user_id": user.user_id, "item_ids": list(user.candidates), "context": user.context}
    deadline = monotonic() + timeout_s
    while True:
        try:
            response = httpx.post(f"{url}/rank", json=request, headers=headers, timeout=timeout_s, trust_env=False)
        except httpx.TransportError as error:
            late, problem = True, f"{type(error).__name__}: {error}"
        else:
            if response.is_success:
                return dict(response.json())
            late, problem = response.status_code in LATE, f"{response.status_code} {response.text[:500]}"
        if not late or monotonic() > deadline:
            raise LimamlError(f"the service refused user {user.user_id!r}: {problem}")
        sleep(RETRY_S)


def show(console: Console, cfg: Config, url: str) -> None:
    """Print the first items of all three rankings, with the age of the embedding used or why there was none."""
    items = catalogue.read(Storage(cfg.storage.root), "item")
    title = tables(cfg.features).title or "item_id"
    titles = dict(zip(items["item_id"].to_pylist(), items[title].to_pylist(), strict=True))
    for user in choose_users(cfg):
        answer = ask(url, user, cfg.local.ready_timeout_s, bearer(cfg))
        used = answer["embeddings"][cfg.task_kind.name]
        age = "no embedding" if used["age_s"] is None else f"embedding {_duration(used['age_s'])} behind"
        why = f"; fallback to the prior: {used['fallback']}" if used["fallback"] else ""
        table = Table(
            title=f"user {user.user_id} ({user.description}, {user.rows} rows): model {answer['model_version']}, {age}{why}",
            title_justify="left",
            show_edge=False,
        )
        table.add_column("score", justify="right")
        table.add_column(f"first {SHOWN} of {len(user.candidates)}")
        for item in answer["items"][:SHOWN]:
            table.add_row(f"{item['score']:.3f}", str(titles[item["item_id"]] or item["item_id"]))
        console.print(table)
        console.print()


def _unknown_context(cfg: Config, num_candidates: int) -> dict[str, Any]:
    said = [feature for feature in cfg.features if feature.entity == "context" and not feature.clock]
    return {feature.name: [None] * num_candidates if feature.per_candidate else None for feature in said}


def _counts(events: pa.Table, column: str) -> list[tuple[str, int]]:
    counted = events.group_by(column).aggregate([(column, "count")])
    pairs = zip(counted[column].to_pylist(), counted[f"{column}_count"].to_pylist(), strict=True)
    return sorted(pairs, key=lambda pair: (-pair[1], pair[0]))


def _candidates(storage: Storage, events: pa.Table, user: str) -> tuple[str, ...]:
    """The most rated items that the user has not rated; all others of the catalogue where those are too few."""
    rated = set(events.filter(pa.compute.equal(events["user_id"], user))["item_id"].to_pylist())
    popular = [item for item, _ in _counts(events, "item_id")]
    others = catalogue.read(storage, "item")["item_id"].to_pylist()
    unrated = dict.fromkeys(item for item in [*popular, *others] if item not in rated)
    return tuple(unrated)[:CANDIDATES]


def _duration(seconds: float) -> str:
    if seconds < 2 * 3600:
        return f"{seconds:.0f} s"
    return f"{seconds / 3600:.1f} h" if seconds < 2 * 86400 else f"{seconds / 86400:.1f} days"
