"""Waiting for the online store: briefly, in few threads, and not at all after it has failed several times."""

import asyncio
import gc
import threading
from contextlib import suppress

import pytest
from structlog.testing import capture_logs

from limaml.config import ServingConfig
from limaml.errors import StoreError
from serving.breaker import Breaker
from serving.store_calls import StoreCalls


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def test_the_breaker_opens_after_failures_in_a_row_and_lets_one_look_up_try():
    clock, told = Clock(), []
    breaker = Breaker(3, 1.0, told.append, clock)
    for _ in range(2):
        breaker.failed(clock())
    breaker.succeeded()
    for _ in range(2):
        breaker.failed(clock())
    assert (breaker.is_open, breaker.allows(), told) == (False, True, [])
    breaker.failed(clock())
    assert (breaker.is_open, breaker.allows(), told) == (True, False, [True])
    clock.now += 1.0
    assert [breaker.allows(), breaker.allows()] == [True, False]
    breaker.failed(clock())
    assert not breaker.allows()
    clock.now += 1.0
    assert breaker.allows()
    breaker.succeeded()
    assert (breaker.is_open, breaker.allows(), told) == (False, True, [True, False])
    breaker.failed(clock())
    assert breaker.allows(), "one failure is not several in a row"


def test_look_ups_that_fail_together_count_once():
    clock = Clock()
    breaker = Breaker(2, 1.0, clock=clock)
    began = clock()
    clock.now += 0.02
    for _ in range(8):
        breaker.failed(began)
    assert not breaker.is_open
    breaker.failed(clock())
    assert breaker.is_open


@pytest.fixture
def release():
    event = threading.Event()
    yield event
    event.set()


def make_calls(**changes):
    return StoreCalls(ServingConfig(**{"store_timeout_s": 0.05, "store_threads": 2, "breaker_failures": 100} | changes))


async def free(calls):
    """What a look-up gives as soon as one is tried again."""
    async with asyncio.timeout(10.0):
        while True:
            try:
                return await calls.call(int, "7")
            except (StoreError, TimeoutError):
                await asyncio.sleep(0)


def test_a_result_and_an_error_come_through():
    async def scene():
        calls = make_calls(store_timeout_s=2.0)
        assert await calls.call(int, "7") == 7
        with pytest.raises(ValueError, match="invalid literal"):
            await calls.call(int, "seven")
        calls.stop()

    asyncio.run(scene())


def test_threads_that_hang_are_abandoned_and_further_look_ups_fail_at_once(release):
    async def scene():
        calls = make_calls()
        for _ in range(2):
            with pytest.raises(TimeoutError):
                await calls.call(release.wait)
        started = []
        for _ in range(50):
            with pytest.raises(StoreError, match="2 reads hang"):
                await calls.call(started.append, 1)
        release.set()
        assert await free(calls) == 7
        assert started == [], "what failed at once was never given to a thread"
        calls.stop()

    asyncio.run(scene())


def test_a_look_up_that_is_not_tried_for_reads_that_hang_is_a_failure_of_the_store(release):
    async def scene():
        calls = make_calls(breaker_failures=4)
        for _ in range(2):
            with pytest.raises(TimeoutError):
                await calls.call(release.wait)
        for _ in range(2):
            with pytest.raises(StoreError, match="2 reads hang"):
                await calls.call(int, "7")
        with pytest.raises(StoreError, match="left alone for now"):
            await calls.call(int, "7")
        calls.stop()

    asyncio.run(scene())


def test_a_read_whose_look_up_was_cancelled_hangs_like_any_other(release):
    """A request that is given up cancels its look-up; the thread is held all the same."""

    async def scene():
        calls = make_calls(store_timeout_s=4.0)
        for _ in range(2):
            looked_up = asyncio.ensure_future(calls.call(release.wait))
            await asyncio.sleep(0)
            looked_up.cancel()
            with pytest.raises(asyncio.CancelledError):
                await looked_up
        with pytest.raises(StoreError, match="2 reads hang"):
            await calls.call(int, "7")
        release.set()
        assert await free(calls) == 7
        calls.stop()

    asyncio.run(scene())


def test_a_failure_is_said_once_until_the_store_was_found_again():
    async def scene():
        cfg = ServingConfig(store_timeout_s=2.0, breaker_failures=2, breaker_open_s=0.01)
        calls = StoreCalls(cfg)

        def fail():
            raise OSError("down")

        async def fail_twice():
            for _ in range(2):
                with pytest.raises(OSError, match="down"):
                    await calls.call(fail)

        async def tried_and_failed():
            with suppress(OSError):
                while True:
                    with suppress(StoreError):
                        await calls.call(fail)
                    await asyncio.sleep(0)

        await fail_twice()
        await asyncio.wait_for(tried_and_failed(), 10.0)  # the breaker is open: a look-up that tries it says nothing new
        assert await free(calls) == 7
        await fail_twice()
        calls.stop()

    with capture_logs() as said:
        asyncio.run(scene())
    assert [one.get("error", one.get("open")) for one in said] == ["OSError: down", True, False, "OSError: down", True]


def test_a_read_that_does_not_block_runs_on_the_loop():
    async def scene():
        calls = make_calls(store_timeout_s=2.0)

        async def read(text):
            await asyncio.sleep(0)
            return int(text)

        assert await asyncio.gather(*(calls.call(read, "7") for _ in range(40))) == [7] * 40
        with pytest.raises(ValueError, match="invalid literal"):
            await calls.call(read, "seven")
        calls.stop()

    asyncio.run(scene())


def test_reads_that_hang_on_the_loop_are_left_to_end_and_bounded():
    async def scene():
        calls, release, ended = make_calls(), asyncio.Event(), []

        async def read(number):
            await release.wait()
            ended.append(number)
            raise OSError("too late to matter")

        for number in range(2):
            with pytest.raises(TimeoutError):
                await calls.call(read, number)
        with pytest.raises(StoreError, match="2 reads hang"):
            await calls.call(read, 2)
        reported = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context))
        release.set()
        assert await free(calls) == 7
        gc.collect()
        assert (ended, reported) == ([0, 1], []), "what a read says that nobody waits for is asked for all the same"
        calls.stop()

    asyncio.run(scene())


def test_a_busy_pool_lets_look_ups_wait_their_turn():
    async def scene():
        calls = make_calls(store_timeout_s=2.0)
        assert await asyncio.gather(*(calls.call(int, "7") for _ in range(40))) == [7] * 40
        calls.stop()

    asyncio.run(scene())


def test_after_failures_in_a_row_the_store_is_left_alone_and_found_again():
    async def scene():
        told, tried = [], []

        def fail():
            tried.append(1)
            raise OSError("down")

        cfg = ServingConfig(store_timeout_s=2.0, breaker_failures=3, breaker_open_s=0.05)
        calls = StoreCalls(cfg, told.append)
        for _ in range(3):
            with pytest.raises(OSError, match="down"):
                await calls.call(fail)
        with pytest.raises(StoreError, match="left alone for now"):
            await calls.call(fail)
        assert (len(tried), told) == (3, [True])

        async def found_again():
            while True:
                try:
                    return await calls.call(int, "7")
                except StoreError:
                    await asyncio.sleep(0)

        assert await asyncio.wait_for(found_again(), 10.0) == 7
        assert told == [True, False]
        calls.stop()

    asyncio.run(scene())
