"""A circuit breaker: after several failures in a row the store is left alone for a while, then one look-up tries it.

Look-ups that were under way together when one failed say the same thing: of them one counts. Otherwise one stall, late for
eight requests at a time, would open the breaker.
"""

import time
from collections.abc import Callable


class Breaker:
    """Counts failures in a row; used by one thread, the event loop's."""

    def __init__(
        self,
        failures: int,
        open_s: float,
        on_change: Callable[[bool], object] = bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`on_change` is told whenever the breaker opens (True) or closes (False)."""
        self._failures = failures
        self._open_s = open_s
        self._on_change = on_change
        self._clock = clock
        self._in_a_row = 0
        self._last_failure = float("-inf")
        self._next_try = 0.0
        self.is_open = False

    def allows(self) -> bool:
        """Whether a look-up may be tried; while open, one every `open_s`, whatever becomes of it."""
        if not self.is_open:
            return True
        now = self._clock()
        if now < self._next_try:
            return False
        self._next_try = now + self._open_s
        return True

    def succeeded(self) -> None:
        self._in_a_row = 0
        if self.is_open:
            self.is_open = False
            self._on_change(False)

    def failed(self, began: float) -> None:
        """A look-up that began at `began` (of the clock) failed, or was late."""
        if began < self._last_failure:
            return
        self._last_failure = self._clock()
        self._in_a_row += 1
        if self._in_a_row >= self._failures and not self.is_open:
            self.is_open = True
            self._next_try = self._clock() + self._open_s
            self._on_change(True)
