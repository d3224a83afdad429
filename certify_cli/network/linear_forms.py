"""Linear forms in a node's value, one a row, pulled back through affine operations: whole, or on the window they see.

A unit of a convolutional layer depends on a window of each earlier image, not on all of it (theory section 15). Forms
of units are therefore kept on windows: each row has the entries of its own window, at its own place. The window grows
with every convolution, and forms become whole where it is no longer much smaller than the image. Entries of a window
that lie outside of the image are zero.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from certify_cli.network.affine import AffineOp, Scale, Shift
from certify_cli.network.convolution import Conv
from certify_cli.network.graph import Concat, Shape
from certify_cli.network.movement import Grid, Select
from certify_cli.numerics.rounding import vector_norm_up

MOSTLY = 0.6
"""Windows of more than this part of the image's pixels are made whole: they would save little."""


class _Entries:
    """What both kinds of forms say of their entries."""

    values: Tensor

    @cached_property
    def magnitudes(self) -> Tensor:
        """|values|, kept: what bounds from below by the sign of each entry asks for it more than once."""
        return self.values.abs()

    @cached_property
    def size(self) -> Tensor:
        """(batch or 1, rows): Euclidean norms of the forms, up."""
        return vector_norm_up(self.values.flatten(2))

    @property
    def count(self) -> int:
        """Number of entries of a form."""
        return math.prod(self.values.shape[2:])


@dataclass(frozen=True, eq=False)
class WholeForms(_Entries):
    """Linear forms <values, h> in the whole value h of a node: (batch or 1, rows, *shape)."""

    values: Tensor

    def entries(self, t: Tensor) -> Tensor:
        """t (batch or 1, *shape of the node), so that it can be multiplied with the values."""
        return t.unsqueeze(1)

    def dot(self, values: Tensor, t: Tensor) -> Tensor:
        """Sums (batch, rows) of values times t; values shaped as the forms', t (batch or 1, *shape of the node)."""
        return (values.flatten(2) @ t.flatten(1).unsqueeze(2)).squeeze(2)

    def at(self, values: Tensor) -> WholeForms:
        """Forms at the same places with other values."""
        return WholeForms(values)

    def back(self, op: AffineOp, shape: Shape) -> WholeForms:
        """The forms in the operation's input, of `shape`, as computed."""
        batch, rows = self.values.shape[:2]
        return WholeForms(op.transpose(self.values.flatten(0, 1), shape).reshape(batch, rows, *shape))

    def split(self, op: Concat, shapes: Sequence[Shape]) -> list[Forms]:
        """The forms in each part of a concatenation."""
        batch, rows = self.values.shape[:2]
        parts = op.split(self.values.flatten(0, 1), shapes)
        return [WholeForms(part.reshape(batch, rows, *shape)) for part, shape in zip(parts, shapes, strict=True)]

    def whole(self) -> WholeForms:
        return self

    def plus(self, other: Forms) -> Forms:
        """The sums of two sets of forms in one value."""
        return WholeForms(self.values + other.whole().values)


@dataclass(frozen=True, eq=False)
class WindowForms(_Entries):
    """Linear forms in a node's value (channels, *image) that see a window each; zero outside of the image.

    values: (batch or 1, rows, channels, *window).
    corner: (rows, axes), the pixel of the image, or outside of it, at which each window begins.
    """

    values: Tensor
    corner: Tensor
    image: Shape

    @classmethod
    def units(cls, rows: Tensor, shape: Shape, sign: Tensor) -> WindowForms:
        """Single entries of a value of `shape`, (channels, *image), times `sign`; rows: (count,), flat indices."""
        pixels = math.prod(shape[1:])
        channel = F.one_hot(rows // pixels, shape[0]).to(sign.dtype) * sign.unsqueeze(1)
        corner, rest = [], rows % pixels
        for size in reversed(shape[1:]):
            corner.append(rest % size)
            rest = rest // size
        return cls(channel.reshape(1, *channel.shape, *[1] * (len(shape) - 1)), torch.stack(corner[::-1], 1), shape[1:])

    @property
    def window(self) -> Shape:
        return tuple(self.values.shape[3:])

    def entries(self, t: Tensor) -> Tensor:
        """The windows (batch or 1, rows, channels, *window) of t (batch or 1, channels or 1, *image)."""
        begins: list[Tensor] = []
        widths: list[int] = []
        for axis, (size, width) in enumerate(zip(self.image, self.window, strict=True)):
            begin = self.corner[:, axis]
            before, behind = max(0, -int(begin.min())), max(0, int(begin.max()) + width - size)
            begins.append(begin + before)
            widths = [before, behind, *widths]
        padded = F.pad(t, widths) if any(widths) else t
        for axis, width in enumerate(self.window):
            padded = padded.unfold(2 + axis, width, 1)
        axes = len(self.window)
        places = padded.movedim(1, 1 + axes)  # (batch, *places, channels, *window)
        return places[(slice(None), *begins)]  # type: ignore[index]

    def dot(self, values: Tensor, t: Tensor) -> Tensor:
        return (values * self.entries(t)).flatten(2).sum(2)

    def at(self, values: Tensor) -> WindowForms:
        return replace(self, values=values)

    def back(self, op: AffineOp, shape: Shape) -> Forms:
        """The forms in the operation's input, of `shape`, as computed; whole where windows save too little."""
        if isinstance(op, Shift):
            return self
        if isinstance(op, Scale):
            weight = op.weight.reshape(*[1] * (len(self.image) + 2 - op.weight.dim()), *op.weight.shape)
            if max(weight.shape[2:]) == 1:  # the same at every pixel
                return self.at(self.values * weight.unsqueeze(1))
            return self.at(self.values * self.entries(weight.expand(-1, -1, *self.image)))
        if isinstance(op, Conv) and len(shape) == len(self.image) + 1:
            return self._through_convolution(op, shape)
        if isinstance(op, Select) and (grid := op.grid(shape)) is not None:
            return self._through_grid(op, grid, shape)
        return self.whole().back(op, shape)

    def _through_convolution(self, op: Conv, shape: Shape) -> Forms:
        taps = op.weight.shape[2:]
        window = tuple(
            (w - 1) * s + d * (k - 1) + 1 for w, s, d, k in zip(self.window, op.stride, op.dilation, taps, strict=True)
        )
        if mostly(window, shape[1:]):
            return self.whole().back(op, shape)
        unpadded = replace(op, padding=(0,) * len(taps))
        batch, rows = self.values.shape[:2]
        values = unpadded.transpose(self.values.flatten(0, 1), (shape[0], *window))
        corner = self.corner * self.corner.new_tensor(op.stride) - self.corner.new_tensor(op.padding)
        return WindowForms(values.reshape(batch, rows, shape[0], *window), corner, shape[1:]).inside()

    def _through_grid(self, op: Select, grid: Grid, shape: Shape) -> Forms:
        window = tuple((w - 1) * s + 1 for w, s in zip(self.window, grid.step, strict=True))
        if mostly(window, shape[1:]):
            return self.whole().back(op, shape)
        kept = (grid.channels >= 0).nonzero()[:, 0]
        narrow = self.values.new_zeros(*self.values.shape[:2], shape[0], *self.window)
        narrow = narrow.index_add_(2, grid.channels[kept], self.values[:, :, kept])
        values = narrow.new_zeros(*narrow.shape[:3], *window)
        values[(..., *(slice(None, None, step) for step in grid.step))] = narrow  # type: ignore[index]
        corner = self.corner * self.corner.new_tensor(grid.step) + self.corner.new_tensor(grid.start)
        return WindowForms(values, corner, shape[1:]).inside()

    def inside(self) -> WindowForms:
        """The same with zeros outside of the image."""
        values = self.values
        for axis, (size, width) in enumerate(zip(self.image, self.window, strict=True)):
            begin = self.corner[:, axis]
            if int(begin.min()) >= 0 and int(begin.max()) + width <= size:
                continue
            pixel = begin.unsqueeze(1) + torch.arange(width, device=begin.device)
            there = ((pixel >= 0) & (pixel < size)).to(values.dtype)
            later = [1] * (len(self.window) - 1 - axis)
            values = values * there.reshape(len(begin), *[1] * (axis + 1), width, *later)
        return self.at(values)

    def split(self, op: Concat, shapes: Sequence[Shape]) -> list[Forms]:
        if op.axis != 0:
            return self.whole().split(op, shapes)
        parts = self.values.split([shape[0] for shape in shapes], dim=2)
        return [self.at(part) for part in parts]

    @property
    def pixels(self) -> int:
        """Number of pixels of the image."""
        return math.prod(self.image)

    @property
    def _pixel(self) -> tuple[Tensor, Tensor]:
        """Of every place of each window, (rows, *window): the flat index of its pixel, and whether it lies outside."""
        rows = len(self.corner)
        index = torch.zeros(rows, *[1] * len(self.window), dtype=torch.long, device=self.corner.device)
        outside = torch.zeros_like(index, dtype=torch.bool)
        for axis, (size, width) in enumerate(zip(self.image, self.window, strict=True)):
            pixel = self.corner[:, axis].unsqueeze(1) + torch.arange(width, device=index.device)
            pixel = pixel.reshape(rows, *[1] * axis, width, *[1] * (len(self.window) - 1 - axis))
            index, outside = index * size + pixel, outside | (pixel < 0) | (pixel >= size)
        return index, outside

    @property
    def columns(self) -> Tensor:
        """(rows, channels * window): flat indices of the entries in the node's value, or its size outside."""
        (index, outside), channels = self._pixel, self.values.shape[2]
        channel = torch.arange(channels, device=index.device).reshape(-1, *[1] * len(self.window))
        places = channel * self.pixels + index.unsqueeze(1)
        return places.masked_fill(outside.unsqueeze(1), channels * self.pixels).flatten(1)

    def whole(self) -> WholeForms:
        """The same forms with all entries of the node's value."""
        batch, rows, channels = self.values.shape[:3]
        (index, outside), pixels = self._pixel, self.pixels
        index = index.masked_fill(outside, pixels).flatten(1).reshape(1, rows, 1, -1)
        image = self.values.new_zeros(batch, rows, channels, pixels + 1)
        image.scatter_(3, index.expand(batch, rows, channels, -1), self.values.flatten(3))
        return WholeForms(image[..., :-1].reshape(batch, rows, channels, *self.image))

    def plus(self, other: Forms) -> Forms:
        if isinstance(other, WholeForms):
            return other.plus(self)
        first = torch.minimum(self.corner, other.corner)
        places = [((forms.corner - first), forms) for forms in (self, other)]
        if not all(bool((shift == shift[:1]).all()) for shift, _ in places):
            return self.whole().plus(other)
        shifts = [shift[0].tolist() for shift, _ in places]
        window = [
            max(shift[axis] + forms.window[axis] for shift, (_, forms) in zip(shifts, places, strict=True))
            for axis in range(len(self.image))
        ]
        if mostly(window, self.image):
            return self.whole().plus(other)
        total = None
        for shift, (_, forms) in zip(shifts, places, strict=True):
            widths = [w for s, n, m in zip(shift, forms.window, window, strict=True) for w in (m - s - n, s)][::-1]
            padded = F.pad(forms.values, widths) if any(widths) else forms.values
            total = padded if total is None else total + padded
        return WindowForms(total, first, self.image)  # type: ignore[arg-type]


Forms = WholeForms | WindowForms


def mostly(window: Sequence[int], image: Sequence[int]) -> bool:
    """Whether a window of these sizes is most of the image."""
    return math.prod(window) > MOSTLY * math.prod(image)


def unit_forms(shape: Shape, rows: Tensor, sign: Tensor | None = None) -> Forms:
    """Entries of a value of `shape`, times `sign` (count,) if given; rows: (count,), flat indices."""
    sign = torch.ones(len(rows), dtype=torch.float64, device=rows.device) if sign is None else sign
    if len(shape) > 1 and not mostly([1] * (len(shape) - 1), shape[1:]):
        return WindowForms.units(rows, shape, sign)
    units = F.one_hot(rows, math.prod(shape)).to(sign.dtype) * sign.unsqueeze(1)
    return WholeForms(units.reshape(1, -1, *shape))
