"""Small networks for tests, built node by node: every topology the bounds claim to cover."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from certify_cli.network.activations import from_name
from certify_cli.network.affine import Dense, Scale, Shift
from certify_cli.network.convolution import Conv
from certify_cli.network.graph import Add, Builder, Concat, Network
from certify_cli.network.movement import Reshape, Select
from certify_cli.network.pooling import MaxMin, MaxPool


def _weights(generator: torch.Generator, *shape: int, gain: float = 1.0) -> Tensor:
    fan = math.prod(shape[1:])
    return gain * torch.randn(*shape, dtype=torch.float64, generator=generator) / math.sqrt(fan)


def mlp(widths: Sequence[int], activation: str = "tanh", seed: int = 0, gain: float = 1.5) -> Network:
    """widths = (inputs, hidden, ..., classes)."""
    g = torch.Generator().manual_seed(seed)
    builder, last = Builder((widths[0],)), 0
    for number, (n, m) in enumerate(pairwise(widths)):
        weight, bias = _weights(g, m, n, gain=gain), 0.3 * _weights(g, m, 1)[:, 0]
        last = builder.add(f"fc{number}", Dense(weight, bias), last)
        if number < len(widths) - 2:
            last = builder.add(f"act{number}", from_name(activation), last)
    return builder.build(last)


def conv_net(activation: str = "sigmoid", seed: int = 0, classes: int = 4) -> Network:
    """Normalisation, strided convolution, activation, padding, convolution, scale, activation, dense."""
    g = torch.Generator().manual_seed(seed)
    b = Builder((1, 8, 8))
    last = b.add("mean", Shift(torch.full((1, 1, 1), -0.4, dtype=torch.float64)), 0)
    last = b.add("std", Scale(torch.full((1, 1, 1), 2.5, dtype=torch.float64), 2), last)
    last = b.add("conv0", Conv(_weights(g, 3, 1, 3, 3), _weights(g, 3, 1)[:, 0], (2, 2), (1, 1), (1, 1)), last)
    last = b.add("act0", from_name(activation), last)
    pad = Select.of(lambda t: torch.nn.functional.pad(t, (1, 1, 1, 1), mode="replicate"), (3, 4, 4))
    last = b.add("pad", pad, last)
    last = b.add("conv1", Conv(_weights(g, 4, 3, 3, 3), None, (2, 2), (0, 0), (1, 1)), last)
    last = b.add("bn", Scale(0.5 + _weights(g, 4, 1)[:, 0].abs().reshape(4, 1, 1), 4), last)
    last = b.add("act1", from_name(activation), last)
    last = b.add("flatten", Reshape((16,)), last)
    return b.build(b.add("fc", Dense(_weights(g, classes, 16), _weights(g, classes, 1)[:, 0]), last))


def residual_net(activation: str = "tanh", seed: int = 0, classes: int = 3) -> Network:
    """x -> relation of two residual blocks, the second with a linear map on its skip."""
    g = torch.Generator().manual_seed(seed)
    b = Builder((6,))
    stem = b.add("stem", Dense(_weights(g, 5, 6), _weights(g, 5, 1)[:, 0]), 0)
    hidden = b.add("act0", from_name(activation), b.add("in0", Dense(_weights(g, 7, 5)), stem))
    first = b.add("add0", Add(), stem, b.add("out0", Dense(_weights(g, 5, 7)), hidden))
    hidden = b.add("act1", from_name(activation), b.add("in1", Dense(_weights(g, 6, 5)), first))
    skip = b.add("skip1", Dense(_weights(g, 4, 5)), first)
    second = b.add("add1", Add(), skip, b.add("out1", Dense(_weights(g, 4, 6)), hidden))
    top = b.add("act2", from_name(activation), second)
    return b.build(b.add("fc", Dense(_weights(g, classes, 4)), top))


def one_lipschitz_net(activation: str = "tanh", seed: int = 0, classes: int = 3) -> Network:
    """Dense, two blocks x - 2 V^T T^-1 phi(V x + b) that are 1-Lipschitz by design (theory section 14), dense."""
    g = torch.Generator().manual_seed(seed)
    builder = Builder((5,))
    node = builder.add("stem", Dense(_weights(g, 6, 5), _weights(g, 6, gain=0.3)), 0)
    for number in (1, 2):
        v, q = _weights(g, 7, 6), 1 + torch.rand(7, dtype=torch.float64, generator=g)
        t = ((v @ v.T).abs() * q).sum(1) / q
        hidden = builder.add(f"into{number}", Dense(v, _weights(g, 7, gain=0.3)), node)
        hidden = builder.add(f"phi{number}", from_name(activation), hidden)
        back = builder.add(f"back{number}", Dense(-2 * (v / t[:, None]).T, _weights(g, 6, gain=0.3)), hidden)
        node = builder.add(f"sum{number}", Add(), node, back)
    return builder.build(builder.add("head", Dense(_weights(g, classes, 6), _weights(g, classes)), node))


def concat_net(activation: str = "softplus", seed: int = 0, classes: int = 3) -> Network:
    """Input, first and second layer concatenated (dense-net style); one activation feeds two readers."""
    g = torch.Generator().manual_seed(seed)
    b = Builder((5,))
    first = b.add("act0", from_name(activation), b.add("fc0", Dense(_weights(g, 4, 5), _weights(g, 4, 1)[:, 0]), 0))
    joined = b.add("cat0", Concat(0), 0, first)
    second = b.add("act1", from_name(activation), b.add("fc1", Dense(_weights(g, 6, 9)), joined))
    again = b.add("act2", from_name(activation), b.add("fc2", Dense(_weights(g, 3, 4)), first))
    joined = b.add("cat1", Concat(0), joined, second, again)
    return b.build(b.add("fc", Dense(_weights(g, classes, 18)), joined))


def batch_norm_net(activation: str = "tanh", seed: int = 0, classes: int = 3) -> Network:
    """Batch norms as four nodes each (mean, deviation, gain, offset), unfolded: before a convolution's activation, on
    a skip, and behind the last activation; gains of both signs and one of exactly 0 (a dead channel)."""
    g = torch.Generator().manual_seed(seed)
    b = Builder((2, 3, 3))

    def norm(name: str, last: int, dead: bool = False) -> int:
        """Of one parameter a channel: the first axis of the value at `last`."""
        channels, *space = b.shape(last)
        shape = (channels, *[1] * len(space))
        mean, gain, offset = (_weights(g, channels, 1).reshape(shape) for _ in range(3))
        if dead:
            gain.view(-1)[0] = 0.0
        deviation = 0.3 + _weights(g, channels, 1).abs().reshape(shape)
        last = b.add(f"{name}.mean", Shift(-mean), last)
        last = b.add(f"{name}.deviation", Scale(1 / deviation, len(shape)), last)
        last = b.add(f"{name}.gain", Scale(gain, len(shape)), last)
        return b.add(f"{name}.offset", Shift(offset), last)

    stem = b.add("conv0", Conv(_weights(g, 3, 2, 3, 3), None, (1, 1), (1, 1), (1, 1)), 0)
    first = b.add("act0", from_name(activation), norm("bn0", stem, dead=True))
    inner = b.add("conv1", Conv(_weights(g, 3, 3, 3, 3), None, (1, 1), (1, 1), (1, 1)), first)
    skip = norm("bn1", b.add("conv2", Conv(_weights(g, 3, 3, 1, 1), None, (1, 1), (0, 0), (1, 1)), first))
    second = b.add("act1", from_name(activation), b.add("add", Add(), norm("bn2", inner), skip))
    flat = b.add("flatten", Reshape((27,)), norm("bn3", second))
    return b.build(b.add("fc", Dense(_weights(g, classes, 27), _weights(g, classes, 1)[:, 0]), flat))


SMOOTH: dict[str, Network] = {
    "two layers, tanh": mlp((6, 9, 3), "tanh"),
    "two layers, softplus": mlp((6, 9, 3), "softplus:3"),
    "three layers, softplus": mlp((5, 7, 6, 3), "softplus:2", seed=1),
    "four layers, sigmoid": mlp((5, 8, 7, 6, 4), "sigmoid", seed=2, gain=3.0),
    "three layers, gelu": mlp((5, 7, 6, 3), "gelu", seed=3),
    "three layers, silu": mlp((5, 7, 6, 3), "silu", seed=4),
    "three layers, elu": mlp((5, 7, 6, 3), "elu", seed=5),
    "three layers, sin": mlp((4, 6, 5, 3), "sin", seed=6),
    "convolutional": conv_net(),
    "convolutional, mish": conv_net("mish", seed=1),
    "residual": residual_net(),
    "residual, gelu": residual_net("gelu", seed=1),
    "1-Lipschitz blocks": one_lipschitz_net(),
    "concatenating": concat_net(),
    "concatenating, softsign": concat_net("softsign", seed=1),
    "batch norms, silu": batch_norm_net("silu"),
    "linear": mlp((5, 3)),
    "residual around an activation": None,  # type: ignore[dict-item]
}


def _skip_activation() -> Network:
    """z + phi(z) directly, and an activation right behind another."""
    g = torch.Generator().manual_seed(9)
    b = Builder((5,))
    z = b.add("fc0", Dense(_weights(g, 5, 5)), 0)
    h = b.add("act0", from_name("tanh"), z)
    h = b.add("act1", from_name("sigmoid"), b.add("add", Add(), z, h))
    h = b.add("act2", from_name("tanh"), h)
    return b.build(b.add("fc", Dense(_weights(g, 3, 5)), h))


SMOOTH["residual around an activation"] = _skip_activation()


def sorted_net(seed: int = 0) -> Network:
    """Dense layers and GroupSort of two, some of whose pairs nearly tie."""
    g = torch.Generator().manual_seed(seed)
    b, last = Builder((5,)), 0
    for number, (n, m) in enumerate(pairwise((5, 8, 6))):
        last = b.add(f"fc{number}", Dense(_weights(g, m, n, gain=1.5), 0.3 * _weights(g, m, 1)[:, 0]), last)
        last = b.add(f"sort{number}", MaxMin(), last)
    return b.build(b.add("fc2", Dense(_weights(g, 3, 6)), last))


PIECEWISE: dict[str, Network] = {
    "relu": mlp((5, 8, 7, 3), "relu"),
    "leaky relu, residual": residual_net("leaky_relu:0.2"),
    "relu, concatenating": concat_net("relu"),
    "relu, 1-Lipschitz blocks": one_lipschitz_net("relu", seed=1),
    "relu, convolutional": conv_net("relu"),
    "relu6": mlp((5, 8, 3), "clip:0,6"),
    "max min": sorted_net(),
}


def points(network: Network, count: int, seed: int = 0, spread: float = 2.0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return spread * torch.randn(count, *network.input_shape, dtype=torch.float64, generator=g)


def pooled_net() -> Network:
    """Convolution, activation, padded max pooling with overlapping windows, dense."""
    g = torch.Generator().manual_seed(3)
    b = Builder((1, 7, 7))
    weight = torch.randn(2, 1, 3, 3, dtype=torch.float64, generator=g)
    h = b.add("act", from_name("silu"), b.add("conv", Conv(weight, None, (1, 1), (1, 1), (1, 1)), 0))
    h = b.add("flat", Reshape((32,)), b.add("pool", MaxPool((3, 3), (2, 2), (1, 1), (1, 1)), h))
    return b.build(b.add("fc", Dense(torch.randn(3, 32, dtype=torch.float64, generator=g)), h))


def activation_first() -> Network:
    """The input itself is a pre-activation, and the logits are an activation's output."""
    b = Builder((4,))
    h = b.add("act0", from_name("tanh"), 0)
    return b.build(b.add("act1", from_name("softplus"), b.add("fc", Dense(torch.eye(4, dtype=torch.float64) * 2), h)))


def shared_heads() -> Network:
    """Three activations read one pre-activation, two of them each other's sum; one is added to itself."""
    g = torch.Generator().manual_seed(4)
    b = Builder((4,))
    z = b.add("fc0", Dense(_weights(g, 5, 4), _weights(g, 1, 5)[0]), 0)
    parts = [b.add(f"act{i}", from_name(name), z) for i, name in enumerate(("tanh", "softplus:3", "gelu"))]
    total = b.add("add", Add(), parts[0], parts[1], parts[0])
    second = b.add("fc1", Dense(2 * _weights(g, 6, 5)), total)
    again = b.add("act3", from_name("sigmoid"), second)
    other = b.add("act4", from_name("sin"), second)
    joined = b.add("cat", Concat(0), again, parts[2], other, again)
    return b.build(b.add("fc2", Dense(_weights(g, 3, b.shape(joined)[0])), joined))


def a_branch_that_comes_back() -> Network:
    """The input is activated, added to what an activation of an activation makes of it, and read again at the end."""
    g = torch.Generator().manual_seed(8)
    b = Builder((4,))
    first = b.add("act0", from_name("softplus:2"), 0)
    inner = b.add("act2", from_name("elu"), b.add("act1", from_name("atan"), first))
    last = b.add("act3", from_name("tanh"), b.add("add", Add(), first, inner, 0))
    joined = b.add("cat", Concat(0), 0, last, first)
    return b.build(b.add("fc", Dense(2 * _weights(g, 3, 12)), joined))


CURVED = {name: network for name, network in SMOOTH.items() if name != "linear"} | {
    "activation first": activation_first(),
    "shared heads": shared_heads(),
    "a branch that comes back": a_branch_that_comes_back(),
    "saturated": mlp((6, 12, 9, 3), "tanh", seed=7, gain=6.0),
    "nearly dead": mlp((6, 12, 9, 3), "softplus:20", seed=8, gain=3.0),
}
"""The smooth networks that bend, and awkward ones."""
QUICK_CURVED = {
    "three layers, gelu",
    "three layers, elu",
    "convolutional",
    "residual",
    "shared heads",
    "a branch that comes back",
    "saturated",
}
"""One of each kind for every day; all of them with -m slow."""
EACH_CURVED = [name if name in QUICK_CURVED else pytest.param(name, marks=pytest.mark.slow) for name in CURVED]


def all_pairs(classes: int) -> torch.Tensor:
    return (1 - torch.eye(classes)).nonzero()
