"""Stages, progress, notes and warnings on stderr while a command works; data and errors go elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import TYPE_CHECKING

from certify_cli.output.console import environment, printable

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


class Reporter:
    """The reporter of one command, a context manager. quiet: say nothing.   bar: draw one, on terminals only."""

    def __init__(self, quiet: bool, bar: bool = True) -> None:
        self.quiet = quiet
        self._bar = bar and not quiet and sys.stderr.isatty()
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._stage = ""
        self._said: set[str] = set()

    def __enter__(self) -> Reporter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def _close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def stage(self, text: str) -> None:
        """Name the present stage. The first one starts the bar: until then a download may draw its own."""
        if self._bar and self._progress is None:
            self._progress = _progress()
            self._task = self._progress.add_task(text, total=None)
            self._progress.start()
        elif self._progress is not None and self._task is not None:
            self._progress.update(self._task, description=text)

    def counter(self, total: int, text: str, done: int = 0) -> Callable[[], None]:
        """Start to count up to `total`, with rate and time left: each call of the returned function counts one more.

        text: name of the stage.   done: the count to start from.   The bar disappears at `total`.
        """
        self.stage(text)
        self._stage = text
        if self._progress is not None and self._task is not None:
            self._progress.reset(self._task, total=total, completed=done, description=text)

        def advance() -> None:
            nonlocal done
            done += 1
            if self._progress is not None and self._task is not None:
                self._progress.advance(self._task)
            if done >= total:
                self._close()

        return advance

    def doing(self, text: str) -> None:
        """Show the present step of the stage that counts."""
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, description=f"{self._stage}: {text}")

    def note(self, text: str) -> None:
        """Print a note; a sentence that was printed before is not repeated."""
        self._say(f"note: {text}")

    def notes(self, texts: Iterable[str]) -> None:
        for text in texts:
            self.note(text)

    def warning(self, text: str) -> None:
        """Print a warning: of something that probably needs a change."""
        self._say(f"warning: {text}")

    def _say(self, text: str) -> None:
        if self.quiet or text in self._said:
            return
        self._said.add(text)
        if self._progress is not None:
            self._progress.console.print(printable(text), markup=False, emoji=False, highlight=False, soft_wrap=True)
            return
        try:
            print(printable(text), file=sys.stderr, flush=True)
        except BrokenPipeError:
            self.quiet = True  # whoever read stderr has gone; the data on stdout is still wanted


def _progress() -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
    from rich.progress import TimeRemainingColumn as TimeLeft
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            speed = task.finished_speed or task.speed
            return Text(f"{speed:.1f}/s" if speed else "", style="progress.data.speed")

    # stdout is for data: Rich must not draw it through the bar's console
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        Rate(),
        TimeLeft(),
        console=Console(stderr=True, _environ=environment()),
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
    )
