"""The command line: one verb per DAG task, and the verbs of `make run`.

Every verb reads one configuration, does one thing and ends with an exit code of `limaml.errors`. With `--result PATH` it
leaves a JSON of at most 4 KiB there (verb, status `ok`, `unchanged`, `refused` or `failed`, and what the next task needs:
paths and names, never data); without, that JSON goes to standard output. Heavy packages are imported by the verb that needs
them. Over 400 lines, because one list of all verbs, with their help, is what a reader looks for.
"""

import atexit
import ctypes
import functools
import inspect
import json
import logging
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable
from datetime import UTC, date, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from limaml.errors import ConfigError, LimamlError, NothingToDo
from limaml.verb_result import describe, leave

if TYPE_CHECKING:
    from limaml.config import Config, MonitoringConfig
    from limaml.monitoring.export import Gauges

DEFAULT_CONFIG = "configs/movielens.toml"
PARENT_VARIABLE = "LIMAML_PARENT_PID"
"""Set by the Airflow operator: the process without which this one has no business going on."""

DAG_TASKS = "Tasks of the DAGs"
BY_HAND = "When something is wrong"
ARMS = "Comparing what people are served"
ONE_MACHINE = "Everything on one machine"
YOUR_DATA = "Your own data"

app = typer.Typer(
    help="LiMAML in production: meta-learned personalisation of a ranking network, from events to served scores.",
    epilog="Settings: configs/*.toml, documented field by field in docs/configuration.md. Exit codes: 2 usage or "
    "configuration, 65 data or gate, 99 nothing to do or refused, 1 anything a retry may cure.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _parse_day(text: str) -> date:
    if not re.fullmatch(r"\d{4}-\d{2}-\d{2}", text):
        raise typer.BadParameter(f"must be a calendar day YYYY-MM-DD, got {text!r}")
    try:
        return date.fromisoformat(text)
    except ValueError as error:
        raise typer.BadParameter(f"must be a calendar day, got {text!r}: {error}") from None


def _day(help_text: str, *names: str) -> Any:
    return typer.Option(*names, parser=_parse_day, metavar="YYYY-MM-DD", help=help_text)


Day = Annotated[date, _day("The day (UTC).")]
Through = Annotated[date, _day("The last day read, inclusive (UTC).")]
First = Annotated[date, _day("The first day, inclusive (UTC): the one on which the experiment began.", "--from")]
MaybeDay = Annotated[date | None, _day("One day that arrived (UTC).")]
MaybeThrough = Annotated[date | None, _day("All days through this one, inclusive (UTC).")]
Today = Annotated[date | None, _day("Today, for tests and replays; the clock's day (UTC) by default.")]
Version = Annotated[str, typer.Option(help="Model version in the registry.")]
MaybeVersion = Annotated[str | None, typer.Option(help="The version to go back to; a repeated call then changes nothing.")]
OneUser = Annotated[str | None, typer.Option(help="Of this user only, by id.")]
WholeAudit = Annotated[Path | None, typer.Option(help="Where to write all that is listed, as JSON.")]
MaybeCard = Annotated[str | None, typer.Option("--version", help="Model version in the registry; the champion by default.")]
Candidate = Annotated[str, typer.Option(help="Folder or URL that `train` left.")]
Shard = Annotated[int, typer.Option(min=0, help="Which shard of the plan.")]

_COMMON_RESULT = typer.Option("--result", help="Where to leave the result (JSON, at most 4 KiB).")
_COMMON = {
    "config": Annotated[Path, typer.Option("--config", envvar="LIMAML_CONFIG", help="Configuration file.")],
    "overrides": Annotated[
        list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override one setting; may be repeated.")
    ],
    "result": Annotated[Path | None, _COMMON_RESULT],
}
_DEFAULTS = {"config": Path(DEFAULT_CONFIG), "overrides": None, "result": None}

Body = Callable[..., dict[str, Any]]


def verb(panel: str, *, spoken: bool = False) -> Callable[[Body], Body]:
    """Register `body(cfg, **options) -> dict` as a verb that also takes --config, --set and --result.

    A spoken verb talks to a person: it prints what it has to say itself, no JSON and no log lines below a warning.
    A DAG's verb exports when it ended and how long it took; a body with a parameter `gauges` adds its own to these.
    """

    def register(body: Body) -> Body:
        name = body.__name__.removesuffix("_").replace("_", "-")

        @functools.wraps(body)
        def command(config: Path, overrides: list[str] | None, result: Path | None, **options: Any) -> None:
            gauges = _gauges() if panel == DAG_TASKS else None
            if takes_gauges:
                options["gauges"] = gauges
            raise typer.Exit(_run(name, functools.partial(body, **options), config, overrides or [], result, spoken, gauges))

        own = list(inspect.signature(body).parameters.values())[1:]
        takes_gauges = any(parameter.name == "gauges" for parameter in own)
        own = [parameter for parameter in own if parameter.name != "gauges"]
        own = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own]
        common = [
            inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=_DEFAULTS[key])
            for key, annotation in _COMMON.items()
        ]
        command.__signature__ = inspect.Signature(own + common)  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in own + common}
        app.command(name, rich_help_panel=panel)(command)
        return body

    return register


def _run(
    name: str,
    body: Body,
    config: Path | None,
    overrides: list[str],
    path: Path | None,
    spoken: bool,
    gauges: "Gauges | None" = None,
) -> int:
    """Run one verb and return its exit code; every outcome is in the result file, an error also in one line on stderr.

    With `gauges` the outcome, and what the body put there, is exported as metrics too.
    """
    _die_with_parent()
    signal.signal(signal.SIGTERM, _on_term)
    os.environ["TZ"] = "UTC"
    time.tzset()
    from limaml import telemetry
    from limaml.config import load

    telemetry.configure(level=logging.WARNING if spoken else logging.INFO)
    telemetry.bind(verb=name, run_id=_run_id())
    log = telemetry.get_logger("limaml.cli")
    started, status, monitoring = time.monotonic(), "failed", None
    try:
        cfg = load(config, overrides) if config else None
        monitoring = cfg.monitoring if cfg else None
        outcome: dict[str, Any] = {"status": "ok", **(body(cfg) if cfg else body())}
        leave(path, spoken, {"verb": name, **outcome})
        status = "ok"
    except NothingToDo as nothing:
        log.info("nothing_to_do", reason=nothing.reason)
        status = "refused" if name == "evaluate" else "unchanged"
        leave(path, spoken, {"verb": name, "status": status, "reason": nothing.reason})
        return nothing.exit_code
    except LimamlError as error:
        leave(path, spoken, {"verb": name, "status": "failed", **describe(error)})
        print(f"limaml {name}: {error}", file=sys.stderr)
        return error.exit_code
    except Exception as error:  # noqa: BLE001  anything unforeseen: the result file and the exit code must still say so
        traceback.print_exc()
        leave(path, spoken, {"verb": name, "status": "failed", **describe(error)})
        return 1
    finally:
        if gauges is not None and monitoring is not None:
            _export(monitoring, name, status, time.monotonic() - started, gauges)
    log.info("done", seconds=round(time.monotonic() - started, 3), status=outcome["status"])
    return 0


def _gauges() -> "Gauges":
    from limaml.monitoring.export import Gauges

    return Gauges()


def _export(cfg: "MonitoringConfig", name: str, status: str, seconds: float, gauges: "Gauges") -> None:
    from limaml.monitoring.export import export

    export(cfg, name, status, seconds, time.time(), gauges)


def _die_with_parent() -> None:
    """End with the process named by LIMAML_PARENT_PID, even if that one is killed without a chance to say so."""
    parent = os.environ.pop(PARENT_VARIABLE, None)
    if parent is None:
        return
    pr_set_pdeathsig = 1  # prctl(2)
    ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != int(parent):  # it died before the line above
        os._exit(1)


def _on_term(signum: int, _frame: object) -> None:
    """Leave through `finally` blocks, so that a lease is given back."""
    raise SystemExit(128 + signum)


def _run_id() -> str:
    return os.environ.get("AIRFLOW_CTX_DAG_RUN_ID", f"manual-{os.getpid()}")


def _today(today: date | None) -> date:
    return today or datetime.now(UTC).date()


@verb(DAG_TASKS)
def apply(cfg: "Config") -> dict[str, Any]:
    """Register the feature repository's entities, views and services with Feast."""
    from limaml.features.feature_store import apply

    return apply(cfg)


@verb(DAG_TASKS)
def embed_items(cfg: "Config", today: Today = None) -> dict[str, Any]:
    """Make the vectors of new items by the encoders that [[transfer]] names, each item once; nothing to do: exit code 99."""
    from limaml.transfer.embed_items import embed_items

    return embed_items(cfg, _today(today))


@verb(DAG_TASKS)
def ingest(cfg: "Config", through: MaybeThrough = None, day: MaybeDay = None, today: Today = None) -> dict[str, Any]:
    """Gate days of events, store them, take their snapshots and log their features: the history, or one day."""
    from limaml.events.ingest import ingest_day, ingest_history

    if (through is None) == (day is None):
        raise ConfigError(f"ingest takes one of --through and --day, got {through} and {day}; name exactly one")
    if through is not None:
        return ingest_history(cfg, through, _today(today))
    assert day is not None
    return ingest_day(cfg, day, _today(today))


@verb(DAG_TASKS)
def train(cfg: "Config", through: Through) -> dict[str, Any]:
    """Meta-train a candidate on all days through one; leaves its folder, or says that the champion is already that model."""
    from limaml.training.candidate import fit_candidate

    return fit_candidate(cfg, through)


@verb(DAG_TASKS)
def evaluate(cfg: "Config", candidate: Candidate) -> dict[str, Any]:
    """Judge a candidate, log the report, and register it if it is promoted; refused: exit code 99 with the reasons."""
    from limaml.evaluation.evaluate_verb import evaluate_and_register

    return evaluate_and_register(cfg, candidate)


@verb(DAG_TASKS)
def plan_fill(cfg: "Config", version: Version, through: Through) -> dict[str, Any]:
    """Empty the idle slot for a version and divide the active entities into shards."""
    from limaml.embeddings.fill import plan_fill

    return plan_fill(cfg, version, through, _run_id())


@verb(DAG_TASKS)
def fill(cfg: "Config", version: Version, shard: Shard) -> dict[str, Any]:
    """Adapt one shard's entities, gate the partition, publish it into the slot being filled."""
    from limaml.embeddings.fill import fill_shard

    return fill_shard(cfg, version, shard, _run_id())


@verb(DAG_TASKS)
def cut_over(cfg: "Config", version: Version) -> dict[str, Any]:
    """Check that the filled slot is complete, catch it up, then point the alias `champion` at its version."""
    from limaml.embeddings.cutover import cut_over

    return cut_over(cfg, version, _run_id())


@verb(DAG_TASKS)
def adapt(cfg: "Config", day: Day) -> dict[str, Any]:
    """Adapt the entities that have new rows on a day, for each version kept up to date; write their partitions, gate them."""
    from limaml.embeddings.daily import adapt_day

    return adapt_day(cfg, day)


@verb(DAG_TASKS)
def publish(cfg: "Config", gauges: "Gauges", day: Day) -> dict[str, Any]:
    """Publish a day's snapshots, then its embeddings; read them back; move `complete_through`."""
    from limaml.embeddings.daily import publish_day
    from limaml.monitoring.published import record_publication

    return publish_day(cfg, day, _run_id(), lambda: record_publication(cfg, gauges, time.time()))


@verb(DAG_TASKS)
def consistency(cfg: "Config", gauges: "Gauges", day: Day) -> dict[str, Any]:
    """Compare the features and embeddings logged with a day's requests with the offline join; above the limit: exit code 65."""
    from limaml.monitoring.consistency import compare_day

    return compare_day(cfg, day, gauges)


@verb(DAG_TASKS)
def drift(cfg: "Config", gauges: "Gauges", day: Day) -> dict[str, Any]:
    """Say how far a day's features and scores are distributed from those of the champion's training window."""
    from limaml.monitoring.drift import measure_day

    return measure_day(cfg, day, gauges)


@verb(DAG_TASKS)
def retain(cfg: "Config", day: Day) -> dict[str, Any]:
    """Drop what is past its retention at the end of a day: values of rows, logged requests, refused deliveries."""
    from limaml.governance.retention import retain

    return retain(cfg, day)


@verb(BY_HAND)
def rollback(cfg: "Config", version: MaybeVersion = None) -> dict[str, Any]:
    """Make the previous version, still ready in the other slot, the champion again, as fresh as the champion was."""
    from limaml.embeddings.cutover import rollback

    return rollback(cfg, version, _run_id())


@verb(ARMS, spoken=True)
def compare_arms(cfg: "Config", first: First, through: Through) -> dict[str, Any]:
    """Say what the arms of an experiment do to people, with intervals that hold however often one looks."""
    from limaml.monitoring.arms import compare_arms
    from limaml.monitoring.arms_table import lines

    found = compare_arms(cfg, first, through)
    print("\n".join(lines(found)))
    return found


@verb(ONE_MACHINE, spoken=True)
def up(cfg: "Config", today: Today = None) -> dict[str, Any]:
    """Start Airflow, MLflow and the service, run what is missing, show the result (`make run`)."""
    from rich.console import Console

    from limaml.local.run import up

    return up(cfg, _today(today), Console(soft_wrap=True)).to_dict()


@verb(ONE_MACHINE, spoken=True)
def stop(cfg: "Config") -> dict[str, Any]:
    """End exactly what `up` started (`make stop`)."""
    from limaml.local.stack import stop

    count = stop(cfg)
    print(f"ended {count} processes" if count else "nothing was running")
    return {"status": "ok" if count else "unchanged", "ended": count}


@verb(BY_HAND, spoken=True)
def status(cfg: "Config", today: Today = None) -> dict[str, Any]:
    """Say on one screen which model serves, how fresh each slot is, which days are in, and what was refused."""
    from limaml.local.screen import screen
    from limaml.local.status import read_status

    found = read_status(cfg, _today(today))
    print("\n".join(screen(cfg, found, datetime.now(UTC))))
    return found.to_dict()


@verb(BY_HAND, spoken=True)
def card(cfg: "Config", version: MaybeCard = None) -> dict[str, Any]:
    """Show the card of a model version: data and encoders with their terms, features, evaluation by group, known limits."""
    from limaml.governance import card
    from limaml.local.status import read_card

    number, found = read_card(cfg, version)
    print("\n".join([f"Model version {number}", *card.lines(found)]))
    return {"version": number, **card.headline(found)}


@verb(BY_HAND, spoken=True)
def audit(cfg: "Config", user: OneUser = None, out: WholeAudit = None) -> dict[str, Any]:
    """List what is stored about users, or about one, where, why and until when."""
    from limaml.io import atomic
    from limaml.monitoring.audit import audit

    found = audit(cfg, user)
    print("\n".join(found.lines()))
    if out is not None:
        atomic.write(out, json.dumps(found.to_dict(), indent=1) + "\n")
    return found.summary()


@verb(YOUR_DATA, spoken=True)
def check(cfg: "Config", today: Today = None) -> dict[str, Any]:
    """Run all gates over all days of the source without storing anything; say what is wrong, and which bounds fit."""
    from limaml.errors import GateError
    from limaml.events.check import check

    report = check(cfg, _today(today))
    print("\n".join(report.lines()))
    if report.wrong:
        raise GateError(f"{len(report.wrong)} things are wrong with the source, as listed above; correct them", ())
    return {"days": report.days, "rows": report.rows, "odd": len(report.odd)}


@app.command("distil-encoder", rich_help_panel=YOUR_DATA)
def distil_encoder(
    out: Annotated[Path, typer.Argument(help='Folder to write, for `provider = "static"` of [[transfer]].')],
    teacher: Annotated[Path | None, typer.Option(help="Folder of a BERT encoder; none: the packaged one.")] = None,
    result: Annotated[Path | None, _COMMON_RESULT] = None,
) -> None:
    """Distil an encoder of text into a vector a token: many times as fast, a little worse; a minute."""
    from limaml.transfer.distil_encoder import distil_encoder

    raise typer.Exit(_run("distil-encoder", functools.partial(distil_encoder, out, teacher), None, [], result, spoken=True))


@verb(YOUR_DATA, spoken=True)
def tune_encoder(
    cfg: "Config",
    out: Annotated[Path, typer.Option(help='Folder to write, for `provider = "folder"` of [[transfer]].')],
    through: Through,
    today: Today = None,
) -> dict[str, Any]:
    """Adapt the encoder of [tuning] to the training rows, offline; nothing gained on held-out items: exit code 99."""
    from limaml.transfer.tune_encoder import tune_encoder

    return tune_encoder(cfg, out, through, _today(today))


@app.command("init", rich_help_panel=YOUR_DATA)
def init(
    table: Annotated[str, typer.Argument(help="Events: Parquet, CSV or JSON files, or what else `source.events` may name.")],
    users: Annotated[str, typer.Option(help="The same, of what is known of users.")] = "",
    items: Annotated[str, typer.Option(help="The same, of what is known of items.")] = "",
    out: Annotated[Path, typer.Option(help="Configuration to write.")] = Path("limaml.toml"),
    user_id: Annotated[str, typer.Option(help="Column of the user, or a SQL expression.")] = "",
    item_id: Annotated[str, typer.Option(help="Column of the item, or a SQL expression.")] = "",
    timestamp: Annotated[str, typer.Option(help="Column of the time, or a SQL expression.")] = "",
    label: Annotated[str, typer.Option(help="Boolean or 0/1 column or expression; none: sample what did not happen.")] = "",
    timezone: Annotated[str, typer.Option(help="Where clocks showed times that carry no zone.")] = "",
    result: Annotated[Path | None, _COMMON_RESULT] = None,
) -> None:
    """Look at a table, guess keys, time, label and features, and write a commented configuration; asks where unsure."""
    from limaml.local.init import Answers, init

    answers = Answers(user_id, item_id, timestamp, label, timezone)
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    body = functools.partial(init, table, users, items, out, answers, _prompt if terminal else None)
    raise typer.Exit(_run("init", body, None, [], result, spoken=True))


def _prompt(what: str, guess: str) -> str:
    return str(typer.prompt(what, default=guess or None))


def main() -> None:
    try:
        app()
    except SystemExit as leaving:
        _leave_at_once(leaving.code if isinstance(leaving.code, int) else 1)


def _leave_at_once(code: int) -> None:
    """Run the exit handlers (Ray's among them) and end, without taking torch, Feast and duckdb apart.

    That takes one to three seconds a verb, and ends every log with duckdb's list of what its bindings leak.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
