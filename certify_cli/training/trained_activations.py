"""Activations that `curvcert train` takes: rows of the table, MaxMin, and those whose thresholds are learned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from certify_cli.errors import UsageError, quoted
from certify_cli.network.activations import Activation, from_name, to_module
from certify_cli.plain import decimal
from certify_cli.training.clipped_relu import ClippedReLU
from certify_cli.training.derived import Derived
from certify_cli.training.elementwise import Elementwise
from certify_cli.training.low_curvature import LEAST_BETA, CentredSoftplus
from certify_cli.training.max_min import ClippedMaxMin, SortedPairs

LARGEST_PARAMETER = 1e4
"""Largest size of a number of the activation, and its inverse the smallest one that is not 0."""
MAX_MIN = ("maxmin", "max_min")

Made = tuple[dict[str, Any], nn.Module]
"""An entry of the spec, without name and inputs, and the module that it declares."""


def activation_layers(text: str, learned: bool, learned_beta: bool = False) -> Callable[[], Made]:
    """What makes the layers of an activation as written on the command line: a new one with every call.

    learned: whether the thresholds of clip:0,HIGH or maxmin:LOW,HIGH are learned.   learned_beta: whether beta of
    centred_softplus:BETA is.   UsageError for anything else.
    """
    name, colon, numbers = text.strip(" ").partition(":")
    if name.lower().replace("-", "_") in MAX_MIN:
        if learned_beta:
            raise UsageError(f"learned_beta is for the activation centred_softplus, not for {quoted(text)}")
        thresholds = _thresholds(text, numbers) if colon else None
        if thresholds is None and learned:
            raise UsageError("learned_thresholds: maxmin has none; write where they begin, as in maxmin:-1,1")
        if thresholds is None:
            return lambda: ({"type": "MaxMin"}, SortedPairs())
        low, high = thresholds
        return lambda: _declared(ClippedMaxMin(low, high, learned))
    row = from_name(text)
    _refuse_sizes(text, {key: value for key, value in row.parameters.items() if value is not None})
    if learned_beta:
        if row.name != "centred_softplus":
            raise UsageError(f"learned_beta is for the activation centred_softplus, not for {quoted(text)}")
        beta = row.parameters["beta"] or 0.0
        if not beta > LEAST_BETA:
            raise UsageError(f"learned_beta begins above {LEAST_BETA:g}, and the activation is {quoted(text)}")
        if not learned:
            return lambda: _declared(CentredSoftplus(beta))
    if not learned:
        return lambda: (_entry(row), to_module(row) or Elementwise(row))
    top = row.parameters.get("high")
    if row.name != "clip" or row.parameters["low"] != 0 or top is None:
        raise UsageError(
            f"learned_thresholds: --activation {quoted(text)} has none that can be learned; use clip:0,1 or maxmin:-1,1"
        )
    return lambda: _declared(ClippedReLU(top))


def _declared(module: Derived) -> Made:
    return module.entry(), module


def _entry(row: Activation) -> dict[str, Any]:
    return {"type": row.name, **row.parameters}


def _thresholds(text: str, numbers: str) -> tuple[float, float]:
    try:
        low, high = (decimal(number) for number in numbers.split(","))
    except ValueError:
        raise UsageError(f"activation {quoted(text)}: after the colon come two thresholds, as in maxmin:-1,1") from None
    _refuse_sizes(text, {"low": low, "high": high})
    return low, high


def _refuse_sizes(text: str, numbers: dict[str, float]) -> None:
    for key, value in numbers.items():
        if value and not 1 / LARGEST_PARAMETER <= abs(value) <= LARGEST_PARAMETER:
            raise UsageError(
                f"--activation {quoted(text)}: {key} = {value:g} cannot be trained in float32; choose a size "
                f"between {1 / LARGEST_PARAMETER:g} and {LARGEST_PARAMETER:g}"
            )
