"""torch.fx graph -> Network: every node is looked up in the tables of rules and lowered, or refused by name."""

from __future__ import annotations

import copy
import operator
from typing import Any

import torch
from torch import fx, nn

from certify_cli.errors import ModelError
from certify_cli.network.activations import from_module
from certify_cli.network.graph import Builder, Network, Shape
from certify_cli.network.lowering import torch_layers as _layers  # noqa: F401  (enters the rules)
from certify_cli.network.lowering.context import FUNCTIONS, MODULES, Data, LoweringContext

SUPPORTED = (
    "dense, convolution, batch norm, average and max pooling, padding, reshaping, slicing, adding and concatenating "
    "layers, products with constants, and the activations of the table"
)


def lower(module: fx.GraphModule, input_shape: Shape, names: dict[str, str] | None = None) -> Network:
    """The Network (float64) that `module` computes on samples of `input_shape` (batch not counted).

    names: a module's path -> the name that users know it by (default: the path itself).
    ModelError, naming layer and type, for everything outside the tables, for layers in training mode and for shapes
    that do not fit.
    """
    return lower_traced(module, input_shape, names)[0]


def lower_traced(
    module: fx.GraphModule, input_shape: Shape, names: dict[str, str] | None = None
) -> tuple[Network, dict[str, int]]:
    """`lower`, and for each module's path the network node that holds its value."""
    return lower_as_is(copy.deepcopy(module).double().requires_grad_(False), input_shape, names)


def lower_as_is(
    module: fx.GraphModule, input_shape: Shape, names: dict[str, str] | None = None
) -> tuple[Network, dict[str, int]]:
    """`lower_traced` of a module whose parameters are float64 already: the network's weights are these very tensors.

    Where they carry a gradient, the network does.
    """
    builder = Builder(tuple(input_shape))
    values: dict[fx.Node, Any] = {}
    reached: set[str] = set()
    output: Any = None
    for node in module.graph.nodes:
        name = (names or {}).get(str(node.target), str(node.target)) if node.op == "call_module" else node.name
        args = fx.node.map_arg(node.args, values.__getitem__)
        kwargs = fx.node.map_arg(node.kwargs, values.__getitem__)
        if node.op == "placeholder":
            if values and any(isinstance(value, Data) for value in values.values()):
                raise ModelError("the model has more than one input; export a classifier of one input")
            values[node] = Data(0)
        elif node.op == "get_attr":
            reached.add(str(node.target))
            values[node] = operator.attrgetter(str(node.target))(module)
        elif node.op == "output":
            output = args[0]
        else:
            values[node] = _lower_call(module, builder, node, name, args, kwargs)
            if node.op == "call_module":
                reached.update(f"{node.target}.{key}" for key in module.get_submodule(str(node.target)).state_dict())
    missed = sorted(set(module.state_dict()) - reached)
    if missed:
        raise ModelError(f"parameters {', '.join(missed[:5])} are never used by the model's graph; export it anew")
    if isinstance(output, tuple | list) and len(output) == 1:
        output = output[0]
    if not isinstance(output, Data):
        raise ModelError("the model must have exactly one output, computed from its input: the logits")
    network = classifier(builder, output)
    order = builder.order(output.index)
    node_of = {
        str(node.target): order[value.index]
        for node, value in values.items()
        if node.op == "call_module" and isinstance(value, Data) and value.index in order
    }
    return network, node_of


def classifier(builder: Builder, output: Data) -> Network:
    """The network that ends in `output`; ModelError unless that is a vector of at least two logits."""
    network = builder.build(output.index)
    shape = network.nodes[-1].shape
    if len(shape) != 1 or shape[0] < 2:
        raise ModelError(
            f"the model's output has shape {shape} per sample; a vector of at least two logits is needed"
            + ("; export two logits (0, z) instead of one" if torch.Size(shape).numel() == 1 else "")
        )
    return network


def _lower_call(
    module: fx.GraphModule, builder: Builder, node: fx.Node, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    layer = module.get_submodule(str(node.target)) if node.op == "call_module" else None
    kind = type(layer).__name__ if layer is not None else getattr(node.target, "__name__", str(node.target))
    context = LoweringContext(builder, name, getattr(layer, "onnx_type", kind))
    if layer is not None:
        _check_untouched(context, layer)
    if not _holds_data((args, kwargs)):
        call = layer if layer is not None else node.target
        if not callable(call):
            context.refuse("a method call on a constant is not supported; use a function or a layer")
        return call(*args, **kwargs)
    rule = MODULES.get(type(layer)) if layer is not None else FUNCTIONS.get(node.target)  # type: ignore[arg-type]
    try:
        if rule is not None:
            return rule(context, layer, *args, **kwargs) if layer is not None else rule(context, *args, **kwargs)
        activation = from_module(layer) if layer is not None else None
    except ValueError as error:
        context.refuse(str(error))
    except ModelError as error:
        if str(error).startswith("layer "):
            raise
        context.refuse(str(error))
    if activation is None:
        context.refuse(f"this operator is not supported; supported are {SUPPORTED}")
    return context.add(activation, context.data(args[0]))


def _check_untouched(context: LoweringContext, layer: nn.Module) -> None:
    """ModelError for hooks, a replaced forward or training mode, with which a layer is not what its type says."""
    if layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer):
        context.refuse("it carries a hook or a replaced forward, which could compute anything; remove it")
    if layer.training and isinstance(layer, nn.modules.batchnorm._BatchNorm | nn.modules.dropout._DropoutNd):
        context.refuse("it is in training mode; call model.eval() before exporting")


def _holds_data(value: Any) -> bool:
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, tuple | list):
        return isinstance(value, Data)
    return any(_holds_data(item) for item in value)
