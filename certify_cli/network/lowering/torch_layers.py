"""Lowering rules for torch's own layers and functions: one for each that can be written in the primitives.

Activations have their own table (`network.activations`); the rules for layers that ONNX conversion makes are in
`load.onnx.layers`.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from certify_cli.network.affine import Dense, Scale, Shift
from certify_cli.network.convolution import Conv, ConvTranspose
from certify_cli.network.graph import MAX_VALUES, Add, Concat, refuse_large
from certify_cli.network.lowering.context import Data, LoweringContext, lowers
from certify_cli.network.movement import Reshape
from certify_cli.network.pooling import MaxPool
from certify_cli.numerics.quotients import quotient_tail, reciprocal
from certify_cli.numerics.rounding import carries_gradient

SPATIAL_MATRIX_ENTRIES, SPATIAL_MATRIX_PIXELS = MAX_VALUES, 2**16
"""Largest matrix (entries, and input pixels, whose square is the work) that an irregular pooling is written out as."""


# --- affine layers ----------------------------------------------------------------------------------------------


@lowers(nn.Linear)
def _linear(context: LoweringContext, layer: nn.Linear, x: Any) -> Data:
    return context.add(Dense(layer.weight, layer.bias), context.data(x))


@lowers(nn.Conv1d, nn.Conv2d, nn.Conv3d)
def _conv(context: LoweringContext, layer: nn.Conv2d, x: Any) -> Data:
    value = context.data(x)
    pads = list(layer._reversed_padding_repeated_twice)  # last axis first, (low, high): resolves padding="same" too
    padding = tuple(pads[::-2])
    if layer.padding_mode != "zeros" or pads[0::2] != pads[1::2]:
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        refuse_large(padded_shape(context.shape(value), pads), "its padded input")
        value = context.move(lambda t: F.pad(t, pads, mode=mode), value)
        padding = (0,) * len(padding)
    return context.add(Conv(layer.weight, layer.bias, layer.stride, padding, layer.dilation, layer.groups), value)


@lowers(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
def _conv_transpose(context: LoweringContext, layer: nn.ConvTranspose2d, x: Any) -> Data:
    weight, offset = layer.weight, layer.bias
    padding = _tuple(layer.padding, weight.dim() - 2)  # type: ignore[arg-type]
    op = ConvTranspose(weight, offset, layer.stride, padding, layer.output_padding, layer.dilation, layer.groups)
    return context.add(op, context.data(x))


@lowers(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
def _batch_norm(context: LoweringContext, layer: nn.BatchNorm2d, x: Any) -> Data:
    if layer.running_mean is None or layer.running_var is None:
        context.refuse("it keeps no running statistics and mixes the samples of a batch; export one that does")
    value = context.data(x)
    return normalise(context, value, layer.running_mean, layer.running_var, layer.weight, layer.bias, layer.eps)


def normalise(
    context: LoweringContext,
    x: Data,
    mean: Tensor,
    variance: Tensor,
    gain: Tensor | None,
    shift: Tensor | None,
    eps: float,
) -> Data:
    """Evaluation-mode batch norm of (channels, *space) as three nodes: -mean, gain/sqrt(variance + eps), +shift."""
    axes = (-1, *[1] * (len(context.shape(x)) - 1))
    gain = torch.ones_like(variance) if gain is None else gain
    factor = gain / (variance + eps).sqrt()
    if not bool(factor.isfinite().all()):
        context.refuse("its variance plus epsilon is not positive")
    tail = None
    if not carries_gradient(factor):
        tail = quotient_tail(factor, gain, [variance, torch.full_like(variance, eps)], root=True)
    tail = None if tail is None else tail.reshape(-1, *factor.reshape(axes).shape)
    x = context.add(Shift((-mean).reshape(axes)), x)
    # roundings: the sum (halved by the root), the root, the quotient
    x = context.add(Scale(factor.reshape(axes), weight_error=3, title="batch_norm", weight_tail=tail), x)
    return x if shift is None else context.add(Shift(shift.reshape(axes)), x)


@lowers(nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
def _average_pool(context: LoweringContext, layer: nn.AvgPool2d, x: Any) -> Data:
    value = context.data(x)
    shape = context.shape(value)
    n = len(shape) - 1
    kernel, stride, padding = (_tuple(v, n) for v in (layer.kernel_size, layer.stride, layer.padding))
    regular = [(size + 2 * p - k) % s == 0 for size, p, k, s in zip(shape[1:], padding, kernel, stride, strict=True)]
    if (not layer.ceil_mode or all(regular)) and (layer.count_include_pad or not any(padding)):
        taps = getattr(layer, "divisor_override", None) or torch.Size(kernel).numel()
        return depthwise_mean(context, value, kernel, stride, padding, taps)
    return spatial_matrix(context, layer, value)


@lowers(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
def _adaptive_average_pool(context: LoweringContext, layer: nn.AdaptiveAvgPool2d, x: Any) -> Data:
    value = context.data(x)
    space = context.shape(value)[1:]
    size = layer.output_size
    wanted = _tuple(size, len(space)) if isinstance(size, int) else tuple(size or ())
    target = tuple(n if t is None else int(t) for t, n in zip(wanted, space, strict=True))
    refuse_large((context.shape(value)[0], *target))
    if all(n % t == 0 for n, t in zip(space, target, strict=True)):
        kernel = tuple(n // t for n, t in zip(space, target, strict=True))
        return depthwise_mean(context, value, kernel, kernel, (0,) * len(space), torch.Size(kernel).numel())
    return spatial_matrix(context, layer, value)


def depthwise_mean(
    context: LoweringContext,
    x: Data,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    divisor: int,
    dilation: tuple[int, ...] | None = None,
) -> Data:
    """Average pooling with one divisor throughout: a depthwise convolution whose weights are all 1/divisor."""
    channels = context.shape(x)[0]
    refuse_large((channels, *kernel), "its window")
    weight, tail = reciprocal(torch.full((1,) * (len(kernel) + 2), float(divisor), dtype=torch.float64))
    weight = weight.expand(channels, 1, *kernel).contiguous()
    dilation = dilation or (1,) * len(kernel)
    op = Conv(weight, None, stride, padding, dilation, channels, 1, title="average_pool", weight_tail=tail)
    return context.add(op, x)


def spatial_matrix(context: LoweringContext, pool: Callable[[Tensor], Tensor], x: Data) -> Data:
    """A linear map of the pixels, the same in every channel, as a matrix: Reshape, Dense, Reshape.

    Each entry is 1/divisor, or a sum of zeros and one such number, so its relative error is one rounding. There is no
    `weight_tail`: divisors differ from output to output.
    """
    shape = context.shape(x)
    pixels = math.prod(shape[1:])
    outputs = pool(torch.zeros(1, 1, *shape[1:], dtype=torch.float64)).shape[2:]
    if pixels * outputs.numel() > SPATIAL_MATRIX_ENTRIES or pixels > SPATIAL_MATRIX_PIXELS:
        context.refuse(
            f"pooling {shape[1:]} to {tuple(outputs)} with unequal windows needs too large a matrix; "
            "use windows that divide the image"
        )
    step = max(1, MAX_VALUES // pixels)  # the basis has pixels x pixels entries, the matrix may have far fewer
    columns = [pool(_basis(start, min(start + step, pixels), shape[1:])).flatten(1) for start in range(0, pixels, step)]
    matrix = torch.cat(columns).T.contiguous()
    x = context.add(Reshape((shape[0], pixels)), x)
    x = context.add(Dense(matrix, None, weight_error=1, title="average_pool"), x)
    return context.add(Reshape((shape[0], *outputs)), x)


def _basis(start: int, stop: int, space: tuple[int, ...]) -> Tensor:
    """Unit images (stop - start, 1, *space) of the pixels from `start` to `stop`."""
    basis = torch.zeros(stop - start, math.prod(space), dtype=torch.float64)
    basis[torch.arange(stop - start), torch.arange(start, stop)] = 1.0
    return basis.reshape(-1, 1, *space)


def _tuple(value: int | Iterable[int], dimensions: int) -> tuple[int, ...]:
    return (int(value),) * dimensions if isinstance(value, int) else tuple(int(v) for v in value)


# --- data movement ----------------------------------------------------------------------------------------------


@lowers(
    nn.Flatten, nn.Unflatten, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle,
    nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d,
    nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d,
    nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d,
    nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d,
)  # fmt: skip
def move_by_layer(context: LoweringContext, layer: nn.Module, x: Any, *args: Any, **kwargs: Any) -> Data:
    """Data movement by the layer itself."""
    return context.move(lambda t: layer(t, *args, **kwargs), context.data(x))


@lowers(nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d)
def _constant_pad(context: LoweringContext, layer: nn.ConstantPad2d, x: Any) -> Data:
    return pad_with(context, context.data(x), tuple(layer.padding), float(layer.value))


def padded_shape(shape: Sequence[int], pads: Sequence[int]) -> tuple[int, ...]:
    """The shape of a value after F.pad; `pads` has two numbers per axis, the last axis first."""
    widths = [0] * (len(shape) - len(pads) // 2) + [
        low + high for low, high in zip(pads[::2], pads[1::2], strict=True)
    ][::-1]
    return tuple(n + w for n, w in zip(shape, widths, strict=True))


def pad_with(context: LoweringContext, x: Data, pads: tuple[int, ...], value: float) -> Data:
    """Constant padding, `pads` in torch's order: padding with zeros, then a sum with the constant there."""
    shape = context.shape(x)
    refuse_large(padded_shape(shape, pads))
    padded = context.move(lambda t: F.pad(t, pads), x)
    if value == 0:
        return padded
    frame = F.pad(torch.zeros(1, *shape, dtype=torch.float64), pads, value=value)
    return context.add(Shift(frame[0]), padded)


@lowers(nn.Upsample, nn.UpsamplingNearest2d)
def _upsample(context: LoweringContext, layer: nn.Upsample, x: Any) -> Data:
    if layer.mode not in ("nearest", "nearest-exact"):
        context.refuse(f"resizing by {layer.mode!r} is not supported: use mode='nearest'")
    return move_by_layer(context, layer, x)


@lowers(nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
def _same(context: LoweringContext, layer: nn.Module, x: Any, *unused: Any) -> Data:
    return context.data(x)


@lowers(torch.flatten)
def _flatten(context: LoweringContext, x: Any, start_dim: int = 0, end_dim: int = -1) -> Data:
    return context.move(lambda t: torch.flatten(t, start_dim, end_dim), context.data(x))


@lowers(operator.getitem)
def _item(context: LoweringContext, value: Any, index: Any) -> Any:
    return value[index] if isinstance(value, tuple) else context.move(lambda t: t[index], context.data(value))


# --- arithmetic -------------------------------------------------------------------------------------------------


def scale(context: LoweringContext, x: Data, op: Scale) -> Data:
    """x * op.weight, broadcast both ways."""
    x = context.broadcast(x, tuple(torch.broadcast_shapes(context.shape(x), op.weight.shape)))
    return context.add(op, x)


def shift(context: LoweringContext, x: Data, offset: Tensor) -> Data:
    """x + offset, broadcast both ways; `offset` as in the model, batch axis included."""
    constant = context.per_sample(offset, len(context.shape(x)))
    x = context.broadcast(x, tuple(torch.broadcast_shapes(context.shape(x), constant.shape)))
    return context.add(Shift(constant), x)


def negative(context: LoweringContext, x: Data) -> Data:
    """-x."""
    return context.add(Scale(torch.tensor(-1.0, dtype=torch.float64)), x)


@lowers(operator.add, operator.iadd, torch.add)
def add(context: LoweringContext, *values: Any) -> Data:
    """Sum of data and constants."""
    branches = [value for value in values if isinstance(value, Data)]
    constants = [value for value in values if not isinstance(value, Data)]
    ranks = {len(context.shape(branch)) for branch in branches}
    if len(ranks) > 1:
        context.refuse("its operands have different numbers of axes, which would line the batch up with another axis")
    total = branches[0]
    for branch in branches[1:]:
        target = tuple(torch.broadcast_shapes(context.shape(total), context.shape(branch)))
        total = context.add(Add(), context.broadcast(total, target), context.broadcast(branch, target))
    for constant in constants:
        total = shift(context, total, context.constant(constant))
    return total


@lowers(operator.sub, operator.isub, torch.sub)
def subtract(context: LoweringContext, left: Any, right: Any) -> Data:
    """left - right; at most one of them is a constant."""
    if isinstance(right, Data):
        return add(context, left, negative(context, right))
    return add(context, left, -context.constant(right))


@lowers(operator.mul, operator.imul, torch.mul)
def multiply(context: LoweringContext, left: Any, right: Any) -> Data:
    """Product of data and a constant; refuses a product of two values that depend on the input."""
    if isinstance(left, Data) and isinstance(right, Data):
        context.refuse(
            "a product of two values that both depend on the input is not supported unless it belongs to an activation "
            "of the table: multiply by constants only"
        )
    x, constant = (left, right) if isinstance(left, Data) else (right, left)
    return scale(context, x, Scale(context.per_sample(context.constant(constant), len(context.shape(x)))))


@lowers(operator.truediv, operator.itruediv, torch.div)
def divide(context: LoweringContext, left: Any, right: Any) -> Data:
    """Quotient of data and a constant; refuses 0 and a divisor that depends on the input."""
    if isinstance(right, Data):
        context.refuse("division by a value that depends on the input is not supported: divide by constants only")
    x = context.data(left)
    weight, tail = reciprocal(context.per_sample(context.constant(right), len(context.shape(x))))
    if not bool(weight.isfinite().all()):
        context.refuse("it divides by zero")
    return scale(context, x, Scale(weight, weight_error=1, weight_tail=tail))


@lowers(operator.neg, torch.neg)
def _neg(context: LoweringContext, x: Any) -> Data:
    return negative(context, context.data(x))


@lowers(torch.cat, torch.concat)
def concatenate(context: LoweringContext, values: Iterable[Any], dim: int = 0) -> Data:
    """Concatenation of data along an axis other than the batch; `dim` counts the batch."""
    branches = [context.data(value) for value in values]
    rank = len(context.shape(branches[0])) + 1
    axis = dim + rank if dim < 0 else dim
    if not 1 <= axis < rank:
        context.refuse(f"it concatenates along axis {dim}, the batch; concatenate features instead")
    return branches[0] if len(branches) == 1 else context.add(Concat(axis - 1), *branches)


@lowers(operator.matmul, torch.matmul)
def matmul(context: LoweringContext, left: Any, right: Any) -> Data:
    """Matrix product with one constant factor."""
    if isinstance(left, Data) and isinstance(right, Data):
        context.refuse(
            "a product of two values that both depend on the input (as in attention) is not supported: "
            "one factor must be constant"
        )
    if isinstance(left, Data):
        weight = _matrix(context, right)
        return context.add(Dense(weight.T.contiguous()), left)
    if len(context.shape(right)) < 2:
        context.refuse("it multiplies across the batch")
    swapped = context.move(lambda t: t.transpose(-1, -2), right)
    return context.move(lambda t: t.transpose(-1, -2), context.add(Dense(_matrix(context, left)), swapped))


def along(context: LoweringContext, x: Data, axes: Sequence[int], keep: bool, mean: bool) -> Data:
    """Sum or mean over `axes` (the batch is axis 0): a Dense layer of one row after the axes are moved to the end."""
    shape = context.shape(x)
    rank = len(shape) + 1
    reduced = sorted(axis % rank for axis in axes)
    if 0 in reduced:
        context.refuse("it reduces over the batch")
    kept = [axis for axis in range(rank) if axis not in reduced]
    count = math.prod(shape[axis - 1] for axis in reduced)
    x = context.move(lambda t: t.permute(*kept, *reduced).reshape(*(t.shape[axis] for axis in kept), count), x)
    if mean:
        weight, tail = reciprocal(torch.full((1, 1), float(count), dtype=torch.float64))
        op = Dense(weight.expand(1, count).contiguous(), None, weight_error=1, title="mean", weight_tail=tail)
    else:
        op = Dense(torch.ones(1, count, dtype=torch.float64), title="sum")
    x = context.add(op, x)
    final = tuple(1 if axis in reduced else shape[axis - 1] for axis in range(1, rank) if keep or axis not in reduced)
    return x if context.shape(x) == final else context.add(Reshape(final), x)


def _matrix(context: LoweringContext, constant: Any) -> Tensor:
    weight = context.constant(constant)
    while weight.dim() > 2 and weight.shape[0] == 1:
        weight = weight[0]
    if weight.dim() != 2:
        context.refuse(f"its constant factor of shape {tuple(weight.shape)} is not one matrix")
    return weight


# --- nonlinear layers -------------------------------------------------------------------------------------------


@lowers(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
def _max_pool(context: LoweringContext, layer: nn.MaxPool2d, x: Any) -> Data:
    value = context.data(x)
    if layer.return_indices:
        context.refuse("it returns indices too; export it without")
    n = len(context.shape(value)) - 1
    kernel, stride = _tuple(layer.kernel_size, n), _tuple(layer.stride, n)
    padding, dilation = _tuple(layer.padding, n), _tuple(layer.dilation, n)
    return context.add(MaxPool(kernel, stride, padding, dilation, bool(layer.ceil_mode)), value)
