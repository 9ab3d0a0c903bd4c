"""Every error this project raises on purpose, and the exit code each one means.

    LimamlError                 1   anything a retry may cure
    ├── ConfigError             2   a setting is missing, unknown or out of range
    ├── DataError              65   data breaks its contract; a retry cannot help
    │   ├── GateError          65   a quality gate failed; carries the names of what failed
    │   ├── UnreadableDayError 65   a delivered day is not readable Parquet; carries its bytes
    │   └── BundleError        65   a model bundle is missing a part or is corrupt
    ├── TrainingError          65   training cannot go on (non-finite loss)
    ├── StoreError              1   a store or registry did not answer as it should
    └── BusyError               1   somebody else holds the lease
    NothingToDo                99   not an error: the work is done already, or was refused; downstream is skipped

A message names the thing, the rule, the value received and the remedy.
"""

from collections.abc import Sequence


class LimamlError(Exception):
    """Root of the tree; `exit_code` is what the command line ends with."""

    exit_code = 1


class ConfigError(LimamlError):
    exit_code = 2


class DataError(LimamlError):
    exit_code = 65


class GateError(DataError):
    """A quality gate failed; `failed` names the expectations, for the log and for Airflow."""

    def __init__(self, message: str, failed: Sequence[str]) -> None:
        super().__init__(message)
        self.failed = tuple(failed)


class UnreadableDayError(DataError):
    """A delivered file cannot be read; `raw` is what it holds, for the quarantine."""

    def __init__(self, message: str, raw: bytes) -> None:
        super().__init__(message)
        self.raw = raw


class BundleError(DataError):
    pass


class TrainingError(LimamlError):
    exit_code = 65


class StoreError(LimamlError):
    pass


class BusyError(LimamlError):
    pass


class NothingToDo(Exception):  # noqa: N818 - it is no error
    """The verb has nothing to do (`reason` says why); Airflow skips what follows and the run stays green."""

    exit_code = 99

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason
