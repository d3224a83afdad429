"""Deep networks with random weights: the error of their margins is nothing beside their logits, and bounds hold."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from certify_cli import load_model
from certify_cli.network.activations import from_name
from certify_cli.network.affine import Dense, Scale, Shift
from certify_cli.network.convolution import Conv
from certify_cli.network.evaluate import evaluate, evaluate_in_float64, margins
from certify_cli.network.graph import Add, Builder, Network
from certify_cli.network.movement import Reshape, Select
from certify_cli.numerics.quotients import quotient_tail, reciprocal
from certify_cli.torchvision_schemas import import_torchvision
from tests.fixed_point import fixed_values, worst_error


def residual(blocks: int, folded: bool, size: int = 8) -> Network:
    """A CIFAR ResNet of 6 blocks + 2 layers with slicing and zeros for shortcuts, and batch norms, folded or not."""
    g = torch.Generator().manual_seed(0)
    b = Builder((3, size, size))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g).double()

    def conv(name: str, last: int, out: int, stride: int = 1) -> int:
        channels = b.shape(last)[0]
        weight = normal(out, channels, 3, 3) * (2 / (9 * channels)) ** 0.5
        mean, gain, shift = 0.1 * normal(out), 1 + 0.2 * normal(out), 0.1 * normal(out)
        variance, eps = 0.5 + normal(out).abs(), torch.full((out,), 1e-5, dtype=torch.float64)
        factor = gain / (variance + eps).sqrt()
        if folded:
            weight, offset = (weight * factor.reshape(-1, 1, 1, 1)).float().double(), (shift - mean * factor).float()
            return b.add(name, Conv(weight, offset.double(), (stride,) * 2, (1, 1), (1, 1)), last)
        tail = quotient_tail(factor, gain, [variance, eps], root=True)
        assert tail is not None
        last = b.add(name, Conv(weight.float().double(), None, (stride,) * 2, (1, 1), (1, 1)), last)
        last = b.add(f"{name}.mean", Shift(-mean.reshape(-1, 1, 1)), last)
        scale = Scale(factor.reshape(-1, 1, 1), 3, weight_tail=tail.reshape(-1, out, 1, 1))
        return b.add(f"{name}.shift", Shift(shift.reshape(-1, 1, 1)), b.add(f"{name}.scale", scale, last))

    def activated(last: int) -> int:
        return b.add("relu", from_name("relu"), last)

    last = activated(conv("stem", 0, 16))
    for out in (16, 32, 64):
        for _ in range(blocks):
            shape = b.shape(last)
            wider = out - shape[0]
            inner = conv("second", activated(conv("first", last, out, 2 if wider else 1)), out)
            if wider:
                pads = (0, 0, 0, 0, wider // 2, wider // 2)
                shorter = Select.of(lambda t, pads=pads: torch.nn.functional.pad(t[:, :, ::2, ::2], pads), shape)
                last = b.add("shortcut", shorter, last)
            last = activated(b.add("add", Add(), inner, last))
    pixels = (size // 4) ** 2
    weight, tail = reciprocal(torch.full((1, 1), float(pixels) + 1, dtype=torch.float64))  # no power of two
    last = b.add("flat", Reshape((64, pixels)), last)
    last = b.add("mean", Dense(weight.expand(1, pixels).contiguous(), None, 1, weight_tail=tail), last)
    return b.build(b.add("fc", Dense(normal(10, 64) / 8, normal(10)), b.add("vector", Reshape((64,)), last)))


def hold(network: Network) -> None:
    """Logits and every other value against fixed-point integers, at one sample."""
    x = torch.rand(1, *network.input_shape, generator=torch.Generator().manual_seed(1)).double()
    found, plain = evaluate(network, x), evaluate_in_float64(network, x)
    scale = float(found.logits.abs().max())
    assert float(plain.logit_errors.max()) > 1e3 * scale  # in float64 nothing could be said
    _, error = margins(found.logits, found.logit_errors, found.logits.argmax(1))
    assert float(error.max()) < 1e-14 * scale
    for node, value, bound, exact in zip(
        network.nodes, found.values, found.errors, fixed_values(network, x[0]), strict=True
    ):
        assert worst_error(value[0], bound[0], exact) <= 1, node.name


@pytest.mark.parametrize("folded", [True, False], ids=["folded", "with batch norms"])
@pytest.mark.parametrize("blocks", [3, 9], ids=["20 layers", "56 layers"])
def test_residual_networks(blocks: int, folded: bool) -> None:
    hold(residual(blocks, folded))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["densenet121", "mobilenet_v2", "squeezenet1_1"])
def test_deep_networks_of_torchvision(name: str) -> None:
    """The exporter folds batch norms into convolutions; those of a DenseNet, which come before, stay."""
    import_torchvision()
    from torchvision import models

    torch.manual_seed(0)
    model = getattr(models, name)(weights=None, num_classes=10)
    hold(load_model(model, input_shape=(3, 32, 32)).network)
