"""Activations: a table of rows, one a function (theory section 0)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from certify_cli.network.graph import Shape


@dataclass(frozen=True, eq=False)
class Activation:
    """An elementwise function with everything the bounds need of it. Ranges are outward-rounded.

    `slope` and `curvature` are phi' and phi''. `curvature_range` is None where phi' jumps (ReLU and its kin): such a
    node has a Lipschitz constant but no curvature.
    """

    name: str
    value: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]
    curvature: Callable[[Tensor], Tensor] | None
    slope_range: tuple[float, float]
    curvature_range: tuple[float, float] | None
    parameters: dict[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> str:
        return self.name

    def output_shape(self, *shapes: Shape) -> Shape:
        return shapes[0]

    def apply(self, *values: Tensor) -> Tensor:
        return self.value(values[0])
