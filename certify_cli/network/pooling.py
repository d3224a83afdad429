"""Group maps: maxima and minima of groups of inputs. They have a Lipschitz constant but no curvature."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from certify_cli.network.graph import MAX_VALUES, Nonlinear, Shape, refuse_large
from certify_cli.numerics.rounding import up


@dataclass(frozen=True, eq=False)
class Groups:
    """The outputs of a group map, by sign, then channel, then group: the maximum (sign 1) or minimum (-1) of the group.

    channels: number of equal parts of the value, grouped alike.
    members: (groups, size of the largest group), int64: indices within a channel, -1 for none.
    """

    channels: int
    members: Tensor
    signs: tuple[int, ...]


class GroupMap(Nonlinear):
    """A map each of whose outputs is the maximum, or the minimum, of a group of inputs."""

    @abstractmethod
    def groups(self, shape: Shape) -> Groups:
        """The groups of values of `shape`, in the order of the outputs."""

    @abstractmethod
    def largest_change(self, changes: Tensor) -> Tensor:
        """The largest of `changes` (batch, *shape) in every output's group: an upper bound of the output's change."""


_POOLS = (F.max_pool1d, F.max_pool2d, F.max_pool3d)


@dataclass(frozen=True)
class MaxPool(GroupMap):
    """Maximum over windows of (channels, *space), torch's conventions; one entry per spatial axis.

    padding: pixels of -inf on both sides, or, where `end` is given, in front of the image only.
    end: pixels of -inf behind the image; negative where pixels are cut off.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    ceil_mode: bool = False
    end: tuple[int, ...] | None = None
    title: str = "max_pool"

    def output_shape(self, *shapes: Shape) -> Shape:
        """ValueError where the number of axes differs, or a window does not fit or lies in the padding alone."""
        (shape,) = shapes
        if len(shape) != len(self.kernel) + 1:
            raise ValueError(f"a {len(self.kernel)}-d max pooling cannot take a value of shape {shape}")
        ends = self.padding if self.end is None else self.end
        padded = [n + p + e for n, p, e in zip(shape[1:], self.padding, ends, strict=True)]
        refuse_large((shape[0], *padded), "its padded input")
        refuse_large(self.kernel, "a window")
        outputs = [self._outputs(axis, size) for axis, size in enumerate(shape[1:])]
        if math.prod(outputs) * math.prod(self.kernel) > MAX_VALUES:
            raise ValueError(f"{math.prod(outputs)} windows of shape {self.kernel} are too many to be listed")
        for axis, size in enumerate(shape[1:]):
            taps = self._taps(axis, size)
            if not bool(((taps >= 0) & (taps < size)).any(1).all()):
                raise ValueError("a window of a max pooling lies in the padding alone")
        return (shape[0], *outputs)

    def apply(self, *values: Tensor) -> Tensor:
        pool = _POOLS[len(self.kernel) - 1]
        if self.end is None:
            return pool(values[0], self.kernel, self.stride, self.padding, self.dilation, self.ceil_mode)
        widths = [width for pair in zip(self.padding[::-1], self.end[::-1], strict=True) for width in pair]
        return pool(F.pad(values[0], widths, value=-math.inf), self.kernel, self.stride, 0, self.dilation)

    def lipschitz_constant(self, shape: Shape) -> float:
        """Square root of the largest number of windows that contain one pixel, rounded up.

        Each output changes by at most the largest change in its window, so the sum of squared changes counts each pixel
        at most once per window. A window is a product of intervals, so the counts multiply over the axes.
        """
        windows = math.prod(self._windows(axis, size) for axis, size in enumerate(shape[1:]))
        root = math.isqrt(windows)
        return float(root) if root * root == windows else up(math.sqrt(windows), 1)

    def _outputs(self, axis: int, size: int) -> int:
        """Number of windows along one axis, by torch's own rule (ceil_mode drops windows that start in the padding)."""
        kernel, stride, padding, dilation = (
            part[axis] for part in (self.kernel, self.stride, self.padding, self.dilation)
        )
        if self.end is not None:
            room = size + padding + self.end[axis] - (kernel - 1) * dilation - 1
            if room < 0:
                raise ValueError(f"max pooling of kernel {self.kernel} does not fit {size} pixels")
            return room // stride + 1
        try:
            row = torch.zeros(1, 1, size, dtype=torch.float64, device="meta")  # shapes only: a window may be long
            out = F.max_pool1d(row, kernel, stride, padding, dilation, self.ceil_mode)
        except RuntimeError as error:
            raise ValueError(f"max pooling of kernel {self.kernel} does not fit {size} pixels: {error}") from error
        return out.shape[-1]

    def largest_change(self, changes: Tensor) -> Tensor:
        return self.apply(changes)

    def groups(self, shape: Shape) -> Groups:
        """In each channel the pixels of every window."""
        table = torch.zeros(1, 1, dtype=torch.long)
        for axis, size in enumerate(shape[1:]):
            taps = self._taps(axis, size)
            taps = torch.where((taps >= 0) & (taps < size), taps, torch.full_like(taps, -1))
            both = table[:, None, :, None] * size + taps[None, :, None, :]
            both = both.masked_fill((table[:, None, :, None] < 0) | (taps[None, :, None, :] < 0), -1)
            table = both.reshape(len(table) * len(taps), -1)
        return Groups(shape[0], table, (1,))

    def _taps(self, axis: int, size: int) -> Tensor:
        """Pixel indices (windows, kernel) of every window along one axis; outside of [0, size) lies padding."""
        starts = torch.arange(self._outputs(axis, size)) * self.stride[axis] - self.padding[axis]
        return starts[:, None] + torch.arange(self.kernel[axis]) * self.dilation[axis]

    def _windows(self, axis: int, size: int) -> int:
        """The largest number of windows along one axis that contain one pixel."""
        taps = self._taps(axis, size)
        inside = taps[(taps >= 0) & (taps < size)]
        return int(torch.bincount(inside).max()) if inside.numel() else 0


@dataclass(frozen=True)
class MaxMin(GroupMap):
    """GroupSort of pairs (Anil et al., 2019): entries of the first axis' halves are paired; maxima come first."""

    title: str = "max_min"

    def output_shape(self, *shapes: Shape) -> Shape:
        """ValueError where the first axis cannot be halved."""
        (shape,) = shapes
        if not shape or shape[0] % 2:
            raise ValueError(f"max_min pairs the halves of the first axis, and a value of shape {shape} has no halves")
        return shape

    def apply(self, *values: Tensor) -> Tensor:
        first, second = values[0].chunk(2, dim=1)
        return torch.cat([torch.maximum(first, second), torch.minimum(first, second)], dim=1)

    def lipschitz_constant(self, shape: Shape) -> float:
        """1: sorting does not increase distances."""
        return 1.0

    def largest_change(self, changes: Tensor) -> Tensor:
        first, second = changes.chunk(2, dim=1)
        larger = torch.maximum(first, second)
        return torch.cat([larger, larger], dim=1)

    def groups(self, shape: Shape) -> Groups:
        half = math.prod(shape) // 2
        first = torch.arange(half)
        return Groups(1, torch.stack([first, first + half], dim=1), (1, -1))
