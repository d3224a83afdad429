"""What a user should know of a finished run: figures that look wrong, and time that ended before the work."""

from __future__ import annotations

from collections.abc import Iterable

from certify_cli.records import SIGNAL, Run, Sample, Summary

CHANCE_SAMPLES = 20
"""With fewer labelled samples an accuracy says nothing."""


def doubts(run: Run, summary: Summary) -> list[str]:
    """The warnings, as sentences."""
    classes = run.model.classes
    if not at_chance_level(summary, classes):
        return []
    return [
        f"accuracy {summary.accuracy:.4f} is no better than guessing among {classes} classes: the model may expect "
        "another input (see --mean, --std and --layout)"
    ]


def at_chance_level(summary: Summary, classes: int) -> bool:
    """Whether the accuracy is so low that the model probably sees inputs it was not trained on.

    The threshold is 1.5 times the accuracy of guessing, but at most 0.1 above it: 0.75 is an honest accuracy for two
    classes.
    """
    if summary.accuracy is None or summary.samples < CHANCE_SAMPLES:
        return False
    return summary.accuracy <= min(1.5 / classes, 1 / classes + 0.1)


def shortfalls(run: Run, samples: Iterable[Sample], summary: Summary) -> list[str]:
    """What time that ended has left undone, as sentences."""
    found = []
    if summary.stopped is not None:
        what = "a signal" if summary.stopped == SIGNAL else f"--{summary.stopped}"
        found.append(f"the run was ended by {what} after {summary.samples} of {run.data.samples} samples")
    cut = sum(sample.stopped is not None for sample in samples)
    if cut:
        found.append(f"time ended for {cut} of {summary.samples} samples; what was proved by then counts")
    return found
