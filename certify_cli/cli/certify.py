"""`curvcert certify`: a radius with proof for every sample."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from typing import IO, TYPE_CHECKING, Any

import typer

from certify_cli.cli import options as opt
from certify_cli.cli.configuration import ConfigFile, tell
from certify_cli.cli.reporter import Reporter
from certify_cli.cli.run_options import RunOptions, spread
from certify_cli.cli.signals import noted
from certify_cli.cli.sink import appending, job_summary, sink
from certify_cli.cli.witnesses import save_tangents, save_witnesses
from certify_cli.errors import UsageError, quoted
from certify_cli.output.document import View
from certify_cli.output.formats import FORMATS
from certify_cli.output.terminal_plot import available
from certify_cli.records import Record, Sample, Summary
from certify_cli.run.doubts import doubts, shortfalls
from certify_cli.run.resume import begun
from certify_cli.run.settings import Settings
from certify_cli.whole_file import refusing, whole_file

if TYPE_CHECKING:
    from certify_cli.run.engine import CertifiedSample, Job, TangentPoint, Witness


@spread
def certify(
    context: typer.Context,
    run: RunOptions,
    format: opt.RecordFormat = None,
    output_file: opt.OutputFile = None,
    all_rows: opt.AllRows = False,
    plot: opt.PlotCurve = False,
    witnesses: opt.Witnesses = None,
    certificate: opt.Certificate = None,
    resume: opt.Resume = False,
    config: ConfigFile = None,
    quiet: opt.Quiet = False,
) -> None:
    """Certify a radius for every sample of a data set.

    No perturbation of a smaller Euclidean norm changes the model's prediction: this is proved, not tested.
    """
    form_name = opt.format_of(format, output_file, FORMATS)
    form = FORMATS[form_name]
    opt.npz_name("--witnesses", witnesses)
    opt.npz_name("--certificate", certificate)
    if witnesses is not None and run.attack == "none":
        raise UsageError(
            "--witnesses writes the attacks that are found, but --attack none looks for none; leave out one of the two"
        )
    if plot:
        if form_name != "table":
            raise UsageError(f"--plot draws below the table, and the format is {form_name}; see report for other plots")
        available()
    settings = run.settings()
    if resume:
        beside = {"--witnesses": witnesses, "--certificate": certificate}
        _resumed(context, run, settings, form_name, output_file, beside, quiet)
        return

    # all files are opened before the work, so that a wrong path costs nothing
    with (
        sink(output_file, all_rows, plot) as out,
        _beside(witnesses, "--witnesses") as witness_file,
        _beside(certificate, "--certificate") as tangent_file,
        Reporter(quiet, bar=not (form.streams and out.terminal)) as reporter,
        ExitStack() as until_written,
    ):
        tell(context, reporter)
        if form_name == "csv" and settings.eps:
            reporter.note("csv has one row a sample; the accuracies at --eps are in the formats json, jsonl and table")
        from certify_cli.run.engine import prepare

        loaded, chosen = run.load(settings, reporter)
        reporter.stage("bounding the network")
        job = prepare(loaded, chosen, settings, run.arguments())
        reporter.notes(job.run.notes)
        advance = reporter.counter(job.total, "certifying")
        attacks: list[Witness] = []
        tangents: list[TangentPoint] = []

        def keep(sample: CertifiedSample) -> None:
            advance()
            if witness_file is not None and sample.witness is not None:
                attacks.append(sample.witness)
            if tangent_file is not None and sample.tangent is not None:
                tangents.append(sample.tangent)

        records: list[Record] = []
        flag = until_written.enter_context(noted())
        made = job.records(watch=keep, halted=flag.halted, tell=reporter.doing)
        for text in form.render(_kept(_doubted(made, job, reporter), records), out.view):
            out.write(text)
        if form_name == "github":
            job_summary("".join(FORMATS["markdown"].render(iter(records), View(all_rows=True))))
        shape = tuple(chosen.x.shape[1:])
        if witness_file is not None:
            with refusing("--witnesses"):
                save_witnesses(witness_file, attacks, shape)
        if tangent_file is not None:
            with refusing("--certificate"):
                save_tangents(tangent_file, tangents, shape)
    flag.stop(_what_is_written(records[-1], job))


def _beside(path: str | None, option: str) -> AbstractContextManager[IO[Any] | None]:
    """The file of an option, opened; None where the option is not given."""
    return nullcontext() if path is None else whole_file(path, f"{option} {quoted(path)}", "wb")


def _kept(records: Iterator[Record], kept: list[Record]) -> Iterator[Record]:
    """The records, and a list that has them afterwards."""
    for record in records:
        kept.append(record)
        yield record


def _doubted(records: Iterator[Record], job: Job, reporter: Reporter) -> Iterator[Record]:
    """The records, with warnings of figures that look wrong, and notes of time that ended, before the summary."""
    samples: list[Sample] = []
    for record in records:
        if isinstance(record, Sample):
            samples.append(record)
        if isinstance(record, Summary):
            for text in doubts(job.run, record):
                reporter.warning(text)
            reporter.notes(shortfalls(job.run, samples, record))
        yield record


def _what_is_written(last: Record, job: Job) -> str:
    """How the sentence on a signal ends."""
    count = last.samples if isinstance(last, Summary) else 0
    return f" after {count} of {job.total} samples; what was proved by then is written"


KEPT_PARTS = 20
"""A run that keeps its batches has at least so many, so that little is lost."""


def _resumed(
    context: typer.Context,
    run: RunOptions,
    settings: Settings,
    form: str,
    output: str | None,
    beside: dict[str, str | None],
    quiet: bool,
) -> None:
    """Into a file that keeps every batch, from where it ends."""
    if output is None or form != "jsonl":
        raise UsageError("--resume goes on with a file of JSON lines; name it: -o FILE.jsonl")
    for option, path in beside.items():
        if path is not None:
            raise UsageError(f"{option} and --resume exclude one another: records keep none of what was done before")
    with Reporter(quiet) as reporter:
        tell(context, reporter)
        past = begun(output)
        if past is not None:
            settings = past.settings(settings)
        from certify_cli.run.engine import prepare

        loaded, chosen = run.load(settings, reporter)
        reporter.stage("bounding the network")
        largest = max(1, len(chosen.x) // KEPT_PARTS)
        job = prepare(loaded, chosen, settings, run.arguments(), largest_batch=largest)
        reporter.notes(job.run.notes)
        done = 0
        if past is not None:
            past.check(job.run, job.indices)
            if past.finished:
                reporter.note(f"{output} is finished already, {len(past.samples)} samples")
                return
            done = past.whole
            reporter.note(f"going on after {done} of {job.total} samples in {output}")
        advance = reporter.counter(job.total, "certifying", done)
        records: list[Record] = []
        with noted() as flag:
            with appending(output, 0 if past is None else past.size) as out:
                view = out.view if past is None else replace(out.view, chain=past.chain)
                made = job.records(past, lambda sample: advance(), flag.halted, reporter.doing)
                for text in FORMATS[form].render(_kept(_doubted(made, job, reporter), records), view):
                    out.write(text)
            flag.stop(f"{_what_is_written(records[-1], job)}, and the same command goes on from there")
