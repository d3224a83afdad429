"""Errors meant for the user: one sentence that says what is wrong, where, and what to do.

Each class carries the exit code of the command line (see the README's table). Any other exception is a bug and ends
with exit code 4. Text from a file or an option enters a sentence through `shown`, `quoted` or `listed` only, so that it
can neither control a terminal nor fill it.
"""

from __future__ import annotations

from collections.abc import Iterable


class CurvcertError(Exception):
    """Base of every error whose message is written for the user."""

    exit_code = 4


class CurvcertWarning(UserWarning):
    """A figure of a run that looks wrong, such as an accuracy at chance level."""


class UsageError(CurvcertError):
    """An option, argument or configuration value that cannot be used (exit 2)."""

    exit_code = 2


class ModelError(CurvcertError):
    """A model file that is missing, unreadable, or holds something that cannot be certified (exit 3)."""

    exit_code = 3


class LayerError(ModelError):
    """A ModelError whose message begins with the layer at fault, so that nobody need name it again."""


class DataError(CurvcertError):
    """A data set that is missing, unreadable or does not fit the model (exit 3)."""

    exit_code = 3


class RecordsError(CurvcertError):
    """A file of records that is missing, unreadable, unfinished, or of another model or data set (exit 3)."""

    exit_code = 3


class TrainingError(CurvcertError):
    """A training run that has left the finite numbers and was given up (exit 1)."""

    exit_code = 1


class MethodError(CurvcertError):
    """A method that was requested by name and does not apply to this model (exit 3)."""

    exit_code = 3


LONGEST_NAME = 100
"""Largest number of characters of a file's text that one sentence quotes."""
LONGEST_LINE = 300
"""Largest number of characters of a library's message that one sentence quotes."""


LONGEST_SENTENCE = 2000
"""Largest number of characters of one sentence on stderr."""


def shown(text: str, limit: int = LONGEST_NAME) -> str:
    """Untrusted text as one printable line of at most `limit` characters.

    Unprintable characters (control characters, bidirectional marks, lone surrogates) are escaped as repr does; the
    middle of a longer text is left out. Idempotent: shown(shown(text)) == shown(text).
    """
    text = cut(text, limit)  # escapes may lengthen it: cut again below
    return text if text.isprintable() else cut("".join(map(_escaped, text)), limit)


def cut(text: str, limit: int) -> str:
    """The text, or its beginning and end where it is longer than `limit`."""
    half = (limit - 3) // 2
    return text if len(text) <= limit else f"{text[:half]}...{text[-half:]}"


def _escaped(letter: str) -> str:
    return letter if letter.isprintable() else letter.encode("unicode_escape").decode("ascii")


def quoted(value: object, limit: int = LONGEST_NAME) -> str:
    """The repr of any value from a file or a command line, shortened and escaped as by `shown`."""
    if isinstance(value, str):  # shortened before repr: the text may be very long
        text = shown(value, limit)
        return f'"{text}"' if "'" in text and '"' not in text else f"'{text}'"
    try:
        return shown(repr(value), limit)
    except (ValueError, RecursionError):  # an integer of thousands of digits, lists nested without end
        return f"a value that is too long to show ({type(value).__name__})"


def listed(names: Iterable[str], limit: int = 5) -> str:
    """The first `limit` of the names, as by `shown`, and the number of the others."""
    every = list(names)
    more = f" and {len(every) - limit} more" if len(every) > limit else ""
    return ", ".join(shown(name) for name in every[:limit]) + more


def first_line(error: BaseException) -> str:
    """The first line of an exception's message without its full stop, to be quoted in a sentence."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0].strip().rstrip(".")
    return shown(line, LONGEST_LINE)
