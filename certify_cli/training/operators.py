"""Lowering rules for the operators of an exported torch program: the network that any module's own code computes.

`torch.export` writes a module as calls of ATen operators, whatever functions and methods its code uses. Each operator
below is the layer or function that has a rule already, or data movement; an operator without a rule is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from certify_cli.network.activations import from_name
from certify_cli.network.activations.rows import ACTIVATIONS
from certify_cli.network.affine import Dense
from certify_cli.network.lowering.context import FUNCTIONS, MODULES, Data, LoweringContext, lowers
from certify_cli.network.lowering.torch_layers import (
    add,
    along,
    concatenate,
    divide,
    matmul,
    multiply,
    negative,
    normalise,
    pad_with,
    subtract,
)

aten: Any = torch.ops.aten


@lowers(aten.linear.default)
def _linear(context: LoweringContext, x: Any, weight: Tensor, bias: Tensor | None = None) -> Data:
    return context.add(Dense(weight, bias), context.data(x))


@lowers(aten.addmm.default)
def _addmm(context: LoweringContext, bias: Any, left: Any, right: Any) -> Data:
    return add(context, matmul(context, left, right), bias)


def _enter_convolution(axes: int, transposed: bool) -> None:
    """conv1d to conv_transpose3d, as the layer of their names."""
    kind: Any = getattr(nn, f"Conv{'Transpose' if transposed else ''}{axes}d")
    name = f"conv{'_transpose' if transposed else ''}{axes}d"
    packet: Any = getattr(aten, name)

    def rule(context: LoweringContext, x: Any, weight: Tensor, bias: Tensor | None = None, *options: Any) -> Data:
        names = [
            "stride",
            "padding",
            *(["output_padding", "groups", "dilation"] if transposed else ["dilation", "groups"]),
        ]
        given = dict(zip(names, options, strict=False))
        groups = given.get("groups", 1)
        sizes = {key: value if isinstance(value, str | int) else _each(value, axes) for key, value in given.items()}
        channels = (weight.shape[0], weight.shape[1] * groups)
        inputs, outputs = channels if transposed else channels[::-1]
        layer = kind(inputs, outputs, tuple(weight.shape[2:]), bias=bias is not None, device="meta", **sizes)
        layer._parameters.update(weight=weight, bias=bias)
        result: Data = MODULES[kind](context, layer, x)
        return result

    lowers(*(getattr(packet, overload) for overload in packet.overloads() if "out" not in overload))(rule)


def _each(values: Sequence[int], axes: int) -> tuple[int, ...]:
    """One number an axis; a single one stands for all."""
    return tuple(values) * axes if len(values) == 1 else tuple(values)


for _axes in (1, 2, 3):
    _enter_convolution(_axes, transposed=False)
    _enter_convolution(_axes, transposed=True)


@lowers(aten.batch_norm.default)
def _batch_norm(
    context: LoweringContext,
    x: Any,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    *unused: Any,
) -> Data:
    if mean is None or variance is None or training:
        context.refuse("it keeps no running statistics and mixes the samples of a batch")
    return normalise(context, context.data(x), mean, variance, weight, bias, eps)


@lowers(
    aten.dropout.default,
    aten.feature_dropout.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.detach.default,
    aten.alias.default,
)
def _same(context: LoweringContext, x: Any, *unused: Any, **also: Any) -> Data:  # fmt: skip
    """Dropout does nothing in evaluation mode."""
    return context.data(x)


# --- arithmetic -------------------------------------------------------------------------------------------------


def _scaled(context: LoweringContext, right: Any, alpha: float) -> Any:
    return right if alpha == 1 else multiply(context, right, alpha) if isinstance(right, Data) else alpha * right


@lowers(aten.add.Tensor, aten.add.Scalar, aten.add_.Tensor)
def _add(context: LoweringContext, left: Any, right: Any, *, alpha: float = 1) -> Data:
    return add(context, left, _scaled(context, right, alpha))


@lowers(aten.sub.Tensor, aten.sub.Scalar, aten.sub_.Tensor)
def _sub(context: LoweringContext, left: Any, right: Any, *, alpha: float = 1) -> Data:
    return subtract(context, left, _scaled(context, right, alpha))


@lowers(aten.rsub.Scalar, aten.rsub.Tensor)
def _rsub(context: LoweringContext, left: Any, right: Any) -> Data:
    return subtract(context, right, left)


@lowers(aten.neg.default)
def _neg(context: LoweringContext, x: Any) -> Data:
    return negative(context, context.data(x))


@lowers(aten.cat.default)
def _cat(context: LoweringContext, values: Any, dim: int = 0) -> Data:
    return concatenate(context, values, dim)


@lowers(aten.mean.dim)
def _mean(context: LoweringContext, x: Any, axes: Sequence[int], keep: bool = False) -> Data:
    return along(context, context.data(x), axes, keep, mean=True)


@lowers(aten.sum.dim_IntList)
def _sum(context: LoweringContext, x: Any, axes: Sequence[int], keep: bool = False) -> Data:
    return along(context, context.data(x), axes, keep, mean=False)


FUNCTIONS.update(
    {
        aten.mul.Tensor: multiply,
        aten.mul.Scalar: multiply,
        aten.mul_.Tensor: multiply,
        aten.div.Tensor: divide,
        aten.div.Scalar: divide,
        aten.matmul.default: matmul,
        aten.mm.default: matmul,
    }
)


# --- data movement ----------------------------------------------------------------------------------------------


def _movement(operator: Any) -> Callable[..., Data]:
    """The rule of an operator that only moves entries."""

    def rule(context: LoweringContext, x: Any, *args: Any, **kwargs: Any) -> Data:
        return context.move(lambda t: operator(t, *args, **kwargs), context.data(x))

    return rule


for _name in (
    "view.default", "reshape.default", "_unsafe_view.default", "flatten.using_ints", "unflatten.int", "permute.default",
    "transpose.int", "t.default", "squeeze.default", "squeeze.dim", "squeeze.dims", "unsqueeze.default",
    "slice.Tensor", "select.int", "expand.default", "pixel_shuffle.default", "pixel_unshuffle.default",
    "channel_shuffle.default", "flip.default", "roll.default", "narrow.default", "index_select.default",
    "upsample_nearest2d.vec",
):  # fmt: skip
    _packet, _overload = _name.split(".")
    _operator = getattr(getattr(aten, _packet), _overload)
    lowers(_operator)(_movement(_operator))


@lowers(aten.pad.default, aten.constant_pad_nd.default)
def _pad(
    context: LoweringContext, x: Any, pads: Sequence[int], mode: Any = "constant", value: float | None = None
) -> Data:
    if not isinstance(mode, str):  # of constant_pad_nd, whose third argument is the value
        mode, value = "constant", mode
    if mode == "constant":
        return pad_with(context, context.data(x), tuple(pads), float(value or 0.0))
    return context.move(lambda t: torch.nn.functional.pad(t, list(pads), mode), context.data(x))


# --- pooling ----------------------------------------------------------------------------------------------------


def _enter_pooling(axes: int) -> None:
    largest, average, adaptive = (getattr(nn, f"{kind}{axes}d") for kind in ("MaxPool", "AvgPool", "AdaptiveAvgPool"))

    def max_pool(
        context: LoweringContext,
        x: Any,
        kernel: Any,
        stride: Any = (),
        padding: Any = (0,),
        dilation: Any = (1,),
        ceil: bool = False,
    ) -> Data:
        sizes = (_each(kernel, axes), _each(stride or kernel, axes), _each(padding, axes), _each(dilation, axes))
        result: Data = MODULES[largest](context, largest(*sizes, ceil_mode=ceil), x)
        return result

    def average_pool(
        context: LoweringContext,
        x: Any,
        kernel: Any,
        stride: Any = (),
        padding: Any = (0,),
        ceil: bool = False,
        counted: bool = True,
        divisor: int | None = None,
    ) -> Data:
        layer = average(_each(kernel, axes), _each(stride or kernel, axes), _each(padding, axes), ceil, counted)
        if divisor is not None:
            layer.divisor_override = divisor
        result: Data = MODULES[average](context, layer, x)
        return result

    def adaptive_pool(context: LoweringContext, x: Any, size: Any) -> Data:
        result: Data = MODULES[adaptive](context, adaptive(_each(size, axes)), x)
        return result

    lowers(getattr(aten, f"max_pool{axes}d").default)(max_pool)
    lowers(getattr(aten, f"avg_pool{axes}d").default)(average_pool)
    lowers(getattr(aten, f"adaptive_avg_pool{axes}d").default)(adaptive_pool)


for _axes in (1, 2, 3):
    _enter_pooling(_axes)


# --- activations ------------------------------------------------------------------------------------------------


def _enter_activation(operator: Any, name: str, *parameters: str) -> None:
    """An operator whose arguments after the first are parameters of the row `name`."""

    def rule(context: LoweringContext, x: Any, *values: Any) -> Data:
        given = {key: value for key, value in zip(parameters, values, strict=False) if value is not None}
        return context.add(ACTIVATIONS[name](**given), context.data(x))

    lowers(operator)(rule)


for _name, _row, *_parameters in (
    ("tanh", "tanh"),
    ("sigmoid", "sigmoid"),
    ("softplus", "softplus", "beta", "threshold"),
    ("log_sigmoid", "log_sigmoid"),
    ("silu", "silu"),
    ("mish", "mish"),
    ("atan", "atan"),
    ("erf", "erf"),
    ("sin", "sin"),
    ("relu", "relu"),
    ("leaky_relu", "leaky_relu", "negative_slope"),
    ("selu", "selu"),
    ("hardsigmoid", "hard_sigmoid"),
    ("hardswish", "hard_swish"),
    ("celu", "celu", "alpha"),
    ("clamp", "clip", "low", "high"),
):
    _enter_activation(getattr(aten, _name).default, _row, *_parameters)
    if hasattr(aten, f"{_name}_"):
        _enter_activation(getattr(aten, f"{_name}_").default, _row, *_parameters)


@lowers(aten.gelu.default)
def _gelu(context: LoweringContext, x: Any, *, approximate: str = "none") -> Data:
    return context.add(from_name("gelu_tanh" if approximate == "tanh" else "gelu"), context.data(x))


@lowers(aten.elu.default, aten.elu_.default)
def _elu(context: LoweringContext, x: Any, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> Data:
    if scale != 1 or input_scale != 1:
        context.refuse("its scales must be 1; use selu or celu")
    return context.add(ACTIVATIONS["elu"](alpha), context.data(x))


@lowers(aten.hardtanh.default, aten.hardtanh_.default)
def _hardtanh(context: LoweringContext, x: Any, low: float = -1.0, high: float = 1.0) -> Data:
    return context.add(ACTIVATIONS["clip"](low, high), context.data(x))


@lowers(aten.relu6.default)
def _relu6(context: LoweringContext, x: Any) -> Data:
    return context.add(ACTIVATIONS["clip"](0.0, 6.0), context.data(x))
