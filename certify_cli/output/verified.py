"""The result of `verify`, as a table, JSON or Markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from certify_cli.output import blocks
from certify_cli.output.blocks import Block, Table, first_rows
from certify_cli.output.console import Column
from certify_cli.output.document import View
from certify_cli.output.json import pretty
from certify_cli.records import SCHEMA, Run


@dataclass(frozen=True)
class Row:
    """One record. outcome: a key of `Verified.outcomes`.   contradictions: a sentence each."""

    index: int
    method: str | None
    radius: float | None
    outcome: str
    contradictions: tuple[str, ...]


@dataclass(frozen=True)
class Verified:
    """A verified run.

    records, model: paths.   outcomes: meaning of each.   of_run: contradictions of the whole run.
    notes: sentences on checks that could not be made.
    """

    run: Run
    records: str
    model: str
    outcomes: dict[str, str]
    of_run: tuple[str, ...]
    rows: Sequence[Row]
    notes: tuple[str, ...]

    @property
    def contradictions(self) -> list[tuple[str, str]]:
        """(where, sentence): where is "run", or the index of a sample."""
        return [("run", text) for text in self.of_run] + [
            (str(row.index), text) for row in self.rows for text in row.contradictions
        ]

    @property
    def counts(self) -> dict[str, int]:
        found = Counter(row.outcome for row in self.rows)
        return {outcome: found[outcome] for outcome in self.outcomes}

    @property
    def sentence(self) -> str:
        wrong = len(self.contradictions)
        verdict = "no contradiction" if not wrong else f"{wrong} contradiction{'s' * (wrong > 1)}"
        return f"{self.records} against {self.model}, {len(self.rows)} records: {verdict}"


OUTCOMES = (Column("outcome"), Column("records", right=True), Column("which means", wraps=True))
WRONG = (Column("sample", right=True), Column("contradiction", wraps=True))


def as_table(found: Verified, view: View) -> str:
    """The outcomes of the check as text with tables."""
    return blocks.as_text(_blocks(found, view), view)


def as_markdown(found: Verified, view: View) -> str:
    """The outcomes of the check as Markdown."""
    verdict = "records contradicted" if found.contradictions else "records verified"
    return blocks.as_markdown(verdict, _blocks(found, view))


def as_json(found: Verified, view: View) -> str:
    """The outcomes of the check as JSON."""
    data = {
        "records": found.records,
        "model": found.model,
        "verified": not found.contradictions,
        "contradictions_of_run": list(found.of_run),
        "outcomes": found.counts,
        "notes": list(found.notes),
        "samples": [asdict(row) for row in found.rows],
    }
    return pretty({"schema": SCHEMA, "verify": data}) + "\n"


RENDERED: dict[str, Callable[[Verified, View], str]] = {
    "table": as_table,
    "json": as_json,
    "markdown": as_markdown,
}


def _blocks(found: Verified, view: View) -> list[Block]:
    counts = [(outcome, str(count), found.outcomes[outcome]) for outcome, count in found.counts.items() if count]
    wrong = Table(WRONG, found.contradictions, ["red"] * len(found.contradictions))
    remark = "{} more contradictions (--all shows every one)"
    return [found.sentence, Table(OUTCOMES, counts), *first_rows(wrong, remark, view)]
