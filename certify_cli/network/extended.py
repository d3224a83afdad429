"""The network's values at samples in extended precision, rounded to float64 at the end (theory section 16).

Where float64's errors would be multiplied by the norms of too many layers, values are numbers of many digits
(`numerics.digits`): of as many as the norms of the layers behind ask for, so that fewer remain as the logits come near.
Affine maps, piecewise linear activations and group maps act on digits exactly. What is rounded is the place where a
node's digits end; and the value of any other activation, which is computed in float64: a local error of about a unit in
the last place, which the layers behind multiply still, so that deep smooth networks gain less.

Errors are bounded in the Euclidean norm of a node: e <- ||W|| e + sqrt(entries) units of the last place.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from certify_cli.network.activations import Activation
from certify_cli.network.affine import AffineOp
from certify_cli.network.graph import Concat, Network, Shape
from certify_cli.network.pooling import GroupMap
from certify_cli.network.walk import Forward, forward
from certify_cli.numerics.digits import (
    ROUNDED,
    Digits,
    digit_bits,
    digits_of,
    first_place,
    planes_of,
    product,
    total,
)
from certify_cli.numerics.rounding import UNDERFLOW, UNIT, gamma, times, up, vector_norm_up

MAX_DIGITS = 24
"""Most digits of a value, of about 20 bits; a network that would need more has the errors that these leave."""


@dataclass(frozen=True, eq=False)
class Approximation:
    """A node's digits (batch, *shape), and upper bounds (batch,) of the Euclidean norms of their errors."""

    digits: Digits
    error: Tensor


def extended_values(network: Network, x: Tensor, sizes: list[float], aim: float) -> Iterator[tuple[Tensor, Tensor]]:
    """Of every node the values at x (batch, *input_shape) and entrywise upper bounds of their errors, as float64.

    sizes: about the largest magnitude of every node's value.   aim: the Euclidean error that is wanted of the logits.
    ValueError for weights beyond `digits.LARGEST`.
    """
    bits = digit_bits(max((n.op.terms for n in network.nodes if isinstance(n.op, AffineOp)), default=1))
    lasts = iter(last_places(network, sizes, aim, bits))  # the walk asks every node's rule once, in order

    def ending(digits: Digits, last: int, *errors: Tensor) -> Approximation:
        """Digits cut off at `last`, with the parts of their error."""
        plane = digits.planes[0]
        unit = plane.new_full((len(plane),), math.ldexp(math.sqrt(plane[0].numel()), -bits * last))
        return Approximation(digits.cut(last), up(sum(errors, unit), len(errors) + 2) + UNDERFLOW)

    def affine(op: AffineOp, value: Approximation, shape: Shape) -> Approximation:
        last, h = next(lasts), value.digits
        uncertain = [] if (part := _weights_error(op, h)) is None else [part]
        return ending(_affine(op, h, last), last, times(value.error, op.quick_norm(shape)), *uncertain)

    def add(parts: list[Approximation]) -> Approximation:
        last = next(lasts)
        return ending(total([part.digits for part in parts], last), last, *(part.error for part in parts))

    def concat(op: Concat, parts: list[Approximation | None], shapes: list[Shape]) -> Approximation:
        last, present = next(lasts), [part for part in parts if part is not None]
        return ending(_concatenated(op, [part.digits for part in present]), last, *(part.error for part in present))

    def nonlinear(index: int, value: Approximation) -> Approximation:
        last, op = next(lasts), network.nodes[index].op
        if isinstance(op, GroupMap):
            shape = network.nodes[network.nodes[index].inputs[0]].shape
            lipschitz, local = op.lipschitz_constant(shape), torch.zeros_like(value.error)
            image = _extremes(op, value.digits, shape).map(lambda p: p.reshape(-1, *network.nodes[index].shape))
        elif isinstance(op, Activation):
            lipschitz = op.lipschitz
            image, errors = _activated(op, value.digits, last)
            local = vector_norm_up(errors.flatten(1))
        else:
            raise TypeError(f"no rule in digits for {type(op).__name__}")
        return ending(image, last, times(value.error, lipschitz), local)

    last = next(lasts)
    start = ending(digits_of(x, bits, last), last)
    for _, found in forward(network, 0, start, Forward(affine, add, concat, nonlinear)):
        value = found.digits.rounded()
        error = found.error.reshape(-1, *[1] * (value.dim() - 1))
        yield value, up(ROUNDED * value.abs() + error, 3) + UNDERFLOW


def last_places(network: Network, sizes: list[float], aim: float, bits: int) -> list[int]:
    """Where the digits of every node end.

    Each node may add an equal part of `aim` to the error of the logits, multiplied by the norms of the layers behind,
    and no more than float64 would with values of its size.
    """
    nodes = network.nodes
    reach = [0.0] * (len(nodes) - 1) + [1.0]
    for index in range(len(nodes) - 1, 0, -1):
        op, inputs = nodes[index].op, nodes[index].inputs
        shape, lipschitz = nodes[inputs[0]].shape, 1.0
        if isinstance(op, AffineOp):
            lipschitz = op.quick_norm(shape)
        elif isinstance(op, Activation | GroupMap):
            lipschitz = op.lipschitz_constant(shape)
        for i in inputs:
            reach[i] += reach[index] * lipschitz
    places = []
    for node, size, factor in zip(nodes, sizes, reach, strict=True):
        unit = min(aim / (len(nodes) * max(factor, 1e-290)), UNIT * size or math.inf) / math.sqrt(node.size)
        first = first_place(size, bits)
        place = math.ceil(-math.log2(min(max(unit, 1e-290), 1e290)) / bits)
        places.append(min(max(place, first), first + MAX_DIGITS - 1))
    return places


def _affine(op: AffineOp, h: Digits, last: int) -> Digits:
    """W h + b, within one unit of place `last`."""
    weight, bias = getattr(op, "weight", None), op.bias()

    def image(plane: Tensor, stacked: Tensor) -> Tensor:
        return replace(op, weight=plane).linear(stacked.flatten(0, 1)).unflatten(0, stacked.shape[:2])  # type: ignore[type-var]

    offset = None
    if bias is not None:
        shape = op.output_shape(tuple(h.planes[0].shape[1:]))
        offset = digits_of(bias, h.bits, last + 1).map(lambda plane: plane.expand(len(h.planes[0]), *shape))
    if weight is None:
        moved = h.map(op.linear)
        return moved if offset is None else total([moved, offset], last)
    # a few places more than `product` can ask for
    return product(_weight_planes(op, h.bits, last - h.first + 8), h, image, op.terms, last, offset)


def _weight_planes(op: AffineOp, bits: int, last: int) -> Iterable[tuple[int, Tensor]]:
    """The digits of an operation's weight, with what the float64 numbers leave of rounded constants."""
    weight, tail = op.weight, getattr(op, "weight_tail", None)  # type: ignore[attr-defined]
    if tail is None:
        return planes_of(weight, bits)
    parts = [weight, *(part.expand(weight.shape) for part in tail)]
    return total([digits_of(part, bits, last) for part in parts], last).places()


def _weights_error(op: AffineOp, h: Digits) -> Tensor | None:
    """Upper bound (batch,) of the norm of what rounded weights add to the error; None where they are exact.

    Each part of a tail is the rest, rounded to float64.
    """
    roundings, tail = getattr(op, "weight_error", 0), getattr(op, "weight_tail", None)
    if roundings == 0:
        return None
    relative = 2 * gamma(roundings) * UNIT ** (0 if tail is None else len(tail))
    return times(vector_norm_up(op.absolute(h.rounded().abs()).flatten(1)), 1.0 + gamma(op.terms + 4), relative)


def _concatenated(op: Concat, parts: list[Digits]) -> Digits:
    """Side by side, with zeros where one has no digits."""
    first, last = min(part.first for part in parts), max(part.last for part in parts)
    padded = [dict(part.places()) for part in parts]
    planes = [op.apply(*(p.get(place, 0 * next(iter(p.values()))) for p in padded)) for place in range(first, last + 1)]
    return Digits(planes, first, parts[0].bits)


def _extremes(op: GroupMap, h: Digits, shape: Shape) -> Digits:
    """The largest (smallest) number of every group, (batch, groups): digit by digit, among those equal so far."""
    groups = op.groups(shape)
    members = groups.members.to(h.planes[0].device)
    batch, planes = len(h.planes[0]), []
    tables = [plane.reshape(batch, groups.channels, -1)[:, :, members.clamp(min=0)] for plane in h.planes]
    alive = [(members >= 0).expand(tables[0].shape) for _ in groups.signs]
    for table in tables:
        chosen = []
        for number, sign in enumerate(groups.signs):
            candidates = (sign * table).masked_fill(~alive[number], -math.inf)
            best = candidates.amax(-1, keepdim=True)
            alive[number] = alive[number] & (candidates == best)
            chosen.append(sign * best.squeeze(-1))
        planes.append(torch.stack(chosen, dim=1).flatten(1))
    return Digits(planes, h.first, h.bits)


def _activated(op: Activation, h: Digits, last: int) -> tuple[Digits, Tensor]:
    """phi(h) within one unit of place `last`, and an entrywise bound of the error beyond that."""
    if op.intercept is None:
        return _smooth(op, h, last)
    z = h.rounded()
    kinks = [point for point in op.slope.critical_points if math.isfinite(point.abscissa)]
    # rounding keeps the order, so that z and h lie in one piece, unless z is the kink itself
    for kink in kinks:
        if kink.abscissa != 0.0 and bool((at := z == kink.abscissa).any()):
            beyond = at & (_rest(h, z) > 0)
            z = torch.where(beyond, torch.nextafter(z, torch.full_like(z, math.inf)), z)
    slope, intercept = op.slope(z), op.intercept(z)
    error = torch.zeros_like(z)
    for kink in kinks:
        # a kink whose place is rounded: the wrong line is off by the jump of the slope times the distance
        distance = kink.slack + 2 * ROUNDED * z.abs()
        near = ((z - kink.abscissa).abs() <= 2 * distance) & (kink.slack > 0)
        error = torch.where(near, error + 4 * kink.jump * distance, error)
    offset = digits_of(intercept, h.bits, last + 1) if bool(intercept.any()) else None
    if bool(((slope == 0) | (slope == 1)).all()):
        kept = h.map(lambda plane: plane * slope)
        return kept if offset is None else total([kept, offset], last), error
    return product(planes_of(slope, h.bits), h, torch.mul, 1, last, offset), error


def _smooth(op: Activation, h: Digits, last: int) -> tuple[Digits, Tensor]:
    """phi and phi' in float64 at the rounded h: phi(z + r) is phi(z) + phi'(z) r up to sup |phi''| r^2 / 2."""
    z = h.rounded()
    rest, slope = _rest(h, z), op.slope(z)
    step, distance = slope * rest, up(rest.abs(), 3)
    bend = 2 * op.lipschitz if op.curvature_range is None else (op.curvature_sup * distance).clamp(max=2 * op.lipschitz)
    error = op.value_error(z) + (op.slope_error(z) + 4 * UNIT * slope.abs() + bend) * distance
    image = total([digits_of(part, h.bits, last + 1) for part in (op.value(z), step)], last)
    return image, up(error, 8) + UNDERFLOW


def _rest(h: Digits, z: Tensor) -> Tensor:
    """h - z, of the right sign and within `ROUNDED`, for h rounded to z."""
    return total([h, digits_of(-z, h.bits, h.last)], h.last).rounded()
