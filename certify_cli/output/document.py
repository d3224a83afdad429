"""The arguments of every format: the records of a run in order, and the reader's view."""

from __future__ import annotations

from dataclasses import dataclass


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
