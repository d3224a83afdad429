"""What every format is given: the records of a run in order, and how wide and colourful the reader's view is."""

from __future__ import annotations

from dataclasses import dataclass


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
