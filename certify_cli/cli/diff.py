"""`curvcert diff`: the figures and samples of two runs side by side; exit 1 where a figure regressed."""

from __future__ import annotations

from collections.abc import Callable

from certify_cli.audit.compare import Comparison, SampleChange, compare, of_the_same_samples, unlike
from certify_cli.cli import options as opt
from certify_cli.cli import record_options as rec
from certify_cli.cli.exit_codes import DONE, NOT_MET
from certify_cli.cli.reporter import Reporter
from certify_cli.cli.sink import sink
from certify_cli.errors import UsageError
from certify_cli.output import blocks
from certify_cli.output.blocks import Block, Table, first_rows
from certify_cli.output.console import Column, escaped
from certify_cli.output.document import View
from certify_cli.output.json import pretty
from certify_cli.output.numbers import DOWN, number
from certify_cli.output.read import read_document
from certify_cli.records import SCHEMA

FIGURES = (Column("figure"), *(Column(name, right=True) for name in ("old", "new", "change")), Column("verdict"))
SAMPLES = (
    *(Column(name, right=True) for name in ("index", "label", "prediction", "old radius", "new radius", "change")),
    Column("no longer certified at"),
)


def diff(
    old: rec.OldRecords,
    new: rec.NewRecords,
    tolerance: rec.Tolerance = 0.01,
    format: rec.ReportFormat = None,
    output: opt.OutputFile = None,
    all_rows: opt.AllRows = False,
    quiet: opt.Quiet = False,
) -> int:
    """Compare two runs of certify on the same samples, such as two versions of a model.

    Exit 1 where a figure fell by more than the tolerance.
    """
    form = opt.format_of(format, output, RENDERED)
    if not 0 <= tolerance < 1:
        raise UsageError(f"--tolerance {tolerance} is not a number from 0 up to 1")
    with sink(output, all_rows) as out, Reporter(quiet) as reporter:
        before, after = read_document(old), read_document(new)
        for text in unlike(before.run, after.run):
            reporter.warning(f"the runs are of different kinds: {text}")
        whole = max(len(before.samples), len(after.samples))
        before, after = of_the_same_samples(before, after)
        if len(before.samples) < whole:
            reporter.note(f"one of the runs was ended early: only the first {len(before.samples)} samples are compared")
        found = compare(before, after, tolerance)
        out.last(RENDERED[form](found, out.view))
    return NOT_MET if found.regressions else DONE


def as_json(found: Comparison, view: View) -> str:
    """The comparison as JSON."""
    return pretty({"schema": SCHEMA, "diff": found.to_dict()}) + "\n"


def as_table(found: Comparison, view: View) -> str:
    """The comparison as text with tables."""
    models = f"{found.old} -> {found.new}, {found.count} samples"
    return blocks.as_text([models, _figures(found), verdict(found), *_samples(found, view)], view)


def as_markdown(found: Comparison, view: View) -> str:
    """The comparison as Markdown."""
    models = f"{escaped(found.old)} -> {escaped(found.new)}"
    return blocks.as_markdown(models, [verdict(found), _figures(found), *_samples(found, view)])


RENDERED: dict[str, Callable[[Comparison, View], str]] = {
    "table": as_table,
    "json": as_json,
    "markdown": as_markdown,
}


def _figures(found: Comparison) -> Table:
    rows = [
        (
            figure.name,
            number(figure.old, DOWN),
            number(figure.new, DOWN),
            _signed(figure.change),
            "regressed" if figure.regressed else "",
        )
        for figure in found.figures
    ]
    return Table(FIGURES, rows, ["red" if figure.regressed else None for figure in found.figures])


def _samples(found: Comparison, view: View) -> list[Block]:
    """The samples that changed, the largest fall first."""
    every = Table(SAMPLES, [_sample_cells(sample) for sample in found.samples])
    return first_rows(every, "{} more samples changed (--all shows every row)", view)


def _sample_cells(sample: SampleChange) -> tuple[str, ...]:
    same = sample.old_prediction == sample.new_prediction
    return (
        str(sample.index),
        _class(sample.label),
        _class(sample.new_prediction)
        if same
        else f"{_class(sample.old_prediction)} -> {_class(sample.new_prediction)}",
        number(sample.old_radius, DOWN),
        number(sample.new_radius, DOWN),
        _signed(sample.change),
        ", ".join(sample.lost),
    )


def verdict(found: Comparison) -> str:
    """One sentence on figures and samples."""
    names = [figure.name for figure in found.regressions]
    what = f"Regressed beyond {found.tolerance:g}: {', '.join(names)}." if names else "No figure regressed."
    return (
        f"{what} Of {found.count} samples {len(found.fallen)} have a smaller radius, {len(found.risen)} a larger one, "
        f"and {len(found.relabelled)} another prediction."
    )


def _class(label: int | None) -> str:
    return "-" if label is None else str(label)


def _signed(change: float | None) -> str:
    text = number(change)
    return f"+{text}" if change is not None and change > 0 else text
