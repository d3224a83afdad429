"""`curvcert verify`: a finished run checked by other code than made it; exit 1 where a record is contradicted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from certify_cli.cli import options as opt
from certify_cli.cli import record_options as rec
from certify_cli.cli.exit_codes import DONE, NOT_MET
from certify_cli.cli.reporter import Reporter
from certify_cli.cli.sink import sink
from certify_cli.errors import RecordsError, UsageError, shown
from certify_cli.output.read import read_document
from certify_cli.output.verified import RENDERED, Row, Verified
from certify_cli.records import Run

if TYPE_CHECKING:
    from certify_cli.data.datasets import Dataset


def verify(
    records: rec.OneRecords,
    model: opt.ModelFile,
    data: rec.DataOfRun = None,
    data_root: opt.DataRoot = None,
    witnesses: rec.WitnessesOfRun = None,
    certificate: rec.CertificateOfRun = None,
    share: rec.Share = 0.01,
    seed: rec.SeedOfCheck = 0,
    offline: opt.Offline = False,
    format: rec.ReportFormat = None,
    output: opt.OutputFile = None,
    all_rows: opt.AllRows = False,
    quiet: opt.Quiet = False,
) -> int:
    """Verify the records of a finished run against the model and the data, by other code than made them.

    Every record ends as proved, recomputed or attacked only. Exit 1 where anything in them is not so.
    """
    form = opt.format_of(format, output, RENDERED)
    if not 0 <= share <= 1:
        raise UsageError(f"--share {share} is not a part between 0 and 1")
    with sink(output, all_rows) as out, Reporter(quiet) as reporter:
        result = read_document(records)
        attacks = _arrays(witnesses, ("index", "x", "d"), "--witnesses")
        tangents = _arrays(certificate, ("index", "rival", "d"), "--certificate")
        from certify_cli import load_model
        from certify_cli.audit.verify.verify import OUTCOMES, Verifier
        from certify_cli.load.model import of_run

        run = result.run

        @cache
        def samples() -> Dataset:
            """The data, loaded once: before the model is lowered where its input sizes are the data's, else after."""
            return _data(run, data, data_root, offline, reporter)

        how = of_run(run)
        how["input_shape"] = how["input_shape"] or (lambda: tuple(samples().x.shape[1:]))
        loaded = load_model(model, **how)
        wrong = _of_hash("model", run.model.sha256, loaded.info.sha256)
        rows: list[Row] = []
        notes: list[str] = []
        if not wrong:
            chosen = samples()
            wrong = _of_hash("data", run.data.sha256, chosen.sha256)
            for path, arrays in ((witnesses, attacks), (certificate, tangents)):
                if arrays is not None and arrays["d"].shape[1:] != chosen.x.shape[1:]:
                    raise RecordsError(
                        f"{path}: d has shape {arrays['d'].shape}, a sample of the data {tuple(chosen.x.shape[1:])}; "
                        "name a file that this run wrote"
                    )
        if not wrong:
            reporter.stage("reading the network")
            verifier = Verifier(result, loaded, chosen, attacks, tangents, share, seed)
            notes = verifier.notes
            reporter.notes(notes)
            wrong = list(verifier.of_run)
            advance = reporter.counter(len(result.samples), "verifying")
            for checked in verifier.records():
                rows.append(Row(**asdict(checked)))
                advance()
        found = Verified(run, records, model, OUTCOMES, tuple(wrong), rows, tuple(notes))
        out.last(RENDERED[form](found, out.view))
    return NOT_MET if found.contradictions else DONE


def _of_hash(what: str, said: str, found: str) -> list[str]:
    if said == found:
        return []
    return [f"the {what} is not the run's: its sha256 is {found[:12]}..., the run line says {shown(said[:12])}..."]


def _arrays(path: str | None, keys: tuple[str, ...], option: str) -> Mapping[str, Any] | None:
    if path is None:
        return None
    from certify_cli.data.npz import read_rows

    return read_rows(Path(path), keys, f"a file that certify {option} wrote is needed")


def _data(run: Run, source: str | None, root: str | None, offline: bool, reporter: Reporter) -> Dataset:
    """The samples that the run line names, from where it says or from where the options do."""
    from certify_cli import load_data

    said = run.arguments
    source = source or said.get("data")
    if source is None:
        raise UsageError("the run line names no data; say --data SOURCE")
    resize = said.get("resize")
    return load_data(
        source,
        root=root or said.get("data_root"),
        split=said.get("split") or "test",
        samples=said.get("samples"),
        shuffle=bool(said.get("shuffle")),
        seed=said.get("seed") or 0,
        data_layout=said.get("data_layout") or "nchw",
        resize=tuple(resize) if resize else None,
        offline=offline,
        notify=None if reporter.quiet else reporter.note,
    )
