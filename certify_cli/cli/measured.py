"""`curvcert bounds MODEL --measure --data SOURCE`: estimates at samples, below the bounds that hold everywhere."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import TYPE_CHECKING

from certify_cli.cli.layer_bounds import document, layer_grid
from certify_cli.output.console import Column, grid, printable
from certify_cli.output.document import View
from certify_cli.output.json import pretty
from certify_cli.output.numbers import UP, number
from certify_cli.records import ModelInfo

if TYPE_CHECKING:
    from certify_cli.attacks.measured_curvature import Measurement
    from certify_cli.data.datasets import Dataset
    from certify_cli.network.graph import Network

RADIUS = 0.1
"""How far gradients are compared, where nothing else is asked for."""
SAMPLES = "100"
"""Which samples are measured, where nothing else is asked for."""

COLUMNS = (
    Column("estimate", wraps=True),
    Column("mean", right=True),
    Column("median", right=True),
    Column("largest", right=True),
    Column("bound", right=True),
)
"""All but the last column are estimates; the bound holds at every point."""

TITLES = {
    "gradient_norm": "gradient norm",
    "curvature": "curvature",
    "normalised_curvature": "curvature / gradient norm",
    "gradient_change": "relative change of gradient, mean direction",
    "largest_gradient_change": "relative change of gradient, largest",
}


def measured_curvature(
    network: Network, data: Dataset, radius: float, info: ModelInfo, form: str, view: View, advance: Callable[[], None]
) -> str:
    """The table of layers and what is measured at the samples as text in the format `form`: json or table.

    network: takes the samples as they are.   radius: at which gradients are compared.
    """
    from certify_cli.attacks.measured_curvature import loss_bounds, measured
    from certify_cli.bounds.global_bounds.layer_report import layer_table

    rows = layer_table(network)
    bounds = loss_bounds(rows[-1].lipschitz, rows[-1].curvature)
    found = measured(network, data.x, data.y, data.indices, radius, advance)
    if form == "json":
        return pretty({**document(rows, info), "measured": {**found.to_dict(), "bounds": bounds}}) + "\n"
    head = (
        f"at {len(found.samples)} samples of {printable(data.name)}: estimates, of the {found.loss};\n"
        f"gradients are compared at distance {found.radius:g}; the bound holds everywhere:\n"
    )
    text = f"{layer_grid(rows, view)}\n{head}{grid(COLUMNS, _cells(found, bounds), view)}"
    return f"{text}{printable(found.note)}\n" if found.note else text


def _cells(found: Measurement, bounds: dict[str, float | None]) -> list[tuple[str, ...]]:
    return [
        (
            title,
            *(number(found.over_samples(figure, of)) for of in (statistics.fmean, statistics.median, max)),
            number(bounds.get(figure), UP),
        )
        for figure, title in TITLES.items()
    ]
