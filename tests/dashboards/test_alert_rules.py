"""Each alert before and after it fires, alone, by `promtool test rules`; and its texts and runbook page."""

import re
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

from limaml import cli, telemetry

ROOT = Path(__file__).parents[2]
RULES = ROOT / "helm" / "limaml" / "files" / "rules" / "limaml.yaml"
ALERTS = {rule["alert"]: rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]}
WANTED = {
    "LimamlEmbeddingsStale",
    "LimamlPublishingStopped",
    "LimamlFallbackShareHigh",
    "LimamlVersionMismatch",
    "LimamlErrorRateHigh",
    "LimamlLatencyHigh",
    "LimamlScoreDrift",
    "LimamlVectorDrift",
    "LimamlOfflineOnlineMismatch",
    "LimamlChampionLoadFailed",
}
MINUTES = 3000  # longer than every window but the week


def always(value):
    return f"{value}+0x{MINUTES}"


def growing(a_minute, start=0):
    return f"{start}+{a_minute}x{MINUTES}"


def lookups(status):
    return f'limaml_meta_embedding_lookups_total{{kind="user",status="{status}"}}'


PUBLISHED = 'limaml_last_published_timestamp_seconds{kind="user"}'
SERVES = 'limaml_model_info{version="3",slot="blue"}'
OK, FAILED = 'limaml_rank_requests_total{code="200"}', 'limaml_rank_requests_total{code="500"}'
FAST, SLOW = (f'limaml_rank_seconds_bucket{{stage="total",le="{le}"}}' for le in ("0.05", "+Inf"))
SLOWER = 'limaml_rank_seconds_bucket{stage="total",le="0.2"}'
MISMATCH = 'limaml_offline_online_mismatch_ratio{view="user_features"}'
MISSING = 'limaml_offline_online_missing_ratio{view="user_features"}'
# promtool's clock starts at 0, so what grows by 60 a minute is an instant that keeps up with it.
HEALTHY = {
    lookups("fresh"): growing(75),
    lookups("missing"): growing(25),
    **{lookups(status): always(0) for status in ("stale", "version_mismatch", "store_error")},
    PUBLISHED: growing(60),
    SERVES: always(1),
    'limaml_model_info{version="2",slot="green"}': always(0),
    OK: growing(100),
    FAILED: always(0),
    FAST: growing(100),
    SLOWER: growing(100),
    SLOW: growing(100),
    "limaml_champion_load_failed": always(0),
    "limaml_registry_poll_timestamp_seconds": growing(60),
    "limaml_score_drift_psi": always(0.05),
    MISMATCH: always(0),
    MISSING: always(0),
}


@dataclass(frozen=True)
class Case:
    """A state from minute 0 on (None takes a series away); nothing fires at `before`, `alert` and nothing else at `after`."""

    alert: str
    state: dict[str, str | None]
    before: str
    after: str
    summary: str
    labels: dict[str, str] = field(default_factory=dict)


KIND = {"kind": "user"}
CASES = [
    Case(
        "LimamlEmbeddingsStale",
        {lookups("fresh"): growing(65), lookups("stale"): growing(10)},
        "10m",
        "12m",
        "10% of user look-ups find an embedding older than allowed.",
        KIND,
    ),
    Case(
        "LimamlPublishingStopped",
        {PUBLISHED: always(0)},
        "26h14m",
        "26h16m",
        "No user embeddings were published for 1d 2h 16m 0s; they go stale if nobody acts.",
        KIND,
    ),
    Case(  # after a day and a half as usual, the rows are gone
        "LimamlFallbackShareHigh",
        {
            lookups("fresh"): f"0+75x2160 {75 * 2160}+0x840",
            lookups("missing"): f"0+25x2160 {25 * 2160 + 100}+100x840",
        },
        "36h20m",
        "37h",
        "100% of user look-ups find no embedding, far more than usual.",
        KIND,
    ),
    Case(  # a service that never found one
        "LimamlFallbackShareHigh",
        {lookups("fresh"): growing(1), lookups("missing"): growing(99)},
        "15m",
        "17m",
        "99% of user look-ups find no embedding, far more than usual.",
        KIND,
    ),
    Case(
        "LimamlVersionMismatch",
        {lookups("fresh"): growing(73), lookups("version_mismatch"): growing(2)},
        "5m",
        "7m",
        "2% of user look-ups find an embedding of another model version.",
        KIND,
    ),
    Case(
        "LimamlBatchMetricsMissing",
        {PUBLISHED: None},
        "59m",
        "61m",
        "Nobody can tell whether embeddings are still published, because the batch metrics are gone.",
    ),
    Case("LimamlNothingServes", {SERVES: always(0)}, "4m", "6m", "No ranking service with a model answers Prometheus."),
    Case(
        "LimamlOnlineStoreDown",
        {lookups("fresh"): growing(65), lookups("store_error"): growing(10)},
        "2m",
        "4m",
        "10% of user look-ups get no usable answer from the online store.",
        KIND,
    ),
    Case(
        "LimamlErrorRateHigh",
        {OK: growing(95), FAILED: growing(5)},
        "5m",
        "7m",
        "5% of ranking requests fail.",
    ),
    Case(
        "LimamlLatencyHigh",
        {FAST: growing(97), SLOWER: growing(100), SLOW: growing(100)},
        "10m",
        "12m",
        "One request in a hundred takes longer than 150ms.",
    ),
    Case(
        "LimamlChampionLoadFailed",
        {"limaml_champion_load_failed": always(1)},
        "4m",
        "6m",
        "The newest champion cannot be loaded; the version before it goes on serving.",
    ),
    Case(
        "LimamlRegistryUnreachable",
        {"limaml_registry_poll_timestamp_seconds": always(0)},
        "10m",
        "12m",
        "A ranking service has not reached the model registry for 12m 0s.",
    ),
    Case(
        "LimamlScoreDrift",
        {"limaml_score_drift_psi": always(0.3)},
        "59m",
        "61m",
        "Scores are no longer distributed as in training (PSI 0.30).",
    ),
    Case(
        "LimamlVectorDrift",
        {'limaml_vector_drift_energy{feature="text"}': always(0.2)},
        "59m",
        "61m",
        "Items with other vectors of text are shown than in training (energy 0.20).",
        {"feature": "text"},
    ),
    Case(
        "LimamlOfflineOnlineMismatch",
        {MISMATCH: always(0.002)},
        "14m",
        "16m",
        "0.2% of what was served of user_features is not what the offline join gives.",
        {"view": "user_features"},
    ),
    Case(
        "LimamlOfflineOnlineMismatch",
        {MISSING: always(0.02)},
        "14m",
        "16m",
        "2% of what was served of user_features is not what the offline join gives.",
        {"view": "user_features"},
    ),
]
# Just below every threshold, for ever.
ALMOST = {
    lookups("fresh"): f"0+64.7x1000 64700+45.7x{MINUTES - 1000}",
    lookups("stale"): growing(4.9),
    lookups("missing"): f"0+25x1000 25000+44x{MINUTES - 1000}",
    lookups("version_mismatch"): growing(0.9),
    lookups("store_error"): growing(4.5),
    PUBLISHED: f"0+60x{MINUTES - 1500} {60 * (MINUTES - 1500)}+0x1500",
    OK: growing(98.5),
    FAILED: growing(1.5),
    FAST: growing(99.2),
    "limaml_score_drift_psi": always(0.25),
    MISMATCH: always(0.001),
    MISSING: always(0.001),
}


@pytest.fixture(scope="module")
def promtool():
    program = shutil.which("promtool")
    if program is None:
        pytest.fail("promtool must be installed for this test: apt-get install prometheus")
    return program


def run(promtool, folder, state, expected):
    """`expected`: time -> the case that must fire then, or None for silence."""
    series = {**HEALTHY, **state}
    checks = [
        {"eval_time": time, "alertname": alert, "exp_alerts": [fired(case)] if case and case.alert == alert else []}
        for time, case in expected.items()
        for alert in ALERTS
    ]
    tests = {
        "rule_files": [str(RULES)],
        "evaluation_interval": "1m",
        "tests": [
            {
                "interval": "1m",
                "input_series": [{"series": name, "values": values} for name, values in series.items() if values],
                "alert_rule_test": checks,
            }
        ],
    }
    path = folder / "alerts.yaml"
    path.write_text(yaml.safe_dump(tests))
    done = subprocess.run([promtool, "test", "rules", str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def fired(case):
    rule = ALERTS[case.alert]
    return {
        "exp_labels": {**rule["labels"], **case.labels},
        "exp_annotations": {**rule["annotations"], "summary": case.summary},
    }


@pytest.mark.services
def test_prometheus_accepts_the_rules(promtool):
    done = subprocess.run([promtool, "check", "rules", "--lint-fatal", str(RULES)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(ALERTS)} rules found" in done.stdout


@pytest.mark.services
def test_nothing_fires_while_all_is_well(promtool, tmp_path):
    run(promtool, tmp_path, {}, dict.fromkeys(["1m", "20m", "2h", f"{MINUTES}m"]))


@pytest.mark.services
def test_nothing_fires_just_below_every_threshold(promtool, tmp_path):
    run(promtool, tmp_path, ALMOST, dict.fromkeys(["2h", "17h40m", f"{MINUTES}m"]))


@pytest.mark.services
@pytest.mark.parametrize("case", CASES, ids=[f"{case.alert}-{at}" for at, case in enumerate(CASES)])
def test_an_alert_fires_after_its_time_and_alone(promtool, tmp_path, case):
    run(promtool, tmp_path, case.state, {case.before: None, case.after: case})


def test_every_alert_that_is_wanted_is_there_and_has_a_case():
    assert set(ALERTS) >= WANTED
    assert {case.alert for case in CASES} == set(ALERTS)


def test_a_rule_asks_only_for_metrics_that_exist():
    names = metric_names()
    for alert, rule in ALERTS.items():
        used = set(re.findall(r"\blimaml_\w+", rule["expr"]))
        assert used, alert
        assert {name.removesuffix("_bucket") for name in used} <= names, alert


def metric_names():
    return {value for value in vars(telemetry).values() if isinstance(value, str) and value.startswith("limaml_")}


@pytest.mark.parametrize("alert", ALERTS)
def test_an_alert_says_what_is_wrong_and_where_to_read_on(alert):
    rule = ALERTS[alert]
    assert rule["labels"]["severity"] in ("critical", "warning")
    assert rule["annotations"]["summary"].endswith(".")
    assert rule["annotations"]["description"].endswith(".")
    assert rule["annotations"]["runbook_url"] == f"docs/runbooks/{alert}.md"
    page = (ROOT / "docs" / "runbooks" / f"{alert}.md").read_text()
    assert page.startswith(f"# {alert}\n")
    for heading in ("## What it means", "## What users notice", "## First look", "## Remedies", "## Escalate"):
        assert f"\n{heading}\n" in page
    assert set(re.findall(r"\blimaml_[a-z_]+", page)) <= {
        name + suffix for name in metric_names() for suffix in ("", "_bucket", "_count", "_sum")
    } | {"limaml_train", "limaml_daily"}
    index = (ROOT / "docs" / "runbooks" / "README.md").read_text()
    assert f"[{alert}]({alert}.md) | {rule['labels']['severity']} |" in index


def test_runbooks_name_only_verbs_that_exist():
    verbs = {command.name for command in cli.app.registered_commands}
    for page in (ROOT / "docs" / "runbooks").glob("*.md"):
        named = set(re.findall(r"`limaml ([a-z-]+)", page.read_text()))
        assert named <= verbs, page.name
