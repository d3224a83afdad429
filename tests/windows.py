"""Convolutional networks of every topology on which rows are kept on windows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from certify_cli.network.activations import from_name
from certify_cli.network.affine import Dense, Scale, Shift
from certify_cli.network.convolution import Conv, ConvTranspose
from certify_cli.network.graph import Add, Builder, Concat, Network
from certify_cli.network.movement import Reshape, Select

D = torch.float64


class Drawing:
    """A network as it is drawn: layers with random weights, one after another."""

    def __init__(self, shape: tuple[int, ...], seed: int = 0) -> None:
        self.builder, self.generator = Builder(shape), torch.Generator().manual_seed(seed)

    def random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=D)

    def conv(
        self, x: int, out: int, k: int, stride: int = 1, padding: int = 0, dilation: int = 1, groups: int = 1
    ) -> int:
        shape = self.builder.shape(x)
        axes = len(shape) - 1
        weight, offset = self.random(out, shape[0] // groups, *[k] * axes), self.random(out)
        each = ((number,) * axes for number in (stride, padding, dilation))
        return self.builder.add("conv", Conv(weight, offset, *each, groups), x)

    def relu(self, x: int) -> int:
        return self.builder.add("relu", from_name("relu"), x)

    def moved(self, x: int, function: Callable[[Tensor], Tensor]) -> int:
        return self.builder.add("moved", Select.of(function, self.builder.shape(x)), x)

    def finished(self, x: int) -> Network:
        size = torch.Size(self.builder.shape(x)).numel()
        x = self.builder.add("flat", Reshape((size,)), x)
        return self.builder.build(self.builder.add("logits", Dense(self.random(3, size), None), x))


def strided() -> Network:
    d = Drawing((3, 17, 15))
    x = d.relu(d.conv(0, 4, 3, stride=2, padding=1))
    x = d.relu(d.conv(x, 6, 3, padding=1))
    return d.finished(d.relu(d.conv(x, 4, 2, stride=2)))


def dilated_and_grouped() -> Network:
    d = Drawing((4, 19, 19))
    x = d.relu(d.conv(0, 8, 3, dilation=2, padding=2, groups=2))
    x = d.relu(d.conv(x, 8, 3, padding=1, groups=8))
    return d.finished(d.relu(d.conv(x, 4, 1)))


def residual() -> Network:
    """Shortcuts of every kind: none, a convolution of one pixel, and slices with channels of zeros."""
    d = Drawing((3, 24, 24))
    x = d.relu(d.conv(0, 4, 3, padding=1))
    x = d.relu(d.builder.add("add", Add(), d.conv(d.relu(d.conv(x, 4, 3, padding=1)), 4, 3, padding=1), x))
    inner = d.conv(d.relu(d.conv(x, 8, 3, stride=2, padding=1)), 8, 3, padding=1)
    x = d.relu(d.builder.add("add", Add(), inner, d.conv(x, 8, 1, stride=2)))
    inner = d.conv(d.relu(d.conv(x, 12, 3, stride=2, padding=1)), 12, 3, padding=1)
    sliced = d.moved(x, lambda t: torch.nn.functional.pad(t[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2)))
    return d.finished(d.relu(d.builder.add("add", Add(), inner, sliced)))


def joined() -> Network:
    d = Drawing((2, 20, 20))
    x = d.relu(d.conv(0, 4, 3, padding=1))
    both = d.builder.add("concat", Concat(0), d.relu(d.conv(x, 3, 1)), d.relu(d.conv(x, 3, 3, padding=1)), x)
    return d.finished(d.relu(d.conv(both, 5, 3, padding=1)))


def scaled() -> Network:
    """Constants of a channel, and of a pixel; padding, cropping and shuffled channels as data movement."""
    d = Drawing((3, 18, 18))
    x = d.builder.add("std", Scale(d.random(3, 1, 1)), d.builder.add("mean", Shift(d.random(3, 1, 1)), 0))
    x = d.relu(d.conv(d.builder.add("mask", Scale(d.random(18, 18)), x), 4, 3))
    x = d.moved(x, lambda t: torch.nn.functional.pad(t[:, [2, 0, 3, 1], 1:, 1:], (0, 2, 0, 1)))
    x = d.relu(d.conv(x, 4, 3, padding=1))
    return d.finished(d.relu(d.conv(d.moved(x, lambda t: t.transpose(2, 3)), 3, 3)))


def one_axis() -> Network:
    d = Drawing((2, 40))
    x = d.relu(d.conv(0, 4, 5, stride=2, padding=2))
    return d.finished(d.relu(d.conv(x, 4, 3, padding=1)))


def three_axes() -> Network:
    d = Drawing((2, 8, 8, 8))
    x = d.relu(d.conv(0, 3, 2, padding=1))
    return d.finished(d.relu(d.conv(x, 2, 2, stride=2)))


def upsampled() -> Network:
    d = Drawing((2, 9, 9))
    x = d.relu(d.conv(0, 4, 3, padding=1))
    up = ConvTranspose(d.random(4, 3, 2, 2), None, (2, 2), (0, 0), (0, 0), (1, 1))
    x = d.relu(d.builder.add("up", up, x))
    return d.finished(d.relu(d.conv(x, 3, 3, padding=1)))


TOPOLOGIES = (strided, dilated_and_grouped, residual, joined, scaled, one_axis, three_axes, upsampled)
