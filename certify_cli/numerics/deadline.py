"""Time that may end: long computations ask between their steps, however deep these stand, whether to go on.

A deadline is in force within a block, as `torch.no_grad` is, so that no bound has to hand it on. Once it has passed,
`check` raises `OutOfTime`: what was being computed is lost as a whole, and no result is ever partial. Searches catch it
where they know what they have proved so far.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar


class OutOfTime(Exception):
    """Time ended within a computation."""


def nothing() -> None:
    """An `outer` of which nothing ever ends."""


def unheard(text: str) -> None:
    """A `tell` that nobody listens to."""


class Deadline:
    """The end of the time for some work.

    name: what `passed` says once the seconds are over.   seconds: from now on; None: this deadline has no end itself.
    outer: asks what else ends the work, and gives its name or None.   tell: is called with what is being done.

    ended: the name of what ended the work, once a computation was given up for it; None until then.
    """

    def __init__(
        self,
        name: str = "",
        seconds: float | None = None,
        outer: Callable[[], str | None] = nothing,
        tell: Callable[[str], None] = unheard,
    ) -> None:
        self.ended: str | None = None
        self._name, self._outer, self._tell, self._work = name, outer, tell, ""
        self._end = math.inf if seconds is None else time.monotonic() + seconds

    def passed(self) -> str | None:
        """The name of what has ended, whether or not a computation was given up for it."""
        return self._outer() or (self._name if time.monotonic() >= self._end else None)

    def check(self) -> None:
        """Raise OutOfTime if the deadline has passed."""
        if self.ended is None:
            self.ended = self.passed()
        if self.ended is not None:
            raise OutOfTime

    def begin(self, work: str) -> None:
        """Say which work begins."""
        self._work = work
        self._tell(work)

    def step(self, text: str) -> None:
        """Say which step of the present work begins."""
        self._tell(f"{self._work}, {text}" if self._work else text)

    @contextmanager
    def clock_stopped(self) -> Iterator[None]:
        """The block does not count among the seconds; what else ends the work ends the block, too."""
        left, self._end = self._end - time.monotonic(), math.inf
        try:
            yield
        finally:
            self._end = time.monotonic() + left

    @contextmanager
    def in_force(self) -> Iterator[Deadline]:
        """The deadline that `present` gives within the block."""
        before = _present.set(self)
        try:
            yield self
        finally:
            _present.reset(before)


_present: ContextVar[Deadline] = ContextVar("deadline", default=Deadline())  # noqa: B039  (one that never ends)


def present() -> Deadline:
    """The deadline in force; outside of all blocks one that never ends."""
    return _present.get()


def check() -> None:
    """Raise OutOfTime if the deadline in force has passed."""
    _present.get().check()
