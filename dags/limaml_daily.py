"""Take in one day and bring the embeddings of its entities up to date: the DAG `limaml_daily`."""

from datetime import timedelta

from airflow.sdk import DAG

from dags.assets import EMBEDDINGS, EVENTS
from dags.parameters import DAG_MACROS, OWNER_LINKS, TASK_DEFAULTS, day_param, from_next_tick
from dags.verb import VerbOperator

DOC = """
### limaml_daily

**Purpose.** Make the vectors of new items, gate one day of events, adapt the entities that have new rows, publish their
embeddings for the champion, and for the version before it while that is ready to be rolled back to; then compare what the day's
requests were scored from with the offline join, measure the day's drift, and drop what is past its retention.

**Inputs.** The source's catalogue and rows of `day`; the champion and the ready version before it; the requests logged on
`day`. Each version is given every day after its own `complete_through`, up to `day`; a day between that was not ingested fails
the run and is named.

**Outputs.** Vectors of new items; the days' partitions, snapshots and embeddings; rows online; each slot's `complete_through`;
metrics, and the tables `consistency/dt=D/` and `drift/dt=D/`.

**Triage.** Each task is one verb: the log shows its argv, run the same in a terminal. The XCom `result` of a failed task
holds its error. *embed_items* skipped: no vector is made here, or no item is new. *ingest* red: the names of the failed
expectations are in the error, the day and its report in `quarantine/`; nothing after it ran; fix the day at its source and
clear the task. *publish* retried with 'busy': another run holds the lease of the online store. *publish* red with 'must hold
embeddings that passed their gate' for the previous version: the champion is published; the log of *adapt* has the reason
(`previous_version_not_adapted`); until it is put right there is nothing fresh to roll back to. *consistency* red: the error
names the view, `differences.parquet` the values; everything was published, and the next day is not held up. *consistency*
skipped: no request was logged. *retain* skipped: nothing was past its retention. A day may be run again at any time: unchanged
data changes nothing.

**Backfill.** Through the UI, by logical date: a run with an empty `day` takes the day before its logical date.
"""

DAY = "--day={{ day_of(params.day, dag_run.logical_date) }}"

with DAG(
    "limaml_daily",
    description="Gate a day, adapt its entities, publish their embeddings",
    doc_md=DOC,
    schedule=from_next_tick("0 1 * * *"),
    catchup=False,
    max_active_runs=1,
    default_args=TASK_DEFAULTS,
    dagrun_timeout=timedelta(hours=6),
    user_defined_macros=DAG_MACROS,
    params={"day": day_param("Day to take in")},
    tags=["limaml", "daily"],
    owner_links=OWNER_LINKS,
) as dag:
    embed_items = VerbOperator(
        task_id="embed_items",
        verb="embed-items",
        doc_md="Make the vectors of new items, where [[transfer]] asks for any.",
        execution_timeout=timedelta(hours=2),
    )
    ingest = VerbOperator(
        task_id="ingest",
        verb="ingest",
        arguments=[DAY],
        doc_md="Gate the day, store it, take its snapshots, log its features.",
        outlets=[EVENTS],
        trigger_rule="none_failed",  # Where no item is new, there is a day all the same.
        execution_timeout=timedelta(hours=1),
    )
    adapt = VerbOperator(
        task_id="adapt",
        verb="adapt",
        arguments=[DAY],
        doc_md="Adapt the entities with new rows, write the partition, gate it.",
        execution_timeout=timedelta(hours=2),
    )
    publish = VerbOperator(
        task_id="publish",
        verb="publish",
        arguments=[DAY],
        doc_md="Publish snapshots, then embeddings; read back; move `complete_through`.",
        outlets=[EMBEDDINGS],
        execution_timeout=timedelta(hours=1),
    )
    # Both also look at a day that was published before (then publish is skipped), but not at one whose publication failed: a
    # run's state is that of its last tasks, and these would turn it green.
    consistency = VerbOperator(
        task_id="consistency",
        verb="consistency",
        arguments=[DAY],
        doc_md="Compare the day's logged requests with the offline join; above the limit it fails.",
        trigger_rule="none_failed",
        execution_timeout=timedelta(hours=1),
    )
    drift = VerbOperator(
        task_id="drift",
        verb="drift",
        arguments=[DAY],
        doc_md="Measure how far the day's features and scores are from the champion's training window.",
        trigger_rule="none_failed",
        execution_timeout=timedelta(hours=1),
    )
    # Values do not stay longer because a day could not be taken in; the other last tasks then keep the run red.
    retain = VerbOperator(
        task_id="retain",
        verb="retain",
        arguments=[DAY],
        doc_md="Drop values, logged requests and refused deliveries that are past their retention.",
        trigger_rule="all_done",
        execution_timeout=timedelta(hours=1),
    )
    embed_items >> ingest >> adapt >> publish >> [consistency, drift, retain]
