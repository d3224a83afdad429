"""The table of output formats.

A format is a pure function: it takes the records of a run in order (the `Run`, every `Sample`, the `Summary`) and a
`View`, and yields pieces of text. A format that streams yields each record's text as soon as it has the record. No
format computes a result, and none knows where its text goes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from certify_cli.output import console, csv, github, json, junit, markdown, sarif
from certify_cli.output.document import View
from certify_cli.records import Record


@dataclass(frozen=True)
class Format:
    """`render` maps records to pieces of text; `streams` says that pieces come while samples are still missing."""

    summary: str
    render: Callable[[Iterable[Record], View], Iterator[str]]
    streams: bool = False


FORMATS: dict[str, Format] = {
    "table": Format("a table to read", console.table),
    "json": Format("one JSON document", json.document),
    "jsonl": Format("one JSON line a record, as each is done", json.lines, streams=True),
    "csv": Format("a header and one row a sample", csv.rows),
    "markdown": Format("tables for a pull request", markdown.document),
    "junit": Format("JUnit XML, a test case a sample", junit.document),
    "sarif": Format("SARIF, a result for every sample that is not certified", sarif.document),
    "github": Format("annotations of a GitHub Actions run", github.document),
}
