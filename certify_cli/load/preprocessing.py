"""Puts mean, std and layout in front of a network, so that it takes samples in the data's units, channels first."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from certify_cli.data.source import CHANNELS
from certify_cli.errors import DataError, UsageError, quoted, shown
from certify_cli.network.affine import AffineOp, Scale, Shift
from certify_cli.network.graph import Builder, Network, Shape
from certify_cli.network.movement import Reshape, Select
from certify_cli.numerics.quotients import reciprocal

LAYOUTS = ("nchw", "nhwc", "flat")


def fit(
    network: Network,
    data_shape: Sequence[int],
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    layout: str | None = None,
) -> Network:
    """The network of x -> network(layout((x - mean) / std)) for x of `data_shape`.

    mean, std: one value, or one per channel of the data.
    layout: the order in which the model reads an image. If None it is inferred: a model input (H, W, C) is NHWC, any
        other shape of as many entries the row-major flattening of NCHW. With "nhwc" a flat model input is the
        flattening of NHWC.
    UsageError for an option; DataError, naming both shapes, where the model cannot take the data, or the data are
    evidently images read in the wrong layout.
    """
    shape = tuple(data_shape)
    steps = [*normalisation(shape, mean, std), *_layout(shape, network.input_shape, layout)]
    return prepend(network, shape, steps) if steps else network


def prepend(network: Network, input_shape: Shape, steps: Sequence[tuple[str, AffineOp]]) -> Network:
    """The network after a chain of named operations on inputs of `input_shape`.

    Where the network begins by moving what the last operation moved, the two are one, or nothing: a model that takes
    channels last often puts them first again.
    """
    builder = Builder(input_shape, network.nodes[0].name)
    last = before = 0
    for name, op in steps:
        before, last = last, builder.add(name, op, last)
    moved = steps[-1][1] if steps else None
    indices = [last]
    for node in network.nodes[1:]:
        if node.inputs == (0,) and isinstance(node.op, Select) and isinstance(moved, Select):
            both = node.op.after(moved)
            kept = both.keeps(builder.shape(before))
            indices.append(before if kept else builder.add(node.name, both, before))
        else:
            indices.append(builder.add(node.name, node.op, *(indices[i] for i in node.inputs)))
    return builder.build(indices[-1])


def normalisation(
    shape: Shape, mean: Sequence[float] | None, std: Sequence[float] | None
) -> list[tuple[str, AffineOp]]:
    """(x - mean) / std for x of `shape`, channels first, as up to two named operations. Raises UsageError."""
    steps: list[tuple[str, AffineOp]] = []
    if mean is not None:
        steps.append(("mean", Shift(-_per_channel("--mean", mean, shape))))
    if std is not None:
        values = _per_channel("--std", std, shape)
        weight, tail = reciprocal(values)
        if not bool((values > 0).all() and weight.isfinite().all()):
            raise UsageError(
                f"--std {_shown(std)}: every value must be positive, and not so small that 1/std overflows"
            )
        steps.append(("std", Scale(weight, weight_error=1, weight_tail=tail)))
    return steps


def _per_channel(option: str, values: Sequence[float], shape: Shape) -> Tensor:
    """The values in a shape that broadcasts with one sample."""
    if not values or not all(math.isfinite(value) for value in values):
        raise UsageError(f"{option} {_shown(values)}: one finite number, or one a channel, is expected")
    channels = shape[0] if len(shape) > 1 else 1
    if len(values) not in (1, channels):
        each = f", or one each for its {channels} channels" if channels > 1 else ""
        raise UsageError(f"{option} {_shown(values)} holds {len(values)} values; data of shape {shape} takes one{each}")
    return torch.tensor(values, dtype=torch.float64).reshape(-1, *[1] * (len(shape) - 1))


def _shown(values: Sequence[float]) -> str:
    return shown(",".join(f"{value:g}" for value in values))


def _layout(data: Shape, model: Shape, layout: str | None) -> list[tuple[str, AffineOp]]:
    if layout is not None and layout not in LAYOUTS:
        raise UsageError(f"--layout {quoted(layout)} is not one of {', '.join(LAYOUTS)}")
    if math.prod(data) != math.prod(model):
        raise DataError(
            f"the data's shape {data} does not fit the model's input {model}: "
            f"{math.prod(data)} values a sample against {math.prod(model)}"
        )
    _refuse_misread_images(data, model, layout)
    last = (*data[1:], data[0])
    flat = sum(n > 1 for n in model) <= 1
    channels_last = len(data) == 3 and model == last
    if layout is None:
        layout = "nhwc" if channels_last and model != data else "flat"
    elif layout == "nhwc" and len(data) != 3:
        raise DataError(
            f"--layout nhwc: data of shape {data} are no images (channels, height, width), so they have no channels to "
            "move; leave --layout out"
        )
    elif layout == "nhwc" and not (channels_last or flat):
        raise DataError(
            f"--layout nhwc: the model's input {model} is neither {last}, the data's shape with the channels last, nor "
            "flat"
        )
    elif layout == "nchw" and model != data:
        raise DataError(f"--layout nchw: the model's input {model} is not the data's shape {data}")
    elif layout == "flat" and not flat:
        raise DataError(f"--layout flat: the model's input {model} is not flat: it has several axes longer than 1")
    if layout == "nhwc" and data[0] > 1:
        moved = Select.of(lambda x: x.movedim(1, -1), data, "channels last")
        return [("layout", moved), *_reshaped("flatten", last, model)]
    return _reshaped("layout", data, model)


def _refuse_misread_images(data: Shape, model: Shape, layout: str | None) -> None:
    """DataError where the data's layout is evidently wrong: flattening would permute the pixels."""
    if len(data) != 3 or len(model) != 3 or data == model or model[0] not in CHANNELS:
        return
    if data == (*model[1:], model[0]):
        raise DataError(
            f"the data's shape {data} is the model's input {model} with the channels last; say --data-layout nhwc"
        )
    if layout is None and data == (model[2], *model[:2]) and data[0] not in CHANNELS:
        raise DataError(
            f"the data's shape {data} is what the model's input {model} becomes when it is taken for channels last; "
            "give the data in the model's shape (where it was said, leave --data-layout nhwc out)"
        )


def _reshaped(name: str, shape: Shape, target: Shape) -> list[tuple[str, AffineOp]]:
    return [] if shape == target else [(name, Reshape(target))]
