"""Lowering of torch.nn layers, held to the layers themselves; and what must be refused."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import mpmath
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from certify_cli.errors import ModelError
from certify_cli.network.lowering.context import MODULES, lowers
from certify_cli.network.lowering.fx_graph import lower
from certify_cli.network.pooling import MaxPool

IMAGE = (4, 6, 5)
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(5, 3), (4, 5)),
    "linear without bias": (lambda: nn.Linear(5, 3, bias=False), (5,)),
    "conv1d": (lambda: nn.Conv1d(4, 2, 3, stride=2, padding=1, dilation=2), (4, 9)),
    "conv2d groups": (lambda: nn.Conv2d(4, 6, (3, 2), padding=(1, 0), groups=2), IMAGE),
    "conv2d same": (lambda: nn.Conv2d(4, 2, (2, 4), padding="same"), IMAGE),
    "conv2d reflect": (lambda: nn.Conv2d(4, 2, 3, padding=(1, 2), padding_mode="reflect"), IMAGE),
    "conv2d circular": (lambda: nn.Conv2d(4, 2, 3, padding=1, padding_mode="circular"), IMAGE),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), (2, 3, 4, 3)),
    "conv transpose": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2), IMAGE),
    "batch norm 1d": (lambda: nn.BatchNorm1d(5), (5,)),
    "batch norm 1d with length": (lambda: nn.BatchNorm1d(4), (4, 7)),
    "batch norm 2d": (lambda: nn.BatchNorm2d(4), IMAGE),
    "batch norm without gain": (lambda: nn.BatchNorm2d(4, affine=False), IMAGE),
    "average": (lambda: nn.AvgPool2d(2), IMAGE),
    "average padded": (lambda: nn.AvgPool2d(3, stride=2, padding=1), IMAGE),
    "average not counting pads": (lambda: nn.AvgPool2d(3, 2, 1, count_include_pad=False), IMAGE),
    "average rounded up": (lambda: nn.AvgPool2d(2, ceil_mode=True), IMAGE),
    "average divisor": (lambda: nn.AvgPool2d(2, divisor_override=3), IMAGE),
    "average 1d": (lambda: nn.AvgPool1d(3, 2), (2, 9)),
    "adaptive even": (lambda: nn.AdaptiveAvgPool2d((3, 5)), IMAGE),
    "adaptive uneven": (lambda: nn.AdaptiveAvgPool2d((4, None)), IMAGE),
    "adaptive 1d": (lambda: nn.AdaptiveAvgPool1d(2), (2, 5)),
    "max": (lambda: nn.MaxPool2d(3, 2, 1), IMAGE),
    "max rounded up": (lambda: nn.MaxPool2d(2, ceil_mode=True), IMAGE),
    "max dilated 1d": (lambda: nn.MaxPool1d(2, 1, dilation=2), (2, 9)),
    "flatten": (lambda: nn.Flatten(), IMAGE),
    "flatten inside": (lambda: nn.Flatten(2), IMAGE),
    "unflatten": (lambda: nn.Unflatten(1, (2, 2)), IMAGE),
    "zero pad": (lambda: nn.ZeroPad2d((1, 0, 2, -1)), IMAGE),
    "constant pad": (lambda: nn.ConstantPad2d((1, 2, 0, 3), 0.7), IMAGE),
    "replicate pad": (lambda: nn.ReplicationPad2d((2, 1, 0, 1)), IMAGE),
    "circular pad": (lambda: nn.CircularPad2d((2, 1, 0, 1)), IMAGE),
    "upsample": (lambda: nn.Upsample(scale_factor=1.7), IMAGE),
    "pixel shuffle": (lambda: nn.PixelShuffle(2), IMAGE),
    "dropout": (lambda: nn.Dropout(), IMAGE),
    "softplus": (lambda: nn.Softplus(beta=3), IMAGE),
}


def randomised(module: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            part.running_mean.normal_()
            part.running_var.uniform_(0.5, 2)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module.eval()


def compare(module: nn.Module, shape: tuple[int, ...]) -> Any:
    """Lower the traced module and hold it to the module on a batch of three, both in float64."""
    network = lower(fx.symbolic_trace(module), shape)
    x = torch.randn(3, *shape, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(network(x), module.double()(x), rtol=1e-12, atol=1e-12)
    return network


@pytest.mark.parametrize("name", LAYERS)
def test_layer(name: str) -> None:
    build, shape = LAYERS[name]
    compare(randomised(nn.Sequential(build(), nn.Flatten())), shape)


class Arithmetic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("gain", torch.tensor([2.0, 3.0, 0.3]))
        self.left, self.right = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.left(x), self.right(x)
        y = (a - 0.5) / self.gain + 1 - b * self.gain * 2
        y = torch.cat([y + a, -(4 - b)], dim=-1)
        return y[:, 1:] + (x + x)[:, :1]


def test_arithmetic_with_constants_and_joins() -> None:
    compare(randomised(Arithmetic()), (3,))


def test_irregular_pooling_is_refused_where_its_matrix_is_too_large() -> None:
    module = nn.Sequential(nn.AdaptiveAvgPool2d(257), nn.Flatten()).eval()
    with pytest.raises(ModelError, match=r"layer '0' \(AdaptiveAvgPool2d\).*too large a matrix"):
        lower(fx.symbolic_trace(module), (1, 512 + 1, 512))


def traced(function: Callable[[Tensor], Tensor]) -> fx.GraphModule:
    class Wrapped(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return function(x)

    return fx.symbolic_trace(Wrapped())


class Doubled(nn.Linear):
    """A subclass that computes something else must not inherit its parent's rule."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * x)


def leaf(layer: nn.Module) -> fx.GraphModule:
    """A graph of one layer, called as it is."""
    root = nn.Module()
    root.layer = layer
    graph = fx.Graph()
    graph.output(graph.call_module("layer", (graph.placeholder("x"),)))
    return fx.GraphModule(root, graph)


def hooked() -> nn.Module:
    layer = nn.Linear(3, 3).eval()
    layer.register_forward_hook(lambda module, args, output: output * output)
    return layer


def replaced() -> nn.Module:
    layer = nn.Linear(3, 3).eval()
    layer.forward = lambda x: x * x  # type: ignore[method-assign]
    return layer


REFUSED: dict[str, tuple[Callable[[], fx.GraphModule], tuple[int, ...], str]] = {
    "subclass": (lambda: leaf(Doubled(3, 3).eval()), (3,), r"'layer' \(Doubled\): this operator is not supported"),
    "hook": (lambda: leaf(hooked()), (3,), r"'layer' \(Linear\): it carries a hook"),
    "replaced forward": (lambda: leaf(replaced()), (3,), r"replaced forward"),
    "batch norm in training": (lambda: leaf(nn.BatchNorm1d(3)), (3,), r"training mode"),
    "dropout in training": (lambda: leaf(nn.Dropout()), (3,), r"training mode"),
    "no statistics": (lambda: leaf(nn.BatchNorm1d(3, track_running_stats=False).eval()), (3,), r"running statistics"),
    "layer norm": (lambda: leaf(nn.LayerNorm(3)), (3,), r"\(LayerNorm\): this operator is not supported"),
    "bilinear": (lambda: leaf(nn.Upsample(scale_factor=2, mode="bilinear")), IMAGE, r"bilinear"),
    "misfit": (lambda: leaf(nn.Linear(4, 3)), (3,), r"'layer' \(Linear\): a dense layer of 4 inputs"),
    "product": (lambda: traced(lambda x: x * x), (3,), r"product of two values"),
    "quotient": (lambda: traced(lambda x: 1 / x), (3,), r"division by a value"),
    "zero": (lambda: traced(lambda x: x / 0.0), (3,), r"divides by zero"),
    "attention": (lambda: traced(lambda x: x @ x), (3, 3), r"product of two values"),
    "batch cat": (lambda: traced(lambda x: torch.cat([x, x])), (3,), r"the batch"),
    "batch flatten": (lambda: traced(torch.flatten), (3,), r"batch axis"),
    "batch swap": (lambda: traced(lambda x: x[[1, 0]]), (3,), r"mixes the samples"),
    "batch constant": (lambda: traced(lambda x: x + torch.ones(2, 3)), (3,), r"along the batch"),
    "function": (lambda: traced(torch.sort), (3,), r"\(sort\): this operator is not supported"),
    "clamp": (lambda: traced(lambda x: torch.clamp(x, -50, 50)), (3,), r"\(clamp\): this operator is not supported"),
    "method": (lambda: traced(lambda x: x.relu()), (3,), r"'relu' \(relu\)"),
    "one logit": (lambda: leaf(nn.Linear(3, 1)), (3,), r"export two logits"),
    "map of logits": (lambda: leaf(nn.Linear(3, 2)), (4, 3), r"vector of at least two logits"),
    "low threshold": (lambda: leaf(nn.Softplus(threshold=5)), (3,), r"threshold"),
    "constant": (lambda: traced(lambda x: torch.ones(3)), (3,), r"exactly one output"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name: str) -> None:
    build, shape, words = REFUSED[name]
    with pytest.raises(ModelError, match=words):
        lower(build(), shape)


def test_two_inputs_are_refused() -> None:
    graph = fx.Graph()
    x, _ = graph.placeholder("x"), graph.placeholder("z")
    graph.output(x)
    with pytest.raises(ModelError, match="more than one input"):
        lower(fx.GraphModule(nn.Module(), graph), (3,))


def test_a_parameter_that_the_graph_does_not_reach_is_refused() -> None:
    module = leaf(nn.Linear(3, 3))
    module.register_parameter("forgotten", nn.Parameter(torch.ones(2)))
    with pytest.raises(ModelError, match="forgotten"):
        lower(module, (3,))


def test_a_second_rule_for_one_layer_is_refused() -> None:
    before = dict(MODULES)
    with pytest.raises(ValueError, match="entered twice"):
        lowers(nn.Linear)(lambda *_: None)
    assert before == MODULES


def test_lowering_leaves_the_module_alone() -> None:
    module = fx.symbolic_trace(nn.Sequential(nn.Linear(3, 2)))
    lower(module, (3,))
    assert next(module.parameters()).dtype == torch.float32


POOLS = [
    MaxPool((2, 2), (2, 2), (0, 0), (1, 1)),
    MaxPool((3, 3), (2, 2), (1, 1), (1, 1)),
    MaxPool((3, 2), (1, 1), (0, 0), (1, 1)),
    MaxPool((3, 3), (1, 2), (1, 0), (2, 1)),
    MaxPool((3, 2), (2, 2), (1, 0), (1, 1), ceil_mode=True),
    MaxPool((2, 2), (3, 3), (0, 0), (1, 1)),
]


@pytest.mark.parametrize("pool", POOLS, ids=str)
def test_max_pool_constant_is_the_largest_count_and_is_reached(pool: MaxPool) -> None:
    """A bump on one pixel moves every window that holds it: the count of moved outputs, pixel by pixel."""
    shape = (2, 7, 6)
    counts = []
    for row, column in itertools.product(range(7), range(6)):
        x = torch.zeros(1, *shape, dtype=torch.float64)
        x[0, 0, row, column] = 1.0
        counts.append(int((pool.apply(x) != pool.apply(torch.zeros_like(x))).sum()))
    assert pool.output_shape(shape) == tuple(pool.apply(torch.zeros(1, *shape)).shape[1:])
    bound = pool.lipschitz_constant(shape)
    assert max(counts) <= bound**2 <= max(counts) * (1 + 1e-12)


def test_max_pool_pads_with_minus_infinity() -> None:
    pool, x = MaxPool((3,), (1,), (1,), (1,)), -torch.ones(1, 1, 4, dtype=torch.float64)
    assert torch.equal(pool.apply(x), F.max_pool1d(x, 3, 1, 1))
    assert bool((pool.apply(x) == -1).all())


def test_max_pool_of_a_window_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match="does not fit"):
        MaxPool((9,), (1,), (0,), (1,)).output_shape((1, 4))


def test_constants_that_are_rounded_keep_the_rest_of_themselves() -> None:
    """A batch norm's gain over its root, 1/9 of an average, and a division: each with its tail, to 450 bits."""
    norm = nn.BatchNorm2d(4)
    for tensor in (norm.weight.data, norm.bias.data, norm.running_mean, norm.running_var):
        assert tensor is not None
        tensor.copy_(0.1 + torch.rand(4))
    module = nn.Sequential(norm, nn.AvgPool2d(3), Divided(), nn.Flatten(), nn.Linear(8, 3)).double().eval()
    traced = fx.Tracer().trace(module)
    network = lower(fx.GraphModule(module, traced), IMAGE)
    found = [node.op for node in network.nodes if getattr(node.op, "weight_error", 0)]
    assert [op.title for op in found] == ["batch_norm", "average_pool", "scale"]
    with mpmath.workprec(1000):
        variances = [mpmath.mpf(v) + mpmath.mpf(norm.eps) for v in norm.running_var.tolist()]
        gains = [g / mpmath.sqrt(v) for g, v in zip(norm.weight.tolist(), variances, strict=True)]
        for op, constants in zip(found, (gains, [mpmath.mpf(1) / 9], [mpmath.mpf(1) / 7]), strict=True):
            parts = torch.cat(
                [op.weight.flatten(0, -1)[None, : len(constants)], op.weight_tail.reshape(len(op.weight_tail), -1)]
            )
            for column, constant in zip(parts.T.tolist(), constants, strict=True):
                assert abs(mpmath.fsum(column) - constant) < abs(constant) * mpmath.mpf(2) ** -450


class Divided(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / 7
