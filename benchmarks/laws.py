"""How time and memory grow with the size of the images, the depth and the number of classes, on convolutional networks.

    python benchmarks/laws.py [--svg docs/laws.svg] [--threads 2]

- size: ResNet-18, 1,000 classes, images of 32 to 224 pixels a side, `lipschitz`;
- depth: residual networks for 32 x 32 pixels, 10 classes, of 8 to 56 layers by `lipschitz`, of 8 and 20 by `auto`;
- classes: ResNet-18 at 64 x 64 with 10 to 10,000 classes, `lipschitz`.

Random weights and images of noise, as in deep.py, each figure in a process of its own. A law is the exponent p of
figure ~ x^p between the smallest and the largest network. Prints Markdown, and draws with matplotlib.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import deep
from common import header, row

FIGURES = {"load, s": "load", "bounds, s": "global bounds", "s a sample": "a sample", "peak MiB": "peak memory"}
"""Columns of deep.py, and their names in the plots."""
LIMIT = 600.0
"""Seconds that a sample may take."""


@dataclass(frozen=True)
class Family:
    """Networks that differ in one number.

    networks: that number -> name in deep.py, size, classes.   samples: measured on each.
    """

    title: str
    unit: str
    method: str
    networks: dict[int, tuple[str, int, int]]
    samples: int


SIZES, DEPTHS, CLASSES = (32, 64, 128, 224), (8, 20, 32, 56), (10, 100, 1000, 10000)
FAMILIES = (
    Family("size", "pixels a side", "lipschitz", {s: ("resnet18", s, 1000) for s in SIZES}, 2),
    Family("depth", "layers", "lipschitz", {d: (f"{deep.CIFAR}{d}", 32, 10) for d in DEPTHS}, 4),
    Family("depth", "layers", "auto", {d: (f"{deep.CIFAR}{d}", 32, 10) for d in DEPTHS[:2]}, 1),
    Family("classes", "classes", "lipschitz", {c: ("resnet18", 64, c) for c in CLASSES}, 4),
)


def measured(family: Family, threads: int) -> dict[int, dict[str, Any]]:
    """The rows of deep.py by the family's number; networks that fail are missing."""
    found = {}
    for number, (name, size, classes) in family.networks.items():
        arguments = ["--method", family.method, "--samples", str(family.samples), "--threads", str(threads)]
        result = deep.measured(name, size, classes, [*arguments, "--seconds", str(LIMIT)])
        if result is not None:
            found[number] = result
            print(row([family.title, number, family.method, *(result[c] for c in (*FIGURES, "radius"))]), flush=True)
    return found


def law(figures: dict[int, dict[str, Any]], column: str) -> float:
    """The exponent between the smallest and the largest network."""
    first, last = min(figures), max(figures)
    return math.log(figures[last][column] / figures[first][column]) / math.log(last / first)


def plot(found: list[tuple[Family, dict[int, dict[str, Any]]]], file: Path) -> None:
    """Seconds above, memory below, a column for each family."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, len(found), figsize=(3.4 * len(found), 6), layout="constrained", squeeze=False)
    for place, (family, figures) in enumerate(found):
        above, below = axes[0][place], axes[1][place]
        for column, title in FIGURES.items():
            axis = below if column == "peak MiB" else above
            axis.plot(list(figures), [f[column] for f in figures.values()], marker="o", label=title)
        for axis in (above, below):
            axis.set_xscale("log")
            axis.set_xticks(list(figures), [str(number) for number in figures])
            axis.minorticks_off()
        above.set_yscale("log")
        above.set_title(f"{family.method}, by {family.title}")
        below.set_ylim(bottom=0)
        below.set_xlabel(family.unit)
    axes[0][0].set_ylabel("seconds")
    axes[1][0].set_ylabel("peak MiB")
    axes[0][0].legend()
    figure.savefig(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--svg", type=Path, help="draw here")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    print(header(("family", "number", "method", *FIGURES, "radius"), text=("family", "method")), flush=True)
    found = [(family, measured(family, options.threads)) for family in FAMILIES]
    print()
    print(header(("family", "method", *(f"{title}, exponent" for title in FIGURES.values())), ("family", "method")))
    for family, figures in found:
        if len(figures) > 1:
            print(row([family.title, family.method, *(law(figures, column) for column in FIGURES)]))
    if options.svg and find_spec("matplotlib") is None:
        print("matplotlib is not importable: no plot", file=sys.stderr)
    elif options.svg:
        plot(found, options.svg)


if __name__ == "__main__":
    main()
