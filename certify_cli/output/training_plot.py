"""The plot of a training run: loss and accuracies by epoch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from certify_cli.output.drawing import rendered
from certify_cli.output.plots import LIGHT
from certify_cli.training.loop import Epoch, scores

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WHAT = "--save-plot"


def training_plot(history: Sequence[Epoch], radius: float) -> bytes:
    """An SVG file of the loss, and of accuracy and accuracy certified at `radius` on the validation samples."""
    return rendered(lambda: _figure(history, radius), "svg", salt="training", paper=LIGHT["paper"], what=WHAT)


def _figure(history: Sequence[Epoch], radius: float) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.7), layout="constrained")
    left = figure.subplots()
    right = left.twinx()
    compared = scores(history)
    numbers = [number for number, _ in compared]
    left.plot(numbers, [score.accuracy for _, score in compared], color=LIGHT["run0"], label="accuracy")
    left.plot(
        numbers, [score.certified for _, score in compared], color=LIGHT["run1"], label=f"certified at {radius:g}"
    )
    right.plot([epoch.number for epoch in history], [epoch.loss for epoch in history], color="#8a8f99", label="loss")
    left.set(xlabel="epoch", ylabel="share of validation samples", ylim=(0, 1))
    right.set(ylabel="loss")
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure
