"""`curvcert bounds MODEL`: Lipschitz and curvature bounds of a network, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from certify_cli.output.console import Column, grid
from certify_cli.output.document import View
from certify_cli.output.json import pretty
from certify_cli.output.layers import layer_title
from certify_cli.output.numbers import UP, number
from certify_cli.records import SCHEMA, ModelInfo

if TYPE_CHECKING:
    from certify_cli.bounds.global_bounds.layer_report import LayerRow
    from certify_cli.network.graph import Network

COLUMNS = (
    Column("layer", wraps=True),  # name, kind and shape: a narrow terminal has them below one another
    Column("norm", right=True),
    Column("slope", right=True),
    Column("Lipschitz", right=True),
    Column("curvature", right=True),
    Column("share", right=True),
)


def layer_bounds(network: Network, info: ModelInfo, form: str, view: View) -> str:
    """The bounds of every layer as text in the format `form`: json or table."""
    from certify_cli.bounds.global_bounds.layer_report import layer_table

    rows = layer_table(network)
    return pretty(document(rows, info)) + "\n" if form == "json" else layer_grid(rows, view)


def document(rows: Sequence[LayerRow], info: ModelInfo) -> dict[str, Any]:
    """The rows as JSON has them."""
    return {"schema": SCHEMA, "model": asdict(info), "layers": [row.to_dict() for row in rows]}


def layer_grid(rows: Sequence[LayerRow], view: View) -> str:
    """The rows as a table."""
    return grid(COLUMNS, [cells(row) for row in rows], view)


def cells(row: LayerRow) -> tuple[str, ...]:
    """A row of the table; every number is an upper bound and is shown rounded up."""
    return (
        layer_title(row.name, row.kind, row.shape),
        *(number(value, UP) for value in (row.norm, row.slope, row.lipschitz, row.curvature)),
        "-" if row.share is None else f"{100 * row.share:.1f} %",
    )
