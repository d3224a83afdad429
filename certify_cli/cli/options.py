"""The options of every command, each declared once, and the parsers of their texts.

Options of the commands that read finished runs are in `record_options`. Nothing here imports torch: `--help` and
completion read this file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from certify_cli.efforts import EFFORTS
from certify_cli.errors import UsageError, quoted
from certify_cli.names import AUTO, METHOD_NAMES
from certify_cli.output.formats import FORMATS
from certify_cli.output.verdict import RENDERED
from certify_cli.plain import decimal, integer, ratio
from certify_cli.run.settings import ATTACKS, LAYOUTS

DATA_LAYOUTS = ("nchw", "nhwc")
SPLITS = ("test", "train")
PLAIN_FORMATS = ("table", "json")
CHECK_FORMATS = tuple(RENDERED)
SUFFIXES = {"md": "markdown", "xml": "junit"}
"""Suffixes of files that are not the format's name."""

METHODS = (AUTO, *METHOD_NAMES)
UNSET = "auto"
"""The text that leaves a number to the program."""

Number = TypeVar("Number", int, float)


def plain_number(read: Callable[[str], Number], expected: str, lower: float, upper: float) -> Callable[[Any], Number]:
    """The parser of an option that holds a plain number in [lower, upper]. expected: what the refusal says of it."""

    def parse(text: Any) -> Number:
        if not isinstance(text, str):  # a default, or a value that was parsed before
            return text
        try:
            value = read(text)
        except ValueError:
            value = None
        if value is None or not lower <= value <= upper:
            raise typer.BadParameter(f"{quoted(text)} is not {expected}")
        return value

    return parse


POSITION = plain_number(integer, "a plain integer of at least 0", 0, 10**18)
_TIME = plain_number(decimal, "a number of seconds from 0.001 to 1e9", 1e-3, 1e9)
_PIXELS = plain_number(integer, f"a number of pixels from 1 to {2**16}", 1, 2**16)


def choice(flag: str, names: Sequence[str], help: str, default: str | bool = True) -> Any:
    """An option whose value is one of `names`; `one_of` checks it later, so that its message can list them.

    default: what `--help` shows as the default; True stands for the declared one.
    """

    def complete(incomplete: str) -> list[str]:
        return [name for name in names if name.startswith(incomplete)]

    return typer.Option(flag, metavar="|".join(names), help=help, autocompletion=complete, show_default=default)


ModelFile = Annotated[str, typer.Argument(metavar="MODEL", help="An ONNX or safetensors file.", show_default=False)]
SourceFile = Annotated[
    str, typer.Argument(metavar="IN", help="The ONNX or safetensors file to read.", show_default=False)
]
TargetFile = Annotated[str, typer.Argument(metavar="OUT", help="The safetensors file to write.", show_default=False)]
Force = Annotated[bool, typer.Option("--force", help="Overwrite OUT where it exists.")]
ActivationName = Annotated[
    str | None,
    typer.Option(
        "--activation",
        metavar="NAME[:PARAMETER]",
        help="Activation between the layers of a safetensors file that declares none, such as softplus:10.",
        show_default=False,
    ),
]

DataSource = Annotated[
    str,
    typer.Option(
        "--data",
        metavar="SOURCE",
        help="digits, mnist, fashion-mnist, kmnist, cifar10, cifar100, svhn, a FILE.npz with x and y, or a folder of "
        "images with one folder a class.",
        show_default=False,
        envvar="CURVCERT_DATA_SOURCE",  # CURVCERT_DATA is the root
    ),
]
SampleIndex = Annotated[
    int | None,
    typer.Option(
        "--sample",
        metavar="I",
        parser=POSITION,
        help="Where the local bound loses for this sample of --data.",
        show_default=False,
    ),
]
DataOfSample = Annotated[
    str | None,
    typer.Option("--data", metavar="SOURCE", help="The data set of --sample or --measure.", show_default=False),
]
Measure = Annotated[
    bool, typer.Option("--measure", help="Estimate curvature and gradients at samples of --data, beside the bounds.")
]
MeasuredSamples = Annotated[
    str | None,
    typer.Option(
        "--samples",
        metavar="N|A:B",
        help="Measure the first N samples, or those from A up to B.",
        show_default="the first 100",
    ),
]
MeasuredRadius = Annotated[
    str | None,
    typer.Option(
        "--radius",
        metavar="R",
        help="Measure how gradients change at this distance, such as 0.5 or 36/255.",
        show_default="0.1",
    ),
]
DataRoot = Annotated[
    str | None,
    typer.Option(
        "--data-root",
        metavar="FOLDER",
        envvar="CURVCERT_DATA",
        help="Where named data sets lie and are downloaded to.",
        show_default="the user cache",
    ),
]
Split = Annotated[str, choice("--split", SPLITS, "Which part of a named data set.")]
Samples = Annotated[
    str | None,
    typer.Option(
        "--samples", metavar="N|A:B", help="The first N samples, or those from A up to B.", show_default="all"
    ),
]
Shuffle = Annotated[bool, typer.Option("--shuffle", help="Draw the samples in the random order of --seed.")]
Seed = Annotated[
    int, typer.Option("--seed", metavar="N", parser=POSITION, help="Seed of --shuffle and of every random start.")
]
DataLayout = Annotated[str, choice("--data-layout", DATA_LAYOUTS, "How an npz file holds its images.")]
Resize = Annotated[
    tuple[int, int] | None,
    typer.Option("--resize", metavar="H W", parser=_PIXELS, help="Resize the images of a folder.", show_default=False),
]
Offline = Annotated[bool, typer.Option("--offline", help="Never download.")]

Mean = Annotated[
    list[str] | None,
    typer.Option(
        "--mean",
        metavar="M",
        help="Mean that the model expects subtracted: one value, or one a channel (repeat, or separate by commas).",
        show_default=False,
    ),
]
Std = Annotated[
    list[str] | None,
    typer.Option("--std", metavar="S", help="Standard deviation to divide by, given like --mean.", show_default=False),
]
Layout = Annotated[
    str | None, choice("--layout", LAYOUTS, "How the model takes its input, where its shape does not say.")
]

Method = Annotated[
    str, choice("--method", METHODS, "How to certify; auto takes the best of what applies, sample by sample.")
]
Effort = Annotated[str, choice("--effort", tuple(EFFORTS), "How much time to spend on tighter bounds.")]
Attack = Annotated[
    str,
    choice(
        "--attack",
        ATTACKS,
        "certificate: the attacks that the certificates promise, each replayed; search: nearer ones by a search, too.",
    ),
]
Eps = Annotated[
    list[str] | None,
    typer.Option(
        "--eps",
        metavar="R",
        help="Report the accuracy certified at this radius, such as 0.5 or 36/255 (may be repeated).",
        show_default=False,
    ),
]
Device = Annotated[
    str, typer.Option("--device", metavar="auto|cpu|cuda|cuda:N", help="Where to compute; results do not depend on it.")
]
BatchSize = Annotated[str, typer.Option("--batch-size", metavar="N|auto", help="Samples computed together.")]
Threads = Annotated[str, typer.Option("--threads", metavar="N|auto", help="Processor threads.")]
Memory = Annotated[
    str, typer.Option("--memory", metavar="SIZE|auto", help="Memory to stay within, such as 2GB or 512MB.")
]
Seconds = Annotated[
    float | None,
    typer.Option(
        "--seconds",
        metavar="S",
        parser=_TIME,
        help="Time that each sample may take, those of a batch together; what is proved by then counts. Global bounds "
        "of the model do not count.",
        show_default="no limit",
    ),
]
TotalSeconds = Annotated[
    float | None,
    typer.Option(
        "--total-seconds",
        metavar="T",
        parser=_TIME,
        help="Time that certifying may take, loading left out; the run then ends with what is proved.",
        show_default="no limit",
    ),
]

FORMAT_DEFAULT = "the suffix of the output file, such as .json; else table"

RecordFormat = Annotated[
    str | None,
    choice(
        "--format",
        tuple(FORMATS),
        "; ".join(f"{name}: {form.summary}" for name, form in FORMATS.items()) + ".",
        default=FORMAT_DEFAULT,
    ),
]
PlainFormat = Annotated[
    str | None, choice("--format", PLAIN_FORMATS, "A table to read, or JSON.", default=FORMAT_DEFAULT)
]
CheckFormat = Annotated[
    str | None,
    choice(
        "--format",
        CHECK_FORMATS,
        "A table to read; JSON; Markdown for a pull request; JUnit, SARIF or GitHub annotations for CI.",
        default=FORMAT_DEFAULT,
    ),
]
Exact = Annotated[
    bool, typer.Option("--exact", help="Certify every sample, also where the verdict is certain before the last.")
]
PrintedFormat = Annotated[str, choice("--format", PLAIN_FORMATS, "A table to read, or JSON.")]
OutputFile = Annotated[
    str | None,
    typer.Option(
        "--output-file", "-o", metavar="FILE", help="Write to FILE, whole or not at all.", show_default="stdout"
    ),
]
ModelOutput = Annotated[
    str | None,
    typer.Option(
        "--output",
        metavar="NAME",
        help="Which output of an ONNX file with several holds the logits, where the choice is not plain.",
        show_default=False,
    ),
]
InputShape = Annotated[
    str | None,
    typer.Option(
        "--input-shape",
        metavar="C,H,W",
        help="A sample's shape, where an ONNX file leaves sizes free.",
        show_default=False,
    ),
]
PlotCurve = Annotated[
    bool, typer.Option("--plot", help="Draw the certified accuracy against the radius below the table.")
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume",
        help="Keep every batch in -o FILE.jsonl as it is done; the same command goes on from there.",
    ),
]
AllRows = Annotated[bool, typer.Option("--all", help="Show every sample in the table, not only the first.")]
Witnesses = Annotated[
    str | None,
    typer.Option(
        "--witnesses",
        metavar="FILE.npz",
        help="Write index, x and perturbation d of every replayed attack.",
        show_default=False,
    ),
]
Certificate = Annotated[
    str | None,
    typer.Option(
        "--certificate",
        metavar="FILE.npz",
        help="Write index, rival and d: where curvature and dual took the tangent that certifies (for verify).",
        show_default=False,
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, notes or warnings on stderr.")]


def one_of(flag: str, value: str, names: Iterable[str]) -> str:
    """`value`, unchanged. Raises UsageError, listing `names`, for a value that is none of them."""
    listed = list(names)
    if value not in listed:
        raise UsageError(f"{flag} {quoted(value)} is not one of {', '.join(listed)}")
    return value


def format_of(format: str | None, output: str | None, names: Iterable[str]) -> str:
    """The value of --format, else the format that the suffix of the file `output` names, else the table."""
    listed = list(names)
    if format is not None:
        return one_of("--format", format, listed)
    suffix = Path(output or "").suffix.lower().removeprefix(".")
    named = SUFFIXES.get(suffix, suffix)
    return named if named in listed else "table"


def npz_name(flag: str, path: str | None) -> str | None:
    """`path`, unchanged. Raises UsageError for a name that does not end in .npz, the only format that is written."""
    if path is not None and Path(path).suffix.lower() != ".npz":
        raise UsageError(f"{flag} {quoted(path)}: the file is written as npz, so its name must end in .npz")
    return path


def numbers(flag: str, texts: Sequence[str] | None) -> tuple[float, ...]:
    """The plain numbers of a repeated or comma-separated option. Spaces may follow a comma. Raises UsageError."""
    pieces = [piece for text in texts or () for piece in re.split(", *", text)]
    return tuple(_parse(flag, piece, decimal, "a number", lambda value: True) for piece in pieces)


def positive(flag: str, text: str) -> float:
    """A number above 0, at most 1e6, that may be a fraction such as 36/255. Raises UsageError."""
    return _parse(flag, text, ratio, "a positive number such as 0.5 or 36/255", lambda value: 0 < value <= 1e6)


def count_or_auto(flag: str, text: str) -> int | None:
    """A positive integer, or None for `auto`. Raises UsageError."""
    if text == UNSET:
        return None
    return _parse(flag, text, integer, "a positive integer or auto", lambda value: value > 0)


UNITS = {"": 1, "B": 1} | {
    prefix + suffix: base ** (power + 1)
    for power, prefix in enumerate("KMGT")
    for suffix, base in (("", 1000), ("B", 1000), ("IB", 1024))
}


def memory_size(flag: str, text: str) -> int | None:
    """The bytes of a size such as 2GB (10^9 each), 2GiB (2^30 each) or 512MB; None for `auto`. Raises UsageError."""
    if text == UNSET:
        return None
    found = re.fullmatch(r"([0-9]{1,18}(?:\.[0-9]{1,18})?)(?: ?([A-Za-z]+))?", text, re.ASCII)
    unit = UNITS.get((found[2] or "").upper()) if found else None
    size = int(float(found[1]) * unit) if found and unit else 0
    if size < 1:
        raise UsageError(f"{flag} {quoted(text)} is not a size such as 2GB or 512MB, nor auto")
    return size


def _parse(
    flag: str, text: str, convert: Callable[[str], Number], expected: str, accept: Callable[[Number], bool]
) -> Number:
    refusal = UsageError(f"{flag} {quoted(text)} is not {expected}")
    try:
        value = convert(text)
    except ValueError as error:
        raise refusal from error
    if not accept(value):
        raise refusal
    return value


def shape(text: str | None) -> tuple[int, ...] | None:
    """The sizes in a text of --input-shape such as 3,32,32; None for None. Raises UsageError."""
    if text is None:
        return None
    if re.fullmatch(r"[1-9][0-9]{0,8}([,x][1-9][0-9]{0,8}){0,7}", text) is None:
        raise UsageError(f"--input-shape {text!r} is not a sample's shape such as 3,32,32")
    return tuple(int(part) for part in re.split("[,x]", text))
