"""`curvcert convert`: a model file to safetensors with the architecture declared beside the weights."""

from __future__ import annotations

from dataclasses import asdict

from certify_cli.cli import options as opt
from certify_cli.cli.reporter import Reporter
from certify_cli.cli.sink import sink
from certify_cli.output.console import pairs
from certify_cli.output.json import pretty
from certify_cli.records import SCHEMA
from certify_cli.whole_file import refuse_existing


def convert(
    source: opt.SourceFile,
    target: opt.TargetFile,
    force: opt.Force = False,
    output: opt.ModelOutput = None,
    input_shape: opt.InputShape = None,
    format: opt.PrintedFormat = "table",
    quiet: opt.Quiet = False,
) -> None:
    """Convert a model file to safetensors.

    The architecture is declared in the file, which is loaded again before success is claimed.
    """
    opt.one_of("--format", format, opt.PLAIN_FORMATS)
    if not force:
        refuse_existing(target)
    with sink(None) as out, Reporter(quiet) as reporter:
        from certify_cli import load_model
        from certify_cli.load.convert import convert as write

        write(source, target, output=output, input_shape=opt.shape(input_shape))
        written = load_model(target)
        reporter.notes(written.notes)
        if format == "json":
            out.write(pretty({"schema": SCHEMA, "source": source, "model": asdict(written.info)}) + "\n")
        else:
            rows = [("read", source), ("wrote", target), ("sha256", written.info.sha256)]
            out.write(pairs([*rows, ("classes", str(written.info.classes))]))
