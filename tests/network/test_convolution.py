"""Convolutions of large batches, part by part on the boxes where they are not zero, against torch's of the whole.

Values are small integers, so that every sum is exact in any order, and the comparison too.
"""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv1d_input, conv2d_input, conv3d_input

from certify_cli.network import convolution
from certify_cli.network.affine import materialise
from certify_cli.network.convolution import Conv
from certify_cli.network.graph import Shape
from certify_cli.network.live import live_boxes
from certify_cli.numerics.rounding import gamma

D = torch.float64
GEOMETRIES = [
    # weight, image, stride, padding, dilation, groups
    ((3, 2, 3), (20,), (1,), (1,), (1,), 1),
    ((4, 1, 4), (23,), (3,), (2,), (2,), 2),
    ((2, 2, 1), (9,), (2,), (0,), (1,), 1),
    ((3, 2, 3, 3), (12, 9), (1, 1), (1, 1), (1, 1), 1),
    ((3, 2, 3, 3), (12, 13), (2, 2), (1, 1), (1, 1), 1),
    ((2, 2, 2, 5), (11, 14), (3, 1), (0, 4), (2, 1), 1),
    ((6, 1, 3, 3), (10, 10), (1, 1), (1, 1), (1, 1), 6),
    ((6, 2, 1, 3), (8, 15), (1, 2), (3, 3), (1, 3), 3),
    ((4, 3, 1, 1), (9, 9), (2, 2), (0, 0), (1, 1), 1),
    ((2, 1, 3, 3), (7, 8), (4, 5), (0, 0), (1, 1), 1),
    ((2, 1, 2, 2, 2), (6, 7, 5), (1, 2, 1), (1, 0, 1), (1, 1, 2), 1),
]
BATCHES = [1, 2, 7, 40]


def integers(*shape: int, seed: int) -> Tensor:
    return torch.randint(-9, 10, shape, generator=torch.Generator().manual_seed(seed)).to(D)


def mostly_zero(batch: int, channels: int, image: Shape, seed: int) -> Tensor:
    """Images that are zero but for a box of their own, some everywhere, and some nowhere."""
    g = torch.Generator().manual_seed(seed)
    values = integers(batch, channels, *image, seed=seed)
    for number in range(batch):
        kind = int(torch.randint(6, (), generator=g))
        if kind == 0:
            values[number] = 0.0
        if kind < 5:
            there = torch.zeros(image, dtype=D)
            first = [int(torch.randint(size, (), generator=g)) for size in image]
            there[tuple(slice(begin, begin + 1 + kind // 2) for begin in first)] = 1.0
            values[number] *= there
    return values


def of(weight: Tensor, geometry: tuple[Shape, Shape, Shape], groups: int) -> Conv:
    return Conv(weight, None, *geometry, groups)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize(("weight", "image", "stride", "padding", "dilation", "groups"), GEOMETRIES)
def test_parts_and_boxes_change_nothing(
    weight: Shape,
    image: Shape,
    stride: Shape,
    padding: Shape,
    dilation: Shape,
    groups: int,
    batch: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(convolution, "PATCH_ENTRIES", 2**8)
    w = integers(*weight, seed=1)
    op, axes = of(w, (stride, padding, dilation), groups), len(image)
    shape = (weight[1] * groups, *image)
    forward, back = ((F.conv1d, conv1d_input), (F.conv2d, conv2d_input), (F.conv3d, conv3d_input))[axes - 1]
    for seed in range(6):
        x = mostly_zero(batch, shape[0], image, seed)
        y = mostly_zero(batch, *(op.output_shape(shape)[:1]), op.output_shape(shape)[1:], seed + 50)
        rest = (stride, padding, dilation, groups)
        assert torch.equal(op.linear(x), forward(x, w, None, *rest))
        assert torch.equal(op.absolute(x), forward(x, w.abs(), None, *rest))
        assert torch.equal(op.transpose(y, shape), back(x.shape, w, y, *rest))
        assert torch.equal(op.absolute_transpose(y, shape), back(x.shape, w.abs(), y, *rest))
        assert float((op.linear(x) * y).sum()) == float((x * op.transpose(y, shape)).sum())


def test_the_error_is_within_that_of_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against rational numbers: gamma of the products of an output, times |W| |x|."""
    monkeypatch.setattr(convolution, "PATCH_ENTRIES", 2**8)
    g = torch.Generator().manual_seed(3)
    op = of(torch.randn(2, 3, 3, 3, generator=g, dtype=D), ((2, 1), (1, 1), (1, 1)), 1)
    shape = (3, 7, 6)
    x = torch.randn(9, *shape, generator=g, dtype=D) * mostly_zero(9, 3, (7, 6), 4).ne(0)
    found, size = op.linear(x).flatten(1), op.absolute(x.abs()).flatten(1)
    matrix = materialise(op, shape)
    for number in range(len(x)):
        entries = [Fraction(v) for v in x[number].flatten().tolist()]
        for row, value, bound in zip(matrix.tolist(), found[number].tolist(), size[number].tolist(), strict=True):
            exact = sum((Fraction(a) * b for a, b in zip(row, entries, strict=True)), Fraction(0))
            assert abs(Fraction(value) - exact) <= Fraction(gamma(op.terms)) * Fraction(bound) * 2


def test_what_is_no_number_is_not_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """And stays where it is: the other images of its part are as they were."""
    monkeypatch.setattr(convolution, "PATCH_ENTRIES", 2**8)
    op = of(integers(2, 2, 3, 3, seed=1), ((1, 1), (1, 1), (1, 1)), 1)
    x = mostly_zero(12, 2, (8, 8), 2)
    before = op.linear(x)
    for wrong in (math.nan, math.inf):
        spoilt = x.clone()
        spoilt[3, 1, 4, 4] = wrong
        after = op.linear(spoilt)
        assert bool((~after[3, :, 3:6, 3:6].isfinite()).any())
        others = torch.arange(12) != 3
        assert torch.equal(after[others], before[others])
        assert bool((~op.transpose(spoilt, (2, 8, 8))[3].isfinite()).any())


def test_boxes_are_the_smallest() -> None:
    images = torch.zeros(5, 2, 6, 7, dtype=D)
    images[0, 1, 2, 3] = -1e-320  # subnormal
    images[1, 0, 4, 1] = 2.0
    images[4, 1, 5, 6] = math.nan
    assert live_boxes(images, 2) == [((2, 5), (1, 4)), None, ((5, 6), (6, 7))]
    assert live_boxes(images, 5) == [((2, 6), (1, 7))]
