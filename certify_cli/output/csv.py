"""CSV: a header and one row a sample. Null is an empty cell, booleans are true and false, floats read back exactly."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator
from dataclasses import fields
from typing import Any

from certify_cli.output.console import printable
from certify_cli.output.document import View
from certify_cli.records import Record, Sample, collect

FORMULA = ("=", "+", "-", "@")
"""How a cell begins that a spreadsheet would compute."""

COLUMNS = [item.name for item in fields(Sample)]


def rows(records: Iterable[Record], view: View) -> Iterator[str]:
    """The samples of the run, in order."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for sample in collect(records).samples:
        values = sample.to_dict()
        writer.writerow([_cell(values[name]) for name in COLUMNS])
    yield text.getvalue()


def _cell(value: Any) -> Any:
    """csv writes None as an empty cell and floats by repr; booleans differ from JSON, and a text must be no formula."""
    if isinstance(value, str):
        text = printable(value)
        return f"'{text}" if text.lstrip().startswith(FORMULA) else text
    return str(value).lower() if isinstance(value, bool) else value
