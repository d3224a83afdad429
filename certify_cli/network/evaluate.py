"""The network's values at a sample, with proved bounds of their rounding errors (theory sections 6 and 10).

The bounds are entrywise, for float64: with E the error of its input, an affine node has |W| E + gamma_(k+1)
(|W| |h| + |b|), an activation s E plus its row's evaluation error. They hold for dot products summed in any order, with
or without fused multiply-add; `exact_kernels` switches off the kernels for which they do not (TF32, Winograd and FFT
convolution). E grows with depth; samples whose margin it would spoil are evaluated again in extended precision
(`extended`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from certify_cli.network.activations import Activation
from certify_cli.network.affine import AffineOp
from certify_cli.network.extended import extended_values
from certify_cli.network.graph import Add, Concat, Network, Op, Shape
from certify_cli.network.pooling import GroupMap
from certify_cli.network.walk import Forward, forward
from certify_cli.numerics.digits import LARGEST
from certify_cli.numerics.rounding import UNDERFLOW, UNIT, carries_gradient, gamma, up
from certify_cli.numerics.trees import Batched, joined

SAFETY = 1.001
"""Covers the rounding of the error bounds, which are sums of non-negative terms: relative error far below 0.1 %."""

NEGLIGIBLE = 1e-7
"""An error of this part of the margin is not worth a second evaluation."""

RESOLVED = 1e-12
"""Margins are not told apart more closely than this part of the largest logit."""

ENTRIES_AT_ONCE = 2**21
"""Entries of the largest node that are evaluated together in extended precision, some fifty float64 numbers each."""

WithError = tuple[Tensor, Tensor]
"""A node's value and an upper bound of its error, (batch, *shape) each."""


@contextmanager
def exact_kernels() -> Iterator[None]:
    """Context in which torch uses plain dot products only, no TF32 and no cuDNN; without gradients."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=False), torch.no_grad():
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


@dataclass(frozen=True, eq=False)
class Evaluation(Batched):
    """Every node's value (batch, *shape), and upper bounds of |computed - exact| of the same shape."""

    values: list[Tensor]
    errors: list[Tensor]

    @property
    def logits(self) -> Tensor:
        return self.values[-1]

    @property
    def logit_errors(self) -> Tensor:
        return self.errors[-1]


def evaluate(network: Network, x: Tensor) -> Evaluation:
    """Values and error bounds of every node at x (batch, *input_shape), taken as exact float64 numbers.

    In float64, and once more in extended precision for samples whose smallest margin has a larger error than NEGLIGIBLE
    of it, or than RESOLVED of the largest logit where the margin is tiny. Not for networks whose weights carry a
    gradient: training takes values, no claims.
    """
    found = evaluate_in_float64(network, x)
    if carries_gradient(found.logits):
        return found
    crude = _crude(network, found)
    if len(crude) == 0:
        return found
    at_once = max(1, ENTRIES_AT_ONCE // max(node.size for node in network.nodes))
    again: Evaluation = joined(_extended(network, x[rows], found.at(rows)) for rows in crude.split(at_once))
    better = again.logit_errors.amax(1) < found.logit_errors[crude].amax(1)
    return found.put(crude[better], again.at(better.nonzero().squeeze(1)))


def _extended(network: Network, x: Tensor, near: Evaluation) -> Evaluation:
    """The samples in extended precision, near what float64 gave."""
    sizes = [float(value.abs().max()) for value in near.values]
    aim = UNIT / 4 * float(near.logits.abs().amax(1).min())
    values, errors = zip(*extended_values(network, x, sizes, aim), strict=True)
    return Evaluation(list(values), list(errors))


def _crude(network: Network, found: Evaluation) -> Tensor:
    """The samples that extended precision is for: not those with numbers that it has no digits for."""
    largest = found.logits.abs().amax(1)
    top = found.logits.topk(min(2, found.logits.shape[1]), dim=1).values
    allowed = torch.maximum(NEGLIGIBLE * (top[:, 0] - top[:, -1]), RESOLVED * largest)
    crude = (largest > 0) & ~(found.logit_errors.amax(1) <= allowed)
    if not bool(crude.any()):
        return crude.nonzero().squeeze(1)
    for value in found.values:
        crude = crude & (value.abs() <= LARGEST / 2).flatten(1).all(1)
    slopes = [node.op.lipschitz for node in network.nodes if isinstance(node.op, Activation)]
    if max(slopes, default=0.0) > LARGEST or not all(bool((t.abs() <= LARGEST).all()) for t in network.constants):
        crude = torch.zeros_like(crude)
    return crude.nonzero().squeeze(1)


def evaluate_in_float64(network: Network, x: Tensor) -> Evaluation:
    """`evaluate` without extended precision."""

    def bounded(value: Tensor, error: Tensor) -> WithError:
        return value, error * SAFETY + UNDERFLOW

    def affine(op: AffineOp, given: WithError, shape: Shape) -> WithError:
        h, e = given
        terms, bias = op.absolute(h.abs() + e), op.bias()
        if bias is not None:
            terms = terms + bias.abs()
        return bounded(op.apply(h), op.absolute(e) + gamma(op.terms + 1) * terms)

    def add(parts: list[WithError]) -> WithError:
        total = torch.stack([h.abs() + e for h, e in parts]).sum(0)
        error = Add().apply(*(e for _, e in parts)) + gamma(len(parts)) * total
        return bounded(Add().apply(*(h for h, _ in parts)), error)

    def concat(op: Concat, parts: list[WithError | None], shapes: list[Shape]) -> WithError:
        values, errors = zip(*(part for part in parts if part is not None), strict=True)
        return bounded(op.apply(*values), op.apply(*errors))

    def nonlinear(index: int, given: WithError) -> WithError:
        (h, e), op = given, network.nodes[index].op
        if isinstance(op, Activation):
            return bounded(op.apply(h), op.lipschitz * e + op.value_error(h))
        return bounded(op.apply(h), _group_error(op, e))

    found = forward(network, 0, (x, torch.zeros_like(x)), Forward(affine, add, concat, nonlinear))
    values, errors = zip(*(pair for _, pair in found), strict=True)
    return Evaluation(list(values), list(errors))


def deviation(network: Network) -> Tensor:
    """Upper bound (classes,) of |deployed logit - exact logit| at any input.

    The bounds concern the exact activations; a deployed operator may differ from them, as torch's softplus returns z
    beyond its threshold (theory section 0).
    """
    if not any(getattr(node.op, "deviation", 0.0) for node in network.nodes):
        return torch.zeros(network.classes, dtype=torch.float64, device=network.device)

    def concat(op: Concat, parts: list[Tensor | None], shapes: list[Shape]) -> Tensor:
        return op.apply(*(part for part in parts if part is not None)) * SAFETY

    def nonlinear(index: int, error: Tensor) -> Tensor:
        op = network.nodes[index].op
        if isinstance(op, Activation):
            return op.lipschitz * error * SAFETY + op.deviation
        return _group_error(op, error) * SAFETY

    def affine(op: AffineOp, error: Tensor, shape: Shape) -> Tensor:
        return op.absolute(error) * SAFETY

    rules = Forward(affine, lambda parts: Add().apply(*parts) * SAFETY, concat, nonlinear)
    none = torch.zeros(1, *network.input_shape, dtype=torch.float64, device=network.device)
    *_, (_, error) = forward(network, 0, none, rules)
    return error[0]


def _group_error(op: Op, error: Tensor) -> Tensor:
    """Bound of a group map's error from that of its input: |max a - max b| <= max |a - b|."""
    if not isinstance(op, GroupMap):
        raise TypeError(f"no rounding rule for {type(op).__name__}")
    return op.largest_change(error)


def margins(logits: Tensor, errors: Tensor, prediction: Tensor) -> tuple[Tensor, Tensor]:
    """Margins z_y - z_i towards every class i, 0 at i = y, and upper bounds of their errors; both (batch, classes)."""
    top = logits.gather(1, prediction.unsqueeze(1))
    top_error = errors.gather(1, prediction.unsqueeze(1))
    value = top - logits
    return value, up(top_error + errors + UNIT * value.abs(), 4)
