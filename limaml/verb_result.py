"""What a verb leaves for the next task: a JSON of at most 4 KiB, as Airflow's XCom and a pod's termination message carry it."""

import bisect
import json
from pathlib import Path
from typing import Any

from limaml.errors import GateError, LimamlError
from limaml.io import atomic

RESULT_LIMIT_BYTES = 4096
_CUT = "... (cut; the log has all of it)"


def describe(error: Exception) -> dict[str, Any]:
    """What a result says of an error."""
    failed = {"failed": list(error.failed)} if isinstance(error, GateError) else {}
    return {"error": type(error).__name__, "message": str(error), **failed}


def leave(path: Path | None, spoken: bool, value: dict[str, Any]) -> None:
    """Write a verb's result to `path`, whole or not at all; without one to standard output, unless the verb speaks itself.

    Raises LimamlError if it is too large.
    """
    text = _fitting(value)
    if path is None:
        if not spoken:
            print(text)
        return
    atomic.write(path, text + "\n")


def _fitting(value: dict[str, Any]) -> str:
    """A result as JSON of at most 4 KiB: names of failed expectations, then the message or reason are cut to fit.

    Raises LimamlError if what else there is does not fit: a verb that succeeded must pass paths, not data.
    """
    for key, limit in (("failed", RESULT_LIMIT_BYTES // 2), ("message", RESULT_LIMIT_BYTES), ("reason", RESULT_LIMIT_BYTES)):
        if key in value:
            value = value | {key: _cut(value, key, limit)}
    if _size_bytes(value) > RESULT_LIMIT_BYTES:
        raise LimamlError(
            f"result of {value['verb']} must be at most {RESULT_LIMIT_BYTES} bytes, got {_size_bytes(value)}; "
            "pass paths, not data"
        )
    return _as_json(value)


def _cut(value: dict[str, Any], key: str, limit_bytes: int) -> Any:
    """`value[key]`, a text or a list, as far as it fits; of `failed` the limit holds for the list alone."""
    whole = value[key]
    mark: Any = [_CUT] if isinstance(whole, list) else f" {_CUT}"
    rest = {} if isinstance(whole, list) else value
    if _size_bytes(rest | {key: whole}) <= limit_bytes:
        return whole
    fits = bisect.bisect_right(range(len(whole)), limit_bytes, key=lambda kept: _size_bytes(rest | {key: whole[:kept] + mark}))
    return whole[: max(fits - 1, 0)] + mark


def _size_bytes(value: dict[str, Any]) -> int:
    # The line ends in a newline.
    return len(_as_json(value).encode()) + 1


def _as_json(value: dict[str, Any]) -> str:
    return json.dumps(value, sort_keys=True)
