"""Tables for people: plain text in, plain or coloured text out. Rich is loaded when a table is drawn."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from certify_cli.errors import LONGEST_SENTENCE, cut, shown
from certify_cli.output.document import View
from certify_cli.output.numbers import DOWN, NEAREST, UP, number, seconds, share
from certify_cli.records import ERROR, NOT_CERTIFIED, Record, Result, Run, Sample, collect
from certify_cli.run.doubts import shortfalls

if TYPE_CHECKING:
    from rich.table import Table

FIRST_ROWS = 20
"""Rows shown without --all."""

GAP = "  "
"""Between two columns."""

SIZE = re.compile("[1-9][0-9]{0,3}")
"""What COLUMNS and LINES may say."""


@dataclass(frozen=True)
class Column:
    """One column of a table. right: aligned right, for numbers.   wraps: its lines may break in a narrow terminal."""

    title: str
    right: bool = False
    wraps: bool = False


COMMANDS = re.compile(r"(?:^|(?<=\s))::|##(?=\[|vso\[)")
"""Beginnings of commands to CI servers, which obey them anywhere in a line of a log: ::error, ##[error], ##vso[...]."""


def printable(text: str) -> str:
    """`text` on one line of bounded length, without control characters and without commands to CI servers.

    Names come from files, and must steer neither a terminal nor a program that reads the log.
    """
    text = cut(text, LONGEST_SENTENCE)
    line = text if text.isprintable() else "".join(letter if letter.isprintable() else " " for letter in text)
    return COMMANDS.sub(lambda found: f"{found[0][0]}\\{found[0][1:]}", line)


def grid(
    columns: Sequence[Column], rows: Iterable[Sequence[str]], view: View, styles: Sequence[str | None] = ()
) -> str:
    """A table as text. styles: a colour of Rich's for each row, or None; missing ones are None.

    In a narrow view titles are stacked word by word and wrapping columns are broken. The table is never narrower than
    its numbers: a number that is cut would be another number.
    """
    from rich import box
    from rich.table import Table

    cells = [[printable(cell) for cell in row] for row in rows]
    titles = [column.title for column in columns]
    widths = _widths(columns, titles, cells)
    if view.width is not None and _total(widths) > view.width:
        titles = [title.replace(" ", "\n") for title in titles]
        widths = _widths(columns, titles, cells, fit=view.width)
    table = Table(
        box=box.SIMPLE_HEAD if view.unicode else box.ASCII2, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0)
    )
    _fill(table, columns, titles, cells, widths, styles)
    return _drawn(table, max(_total(widths), 1) + len(GAP), view)


SPECIAL = str.maketrans(
    {letter: f"\\{letter}" for letter in "\\`*_|<>[]#~"} | {"&": "&amp;", "$": "&#36;", "@": "@<!-- -->"}
)
"""Letters that are markup in Markdown, and, on GitHub, mathematics or the mention of a person, and their escapes."""
LINKS = re.compile(r":(?=//)|(?<=www)\.", re.IGNORECASE)
BLOCKS = re.compile(r"\s+|[-+=]|[0-9]+(?=[.)])")
"""Beginnings of a paragraph that are a list, a heading's underline or code in Markdown."""


def escaped(text: str) -> str:
    """`text` on one line, escaped: Markdown shows it letter by letter."""
    return LINKS.sub(lambda found: f"&#{ord(found[0])};", printable(text).translate(SPECIAL))


def paragraph(text: str) -> str:
    """`text`, escaped, as a paragraph of Markdown, whatever it begins with."""
    begin = BLOCKS.match(text)
    start = begin[0] if begin else ""
    return "".join(f"&#{ord(letter)};" for letter in start) + escaped(text[len(start) :])


def markdown_grid(columns: Sequence[Column], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    from rich import box
    from rich.table import Table

    cells = [[escaped(cell) for cell in row] for row in rows]
    titles = [column.title for column in columns]
    widths = _widths(columns, titles, cells)
    table = Table(box=box.MARKDOWN, padding=(0, 1))
    _fill(table, columns, titles, cells, widths, ())
    head, rule, *rest = _drawn(table, sum(widths) + 3 * len(widths) + 1, View()).strip("\n").splitlines()
    rules = [
        f"{part[:-1]}:" if column.right else part
        for part, column in zip(rule.strip("|").split("|"), columns, strict=True)
    ]
    return "\n".join([head, f"|{'|'.join(rules)}|", *rest]) + "\n"


def _fill(
    table: Table,
    columns: Sequence[Column],
    titles: Sequence[str],
    cells: Sequence[Sequence[str]],
    widths: Sequence[int],
    styles: Sequence[str | None],
) -> None:
    from rich.text import Text

    for column, title, width in zip(columns, titles, widths, strict=True):
        table.add_column(
            title,
            width=width,
            justify="right" if column.right else "left",
            no_wrap=not column.wraps,
            header_style="bold",
        )
    for position, row in enumerate(cells):
        table.add_row(*map(Text, row), style=styles[position] if position < len(styles) else None)


def environment() -> dict[str, str]:
    """The process's environment for Rich, which fails on a COLUMNS or LINES that is no plain number."""
    sizes = ("COLUMNS", "LINES")
    return {key: value for key, value in os.environ.items() if key not in sizes or SIZE.fullmatch(value)}


def _drawn(table: Table, width: int, view: View) -> str:
    from rich.console import Console

    text = io.StringIO()
    Console(
        file=text,
        width=width,
        force_terminal=view.color,
        color_system="standard" if view.color else None,
        no_color=not view.color,
        force_jupyter=False,
        legacy_windows=False,
        _environ=environment(),
    ).print(table)
    return "".join(line.rstrip() + "\n" for line in text.getvalue().splitlines())


def _widths(
    columns: Sequence[Column], titles: Sequence[str], cells: Sequence[Sequence[str]], fit: int | None = None
) -> list[int]:
    """The width of every column's content; with `fit`, wrapping columns give way until the table fits.

    They keep their longest word whole, all others their content. Rich would find the widths itself, but would rather
    cut a number than exceed the terminal, and takes as long for it as for drawing.
    """
    from rich.cells import cell_len

    def widest(pieces: Iterable[str]) -> int:
        return max(map(cell_len, pieces), default=0)

    widths = []
    for position, title in enumerate(titles):
        widths.append(max(widest(title.split("\n")), widest({row[position] for row in cells})))
    for position, column in enumerate(columns):
        if fit is not None and column.wraps and _total(widths) > fit:
            words = {word for row in cells for word in row[position].split()}
            narrowest = max(widest(titles[position].split("\n")), widest(words))
            widths[position] = max(narrowest, widths[position] - (_total(widths) - fit))
    return widths


def _total(widths: Sequence[int]) -> int:
    return sum(widths) + len(GAP) * (len(widths) - 1)


def pairs(rows: Iterable[tuple[str, str]]) -> str:
    """Names and values in two aligned columns."""
    listed = [(printable(name), printable(value)) for name, value in rows]
    width = max((len(name) for name, _ in listed), default=0)
    return "".join(f"{name:<{width}}  {value}".rstrip() + "\n" for name, value in listed)


SAMPLE_COLUMNS = (
    Column("index", right=True),
    Column("label", right=True),
    Column("prediction", right=True),
    Column("margin", right=True),
    Column("certified radius", right=True),
    Column("attack radius", right=True),
    Column("method"),
    Column("note", wraps=True),
)


LEGEND = """\
certified radius: no perturbation of smaller norm changes the prediction
attack radius:    a perturbation of this norm does (norms are Euclidean){missing}
"""
MISSING = {
    "certificate": "\n                  -: no certificate promises one; --attack search looks for more",
    "search": "\n                  -: the search found none",
    "none": "; none was asked for",
}


def table(records: Iterable[Record], view: View) -> Iterator[str]:
    """The first samples (or all), then the summary."""
    whole = collect(records)
    shown = whole.samples if view.all_rows else whole.samples[:FIRST_ROWS]
    styles = ["red" if row.status == ERROR else "yellow" if row.correct is False else None for row in shown]
    yield grid(SAMPLE_COLUMNS, [sample_row(row, whole.run) for row in shown], view, styles)
    hidden = len(whole.samples) - len(shown)
    if hidden:
        yield f"{hidden} more samples (--all shows every row)\n"
    legend = LEGEND.format(missing=MISSING.get(whole.run.attack, ""))
    yield f"\n{legend}\n{summary_block(whole)}"
    if view.plot:
        from certify_cli.output.terminal_plot import curve

        yield f"\n{curve(whole, view)}"


def sample_row(sample: Sample, run: Run) -> tuple[str, ...]:
    """The cells of one sample; a certified radius is rounded down to the digits shown, an attack radius up."""
    notes = ["misclassified"] if sample.correct is False else []
    if sample.reason:
        notes.append(sample.reason)
    return (
        str(sample.index),
        class_name(sample.label, run),
        class_name(sample.prediction, run),
        number(sample.margin, NEAREST),
        number(sample.certified_radius, DOWN),
        number(sample.attack_radius, UP),
        sample.method or "-",
        "; ".join(notes),
    )


def class_name(label: int | None, run: Run) -> str:
    """The class's name where the run has names, else its number."""
    if label is None:
        return "-"
    return shown(run.classes[label]) if run.classes and 0 <= label < len(run.classes) else str(label)


def summary_block(whole: Result) -> str:
    """The summary as lines of name and value."""
    return pairs(summary_rows(whole))


def summary_rows(whole: Result) -> list[tuple[str, str]]:
    """The summary as names and values."""
    summary = whole.summary
    count = summary.samples
    rows = [("samples", str(count))]
    for status, name in ((NOT_CERTIFIED, "not certified"), (ERROR, "errors")):
        found = sum(sample.status == status for sample in whole.samples)
        if found:
            rows.append((name, str(found)))
    # as in the papers, a misclassified sample counts as radius 0 wherever labels are known
    counted = "" if summary.accuracy is None else ", misclassified as 0"
    if summary.accuracy is not None:
        rows.append(("accuracy", share(summary.accuracy, count)))
    rows += [
        (f"mean certified radius{counted}", number(summary.mean_certified_radius, DOWN)),
        (f"median certified radius{counted}", number(summary.median_certified_radius, DOWN)),
    ]
    if summary.mean_certified_radius_correct is not None:
        rows.append(("mean certified radius, correct samples", number(summary.mean_certified_radius_correct, DOWN)))
    for name, levels in (
        ("certified accuracy", summary.certified_accuracy),
        ("certified share", summary.certified_share),
        ("accuracy under attack", summary.attack_accuracy),
    ):
        rows += [(f"{name} at {eps}", share(value, count)) for eps, value in (levels or {}).items()]
    rows.append(("time", seconds(summary.seconds)))
    rows += [("cut short", text) for text in shortfalls(whole.run, whole.samples, summary)]
    if summary.search_seconds is not None:
        rows.append(("time of the search for attacks", seconds(summary.search_seconds)))
    return rows
