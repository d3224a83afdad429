"""Values in extended precision against fixed-point integers: every entry of every node, on every topology."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from certify_cli.network.activations import from_name
from certify_cli.network.affine import AffineOp, Dense, Scale, Shift
from certify_cli.network.convolution import Conv, ConvTranspose
from certify_cli.network.evaluate import Evaluation, evaluate, evaluate_in_float64
from certify_cli.network.extended import extended_values
from certify_cli.network.graph import Add, Builder, Concat, Network, Node
from certify_cli.network.movement import Reshape, Select
from certify_cli.network.pooling import MaxMin, MaxPool
from certify_cli.numerics.quotients import quotient_tail, reciprocal
from certify_cli.numerics.rounding import UNIT
from tests.fixed_point import fixed_values, worst_error
from tests.networks import PIECEWISE, SMOOTH, mlp, points


def extended(network: Network, x: Tensor, aim: float = UNIT / 4) -> Evaluation:
    sizes = [float(value.abs().max()) for value in network.values(x)]
    values, errors = zip(*extended_values(network, x, sizes, aim * sizes[-1]), strict=True)
    return Evaluation(list(values), list(errors))


def worst(network: Network, x: Tensor, found: Evaluation) -> float:
    """The largest error of all nodes and entries, as a part of its bound, which must be finite."""
    largest = 0.0
    for row, sample in enumerate(x):
        for node, exact in enumerate(fixed_values(network, sample)):
            part = worst_error(found.values[node][row], found.errors[node][row], exact)
            assert part <= 1, (network.nodes[node].name, part)
            largest = max(largest, part)
    return largest


@pytest.mark.parametrize("name", SMOOTH | PIECEWISE)
def test_every_value_is_within_its_bound(name: str) -> None:
    network = (SMOOTH | PIECEWISE)[name]
    x = points(network, 2)
    for aim in (UNIT / 4, 1e-40, 1e-3):
        assert worst(network, x, extended(network, x, aim)) > 1e-4


@pytest.mark.parametrize("name", [name for name in PIECEWISE if name != "relu, convolutional"])
def test_piecewise_linear_networks_have_nothing_but_the_last_rounding(name: str) -> None:
    """But for one with a rounded constant, without the rest of it."""
    network = PIECEWISE[name]
    x = points(network, 3)
    found = extended(network, x)
    largest = found.logits.abs().amax()
    assert (found.logit_errors <= 3.01 * UNIT * found.logits.abs() + UNIT * largest).all()


ACTIVATIONS = ("relu", "leaky_relu:0.01", "leaky_relu:-0.5", "clip:0,6", "clip:-1,0.3", "clip:0.1", "hard_sigmoid")
ROUND = ("tanh", "gelu", "selu", "hard_swish", "softsign")


class Pieces:
    """Random operations on values (channels, height, width) of any scale."""

    def __init__(self, seed: int) -> None:
        self.g = torch.Generator().manual_seed(seed)

    def integer(self, low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=self.g))

    def numbers(self, *shape: int) -> Tensor:
        """Float32 or float64 numbers, now and then of very different sizes, some of them zero."""
        n = torch.randn(*shape, dtype=torch.float64, generator=self.g)
        kind = self.integer(0, 4)
        if kind <= 1:
            n = n.float().double()
        if kind == 2:
            n = n * 10.0 ** torch.randint(-12, 3, shape, generator=self.g).double()
        return n * (torch.rand(*shape, generator=self.g) < 0.9)

    def rounded(self, *shape: int) -> tuple[Tensor, int, Tensor | None]:
        """A weight that was rounded: reciprocals, or gains over roots of variances."""
        if self.integer(0, 1):
            weight, tail = reciprocal(1 + torch.rand(*shape, dtype=torch.float64, generator=self.g))
            return weight, 1, tail
        gain, variance = self.numbers(*shape), 0.1 + self.numbers(*shape).abs()
        eps = torch.full_like(variance, 1e-5)
        weight = gain / (variance + eps).sqrt()
        return weight, 3, quotient_tail(weight, gain, [variance, eps], root=True)

    def affine(self, shape: tuple[int, ...]) -> AffineOp:
        c, _, w = shape
        kind = self.integer(0, 6)
        if kind == 0:
            return Dense(self.numbers(self.integer(1, 5), w), None if self.integer(0, 1) else self.numbers(1)[0])
        if kind == 1:
            groups = c if self.integer(0, 1) else 1
            out, k = groups * self.integer(1, 3), self.integer(1, 3)
            stride, dilation = (self.integer(1, 2), self.integer(1, 2)), (self.integer(1, 2), 1)
            offset = self.numbers(out) if self.integer(0, 1) else None
            return Conv(self.numbers(out, c // groups, k, k), offset, stride, (2, 2), dilation, groups)
        if kind == 2:
            groups = c if self.integer(0, 1) else 1
            each, k = self.integer(1, 2), self.integer(1, 3)
            stride = (self.integer(1, 2), 2)
            weight, offset = self.numbers(c, each, k, k), self.numbers(groups * each)
            return ConvTranspose(weight, offset, stride, (0, 0), (0, 1), (1, self.integer(1, 2)), groups)
        if kind == 3:
            weight, roundings, tail = self.rounded(c, 1, 1)
            return Scale(weight, roundings, weight_tail=tail)
        if kind == 4:
            return Shift(self.numbers(c, 1, 1))
        if kind == 5:
            return Select.of(lambda t: torch.nn.functional.pad(t, (1, 0, 0, 1)).flip(1), shape)
        weight, tail = reciprocal(torch.full((1, 1, 1, 1), 3.0, dtype=torch.float64))
        return Conv(weight.expand(c, 1, 1, 3).contiguous(), None, (1, 1), (0, 1), (1, 1), c, 1, weight_tail=tail)

    def network(self, depth: int, smooth: bool) -> Network:
        b = Builder((self.integer(1, 3), self.integer(2, 4), self.integer(2, 4)))
        last = 0
        for step in range(depth):
            shape = b.shape(last)
            if math.prod(shape) > 80:
                last = b.add(f"pool{step}", MaxPool((2, 2), (2, 2), (1, 1), (1, 1)), last)
            kind = self.integer(0, 5)
            if kind == 0:
                names = ACTIVATIONS + (ROUND if smooth else ())
                last = b.add(f"act{step}", from_name(names[self.integer(0, len(names) - 1)]), last)
            elif kind == 1 and b.shape(last)[0] % 2 == 0:
                last = b.add(f"sort{step}", MaxMin(), last)
            elif kind == 2:
                last = b.add(f"pool{step}", MaxPool((2, 2), (1, 1), (1, 1), (1, 1)), last)
            elif kind == 3:
                other = b.add(f"side{step}", Scale(self.numbers(b.shape(last)[0], 1, 1)), last)
                last = b.add(f"join{step}", Concat(0) if self.integer(0, 1) else Add(), last, other)
            else:
                last = b.add(f"affine{step}", self.affine(b.shape(last)), last)
        last = b.add("flat", Reshape((math.prod(b.shape(last)),)), last)
        return b.build(b.add("fc", Dense(self.numbers(3, b.shape(last)[0]), self.numbers(3)), last))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.booleans(), st.sampled_from((UNIT / 4, 1e-6, 1e-60)))
def test_random_graphs(seed: int, smooth: bool, aim: float) -> None:
    pieces = Pieces(seed)
    network = pieces.network(10, smooth)
    x = pieces.numbers(2, *network.input_shape)
    if float(network(x).abs().max()) > 0:
        worst(network, x, extended(network, x, aim))
    worst(network, x, evaluate(network, x))


def stack(depth: int, width: int, seed: int = 0, activation: str = "relu") -> Network:
    """Dense layers of norm about 4 that leave the size of values as it is."""
    return mlp((width,) * depth + (5,), activation, seed=seed, gain=1.7)


@pytest.mark.parametrize("activation", ["relu", "leaky_relu:0.2", "clip:0,6"])
def test_depth_costs_no_accuracy(activation: str) -> None:
    network = stack(40, 12, activation=activation)
    x = points(network, 2)
    found = evaluate(network, x)
    assert (evaluate_in_float64(network, x).logit_errors > 1e3 * found.logits.abs().amax()).all()
    assert worst(network, x, found) > 1e-3
    assert (found.logit_errors <= 8 * UNIT * found.logits.abs().amax(1, keepdim=True)).all()


def test_a_smooth_deep_network_keeps_true_bounds() -> None:
    network = stack(12, 8, activation="gelu")
    x = points(network, 2)
    worst(network, x, evaluate(network, x))


def test_constants_without_the_rest_of_themselves_are_an_error() -> None:
    """3e9 times 1/3 minus 1e10 times .1, stored to 53 bits and nothing more: the exact 0 is within the bound."""
    weight, tail = reciprocal(torch.tensor([3.0, 10.0], dtype=torch.float64))
    last = Dense(torch.tensor([[3e9, -1e10], [1.0, 1.0]], dtype=torch.float64))
    exact, rounded = Builder((2,)), Builder((2,))
    network = exact.build(exact.add("fc", last, exact.add("part", Scale(weight, 1, weight_tail=tail), 0)))
    stored = rounded.build(rounded.add("fc", last, rounded.add("part", Scale(weight, 1), 0)))
    x = torch.ones(1, 2, dtype=torch.float64)
    for one in (stored, network):
        values, errors = zip(*extended_values(one, x, [1.0, 1.0, 1.0], UNIT), strict=True)
        assert worst(network, x, Evaluation(list(values), list(errors))) > 0.01
    assert float(errors[-1][0, 0]) < 2 * UNIT


def test_a_smooth_function_is_taken_at_the_exact_place() -> None:
    """Sines far out, where rounding the argument to float64 moves them by many units in the last place."""
    b = Builder((2,))
    z = b.add("sum", Dense(torch.tensor([[1e6, 1.0], [1e6, -1.0], [3e5, 0.5]], dtype=torch.float64)), 0)
    network = b.build(b.add("sin", from_name("sin"), z))
    x = torch.tensor([[1.0, 2.0**-35], [0.7, 2.0**-35]], dtype=torch.float64)
    found = extended(network, x)
    assert worst(network, x, found) > 1e-3
    assert (found.logit_errors < 20 * UNIT).all()


def test_entries_at_a_kink_are_taken_on_their_own_side() -> None:
    """2^60 (clip(z) - z) for z at the kink 6, and 2^-60 above and below it, which float64 rounds to 6."""
    b = Builder((2,))
    z = b.add("sum", Dense(torch.tensor([[6.0, 1.0], [6.0, -1.0], [6.0, 0.0]], dtype=torch.float64)), 0)
    minus = b.add("minus", Scale(torch.full((1,), -1.0, dtype=torch.float64)), z)
    difference = b.add("difference", Add(), b.add("clip", from_name("clip:0,6"), z), minus)
    network = b.build(b.add("large", Scale(torch.full((1,), 2.0**60, dtype=torch.float64)), difference))
    x = torch.tensor([[1.0, 2.0**-60]], dtype=torch.float64)
    values, errors = zip(*extended_values(network, x, [1.0, 6.0, 6.0, 6.0, 1.0, 1.0], 1e-9), strict=True)
    assert values[-1].tolist() == [[-1.0, 0.0, 0.0]]
    assert (errors[-1] < 1e-8).all()


def test_ties_stay_ties() -> None:
    """Two equal rows: the margin is exactly 0, and its error is not."""
    network = stack(30, 10)
    last = network.nodes[-1].op
    assert isinstance(last, Dense)
    assert last.offset is not None
    rows, offset = last.weight.clone(), last.offset.clone()
    rows[1], offset[1] = rows[0], offset[0]
    network.nodes[-1].op.weight.copy_(rows), last.offset.copy_(offset)
    found = evaluate(network, points(network, 4))
    assert (found.logits[:, 0] == found.logits[:, 1]).all()
    assert (found.logit_errors > 0).all()


@pytest.mark.parametrize("huge", [math.inf, math.nan, 1e305])
def test_numbers_beyond_the_digits_leave_the_float64_bounds(huge: float) -> None:
    network = stack(40, 8)
    x = points(network, 3)
    x[1, 0] = huge
    found, plain = evaluate(network, x), evaluate_in_float64(network, x)
    assert torch.equal(found.logit_errors[1].nan_to_num(7), plain.logit_errors[1].nan_to_num(7))
    assert (found.logit_errors[[0, 2]] < 1e-9 * plain.logit_errors[[0, 2]]).all()
    network.nodes[1].op.weight[0, 0] = huge
    x = points(network, 3)
    found, plain = evaluate(network, x), evaluate_in_float64(network, x)
    assert torch.equal(found.logit_errors.nan_to_num(7), plain.logit_errors.nan_to_num(7))


def test_a_slope_beyond_the_digits_leaves_the_float64_bounds() -> None:
    """At 0, where it multiplies nothing."""
    *nodes, last = stack(40, 8).nodes
    nodes.append(Node("huge", from_name("leaky_relu:1e305"), (len(nodes) - 1,), (8,)))
    network = Network((*nodes, replace(last, inputs=(len(nodes) - 1,))))
    x = points(network, 2)
    found, plain = evaluate(network, x), evaluate_in_float64(network, x)
    assert (plain.values[-3] == 0).any()
    assert torch.equal(found.logit_errors, plain.logit_errors)


@pytest.mark.parametrize("scales", [(1e150, 1e-150), (1e-200, 1e200), (1e-310, 1e300), (1e290, 1e-300)])
def test_layers_of_very_different_sizes(scales: tuple[float, float]) -> None:
    b, g = Builder((6,)), torch.Generator().manual_seed(0)
    last = 0
    for step in range(6):
        weight = torch.randn(6, 6, dtype=torch.float64, generator=g)
        weight[0] *= 1e-30
        last = b.add(f"fc{step}", Dense(weight * scales[step % 2]), last)
        last = b.add(f"act{step}", from_name("leaky_relu:0.1"), last)
    network = b.build(b.add("fc", Dense(torch.randn(3, 6, dtype=torch.float64, generator=g)), last))
    x = points(network, 2)
    worst(network, x, extended(network, x))
