"""What every format is given: the records of a run in order, and how wide and colourful the reader's view is."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from certify_cli.records import Result, Run, Sample, Summary

Record = Run | Sample | Summary


@dataclass(frozen=True)
class View:
    """How text meant for a person is shown; data formats ignore it, but for `chain`.

    `width` is in columns, None for as wide as the content (a file or a pipe); `all_rows` shows every sample, `plot`
    draws the accuracy curve. `chain` is what the first sample's line is linked to, where lines are appended.
    """

    width: int | None = None
    color: bool = False
    unicode: bool = True
    all_rows: bool = False
    plot: bool = False
    chain: str = ""


def collect(records: Iterable[Record]) -> Result:
    """Wait for all records. ValueError unless they are one run, its samples and one summary, in this order."""
    first, *samples, last = records
    if not (isinstance(first, Run) and isinstance(last, Summary)):
        raise ValueError("the records of a run begin with its run line and end with its summary")
    if not all(isinstance(sample, Sample) for sample in samples):
        raise ValueError("only samples stand between the run line and the summary")
    return Result(first, tuple(samples), last)  # type: ignore[arg-type]
