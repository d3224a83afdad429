"""Drawings of matplotlib as the contents of files, the same for the same data."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from certify_cli.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DOTS = 160
"""Dots per inch of a PNG."""


def matplotlib(what: str) -> Any:
    """The package; UsageError, beginning with `what`, where it is not installed."""
    try:
        import matplotlib as package
    except ImportError:
        raise UsageError(
            f"{what} draws with matplotlib, which is not installed: pip install 'curvcert[report]'"
        ) from None
    return package


def rendered(draw: Callable[[], Figure], form: str, *, salt: str, paper: str, what: str) -> bytes:
    """A figure as "svg" or "png".   salt: of the ids in an SVG.   paper: colour behind a PNG.   what: for a refusal."""
    stream = io.BytesIO()
    settings = {"svg.fonttype": "none", "svg.hashsalt": salt, "font.family": "sans-serif", "font.size": 10}
    with matplotlib(what).rc_context(settings):
        figure = draw()
        if form == "svg":
            figure.savefig(stream, format=form, metadata={"Date": None})
        else:
            figure.savefig(stream, format=form, facecolor=paper, dpi=DOTS)
    return stream.getvalue()
