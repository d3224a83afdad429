"""Errors meant for the user: one sentence that says what is wrong, where, and what to do.

Each class carries the exit code of the command line (see the README's table). Anything else that
escapes is a bug of ours and ends with exit code 4. What a file or an option says enters a sentence by way of `shown`,
`quoted` or `listed`: it must neither steer a terminal nor fill it.
"""

from __future__ import annotations

from collections.abc import Iterable


class CurvcertError(Exception):
    """Base of every error whose message is written for the user."""

    exit_code = 4


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
    """A file of records that is missing, unreadable, unfinished, or not about what it is asked about (exit 3)."""

    exit_code = 3


class MethodError(CurvcertError):
    """A method asked for by name that cannot apply to this model (exit 3)."""

    exit_code = 3


LONGEST_NAME = 100
"""Characters of a file's text that one sentence quotes."""
LONGEST_LINE = 300
"""Characters of what a library says that one sentence quotes."""


LONGEST_SENTENCE = 2000
"""Characters of one sentence on stderr, whatever it quotes."""


def shown(text: str, limit: int = LONGEST_NAME) -> str:
    """A file's text for a name or a sentence: one line of at most `limit` characters, the middle left out of longer
    texts, everything unprintable (control characters, bidirectional marks, lone surrogates) escaped as repr does.

    A text that needs none of this stays as it is, so that shown(shown(text)) == shown(text).
    """
    text = cut(text, limit)  # what escapes to more is cut once more, below
    return text if text.isprintable() else cut("".join(map(_escaped, text)), limit)


def cut(text: str, limit: int) -> str:
    """The text, or where it is longer than `limit` its beginning and its end."""
    half = (limit - 3) // 2
    return text if len(text) <= limit else f"{text[:half]}...{text[-half:]}"


def _escaped(letter: str) -> str:
    return letter if letter.isprintable() else letter.encode("unicode_escape").decode("ascii")


def quoted(value: object, limit: int = LONGEST_NAME) -> str:
    """Any value from a file or a command line as repr shows it, bounded and escaped as `shown` does."""
    if isinstance(value, str):  # cut first: the text may be very long
        text = shown(value, limit)
        return f'"{text}"' if "'" in text and '"' not in text else f"'{text}'"
    try:
        return shown(repr(value), limit)
    except (ValueError, RecursionError):  # an integer of thousands of digits, lists in lists without end
        return f"a value that is too long to show ({type(value).__name__})"


def listed(names: Iterable[str], most: int = 5) -> str:
    """The first names of a file, shown, and how many more there are."""
    every = list(names)
    more = f" and {len(every) - most} more" if len(every) > most else ""
    return ", ".join(shown(name) for name in every[:most]) + more


def first_line(error: BaseException) -> str:
    """What a library's exception says, cut to one line without its full stop, to stand inside a sentence of ours."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0].strip().rstrip(".")
    return shown(line, LONGEST_LINE)
