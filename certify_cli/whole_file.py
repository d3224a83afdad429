"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from certify_cli.errors import UsageError, shown

TEXT: dict[str, Any] = {"encoding": "utf-8", "errors": "backslashreplace", "newline": ""}
"""How a text is written."""


@contextmanager
def refusing(what: str) -> Iterator[None]:
    """An OSError of the operating system as a sentence; a closed pipe is no error and passes."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise UsageError(f"{what} cannot be written: {error.strerror or error}") from error


@contextmanager
def whole_file(path: str | Path, what: str | None = None, mode: str = "w") -> Iterator[IO[Any]]:
    """A temporary file beside `path` that replaces it when the block ends well, and is removed when it does not.

    A device or pipe such as /dev/null is written to directly: it must not be replaced by a file. UsageError, beginning
    with `what` (default: the path), if the file cannot be written; it is opened at once, so that a wrong path is
    refused before the work.
    """
    named = shown(str(path)) if what is None else what
    if "\0" in str(path):
        raise UsageError(f"{named} cannot be written: its name holds a null character")
    text = {} if "b" in mode else TEXT
    with ExitStack() as undo:
        with refusing(named):
            target = Path(path)
            device = target.exists() and not target.is_file()
            if not device:
                target = target.resolve()  # a link stays a link: its target is replaced
            written = target if device else _unfinished(target)
            stream = written.open(mode if device else mode.replace("w", "x"), **text)
        undo.callback(_discard, stream, None if device else written)
        yield stream
        with refusing(named):
            stream.flush()
            if not device:
                os.fsync(stream.fileno())
            stream.close()
            if not device:
                if target.exists():
                    shutil.copymode(target, written)
                os.replace(written, target)
        undo.pop_all()


def refuse_unwritable(path: str | Path, what: str | None = None) -> None:
    """UsageError, as from `whole_file`, if a file cannot be written there. Nothing that exists is changed."""

    class _Writable(Exception):
        """Leaves the block as a failure does, which removes the temporary file."""

    with suppress(_Writable), whole_file(path, what):
        raise _Writable


def refuse_existing(path: str | Path) -> None:
    """UsageError for a file that exists, even as a link to nothing: what is there is not written over unasked."""
    if os.path.lexists(path):
        raise UsageError(f"{path}: exists already; name another file, or overwrite it with --force")


def write_whole(path: str | Path, content: bytes) -> None:
    """Write a file that is always a whole one, the new or the one before. UsageError where it cannot be written."""
    with whole_file(path, mode="wb") as stream, refusing(shown(str(path))):
        stream.write(content)


def _unfinished(target: Path) -> Path:
    """A name that no other process, and no file that a killed one left, has."""
    return target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")


def _discard(stream: IO[Any], written: Path | None) -> None:
    with suppress(OSError):  # the error that ended the block is reported; this one would only repeat it
        stream.close()
    if written is not None:
        written.unlink(missing_ok=True)
