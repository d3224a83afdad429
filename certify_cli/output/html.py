"""The report: finished runs on one self-contained page, for a browser or for print."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from certify_cli.errors import RecordsError, UsageError
from certify_cli.output import plots
from certify_cli.output.console import class_name, printable, summary_rows
from certify_cli.output.numbers import DOWN, UP, number, seconds
from certify_cli.records import Result, Sample
from certify_cli.version import __version__

if TYPE_CHECKING:
    import numpy as np

TEMPLATE = "report.html.j2"
MOST_IMAGES = 12
"""Samples shown at most, those with the smallest radii."""


@dataclass(frozen=True, eq=False)
class Witnessed:
    """An attacked sample. images: the sample, the perturbation, and their sum, each the source of an image element."""

    sample: Sample
    prediction: str
    label: str
    images: tuple[str, ...]

    @property
    def certified(self) -> str:
        return number(self.sample.certified_radius, DOWN)

    @property
    def attacked(self) -> str:
        return number(self.sample.attack_radius, UP)


@dataclass(frozen=True)
class Layers:
    """Bounds of a model's layers. rows: (layer, Lipschitz, curvature, share of the model's curvature in percent)."""

    name: str
    rows: tuple[tuple[str, str, str, float], ...]


def page(
    results: Sequence[Result], title: str, layers: Sequence[Layers] = (), witnesses: Sequence[Witnessed] = ()
) -> str:
    """The page as HTML."""
    environment = _environment()
    names = plots.names(results)
    drawings = [
        {"title": plot.title, "says": plot.says, "svg": plots.inline(plot, results)}
        for plot in plots.PLOTS
        if plot.fits(results)
    ]
    text: str = environment.get_template(TEMPLATE).render(
        title=title,
        version=__version__,
        names=names,
        runs=[_about(result) for result in results],
        figures=_figures(results),
        drawings=drawings,
        layers=layers,
        witnesses=witnesses,
        light=plots.LIGHT,
        dark=plots.DARK,
    )
    return text


def _environment() -> Any:
    try:
        import jinja2
    except ImportError:
        raise UsageError("report needs jinja2, which is not installed: pip install 'curvcert[report]'") from None
    loader = jinja2.PackageLoader("certify_cli", "output")
    return jinja2.Environment(loader=loader, autoescape=True, finalize=_line, trim_blocks=True, lstrip_blocks=True)


def _line(value: Any) -> Any:
    """A text made printable; anything else, such as a drawing, unchanged."""
    return printable(value) if type(value) is str else value


def _about(result: Result) -> list[tuple[str, str]]:
    """Names and values of a run: its model, data, settings and tool."""
    run = result.run
    return [
        ("model", run.model.path),
        ("sha256", run.model.sha256),
        ("data", f"{run.data.name}, {run.data.samples} samples"),
        ("sha256 of the data", run.data.sha256),
        ("method", f"{run.method}, effort {run.effort}, attack {run.attack}"),
        ("normalisation", _normalisation(run.preprocessing)),
        ("device", f"{run.device}, {run.dtype}, {run.threads} threads, batches of {run.batch_size}"),
        ("tool", f"{run.tool} {run.version}, torch {run.libraries.get('torch', '-')}"),
        ("started", f"{run.started}, took {seconds(result.summary.seconds)}"),
        *(("note", note) for note in run.notes),
    ]


def _normalisation(preprocessing: dict[str, Any]) -> str:
    mean, std = preprocessing.get("mean"), preprocessing.get("std")
    return "none" if not mean and not std else f"mean {mean}, std {std}"


def _figures(results: Sequence[Result]) -> list[tuple[str, list[str]]]:
    """The summaries side by side: names, and a value a run."""
    columns = [dict(summary_rows(result)) for result in results]
    rows = dict.fromkeys(name for column in columns for name in column)
    return [(name, [column.get(name, "-") for column in columns]) for name in rows]


def pictured(result: Result, archive: Any) -> list[Witnessed]:
    """The attacked samples with the smallest certified radii, from what `certify --witnesses` wrote.

    Raises RecordsError where the file is another run's.
    """
    import numpy as np

    row_of = {int(index): row for row, index in enumerate(archive["index"])}
    attacked = [sample for sample in result.samples if sample.attack_radius is not None]
    missing = [sample.index for sample in attacked if sample.index not in row_of]
    if missing or len(attacked) != len(row_of):
        raise RecordsError("--witnesses is not the file of this run: it is about other samples")
    found = []
    for sample in sorted(attacked, key=lambda s: (s.certified_radius or 0.0, s.index))[:MOST_IMAGES]:
        x, d = (np.asarray(archive[key][row_of[sample.index]], dtype=np.float64) for key in ("x", "d"))
        if abs(float(np.linalg.norm(d)) - (sample.attack_radius or 0.0)) > 1e-6 * (sample.attack_radius or 1.0):
            raise RecordsError(f"--witnesses is not the file of this run: sample {sample.index} has another witness")
        if not is_image(x.shape):
            return []
        scale = float(np.abs(d).max()) or 1.0
        run = result.run
        found.append(
            Witnessed(
                sample,
                class_name(sample.prediction, run),
                class_name(sample.label, run),
                tuple(picture(part) for part in (x, 0.5 + 0.5 * d / scale, x + d)),
            )
        )
    return found


def is_image(shape: tuple[int, ...]) -> bool:
    """One or three channels of at least two by two."""
    return len(shape) == 3 and shape[0] in (1, 3) and min(shape[1:]) > 1


def picture(values: np.ndarray) -> str:
    """(channels, height, width), clipped to [0, 1], as the source of an image element."""
    import numpy as np
    from PIL import Image

    pixels = np.round(255 * np.clip(values, 0, 1)).astype(np.uint8).transpose(1, 2, 0)
    image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    stream = io.BytesIO()
    image.save(stream, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"
