"""A torch module as a `Network` whose weights carry the gradients of the module's parameters."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import fx, nn

from certify_cli.errors import ModelError, UsageError, first_line, quoted, shown
from certify_cli.network.graph import Network
from certify_cli.network.lowering.context import MODULES
from certify_cli.network.lowering.fx_graph import lower_as_is


class _Tracer(fx.Tracer):
    """Enters every module but those that have a rule."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m) in MODULES or super().is_leaf_module(m, module_qualified_name)


class DifferentiableNetwork:
    """The network that a module computes in evaluation mode, made anew from its parameters whenever it is asked for.

    module: is left as it is, and may be in training mode.   input_shape: of one sample, without the batch.

    Raises UsageError for what is no module, ModelError where the module cannot be traced or has a layer that no bound
    covers, as `certify` would.
    """

    def __init__(self, module: nn.Module, input_shape: Sequence[int]) -> None:
        if not isinstance(module, nn.Module):
            raise UsageError(f"an objective takes a torch.nn.Module, not a {quoted(type(module).__name__)}")
        self.module, self.input_shape = module, tuple(input_shape)
        own = copy.deepcopy(module).eval()
        try:
            self._traced = fx.GraphModule(own, _Tracer().trace(own))
        except Exception as error:  # tracing runs the module's own code, which may raise anything
            name = shown(type(module).__name__)
            raise ModelError(
                f"{name} cannot be traced: {first_line(error)}; its forward must not branch on the values of its input"
            ) from error
        self._traced.double()

    def network(self) -> Network:
        """The network at the module's present parameters, float64, on their device."""
        current = {**dict(self.module.named_parameters()), **dict(self.module.named_buffers())}
        for path, part in self._traced.named_modules():
            for table in (part._parameters, part._buffers):
                for key, old in table.items():
                    tensor = current.get(f"{path}.{key}" if path else key, old)
                    if tensor is not None and tensor.is_floating_point():
                        tensor = tensor.to(torch.float64)
                    table[key] = tensor
        return lower_as_is(self._traced, self.input_shape)[0]
