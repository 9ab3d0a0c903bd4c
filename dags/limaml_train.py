"""Train a candidate, judge it, and put its embeddings online: the DAG `limaml_train`."""

from datetime import timedelta

from airflow.sdk import DAG, Param

from dags.assets import EMBEDDINGS, EVENTS, MODEL
from dags.parameters import DAG_MACROS, OWNER_LINKS, TASK_DEFAULTS, day_param, from_next_tick
from dags.verb import VerbOperator

DOC = """
### limaml_train

**Purpose.** Make the vectors of new items, meta-train on all events through one day, judge the candidate against the baselines
and the champion, and, if it is promoted, fill the idle embedding slot and cut over to it.

**Inputs.** The source's catalogue and its days up to `through`; the configuration. No event after `through` is read.

**Outputs.** Vectors of new items; day partitions and snapshots; a model version with its report; a filled slot; the alias
`champion`.

**Triage.** Each task is one verb: the log shows its argv, run the same in a terminal. The XCom `result` of a failed task
holds its error. *embed_items* skipped: no vector is made here, or no item is new. *ingest* red: a day failed its gate and
lies in `quarantine/` with a report; fix the source, run again. *train* red: the log names the step and the tasks of a
non-finite loss. *evaluate* skipped: the candidate was refused, the reasons are in its result and in MLflow, the champion
stays. *plan_fill* or *cut_over* retried with 'busy': another run holds the lease of the online store. *cut_over* red with 'is
complete through': the champion has days that could not be published for the new version; the error names what failed. Every
task may be cleared and run again. A champion that disappoints: `limaml rollback`.
"""

THROUGH = "{{ day_of(params.through, dag_run.logical_date) }}"
# The run's own settings go to every verb that reads them: a candidate is trained and judged under one configuration.
OVERRIDES = (
    "{{ '' if params.inner_steps is none else '--set=meta.inner_steps=%d' % params.inner_steps }}",
    "{{ '' if params.workers is none else '--set=training.num_workers=%d' % params.workers }}",
)
CANDIDATE = "--candidate={{ ti.xcom_pull(task_ids='train', key='result')['candidate'] }}"
VERSION = "--version={{ ti.xcom_pull(task_ids='evaluate', key='result')['version'] }}"

with DAG(
    "limaml_train",
    description="Meta-train, judge, fill the idle slot, cut over",
    doc_md=DOC,
    schedule=from_next_tick("0 3 * * 1"),
    catchup=False,
    max_active_runs=1,
    default_args=TASK_DEFAULTS,
    dagrun_timeout=timedelta(hours=12),
    user_defined_macros=DAG_MACROS,
    params={
        "through": day_param("Last day to read"),
        "inner_steps": Param(
            None, type=["null", "integer"], minimum=0, maximum=50, title="Inner steps", description="Empty: as configured."
        ),
        "workers": Param(
            None,
            type=["null", "integer"],
            minimum=1,
            maximum=1024,
            title="Training workers",
            description="Empty: as configured.",
        ),
    },
    tags=["limaml", "training"],
    owner_links=OWNER_LINKS,
) as dag:
    apply = VerbOperator(
        task_id="apply",
        verb="apply",
        doc_md="Register entities, views and services with Feast.",
        execution_timeout=timedelta(minutes=10),
    )
    embed_items = VerbOperator(
        task_id="embed_items",
        verb="embed-items",
        doc_md="Make the vectors of new items, where [[transfer]] asks for any.",
        execution_timeout=timedelta(hours=8),
    )
    ingest = VerbOperator(
        task_id="ingest",
        verb="ingest",
        arguments=[f"--through={THROUGH}"],
        doc_md="Gate and store the days not stored yet, with snapshots and logged features.",
        outlets=[EVENTS],
        trigger_rule="none_failed",  # Where no item is new, there may be days all the same.
        execution_timeout=timedelta(hours=2),
    )
    train = VerbOperator(
        task_id="train",
        verb="train",
        arguments=[f"--through={THROUGH}", *OVERRIDES],
        doc_md="Train the twin with early stopping, refit on all rows; leaves a candidate folder.",
        execution_timeout=timedelta(hours=8),
    )
    evaluate = VerbOperator(
        task_id="evaluate",
        verb="evaluate",
        arguments=[CANDIDATE, *OVERRIDES],
        doc_md="Judge the candidate; register it if it passes, skip what follows if it is refused.",
        outlets=[MODEL],
        execution_timeout=timedelta(hours=2),
    )
    plan_fill = VerbOperator(
        task_id="plan_fill",
        verb="plan-fill",
        arguments=[VERSION, f"--through={THROUGH}"],
        returns="shards",
        doc_md="Retire what held the idle slot, empty it, and divide the active entities into shards.",
        execution_timeout=timedelta(minutes=30),
    )
    fill = VerbOperator.partial(
        task_id="fill",
        verb="fill",
        arguments=[VERSION],
        doc_md="One shard: adapt, write the partition, gate it, publish it into the slot, read back.",
        outlets=[EMBEDDINGS],
        execution_timeout=timedelta(hours=2),
    ).expand(shard=plan_fill.output)
    cut_over = VerbOperator(
        task_id="cut_over",
        verb="cut-over",
        arguments=[VERSION],
        doc_md="Check that the slot is complete, publish the days it lacks, then move the alias `champion`.",
        execution_timeout=timedelta(minutes=30),
    )
    apply >> embed_items >> ingest >> train >> evaluate >> plan_fill >> fill >> cut_over
