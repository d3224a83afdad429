"""The declared-layer spec: an architecture as JSON, for files that hold nothing but weights.

    {"format": "curvcert-architecture/1",
     "input": [1, 28, 28],
     "layers": [{"type": "Flatten"},
                {"type": "Linear", "name": "fc1", "weight": "fc1.weight", "bias": "fc1.bias"},
                {"type": "softplus", "beta": 5},
                {"type": "Linear", "name": "fc2"}]}

`input` is one sample's shape. A layer takes the one before it, or those that its `inputs` name ("input" is the
model's); the last layer gives the logits. Tensors are NAME.weight, NAME.bias, ... unless a field names another. The
types are the keys of `declared_layers.DECLARED`; classes and code named in a file are never looked up.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from certify_cli.errors import LayerError, ModelError, first_line, listed, quoted
from certify_cli.load.safetensors.declared_layers import DECLARED, declaration
from certify_cli.load.safetensors.fields import Entry, Tensors
from certify_cli.network.graph import MAX_VALUES, Builder, Network, Shape
from certify_cli.network.lowering.context import Data, LoweringContext
from certify_cli.network.lowering.fx_graph import classifier

FORMAT = "curvcert-architecture/1"
TRAINING = "training"
"""An optional key of the spec: how the model was made, which no bound depends on."""
MAX_LAYERS = 10_000
MAX_AXES = 8
MAX_TOTAL = 2**28
"""Largest number of entries of all values of one sample together, checked before the network is run."""

_MISFIT = (RuntimeError, ValueError, IndexError, TypeError, ZeroDivisionError, OverflowError, MemoryError)


def build(spec: Any, tensors: Mapping[str, Tensor]) -> Network:
    """The network that `spec` declares over the file's tensors. ModelError, naming layer and field."""
    if not isinstance(spec, dict):
        raise ModelError("the architecture must be a JSON object with format, input and layers")
    if spec.get("format") != FORMAT:
        raise ModelError(f"the architecture's format is {quoted(spec.get('format'))}; {FORMAT!r} is expected")
    if unknown := sorted(set(spec) - {"format", "input", "layers", TRAINING}):
        raise ModelError(f"the architecture has the unknown field {listed(unknown)}")
    layers = spec.get("layers")
    if not isinstance(layers, list) or not layers:
        raise ModelError("the architecture's layers must be a list of at least one layer")
    if len(layers) > MAX_LAYERS:
        raise ModelError(f"the architecture has {len(layers)} layers; at most {MAX_LAYERS} are read")

    weights = Tensors(tensors)
    builder = Builder(_input_shape(spec.get("input")))
    values = {"input": Data(0)}
    unused: set[str] = set()
    previous = "input"
    total = 0
    for position, raw in enumerate(layers, start=1):
        entry = Entry(raw, position, weights)
        if entry.name in values:
            entry.fail("its name is taken by an earlier layer or the input; names must differ")
        inputs = entry.inputs(previous)
        if missing := [name for name in inputs if name not in values]:
            entry.fail(f"its input {quoted(missing[0])} is no earlier layer")
        values[entry.name] = _add(entry, builder, [values[name] for name in inputs])
        total += math.prod(builder.shape(values[entry.name].index))
        if total > MAX_TOTAL:
            entry.fail(f"up to here a sample has {total} values; the limit is {MAX_TOTAL}")
        unused = (unused - set(inputs)) | {entry.name}
        previous = entry.name
    if len(unused) > 1:
        raise ModelError(f"the layers {listed(sorted(unused - {previous}))} lead nowhere; only the last gives logits")
    if weights.unused:
        raise ModelError(f"the architecture leaves tensors unused: {listed(weights.unused)}")
    network = classifier(builder, values[previous])
    _check_shapes(network)
    return network


def declare(network: Network) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The spec of a network, and its tensors by name: float64, and int64 for data movement."""
    names = ["input"]
    layers: list[dict[str, Any]] = []
    tensors: dict[str, Tensor] = {}
    for node in network.nodes[1:]:
        name = node.name
        while name in names:
            name += "_"
        entry, own = declaration(node, name, [names[i] for i in node.inputs])
        names.append(name)
        layers.append(entry)
        tensors.update(own)
    return {"format": FORMAT, "input": list(network.input_shape), "layers": layers}, tensors


def _input_shape(value: Any) -> Shape:
    sizes = value if isinstance(value, list) else []
    if not sizes or not all(type(size) is int and size > 0 for size in sizes):
        raise ModelError(
            f"the architecture's input must be one sample's shape such as [1, 28, 28], not {quoted(value)}"
        )
    if len(sizes) > MAX_AXES or math.prod(sizes) > MAX_VALUES:
        raise ModelError(
            f"the architecture's input {quoted(value)} is too large; the limit is {MAX_AXES} axes and "
            f"{MAX_VALUES} values"
        )
    return tuple(sizes)


def _add(entry: Entry, builder: Builder, inputs: list[Data]) -> Data:
    row = DECLARED.get(entry.type)
    if row is None:
        entry.fail(f"unknown type; known are {', '.join(DECLARED)}")
    try:
        value = row(entry, LoweringContext(builder, entry.name, entry.type), inputs)
    except _MISFIT as error:
        entry.fail(first_line(error))
    except LayerError:
        raise
    except ModelError as error:
        entry.fail(str(error))
    entry.finish()
    if len(builder.shape(value.index)) > MAX_AXES:
        entry.fail(f"its value has {len(builder.shape(value.index))} axes; at most {MAX_AXES} are read")
    return value


def _check_shapes(network: Network) -> None:
    """Evaluate the network on zeros; ModelError where a value does not have the shape that was derived for it."""
    last_use = {i: index for index, node in enumerate(network.nodes) for i in node.inputs}
    values = {0: torch.zeros(1, *network.input_shape, dtype=torch.float64)}
    for index, node in enumerate(network.nodes[1:], start=1):
        where = f"layer {quoted(node.name)} ({node.op.title})"
        try:
            with torch.no_grad():
                value = node.op.apply(*(values[i] for i in node.inputs))
        except _MISFIT as error:
            raise ModelError(f"{where}: {first_line(error)}") from error
        if tuple(value.shape[1:]) != node.shape:
            raise ModelError(f"{where}: gives shape {tuple(value.shape[1:])}, not {node.shape}")
        values[index] = value
        for i in set(node.inputs):
            if last_use[i] == index:  # all values at once may be more than the memory holds
                del values[i]
