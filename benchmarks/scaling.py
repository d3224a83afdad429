"""How the local bound's and CROWN's time and memory grow with a network's width and depth (methods.py --scaling).

Random tanh networks 784-...-10 on random images: weights N(0, 1/fan-in), so that pre-activations stay near 1 from
layer to layer and every activation is curved there. Each figure is taken in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import crown
from common import header, in_process, row

WIDTHS: dict[str, tuple[int, ...]] = {f"{width}x2": (width,) * 2 for width in (64, 128, 256, 512, 1024)}
DEPTHS: dict[str, tuple[int, ...]] = {f"128x{depth}": (128,) * depth for depth in (1, 2, 3, 4, 6, 8)}
SAMPLES = 10
CURVES = {"fast": "fast", "local": "normal", "CROWN": "CROWN"}
"""Columns of methods.py that are measured, and their names in the plot."""

Figures = dict[str, dict[str, dict[str, Any]]]
"""Network, then column: its radii, `ms` a sample and `peak` MiB."""


def write_networks(folder: Path, samples: int) -> None:
    """The networks as ONNX files with their index.json, and the images as images.npz."""
    import numpy as np
    import torch
    from torch import nn
    from train_mlps import mlp

    for name, widths in (WIDTHS | DEPTHS).items():
        torch.manual_seed(0)
        model = mlp(widths, nn.Tanh)
        for layer in model:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
        torch.onnx.export(model, (torch.zeros(1, 1, 28, 28),), folder / f"{name}.onnx", input_names=["x"],
                          dynamo=False, dynamic_axes={"x": {0: "batch"}})  # fmt: skip
    entry = {"dataset": "random", "mean": [0.0], "std": [1.0], "layout": "NCHW", "source": "benchmarks/scaling.py"}
    (folder / "index.json").write_text(json.dumps({f"{name}.onnx": entry for name in WIDTHS | DEPTHS}))
    images = np.random.default_rng(0).random((samples, 1, 28, 28), dtype=np.float32)
    np.savez(folder / "images.npz", x=images)


def measured(script: str, threads: int, samples: int) -> Figures:
    """Every curve on every network; one that fails or is not importable is missing."""
    found: Figures = {}
    columns = [c for c in CURVES if c != "CROWN" or crown.importable()]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_networks(folder, samples)
        for network in WIDTHS | DEPTHS:
            found[network] = {}
            for column in columns:
                result = in_process(script, [
                    "--models", name, "--data", f"random={folder / 'images.npz'}", "--samples", str(samples),
                    "--threads", str(threads), "--only", f"{network}.onnx", "--columns", column,
                ])  # fmt: skip
                if result is not None:
                    found[network][column] = _figures(result, column)
    return found


def _figures(result: dict[str, Any], column: str) -> dict[str, Any]:
    if column == "CROWN":
        return {"radii": list(result["radii"].values()), "ms": result["ms"], "peak": result["peak"]}
    return {"radii": result["radii"][column], "ms": result["ms"][column], "peak": result["peak"]}


def rows(figures: Figures) -> list[list[Any]]:
    """Per network: mean radius, milliseconds a sample and peak MiB of each curve."""
    table = []
    for network, by_column in figures.items():
        values: list[Any] = [network]
        for kind in ("radii", "ms", "peak"):
            for column in CURVES:
                value = by_column.get(column, {}).get(kind)
                values.append(sum(value) / len(value) if isinstance(value, list) else value)
        table.append(values)
    return table


def plot(figures: Figures, file: Path) -> None:
    """Time above, memory below; width to the left, depth to the right."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(9, 6), sharey="row", layout="constrained")
    sides: tuple[tuple[str, dict[str, tuple[int, ...]], Callable[[tuple[int, ...]], int]], ...]
    sides = (("width, two layers", WIDTHS, lambda w: w[0]), ("layers of 128", DEPTHS, len))
    for right, (label, networks, abscissa) in enumerate(sides):
        for below, (kind, unit) in enumerate((("ms", "milliseconds a sample"), ("peak", "peak MiB"))):
            axis = axes[below][right]
            for column, title in CURVES.items():
                points = [
                    (abscissa(widths), figures[name][column][kind])
                    for name, widths in networks.items()
                    if column in figures[name]
                ]
                if points:
                    axis.plot(*zip(*points, strict=True), marker="o", label=title)
            axis.set_xscale("log")
            axis.set_yscale("log" if kind == "ms" else "linear")
            ticks = [abscissa(widths) for widths in networks.values()]
            axis.set_xticks(ticks, [str(tick) for tick in ticks])
            axis.minorticks_off()
            if below:
                axis.set_ylim(bottom=0)
                axis.set_xlabel(label)
            if not right:
                axis.set_ylabel(unit)
    axes[0][0].legend()
    figure.savefig(file)


def run(script: str, options: argparse.Namespace) -> None:
    """Measure, print the table, draw."""
    figures = measured(script, options.threads, options.samples or SAMPLES)
    kinds = ("", ", ms", ", MiB")
    print(header(["network", *(c + kind for kind in kinds for c in CURVES)], text=("network",)))
    for values in rows(figures):
        print(row(values))
    if find_spec("matplotlib") is None:
        print("matplotlib is not importable: no plot", file=sys.stderr)
    else:
        plot(figures, options.svg)
        print(f"drawn to {options.svg}", file=sys.stderr)
