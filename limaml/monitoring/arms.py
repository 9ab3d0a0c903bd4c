"""What an experiment's arms do, from logged requests and the events that followed: `limaml compare-arms`.

Chance assigned users, so users are what is counted. One comes in with the first request, and the outcome is the mean over the
requests of the `experiment.outcome_days` from it on, by the events of these days. Until they are over and ingested the user
waits, so that nothing that was counted ever changes, and the test (`limaml.monitoring.sequential`) holds at every look.

An event belongs to the user's last request before it, at the same instant or earlier, that had the event's item as a candidate.
The instant of a request is the one it was ranked for (`context.at`).

    arms/from=D/dt=D/summary.json    what was found, from the first day through the last
"""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
from scipy.stats import chisquare

from limaml import metrics, schema, telemetry
from limaml.arms import Arms
from limaml.config import Config, ExperimentConfig
from limaml.errors import ConfigError, DataError, NothingToDo
from limaml.events.day_store import EventStore, partition
from limaml.io.storage import Storage
from limaml.monitoring.request_files import request_files
from limaml.monitoring.sequential import difference

_log = telemetry.get_logger(__name__)

BROKEN_SPLIT_P = 0.001
"""Below this probability the arms' numbers of users are not the configured shares' (Fabijan et al. 2019)."""
_DAY_US = 86_400_000_000
_EVENTS = pa.schema(
    [
        ("user_id", pa.string()),
        ("item_id", pa.string()),
        ("timestamp", schema.TIMESTAMP),
        ("label", schema.EVENTS.arrow.field("label").type),
    ]
)
# Of each user, in the order in which they came: requests of his window, and what followed on their candidates.
_USERS = """
WITH
windows AS (SELECT user_id, any_value(arm) AS arm, min(at_us) AS first_us, min(at_us) + $window_us AS end_us
            FROM requests GROUP BY user_id),
asked AS (SELECT requests.* FROM requests JOIN windows USING (user_id) WHERE at_us < end_us AND end_us <= $complete_us),
of_request AS (SELECT request, count(*) FILTER (positive) AS positives, count(*) AS judged FROM followed GROUP BY request),
of_user AS (SELECT user_id, count(*) AS requests, coalesce(sum(judged), 0) AS judged, coalesce(sum(positives), 0) AS positives,
                   avg(least(coalesce(positives, 0), 1)) AS "any", avg(coalesce(positives, 0) / candidates) AS share
            FROM asked LEFT JOIN of_request USING (request) GROUP BY user_id)
SELECT user_id, arm, end_us <= $complete_us AS counts, requests, judged, positives, "any", share
FROM windows LEFT JOIN of_user USING (user_id) ORDER BY first_us, user_id
"""
# Candidates that an event followed, within the user's window, by the request that it belongs to.
_FOLLOWED = """
CREATE TABLE followed AS
WITH
windows AS (SELECT user_id, min(at_us) + $window_us AS end_us FROM requests GROUP BY user_id),
named AS (SELECT user_id, item_id, at_us, max(request) AS request, arg_max(score, request) AS score
          FROM candidates JOIN requests USING (request) GROUP BY user_id, item_id, at_us)
SELECT named.request, named.item_id, any_value(named.score) AS score, bool_or(events.label = 1) AS positive
FROM events ASOF JOIN named
  ON events.user_id = named.user_id AND events.item_id = named.item_id AND events.at_us >= named.at_us
JOIN windows ON windows.user_id = events.user_id
WHERE events.at_us < windows.end_us
GROUP BY named.request, named.item_id
"""


def compare_arms(cfg: Config, first: date, through: date) -> dict[str, Any]:
    """Compare the arms by the requests logged from `first`, the experiment's first day, through `through`.

    Raises ConfigError without arms, NothingToDo where none of their requests was logged, DataError where users were answered in
    another arm than the configuration gives them.
    """
    if not cfg.experiment.arms:
        raise ConfigError("experiment.arms must be declared to be compared, got none; see docs/ab.md")
    if first > through:
        raise ConfigError(f"--from must not be after --through, got {first} and {through}; exchange them")
    storage = Storage(cfg.storage.root)
    days = EventStore(storage).manifests()
    ingested = [day for day, manifest in days.items() if first <= day <= through and manifest.status != "quarantined"]
    end = ingested[-1] if ingested else first - timedelta(days=1)
    with duckdb.connect() as connection:
        _take_events(connection, storage, first, end)
        _take_requests(connection, cfg, first, through)
        _require_one_split(connection, cfg.experiment)
        found = _Compared.of(connection, cfg.experiment, schema.day_end(end))
        summary = {
            "from": first.isoformat(),
            "through": through.isoformat(),
            "complete_through": end.isoformat(),
            "missing_days": [day.isoformat() for day in _span(first, end) if day not in ingested],
            **found.summary(cfg.experiment),
        }
    folder = f"arms/from={first}/{partition(through)}"
    storage.write_json(f"{folder}/summary.json", summary)
    if summary["split_is_broken"]:
        counts = {arm["arm"]: arm["users"] for arm in summary["arms"]}
        _log.error("arms_split_broken", p=summary["split_p"], users=counts)
    _log.info("arms_compared", **summary)
    return {**summary, "path": storage.path(folder)}


def _span(first: date, last: date) -> Iterator[date]:
    return (first + timedelta(days=number) for number in range((last - first).days + 1))


def _take_events(connection: duckdb.DuckDBPyConnection, storage: Storage, first: date, end: date) -> None:
    """Table `events`, of all users."""
    columns = {name: ds.field(name) for name in ("user_id", "item_id", "label")}
    columns["at_us"] = ds.field("timestamp").cast(pa.int64())
    files = EventStore(storage).paths(first=first, through=end) if first <= end else []
    connection.execute("CREATE TABLE events (user_id TEXT, item_id TEXT, label BIGINT, at_us BIGINT)")
    for batch in storage.dataset(files, _EVENTS).to_batches(columns=columns):
        connection.register("rows", pa.table(batch))
        connection.execute("INSERT INTO events SELECT * FROM rows")
        connection.unregister("rows")


def _take_requests(connection: duckdb.DuckDBPyConnection, cfg: Config, first: date, through: date) -> None:
    """Tables `requests`, of the experiment, and `candidates`, of which there is an event of the same user; a day at a time."""
    logged, columns = Storage(cfg.serving.log_path), schema.tables(cfg.features).request_log.arrow
    fields = {name: ds.field(name) for name in ("user_id", "arm", "model_version", "item_ids", "scores")}
    fields["at_us"] = ds.field("context", "at").cast(pa.int64())
    connection.execute(
        "CREATE TABLE requests (request BIGINT, user_id TEXT, arm TEXT, version TEXT, at_us BIGINT, candidates BIGINT)"
    )
    connection.execute("CREATE TABLE candidates (request BIGINT, item_id TEXT, score DOUBLE)")
    num_requests = 0
    for day in _span(first, through):
        dataset = logged.dataset(request_files(logged, day), columns)
        part = dataset.to_table(columns=fields, filter=ds.field("arm").is_valid())
        part = part.append_column("request", pa.array(np.arange(num_requests, num_requests + part.num_rows)))
        num_requests += part.num_rows
        connection.register("part", part)
        connection.execute(
            "INSERT INTO requests SELECT request, user_id, arm, model_version, at_us, len(item_ids) FROM part;"
            "INSERT INTO candidates SELECT request, item_id, score FROM"
            " (SELECT request, user_id, unnest(item_ids) AS item_id, unnest(scores) AS score FROM part)"
            " SEMI JOIN events USING (user_id, item_id)"
        )
        connection.unregister("part")
    if not num_requests:
        raise NothingToDo(
            f"no request of an arm was logged from {first} through {through}; serving.log_share = "
            f"{cfg.serving.log_share:g} says how many are"
        )


def _require_one_split(connection: duckdb.DuckDBPyConnection, cfg: ExperimentConfig) -> None:
    """Every logged arm is the one that the configuration gives its user."""
    arms = Arms(cfg)
    logged = connection.sql("SELECT DISTINCT user_id, arm FROM requests").fetchall()
    given = {user: arm.name for user, _ in logged if (arm := arms.of(user))}
    wrong = sum(given[user] != arm for user, arm in logged)
    if wrong:
        raise DataError(
            f"a user's arm must be what experiment.salt and experiment.arms say, but {wrong} of {len(given)} users were "
            "answered in another one; restore the settings, or give as --from the day after they changed"
        )


@dataclass(frozen=True)
class _Compared:
    """What the tables say of users and requests."""

    users: pa.Table
    """user_id, arm, counts, requests, judged, positives, any, share: in the order in which the users came."""
    judged: pa.Table
    """arm, score, positive: of candidates that an event followed."""
    versions: list[tuple[str, str, int]]
    """Arm, model version, requests."""

    @classmethod
    def of(cls, connection: duckdb.DuckDBPyConnection, cfg: ExperimentConfig, complete: datetime) -> "_Compared":
        window_us = cfg.outcome_days * _DAY_US
        complete_us = int(complete.timestamp()) * 1_000_000
        connection.execute(_FOLLOWED, {"window_us": window_us})
        users = connection.sql(_USERS, params={"window_us": window_us, "complete_us": complete_us}).to_arrow_table()
        judged = connection.sql("SELECT arm, score, positive FROM followed JOIN requests USING (request)").to_arrow_table()
        versions = connection.sql("SELECT arm, version, count(*) FROM requests GROUP BY ALL ORDER BY ALL").fetchall()
        return cls(users, judged, versions)

    def summary(self, cfg: ExperimentConfig) -> dict[str, Any]:
        """Every arm beside the first; the level is divided by their number (Bonferroni)."""
        counts = [pc.sum(pc.equal(self.users["arm"], arm.name)).as_py() or 0 for arm in cfg.arms]
        split_p = float(chisquare(counts, [arm.share * sum(counts) for arm in cfg.arms]).pvalue)
        broken = split_p < BROKEN_SPLIT_P
        level = cfg.level / (len(cfg.arms) - 1)
        arms = [self._arm(cfg, arm.name) for arm in cfg.arms]
        arms[1:] = [{**found, **self._beside(cfg, number, level, broken)} for number, found in enumerate(arms) if number]
        about = {"outcome": cfg.outcome, "outcome_days": cfg.outcome_days, "level": cfg.level}
        return {**about, "split_p": split_p, "split_is_broken": broken, "arms": arms}

    def _arm(self, cfg: ExperimentConfig, name: str) -> dict[str, Any]:
        users = self.users.filter(pc.equal(self.users["arm"], name))
        counted = users.filter(users["counts"])
        judged = self.judged.filter(pc.equal(self.judged["arm"], name))
        return {
            "arm": name,
            "users": users.num_rows,
            "users_counted": counted.num_rows,
            "requests": pc.sum(counted["requests"]).as_py() or 0,
            "outcome": _known(pc.mean(counted[cfg.outcome]).as_py()),
            "positive_rate": _known(pc.mean(judged["positive"].cast(pa.float64())).as_py()),
            "auc": _known(metrics.auc(judged["positive"].to_numpy(), judged["score"].to_numpy())),
            "versions": {version: number for arm, version, number in self.versions if arm == name},
        }

    def _beside(self, cfg: ExperimentConfig, number: int, level: float, broken: bool) -> dict[str, Any]:
        """Of an arm against the first one."""
        control, arm = cfg.arms[0], cfg.arms[number]
        both = self.users.filter(pc.and_(self.users["counts"], pc.is_in(self.users["arm"], pa.array([control.name, arm.name]))))
        found = difference(
            both[cfg.outcome].to_numpy(),
            pc.equal(both["arm"], arm.name).to_numpy(),
            share=arm.share / (arm.share + control.share),
            level=level,
        )
        decision = "open" if found.p > level else "better" if found.value > 0 else "worse"
        return {
            "difference": _known(found.value),
            "low": found.low,
            "high": found.high,
            "p": found.p,
            "decision": "split broken" if broken else decision,
        }


def _known(value: float | None) -> float | None:
    """JSON has no NaN."""
    return None if value is None or value != value else float(value)
