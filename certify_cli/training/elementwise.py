"""An activation of the table as a torch module, for those that torch has none for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from certify_cli.network.activations import Activation, from_name
from certify_cli.network.lowering.context import Data, LoweringContext, lowers


@torch.library.custom_op("curvcert::activation", mutates_args=())
def _apply(z: Tensor, text: str) -> Tensor:
    """Values of the activation that `from_name` reads from the text: one operator, so that an export keeps its name."""
    return from_name(text).value(z)


@_apply.register_fake
def _(z: Tensor, text: str) -> Tensor:
    return torch.empty_like(z)


def _keep(ctx: Any, inputs: tuple[Tensor, str], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])
    ctx.text = inputs[1]


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
    return gradient * from_name(ctx.text).slope_at(ctx.saved_tensors[0]), None


_apply.register_autograd(_backward, setup_context=_keep)


OPERATOR = torch.ops.curvcert.activation.default
"""The operator in an export: a value, and the text of its activation."""


class Elementwise(nn.Module):
    """The values of an activation, with the row's slope as its derivative."""

    def __init__(self, activation: Activation) -> None:
        super().__init__()
        numbers = ",".join(f"{value!r}" for value in activation.parameters.values() if value is not None)
        self.text = f"{activation.name}:{numbers}" if numbers else activation.name

    def forward(self, z: Tensor) -> Tensor:
        result: Tensor = _apply(z, self.text)
        return result


@lowers(OPERATOR)
def _activation(context: LoweringContext, x: Any, text: str) -> Data:
    return context.add(from_name(text), context.data(x))
