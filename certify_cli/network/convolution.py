"""Convolutions and their transposes, with bounds of their norms (theory section 2)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv1d_input, conv2d_input, conv3d_input

from certify_cli.network.affine import AffineOp, largest_row_sum, longest_row
from certify_cli.network.graph import Shape, refuse_large
from certify_cli.network.live import Box, Reach, cropped, empty, live_boxes, mostly, slices, within
from certify_cli.numerics.eigen import mirrored
from certify_cli.numerics.estimates import operator_norm_estimate
from certify_cli.numerics.norms import conv_symbol_norm, frobenius_norm, gram_norm, matrix_norm
from certify_cli.numerics.rounding import carries_gradient, gamma, power_of_two, times, up

MATERIALISE_FLOPS = 2e10
"""Cost up to which a convolution's whole matrix is built and its norm proved directly."""

WHOLE_CHUNK = 2**20
"""Entries of the unit vectors that are carried through a convolution together for it (8 MiB)."""
PATCH_ENTRIES = 2**19
"""torch writes out the patch that each output reads before it multiplies; a batch is convolved in parts whose patches
have about this many entries for each thread (4 MiB), which stay in the cache."""
DENSE, DENSE_ENTRIES = 2, 2**23
"""A convolution to at most as many pixels as the kernel has taps, from at most so many times as many, is the product
with a matrix, of at most so many entries (64 MiB)."""
MAX_PRODUCTS = 2**27
"""Largest number of products that one output channel of a convolution takes over a whole image."""


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
    weight_tail: Tensor | None = None

    @property
    def dimensions(self) -> int:
        return self.weight.dim() - 2

    def _convolve(self, x: Tensor, weight: Tensor) -> Tensor:
        shape = tuple(x.shape[1:])
        if self._tiny(shape):
            return (x.flatten(1) @ self._matrix(weight, shape).T).reshape(-1, *self.output_shape(shape))
        if self._at_once(x, weight, shape):
            return self._convolved(x, weight, self.padding)
        image = x.new_zeros(len(x), *self.output_shape(shape))
        reach, places = self._reach, image.shape[2:]
        for part, into, box in self._parts(x, image, shape):
            if box is None:
                continue
            written = reach.places(box, places)
            if mostly(written, places):
                into.copy_(self._convolved(part, weight, self.padding))
            elif not empty(written):
                into[slices(written)] = self._convolved(cropped(part, reach.pixels(written)), weight, self._unpadded)
        return image

    def _convolved(self, x: Tensor, weight: Tensor, padding: Shape) -> Tensor:
        function = (F.conv1d, F.conv2d, F.conv3d)[self.dimensions - 1]
        return function(x, weight, None, self.stride, padding, self.dilation, self.groups)

    @property
    def _unpadded(self) -> Shape:
        return (0,) * self.dimensions

    @cached_property
    def _reach(self) -> Reach:
        return Reach(tuple(self.weight.shape[2:]), self.stride, self.padding, self.dilation)

    def _together(self, shape: Shape) -> int:
        """How many samples are convolved together: every thread has some, whose patches stay in its cache."""
        patch = self.weight[0].numel() * math.prod(self.output_shape(shape)[1:])
        return torch.get_num_threads() * max(1, PATCH_ENTRIES // patch)

    def _at_once(self, values: Tensor, weight: Tensor, shape: Shape) -> bool:
        if carries_gradient(values, weight):  # parts are written into one image, which has no gradient
            return True
        return values.device.type != "cpu" or len(values) <= self._together(shape)

    def _parts(self, values: Tensor, images: Tensor, shape: Shape) -> Iterator[tuple[Tensor, Tensor, Box | None]]:
        """Values and their images part by part, and the box outside of which the values are zero."""
        together = self._together(shape)
        return zip(values.split(together), images.split(together), live_boxes(values, together), strict=True)

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
        if math.prod(sizes) * self.weight[0].numel() > MAX_PRODUCTS:  # torch may hold all of them in memory
            raise ValueError(
                f"a convolution of kernel {tuple(self.weight.shape)} at {math.prod(sizes)} places is too large"
            )
        return (self.weight.shape[0], *sizes)

    def linear(self, x: Tensor) -> Tensor:
        return self._convolve(x, self.weight)

    @cached_property
    def _absolute_weight(self) -> Tensor:
        return self.weight.abs()

    def absolute(self, x: Tensor) -> Tensor:
        return self._convolve(x, self._absolute_weight)

    def _tiny(self, shape: Shape) -> bool:
        """Whether the whole matrix is better than a convolution: it takes few more products, but all at once.

        Entries that are no weight are zero, and add nothing: its dot products round like those of `terms` products.
        """
        taps, pixels, image = math.prod(self.weight.shape[2:]), math.prod(shape[1:]), self.output_shape(shape)
        if self.groups > 1 or taps == 1 or pixels > DENSE * taps or math.prod(image[1:]) > taps:
            return False
        return math.prod(shape) * math.prod(image) <= DENSE_ENTRIES

    def _matrix(self, weight: Tensor, shape: Shape) -> Tensor:
        """The map's matrix (outputs, inputs), written out without a rounding; `weight`: the weights or magnitudes."""
        own = weight is self.weight and not carries_gradient(weight)  # it may be made without one, and used with it
        key = (shape, weight.device)
        if own and key in self._matrices:
            return self._matrices[key]
        taps, pixels = math.prod(weight.shape[2:]), math.prod(shape[1:])
        # which tap, if any, leads from a pixel to an output's place
        units = torch.eye(pixels, dtype=weight.dtype, device=weight.device).reshape(pixels, 1, *shape[1:])
        each = torch.eye(taps, dtype=weight.dtype, device=weight.device).reshape(taps, 1, *weight.shape[2:])
        function = (F.conv1d, F.conv2d, F.conv3d)[self.dimensions - 1]
        leads = function(units, each, None, self.stride, self.padding, self.dilation).flatten(2)  # (pixel, tap, place)
        matrix = torch.einsum("oct,itp->opci", weight.flatten(2), leads)
        matrix = matrix.reshape(math.prod(self.output_shape(shape)), math.prod(shape))
        if own:
            self._matrices[key] = matrix
        return matrix

    @cached_property
    def _matrices(self) -> dict[tuple[Shape, torch.device], Tensor]:
        return {}

    def _convolve_back(self, y: Tensor, weight: Tensor, shape: Shape) -> Tensor:
        if self._tiny(shape):
            return (y.flatten(1) @ self._matrix(weight, shape)).reshape(-1, *shape)
        if self._at_once(y, weight, shape):
            return self._convolved_back(y, weight, shape, self.padding)
        image = y.new_zeros(len(y), *shape)
        for part, into, box in self._parts(y, image, shape):
            if box is None:
                continue
            read = self._reach.pixels(box)
            written = within(read, shape[1:])
            if mostly(written, shape[1:]):
                into.copy_(self._convolved_back(part, weight, shape, self.padding))
            elif not empty(written):
                window = tuple(end - first for first, end in read)
                found = self._convolved_back(part[slices(box)], weight, (shape[0], *window), self._unpadded)
                begun = [(first - begin, end - begin) for (begin, _), (first, end) in zip(read, written, strict=True)]
                into[slices(written)] = found[slices(tuple(begun))]
        return image

    def _convolved_back(self, y: Tensor, weight: Tensor, shape: Shape, padding: Shape) -> Tensor:
        function = (conv1d_input, conv2d_input, conv3d_input)[self.dimensions - 1]
        size = (len(y), *shape)
        return function(size, weight, y, self.stride, padding, self.dilation, self.groups)

    def transpose(self, y: Tensor, shape: Shape) -> Tensor:
        return self._convolve_back(y, self.weight, shape)

    def absolute_transpose(self, y: Tensor, shape: Shape) -> Tensor:
        return self._convolve_back(y, self._absolute_weight, shape)

    def bias(self) -> Tensor | None:
        return None if self.offset is None else self.offset.reshape(-1, *[1] * self.dimensions)

    @property
    def terms(self) -> int:
        taps = math.prod(self.weight.shape[2:])
        return taps * max(self.weight.shape[1], self.weight.shape[0] // self.groups) + 1 + self.weight_error

    @property
    def products(self) -> int:
        return self.weight[0].numel()

    def quick_norm(self, shape: Shape) -> float:
        """The better of two that take norms of matrices of the size of the weight only.

        All weights of an output times the patches that outputs read, of which `windows` share a pixel; or all weights
        of an input times the sums, over the taps, of what they bring to an output.
        """
        return self._remember("quick", (), self._quick_norm)

    def _quick_norm(self, shape: Shape) -> float:
        grouped = self.weight.unflatten(0, (self.groups, -1)).flatten(3)
        taps, windows = grouped.shape[3], 1
        for size, stride, dilation in zip(self.weight.shape[2:], self.stride, self.dilation, strict=True):
            windows *= max(Counter(tap * dilation % stride for tap in range(size)).values())
        patches = _largest_norm(grouped.flatten(2), up(math.sqrt(windows)))
        sums = _largest_norm(grouped.transpose(2, 3).flatten(1, 2), up(math.sqrt(taps)))
        return self._with_weight_errors(min(patches, sums))

    def _with_weight_errors(self, norm: float) -> float:
        """An upper bound of the norm for the exact weights, whose errors are at most e |w|."""
        if self.weight_error == 0:
            return norm
        return up(norm + gamma(self.weight_error) * taps_norm(self.weight), self.weight[0, 0].numel() + 4)

    def _norm(self, shape: Shape) -> float:
        """The smaller of the Fourier symbol's bound and, where affordable, the verified norm of the whole matrix.

        With weights that carry a gradient, an estimate from below.
        """
        if carries_gradient(self.weight):
            return operator_norm_estimate(self.linear, lambda y: self.transpose(y, shape), shape, self.weight)
        symbol = conv_symbol_norm(self.weight, shape[1:], self.stride, self.padding, self.dilation, self.groups)
        columns, rows = math.prod(shape), math.prod(self.output_shape(shape))
        flops = min(rows, columns) ** 2 * float(max(rows, columns))
        best = symbol if flops > MATERIALISE_FLOPS else min(symbol, self._whole_norm(shape))
        return self._with_weight_errors(best)

    def _whole_norm(self, shape: Shape) -> float:
        """Verified norm of the whole matrix W, from W W^T (or W^T W where W has more rows than columns).

        The smaller side's unit vectors are carried through W^T, which is exact, and then through W: dot products of
        `terms` products each, so that the error of entry (i, j) is at most gamma_terms ||W_i|| ||W_j||. The lower
        triangle stands for both.
        """
        scale = power_of_two(self.weight)
        op = replace(self, weight=self.weight / scale, offset=None)
        output = self.output_shape(shape)
        wide = math.prod(output) <= math.prod(shape)
        side = output if wide else shape
        size = math.prod(side)
        product, squares = self.weight.new_empty(1, size, size), self.weight.new_zeros(())
        for part in torch.arange(size, device=self.weight.device).split(max(8, WHOLE_CHUNK // math.prod(shape))):
            units = self.weight.new_zeros(len(part), size)
            units[torch.arange(len(part)), part] = 1.0
            units = units.reshape(-1, *side)
            rows = op.transpose(units, shape) if wide else op.linear(units)
            product[0, part] = (op.linear(rows) if wide else op.transpose(rows, shape)).flatten(1)
            squares = squares + rows.square().sum()
        slack = up(gamma(self.terms + 2) * squares, math.prod(shape) * math.prod(output))
        return times(gram_norm(mirrored(product), slack.reshape(1)), scale)

    def _row_norm(self, shape: Shape) -> float:
        return up(longest_row(self.weight.flatten(1)), self.weight_error)

    def _infinity_norm(self, shape: Shape) -> float:
        return up(largest_row_sum(self.weight.flatten(1)), self.weight_error)


@dataclass(frozen=True, eq=False)
class ConvTranspose(AffineOp):
    """Transposed convolution; weight (in, out/groups, *kernel), torch's conventions; its norm is its adjoint's."""

    weight: Tensor
    offset: Tensor | None
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    output_padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1
    title: str = "conv_transpose"

    @cached_property
    def _adjoint(self) -> Conv:
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
        image = (self.weight.shape[1] * self.groups, *sizes)
        self._adjoint.output_shape(image)  # which refuses what its transpose could not take
        return image

    def linear(self, x: Tensor) -> Tensor:
        return self._convolve(x, self.weight)

    def absolute(self, x: Tensor) -> Tensor:
        return self._convolve(x, self._adjoint._absolute_weight)

    def transpose(self, y: Tensor, shape: Shape) -> Tensor:
        return self._adjoint.linear(y)

    def absolute_transpose(self, y: Tensor, shape: Shape) -> Tensor:
        return self._adjoint.absolute(y)

    def bias(self) -> Tensor | None:
        return None if self.offset is None else self.offset.reshape(-1, *[1] * (self.weight.dim() - 2))

    @property
    def terms(self) -> int:
        return self._adjoint.terms

    def quick_norm(self, shape: Shape) -> float:
        return self._adjoint.quick_norm(self.output_shape(shape))

    def _norm(self, shape: Shape) -> float:
        return self._adjoint.norm(self.output_shape(shape))

    def _row_norm(self, shape: Shape) -> float:
        return up(longest_row(self._rows()), 1)

    def _infinity_norm(self, shape: Shape) -> float:
        return up(largest_row_sum(self._rows()), 1)

    def _rows(self) -> Tensor:
        """For each output channel all its weights; a row of W holds a subset of them."""
        grouped = self.weight.reshape(self.groups, -1, *self.weight.shape[1:])
        return grouped.transpose(1, 2).flatten(0, 1).flatten(1)


def taps_norm(weight: Tensor) -> float:
    """Upper bound of a convolution's norm: each tap is a shift times a matrix, and these add up."""
    taps = weight.flatten(2).unbind(2)
    return up(sum(frobenius_norm(tap) for tap in taps), len(taps))


def _largest_norm(matrices: Tensor, factor: float) -> float:
    """Upper bound of factor times the largest spectral norm of matrices (count, m, n)."""
    if min(matrices.shape[1:]) == 1:
        return times(longest_row(matrices.flatten(1)), factor)
    return times(max(matrix_norm(matrix) for matrix in matrices), factor)
