"""`curvcert bounds`: where a model's Lipschitz and curvature bounds come from, layer by layer."""

from __future__ import annotations

from dataclasses import asdict

from certify_cli.cli import options as opt
from certify_cli.cli.inspect import shape_text
from certify_cli.cli.reporter import Reporter
from certify_cli.cli.sink import sink
from certify_cli.output.console import Column, grid
from certify_cli.output.json import pretty
from certify_cli.output.numbers import UP, number
from certify_cli.records import SCHEMA

COLUMNS = (
    Column("layer", wraps=True),  # name, kind and shape: a narrow terminal has them below one another
    Column("norm", right=True),
    Column("slope", right=True),
    Column("Lipschitz", right=True),
    Column("curvature", right=True),
    Column("share", right=True),
)


def bounds(
    model: opt.ModelFile,
    activation: opt.ActivationName = None,
    format: opt.PlainFormat = None,
    output: opt.OutputFile = None,
    quiet: opt.Quiet = False,
) -> None:
    """Show Lipschitz and curvature bounds, layer by layer.

    All figures are upper bounds; the table shows them rounded up. Lipschitz, curvature and share are those of the
    network up to and with the layer.
    """
    form = opt.format_of(format, output, opt.PLAIN_FORMATS)
    with sink(output) as out, Reporter(quiet) as reporter:
        from certify_cli import load_model
        from certify_cli.bounds.layers import layer_table

        loaded = load_model(model, activation=activation)
        reporter.notes(loaded.notes)
        reporter.stage("bounding the network")
        rows = layer_table(loaded.network)
        if form == "json":
            layers = [row.to_dict() for row in rows]
            out.write(pretty({"schema": SCHEMA, "model": asdict(loaded.info), "layers": layers}) + "\n")
            return
        cells = [
            (
                f"{row.name} {row.kind.replace('(', ' (')} {shape_text(row.shape)}",  # breaks before parameters
                *(number(value, UP) for value in (row.norm, row.slope, row.lipschitz, row.curvature)),
                "-" if row.share is None else f"{100 * row.share:.1f} %",
            )
            for row in rows
        ]
        out.write(grid(COLUMNS, cells, out.view))
