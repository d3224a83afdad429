"""The plots of a report, drawn with matplotlib: pure functions of finished runs.

Colours are names of roles. In a page they become CSS variables, so that one drawing serves light and dark; in a file of
their own they are `LIGHT`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from certify_cli.errors import shown
from certify_cli.output.console import class_name
from certify_cli.output.drawing import matplotlib, rendered
from certify_cli.records import Result, counted_radius, counts

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

LIGHT = {
    "ink": "#1c2330",
    "faint": "#c9ced8",
    "paper": "#ffffff",
    "run0": "#1f5fb4",
    "run1": "#c2570c",
    "run2": "#0f7b53",
    "run3": "#8e3fa8",
    "run4": "#8a6d00",
    "run5": "#b3214b",
}
DARK = {
    "ink": "#e4e8f0",
    "faint": "#3b4353",
    "paper": "#14181f",
    "run0": "#7db3ff",
    "run1": "#ffa866",
    "run2": "#5ed1a0",
    "run3": "#d79bf0",
    "run4": "#e0c04a",
    "run5": "#ff8aa8",
}
MOST_RUNS = 6
"""Runs in one report at most: one for each colour."""
WIDE, HIGH = 6.4, 3.7
"""Inches."""
BINS = 30
LONGEST_LABEL = 40
"""Characters of a name in a drawing."""
POINTS = 400
"""Radii at which a curve is drawn."""


@dataclass(frozen=True)
class Plot:
    """One plot.

    name: of its file.   says: its caption, which also describes it to screen readers.
    fits: whether the runs hold the figures that it draws.
    """

    name: str
    title: str
    says: str
    draw: Callable[[Axes, Sequence[Result]], None]
    fits: Callable[[Sequence[Result]], bool]


def names(results: Sequence[Result]) -> list[str]:
    """A short name for each run: the model's file, and where these are equal whatever differs; all are distinct."""
    files = [shown(re.split(r"[\\/]", result.run.model.path)[-1], LONGEST_LABEL) for result in results]
    for extra in ("method", "effort", "started"):
        if len(set(files)) == len(files):
            break
        files = [
            f"{file}, {shown(getattr(result.run, extra), LONGEST_LABEL)}"
            for file, result in zip(files, results, strict=True)
        ]
    if len(set(files)) < len(files):
        files = [f"{k + 1}: {file}" for k, file in enumerate(files)]
    return [f" {file}" if file.startswith("_") else file for file in files]  # matplotlib hides labels that begin so


def share_of(result: Result) -> str:
    """The name of a share of the samples: an accuracy only where there are labels."""
    return "accuracy" if result.summary.accuracy is not None else "share"


def curves(results: Sequence[Result]) -> tuple[NDArray[Any], list[tuple[NDArray[Any], NDArray[Any] | None]]]:
    """Radii (POINTS,), and for every run two shares of its samples at each of them.

    The shares: certified at the radius, and not attacked at it (None where no attack is known), each (POINTS,).
    """
    import numpy as np

    furthest = max((counted_radius(s) for result in results for s in result.samples), default=0.0)
    attacks = [s.attack_radius for result in results for s in result.samples if s.attack_radius is not None]
    if attacks:
        furthest = max(furthest, float(np.quantile(attacks, 0.95)))
    levels = np.linspace(0, 1.05 * furthest or 1.0, POINTS)

    def above(values: list[float]) -> NDArray[Any]:
        return 1 - np.searchsorted(np.sort(values), levels, side="right") / len(values)

    found = []
    for result in results:
        broken = [0.0 if not counts(s) else s.attack_radius or math.inf for s in result.samples]
        known = any(math.isfinite(value) and value > 0 for value in broken)
        found.append((above([counted_radius(s) for s in result.samples]), above(broken) if known else None))
    return levels, found


def accuracy(axes: Axes, results: Sequence[Result]) -> None:
    """Certified and attack accuracy against the radius."""
    levels, found = curves(results)
    for k, (name, (certified, unattacked)) in enumerate(zip(names(results), found, strict=True)):
        axes.plot(levels, certified, color=f"run{k}", label=name)
        if unattacked is not None:
            axes.plot(levels, unattacked, color=f"run{k}", linestyle="dashed", label=f"{name}, not attacked")
    axes.set(xlabel="radius", ylabel=share_of(results[0]), xlim=(0, levels[-1]), ylim=(0, 1.02))


def distribution(axes: Axes, results: Sequence[Result]) -> None:
    """Histogram of the certified radii."""
    import numpy as np

    radii = [[counted_radius(s) for s in result.samples] for result in results]
    edges = np.linspace(0, max(max(r) for r in radii) or 1.0, BINS + 1).tolist()
    for k, (name, values) in enumerate(zip(names(results), radii, strict=True)):
        axes.hist(values, edges, color=f"run{k}", alpha=0.35 if len(results) > 1 else 0.8, label=name)
        axes.hist(values, edges, color=f"run{k}", histtype="step")
    axes.set(xlabel="certified radius (misclassified: 0)", ylabel="samples", xlim=(0, edges[-1]))


def both(result: Result) -> list[tuple[float, float]]:
    """(certified, attack) of the samples that have both."""
    return [(s.certified_radius, s.attack_radius) for s in result.samples if s.certified_radius and s.attack_radius]


def gap(axes: Axes, results: Sequence[Result]) -> None:
    """The certified radius against the attack radius, sample by sample."""
    pairs = [both(result) for result in results]
    smallest = min(min(pair) for found in pairs for pair in found)
    largest = max(max(pair) for found in pairs for pair in found)
    axes.plot([smallest, largest], [smallest, largest], color="faint", linewidth=1)
    for k, (name, found) in enumerate(zip(names(results), pairs, strict=True)):
        if found:
            axes.scatter([a for _, a in found], [c for c, _ in found], s=9, color=f"run{k}", alpha=0.7, label=name)
    axes.set(xlabel="attack radius", ylabel="certified radius", xscale="log", yscale="log")


def classes(axes: Axes, results: Sequence[Result]) -> None:
    """The mean certified radius of every class."""
    import numpy as np

    labels = sorted({s.label for result in results for s in result.samples if s.label is not None})
    width = 0.8 / len(results)
    for k, (name, result) in enumerate(zip(names(results), results, strict=True)):
        means = [float(np.mean([counted_radius(s) for s in result.samples if s.label == c] or [0.0])) for c in labels]
        positions = np.arange(len(labels)) + (k - (len(results) - 1) / 2) * width
        axes.bar(positions, means, width, color=f"run{k}", label=name)
    ticks = [shown(class_name(c, results[0].run), LONGEST_LABEL) for c in labels]
    long = len(labels) > 12 or max(map(len, ticks)) > 8
    axes.set_xticks(range(len(labels)), ticks, rotation=60 if long else 0, ha="right" if long else "center")
    axes.set(xlabel="class", ylabel="mean certified radius")


PLOTS = (
    Plot(
        "accuracy",
        "Accuracy against radius",
        "The share of samples that are correct and certified (solid) or not attacked (dashed) at each radius. The "
        "truth lies between the two.",
        accuracy,
        lambda results: True,
    ),
    Plot(
        "distribution",
        "Certified radii",
        "How many samples have which certified radius; misclassified ones count as 0.",
        distribution,
        lambda results: True,
    ),
    Plot(
        "gap",
        "Certified against attacked",
        "Every sample with both radii: the nearer to the line, the less is unknown. None can lie above it.",
        gap,
        lambda results: any(both(result) for result in results),
    ),
    Plot(
        "classes",
        "By class",
        "The mean certified radius of the samples of each class, misclassified ones as 0.",
        classes,
        lambda results: any(s.label is not None for result in results for s in result.samples),
    ),
)


def figure(plot: Plot, results: Sequence[Result]) -> Figure:
    """The plot as a figure of matplotlib, in the light colours."""
    matplotlib("report")
    from matplotlib import colors
    from matplotlib.figure import Figure

    colors.get_named_colors_mapping().update(LIGHT)
    made = Figure(figsize=(WIDE, HIGH), layout="constrained", facecolor="none")
    axes = made.subplots()
    axes.set_facecolor("none")
    plot.draw(axes, results)
    axes.grid(color="faint", linewidth=0.5)
    axes.set_axisbelow(True)
    axes.tick_params(colors="ink", which="both")
    for tick in axes.get_xticklabels() if plot.name == "classes" else ():
        tick.set_parse_math(False)  # a class may be called anything
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set_color("ink")
    for side, spine in axes.spines.items():
        spine.set(color="faint", visible=side in ("left", "bottom"))
    if axes.get_legend_handles_labels()[0]:
        legend = made.legend(loc="outside lower center", ncols=2, frameon=False)
        for text in legend.get_texts():
            text.set_color("ink")
            text.set_parse_math(False)
    return made


def inline(plot: Plot, results: Sequence[Result]) -> str:
    """An SVG element for a page that defines the colours as CSS variables; no id of it is another plot's."""
    text = drawn(plot, results, "svg").decode()
    text = text[text.index("<svg") :]
    text = re.sub("<[^>]*>", lambda tag: _in_page(tag[0], plot.name), text)  # names between the tags stay as they are
    return re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true">', text, count=1)


def _in_page(tag: str, name: str) -> str:
    """A tag of a drawing with CSS variables for colours and `name` in front of its ids."""
    for role, colour in LIGHT.items():
        tag = tag.replace(colour, f"var(--{role})")
    return re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{name}-", tag)


def drawn(plot: Plot, results: Sequence[Result], form: str) -> bytes:
    """The plot as the content of a file, "svg" or "png", the same for the same runs."""
    return rendered(lambda: figure(plot, results), form, salt=plot.name, paper=LIGHT["paper"], what="report")
