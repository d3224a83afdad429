"""The box of pixels outside of which images are zero, and what a convolution makes of it.

Unit vectors, and what they become after a few layers, are zero but for a few pixels (theory section 15): a convolution
of large batches need not read, or write, the rest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from certify_cli.network.graph import Shape

MOSTLY = 0.8
"""Boxes of more than this part of an image's pixels count as the whole image."""
Box = tuple[tuple[int, int], ...]
"""For each axis of the image its first pixel, and the one behind its last."""


def live_boxes(images: Tensor, together: int) -> list[Box | None]:
    """Of each `together` images of a batch (batch, channels, *image) the smallest box outside of which they are zero.

    None where all are zero everywhere. An image that is not a number counts as live.
    """
    live = images.abs().sum(1) != 0
    axes = []
    for axis, size in enumerate(live.shape[1:], 1):
        along = live.movedim(axis, 1).reshape(len(live), size, -1).any(2)
        along = F.pad(along, (0, 0, 0, -len(live) % together)).reshape(-1, together, size).any(1).to(torch.uint8)
        ends = along.argmax(1), size - along.flip(1).argmax(1)
        axes.append(list(zip(*(end.tolist() for end in ends), along.amax(1).tolist(), strict=True)))
    return [
        tuple(side[:2] for side in box) if all(side[2] for side in box) else None for box in zip(*axes, strict=True)
    ]


@dataclass(frozen=True)
class Reach:
    """How the pixels of an image and the places of its convolution reach each other; one entry per axis."""

    kernel: Shape
    stride: Shape
    padding: Shape
    dilation: Shape

    @property
    def _axes(self) -> list[tuple[int, int, int]]:
        """By axis: the stride, the padding, and the number of pixels from the first tap to the last."""
        spans = [d * (k - 1) for k, d in zip(self.kernel, self.dilation, strict=True)]
        return list(zip(self.stride, self.padding, spans, strict=True))

    def places(self, pixels: Box, sizes: Sequence[int]) -> Box:
        """Of places, `sizes` of them, those that read one of these pixels; empty boxes end where they begin."""
        found = []
        for (first, end), size, (stride, padding, span) in zip(pixels, sizes, self._axes, strict=True):
            begin = max(0, -(-(first + padding - span) // stride))
            found.append((begin, max(begin, min(size, (end - 1 + padding) // stride + 1))))
        return tuple(found)

    def pixels(self, places: Box) -> Box:
        """The pixels that these places read, some of them outside of the image."""
        return tuple(
            (first * stride - padding, (end - 1) * stride - padding + span + 1)
            for (first, end), (stride, padding, span) in zip(places, self._axes, strict=True)
        )


def cropped(images: Tensor, box: Box) -> Tensor:
    """The box of images (batch, channels, *image), zeros where it leaves the image."""
    inside = within(box, images.shape[2:])
    widths = [w for (f, e), (g, h) in zip(box, inside, strict=True) for w in (e - h, g - f)][::-1]
    part = images[slices(inside)]
    return F.pad(part, widths) if any(widths) else part


def within(box: Box, sizes: Sequence[int]) -> Box:
    """The part of a box that is inside of an image."""
    return tuple((max(0, first), min(size, end)) for (first, end), size in zip(box, sizes, strict=True))


def slices(box: Box) -> tuple[slice, ...]:
    """A box as an index of (batch, channels, *image)."""
    return (slice(None), slice(None), *(slice(first, end) for first, end in box))


def empty(box: Box) -> bool:
    """Whether a box has no pixel."""
    return any(end <= first for first, end in box)


def mostly(box: Box, sizes: Sequence[int]) -> bool:
    """Whether a box is most of an image: leaving out the rest would save little."""
    return math.prod(end - first for first, end in box) > MOSTLY * math.prod(sizes)
