"""Converters that onnx2torch lacks: our own operators, registered once, on import.

Import only through `onnx.py`, which makes torchvision importable first.
"""

from __future__ import annotations

import json
from dataclasses import replace

from onnx2torch.node_converters.registry import add_converter
from onnx2torch.onnx_graph import OnnxGraph
from onnx2torch.onnx_node import OnnxNode
from onnx2torch.utils.common import OnnxMapping, OperationConverterResult
from torch import Tensor, nn

from certify_cli.load.normal import DOMAIN
from certify_cli.network.activations import ACTIVATIONS, Activation
from certify_cli.network.pooling import MaxMin


class ActivationLayer(nn.Module):
    """A row of the activation table."""

    def __init__(self, activation: Activation) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.activation.apply(x)


class MaxMinLayer(nn.Module):
    """The halves of the channels as sorted pairs, the larger ones first."""

    def forward(self, x: Tensor) -> Tensor:
        return MaxMin().apply(x)


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


@add_converter(operation_type="Select", version=1, domain=DOMAIN)
def _select(node: OnnxNode, graph: OnnxGraph) -> OperationConverterResult:
    source, index = node.input_values
    layer = SelectLayer(graph.initializers[index].to_torch())
    return OperationConverterResult(layer, OnnxMapping((source,), node.output_values))
