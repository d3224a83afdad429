"""The options of the commands that read finished runs (`diff`, `verify`, `report`), declared once.

Nothing here imports torch: `--help` and completion read this file.
"""

from __future__ import annotations

import math
from typing import Annotated

import typer

from certify_cli.cli.options import FORMAT_DEFAULT, POSITION, choice, plain_number
from certify_cli.plain import decimal

REPORT_FORMATS = ("table", "json", "markdown")
PART = plain_number(decimal, "a plain number such as 0.01", -math.inf, math.inf)

OldRecords = Annotated[
    str, typer.Argument(metavar="OLD", help="Records of a run: what certify wrote as JSON or JSON lines.")
]
NewRecords = Annotated[str, typer.Argument(metavar="NEW", help="Records of the run to compare with it.")]
Tolerance = Annotated[
    float,
    typer.Option(
        "--tolerance",
        metavar="T",
        parser=PART,
        help="How far a figure may fall: accuracies by T (0.01 is one percent of the samples), radii by the part T.",
    ),
]
ReportFormat = Annotated[
    str | None,
    choice(
        "--format", REPORT_FORMATS, "A table to read, JSON, or Markdown for a pull request.", default=FORMAT_DEFAULT
    ),
]
OneRecords = Annotated[
    str, typer.Argument(metavar="RECORDS", help="Records of a run: what certify wrote as JSON or JSON lines.")
]
DataOfRun = Annotated[
    str | None,
    typer.Option("--data", metavar="SOURCE", help="Where the samples are.", show_default="where the run found them"),
]
WitnessesOfRun = Annotated[
    str | None,
    typer.Option(
        "--witnesses", metavar="FILE.npz", help="What certify --witnesses wrote in the run.", show_default=False
    ),
]
CertificateOfRun = Annotated[
    str | None,
    typer.Option(
        "--certificate", metavar="FILE.npz", help="What certify --certificate wrote in the run.", show_default=False
    ),
]
Share = Annotated[
    float,
    typer.Option(
        "--share",
        metavar="P",
        parser=PART,
        help="Part of the records to compute anew that are not proved (at least 4; 0: none).",
    ),
]
SeedOfCheck = Annotated[
    int, typer.Option("--seed", metavar="N", parser=POSITION, help="Draws that share, and starts the attacks.")
]
ManyRecords = Annotated[
    list[str], typer.Argument(metavar="RECORDS...", help="Records of runs: what certify wrote as JSON or JSON lines.")
]
Title = Annotated[
    str | None, typer.Option("--title", metavar="TEXT", help="Of the page.", show_default="model and data")
]
WitnessFile = Annotated[
    str | None,
    typer.Option(
        "--witnesses",
        metavar="FILE.npz",
        help="What certify --witnesses wrote in the first run: shows the samples with the smallest radii.",
        show_default=False,
    ),
]
SvgFolder = Annotated[
    str | None, typer.Option("--svg", metavar="FOLDER", help="Write every plot as an SVG file.", show_default=False)
]
PngFolder = Annotated[
    str | None, typer.Option("--png", metavar="FOLDER", help="Write every plot as a PNG file.", show_default=False)
]
