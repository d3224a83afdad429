"""The type of an activation, and the table in which `rows` enters its rows.

Import from `certify_cli.network.activations`, not from here: without `rows` the table is empty.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from certify_cli.errors import ModelError, UsageError, quoted, shown
from certify_cli.network.activations.monotone_pieces import Curve, differentiable
from certify_cli.network.graph import Nonlinear, Shape
from certify_cli.plain import decimal


@dataclass(frozen=True, eq=False)
class Activation(Nonlinear):
    """An elementwise function phi with its derivatives and their ranges, rounded outward.

    value, slope, curvature: phi, phi' and phi'', which map a tensor entrywise, in any float dtype (errors are stated
        for float64). `curvature` is None where phi' jumps, as in ReLU; where only phi'' jumps (ELU, softsign), its
        ranges contain both sides.
    third_sup: upper bound of sup |phi'''| on the open pieces between jumps.
    deviation: upper bound of sup |deployed - phi|, where the deployed operator is known to differ from phi.
    intercept: of a piecewise linear phi, which is slope(z) z + intercept(z), both float64 numbers.

    Autograd through the |z| of the safe formulas goes wrong at z = 0: `apply` and `slope_at` take derivatives from
    `slope` and `curvature`.
    """

    value: Curve
    slope: Curve
    curvature: Curve | None = None
    third_sup: float | None = None
    deviation: float = 0.0
    intercept: Callable[[Tensor], Tensor] | None = None
    name: str = ""
    parameters: dict[str, float | None] = field(default_factory=dict)

    @property
    def title(self) -> str:
        shown = ", ".join(f"{key}={value:g}" for key, value in self.parameters.items() if value is not None)
        return f"{self.name}({shown})" if shown else self.name

    def output_shape(self, *shapes: Shape) -> Shape:
        return shapes[0]

    def apply(self, *values: Tensor) -> Tensor:
        return differentiable(values[0], self.value, self.slope_at)

    def slope_at(self, z: Tensor) -> Tensor:
        """phi'(z), with phi'' as its derivative (0 where phi' jumps)."""
        return differentiable(z, self.slope, self.curvature or torch.zeros_like)

    @property
    def slope_range(self) -> tuple[float, float]:
        """Range of phi' on the real line."""
        return self.slope.range

    @property
    def curvature_range(self) -> tuple[float, float] | None:
        """Range of phi'' on the real line, or None where phi' jumps."""
        return None if self.curvature is None else self.curvature.range

    @property
    def lipschitz(self) -> float:
        """sup |phi'|, rounded up."""
        return max(map(abs, self.slope_range))

    def lipschitz_constant(self, shape: Shape) -> float:
        return self.lipschitz

    @property
    def curvature_sup(self) -> float:
        """sup |phi''|, rounded up; infinite where phi' jumps."""
        return math.inf if self.curvature is None else max(map(abs, self.curvature.range))

    @property
    def kinks(self) -> tuple[float, ...]:
        """Where the slope jumps."""
        return tuple(point.abscissa for point in self.slope.critical_points if point.jump)

    @property
    def piecewise_linear(self) -> bool:
        """Whether phi has kinks and is linear between them."""
        return bool(self.kinks) and self.slope.relative == self.slope.absolute == 0.0

    def value_error(self, z: Tensor) -> Tensor:
        """Upper bound of |value(z) - phi(z)|, entrywise, for float64 numbers z."""
        return self.value.error(z)

    def slope_error(self, z: Tensor) -> Tensor:
        """Upper bound of |slope(z) - phi'(z)|; at a jump either side counts as exact."""
        return self.slope.error(z)

    def value_on(self, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
        """Lower and upper bounds of phi over [lo, hi], entrywise, rounded outward (see `Curve.on`)."""
        return self.value.on(lo, hi)

    def slope_on(self, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
        """Lower and upper bounds of phi' over [lo, hi], entrywise, rounded outward."""
        return self.slope.on(lo, hi)

    def curvature_on(self, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
        """Lower and upper bounds of phi'' over [lo, hi], entrywise, rounded outward; ValueError where phi' jumps."""
        if self.curvature is None:
            raise ValueError(f"the slope of {self.title} jumps: it has no curvature (test `curvature_range` first)")
        return self.curvature.on(lo, hi)


@dataclass(frozen=True)
class Spelling:
    """How a torch module or an ONNX operator spells a row.

    parameters: the row's parameter -> the attribute that holds it.   requires: attributes that must have these values.
    defaults: values of attributes that are absent.
    """

    parameters: dict[str, str]
    requires: dict[str, Any]
    defaults: dict[str, Any]

    def read(self, attributes: Mapping[str, Any]) -> dict[str, Any] | None:
        """The row's parameters, or None if a required attribute has another value."""
        given = {**self.defaults, **attributes}
        if any(given.get(key) != value for key, value in self.requires.items()):
            return None
        return {parameter: given[key] for parameter, key in self.parameters.items() if key in given}


def spelled(
    *, requires: dict[str, Any] | None = None, defaults: dict[str, Any] | None = None, **parameters: str
) -> Spelling:
    """`spelled(negative_slope="alpha")`: the row's `negative_slope` is the operator's attribute `alpha`."""
    return Spelling(parameters, requires or {}, defaults or {})


ACTIVATIONS: dict[str, Callable[..., Activation]] = {}
"""Name -> builder. `ACTIVATIONS[a.name](**a.parameters)` rebuilds `a`."""

_MODULES: dict[type[nn.Module], list[tuple[str, Spelling]]] = {}
_OPERATORS: dict[str, list[tuple[str, Spelling]]] = {}


def row(
    *, modules: Mapping[type[nn.Module], Spelling] | None = None, onnx: Mapping[str, Spelling] | None = None
) -> Callable[[Callable[..., Activation]], Callable[..., Activation]]:
    """Enter the decorated rule under its own name, with its spellings; ValueError for a second entry."""

    def enter(rule: Callable[..., Activation]) -> Callable[..., Activation]:
        name, signature = rule.__name__, inspect.signature(rule)
        if name in ACTIVATIONS:
            raise ValueError(f"activation {name} is entered twice")

        @wraps(rule)
        def build(*args: Any, **kwargs: Any) -> Activation:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            parameters = {key: None if v is None else float(v) for key, v in bound.arguments.items()}
            for key, number in parameters.items():
                if number is not None and not math.isfinite(number):
                    raise ModelError(f"{name} with {key}={number} is not a function: give {key} a finite number")
            return replace(rule(**parameters), name=name, parameters=parameters)

        ACTIVATIONS[name] = build
        for kind, spelling in (modules or {}).items():
            _MODULES.setdefault(kind, []).append((name, spelling))
        for operator, spelling in (onnx or {}).items():
            _OPERATORS.setdefault(operator, []).append((name, spelling))
        return build

    return enter


def from_module(module: nn.Module) -> Activation | None:
    """The row of a torch.nn module; None unless its type is exactly a known one (a subclass may compute anything).

    ModelError where the type is known and its parameters cannot be used.
    """
    spellings = _MODULES.get(type(module), [])
    keys = {key for _, s in spellings for key in (*s.parameters.values(), *s.requires)}
    return _build(spellings, {key: getattr(module, key) for key in keys})


def to_module(activation: Activation) -> nn.Module | None:
    """A torch.nn module that computes the row's values, with the parameters that the row sets; None without one."""
    given = {key: value for key, value in activation.parameters.items() if value is not None}
    for kind, spellings in _MODULES.items():
        for name, spelling in spellings:
            if name != activation.name or not given.keys() <= spelling.parameters.keys():
                continue
            arguments = {spelling.parameters[key]: value for key, value in given.items()} | spelling.requires
            if not arguments.keys() <= inspect.signature(kind).parameters.keys():  # a special case, such as ReLU6
                continue
            module = kind(**arguments)
            found = from_module(module)
            if found is not None and given.items() <= found.parameters.items():
                return module
    return None


def from_onnx(operator: str, attributes: Mapping[str, Any]) -> Activation | None:
    """The row of an ONNX operator of the default domain, or None. ModelError as in `from_module`.

    attributes: as Python numbers and text; Clip's optional inputs count as attributes `min` and `max`.
    """
    return _build(_OPERATORS.get(operator, []), attributes)


def _build(spellings: list[tuple[str, Spelling]], attributes: Mapping[str, Any]) -> Activation | None:
    for name, spelling in spellings:
        parameters = spelling.read(attributes)
        if parameters is not None:
            return ACTIVATIONS[name](**parameters)
    return None


def from_name(text: str) -> Activation:
    """An activation as written on the command line or in a spec: `tanh`, `softplus:5`, `clip:0,6`.

    Numbers after the colon are the row's parameters in order. UsageError for anything that is not a row.
    """
    name, colon, numbers = text.strip(" ").partition(":")
    builder = ACTIVATIONS.get(name.lower().replace("-", "_"))
    if builder is None:
        raise UsageError(f"unknown activation {quoted(name)}: choose one of {', '.join(sorted(ACTIVATIONS))}")
    try:
        arguments = [decimal(number) for number in numbers.split(",")] if colon else []
    except ValueError as error:
        raise UsageError(f"activation {quoted(text)}: after the colon comes a number, as in softplus:5") from error
    accepted = list(inspect.signature(builder).parameters.values())
    required = sum(parameter.default is parameter.empty for parameter in accepted)
    if not required <= len(arguments) <= len(accepted):
        listing = ", ".join(parameter.name for parameter in accepted) or "none"
        raise UsageError(f"activation {quoted(text)} has the wrong number of parameters: {shown(name)} takes {listing}")
    try:
        return builder(*arguments)
    except ModelError as error:
        raise UsageError(str(error)) from error
