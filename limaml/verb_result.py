"""What a verb leaves for the next task: a JSON of at most 4 KiB, as Airflow's XCom and a pod's termination message carry it."""

import bisect
import errno
import json
from pathlib import Path
from typing import Any

from limaml.errors import GateError, LimamlError
from limaml.io import atomic

RESULT_LIMIT_BYTES = 4096
_CUT = "... (cut; the log has all of it) ..."
_IN_PLACE = (errno.EBUSY, errno.EACCES, errno.EPERM, errno.EROFS)


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
    _write(path, text + "\n")


def _write(path: Path, text: str) -> None:
    """A pod's termination message (/dev/termination-log) is a file mounted by itself: nothing can be renamed over it (EBUSY),
    nor may a user who is not root make a file beside it. It is read once the process has ended, so written in place it is
    whole, too.
    """
    try:
        atomic.write(path, text)
    except OSError as error:
        if error.errno not in _IN_PLACE or not path.exists():
            raise
        path.write_text(text)


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
    """`value[key]` as far as it fits: a list's beginning, both ends of a text, since a message ends with the remedy.

    Of `failed` the limit holds for the list alone.
    """
    whole = value[key]
    rest = {} if isinstance(whole, list) else value
    if _size_bytes(rest | {key: whole}) <= limit_bytes:
        return whole

    def shortened(kept: int) -> Any:
        if isinstance(whole, list):
            return [*whole[:kept], _CUT]
        return f"{whole[:kept]} {_CUT} {whole[len(whole) - kept :]}"

    most = len(whole) if isinstance(whole, list) else len(whole) // 2
    fits = bisect.bisect_right(range(most), limit_bytes, key=lambda kept: _size_bytes(rest | {key: shortened(kept)}))
    return shortened(max(fits - 1, 0))


def _size_bytes(value: dict[str, Any]) -> int:
    # The line ends in a newline.
    return len(_as_json(value).encode()) + 1


def _as_json(value: dict[str, Any]) -> str:
    return json.dumps(value, sort_keys=True)
