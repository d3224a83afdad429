"""onnx2torch converters of the operators of `rewriting.DOMAIN`, registered on import.

Import only through `loader`, which defers the import of torchvision first.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import torch.nn.functional as F
from onnx2torch.node_converters.registry import add_converter
from onnx2torch.onnx_graph import OnnxGraph
from onnx2torch.onnx_node import OnnxNode
from onnx2torch.utils.common import OnnxMapping, OperationConverterResult
from torch import Tensor, from_numpy, nn

from certify_cli.load.onnx.operators import Windows, pixel_counts
from certify_cli.load.onnx.rewriting import DOMAIN
from certify_cli.network.activations import ACTIVATIONS, Activation
from certify_cli.network.pooling import MaxMin, MaxPool


class ActivationLayer(nn.Module):
    """An activation of the table."""

    def __init__(self, activation: Activation) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.activation.apply(x)


class MaxMinLayer(nn.Module):
    """`MaxMin`: pairs of the channels' halves sorted, maxima first."""

    def forward(self, x: Tensor) -> Tensor:
        return MaxMin().apply(x)


class MaxPoolLayer(nn.Module):
    """The maximum of every window."""

    def __init__(self, pool: MaxPool) -> None:
        super().__init__()
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        return self.pool.apply(x)


class AveragePoolLayer(nn.Module):
    """The mean of every window over its pixels in the image, or in the image and its padding.

    pads: (begin, end) along every axis, how far the windows reach beyond the image; negative where they omit pixels.
    counts_padding: whether padding counts as pixels of the window.
    """

    def __init__(self, at: Windows, pads: list[tuple[int, int]], counts_padding: bool) -> None:
        super().__init__()
        self.at, self.pads, self.counts_padding = at, pads, counts_padding

    def divisors(self, sizes: tuple[int, ...]) -> Tensor:
        """The divisor of every window, (*count), float64."""
        return from_numpy(pixel_counts(self.at, sizes, self.counts_padding))

    def padded(self, x: Tensor) -> Tensor:
        return F.pad(x, [width for pair in reversed(self.pads) for width in pair])

    def forward(self, x: Tensor) -> Tensor:
        convolve = (F.conv1d, F.conv2d, F.conv3d)[len(self.pads) - 1]
        ones = x.new_ones(x.shape[1], 1, *self.at.kernel)
        total = convolve(self.padded(x), ones, None, self.at.stride, 0, self.at.dilation, x.shape[1])
        return total / self.divisors(tuple(x.shape[2:])).to(x)


class SelectLayer(nn.Module):
    """Data movement: entry j of a sample is entry index[j] of the operand's sample, both row-major; zero for -1."""

    index: Tensor

    def __init__(self, index: Tensor) -> None:
        super().__init__()
        self.register_buffer("index", index)

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, self.index.clamp(min=0)] * (self.index >= 0)


@add_converter(operation_type="Activation", version=1, domain=DOMAIN)
def _activation(node: OnnxNode, graph: OnnxGraph) -> OperationConverterResult:
    row = json.loads(node.attributes["row"])
    activation = replace(ACTIVATIONS[row["name"]](**row["parameters"]), deviation=row["deviation"])
    return OperationConverterResult(ActivationLayer(activation), OnnxMapping(node.input_values, node.output_values))


@add_converter(operation_type="MaxMin", version=1, domain=DOMAIN)
def _max_min(node: OnnxNode, graph: OnnxGraph) -> OperationConverterResult:
    return OperationConverterResult(MaxMinLayer(), OnnxMapping(node.input_values, node.output_values))


def _window(node: OnnxNode) -> tuple[dict[str, Any], list[tuple[int, int]]]:
    """kernel, stride and dilation, and the pads along every axis."""
    names = {"kernel": "kernel_shape", "stride": "strides", "dilation": "dilations"}
    form = {key: tuple(map(int, node.attributes[name])) for key, name in names.items()}
    pads, axes = list(map(int, node.attributes["pads"])), len(form["kernel"])
    return form, list(zip(pads[:axes], pads[axes:], strict=True))


@add_converter(operation_type="MaxPool", version=1, domain=DOMAIN)
def _max_pool(node: OnnxNode, graph: OnnxGraph) -> OperationConverterResult:
    form, pads = _window(node)
    begin, end = zip(*pads, strict=True)
    within = all(2 * width <= k for width, k in zip(begin, form["kernel"], strict=True))  # torch pads no further
    layer = MaxPoolLayer(MaxPool(**form, padding=begin, end=None if begin == end and within else end))
    return OperationConverterResult(layer, OnnxMapping(node.input_values, node.output_values))


@add_converter(operation_type="AveragePool", version=1, domain=DOMAIN)
def _average_pool(node: OnnxNode, graph: OnnxGraph) -> OperationConverterResult:
    form, pads = _window(node)
    padded = tuple(map(int, node.attributes["padded"]))
    begin = tuple(-first for first, _ in pads)
    count = tuple(map(int, node.attributes["count"]))
    at = Windows(**form, begin=begin, count=count, padded=padded)
    layer = AveragePoolLayer(at, pads, bool(node.attributes["count_include_pad"]))
    return OperationConverterResult(layer, OnnxMapping(node.input_values, node.output_values))


@add_converter(operation_type="Select", version=1, domain=DOMAIN)
def _select(node: OnnxNode, graph: OnnxGraph) -> OperationConverterResult:
    source, index = node.input_values
    layer = SelectLayer(graph.initializers[index].to_torch())
    return OperationConverterResult(layer, OnnxMapping((source,), node.output_values))
