"""Records read back from a file that `certify -o` wrote: one JSON document, or JSON lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from certify_cli.errors import RecordsError, UsageError, first_line, quoted
from certify_cli.output.json import TYPES
from certify_cli.records import SCHEMA, Result, Run, Sample, Summary


def read_document(path: str) -> Result:
    """The finished run in the file `path`. Raises RecordsError, naming file and line, for anything else."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise RecordsError(f"{path}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise RecordsError(f"{path}: is not a file of records: it holds no UTF-8 text") from error
    except ValueError as error:  # a name with a NUL in it, out of a settings file
        raise RecordsError(f"{quoted(path)}: cannot be read: {first_line(error)}") from error
    parts = _parts(path, text)
    schema = parts.get("schema")
    if schema != SCHEMA:
        raise RecordsError(f"{path}: its schema is {quoted(schema)}, and this curvcert reads {SCHEMA!r}")
    if parts.get("summary") is None:
        raise RecordsError(f"{path}: the run is not finished: there is no summary at its end")
    try:
        samples = tuple(Sample.from_dict(row) for row in parts["samples"])
        found = Result(Run.from_dict(parts["run"]), samples, Summary.from_dict(parts["summary"]))
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError, UsageError) as error:
        raise RecordsError(f"{path}: a record is not as curvcert writes it: {first_line(error)}") from error
    if found.summary.samples != len(samples):
        raise RecordsError(f"{path}: the summary counts {found.summary.samples} samples, but there are {len(samples)}")
    return found


def _parts(path: str, text: str) -> dict[str, Any]:
    """`schema`, `run`, `samples` and `summary` as JSON values, not yet checked."""
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError):
        return _of_lines(path, text)
    if isinstance(whole, dict) and {"schema", "run", "samples"} <= set(whole):
        return whole
    return _of_lines(path, text)


def _of_lines(path: str, text: str) -> dict[str, Any]:
    parts: dict[str, Any] = {"samples": []}
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            kind = record.pop("type")
            if not isinstance(kind, str):
                raise TypeError("its type is no text")
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
            raise RecordsError(
                f"{path}, line {number}: is no record; a file that `certify --format json` or jsonl wrote is needed"
            ) from None
        if kind == TYPES[Run]:
            parts["schema"] = record.pop("schema", None)
        if kind == TYPES[Sample]:
            parts["samples"].append(record)
        elif kind in TYPES.values():  # a later curvcert may write more
            parts[kind] = record
    return parts
