"""Affine operations that move numbers and compute nothing: reshaping, slices, transposes, padding, copies."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from certify_cli.network.affine import AffineOp
from certify_cli.network.graph import Shape
from certify_cli.numerics.rounding import up


@dataclass(frozen=True, eq=False)
class Reshape(AffineOp):
    """The same numbers in another shape."""

    shape: Shape
    title: str = "reshape"

    def output_shape(self, *shapes: Shape) -> Shape:
        if math.prod(shapes[0]) != math.prod(self.shape):
            raise ValueError(f"cannot reshape a value of shape {shapes[0]} to {self.shape}")
        return self.shape

    def linear(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], *self.shape)

    absolute = linear

    def transpose(self, y: Tensor, shape: Shape) -> Tensor:
        return y.reshape(y.shape[0], *shape)

    absolute_transpose = transpose

    @property
    def terms(self) -> int:
        return 0

    def _norm(self, shape: Shape) -> float:
        return 1.0

    _row_norm = _norm
    _infinity_norm = _norm


@dataclass(frozen=True, eq=False)
class Grid:
    """Data movement of images, (channels, *space) to (channels, *space), the same at every pixel.

    Output channel c is input channel channels[c], or zero where that is -1; output pixel p along an axis is input pixel
    start + step p, or zero where that lies outside.
    """

    channels: Tensor
    start: tuple[int, ...]
    step: tuple[int, ...]

    def index(self, given: Shape, taken: Shape) -> Tensor:
        """What `Select.index` is for this movement from `given` to `taken`."""
        place, outside = self.channels.reshape(-1, *[1] * len(self.start)), self.channels < 0
        outside = outside.reshape(place.shape)
        for axis, (start, step) in enumerate(zip(self.start, self.step, strict=True)):
            pixel = start + step * torch.arange(taken[axis + 1], device=place.device)
            pixel = pixel.reshape(-1, *[1] * (len(self.start) - 1 - axis))
            place, outside = place * given[axis + 1] + pixel, outside | (pixel < 0) | (pixel >= given[axis + 1])
        return place.masked_fill(outside, -1)


@dataclass(frozen=True, eq=False)
class Select(AffineOp):
    """Data movement: output entry j is input entry `index[j]` (row-major), or zero where index[j] = -1.

    index: int64, of the output's shape.   size: entries of the input.
    Its norm is the square root of the largest number of copies of one entry: 1 for transposes, slices and zero padding.
    """

    index: Tensor
    size: int
    title: str = "select"

    @classmethod
    def of(cls, function: Callable[[Tensor], Tensor], shape: Shape, title: str = "select") -> Select:
        """The data movement that `function` performs on values of `shape` (batch first), read off numbered entries."""
        size = math.prod(shape)
        numbered = torch.arange(1, size + 1, dtype=torch.float64).reshape(1, *shape)
        index = function(numbered).squeeze(0).round().to(torch.int64) - 1
        return cls(index, size, title)

    def output_shape(self, *shapes: Shape) -> Shape:
        if math.prod(shapes[0]) != self.size:
            raise ValueError(f"cannot select from a value of shape {shapes[0]}: {self.size} entries expected")
        return tuple(self.index.shape)

    def linear(self, x: Tensor) -> Tensor:
        flat, index = x.flatten(1), self.index.flatten()
        picked = flat[:, index.clamp(min=0)]
        if self._has_zeros:
            picked = picked.masked_fill(index < 0, 0.0)
        return picked.reshape(x.shape[0], *self.index.shape)

    @cached_property
    def _has_zeros(self) -> bool:
        return bool((self.index < 0).any())

    absolute = linear

    def transpose(self, y: Tensor, shape: Shape) -> Tensor:
        if self.copies <= 1:  # a selection, too, and to gather is quicker than to add
            return self._back.linear(y).reshape(y.shape[0], *shape)
        index = self.index.flatten()
        kept = index >= 0
        out = torch.zeros(y.shape[0], self.size, dtype=y.dtype, device=y.device)
        return out.index_add(1, index[kept], y.flatten(1)[:, kept]).reshape(y.shape[0], *shape)

    @cached_property
    def _back(self) -> Select:
        """The transpose where no entry is copied: where each entry of the input goes."""
        index = self.index.flatten()
        kept = (index >= 0).nonzero()[:, 0]
        back = torch.full((self.size,), -1, dtype=torch.int64, device=index.device)
        back[index[kept]] = kept
        return Select(back, len(index))

    def after(self, first: Select) -> Select:
        """The movement of what `first` moved, as one."""
        chosen = first.index.flatten()[self.index.clamp(min=0)]
        return Select(chosen.masked_fill(self.index < 0, -1), first.size, self.title)

    def keeps(self, shape: Shape) -> bool:
        """Whether values of `shape` stay as they are."""
        index = self.index
        return index.shape == shape and torch.equal(index.flatten(), torch.arange(self.size, device=index.device))

    absolute_transpose = transpose

    @cached_property
    def copies(self) -> int:
        """The largest number of times one input entry is used."""
        index = self.index[self.index >= 0]
        return int(torch.bincount(index, minlength=1).max()) if index.numel() else 0

    def grid(self, shape: Shape) -> Grid | None:
        """The movement as one of images of `shape`; None where it is not the same at every pixel."""
        grids: dict[Shape, Grid | None] = self.__dict__.setdefault("_grids", {})
        if shape not in grids:
            grids[shape] = self._grid(shape)
        return grids[shape]

    def _grid(self, shape: Shape) -> Grid | None:
        if self.index.dim() != len(shape) or len(shape) < 2 or not bool((self.index >= 0).any()):
            return None
        there = (self.index >= 0).nonzero()
        coordinates, rest = [], self.index[self.index >= 0]
        for size in reversed(shape):
            coordinates.append(rest % size)
            rest = rest // size
        coordinates.reverse()
        channels = torch.full(self.index.shape[:1], -1, dtype=torch.long, device=self.index.device)
        channels[there[:, 0]] = coordinates[0]
        starts, steps = [], []
        for axis in range(1, len(shape)):
            pixel, source = there[:, axis], coordinates[axis]
            first, last = int(pixel.argmin()), int(pixel.argmax())
            span = int(pixel[last] - pixel[first])
            step = int(source[last] - source[first]) // span if span else 1
            starts.append(int(source[first]) - step * int(pixel[first]))
            steps.append(step)
        found = Grid(channels, tuple(starts), tuple(steps))
        right = min(steps) > 0 and torch.equal(found.index(shape, tuple(self.index.shape)), self.index)
        return found if right else None

    @property
    def terms(self) -> int:
        return self.copies if self.copies > 1 else 0  # for the transpose, which sums copies

    def _norm(self, shape: Shape) -> float:
        return math.sqrt(self.copies) if math.isqrt(self.copies) ** 2 == self.copies else up(math.sqrt(self.copies), 1)

    def _row_norm(self, shape: Shape) -> float:
        return 1.0

    _infinity_norm = _row_norm
