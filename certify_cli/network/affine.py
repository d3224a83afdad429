"""Affine operations: the only operations that may stand between two nonlinear nodes, with bounds of their norms.

A model's layers between its activations are lowered (`lowering`) to seven primitives: `Dense`, `Scale`, `Shift`,
`Reshape` and `Select` here (`Select` is any data movement: slices, transposes, padding, expansion, nearest-neighbour
resizing), `Conv` and `ConvTranspose` in `convolution`. A new primitive is one subclass of `AffineOp`. Each applies
itself, its linear part W, the transpose of W and |W| to a batch, and bounds its norms (theory section 2).

Norm bounds are floats, rounded up. `terms` is k such that gamma_k bounds the relative rounding error of one
application against |W| |x| + |b|, roundings of computed weights (1/sqrt(var + eps), 1/9) included: such weights have a
relative error of `weight_error` u, and may have a `weight_tail` (parts, *shape broadcastable with the weight's), parts
of what the float64 numbers lack (`numerics.quotients`), which extended precision adds.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from certify_cli.network.graph import Shape
from certify_cli.numerics.norms import frobenius_norm, matrix_norm
from certify_cli.numerics.rounding import gamma, times, up, vector_norm_up


class AffineOp(ABC):
    """x -> W x + b. Subclasses are immutable and hold float64 tensors."""

    title: str = "affine"

    @abstractmethod
    def output_shape(self, *shapes: Shape) -> Shape:
        """The output's shape; ValueError where the input does not fit."""

    @abstractmethod
    def linear(self, x: Tensor) -> Tensor:
        """W x, batch first."""

    @abstractmethod
    def absolute(self, x: Tensor) -> Tensor:
        """|W| x (entrywise absolute value), batch first."""

    def bias(self) -> Tensor | None:
        """b, broadcastable with the output behind the batch; None for zero."""
        return None

    def apply(self, *values: Tensor) -> Tensor:
        (x,) = values
        bias = self.bias()
        out = self.linear(x)
        return out if bias is None else out + bias

    def transpose(self, y: Tensor, shape: Shape) -> Tensor:
        """W^T y for y (batch, *output_shape(shape)); gives (batch, *shape)."""
        return _adjoint(self.linear, y, shape)

    def absolute_transpose(self, y: Tensor, shape: Shape) -> Tensor:
        """|W|^T y."""
        return _adjoint(self.absolute, y, shape)

    @property
    @abstractmethod
    def terms(self) -> int:
        """k: gamma_k bounds the relative rounding error of one application."""

    def norm(self, shape: Shape) -> float:
        """Upper bound of the spectral norm of W on inputs of `shape`."""
        return self._remember("norm", shape, self._norm)

    def quick_norm(self, shape: Shape) -> float:
        """An upper bound of the spectral norm that costs little whatever the size of the image, and is less sharp."""
        return self.norm(shape)

    def row_norm(self, shape: Shape) -> float:
        """Upper bound of max_i ||W_i|| (the 2 -> infinity norm)."""
        return self._remember("row", shape, self._row_norm)

    def infinity_norm(self, shape: Shape) -> float:
        """Upper bound of max_i ||W_i||_1 (the infinity -> infinity norm)."""
        return self._remember("infinity", shape, self._infinity_norm)

    def frobenius_norm(self, shape: Shape) -> float:
        """Upper bound of ||W||_F: the number of rows, under the root, times the longest."""
        return times(up(math.sqrt(math.prod(self.output_shape(shape)))), self.row_norm(shape))

    @property
    def products(self) -> int:
        """Estimate of the multiplications per entry of the output."""
        return self.terms

    @abstractmethod
    def _norm(self, shape: Shape) -> float: ...

    @abstractmethod
    def _row_norm(self, shape: Shape) -> float: ...

    @abstractmethod
    def _infinity_norm(self, shape: Shape) -> float: ...

    def _remember(self, kind: str, shape: Shape, rule: Callable[[Shape], float]) -> float:
        """rule(shape), computed once for each kind and shape: the weights never change."""
        memo: dict[tuple[str, Shape], float] = self.__dict__.setdefault("_memo", {})
        if (kind, shape) not in memo:
            memo[kind, shape] = rule(shape)
        return memo[kind, shape]


def _adjoint(function: Callable[[Tensor], Tensor], y: Tensor, shape: Shape) -> Tensor:
    with torch.enable_grad():
        x = torch.zeros((y.shape[0], *shape), dtype=y.dtype, device=y.device, requires_grad=True)
        (result,) = torch.autograd.grad(function(x), x, y)
    return result


def longest_row(rows: Tensor) -> float:
    """Upper bound of the largest Euclidean norm of the rows of a matrix."""
    return float(vector_norm_up(rows).max())


def largest_row_sum(rows: Tensor) -> float:
    """Upper bound of the largest sum of absolute values of the rows of a matrix."""
    return up(float(rows.abs().sum(dim=1).max()), rows.shape[1] + 2)


@dataclass(frozen=True, eq=False)
class Dense(AffineOp):
    """y = x W^T + b on the last axis; weight (out, in)."""

    weight: Tensor
    offset: Tensor | None = None
    weight_error: int = 0
    title: str = "dense"
    weight_tail: Tensor | None = None

    def output_shape(self, *shapes: Shape) -> Shape:
        (shape,) = shapes
        if not shape or shape[-1] != self.weight.shape[1]:
            raise ValueError(f"a dense layer of {self.weight.shape[1]} inputs cannot take a value of shape {shape}")
        return (*shape[:-1], self.weight.shape[0])

    def linear(self, x: Tensor) -> Tensor:
        return x @ self.weight.T

    @cached_property
    def _absolute_weight(self) -> Tensor:
        return self.weight.abs()

    def absolute(self, x: Tensor) -> Tensor:
        return x @ self._absolute_weight.T

    def transpose(self, y: Tensor, shape: Shape) -> Tensor:
        return y @ self.weight

    def absolute_transpose(self, y: Tensor, shape: Shape) -> Tensor:
        return y @ self._absolute_weight

    def bias(self) -> Tensor | None:
        return self.offset

    @property
    def terms(self) -> int:
        # for the transpose too, which sums over the outputs
        return max(self.weight.shape) + 1 + self.weight_error

    @property
    def products(self) -> int:
        return self.weight.shape[1]

    def _norm(self, shape: Shape) -> float:
        # errors of e |W| change the norm by up to e || |W| ||, which may be many times e ||W||
        return up(matrix_norm(self.weight) + gamma(self.weight_error) * frobenius_norm(self.weight), 2)

    def _row_norm(self, shape: Shape) -> float:
        return up(longest_row(self.weight), self.weight_error)

    def _infinity_norm(self, shape: Shape) -> float:
        return up(largest_row_sum(self.weight), self.weight_error)


@dataclass(frozen=True, eq=False)
class Scale(AffineOp):
    """Entrywise product with constants; `weight` is broadcastable with the value."""

    weight: Tensor
    weight_error: int = 0
    title: str = "scale"
    weight_tail: Tensor | None = None

    def output_shape(self, *shapes: Shape) -> Shape:
        return _broadcast_within(shapes[0], self.weight, "scale")

    def linear(self, x: Tensor) -> Tensor:
        return x * self.weight

    def absolute(self, x: Tensor) -> Tensor:
        return x * self.weight.abs()

    def transpose(self, y: Tensor, shape: Shape) -> Tensor:
        return self.linear(y)

    def absolute_transpose(self, y: Tensor, shape: Shape) -> Tensor:
        return self.absolute(y)

    @property
    def terms(self) -> int:
        return 1 + self.weight_error

    def _norm(self, shape: Shape) -> float:
        return up(float(self.weight.abs().max()), self.weight_error)

    _row_norm = _norm
    _infinity_norm = _norm


@dataclass(frozen=True, eq=False)
class Shift(AffineOp):
    """Entrywise sum with constants; `offset` is broadcastable with the value."""

    offset: Tensor
    title: str = "shift"

    def output_shape(self, *shapes: Shape) -> Shape:
        return _broadcast_within(shapes[0], self.offset, "shift")

    def linear(self, x: Tensor) -> Tensor:
        return x

    absolute = linear

    def transpose(self, y: Tensor, shape: Shape) -> Tensor:
        return y

    absolute_transpose = transpose

    def bias(self) -> Tensor | None:
        return self.offset

    @property
    def terms(self) -> int:
        return 1

    def _norm(self, shape: Shape) -> float:
        return 1.0

    _row_norm = _norm
    _infinity_norm = _norm


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
        if bool((index < 0).any()):
            picked = picked * (index >= 0)
        return picked.reshape(x.shape[0], *self.index.shape)

    absolute = linear

    def transpose(self, y: Tensor, shape: Shape) -> Tensor:
        index = self.index.flatten()
        kept = index >= 0
        out = torch.zeros(y.shape[0], self.size, dtype=y.dtype, device=y.device)
        return out.index_add(1, index[kept], y.flatten(1)[:, kept]).reshape(y.shape[0], *shape)

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
        channels = torch.full(self.index.shape[:1], -1, device=self.index.device)
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


def _broadcast_within(shape: Shape, constant: Tensor, what: str) -> Shape:
    """The value's shape; ValueError where broadcasting the constant would enlarge it."""
    padded = (1,) * (len(shape) - constant.dim()) + tuple(constant.shape)
    if len(padded) != len(shape) or any(c not in (1, n) for c, n in zip(padded, shape, strict=True)):
        raise ValueError(f"a {what} constant of shape {tuple(constant.shape)} does not fit a value of shape {shape}")
    return shape


def materialise(op: AffineOp, shape: Shape, chunk: int = 512) -> Tensor:
    """The matrix W (outputs, inputs) of one operation: exact, since each entry is a product by 1."""
    size = math.prod(shape)
    device = next((t.device for t in vars(op).values() if isinstance(t, Tensor)), torch.device("cpu"))
    columns = []
    for start in range(0, size, chunk):
        count = min(chunk, size - start)
        basis = torch.zeros(count, size, dtype=torch.float64, device=device)
        basis[torch.arange(count), torch.arange(start, start + count)] = 1.0
        columns.append(op.linear(basis.reshape(count, *shape)).flatten(1))
    return torch.cat(columns).T.contiguous()
