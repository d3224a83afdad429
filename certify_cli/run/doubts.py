"""Figures of a finished run that look wrong, in sentences: most often the input is not what the model expects."""

from __future__ import annotations

from certify_cli.records import Run, Summary

CHANCE_SAMPLES = 20


def doubts(run: Run, summary: Summary) -> list[str]:
    """Sentences that warn of figures which look wrong."""
    classes = run.model.classes
    if not at_chance_level(summary, classes):
        return []
    return [
        f"accuracy {summary.accuracy:.4f} is no better than guessing among {classes} classes: the model may expect "
        "another input (see --mean, --std and --layout)"
    ]


def at_chance_level(summary: Summary, classes: int) -> bool:
    """Whether the accuracy suggests that the model sees inputs it was not trained on.

    Half as much again as guessing, but never more than a tenth above it: 0.75 of two classes is an honest accuracy.
    Fewer than twenty labelled samples say nothing.
    """
    if summary.accuracy is None or summary.samples < CHANCE_SAMPLES:
        return False
    return summary.accuracy <= min(1.5 / classes, 1 / classes + 0.1)
