"""The one operator: a CLI verb as a process or as a pod, its result and exit code as the outcome of a task."""

from collections.abc import Collection, Sequence
from typing import Any, Protocol

from airflow.sdk import BaseOperator, Context
from airflow.sdk.configuration import conf
from airflow.sdk.exceptions import AirflowException, AirflowFailException, AirflowSkipException

from dags.process import ProcessRunner

RESULT_KEY = "result"
"""XCom key of the result, pushed whatever the outcome; `make run` and the next task read it."""
EXIT_SKIP = 99
EXITS_WITHOUT_RETRY = (2, 65)


class Runner(Protocol):
    """Where a verb runs."""

    def run(self, arguments: Sequence[str], context: Context) -> tuple[int, dict[str, Any] | None, str]:
        """Run `limaml <arguments> --result=…` to the end; returns exit code, result if any, how it ended without one."""

    def kill(self) -> None:
        """End it; called from a signal handler while `run` runs."""


class VerbOperator(BaseOperator):
    """Run `limaml <verb> <arguments> --result FILE` from an argv list, never through a shell.

    Each element of `arguments` is a template of its own and stays one argument whatever it renders to; one that renders
    to nothing is left out. `shard` adds `--shard=N`, for mapped tasks. With `returns`, that field of the result is the
    task's return value, over which a later task can be mapped; the whole result is under the XCom key `result` either way.

    Exit codes: 0 success; 99 skips what follows, the run stays green; 2 and 65 fail without retry; others are retried.

    `[limaml] runner` (AIRFLOW__LIMAML__RUNNER) says where: `process` (the default), beside Airflow, or `pod`, on Kubernetes.
    """

    template_fields: Collection[str] = ("arguments",)
    ui_color = "#dbe9f6"

    def __init__(
        self, *, verb: str, arguments: Sequence[str] = (), shard: int | None = None, returns: str | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.verb = verb
        self.arguments = list(arguments)
        self.shard = shard
        self.returns = returns
        self._runner: Runner | None = None

    def execute(self, context: Context) -> Any:
        self._runner = self._choose_runner()
        shard = [] if self.shard is None else [f"--shard={self.shard}"]
        arguments = [self.verb, *(argument for argument in self.arguments if argument), *shard]
        exit_code, result, how = self._runner.run(arguments, context)
        if result is None:
            if exit_code == 0:
                raise AirflowFailException(f"limaml {self.verb} succeeded without a result file; every verb must leave one")
            result = {"verb": self.verb, "status": "failed", "error": "NoResult", "message": how}
        context["ti"].xcom_push(RESULT_KEY, result)
        message = f"limaml {self.verb}: {result.get('error', '')}: {result.get('message', '')}"
        if exit_code == EXIT_SKIP:
            raise AirflowSkipException(result.get("reason", "nothing to do"))
        if exit_code in EXITS_WITHOUT_RETRY:
            raise AirflowFailException(message)
        if exit_code != 0:
            raise AirflowException(message)
        return result[self.returns] if self.returns else None

    def on_kill(self) -> None:
        if self._runner is not None:
            self._runner.kill()

    def _choose_runner(self) -> Runner:
        name = conf.get("limaml", "runner", fallback="process")
        if name == "process":
            return ProcessRunner(self.verb, self.log)
        if name == "pod":
            # The provider and its client take seconds to import: a DAG file must not, nor need they be there for processes.
            from dags.pod import PodRunner

            return PodRunner(self.task_id, self.verb, self.execution_timeout, self.log)
        raise AirflowFailException(
            f"[limaml] runner must be process or pod, got {name!r}; set AIRFLOW__LIMAML__RUNNER where the tasks run"
        )
