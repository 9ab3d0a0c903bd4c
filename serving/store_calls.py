"""Reads of the online store from the event loop: waited for briefly, few of them when they hang, behind a circuit breaker.

A read that blocks (SQLite's) runs in a bounded pool of threads, one that does not (Redis') on the loop. Either way the wait is
abandoned, not the read: a slow connection is ready for the next one. When as many hang as there may be threads, further
look-ups fail at once, so that what a hanging store can hold is bounded.
"""

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from limaml import telemetry
from limaml.config import ServingConfig
from limaml.errors import StoreError
from serving.breaker import Breaker

log = telemetry.get_logger(__name__)

Job = Future[Any] | asyncio.Task[Any]


class StoreCalls:
    """Runs reads; one for all slots and model versions of a process, as there is one store."""

    def __init__(self, cfg: ServingConfig, on_breaker: Callable[[bool], object] = bool) -> None:
        """`on_breaker` is told whether look-ups are not tried (True) or are again (False)."""
        self.breaker = Breaker(cfg.breaker_failures, cfg.breaker_open_s, self._changed)
        self._timeout_s = cfg.store_timeout_s
        self._threads = cfg.store_threads
        self._on_breaker = on_breaker
        self._pool = ThreadPoolExecutor(cfg.store_threads, thread_name_prefix="online-store")
        self._abandoned = 0
        self._lock = threading.Lock()
        self._last_error = ""

    async def call(self, read: Callable[..., Any], *arguments: Any) -> Any:
        """What `read`, a blocking or a coroutine function, returns. Raises StoreError while the breaker is open or too many
        reads hang, TimeoutError after `store_timeout_s`, and whatever `read` raises; these two count as the store's failure.
        """
        if not self.breaker.allows():
            raise StoreError("the online store failed several times in a row and is left alone for now")
        began = time.monotonic()
        if self._abandoned >= self._threads:
            self.breaker.failed(began)
            raise StoreError(f"{self._threads} reads hang in the online store; this look-up is not tried")
        loop = asyncio.get_running_loop()
        # Neither asyncio's `wrap_future` nor its time-outs, which would cancel the job with the wait: a cancelled job counts as
        # done while it still stands in the pool's queue, and costs Redis a connection.
        answer: asyncio.Future[Any] = loop.create_future()
        timer = loop.call_later(self._timeout_s, _expire, answer)
        job: Job
        if asyncio.iscoroutinefunction(read):
            job = loop.create_task(read(*arguments))
            job.add_done_callback(lambda job: _hand_over(job, answer))
        else:
            job = self._pool.submit(read, *arguments)
            job.add_done_callback(lambda job: None if loop.is_closed() else loop.call_soon_threadsafe(_hand_over, job, answer))
        try:
            result = await answer
        except Exception as error:
            self._abandon(job)
            self._failed(error, began)
            raise
        except BaseException:
            self._abandon(job)
            raise
        finally:
            timer.cancel()
        self.breaker.succeeded()
        return result

    def stop(self) -> None:
        """Take no more reads; one that hangs is left behind."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _abandon(self, job: Job) -> None:
        """Nobody waits for `job` any more; it counts until it ends."""
        with self._lock:
            self._abandoned += 1
        job.add_done_callback(self._ended)

    def _ended(self, _: Any) -> None:
        with self._lock:
            self._abandoned -= 1

    def _failed(self, error: Exception, began: float) -> None:
        message = f"{type(error).__name__}: {error}"
        if message != self._last_error:  # once for a series of equal errors
            log.warning("online_store_failed", error=message)
        self._last_error = message
        self.breaker.failed(began)

    def _changed(self, is_open: bool) -> None:
        log.warning("online_store_breaker", open=is_open)
        if not is_open:
            self._last_error = ""
        self._on_breaker(is_open)


def _expire(answer: asyncio.Future[Any]) -> None:
    if not answer.done():
        answer.set_exception(TimeoutError("the online store did not answer within store_timeout_s"))


def _hand_over(job: Job, answer: asyncio.Future[Any]) -> None:
    """From the read that has ended to the look-up that waits, on its loop."""
    if job.cancelled():
        if not answer.done():
            answer.set_exception(StoreError("the service is ending and reads no more"))
        return
    error = job.exception()  # asked for in any case: asyncio reports one that nobody did
    if answer.done():
        return
    if error:
        answer.set_exception(error)
    else:
        answer.set_result(job.result())
