"""Affine operations: the whitelist of what may stand between two nonlinear nodes, with its norm rules.

Everything a classifier does between activations is made of seven primitives: `Dense`, `Conv`, `ConvTranspose`,
`Scale`, `Shift`, `Select` (all data movement: slices, transposes, padding, expansion, nearest-neighbour resizing) and
`Reshape`. Each can apply itself, its linear part W, the transpose of W and |W| to a batch, and knows verified upper
bounds of its norms (theory section 2). A new affine layer is lowered to these in `lower.py`; a new primitive is one
class here.

Norm bounds are floats, rounded up. `terms` is k such that gamma_k bounds the relative rounding error of one
application against |W| |x| + |b|, roundings of computed weights (1/sqrt(var + eps), 1/9) included.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv1d_input, conv2d_input, conv3d_input

from certify_cli.network.graph import Shape, refuse_large
from certify_cli.numerics.norms import conv_symbol_norm, frobenius_norm, matrix_norm
from certify_cli.numerics.rounding import gamma, times, up, vector_norm_up

MATERIALISE_FLOPS = 2e10
"""A convolution's matrix is built and its norm proved directly when that costs no more than this."""


MAX_TAPS = 2**27
"""Products of one output channel of a convolution over a whole image."""


class AffineOp(ABC):
    """x -> W x + b on one value. Subclasses are immutable and hold float64 tensors."""

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

    def row_norm(self, shape: Shape) -> float:
        """Upper bound of max_i ||W_i|| (the 2 -> infinity norm)."""
        return self._remember("row", shape, self._row_norm)

    def infinity_norm(self, shape: Shape) -> float:
        """Upper bound of max_i ||W_i||_1 (the infinity -> infinity norm)."""
        return self._remember("infinity", shape, self._infinity_norm)

    def frobenius_norm(self, shape: Shape) -> float:
        """Upper bound of ||W||_F: every row at most the longest."""
        return times(up(math.sqrt(math.prod(self.output_shape(shape)))), self.row_norm(shape))

    @property
    def products(self) -> int:
        """About the multiplications that an entry of the output takes."""
        return self.terms

    @abstractmethod
    def _norm(self, shape: Shape) -> float: ...

    @abstractmethod
    def _row_norm(self, shape: Shape) -> float: ...

    @abstractmethod
    def _infinity_norm(self, shape: Shape) -> float: ...

    def _remember(self, kind: str, shape: Shape, rule: Callable[[Shape], float]) -> float:
        """Each norm is computed once; the weights never change."""
        memo: dict[tuple[str, Shape], float] = self.__dict__.setdefault("_memo", {})
        if (kind, shape) not in memo:
            memo[kind, shape] = rule(shape)
        return memo[kind, shape]


def _adjoint(function: Callable[[Tensor], Tensor], y: Tensor, shape: Shape) -> Tensor:
    with torch.enable_grad():
        x = torch.zeros((y.shape[0], *shape), dtype=y.dtype, device=y.device, requires_grad=True)
        (result,) = torch.autograd.grad(function(x), x, y)
    return result


def _longest_row(rows: Tensor) -> float:
    """Upper bound of the largest Euclidean norm of the rows of a matrix."""
    return float(vector_norm_up(rows).max())


def _largest_row_sum(rows: Tensor) -> float:
    return up(float(rows.abs().sum(dim=1).max()), rows.shape[1] + 2)


@dataclass(frozen=True, eq=False)
class Dense(AffineOp):
    """y = x W^T + b on the last axis; weight (out, in). `weight_error`: relative error of an entry, in units of u."""

    weight: Tensor
    offset: Tensor | None = None
    weight_error: int = 0
    title: str = "dense"

    def output_shape(self, *shapes: Shape) -> Shape:
        (shape,) = shapes
        if not shape or shape[-1] != self.weight.shape[1]:
            raise ValueError(f"a dense layer of {self.weight.shape[1]} inputs cannot take a value of shape {shape}")
        return (*shape[:-1], self.weight.shape[0])

    def linear(self, x: Tensor) -> Tensor:
        return x @ self.weight.T

    @cached_property
    def _magnitudes(self) -> Tensor:
        return self.weight.abs()

    def absolute(self, x: Tensor) -> Tensor:
        return x @ self._magnitudes.T

    def transpose(self, y: Tensor, shape: Shape) -> Tensor:
        return y @ self.weight

    def absolute_transpose(self, y: Tensor, shape: Shape) -> Tensor:
        return y @ self._magnitudes

    def bias(self) -> Tensor | None:
        return self.offset

    @property
    def terms(self) -> int:
        # the transpose sums over the outputs instead
        return max(self.weight.shape) + 1 + self.weight_error

    @property
    def products(self) -> int:
        return self.weight.shape[1]

    def _norm(self, shape: Shape) -> float:
        # entries off by e |W| move the norm by up to e || |W| ||, which may be many times e ||W||
        return up(matrix_norm(self.weight) + gamma(self.weight_error) * frobenius_norm(self.weight), 2)

    def _row_norm(self, shape: Shape) -> float:
        return up(_longest_row(self.weight), self.weight_error)

    def _infinity_norm(self, shape: Shape) -> float:
        return up(_largest_row_sum(self.weight), self.weight_error)


@dataclass(frozen=True, eq=False)
class Conv(AffineOp):
    """Zero-padded convolution in 1, 2 or 3 dimensions; weight (out, in/groups, *kernel), torch's conventions."""

    weight: Tensor
    offset: Tensor | None
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1
    weight_error: int = 0
    title: str = "conv"

    @property
    def dimensions(self) -> int:
        return self.weight.dim() - 2

    def _convolve(self, x: Tensor, weight: Tensor) -> Tensor:
        function = (F.conv1d, F.conv2d, F.conv3d)[self.dimensions - 1]
        return function(x, weight, None, self.stride, self.padding, self.dilation, self.groups)

    def output_shape(self, *shapes: Shape) -> Shape:
        (shape,) = shapes
        channels = self.weight.shape[1] * self.groups
        if len(shape) != self.dimensions + 1 or shape[0] != channels:
            raise ValueError(
                f"a {self.dimensions}-d convolution of {channels} channels cannot take a value of shape {shape}"
            )
        padded = [n + 2 * p for n, p in zip(shape[1:], self.padding, strict=True)]
        refuse_large((channels, *padded), "its padded input")
        sizes = tuple(
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, p, d, k, s in zip(
                shape[1:], self.padding, self.dilation, self.weight.shape[2:], self.stride, strict=True
            )
        )
        if min(sizes) < 1:
            raise ValueError(f"the kernel of a convolution is larger than its padded input of shape {shape}")
        if math.prod(sizes) * self.weight[0].numel() > MAX_TAPS:  # torch lays them out side by side
            raise ValueError(
                f"a convolution of kernel {tuple(self.weight.shape)} at {math.prod(sizes)} places is too large"
            )
        return (self.weight.shape[0], *sizes)

    def linear(self, x: Tensor) -> Tensor:
        return self._convolve(x, self.weight)

    @cached_property
    def _magnitudes(self) -> Tensor:
        return self.weight.abs()

    def absolute(self, x: Tensor) -> Tensor:
        return self._convolve(x, self._magnitudes)

    def _convolve_back(self, y: Tensor, weight: Tensor, shape: Shape) -> Tensor:
        function = (conv1d_input, conv2d_input, conv3d_input)[self.dimensions - 1]
        size = (len(y), *shape)
        return function(size, weight, y, self.stride, self.padding, self.dilation, self.groups)

    def transpose(self, y: Tensor, shape: Shape) -> Tensor:
        return self._convolve_back(y, self.weight, shape)

    def absolute_transpose(self, y: Tensor, shape: Shape) -> Tensor:
        return self._convolve_back(y, self._magnitudes, shape)

    def bias(self) -> Tensor | None:
        return None if self.offset is None else self.offset.reshape(-1, *[1] * self.dimensions)

    @property
    def terms(self) -> int:
        taps = math.prod(self.weight.shape[2:])
        return taps * max(self.weight.shape[1], self.weight.shape[0] // self.groups) + 1 + self.weight_error

    @property
    def products(self) -> int:
        return self.weight[0].numel()

    def _norm(self, shape: Shape) -> float:
        """The least of the FFT-symbol bound and, where affordable, the verified norm of the whole matrix."""
        symbol = conv_symbol_norm(self.weight, shape[1:], self.stride, self.padding, self.dilation, self.groups)
        columns, rows = math.prod(shape), math.prod(self.output_shape(shape))
        flops = min(rows, columns) ** 2 * float(max(rows, columns))
        best = symbol if flops > MATERIALISE_FLOPS else min(symbol, matrix_norm(materialise(self, shape)))
        if self.weight_error == 0:
            return best
        # weights off by e |w|: tap by tap, each a shift and a matrix (see Dense for why e times the norm is too little)
        taps = sum(frobenius_norm(tap) for tap in self.weight.flatten(2).unbind(2))
        return up(best + gamma(self.weight_error) * taps, self.weight[0, 0].numel() + 4)

    def _row_norm(self, shape: Shape) -> float:
        return up(_longest_row(self.weight.flatten(1)), self.weight_error)

    def _infinity_norm(self, shape: Shape) -> float:
        return up(_largest_row_sum(self.weight.flatten(1)), self.weight_error)


@dataclass(frozen=True, eq=False)
class ConvTranspose(AffineOp):
    """Transposed convolution; weight (in, out/groups, *kernel), torch's conventions. Its norm is its adjoint's."""

    weight: Tensor
    offset: Tensor | None
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    output_padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1
    title: str = "conv_transpose"

    @cached_property
    def _forward(self) -> Conv:
        return Conv(self.weight, None, self.stride, self.padding, self.dilation, self.groups)

    def _convolve(self, x: Tensor, weight: Tensor) -> Tensor:
        function = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[self.weight.dim() - 3]
        return function(x, weight, None, self.stride, self.padding, self.output_padding, self.groups, self.dilation)

    def output_shape(self, *shapes: Shape) -> Shape:
        (shape,) = shapes
        if len(shape) != self.weight.dim() - 1 or shape[0] != self.weight.shape[0]:
            raise ValueError(
                f"a transposed convolution of {self.weight.shape[0]} channels cannot take a value of shape {shape}"
            )
        if any(o >= s for o, s in zip(self.output_padding, self.stride, strict=True)):
            raise ValueError("the output padding of a transposed convolution must be smaller than its stride")
        sizes = tuple(
            (n - 1) * s - 2 * p + d * (k - 1) + o + 1
            for n, s, p, d, k, o in zip(
                shape[1:],
                self.stride,
                self.padding,
                self.dilation,
                self.weight.shape[2:],
                self.output_padding,
                strict=True,
            )
        )
        if min(sizes) < 1:
            raise ValueError(f"a transposed convolution leaves nothing of a value of shape {shape}")
        refuse_large((self.weight.shape[0], *sizes))
        return (self.weight.shape[1] * self.groups, *sizes)

    def linear(self, x: Tensor) -> Tensor:
        return self._convolve(x, self.weight)

    def absolute(self, x: Tensor) -> Tensor:
        return self._convolve(x, self._forward._magnitudes)

    def transpose(self, y: Tensor, shape: Shape) -> Tensor:
        return self._forward.linear(y)

    def absolute_transpose(self, y: Tensor, shape: Shape) -> Tensor:
        return self._forward.absolute(y)

    def bias(self) -> Tensor | None:
        return None if self.offset is None else self.offset.reshape(-1, *[1] * (self.weight.dim() - 2))

    @property
    def terms(self) -> int:
        return self._forward.terms

    def _norm(self, shape: Shape) -> float:
        return self._forward.norm(self.output_shape(shape))

    def _row_norm(self, shape: Shape) -> float:
        return up(_longest_row(self._rows()), 1)

    def _infinity_norm(self, shape: Shape) -> float:
        return up(_largest_row_sum(self._rows()), 1)

    def _rows(self) -> Tensor:
        """Per output channel every weight that reaches it: an output pixel sees a part of these."""
        grouped = self.weight.reshape(self.groups, -1, *self.weight.shape[1:])
        return grouped.transpose(1, 2).flatten(0, 1).flatten(1)


@dataclass(frozen=True, eq=False)
class Scale(AffineOp):
    """Entrywise product with constants; `weight` is broadcastable with the value."""

    weight: Tensor
    weight_error: int = 0
    title: str = "scale"

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
class Select(AffineOp):
    """Data movement: output entry j is input entry `index[j]` (row-major), or zero where index[j] = -1.

    Its norm is exactly the root of the largest number of copies of one entry, which covers transposes and slices (1),
    zero padding (1), expansion and every other padding map. `index` has the output's shape.
    """

    index: Tensor
    size: int
    title: str = "select"

    @classmethod
    def of(cls, function: Callable[[Tensor], Tensor], shape: Shape, title: str = "select") -> Select:
        """The data movement that `function` makes of a batch of one value of `shape`, read off numbered entries."""
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

    @property
    def terms(self) -> int:
        return self.copies if self.copies > 1 else 0  # the transpose sums copies

    def _norm(self, shape: Shape) -> float:
        return math.sqrt(self.copies) if math.isqrt(self.copies) ** 2 == self.copies else up(math.sqrt(self.copies), 1)

    def _row_norm(self, shape: Shape) -> float:
        return 1.0

    _infinity_norm = _row_norm


def _broadcast_within(shape: Shape, constant: Tensor, what: str) -> Shape:
    """The value's own shape, provided that the constant does not enlarge it."""
    padded = (1,) * (len(shape) - constant.dim()) + tuple(constant.shape)
    if len(padded) != len(shape) or any(c not in (1, n) for c, n in zip(padded, shape, strict=True)):
        raise ValueError(f"a {what} constant of shape {tuple(constant.shape)} does not fit a value of shape {shape}")
    return shape


def materialise(op: AffineOp, shape: Shape, chunk: int = 512) -> Tensor:
    """The matrix W (outputs, inputs) of one operation: exact, as each entry is one product by 1."""
    size = math.prod(shape)
    device = next((t.device for t in vars(op).values() if isinstance(t, Tensor)), torch.device("cpu"))
    columns = []
    for start in range(0, size, chunk):
        count = min(chunk, size - start)
        basis = torch.zeros(count, size, dtype=torch.float64, device=device)
        basis[torch.arange(count), torch.arange(start, start + count)] = 1.0
        columns.append(op.linear(basis.reshape(count, *shape)).flatten(1))
    return torch.cat(columns).T.contiguous()
