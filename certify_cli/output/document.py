"""The arguments of every format: the records of a run in order, and the reader's view."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from certify_cli.records import Result, Run, Sample, Summary

Record = Run | Sample | Summary


@dataclass(frozen=True)
class View:
    """How text for people is shown; data formats ignore all but `chain`.

    width: in columns; None for as wide as the content (a file or a pipe).   all_rows: show every sample.
    plot: draw the accuracy curve.   chain: the link before the first sample's line, where lines are appended.
    """

    width: int | None = None
    color: bool = False
    unicode: bool = True
    all_rows: bool = False
    plot: bool = False
    chain: str = ""


def collect(records: Iterable[Record]) -> Result:
    """All records of a run. Raises ValueError unless they are a run, its samples and its summary, in this order."""
    first, *samples, last = records
    if not (isinstance(first, Run) and isinstance(last, Summary)):
        raise ValueError("the records of a run begin with its run line and end with its summary")
    if not all(isinstance(sample, Sample) for sample in samples):
        raise ValueError("only samples stand between the run line and the summary")
    return Result(first, tuple(samples), last)  # type: ignore[arg-type]
