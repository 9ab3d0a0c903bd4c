"""Waiting for what another process or thread does: look again until a deadline."""

import asyncio
import time

# For what a running server does at its next poll, on a busy machine.
DEADLINE_S = 30.0


def wait_for(condition, what, deadline_s=DEADLINE_S):
    """Poll until `condition()` is true; what it returned is returned."""
    end = time.monotonic() + deadline_s
    while time.monotonic() < end:
        value = condition()
        if value:
            return value
        time.sleep(0.02)
    raise AssertionError(f"{what} did not happen within {deadline_s} s")


async def until(condition, deadline_s=DEADLINE_S):
    """As `wait_for`, of what happens on the event loop that runs."""
    async with asyncio.timeout(deadline_s):
        while not condition():
            await asyncio.sleep(0.01)
