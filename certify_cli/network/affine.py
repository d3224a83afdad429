"""Affine operations: the only operations that may stand between two nonlinear nodes, with bounds of their norms.

A model's layers between its activations are lowered (`lowering`) to seven primitives: `Dense`, `Scale` and `Shift`
here, `Reshape` and `Select` in `movement` (`Select` is any data movement: slices, transposes, padding, expansion,
nearest-neighbour resizing), `Conv` and `ConvTranspose` in `convolution`. A new primitive is one subclass of `AffineOp`.
Each applies itself, its linear part W, the transpose of W and |W| to a batch, and bounds its norms (theory section 2).

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
from certify_cli.numerics.rounding import carries_gradient, gamma, number, times, up, vector_norm_up


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
        image = function(x)
        (result,) = torch.autograd.grad(image, x, y, create_graph=carries_gradient(y))
    return result


def longest_row(rows: Tensor) -> float:
    """Upper bound of the largest Euclidean norm of the rows of a matrix."""
    return number(vector_norm_up(rows).max())


def largest_row_sum(rows: Tensor) -> float:
    """Upper bound of the largest sum of absolute values of the rows of a matrix."""
    return up(number(rows.abs().sum(dim=1).max()), rows.shape[1] + 2)


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
        return up(number(self.weight.abs().max()), self.weight_error)

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
