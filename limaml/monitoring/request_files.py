"""Where the requests that a service logged lie (`serving.log_path`)."""

from datetime import date

from limaml.events.day_store import partition
from limaml.io.storage import Storage


def request_files(requests: Storage, day: date) -> list[str]:
    """Relative paths of the Parquet files of a day; those that are still being written are left out."""
    return [f"{partition(day)}/{name}" for name in requests.list(partition(day)) if not name.startswith(".")]
