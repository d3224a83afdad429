"""Where data goes: stdout, or a file that appears whole or not at all."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TextIO

from certify_cli.errors import UsageError
from certify_cli.output.document import View


@contextmanager
def atomic(path: str, option: str, mode: str = "w") -> Iterator[IO[Any]]:
    """A file beside `path` that takes its place when the block ends well, and vanishes when it does not.

    A device or pipe such as /dev/null is written to directly: it must not be replaced by a file. UsageError, naming
    `option`, if the file cannot be written; it is opened at once, so that a wrong path is refused before the work.
    """
    target = Path(path)
    device = target.exists() and not target.is_file()
    if not device:
        target = target.resolve()  # a link stays a link: what it points to is replaced
    written = target if device else target.with_name(f".{target.name}.{os.getpid()}.tmp")
    text: dict[str, Any] = {} if "b" in mode else {"encoding": "utf-8", "newline": ""}
    try:
        stream = written.open(mode, **text)
    except OSError as error:
        raise UsageError(f"{option} {path!r} cannot be written: {error.strerror or error}") from error
    if device:
        with stream:
            yield stream
        return
    try:
        with stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        if target.exists():
            shutil.copymode(target, written)
        os.replace(written, target)
    except BaseException:
        written.unlink(missing_ok=True)
        raise


class Sink:
    """Data out, and the view of whoever reads it."""

    def __init__(self, stream: TextIO, view: View, terminal: bool) -> None:
        self._stream = stream
        self.view = view
        self.terminal = terminal

    def write(self, text: str) -> None:
        """Write and flush: a reader of a stream sees a record when it is done."""
        try:
            self._stream.write(text)
            self._stream.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            raise UsageError(f"the output cannot be written: {error.strerror or error}") from error


@contextmanager
def sink(path: str | None, all_rows: bool = False) -> Iterator[Sink]:
    """Open the sink of one command: FILE of `--output`, else stdout."""
    if path is not None:
        with atomic(path, "--output") as stream:
            yield Sink(stream, View(all_rows=all_rows), terminal=False)
        return
    terminal = sys.stdout.isatty()
    plain = bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") == "dumb"
    unicode = (sys.stdout.encoding or "").lower().startswith("utf")
    view = View(width=_width(terminal), color=terminal and not plain, unicode=unicode, all_rows=all_rows)
    yield Sink(sys.stdout, view, terminal)


def _width(terminal: bool) -> int | None:
    """COLUMNS, else the terminal's width; a pipe gets tables as wide as their content."""
    columns = os.environ.get("COLUMNS", "")
    if columns.isdecimal() and int(columns) > 0:
        return int(columns)
    return shutil.get_terminal_size().columns if terminal else None
