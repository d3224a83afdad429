"""The certified-accuracy curve in a terminal, drawn with plotext."""

from __future__ import annotations

from certify_cli.errors import UsageError
from certify_cli.output.document import View
from certify_cli.output.plots import curves, share_of
from certify_cli.records import Result

WIDEST, HIGH = 90, 18
"""Characters."""
ASCII = str.maketrans("┌┐└┘┬┴┤├┼─│", "+++++++++-|")


def available() -> None:
    """Raises UsageError, naming what to install, where plotext is missing."""
    try:
        import plotext  # noqa: F401
    except ImportError:
        raise UsageError("--plot needs plotext, which is not installed: pip install 'curvcert[report]'") from None


def curve(result: Result, view: View) -> str:
    """The shares of samples that are certified and that are not attacked, against the radius, as text."""
    import plotext

    levels, [(certified, unattacked)] = curves([result])
    plotext.clear_figure()
    plotext.plotsize(min(view.width or WIDEST, WIDEST), HIGH)
    plotext.theme("clear")
    plotext.plot(levels.tolist(), certified.tolist(), label="certified", marker="braille" if view.unicode else "*")
    if unattacked is not None:
        plotext.plot(levels.tolist(), unattacked.tolist(), label="not attacked", marker=".")
    plotext.ylim(0, 1)
    plotext.xlabel("radius")
    plotext.ylabel(share_of(result))
    text: str = plotext.uncolorize(plotext.build())
    return "".join(f"{line.rstrip()}\n" for line in (text if view.unicode else text.translate(ASCII)).splitlines())
