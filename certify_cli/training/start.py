"""Where training starts: the weights of dense layers in the middle of a deep network.

Certified radii shrink with every nonlinear layer, as norms and curvatures multiply. Started as a small multiple of the
identity, and biased to where the activation is nearly straight, a middle layer changes little: the network begins as
one with a single hidden layer, and uses its depth as far as the objective lets it.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils import parametrize

from certify_cli.errors import UsageError

SHRINK = 0.1
"""Multiple of the identity; the last layer makes up for it."""
BIAS = 1.0
"""Of every middle unit at the start."""
MOST = 5
"""Middle layers: SHRINK to a higher power is lost in float32's rounding of values near BIAS."""


def middle_layers(module: nn.Module) -> list[nn.Linear]:
    """The dense layers after the first layer with weights and before the last one, in order."""
    weighted = [part for part in module.modules() if _has_weights(part)]
    return [part for part in weighted[1:-1] if isinstance(part, nn.Linear)]


def _has_weights(part: nn.Module) -> bool:
    """Whether the part has learned weights of its own, normalised ones too."""
    return isinstance(part._parameters.get("weight"), nn.Parameter) or parametrize.is_parametrized(part, "weight")


def start_from_identity(module: nn.Module, sample: torch.Tensor) -> None:
    """Set the middle layers to SHRINK times the identity, with the bias BIAS, and scale the last layer up.

    The last layer's bias makes the logits of sample (1, *input_shape) zero: biases in the middle favour no class.
    UsageError for more than MOST middle layers.
    """
    middle = middle_layers(module)
    if len(middle) > MOST:
        raise UsageError(
            f"start = identity is for at most {MOST} dense layers in the middle, and this network has {len(middle)}; "
            "choose fewer layers, or start = torch"
        )
    if not middle:
        return
    last = [part for part in module.modules() if isinstance(part, nn.Linear)][-1]
    with torch.no_grad():
        for layer in middle:
            nn.init.eye_(layer.weight).mul_(SHRINK)
            layer.bias.fill_(BIAS)
        last.weight.div_(SHRINK ** len(middle))
        last.bias.sub_(module(sample)[0])
