"""Fuses decomposed activations into one node.

Exporters write SiLU as `Sigmoid, Mul` and GELU as five to nine nodes. A product of two values that depend on the input
cannot be bounded; one node is a row of the activation table. A pattern is the activation's formula. Products and sums
are matched in any order and grouping, with `Div` by a constant and `Pow` by a whole number as products and `Sub` of a
constant as a sum, so that one formula covers every decomposition.

Constants are compared exactly, except those that no float32 holds (`approximately`). These may have a relative error up
to TOLERANCE, and the pattern states its effect on the activation's value: at most `effect` times the sum of the
relative errors. The product becomes the activation's `deviation`, which is subtracted from every margin.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from onnx import NodeProto, helper

from certify_cli.network.activations import ACTIVATIONS, Activation
from certify_cli.numerics.rounding import UNIT

TOLERANCE = 1e-6
"""float32 keeps 6e-8; exporters that write decimals keep seven digits."""

DEPTH = 10
"""Number of nodes between a pattern's last one and its argument, at most."""


@dataclass(frozen=True)
class X:
    """The activation's argument."""


@dataclass(frozen=True)
class Number:
    """A constant: `value` within `tolerance`; or a parameter (`name`) that binds, or 1 over a bound one."""

    value: float | None = None
    tolerance: float = 0.0
    name: str | None = None
    inverse: bool = False


@dataclass(frozen=True)
class Call:
    """One operator with its operands in order, and the attributes (name, number, ONNX's default) that it must have."""

    operator: str
    operands: tuple[Pattern, ...]
    attributes: tuple[tuple[str, Number, float], ...] = ()


@dataclass(frozen=True)
class Product:
    """constant * factors, in any order and grouping."""

    constant: Number
    factors: tuple[Pattern, ...]


@dataclass(frozen=True)
class Sum:
    """constant + terms, in any order and grouping."""

    constant: Number
    terms: tuple[Pattern, ...]


Pattern = X | Number | Call | Product | Sum


@dataclass(frozen=True)
class Row:
    """The formula of one activation, which binds its parameters.   effect: see the module's docstring."""

    activation: str
    formula: Pattern
    effect: float = 0.0


x = X()
ONE = Number(1.0)
ZERO = Number(0.0)
HALF = Number(0.5)


def approximately(value: float) -> Number:
    """A constant of the formula: `value` within the relative error TOLERANCE."""
    return Number(value, TOLERANCE)


def _in_any_order(operator: str, first: Pattern, second: Pattern) -> tuple[Call, Call]:
    return Call(operator, (first, second)), Call(operator, (second, first))


def _clamps() -> list[Call]:
    """A value clipped to two constants, written with Max and Min."""
    found: list[Call] = []
    for (inner, near), (outer, far) in ((("Max", "low"), ("Min", "high")), (("Min", "high"), ("Max", "low"))):
        for within in _in_any_order(inner, X(), Number(name=near)):
            found += _in_any_order(outer, within, Number(name=far))
    return found


_scaled = Product(Number(name="beta"), (x,))
_softplus = Product(Number(name="beta", inverse=True), (Call("Softplus", (_scaled,)),))
_tanh_argument = Sum(ZERO, (x, Product(approximately(0.044715), (x, x, x))))

ROWS: tuple[Row, ...] = (
    Row("silu", Product(ONE, (x, Call("Sigmoid", (x,))))),
    Row("mish", Product(ONE, (x, Call("Tanh", (Call("Softplus", (x,)),))))),
    Row("softsign", Call("Div", (x, Sum(ONE, (Call("Abs", (x,)),))))),
    Row("log_sigmoid", Call("Log", (Call("Sigmoid", (x,)),))),
    # |x phi'(x sqrt(1/2) (1 + e))| |e|: sup x^2 exp(-x^2/2) / sqrt(2 pi) = 0.2936
    Row(
        "gelu",
        Product(HALF, (x, Sum(ONE, (Call("Erf", (Product(approximately(math.sqrt(0.5)), (x,)),)),)))),
        effect=0.3,
    ),
    # u the tanh's argument, |x| <= |u| / sqrt(2/pi): sup u^2 sech^2(u) / (2 sqrt(2/pi)) = 0.2753
    Row(
        "gelu_tanh",
        Product(
            HALF, (x, Sum(ONE, (Call("Tanh", (Product(approximately(math.sqrt(2 / math.pi)), (_tanh_argument,)),)),)))
        ),
        effect=0.3,
    ),
    # torch's softplus, which is the identity above the threshold
    Row("softplus", Call("Where", (Call("Greater", (_scaled, Number(name="threshold"))), x, _softplus))),
    Row("softplus", _softplus),
    *(Row("clip", clamp) for clamp in _clamps()),
    # x * clip(a x + 1/2, 0, 1): the error of a enters as x^2 |a - 1/6| where |x| <= 3 (1 + 1e-6), and nowhere else
    Row(
        "hard_swish",
        Product(ONE, (x, Call("HardSigmoid", (x,), (("alpha", approximately(1 / 6), 0.2), ("beta", HALF, 0.5))))),
        effect=1.6,
    ),
)


def fuse(
    node: NodeProto, producers: Mapping[str, NodeProto], constants: Mapping[str, Any]
) -> tuple[Activation, str] | None:
    """The activation that ends in `node`, and the name of its argument; None where no row matches.

    `producers` maps each value to the node that computes it, `constants` each constant to its array.
    """
    graph = _Graph(producers, constants)
    rows = [row for row in ROWS if _last_operators(row.formula) & {node.op_type}]
    if not rows:
        return None
    candidates = graph.above(node)
    for row in rows:
        for argument in candidates:
            match = _Match(graph, argument)
            if match.matches(row.formula, node.output[0]):
                activation = ACTIVATIONS[row.activation](**match.parameters)
                # the second-order part of the effect is below TOLERANCE times the first
                extra = row.effect * match.error * (1 + 4 * TOLERANCE)
                return replace(activation, deviation=activation.deviation + extra), argument
    return None


def _last_operators(formula: Pattern) -> set[str]:
    if isinstance(formula, Call):
        return {formula.operator}
    return {"Mul", "Div"} if isinstance(formula, Product) else {"Add", "Sub"}


@dataclass(frozen=True)
class _Graph:
    producers: Mapping[str, NodeProto]
    constants: Mapping[str, Any]

    def scalar(self, name: str) -> float | None:
        """The value of a constant whose entries are all the same."""
        array = self.constants.get(name)
        if array is None or np.size(array) == 0 or np.ptp(array) != 0:
            return None
        return float(np.ravel(array)[0])

    def above(self, node: NodeProto) -> list[str]:
        """The values that are not constant, nearest first, within DEPTH nodes above `node`."""
        seen: dict[str, None] = {}
        layer = [node]
        for _ in range(DEPTH):
            names = [name for producer in layer for name in producer.input if name and name not in self.constants]
            layer = [self.producers[name] for name in names if name in self.producers and name not in seen]
            seen.update(dict.fromkeys(names))
        return list(seen)


class _Match:
    """One attempt to match with a given argument; binds parameters and sums the relative errors of constants."""

    def __init__(self, graph: _Graph, argument: str) -> None:
        self.graph, self.argument = graph, argument
        self.parameters: dict[str, float] = {}
        self.error = 0.0

    def matches(self, pattern: Pattern, name: str) -> bool:
        if isinstance(pattern, X):
            return name == self.argument
        if isinstance(pattern, Number):
            value = self.graph.scalar(name)
            return value is not None and self._number(pattern, value, 1.0)
        if isinstance(pattern, Call):
            return self._call(pattern, name)
        if isinstance(pattern, Product):
            above, below, factors = self._factors(name)
            return self._number(pattern.constant, above, below) and self._parts(pattern.factors, factors)
        constant, terms = self._terms(name)
        return self._number(pattern.constant, constant, 1.0) and self._parts(pattern.terms, terms)

    def _number(self, wanted: Number, above: float, below: float) -> bool:
        """Whether above/below is the wanted number, exactly where no tolerance is given."""
        if wanted.name is not None and wanted.inverse:
            return above == 1.0 and below == self.parameters.get(wanted.name, below) and self._bind(wanted.name, below)
        if wanted.name is not None:
            return below == 1.0 and self._bind(wanted.name, above)
        value = float(wanted.value or 0.0)
        if wanted.tolerance == 0:
            return above == value * below
        error = abs(above / below - value) / abs(value)
        self.error += error + 4 * UNIT
        return error <= wanted.tolerance

    def _bind(self, name: str, value: float) -> bool:
        return self.parameters.setdefault(name, value) == value

    def _call(self, pattern: Call, name: str) -> bool:
        producer = self.graph.producers.get(name)
        if name == self.argument or producer is None or producer.op_type != pattern.operator:
            return False
        attributes = {a.name: helper.get_attribute_value(a) for a in producer.attribute}
        return (
            len(producer.input) == len(pattern.operands)
            and all(self._number(n, attributes.get(key, usual), 1.0) for key, n, usual in pattern.attributes)
            and all(self.matches(p, value) for p, value in zip(pattern.operands, producer.input, strict=True))
        )

    def _parts(self, patterns: tuple[Pattern, ...], names: list[str]) -> bool:
        """Whether the values match the patterns one to one, in some order."""
        if len(patterns) != len(names):
            return False
        if not patterns:
            return True
        first, rest = patterns[0], patterns[1:]
        for i, name in enumerate(names):
            saved = dict(self.parameters), self.error
            if self.matches(first, name) and self._parts(rest, names[:i] + names[i + 1 :]):
                return True
            self.parameters, self.error = saved
        return False

    def _factors(self, name: str) -> tuple[float, float, list[str]]:
        """The value as above/below * factors; products are expanded down to the argument."""
        scalar = self.graph.scalar(name)
        if scalar is not None:
            return scalar, 1.0, []
        producer = None if name == self.argument else self.graph.producers.get(name)
        if producer is not None and producer.op_type == "Mul":
            left, right = (self._factors(value) for value in producer.input)
            return left[0] * right[0], left[1] * right[1], left[2] + right[2]
        if producer is not None and producer.op_type == "Div" and (divisor := self.graph.scalar(producer.input[1])):
            above, below, factors = self._factors(producer.input[0])
            return above, below * divisor, factors
        if producer is not None and producer.op_type == "Pow":
            power = self.graph.scalar(producer.input[1])
            if power in (2.0, 3.0):
                above, below, factors = self._factors(producer.input[0])
                return above ** int(power), below ** int(power), factors * int(power)
        return 1.0, 1.0, [name]

    def _terms(self, name: str) -> tuple[float, list[str]]:
        """The value as constant + terms; sums are expanded down to the argument."""
        scalar = self.graph.scalar(name)
        if scalar is not None:
            return scalar, []
        producer = None if name == self.argument else self.graph.producers.get(name)
        if producer is not None and producer.op_type == "Add":
            left, right = (self._terms(value) for value in producer.input)
            return left[0] + right[0], left[1] + right[1]
        if (
            producer is not None
            and producer.op_type == "Sub"
            and (taken := self.graph.scalar(producer.input[1])) is not None
        ):
            constant, terms = self._terms(producer.input[0])
            return constant - taken, terms
        return 0.0, [name]
