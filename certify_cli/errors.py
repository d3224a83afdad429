"""Errors meant for the user: one sentence that says what is wrong, where, and what to do.

Each class carries the exit code of the command line (see the README's table). Anything else that
escapes is a bug of ours and ends with exit code 4.
"""


class CurvcertError(Exception):
    """Base of every error whose message is written for the user."""

    exit_code = 4


class UsageError(CurvcertError):
    """An option, argument or configuration value that cannot be used (exit 2)."""

    exit_code = 2


class ModelError(CurvcertError):
    """A model file that is missing, unreadable, or holds something that cannot be certified (exit 3)."""

    exit_code = 3


class DataError(CurvcertError):
    """A data set that is missing, unreadable or does not fit the model (exit 3)."""

    exit_code = 3


class RecordsError(CurvcertError):
    """A file of records that is missing, unreadable, unfinished, or not about what it is asked about (exit 3)."""

    exit_code = 3


class MethodError(CurvcertError):
    """A method asked for by name that cannot apply to this model (exit 3)."""

    exit_code = 3


def first_line(error: BaseException) -> str:
    """What a library's exception says, cut to one line without its full stop, to stand inside a sentence of ours."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].strip().rstrip(".")


LONGEST = 100
"""Characters of a file's text that are shown in one place."""


def shown(text: object, longest: int = LONGEST) -> str:
    """A text that a file holds, fit for a sentence or a table: one line, every character printable, cut in the middle.

    Control, bidirectional and other unprintable characters are written as Python escapes, and so is the backslash.
    """
    raw = str(text)
    if len(raw) > longest:
        half = (longest - 5) // 2
        raw = f"{raw[:half]} ... {raw[-half:]}"
    return "".join(letter if letter.isprintable() and letter != "\\" else _escape(letter) for letter in raw)


def _escape(letter: str) -> str:
    return letter.encode("unicode_escape", "surrogatepass").decode("ascii")
