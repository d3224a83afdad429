"""The destination of a command's data: stdout, or a file that appears whole or not at all."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO

from certify_cli.errors import quoted
from certify_cli.output.console import SIZE
from certify_cli.output.document import View
from certify_cli.whole_file import TEXT, refusing, whole_file


class Sink:
    """The destination of data, and the view of its reader. terminal: it is a terminal."""

    def __init__(self, stream: IO[str], view: View, terminal: bool) -> None:
        self._stream = stream
        self.view = view
        self.terminal = terminal

    def write(self, text: str) -> None:
        """Write and flush: a reader of a stream sees a record when it is done."""
        with refusing("the output"):
            try:
                self._stream.write(text)
            except UnicodeEncodeError:  # the reader's encoding lacks a letter of a name
                encoding = getattr(self._stream, "encoding", None) or "ascii"
                self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
            self._stream.flush()

    def last(self, text: str) -> None:
        """Write the last text of a command whose exit code is a verdict, which a closed pipe must not change."""
        with suppress(BrokenPipeError):
            self.write(text)


@contextmanager
def sink(path: str | None, all_rows: bool = False, plot: bool = False) -> Iterator[Sink]:
    """Open the sink of one command: FILE of `--output-file`, else stdout."""
    if path is not None:
        with whole_file(path, f"--output-file {quoted(path)}") as stream:
            yield Sink(stream, View(all_rows=all_rows, plot=plot), terminal=False)
        return
    terminal = sys.stdout.isatty()
    plain = bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") == "dumb"
    unicode = (sys.stdout.encoding or "").lower().startswith("utf")
    view = View(width=_width(terminal), color=terminal and not plain, unicode=unicode, all_rows=all_rows, plot=plot)
    yield Sink(sys.stdout, view, terminal)


@contextmanager
def appending(path: str, size: int) -> Iterator[Sink]:
    """A sink after the first `size` bytes of a file. What is written stays there, even if the command fails later."""
    with refusing(f"--output-file {quoted(path)}"):
        stream = open(path, "r+" if size else "w", **TEXT)  # noqa: SIM115
    with stream:
        with refusing(f"--output-file {quoted(path)}"):
            stream.truncate(size)
            stream.seek(size)
        yield Sink(stream, View(), terminal=False)


JOB_SUMMARY, LONGEST_SUMMARY = "GITHUB_STEP_SUMMARY", 2**20
"""The variable that names the file of a step's summary in GitHub Actions, and the bytes of the longest one."""


def job_summary(text: str) -> None:
    """Add `text` to the step's summary in GitHub Actions; elsewhere do nothing."""
    path = os.environ.get(JOB_SUMMARY)
    if path:
        with refusing(f"{JOB_SUMMARY} {quoted(path)}"), open(path, "a", encoding="utf-8") as file:
            file.write(text.encode()[:LONGEST_SUMMARY].decode(errors="ignore"))


def _width(terminal: bool) -> int | None:
    """COLUMNS, else the terminal's width; a pipe gets tables as wide as their content."""
    columns = os.environ.get("COLUMNS", "")
    if SIZE.fullmatch(columns):
        return int(columns)
    return shutil.get_terminal_size().columns if terminal else None
