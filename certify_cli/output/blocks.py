"""A report for people as blocks, paragraphs and tables, of which each of the two text formats is made.

`diff`, `verify` and `check` compose their report once, for a terminal and for Markdown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from certify_cli.output.console import FIRST_ROWS, Column, grid, markdown_grid, paragraph, printable
from certify_cli.output.document import View


@dataclass(frozen=True)
class Table:
    """Cells by row and column. styles: a colour of Rich's for a row, or None; shorter than `rows` or empty is fine."""

    columns: Sequence[Column]
    rows: Sequence[Sequence[str]]
    styles: Sequence[str | None] = ()


Block = str | Table
"""A paragraph of plain text, or a table."""


def first_rows(table: Table, remark: str, view: View) -> list[Block]:
    """The table's first rows, or all where the view asks for all, and how many are hidden; nothing without a row.

    remark: the sentence on the hidden rows, with {} for how many there are.
    """
    shown = Table(table.columns, table.rows if view.all_rows else table.rows[:FIRST_ROWS], table.styles)
    hidden = len(table.rows) - len(shown.rows)
    return [*([shown] if shown.rows else []), *([remark.format(hidden)] if hidden else [])]


def as_text(blocks: Sequence[Block], view: View) -> str:
    """For a terminal or a text file: blocks with an empty line between them."""
    return "\n".join(
        printable(block) + "\n" if isinstance(block, str) else grid(block.columns, block.rows, view, block.styles)
        for block in blocks
    )


def as_markdown(heading: str, blocks: Sequence[Block]) -> str:
    """For a pull request. heading: Markdown already, names in it escaped."""
    parts = [f"## curvcert: {heading}\n"]
    for block in blocks:
        parts.append(paragraph(block) + "\n" if isinstance(block, str) else markdown_grid(block.columns, block.rows))
    return "\n".join(parts)
