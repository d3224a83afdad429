"""A torch module as a `Network` whose weights carry the gradients of the module's parameters."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn

from certify_cli.errors import ModelError, UsageError, first_line, quoted, shown
from certify_cli.network.graph import Network
from certify_cli.network.lowering.fx_graph import lower_as_is
from certify_cli.training import operators as _operators  # noqa: F401  (enters the rules)
from certify_cli.training.elementwise import OPERATOR as activation_operator

SAMPLES = 2
"""In the program that is traced: two, so that an operator that mixes samples is seen."""


class DifferentiableNetwork:
    """The network that a module computes in evaluation mode, made anew from its parameters whenever it is asked for.

    module: is left as it is, and may be in training mode.   input_shape: of one sample, without the batch.

    Raises UsageError for what is no module, ModelError where the module cannot be traced or has an operator that no
    bound covers, as `certify` would.
    """

    def __init__(self, module: nn.Module, input_shape: Sequence[int]) -> None:
        if not isinstance(module, nn.Module):
            raise UsageError(f"an objective takes a torch.nn.Module, not a {quoted(type(module).__name__)}")
        self.module, self.input_shape = module, tuple(input_shape)
        self._program, self._sources = _traced(module, self.input_shape)

    def network(self) -> Network:
        """The network at the module's present parameters, float64, on their device."""
        present: dict[str, torch.Tensor] = dict(self.module.named_parameters(remove_duplicate=False))
        present |= dict(self.module.named_buffers(remove_duplicate=False))
        for name, source in self._sources.items():
            tensor = present[source]
            setattr(self._program, name, tensor.to(torch.float64) if tensor.is_floating_point() else tensor)
        return lower_as_is(self._program, self.input_shape)[0]


def _traced(module: nn.Module, shape: tuple[int, ...]) -> tuple[fx.GraphModule, dict[str, str]]:
    """The module's code as calls of operators, and the parameter or buffer behind each attribute of the program."""
    own = copy.deepcopy(module).eval()
    name = shown(type(module).__name__)
    dtype = next((p.dtype for p in own.parameters() if p.is_floating_point()), torch.float32)
    device = next((p.device for p in own.parameters()), torch.device("cpu"))
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # of torch to its developers
            sample = torch.zeros(SAMPLES, *shape, dtype=dtype, device=device)
            program = torch.export.export(own, (sample,), strict=False)
    except Exception as error:  # tracing runs the module's own code, which may raise anything
        raise ModelError(
            f"{name} cannot be traced on samples of shape {shape}: {first_line(error)}; its forward must take such "
            "samples, and must not branch on their values"
        ) from error
    signature = program.graph_signature
    kept: dict[str, str] = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    constants: dict[str, str] = dict(signature.inputs_to_lifted_tensor_constants)
    holder, graph, sources = nn.Module(), copy.deepcopy(program.graph_module.graph), {}
    for node in list(graph.nodes):
        if node.op == "placeholder" and (node.name in kept or node.name in constants):
            if node.name in constants:
                _hold(holder, node.name, program.constants[constants[node.name]])
            else:
                _hold(holder, node.name, torch.empty(0, dtype=torch.float64))
                sources[node.name] = kept[node.name]
            with graph.inserting_before(node):
                node.replace_all_uses_with(graph.get_attr(node.name))
            graph.erase_node(node)
    _name_softsigns(graph)
    return fx.GraphModule(holder, graph), sources


def _name_softsigns(graph: fx.Graph) -> None:
    """Make one operator of each x / (1 + |x|), as which torch writes softsign: its parts have no bound of their own."""
    aten = torch.ops.aten
    for node in list(graph.nodes):
        if node.target is not aten.div.Tensor or not all(isinstance(value, fx.Node) for value in node.args):
            continue
        x, below = node.args
        if below.target is aten.add.Tensor and below.args[1:] == (1,) and not below.kwargs:
            size = below.args[0]
            if isinstance(size, fx.Node) and size.target is aten.abs.default and size.args == (x,):
                with graph.inserting_before(node):
                    node.replace_all_uses_with(graph.call_function(activation_operator, (x, "softsign")))
                for unused in (node, below, size):
                    if not unused.users:
                        graph.erase_node(unused)


def _hold(holder: nn.Module, name: str, tensor: Tensor) -> None:
    setattr(holder, name, tensor.to(torch.float64) if tensor.is_floating_point() else tensor)
