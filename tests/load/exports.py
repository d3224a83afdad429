"""Networks in every shape that must load, and the exports of torch that write them down."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEGACY = (11, 13, 17)
DEFAULT = (18, 20, 23)
EXPORTERS = [*(("legacy", opset) for opset in LEGACY), *(("default", opset) for opset in DEFAULT)]


@dataclass(frozen=True)
class Case:
    """A module and the shape of one sample; `softmax` says that its output is one (the loaded network's is not)."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    softmax: bool = False


def mlp(activation: Callable[[], nn.Module]) -> Case:
    return Case(
        lambda: nn.Sequential(nn.Linear(6, 5), activation(), nn.Linear(5, 5), activation(), nn.Linear(5, 3)), (6,)
    )


class Convolutional(nn.Module):
    """Normalisation inside, batch norm before and after the activation, average pooling, dropout, softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.4, 0.5]).reshape(1, 2, 1, 1))
        self.register_buffer("std", torch.tensor([0.3, 0.2]).reshape(1, 2, 1, 1))
        self.body = nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Tanh(), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(4),
            nn.Conv2d(4, 3, 3, padding=1, bias=False), nn.AvgPool2d(3, 2, 1), nn.Softplus(beta=2),
            nn.Dropout(), nn.Flatten(), nn.Linear(12, 8), nn.BatchNorm1d(8), nn.SiLU(), nn.Dropout(), nn.Linear(8, 4),
            nn.Softmax(dim=1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.body((x - self.mean) / self.std)


class Residual(nn.Module):
    """Residual and concatenating branches, every padding, mean over space, adaptive and max pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=1, padding_mode="reflect")
        self.second = nn.Conv2d(4, 4, (3, 2), padding="same", groups=2)
        self.norm = nn.BatchNorm2d(4)
        self.third = nn.Conv2d(8, 4, 2)
        self.activation = nn.GELU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.activation(self.first(x))
        y = y + self.norm(self.second(y))
        y = torch.cat([y, F.pad(y[:, :, 1:-1, 1:-1], (1, 1, 1, 1), mode="replicate")], dim=1)
        y = self.activation(self.third(F.pad(y, (1, 0, 0, 1), value=0.25)))
        y = torch.cat([self.pool(y).flatten(1), y.mean(dim=(2, 3))], dim=1)
        return F.log_softmax(self.head(y), dim=1)


class MaxPooled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 3, 3), nn.Linear(27, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.max_pool2d(F.relu(self.conv(x)), 3, stride=2, padding=1).flatten(1))


class MaxMin(nn.Module):
    """The halves of the channels as sorted pairs, larger ones first."""

    def forward(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=1)
        return torch.cat([torch.maximum(first, second), torch.minimum(first, second)], dim=1)


class ClampedMaxMin(MaxMin):
    """Sorted pairs, the larger ones at most `high`, the smaller ones at least `low`."""

    def __init__(self, low: float, high: float) -> None:
        super().__init__()
        self.low, self.high = low, high

    def forward(self, x: Tensor) -> Tensor:
        larger, smaller = super().forward(x).chunk(2, dim=1)
        return torch.cat([larger.clamp(max=self.high), smaller.clamp(min=self.low)], dim=1)


class GroupSort(nn.Module):
    """Neighbouring channels, two by two, in ascending order."""

    def forward(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (-1, 2)).sort(dim=2).values.flatten(1, 2)


class Sorted(nn.Module):
    """MaxMin of channels and of features, and a maximum of two values alone."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.hidden, self.head = nn.Conv2d(1, 4, 3), nn.Linear(144, 8), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = MaxMin()(self.hidden(MaxMin()(self.conv(x)).flatten(1)))
        return self.head(torch.cat([torch.maximum(y[:, :4], y[:, 4:]), y[:, 2:4]], dim=1))


class ChannelsLast(nn.Module):
    """An NHWC input, a shape read from the data, an upsampling and a split."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.conv(x.permute(0, 3, 1, 2)))
        left, right = y.chunk(2, dim=1)
        y = F.interpolate(left - 0.5 * right, scale_factor=2.0, mode="nearest")[:, :, ::2, 1::2]
        return self.head(torch.cat([y, left], dim=1).reshape(x.shape[0], -1))


class Column(nn.Module):
    """The input [N, 784, 1] of some published files."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(784, 6), nn.Sigmoid(), nn.Linear(6, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "softplus": nn.Softplus,
    "softplus_beta": lambda: nn.Softplus(beta=0.3),
    "softplus_threshold": lambda: nn.Softplus(beta=7, threshold=30),
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "silu": nn.SiLU,
    "mish": nn.Mish,
    "elu": lambda: nn.ELU(alpha=0.7),
    "softsign": nn.Softsign,
    "relu": nn.ReLU,
    "leaky_relu": lambda: nn.LeakyReLU(0.1),
    "log_sigmoid": nn.LogSigmoid,
    "hard_swish": nn.Hardswish,
    "relu6": nn.ReLU6,
    "prelu": nn.PReLU,
}

NETWORKS: dict[str, Case] = {
    "convolutional": Case(Convolutional, (2, 8, 8), softmax=True),
    "residual": Case(Residual, (1, 8, 8), softmax=True),
    "max_pooled": Case(MaxPooled, (1, 8, 8)),
    "sorted": Case(Sorted, (1, 8, 8)),
    "channels_last": Case(ChannelsLast, (4, 4, 3)),
    "column": Case(Column, (784, 1)),
}


@dataclass(frozen=True)
class Export:
    """How a file is written."""

    exporter: str
    opset: int
    free_batch: bool = True
    external: bool = False
    unfolded: bool = False
    """Leave BatchNormalization and Dropout nodes in, and constants unfolded (the legacy exporter's options)."""
    options: dict[str, Any] = field(default_factory=dict)


def build(case: Case) -> nn.Module:
    """The module in evaluation mode, every statistic and weight away from its default."""
    torch.manual_seed(0)
    module = case.build()
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            part.running_mean.normal_(std=0.3)
            part.running_var.uniform_(0.5, 2.0)
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.normal_(part.bias, std=0.3)
    return module.eval()


def write(module: nn.Module, shape: tuple[int, ...], path: Path, export: Export) -> None:
    x = torch.rand(2 if export.free_batch and export.exporter == "default" else 1, *shape)
    options: dict[str, Any] = {"input_names": ["x"], "output_names": ["y"], "opset_version": export.opset}
    if export.exporter == "legacy":
        if export.free_batch:
            options["dynamic_axes"] = {"x": {0: "N"}, "y": {0: "N"}}
        if export.unfolded:
            options |= {"training": torch.onnx.TrainingMode.PRESERVE, "do_constant_folding": False}
    else:
        if export.free_batch:
            options["dynamic_shapes"] = ({0: torch.export.Dim("N")},)
        options |= {"external_data": export.external, "verbose": False, "optimize": not export.unfolded}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(module, (x,), path, dynamo=export.exporter == "default", **options, **export.options)
