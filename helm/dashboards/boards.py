"""The three dashboards: freshness (are embeddings what they should be), serving (is the service well), pipeline (did it run).

Names come from limaml.telemetry; the descriptions say what a reader should think of a number.
"""

from grafana_foundation_sdk.models.dashboard import Dashboard

from helm.dashboards.panels import (
    WHOLE,
    WINDOW,
    Query,
    age,
    board,
    buckets,
    latest,
    lines,
    per_second,
    quantiles,
    rows,
)
from limaml import telemetry as names


def freshness() -> Dashboard:
    looked_up = names.LOOKUPS_TOTAL
    of_all = f"/ on (kind) group_left sum by (kind) (rate({looked_up}[{WINDOW}]))"
    share = f"sum by (kind, status) (rate({looked_up}[{WINDOW}])) {of_all}"
    return board(
        "limaml-freshness",
        "LiMAML / freshness",
        "Are people served with the embedding that the data published so far would give them?",
        [
            lines(
                "Look-ups by status",
                "Share of look-ups. Everything but `fresh` (and `stale`, where the task kind says `use`) is answered with the "
                "prior: still an answer, without personalisation.",
                Query(share, "{{kind}} {{status}}"),
                unit="percentunit",
                top=1,
            ),
            lines(
                "Freshness lag at serve time",
                "Age of what is known to be exact: now - max(the row's as_of, the slot's complete_through). One to two days is "
                "normal with daily runs; beyond max_lag_s a look-up is stale.",
                *quantiles(names.LAG_SECONDS, "kind"),
                unit="s",
            ),
            lines(
                "Age of complete_through",
                "Since the end of the last day that was published whole, by slot. It falls by a day when a daily run ends.",
                age(names.COMPLETE_THROUGH_SECONDS, "slot"),
                unit="s",
            ),
            lines(
                "Time since the last publication",
                "Since `limaml publish` last ended well, by task kind. More than a day: a daily run is missing.",
                age(names.LAST_PUBLISHED_SECONDS, "kind"),
                unit="s",
            ),
            lines(
                "Published entities by age of their newest row",
                "Active entities of the slot that serves. A growing `older` is people leaving, not staleness.",
                latest(names.PUBLISHED_ENTITIES, "kind", "state"),
                unit="short",
            ),
            lines(
                "Inactivity at serve time",
                "Since the last event of the person who asked. Reported only: a silent person's embedding is exact.",
                *quantiles(names.INACTIVITY_SECONDS, "kind"),
                unit="s",
            ),
        ],
    )


def serving() -> Dashboard:
    answered, by_arm = names.REQUESTS_TOTAL, names.ARM_REQUESTS_TOTAL
    of_arm = f"sum by (arm, answer) (rate({by_arm}[{WINDOW}]))"
    failed = f'(sum(rate({answered}{{code=~"5.."}}[{WINDOW}])) or vector(0))'
    return board(
        "limaml-serving",
        "LiMAML / serving",
        "Is the ranking service answering, how fast, and from which model version?",
        [
            lines("Requests by code", "Answers a second.", per_second(answered, "code"), unit="reqps"),
            lines(
                "Error share",
                "Share of answers with 5xx. 503 is overload or a service without any champion.",
                Query(f"{failed} / sum(rate({answered}[{WINDOW}]))", "5xx"),
                unit="percentunit",
            ),
            lines("Latency by stage", "`total` is what a caller waits for.", *quantiles(names.RANK_SECONDS, "stage"), unit="s"),
            lines("Candidates of a request", "Cost follows this number.", *quantiles(names.RANK_CANDIDATES), unit="short"),
            buckets(
                "Scores",
                "Scores given, as a heatmap. A band that moves at a cut-over is the new version; otherwise look at drift.",
                Query(f"sum by (le) (increase({names.SCORE}_bucket[{WINDOW}]))", "{{le}}"),
            ),
            lines("Score quantiles", "The same scores as two lines.", *quantiles(names.SCORE), unit="percentunit", top=1),
            rows(
                "Model that serves",
                "One row in the steady state, two while replicas switch.",
                Query(f"count by (version, slot) ({names.MODEL_INFO} == 1)", "{{version}} {{slot}}"),
            ),
            lines(
                "Champion cannot be loaded",
                "1 while the registry's champion cannot be loaded and the version before it goes on serving.",
                latest(names.CHAMPION_LOAD_FAILED, name="load failed"),
                unit="short",
                top=1,
            ),
            lines(
                "Online store left alone",
                "1 while the circuit breaker is open: look-ups are not tried and the prior answers.",
                latest(names.STORE_BREAKER_OPEN, name="breaker open"),
                unit="short",
                top=1,
            ),
            lines(
                "Time since the registry answered",
                "Of the replica that waits longest. A few seconds is normal.",
                Query(f"time() - min({names.REGISTRY_POLL_SECONDS} > 0)", "registry"),
                unit="s",
            ),
            lines(
                "Categories that training never saw",
                "A second, by feature, of users and requests. A rise is a new category, or a column written otherwise.",
                per_second(names.UNKNOWN_CATEGORIES_TOTAL, "feature"),
                unit="short",
                span=WHOLE,
            ),
            lines(
                "Requests by arm",
                "A second, of an experiment. Shares unlike the configured: a broken split; `limaml compare-arms` tests it.",
                per_second(names.ARM_REQUESTS_TOTAL, "arm"),
                unit="reqps",
            ),
            lines(
                "Answers of an arm",
                "Share of an arm's requests by what answered. `other_version`: the version that the arm asks for is not there.",
                Query(f"{of_arm} / on (arm) group_left sum by (arm) (rate({by_arm}[{WINDOW}]))", "{{arm}} {{answer}}"),
                unit="percentunit",
                top=1,
            ),
            lines(
                "Latency by arm",
                "Of ranking alone. An arm that is slower is judged with its slowness.",
                *quantiles(names.ARM_SECONDS, "arm"),
                unit="s",
                span=WHOLE,
            ),
        ],
    )


def pipeline() -> Dashboard:
    return board(
        "limaml-pipeline",
        "LiMAML / pipeline",
        "Did the batch verbs run, and do offline and online agree? Written by the verbs themselves, when they end.",
        [
            lines(
                "Time since a verb ended",
                "By verb and outcome. A `failed` line lower than the `ok` line of the same verb: its last run failed.",
                age(names.VERB_FINISHED_SECONDS, "verb", "status"),
                unit="s",
            ),
            lines("Duration of a verb", "Of its last run.", latest(names.VERB_SECONDS, "verb"), unit="s"),
            lines(
                "Offline/online mismatch and missing",
                "Share of logged values unlike the offline join, and of logged rows that it does not have. Both should be 0.",
                latest(names.MISMATCH_RATIO, "view", name="mismatch"),
                latest(names.MISSING_RATIO, "view", name="missing"),
                unit="percentunit",
            ),
            lines(
                "Largest difference offline/online",
                "Of any number compared, by view.",
                latest(names.MAX_DIFFERENCE, "view"),
                unit="short",
            ),
            lines(
                "Requests compared",
                "Logged requests of the last consistency check: with few, the shares above say little.",
                latest(names.CONSISTENCY_REQUESTS, name="requests"),
                unit="short",
            ),
            lines(
                "Drift of scores (PSI)",
                "Against the training window. Below 0.1 nothing, above 0.25 another distribution.",
                latest(names.SCORE_DRIFT_PSI, name="scores"),
                unit="short",
            ),
            lines(
                "Drift of features (PSI)",
                "Against the training window, by feature; read as above.",
                latest(names.FEATURE_DRIFT_PSI, "feature"),
                unit="short",
                span=WHOLE,
            ),
            lines(
                "Drift of item vectors (energy)",
                "Against the training window, by feature: 0 is one distribution, above 0.1 other items are shown.",
                latest(names.VECTOR_DRIFT, "feature"),
                unit="short",
                span=WHOLE,
            ),
        ],
    )


BOARDS = {"freshness": freshness, "serving": serving, "pipeline": pipeline}
