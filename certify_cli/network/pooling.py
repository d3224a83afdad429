"""Max pooling: a group map that has a Lipschitz constant and no curvature."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from certify_cli.network.graph import Nonlinear, Shape
from certify_cli.numerics.rounding import up

_POOLS = (F.max_pool1d, F.max_pool2d, F.max_pool3d)


@dataclass(frozen=True)
class MaxPool(Nonlinear):
    """Maximum over windows of (channels, *space), torch's conventions; one entry per spatial axis.

    `padding` counts pixels of -inf on both sides, so a padded pixel never wins.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    ceil_mode: bool = False
    title: str = "max_pool"

    def output_shape(self, *shapes: Shape) -> Shape:
        """ValueError where the number of axes differs or a window does not fit."""
        (shape,) = shapes
        if len(shape) != len(self.kernel) + 1:
            raise ValueError(f"a {len(self.kernel)}-d max pooling cannot take a value of shape {shape}")
        return (shape[0], *(self._outputs(axis, size) for axis, size in enumerate(shape[1:])))

    def apply(self, *values: Tensor) -> Tensor:
        pool = _POOLS[len(self.kernel) - 1]
        return pool(values[0], self.kernel, self.stride, self.padding, self.dilation, self.ceil_mode)

    def gain(self, shape: Shape) -> float:
        """Root of the largest number of windows that contain one pixel: an upper bound for the l2 norm, rounded up.

        Each output moves by at most the largest change in its window, so the sum of squared changes counts a pixel's
        at most once per window. A window is a product of intervals: the counts multiply over the axes.
        """
        windows = math.prod(self._windows(axis, size) for axis, size in enumerate(shape[1:]))
        root = math.isqrt(windows)
        return float(root) if root * root == windows else up(math.sqrt(windows), 1)

    def _outputs(self, axis: int, size: int) -> int:
        """How many windows one axis holds, by torch's own rule (ceil_mode drops windows that start in the padding)."""
        kernel, stride, padding, dilation = (
            part[axis] for part in (self.kernel, self.stride, self.padding, self.dilation)
        )
        try:
            out = F.max_pool1d(torch.zeros(1, 1, size), kernel, stride, padding, dilation, self.ceil_mode)
        except RuntimeError as error:
            raise ValueError(f"max pooling of kernel {self.kernel} does not fit {size} pixels: {error}") from error
        return out.shape[-1]

    def members(self, shape: Shape) -> Tensor:
        """The pixels of every window, (windows, members): numbers in a channel laid out flat, -1 for padding."""
        table = torch.zeros(1, 1, dtype=torch.long)
        for axis, size in enumerate(shape[1:]):
            taps = self._taps(axis, size)
            taps = torch.where((taps >= 0) & (taps < size), taps, torch.full_like(taps, -1))
            both = table[:, None, :, None] * size + taps[None, :, None, :]
            both = both.masked_fill((table[:, None, :, None] < 0) | (taps[None, :, None, :] < 0), -1)
            table = both.reshape(len(table) * len(taps), -1)
        return table

    def _taps(self, axis: int, size: int) -> Tensor:
        """The pixels of every window along one axis, (windows, kernel); outside of [0, size) they are padding."""
        starts = torch.arange(self._outputs(axis, size)) * self.stride[axis] - self.padding[axis]
        return starts[:, None] + torch.arange(self.kernel[axis]) * self.dilation[axis]

    def _windows(self, axis: int, size: int) -> int:
        """The largest number of windows along one axis that contain one pixel."""
        taps = self._taps(axis, size)
        inside = taps[(taps >= 0) & (taps < size)]
        return int(torch.bincount(inside).max()) if inside.numel() else 0
