"""SIGINT and SIGTERM: they end a command at once, or, where work would be lost, with what is proved by then."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from certify_cli.records import SIGNAL

Handler = Callable[[int, FrameType | None], None]


class Stopped(BaseException):
    """SIGINT or SIGTERM arrived. Not an Exception: only `main` may catch it. hint: ends the sentence on stderr."""

    def __init__(self, number: int, hint: str = "") -> None:
        self.number, self.hint = number, hint


class Flag:
    """The number of the signal that has arrived, or None."""

    number: int | None = None

    def halted(self) -> str | None:
        """SIGNAL if one has arrived: what ends a run early, as records name it."""
        return None if self.number is None else SIGNAL

    def stop(self, hint: str) -> None:
        """Raise `Stopped` if a signal has arrived."""
        if self.number is not None:
            raise Stopped(self.number, hint)


@contextmanager
def at_once() -> Iterator[None]:
    """A signal becomes `Stopped`; a second one ends the process. Ignored signals stay ignored."""

    def stop(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        raise Stopped(number)

    with _handled_by(stop):
        yield


@contextmanager
def noted() -> Iterator[Flag]:
    """A signal sets the flag, so that the work can end with what is proved by then; a second one stops at once."""
    flag = Flag()

    def note(number: int, frame: FrameType | None) -> None:
        if flag.number is not None:
            raise Stopped(number)
        flag.number = number

    with _handled_by(note):
        yield flag


@contextmanager
def _handled_by(handler: Handler) -> Iterator[None]:
    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)
