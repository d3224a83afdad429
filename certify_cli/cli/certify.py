"""`curvcert certify`: a radius with proof for every sample."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import typer

from certify_cli.cli import options as opt
from certify_cli.cli.reporter import Reporter
from certify_cli.cli.sink import atomic, refusing, sink
from certify_cli.cli.witnesses import save_witnesses
from certify_cli.errors import UsageError
from certify_cli.output.document import Record
from certify_cli.output.formats import FORMATS
from certify_cli.records import Sample, Summary, summarise
from certify_cli.run.settings import Settings

if TYPE_CHECKING:
    from certify_cli.run.engine import Job

PRESENTATION = {"quiet", "output", "format", "all_rows", "witnesses"}
"""Options that change no result; they are left out of the run line, which so stays the same with and without them."""


def certify(
    context: typer.Context,
    model: opt.ModelFile,
    data: opt.DataSource,
    data_root: opt.DataRoot = None,
    split: opt.Split = "test",
    samples: opt.Samples = None,
    shuffle: opt.Shuffle = False,
    seed: opt.Seed = 0,
    data_layout: opt.DataLayout = "nchw",
    resize: opt.Resize = None,
    offline: opt.Offline = False,
    mean: opt.Mean = None,
    std: opt.Std = None,
    layout: opt.Layout = None,
    activation: opt.ActivationName = None,
    method: opt.Method = "auto",
    effort: opt.Effort = "normal",
    attack: opt.Attack = "certificate",
    eps: opt.Eps = None,
    device: opt.Device = "auto",
    batch_size: opt.BatchSize = "auto",
    threads: opt.Threads = "auto",
    memory: opt.Memory = "auto",
    format: opt.RecordFormat = None,
    output: opt.OutputFile = None,
    all_rows: opt.AllRows = False,
    witnesses: opt.Witnesses = None,
    quiet: opt.Quiet = False,
) -> None:
    """Certify a radius for every sample of a data set.

    No perturbation of a smaller Euclidean norm changes the model's prediction: this is proved, not tested.
    """
    form_name = opt.format_of(format, output, FORMATS)
    form = FORMATS[form_name]
    opt.npz_name("--witnesses", witnesses)
    if witnesses is not None and attack == "none":
        raise UsageError(
            "--witnesses writes the attacks that are found, but --attack none looks for none; leave out one of the two"
        )
    opt.one_of("--split", split, opt.SPLITS)
    opt.one_of("--data-layout", data_layout, opt.DATA_LAYOUTS)
    settings = Settings(
        method=method,
        effort=effort,
        attack=attack,
        eps=tuple(eps or ()),
        device=device,
        batch_size=opt.count_or_auto("--batch-size", batch_size),
        threads=opt.count_or_auto("--threads", threads),
        memory=opt.memory_size("--memory", memory),
        seed=seed,
        mean=opt.numbers("--mean", mean),
        std=opt.numbers("--std", std),
        layout=layout,
    )

    # both files are opened before the work, so that a wrong path costs nothing
    with (
        sink(output, all_rows) as out,
        atomic(witnesses, "--witnesses", "wb") if witnesses is not None else nullcontext() as witness_file,
        Reporter(quiet, bar=not (form.streams and out.terminal)) as reporter,
    ):
        if form_name == "csv" and eps:
            reporter.note("csv has one row a sample; the accuracies at --eps are in the formats json, jsonl and table")
        from certify_cli import load_data, load_model
        from certify_cli.certificates.methods import METHODS
        from certify_cli.load.data import named_shape
        from certify_cli.run.engine import prepare

        opt.one_of("--method", method, dict.fromkeys(["auto", *METHODS]))
        loaded = load_model(model, activation=activation)
        reporter.notes(loaded.notes)
        shape = named_shape(data)
        if shape is not None:
            from certify_cli.load.fit import fit

            # a set that does not fit is refused before it is downloaded
            fit(loaded.network, shape, mean=settings.mean or None, std=settings.std or None, layout=layout)
        chosen = load_data(
            data,
            root=data_root,
            split=split,
            samples=samples,
            shuffle=shuffle,
            seed=seed,
            data_layout=data_layout,
            resize=resize,
            offline=offline,
            notify=None if quiet else reporter.note,
        )
        reporter.notes(chosen.notes)
        started = time.perf_counter()
        reporter.stage("bounding the network")
        job = prepare(loaded, chosen, settings, _arguments(context))
        reporter.notes(job.run.notes)
        for text in form.render(_records(job, settings.eps, started, reporter), out.view):
            out.write(text)
        if witness_file is not None:
            with refusing("--witnesses"):
                save_witnesses(witness_file, job.witnesses, tuple(chosen.x.shape[1:]))


def _arguments(context: typer.Context) -> dict[str, Any]:
    """The options as typed or defaulted, by name."""
    return {name: value for name, value in sorted(context.params.items()) if name not in PRESENTATION}


def _records(job: Job, eps: tuple[str, ...], started: float, reporter: Reporter) -> Iterator[Record]:
    """The run line, every sample as it is done, the summary."""
    yield job.run
    done: list[Sample] = []
    for sample in reporter.track(job.samples(), job.total, "certifying"):
        done.append(sample)
        yield sample
    summary = summarise(done, eps, time.perf_counter() - started, job.search_seconds)
    if at_chance_level(summary, job.run.model.classes):
        reporter.warning(
            f"accuracy {summary.accuracy:.4f} is no better than guessing among {job.run.model.classes} classes: the "
            "model may expect another input (see --mean, --std and --layout)"
        )
    yield summary


CHANCE_SAMPLES = 20


def at_chance_level(summary: Summary, classes: int) -> bool:
    """Whether the accuracy suggests that the model sees inputs it was not trained on.

    Half as much again as guessing, but never more than a tenth above it: 0.75 of two classes is an honest accuracy.
    Fewer than twenty labelled samples say nothing.
    """
    if summary.accuracy is None or summary.samples < CHANCE_SAMPLES:
        return False
    return summary.accuracy <= min(1.5 / classes, 1 / classes + 0.1)
