"""Reads a TOML file as a table: the settings of a project, a recipe of training."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from certify_cli.errors import UsageError, first_line

LARGEST = 2**20
"""Bytes of the largest file."""


def read_toml(path: Path, kind: str) -> dict[str, Any]:
    """The table in the file.   kind: what such files hold, in the plural. Raises UsageError for any other file."""
    try:
        with path.open("rb") as file:
            text = file.read(LARGEST + 1).decode("utf-8")
        if len(text) > LARGEST:
            raise UsageError(f"{path}: is larger than {LARGEST} bytes; no {kind} are")
        return tomllib.loads(text)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:  # no TOML, no UTF-8, an integer of thousands of digits, deep lists
        raise UsageError(f"{path}: is not TOML: {first_line(error)}") from error
