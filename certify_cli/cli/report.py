"""`curvcert report`: finished runs as one page, or the plots of that page as files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from certify_cli.cli import options as opt
from certify_cli.cli import record_options as rec
from certify_cli.cli.reporter import Reporter
from certify_cli.cli.sink import sink
from certify_cli.errors import CurvcertError, RecordsError, UsageError, quoted
from certify_cli.output import html, plots
from certify_cli.output.numbers import UP, number
from certify_cli.output.read import read_document
from certify_cli.records import Result
from certify_cli.whole_file import refusing


def report(
    records: rec.ManyRecords,
    output: opt.OutputFile = None,
    title: rec.Title = None,
    witnesses: rec.WitnessFile = None,
    svg: rec.SvgFolder = None,
    png: rec.PngFolder = None,
    quiet: opt.Quiet = False,
) -> None:
    """Show one or several runs of certify as a page: figures, plots, layers, the samples with the smallest radii.

    The page is one file and needs no network. Needs the extra: pip install 'curvcert[report]'.
    """
    if len(records) > plots.MOST_RUNS:
        raise UsageError(f"a report shows at most {plots.MOST_RUNS} runs, not {len(records)}")
    if output is None and svg is None and png is None:
        raise UsageError("name the page to write: -o report.html; or a folder for its plots: --svg, --png")
    with Reporter(quiet) as reporter:
        results = [read_document(path) for path in records]
        empty = [path for path, result in zip(records, results, strict=True) if not result.samples]
        if empty:
            raise RecordsError(f"{empty[0]}: the run has no samples, so there is nothing to show")
        for other in results[1:]:
            if other.run.data.sha256 != results[0].run.data.sha256:
                reporter.warning(
                    f"{other.run.model.path} was certified on other samples than {results[0].run.model.path}: what is "
                    "drawn side by side is not about the same data"
                )
        if output is not None:
            pictures = [] if witnesses is None else _pictures(results[0], witnesses)
            if witnesses is not None and not pictures:
                reporter.note("--witnesses holds no images of one or three channels, so none are shown")
            page = html.page(results, title or _title(results), _layers(results, reporter), pictures)
            with sink(output) as out:
                out.write(page)
        for folder, form in ((svg, "svg"), (png, "png")):
            if folder is not None:
                _draw(results, folder, form)


def _title(results: Sequence[Result]) -> str:
    first = results[0].run
    if len(results) == 1:
        return f"{plots.names(results)[0]} on {first.data.name}"
    data = {result.run.data.name for result in results}
    return f"{len(results)} runs on {first.data.name}" if len(data) == 1 else f"{len(results)} runs"


def _pictures(result: Result, path: str) -> list[html.Witnessed]:
    from certify_cli.data.npz import read_rows

    keys = ("index", "x", "d")
    return html.pictured(result, read_rows(Path(path), keys, "a file that certify --witnesses wrote is needed"))


def _layers(results: Sequence[Result], reporter: Reporter) -> list[html.Layers]:
    """The layers of every model, once, that is still where its run found it."""
    found = []
    seen = set()
    for name, result in zip(plots.names(results), results, strict=True):
        info = result.run.model
        if info.sha256 in seen:
            continue
        seen.add(info.sha256)
        try:
            rows = _layer_rows(result)
        except CurvcertError as error:
            reporter.note(f"{name}: its layers are not shown: {error}")
            continue
        if rows:
            found.append(html.Layers(name, rows))
    return found


def _layer_rows(result: Result) -> tuple[tuple[str, str, str, float], ...]:
    from certify_cli import load_model
    from certify_cli.bounds.global_bounds.layer_report import layer_table
    from certify_cli.load.model import of_run

    info = result.run.model
    loaded = load_model(info.path, **of_run(result.run))
    if loaded.info.sha256 != info.sha256:
        raise RecordsError(f"{info.path} is another file now than the run certified")
    rows = layer_table(loaded.network)
    return tuple(
        (f"{row.name} {row.kind}", number(row.lipschitz, UP), number(row.curvature, UP), 100 * row.share)
        for row in rows
        if row.share is not None
    )


def _draw(results: Sequence[Result], folder: str, form: str) -> None:
    target = Path(folder)
    with refusing(f"--{form} {quoted(folder)}"):
        target.mkdir(parents=True, exist_ok=True)
        for plot in plots.PLOTS:
            if plot.fits(results):
                (target / f"{plot.name}.{form}").write_bytes(plots.drawn(plot, results, form))
