"""`curvcert bounds`: where bounds come from, of a model layer by layer, or of one sample term by term."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from certify_cli.cli import options as opt
from certify_cli.cli.layer_bounds import layer_bounds
from certify_cli.cli.measured import RADIUS, SAMPLES, measured_curvature
from certify_cli.cli.reporter import Reporter
from certify_cli.cli.sample_losses import sample_losses
from certify_cli.cli.sink import sink
from certify_cli.errors import UsageError

if TYPE_CHECKING:
    from certify_cli.data.datasets import Dataset


def bounds(
    model: opt.ModelFile,
    sample: opt.SampleIndex = None,
    measure: opt.Measure = False,
    data: opt.DataOfSample = None,
    samples: opt.MeasuredSamples = None,
    radius: opt.MeasuredRadius = None,
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
    by term: those parts are estimates. With --measure a second table shows estimates at samples, of the cross-entropy.
    """
    form = opt.format_of(format, output_file, opt.PLAIN_FORMATS)
    if measure and sample is not None:
        raise UsageError("--sample and --measure are two tables; ask for one of them")
    if measure and data is None:
        raise UsageError("--measure needs --data SOURCE, at whose samples to measure")
    if not measure and (sample is None) != (data is None):
        raise UsageError("--sample I and --data SOURCE belong together: sample number I of that data set")
    if not measure and (samples is not None or radius is not None):
        raise UsageError("--samples and --radius say what is measured; add --measure")
    distance = RADIUS if radius is None else opt.positive("--radius", radius)
    if data is None:
        _refuse_without_sample(
            {
                "--data-root": data_root,
                "--split": split != "test",
                "--data-layout": data_layout != "nchw",
                "--offline": offline,
                "--mean": mean,
                "--std": std,
                "--layout": layout,
            }
        )
    opt.one_of("--split", split, opt.SPLITS)
    opt.one_of("--data-layout", data_layout, opt.DATA_LAYOUTS)
    limit = opt.memory_size("--memory", memory)
    with sink(output_file) as out, Reporter(quiet) as reporter:
        from certify_cli import load_data, load_model
        from certify_cli.load.preprocessing import fit

        @cache
        def chosen() -> Dataset:
            """The samples, loaded once: before the model is lowered where its sizes are the data's, else after."""
            return load_data(
                str(data),
                root=data_root,
                split=split,
                samples=(samples or SAMPLES) if measure else f"{sample}:{int(sample or 0) + 1}",
                data_layout=data_layout,
                offline=offline,
                notify=None if quiet else reporter.note,
            )

        def sample_shape() -> tuple[int, ...] | None:
            return None if data is None else tuple(chosen().x.shape[1:])

        loaded = load_model(
            model,
            activation=activation,
            output=output,
            input_shape=opt.shape(input_shape) or sample_shape,
            layout=layout,
        )
        reporter.notes(loaded.notes)
        if data is None:
            reporter.stage("bounding the network")
            out.write(layer_bounds(loaded.network, loaded.info, form, out.view))
            return
        x = chosen().x
        network = fit(
            loaded.network,
            tuple(x.shape[1:]),
            mean=opt.numbers("--mean", mean) or None,
            std=opt.numbers("--std", std) or None,
            layout=layout,
        )
        reporter.stage("bounding the network")
        if sample is not None:
            out.write(sample_losses(network, x.double(), sample, limit, loaded.info, form, out.view))
            return
        from certify_cli.run.engine import refuse_foreign_labels

        reporter.notes(chosen().notes)
        refuse_foreign_labels(chosen(), network.classes)
        advance = reporter.counter(len(x), "measuring")
        out.write(measured_curvature(network, chosen(), distance, loaded.info, form, out.view, advance))


def _refuse_without_sample(options: dict[str, Any]) -> None:
    """UsageError for an option that says how a sample is read; an empty value counts as not given."""
    given = [name for name, value in options.items() if value]
    if given:
        raise UsageError(f"{given[0]} says how a sample is read, but none is asked for; add --sample I --data SOURCE")
