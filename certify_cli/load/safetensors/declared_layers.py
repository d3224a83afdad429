"""The layers that a spec may declare: one row per type. No other layer is ever built.

User-level types are torch.nn's, with its names and meaning: a row makes the module, and the lowering rules do the rest,
so that each layer has one rule. The primitives of `Network` go by their titles, with the fields of their classes, so
that every network can be declared (`declaration`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from certify_cli.errors import UsageError
from certify_cli.load.preprocessing import normalisation
from certify_cli.load.safetensors.fields import Entry
from certify_cli.network.activations import ACTIVATIONS, Activation
from certify_cli.network.affine import Dense, Scale, Shift
from certify_cli.network.convolution import Conv, ConvTranspose
from certify_cli.network.graph import Add, Concat, Node, refuse_large
from certify_cli.network.lowering.context import MODULES, Data, LoweringContext
from certify_cli.network.lowering.torch_layers import pad_with, padded_shape
from certify_cli.network.movement import Reshape, Select
from certify_cli.network.pooling import MaxMin, MaxPool
from certify_cli.numerics.rounding import gamma, up

Row = Callable[[Entry, LoweringContext, Sequence[Data]], Data]

DECLARED: dict[str, Row] = {}
"""Type in the spec -> row(entry, context, inputs) -> the value it adds."""

_AXES = {"1d": 1, "2d": 2, "3d": 3}


def _row(*types: str) -> Callable[[Row], Row]:
    def enter(row: Row) -> Row:
        for type_ in types:
            if type_ in DECLARED:
                raise ValueError(f"layer type {type_} is entered twice")
            DECLARED[type_] = row
        return row

    return enter


def _module_row(*types: str) -> Callable[[Callable[[Entry], nn.Module]], Callable[[Entry], nn.Module]]:
    """Enter a rule that makes the torch.nn module of these types, which is lowered as any other module."""

    def enter(make: Callable[[Entry], nn.Module]) -> Callable[[Entry], nn.Module]:
        def row(entry: Entry, context: LoweringContext, inputs: Sequence[Data]) -> Data:
            module = make(entry).eval()
            return MODULES[type(module)](context, module, _only(entry, inputs))

        _row(*types)(row)
        return make

    return enter


def _only(entry: Entry, inputs: Sequence[Data]) -> Data:
    if len(inputs) != 1:
        entry.fail(f"takes one input, not {len(inputs)}")
    return inputs[0]


# --- torch.nn's layers ------------------------------------------------------------------------------------------


def _kind(entry: Entry) -> Any:
    """The torch.nn class of a row whose types are torch.nn's own names."""
    return getattr(nn, entry.type)


def _weight(entry: Entry, dimensions: int) -> Tensor:
    weight = entry.tensor("weight")
    if weight.dim() != dimensions or 0 in weight.shape:
        entry.fail(f"its weight has shape {tuple(weight.shape)}; {dimensions} dimensions are expected")
    return weight


def _filled(module: nn.Module, entry: Entry, **tensors: Tensor | None) -> nn.Module:
    """The module, made on the meta device, with these tensors in context of its own; their shapes must fit."""
    for name, tensor in tensors.items():
        slot = getattr(module, name)
        if tensor is None:
            continue
        if slot.shape != tensor.shape:
            entry.fail(f"{name} of shape {tuple(tensor.shape)} does not fit; {tuple(slot.shape)} is expected")
        setattr(module, name, nn.Parameter(tensor, requires_grad=False) if isinstance(slot, nn.Parameter) else tensor)
    return module


@_module_row("Linear")
def _linear(entry: Entry) -> nn.Module:
    weight, bias = _weight(entry, 2), entry.optional_tensor("bias")
    outputs, inputs = weight.shape
    module = nn.Linear(inputs, outputs, bias=bias is not None, device="meta")
    return _filled(module, entry, weight=weight, bias=bias)


@_module_row("Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d")
def _conv(entry: Entry) -> nn.Module:
    axes = _AXES[entry.type[-2:]]
    transposed = entry.type.startswith("ConvTranspose")
    weight, bias = _weight(entry, axes + 2), entry.optional_tensor("bias")
    groups = entry.integer("groups", 1, minimum=1)
    if weight.shape[0] % groups:
        entry.fail(f"its weight of shape {tuple(weight.shape)} cannot be split into {groups} groups")
    options: dict[str, Any] = {
        "stride": entry.integers("stride", axes, 1, minimum=1),
        "padding": entry.integers("padding", axes, 0),
        "dilation": entry.integers("dilation", axes, 1, minimum=1),
    }
    if transposed:
        options["output_padding"] = entry.integers("output_padding", axes, 0)
    else:
        options["padding_mode"] = entry.choice("padding_mode", ("zeros", "reflect", "replicate", "circular"), "zeros")
    channels = (weight.shape[0], weight.shape[1] * groups)
    inputs, outputs = channels if transposed else channels[::-1]
    module = _kind(entry)(
        inputs, outputs, tuple(weight.shape[2:]), groups=groups, bias=bias is not None, device="meta", **options
    )
    return _filled(module, entry, weight=weight, bias=bias)


@_module_row("BatchNorm1d", "BatchNorm2d", "BatchNorm3d")
def _batch_norm(entry: Entry) -> nn.Module:
    mean, variance = entry.tensor("running_mean"), entry.tensor("running_var")
    weight, bias = entry.optional_tensor("weight"), entry.optional_tensor("bias")
    if (weight is None) != (bias is None):
        entry.fail("weight and bias come together or not at all")
    entry.discard("num_batches_tracked")
    eps = entry.number("eps", 1e-5)
    module = _kind(entry)(mean.numel(), eps=eps, affine=weight is not None, device="meta")
    return _filled(module, entry, weight=weight, bias=bias, running_mean=mean, running_var=variance)


def _window(entry: Entry) -> dict[str, Any]:
    axes = _AXES[entry.type[-2:]]
    kernel = entry.integers("kernel_size", axes, minimum=1)
    return {
        "kernel_size": kernel,
        "stride": entry.integers("stride", axes, kernel, minimum=1),
        "padding": entry.integers("padding", axes, 0),
        "ceil_mode": entry.flag("ceil_mode", False),
    }


@_module_row("AvgPool1d", "AvgPool2d", "AvgPool3d")
def _average_pool(entry: Entry) -> nn.Module:
    return _kind(entry)(**_window(entry), count_include_pad=entry.flag("count_include_pad", True))


@_module_row("MaxPool1d", "MaxPool2d", "MaxPool3d")
def _max_pool(entry: Entry) -> nn.Module:
    return _kind(entry)(**_window(entry), dilation=entry.integers("dilation", _AXES[entry.type[-2:]], 1, minimum=1))


@_module_row("AdaptiveAvgPool1d", "AdaptiveAvgPool2d", "AdaptiveAvgPool3d")
def _adaptive_average_pool(entry: Entry) -> nn.Module:
    return _kind(entry)(entry.integers("output_size", _AXES[entry.type[-2:]], minimum=1))


@_module_row("Flatten", "Identity")
def _no_fields(entry: Entry) -> nn.Module:
    """Layers without fields; Flatten keeps only the batch axis."""
    return _kind(entry)()


# --- layers without a module ------------------------------------------------------------------------------------


@_row("Pad")
def _pad(entry: Entry, context: LoweringContext, inputs: Sequence[Data]) -> Data:
    """Padding; `padding` in torch's order: before and after, the last axis first."""
    x = _only(entry, inputs)
    widths = entry.integers("padding", None)
    mode = entry.choice("mode", ("constant", "reflect", "replicate", "circular"), "constant")
    if len(widths) % 2 or len(widths) > 2 * len(context.shape(x)):
        entry.fail(f"padding takes two numbers an axis, and its input has shape {context.shape(x)}")
    refuse_large(padded_shape(context.shape(x), widths))
    if mode == "constant":
        return pad_with(context, x, widths, entry.number("value", 0.0))
    return context.move(lambda t: F.pad(t, widths, mode=mode), x)


@_row("Normalise")
def _normalise(entry: Entry, context: LoweringContext, inputs: Sequence[Data]) -> Data:
    x = _only(entry, inputs)
    try:
        steps = normalisation(context.shape(x), entry.numbers("mean", None), entry.numbers("std", None))
    except UsageError as error:
        entry.fail(str(error).replace("--", ""))
    for _, op in steps:
        x = context.add(op, x)
    return x


@_row("MaxMin")
def _max_min(entry: Entry, context: LoweringContext, inputs: Sequence[Data]) -> Data:
    """Pairs the two halves of the channels; the maxima come first, at most `high`, then the minima, at least `low`.

    Both clamps are one ReLU of side (x - level), so that their joint norm is 1, as that of one clamp is.
    """
    x = context.add(MaxMin(), _only(entry, inputs))
    thresholds = [value for value in entry.parameters(("high", "low")).values() if value is not None]
    if not thresholds:
        return x
    if len(thresholds) == 1:
        entry.fail("low and high come together or not at all")
    shape = context.shape(x)
    axes = (-1, *[1] * (len(shape) - 1))
    halves = torch.tensor([thresholds, [-1.0, 1.0]], dtype=torch.float64).repeat_interleave(shape[0] // 2, dim=1)
    level, side = (half.reshape(axes) for half in halves)
    above = context.add(Scale(side), context.add(Shift(-level), x))
    return context.add(Shift(level), context.add(Scale(side), context.add(ACTIVATIONS["relu"](), above)))


@_row("GroupSort")
def _group_sort(entry: Entry, context: LoweringContext, inputs: Sequence[Data]) -> Data:
    """Sorts neighbouring channels, two by two, in ascending order."""
    x = _only(entry, inputs)
    if entry.integer("group_size", 2, minimum=1) != 2:
        entry.fail("group_size must be 2; larger groups are not supported")
    halves = context.move(lambda t: torch.cat([t[:, 0::2], t[:, 1::2]], dim=1), x)
    return context.move(
        lambda t: torch.stack(t.chunk(2, dim=1)[::-1], dim=2).flatten(1, 2), context.add(MaxMin(), halves)
    )


@_row(Add.title)
def _add(entry: Entry, context: LoweringContext, inputs: Sequence[Data]) -> Data:
    return context.add(Add(), *inputs)


@_row("concat")
def _concat(entry: Entry, context: LoweringContext, inputs: Sequence[Data]) -> Data:
    """Concatenation; `axis` is counted without the batch."""
    axis = entry.integer("axis")
    if any(axis >= len(context.shape(x)) for x in inputs):
        entry.fail(f"axis {axis} does not exist in {', '.join(str(context.shape(x)) for x in inputs)}")
    return context.add(Concat(axis), *inputs)


# --- activations and primitives, both ways ----------------------------------------------------------------------


def _activation(entry: Entry, context: LoweringContext, inputs: Sequence[Data]) -> Data:
    x = _only(entry, inputs)
    build = ACTIVATIONS[entry.type]
    return context.add(build(**entry.parameters(inspect.signature(build).parameters)), x)


PRIMITIVES = {kind.title: kind for kind in (Dense, Conv, ConvTranspose, Scale, Shift, Reshape, Select, MaxPool, MaxMin)}
_POSITIVE = ("shape", "stride", "dilation", "groups", "kernel", "size")
_BIAS_AXIS = {"dense": -1, "conv": 0, "conv_transpose": 0}


def _declared_fields(kind: Any) -> dict[str, str]:
    """Name -> annotation of a primitive's fields, without its title."""
    return {item.name: str(item.type) for item in fields(kind) if item.init and item.name != "title"}


def _primitive(entry: Entry, context: LoweringContext, inputs: Sequence[Data]) -> Data:
    x = _only(entry, inputs)
    kind = PRIMITIVES[entry.type]
    values: dict[str, Any] = {}
    for key, annotation in _declared_fields(kind).items():
        minimum = int(key in _POSITIVE)
        if key == "index":
            values[key] = entry.indices(key)
        elif annotation == "Tensor":
            values[key] = entry.tensor(key)
        elif annotation == "Tensor | None":
            values[key] = entry.optional_tensor(key)
        elif annotation == "bool":
            values[key] = entry.flag(key, False)
        elif annotation == "tuple[int, ...] | None":
            values[key] = entry.optional_integers(key)
        elif annotation == "int":
            default = inspect.signature(kind).parameters[key].default
            values[key] = entry.integer(key, ... if default is inspect.Parameter.empty else default, minimum)
        else:
            values[key] = entry.integers(key, None, minimum=minimum)
    if entry.title:
        values["title"] = entry.title
    op = kind(**values)
    _check_primitive(entry, op, context)
    value = context.add(op, x)
    offset = values.get("offset")
    if entry.type in _BIAS_AXIS and offset is not None:
        wanted = (context.shape(value)[_BIAS_AXIS[entry.type]],)
        if tuple(offset.shape) != wanted:
            entry.fail(f"offset of shape {tuple(offset.shape)} does not fit; {wanted} is expected")
    return value


def _check_primitive(entry: Entry, op: Any, context: LoweringContext) -> None:
    """ModelError where a primitive breaks an assumption of its own shape rule."""
    if isinstance(op, Dense) and op.weight.dim() != 2:
        entry.fail(f"its weight has shape {tuple(op.weight.shape)}; 2 dimensions are expected")
    if isinstance(op, (Conv, ConvTranspose)):
        axes = op.weight.dim() - 2
        if axes not in (1, 2, 3) or op.weight.shape[0] % op.groups:
            entry.fail(f"a weight of shape {tuple(op.weight.shape)} is no convolution of {op.groups} groups")
    tail = getattr(op, "weight_tail", None)
    if tail is not None:
        _check_tail(entry, op.weight, op.weight_error, tail)
    if isinstance(op, MaxPool):
        axes = len(op.kernel)
    if isinstance(op, (Conv, ConvTranspose, MaxPool)):
        for key in ("stride", "padding", "dilation", "output_padding", "end"):
            if len(getattr(op, key, None) or (0,) * axes) != axes:
                entry.fail(f"{key} must hold {axes} numbers")
    if isinstance(op, Select) and (int(op.index.min()) < -1 or int(op.index.max()) >= op.size):
        entry.fail(f"index must lie between -1 and {op.size - 1}")


def _check_tail(entry: Entry, weight: Tensor, weight_error: int, tail: Tensor) -> None:
    """ModelError unless weight and tail together are within the stated error of the weight."""
    fits = len(tail) > 0 and tail.dim() == weight.dim() + 1
    if not fits or any(t not in (1, w) for t, w in zip(tail.shape[1:], weight.shape, strict=True)):
        entry.fail(f"weight_tail of shape {tuple(tail.shape)} does not fit a weight of shape {tuple(weight.shape)}")
    if not bool((up(tail.abs().sum(0), len(tail)) <= gamma(weight_error) * weight.abs()).all()):
        entry.fail(f"weight_tail is larger than a weight_error of {weight_error} allows")


def declaration(node: Node, name: str, inputs: Sequence[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """One node as an entry of a spec, under the given names, and its tensors."""
    op: Any = node.op
    entry: dict[str, Any] = {"name": name, "inputs": list(inputs)}
    if isinstance(op, Activation):
        return {"type": op.name, **entry, **op.parameters}, {}
    if isinstance(op, Add):
        return {"type": Add.title, **entry}, {}
    if isinstance(op, Concat):
        return {"type": Concat.title, **entry, "axis": op.axis}, {}
    kind = PRIMITIVES[type(op).title]
    entry = {"type": kind.title, **entry}
    tensors = {}
    for key in _declared_fields(kind):
        value = getattr(op, key)
        if isinstance(value, Tensor):
            entry[key] = f"{name}.{key}"
            tensors[entry[key]] = value
        elif value is not None:
            entry[key] = list(value) if isinstance(value, tuple) else value
    if op.title != kind.title:
        entry["title"] = op.title
    return entry, tensors


for _types, _rule in ((ACTIVATIONS, _activation), (PRIMITIVES, _primitive)):
    _row(*_types)(_rule)
