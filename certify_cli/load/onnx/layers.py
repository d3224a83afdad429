"""Lowering rules for the layers that ONNX conversion makes; see `network.lowering.torch_layers` for torch's own.

Import only through `loader`, which defers the import of torchvision first.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from onnx2torch.node_converters.binary_math_operations import OnnxBinaryMathOperation
from onnx2torch.node_converters.concat import OnnxConcat
from onnx2torch.node_converters.gemm import OnnxGemm
from onnx2torch.node_converters.matmul import OnnxMatMul
from onnx2torch.node_converters.neg import OnnxNeg
from onnx2torch.node_converters.reduce import OnnxReduceStaticAxes, OnnxReduceSumStaticAxes
from onnx2torch.node_converters.reshape import OnnxReshape
from onnx2torch.node_converters.sum import OnnxSum

from certify_cli.load.onnx.converters import ActivationLayer, AveragePoolLayer, MaxMinLayer, MaxPoolLayer, SelectLayer
from certify_cli.network.lowering import torch_layers as layers
from certify_cli.network.lowering.context import Data, LoweringContext, lowers
from certify_cli.network.movement import Select
from certify_cli.network.pooling import MaxMin

_ARITHMETIC = {torch.add: layers.add, torch.sub: layers.subtract, torch.mul: layers.multiply}
"""The remaining function of OnnxBinaryMathOperation is division."""


@lowers(OnnxBinaryMathOperation)
def _binary(context: LoweringContext, layer: OnnxBinaryMathOperation, first: Any, second: Any) -> Data:
    if layer.broadcast is not None or layer.axis is not None:
        context.refuse("it broadcasts by an attribute, as before opset 7; export with a newer opset")
    return _ARITHMETIC.get(layer.math_op_function, layers.divide)(context, first, second)


@lowers(OnnxSum)
def _sum(context: LoweringContext, layer: OnnxSum, *values: Any) -> Data:
    return layers.add(context, *values)


@lowers(OnnxNeg)
def _neg(context: LoweringContext, layer: OnnxNeg, x: Any) -> Data:
    return layers.negative(context, context.data(x))


@lowers(OnnxMatMul)
def _matmul(context: LoweringContext, layer: OnnxMatMul, left: Any, right: Any) -> Data:
    return layers.matmul(context, left, right)


@lowers(OnnxGemm)
def _gemm(context: LoweringContext, layer: OnnxGemm, a: Any, b: Any, c: Any = None) -> Data:
    """x W; with a constant bias the converter makes a Linear layer instead."""
    if layer.alpha != 1 or layer.beta != 1 or layer.trans_a or c is not None:
        context.refuse("it is not of the form x W + b; export a Linear layer")
    return layers.matmul(context, a, b.T if layer.trans_b and not isinstance(b, Data) else b)


@lowers(OnnxConcat)
def _concat(context: LoweringContext, layer: OnnxConcat, *values: Any) -> Data:
    return layers.concatenate(context, values, layer.axis)


@lowers(OnnxReshape)
def _reshape(context: LoweringContext, layer: OnnxReshape, x: Any, shape: Any) -> Data:
    return layers.move_by_layer(context, layer, x, shape)


@lowers(OnnxReduceStaticAxes)
def _reduce(context: LoweringContext, layer: OnnxReduceStaticAxes, x: Any) -> Data:
    if layer.operation_type != "ReduceMean":
        context.refuse("this reduction is not affine; use a mean or a sum")
    return layers.along(context, context.data(x), layer.axes, layer.keepdims, mean=True)


@lowers(OnnxReduceSumStaticAxes)
def _reduce_sum(context: LoweringContext, layer: OnnxReduceSumStaticAxes, x: Any) -> Data:
    return layers.along(context, context.data(x), layer._axes, bool(layer._keepdims), mean=False)


@lowers(ActivationLayer)
def _activation(context: LoweringContext, layer: ActivationLayer, x: Any) -> Data:
    return context.add(layer.activation, context.data(x))


@lowers(MaxMinLayer)
def _max_min(context: LoweringContext, layer: MaxMinLayer, x: Any) -> Data:
    return context.add(MaxMin(), context.data(x))


@lowers(MaxPoolLayer)
def _max_pool(context: LoweringContext, layer: MaxPoolLayer, x: Any) -> Data:
    return context.add(layer.pool, context.data(x))


@lowers(AveragePoolLayer)
def _average_pool(context: LoweringContext, layer: AveragePoolLayer, x: Any) -> Data:
    """A convolution of the padded image where all divisors are equal, else a matrix of the pixels."""
    value, at = context.data(x), layer.at
    divisors = layer.divisors(context.shape(value)[1:])
    if bool((divisors != divisors.flatten()[0]).any()):
        return layers.spatial_matrix(context, layer, value)
    padding = tuple(begin for begin, _ in layer.pads)
    if any(begin != end for begin, end in layer.pads):
        value, padding = context.move(layer.padded, value), (0,) * len(padding)
    divisor = int(divisors.flatten()[0])
    return layers.depthwise_mean(context, value, at.kernel, at.stride, padding, divisor, at.dilation)


@lowers(SelectLayer)
def _select(context: LoweringContext, layer: SelectLayer, x: Any) -> Data:
    value = context.data(x)
    return context.add(Select(layer.index, math.prod(context.shape(value)), title=context.kind.lower()), value)
