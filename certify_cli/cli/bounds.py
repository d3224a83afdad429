"""`curvcert bounds`: where a model's Lipschitz and curvature bounds come from, layer by layer."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from certify_cli.cli import options as opt
from certify_cli.cli.inspect import shape_text
from certify_cli.cli.reporter import Reporter
from certify_cli.cli.sink import sink
from certify_cli.errors import UsageError
from certify_cli.output.console import Column, grid
from certify_cli.output.json import pretty
from certify_cli.output.numbers import DOWN, UP, number
from certify_cli.records import SCHEMA

if TYPE_CHECKING:
    from certify_cli.bounds.global_bounds.layer_report import LayerRow
    from certify_cli.certificates.loss_breakdown import Losses, LossRow
    from certify_cli.data.datasets import Dataset

COLUMNS = (
    Column("layer", wraps=True),  # name, kind and shape: a narrow terminal has them below one another
    Column("norm", right=True),
    Column("slope", right=True),
    Column("Lipschitz", right=True),
    Column("curvature", right=True),
    Column("share", right=True),
)


LOSS_COLUMNS = (
    Column("term", wraps=True),
    Column("range", right=True),
    Column("bent", right=True),
    Column("constant", right=True),
    Column("curved", right=True),
    Column("beyond", right=True),
    Column("loss", right=True),
    Column("of margin", right=True),
)


def bounds(
    model: opt.ModelFile,
    sample: opt.SampleIndex = None,
    data: opt.DataOfSample = None,
    data_root: opt.DataRoot = None,
    split: opt.Split = "test",
    data_layout: opt.DataLayout = "nchw",
    offline: opt.Offline = False,
    mean: opt.Mean = None,
    std: opt.Std = None,
    layout: opt.Layout = None,
    activation: opt.ActivationName = None,
    output: opt.ModelOutput = None,
    input_shape: opt.InputShape = None,
    memory: opt.Memory = "auto",
    format: opt.PlainFormat = None,
    output_file: opt.OutputFile = None,
    quiet: opt.Quiet = False,
) -> None:
    """Show Lipschitz and curvature bounds, layer by layer; with --sample, where the local bound loses.

    All figures are upper bounds; the table shows them rounded up. Lipschitz, curvature and share are those of the
    network up to and with the layer. With --sample the margin on the sample's certified ball is proved, and spent term
    by term: those parts are estimates.
    """
    form = opt.format_of(format, output_file, opt.PLAIN_FORMATS)
    if (sample is None) != (data is None):
        raise UsageError("--sample I and --data SOURCE belong together: sample number I of that data set")
    if sample is None:
        about_data = {
            "--data-root": data_root,
            "--split": split != "test",
            "--data-layout": data_layout != "nchw",
            "--offline": offline,
            "--mean": mean,
            "--std": std,
            "--layout": layout,
        }
        given = [name for name, value in about_data.items() if value]
        if given:
            raise UsageError(
                f"{given[0]} says how a sample is read, but none is asked for; add --sample I --data SOURCE"
            )
    opt.one_of("--split", split, opt.SPLITS)
    opt.one_of("--data-layout", data_layout, opt.DATA_LAYOUTS)
    limit = opt.memory_size("--memory", memory)
    with sink(output_file) as out, Reporter(quiet) as reporter:
        from certify_cli import load_data, load_model
        from certify_cli.bounds.global_bounds.layer_report import layer_table

        chosen: list[Dataset] = []

        def of_data() -> tuple[int, ...] | None:
            return tuple(taken().x.shape[1:]) if data is not None else None

        def taken() -> Dataset:
            if not chosen:
                chosen.append(
                    load_data(
                        str(data),
                        root=data_root,
                        split=split,
                        samples=f"{sample}:{int(sample or 0) + 1}",
                        data_layout=data_layout,
                        offline=offline,
                        notify=None if quiet else reporter.note,
                    )
                )
            return chosen[0]

        loaded = load_model(
            model, activation=activation, output=output, input_shape=opt.shape(input_shape) or of_data, layout=layout
        )
        reporter.notes(loaded.notes)
        if sample is None or data is None:
            reporter.stage("bounding the network")
            rows = layer_table(loaded.network)
            if form == "json":
                layers = [row.to_dict() for row in rows]
                out.write(pretty({"schema": SCHEMA, "model": asdict(loaded.info), "layers": layers}) + "\n")
            else:
                out.write(grid(COLUMNS, [_layer_cells(row) for row in rows], out.view))
            return
        from certify_cli.certificates.loss_breakdown import of_sample
        from certify_cli.load.preprocessing import fit

        one = taken()
        network = fit(
            loaded.network,
            tuple(one.x.shape[1:]),
            mean=opt.numbers("--mean", mean) or None,
            std=opt.numbers("--std", std) or None,
            layout=layout,
        )
        reporter.stage("bounding the network")
        found = of_sample(network, one.x.double(), limit)
        if form == "json":
            out.write(
                pretty({"schema": SCHEMA, "model": asdict(loaded.info), "sample": sample, "losses": found.to_dict()})
                + "\n"
            )
            return
        out.write(f"sample {sample}: {_account(found)}")
        out.write(grid(LOSS_COLUMNS, _loss_cells(found), out.view))


def _account(found: Losses) -> str:
    margin, radius = number(found.margin, DOWN), number(found.radius, DOWN)
    lost = number(found.margin - found.left, UP)
    begin = f"class {found.prediction} against {found.rival}, margin {margin}; "
    if found.left > 0:
        left = number(found.left, DOWN)
        return (
            f"{begin}at least {left} of it is left\non the certified ball of radius {radius}; {lost} at most is lost:\n"
        )
    return f"{begin}the certified ball of radius {radius}\nis proved otherwise; by this bound {lost} at most is lost:\n"


def _title(row: LayerRow | LossRow) -> str:
    """Name, kind and shape; breaks before parameters."""
    return f"{row.name} {row.kind.replace('(', ' (')} {shape_text(row.shape)}"


def _layer_cells(row: LayerRow) -> tuple[str, ...]:
    return (
        _title(row),
        *(number(value, UP) for value in (row.norm, row.slope, row.lipschitz, row.curvature)),
        "-" if row.share is None else f"{100 * row.share:.1f} %",
    )


def _loss_cells(found: Losses) -> list[tuple[str, ...]]:
    def share(value: float) -> str:
        return f"{100 * value / found.margin:.1f} %"

    blank = ("",) * 5
    rows: list[tuple[str, ...]] = [("gradient", *blank, number(found.gradient), share(found.gradient))]
    for row in found.layers:
        parts = (number(value) for value in (row.constant, row.curved, row.beyond, row.total))
        rows.append((_title(row), number(row.range), f"{100 * row.bent:.1f} %", *parts, share(row.total)))
    rows.append(("proof", *blank, number(found.gap), share(found.gap)))
    return rows
