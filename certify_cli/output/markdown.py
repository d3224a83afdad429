"""Markdown, for pull requests and job summaries: the summary, then the samples, in GitHub's tables."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from certify_cli.output.console import (
    FIRST_ROWS,
    SAMPLE_COLUMNS,
    Column,
    escaped,
    markdown_grid,
    sample_row,
    summary_rows,
)
from certify_cli.output.document import View
from certify_cli.records import Record, collect


def document(records: Iterable[Record], view: View) -> Iterator[str]:
    """A heading, the summary, and the first samples (or all)."""
    whole = collect(records)
    run = whole.run
    yield f"## curvcert: {escaped(run.model.path)} on {escaped(run.data.name)}\n\n"
    yield markdown_grid((Column("figure"), Column("value", right=True)), summary_rows(whole))
    shown = whole.samples if view.all_rows else whole.samples[:FIRST_ROWS]
    yield "\n" + markdown_grid(SAMPLE_COLUMNS, [sample_row(row, run) for row in shown])
    hidden = len(whole.samples) - len(shown)
    if hidden:
        yield f"\n{hidden} more samples (`--all` shows every row)\n"
