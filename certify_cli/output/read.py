"""Records read back from a file that `certify -o` wrote: one JSON document, or JSON lines."""

from __future__ import annotations

import json
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from certify_cli.errors import RecordsError
from certify_cli.output.json import TYPES
from certify_cli.records import SCHEMA, DataInfo, ModelInfo, Result, Run, Sample, Summary

HINTS: dict[type, dict[str, Any]] = {kind: get_type_hints(kind) for kind in (Run, ModelInfo, DataInfo, Sample, Summary)}
"""What each field of a record is declared to be."""


def read_document(path: str) -> Result:
    """The finished run in a file. Raises RecordsError, naming the file and the line, for anything else."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise RecordsError(f"{path}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise RecordsError(f"{path}: is not a file of records: it holds no UTF-8 text") from error
    parts = _parts(path, text)
    schema = parts.get("schema")
    if schema != SCHEMA:
        raise RecordsError(f"{path}: its schema is {schema!r}, and this curvcert reads {SCHEMA!r}")
    if parts.get("summary") is None:
        raise RecordsError(f"{path}: the run is not finished: there is no summary at its end")
    try:
        samples = tuple(Sample.from_dict(row) for row in parts["samples"])
        found = Result(Run.from_dict(parts["run"]), samples, Summary.from_dict(parts["summary"]))
        for record in (found.run, found.run.model, found.run.data, *samples, found.summary):
            _check_kinds(record)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RecordsError(f"{path}: a record is not as curvcert writes it: {error}") from error
    if found.summary.samples != len(samples):
        raise RecordsError(f"{path}: the summary counts {found.summary.samples} samples, but there are {len(samples)}")
    return found


def _check_kinds(record: object) -> None:
    """Raises TypeError, naming the field, where a value is of another kind than the record declares."""
    for name, hint in HINTS[type(record)].items():
        value = getattr(record, name)
        if not _is(value, hint):
            raise TypeError(f"{name} is {value!r}")


def _is(value: Any, hint: Any) -> bool:
    """Whether a value that JSON can hold is of the kind; an int may stand for a float."""
    origin, of = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_is(value, part) for part in of)
    if origin is dict:
        return isinstance(value, dict) and all(_is(k, of[0]) and _is(v, of[1]) for k, v in value.items())
    if origin is list:
        return isinstance(value, list) and all(_is(item, of[0]) for item in value)
    if hint is Any:
        return True
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, hint) and (hint is bool or not isinstance(value, bool))


def _parts(path: str, text: str) -> dict[str, Any]:
    """`schema`, `run`, `samples` and `summary`, as they are written."""
    try:
        whole = json.loads(text)
    except ValueError:
        return _of_lines(path, text)
    if isinstance(whole, dict) and {"schema", "run", "samples"} <= set(whole):
        return whole
    return _of_lines(path, text)


def _of_lines(path: str, text: str) -> dict[str, Any]:
    parts: dict[str, Any] = {"samples": []}
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            kind = record.pop("type")
        except (ValueError, KeyError, AttributeError, TypeError):
            raise RecordsError(
                f"{path}, line {number}: is no record; a file that `certify --format json` or jsonl wrote is needed"
            ) from None
        if kind == TYPES[Run]:
            parts["schema"] = record.pop("schema", None)
        if kind == TYPES[Sample]:
            parts["samples"].append(record)
        else:
            parts[str(kind)] = record
    return parts
