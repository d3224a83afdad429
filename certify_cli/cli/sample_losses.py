"""`curvcert bounds MODEL --sample I --data SOURCE`: the terms by which the local bound lowers one sample's margin."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from certify_cli.output.console import Column, grid
from certify_cli.output.document import View
from certify_cli.output.json import pretty
from certify_cli.output.layers import layer_title
from certify_cli.output.numbers import DOWN, UP, number
from certify_cli.records import SCHEMA, ModelInfo

if TYPE_CHECKING:
    from torch import Tensor

    from certify_cli.certificates.loss_breakdown import Losses
    from certify_cli.network.graph import Network

COLUMNS = (
    Column("term", wraps=True),
    Column("half width", right=True),
    Column("nonlinear", right=True),
    Column("intercept", right=True),
    Column("quadratic", right=True),
    Column("residual", right=True),
    Column("loss", right=True),
    Column("of margin", right=True),
)
"""The columns between "term" and "loss" are the fields of `LossRow`, and empty for the gradient and the proof gap."""


def sample_losses(
    network: Network, x: Tensor, index: int, memory: int | None, info: ModelInfo, form: str, view: View
) -> str:
    """The losses of one sample as text.

    x (1, *input shape): the sample.   index: its position in the data set.   memory: bytes, or None for the default.
    form: json or table.
    """
    from certify_cli.certificates.loss_breakdown import of_sample

    losses = of_sample(network, x, memory)
    if form == "json":
        return pretty({"schema": SCHEMA, "model": asdict(info), "sample": index, "losses": losses.to_dict()}) + "\n"
    return f"sample {index}: {_account(losses)}{grid(COLUMNS, _rows(losses), view)}"


def _account(losses: Losses) -> str:
    margin, radius = number(losses.margin, DOWN), number(losses.radius, DOWN)
    lost = number(losses.margin - losses.left, UP)
    begin = f"class {losses.prediction} against {losses.rival}, margin {margin}; "
    if losses.left > 0:
        left = number(losses.left, DOWN)
        return (
            f"{begin}at least {left} of it is left\non the certified ball of radius {radius}; {lost} at most is lost:\n"
        )
    return f"{begin}the certified ball of radius {radius}\nis proved otherwise; by this bound {lost} at most is lost:\n"


def _rows(losses: Losses) -> list[tuple[str, ...]]:
    def share(value: float) -> str:
        return f"{100 * value / losses.margin:.1f} %"

    blank = ("",) * 5
    rows: list[tuple[str, ...]] = [("gradient", *blank, number(losses.gradient), share(losses.gradient))]
    for row in losses.layers:
        parts = (number(value) for value in (row.intercept, row.quadratic, row.residual, row.total))
        title = layer_title(row.name, row.kind, row.shape)
        rows.append((title, number(row.half_width), f"{100 * row.nonlinear:.1f} %", *parts, share(row.total)))
    rows.append(("proof gap", *blank, number(losses.gap), share(losses.gap)))
    return rows
