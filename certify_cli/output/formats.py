"""The table of output formats.

A format is a pure function from the records of a run in order (the `Run`, every `Sample`, the `Summary`) and a `View`
to pieces of text. One that streams yields each record's text as soon as it has the record. No format computes a result,
and none knows where its text goes. To add a format, write the function and add an entry to FORMATS.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from certify_cli.output import console, csv, github, json, junit, markdown, sarif
from certify_cli.output.document import View
from certify_cli.records import Record


@dataclass(frozen=True)
class Format:
    """summary: for `--help`.   render: records to pieces of text.   streams: it yields before it has all samples."""

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
