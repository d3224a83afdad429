"""JSON: the whole run as one document, or one line a record (`certify_cli/schema/curvcert-1.json`).

Floats are written so that reading them gives the same float64 back; NaN and infinity cannot occur.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

from certify_cli.output.document import View
from certify_cli.records import SCHEMA, Record, Run, Sample, Summary, collect, linked

TYPES = {Run: "run", Sample: "sample", Summary: "summary"}


def pretty(data: Any) -> str:
    """Indented JSON, for documents that are read by people too."""
    return json.dumps(data, indent=2, allow_nan=False)


def _compact(data: Any) -> str:
    return json.dumps(data, allow_nan=False)


def document(records: Iterable[Record], view: View) -> Iterator[str]:
    """`{"schema", "run", "samples", "summary"}`; a sample is one line, so that two documents compare line by line."""
    whole = collect(records)
    yield f'{{\n"schema": {_compact(SCHEMA)},\n"run": {pretty(whole.run.to_dict())},\n"samples": ['
    for number, sample in enumerate(whole.samples):
        yield f"{',' if number else ''}\n{_compact(sample.to_dict())}"
    yield f'\n],\n"summary": {pretty(whole.summary.to_dict())}\n}}\n'


def lines(records: Iterable[Record], view: View) -> Iterator[str]:
    """One object a line, with its `type`; the run's with the schema, a sample's with the link to those before it.

    The first sample is linked to `view.chain`.
    """
    chain = view.chain
    for record in records:
        head: dict[str, Any] = {"type": TYPES[type(record)]}
        tail: dict[str, Any] = {}
        if isinstance(record, Run):
            head["schema"] = SCHEMA
        if isinstance(record, Sample):
            chain = linked(chain, record)
            tail["chain"] = chain
        yield _compact(head | record.to_dict() | tail) + "\n"
