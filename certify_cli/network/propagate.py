"""A network whose nonlinear nodes are replaced by slopes: tangents pushed forward, cotangents pulled back.

With slopes s_l at the nonlinear nodes the network is linear; `jvp` sends vectors from one node to every later
pre-activation (columns of A_l and B_lk in theory's notation), `vjp` sends vectors from the logits back to every
nonlinear node's output and to the input (rows v_l and g). A nonlinear node without a slope is cut: nothing passes.

Each vector carries a bound of the Euclidean norm of its rounding error (theory section 10, rule 1):
E <- ||W|| E + gamma_k ||W||_F ||vector|| through an affine node, s E + ||slope error o vector|| through a slope.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from typing import Protocol

import torch
from torch import Tensor

from certify_cli.network.affine import AffineOp
from certify_cli.network.graph import Add, Concat, Network, Node, Nonlinear, Shape
from certify_cli.network.movement import Select
from certify_cli.network.walk import Backward, Forward, backward, forward
from certify_cli.numerics.rounding import UNDERFLOW, UNIT, gamma, next_above, next_below, number, up, vector_norm_up
from certify_cli.numerics.trees import Batched


@dataclass(frozen=True, eq=False)
class Slope:
    """One node's slopes: `value` (batch or 1, *shape) and an entrywise bound `error` of |value - intended| (or 0)."""

    value: Tensor | float
    error: Tensor | float = 0.0

    @property
    def largest(self) -> float:
        values = self.value.abs().max() if isinstance(self.value, Tensor) else abs(self.value)
        errors = self.error.max() if isinstance(self.error, Tensor) else self.error
        return up((number(values) if isinstance(values, Tensor) else values) + float(errors), 2)

    def push(self, vectors: Vectors) -> Vectors:
        """The `NodeJvp`."""
        return _scaled(vectors, self)

    def back(self, vectors: Vectors) -> Vectors:
        """The `NodeVjp` that is the same for every row."""
        value = self.value.unsqueeze(1) if isinstance(self.value, Tensor) else self.value
        error = self.error.unsqueeze(1) if isinstance(self.error, Tensor) else self.error
        return _scaled(vectors, Slope(value, error))

    def row_error(self, size: Tensor, error: Tensor) -> Tensor:
        """Upper bounds (batch, rows) of the Euclidean errors of rows times these slopes.

        size, error: (batch or 1, rows), of the rows as computed: norms, up, and bounds of their errors.
        """
        largest, off = (t.unsqueeze(1) if isinstance(t, Tensor) else t for t in self._largest(1))
        return _scaled_error(largest, off, size, error)

    def _largest(self, dims: int) -> tuple[Tensor | float, Tensor | float]:
        """The largest slope and the largest error (*batch), `dims` axes of it."""
        return _largest(self.value, dims), _largest(self.error, dims)


@dataclass(frozen=True, eq=False)
class Vectors(Batched):
    """`value` (*batch, *shape) and `error` (*batch): a bound of the Euclidean error of each vector."""

    value: Tensor
    error: Tensor

    @cached_property
    def size(self) -> Tensor:
        """Euclidean norm of each computed vector, up: (*batch)."""
        return vector_norm_up(self.value.flatten(self.error.dim()))

    def __add__(self, other: Vectors) -> Vectors:
        total = Vectors(self.value + other.value, self.error)
        return Vectors(total.value, up(self.error + other.error + UNIT * total.size, 4))


Slopes = Mapping[int, Slope]


class NodeVjp(Protocol):
    """What a nonlinear node that was made linear does to vectors that arrive at its output."""

    def back(self, vectors: Vectors) -> Vectors:
        """(batch or 1, rows, *shape of the node) to (batch, rows, *shape of its input)."""


class NodeJvp(Protocol):
    """What a nonlinear node that was made linear does to vectors that arrive at its input."""

    def push(self, vectors: Vectors) -> Vectors:
        """(batch, *shape of the input) to (batch, *shape of the node)."""


@dataclass(frozen=True, eq=False)
class Winners:
    """A group map made linear: each output is the input entry that is the largest, or smallest, at the sample.

    select: of these entries.   shape: of the map's input.
    """

    select: Select
    shape: Shape

    @property
    def norm(self) -> float:
        """Of the selection, up. At a tie one entry may win twice: it can exceed the map's Lipschitz constant."""
        return self.select.norm(self.shape)

    def push(self, vectors: Vectors) -> Vectors:
        return Vectors(self.select.linear(vectors.value), up(self.norm * vectors.error))


def is_nonlinear(node: Node) -> bool:
    """Whether a node is an activation or a group map."""
    return isinstance(node.op, Nonlinear)


def nonlinear_nodes(network: Network) -> tuple[int, ...]:
    """Indices of the nonlinear nodes, in topological order."""
    return tuple(i for i, node in enumerate(network.nodes) if is_nonlinear(node))


def pre_activation(network: Network, index: int) -> int:
    """The node that holds the pre-activation of nonlinear node `index`."""
    return network.nodes[index].inputs[0]


def consumers(network: Network, target: int) -> tuple[int, ...]:
    """The nonlinear nodes whose pre-activation is node `target`."""
    return tuple(i for i in nonlinear_nodes(network) if pre_activation(network, i) == target)


def pre_activations(network: Network) -> tuple[int, ...]:
    """Every nonlinear node's pre-activation, then the logits, in topological order and without repetition."""
    found = {pre_activation(network, i) for i in nonlinear_nodes(network)} | {len(network.nodes) - 1}
    return tuple(sorted(found))


def ancestors(network: Network, target: int) -> frozenset[int]:
    """All nodes that lead to node `target`, and itself."""
    found = {target}
    for index in range(target, 0, -1):
        if index in found:
            found.update(network.nodes[index].inputs)
    return frozenset(found)


def jvp(
    network: Network, source: int, tangents: Tensor, node_jvps: Mapping[int, NodeJvp], last: int | None = None
) -> dict[int, Vectors]:
    """Images of tangents (batch, *shape of node `source`) at every later pre-activation node that they reach.

    node_jvps: of the nonlinear nodes, slopes for instance; one without is cut.
    last: the last node that is computed, the logits unless given.
    """

    def affine(op: AffineOp, vectors: Vectors, shape: Shape) -> Vectors:
        return through_affine(op, vectors, shape, op.linear(vectors.value))

    def concat(op: Concat, parts: list[Vectors | None], shapes: list[Shape]) -> Vectors:
        error = torch.stack([part.error for part in parts if part is not None]).sum(0)
        values = _or_zeros([None if part is None else part.value for part in parts], shapes)
        return Vectors(op.apply(*values), up(error, sum(part is not None for part in parts)))

    def nonlinear(index: int, vectors: Vectors) -> Vectors | None:
        return node_jvps[index].push(vectors) if index in node_jvps else None

    rules = Forward(affine, lambda parts: reduce(Vectors.__add__, parts), concat, nonlinear)
    wanted = set(pre_activations(network))
    exact = Vectors(tangents, torch.zeros(len(tangents), dtype=tangents.dtype, device=tangents.device))
    among = None if last is None else range(source, last + 1)
    return {index: image for index, image in forward(network, source, exact, rules, among) if index in wanted}


def _or_zeros(parts: list[Tensor | None], shapes: list[Shape]) -> list[Tensor]:
    """The parts, zeros (batch, *shape) in place of those that are missing."""
    given = next(part for part in parts if part is not None)
    return [given.new_zeros(len(given), *s) if p is None else p for p, s in zip(parts, shapes, strict=True)]


def through_affine(op: AffineOp, vectors: Vectors, shape: tuple[int, ...], image: Tensor) -> Vectors:
    """The image of vectors under a linear map or its transpose (their norms agree), with the bound of its error."""
    return Vectors(image, affine_error(op, vectors.size, vectors.error, shape))


def affine_error(op: AffineOp, size: Tensor, error: Tensor, shape: Shape) -> Tensor:
    """Upper bounds of the Euclidean errors of vectors' images; size, error: the vectors' norms, up, and errors."""
    rounding = gamma(op.terms) * op.frobenius_norm(shape) if op.terms else 0.0
    error = up(op.norm(shape) * error + rounding * size, 4)
    return error + UNDERFLOW if op.terms else error


def _scaled(vectors: Vectors, slope: Slope) -> Vectors:
    """The product with slopes that broadcast to the vectors.

    The vectors' own error e enters the bound as ||e o vector|| <= max e ||vector||.
    """
    error = _scaled_error(*slope._largest(vectors.error.dim()), vectors.size, vectors.error)
    return Vectors(vectors.value * slope.value, error)


def _scaled_error(largest: Tensor | float, off: Tensor | float, size: Tensor, error: Tensor) -> Tensor:
    return up((largest + off) * error + (UNIT * largest + off) * size, 8) + UNDERFLOW


def _largest(slopes: Tensor | float, dims: int) -> Tensor | float:
    """Of each sample by itself: one that overflowed must not spoil its neighbours in the batch."""
    return slopes.abs().flatten(dims).amax(-1) if isinstance(slopes, Tensor) else abs(slopes)


def vjp(
    network: Network, cotangents: Tensor, node_vjps: Mapping[int, NodeVjp], start: int | None = None
) -> dict[int, Vectors]:
    """Cotangents (batch, rows, *shape of node `start`) pulled back to every nonlinear node's output and the input.

    start: the logits unless given. node_vjps: of the nonlinear nodes; one without is cut. Cotangents of batch 1 serve
    all samples, and vectors keep batch 1 until they meet a node_vjp of more. Returns vectors (batch or 1, rows, *shape)
    by node; node 0 is always there, zeros if nothing arrives.
    """

    def affine(index: int, op: AffineOp, vectors: Vectors, shape: Shape) -> Vectors:
        batch, rows = vectors.error.shape
        image = op.transpose(vectors.value.flatten(0, 1), shape).reshape(batch, rows, *shape)
        return through_affine(op, vectors, shape, image)

    def split(op: Concat, vectors: Vectors, shapes: list[Shape]) -> list[Vectors]:
        batch, rows = vectors.error.shape
        parts = op.split(vectors.value.flatten(0, 1), shapes)
        return [Vectors(p.reshape(batch, rows, *s), vectors.error) for p, s in zip(parts, shapes, strict=True)]

    found: dict[int, Vectors] = {}

    def nonlinear(index: int, vectors: Vectors) -> Vectors | None:
        found[index] = vectors
        return node_vjps[index].back(vectors) if index in node_vjps else None

    zero = torch.zeros(cotangents.shape[:2], dtype=cotangents.dtype, device=cotangents.device)
    start = len(network.nodes) - 1 if start is None else start
    rules = Backward(affine, split, nonlinear, lambda node, total, vectors: total + vectors)
    at_input = backward(network, start, Vectors(cotangents, zero), rules)
    if at_input is None:
        at_input = Vectors(cotangents.new_zeros(*cotangents.shape[:2], *network.input_shape), zero)
    return {0: at_input, **found}


def offsets(
    network: Network,
    d: Tensor,
    slopes: Mapping[int, Tensor],
    sources: Mapping[int, Tensor],
    start: int | None = None,
) -> dict[int, Tensor]:
    """Estimates of how d (batch, inputs) moves the pre-activations (batch, size) of the nodes in `slopes`. No bounds.

    The network is linearised: node l maps its input by slopes[l] (batch, size) and adds sources[l] (batch, size). Other
    nonlinear nodes are cut. start: the last node that counts, the logits unless given.
    """

    def nonlinear(index: int, value: Tensor) -> Tensor | None:
        if index not in slopes:
            return None
        moved = slopes[index] * value.flatten(1) + sources[index]
        return moved.reshape(-1, *network.nodes[index].shape)

    def concat(op: Concat, parts: list[Tensor | None], shapes: list[Shape]) -> Tensor:
        return op.apply(*_or_zeros(parts, shapes))

    rules = Forward(lambda op, value, shape: op.linear(value), lambda parts: Add().apply(*parts), concat, nonlinear)
    wanted = {k: pre_activation(network, k) for k in slopes}
    among = range(len(network.nodes) if start is None else start)
    values = dict(forward(network, 0, d.reshape(-1, *network.input_shape), rules, among))
    none = {
        target: d.new_zeros(len(d), network.nodes[target].size) for target in wanted.values() if target not in values
    }
    return {target: values[target].flatten(1) for target in wanted.values() if target in values} | none


def vjp_cost(network: Network, start: int) -> float:
    """About the floating-point operations that pulling one vector back from node `start` takes."""
    needed, cost = {start}, 0.0
    for index in range(start, 0, -1):
        if index in needed:
            node = network.nodes[index]
            needed.update(node.inputs)
            cost += 2.0 * node.op.products * node.size if isinstance(node.op, AffineOp) else 0.0
    return cost


def rows_cost(network: Network, target: int) -> float:
    """The same for one vector of every entry of node `target`."""
    return network.nodes[target].size * vjp_cost(network, target)


Interval = tuple[Tensor, Tensor]
"""Midpoint and radius, of one shape; the radius is rounded up."""


def interval_jvp(
    network: Network, source: int, low: Tensor, high: Tensor, targets: Collection[int]
) -> dict[int, tuple[Tensor, Tensor]]:
    """Bounds, outward, of the images of vectors within [low, high] (batch, *shape of node `source`) at `targets`.

    Every nonlinear node behind the source is cut: these are intervals through the network's own weights W_lk, along
    its affine operations and without writing them out. Targets that the source does not reach are left out. NaN where
    an end is infinite.
    """

    def affine(op: AffineOp, value: Interval, shape: Shape) -> Interval:
        return _interval_image(op.linear, op.absolute, op.terms, value)

    def concat(op: Concat, parts: list[Interval | None], shapes: list[Shape]) -> Interval:
        middles, radii = (_or_zeros([None if p is None else p[end] for p in parts], shapes) for end in (0, 1))
        return op.apply(*middles), op.apply(*radii)

    needed = set(targets)
    for index in range(max(needed, default=source), source, -1):
        if index in needed and not is_nonlinear(network.nodes[index]):
            needed.update(network.nodes[index].inputs)
    rules = Forward(affine, _interval_sum, concat, lambda index, value: None)
    found = dict(forward(network, source, _centred(low, high), rules, needed))
    return {target: _ends(*found[target]) for target in targets if target in found}


def interval_vjp(
    network: Network, cotangents: Tensor, ranges: Mapping[int, tuple[Tensor | float, Tensor | float]]
) -> dict[int, tuple[Tensor, Tensor]]:
    """Bounds, outward, of the adjoints v_l at every nonlinear node, for any slopes within `ranges` (theory section 3).

    cotangents (rows, classes); ranges[l] = (lowest, highest slope) of node l, numbers or tensors (rows, *shape), and a
    node without one is cut. Returns (low, high), each (rows, *shape), keyed by nonlinear node.
    """
    found: dict[int, tuple[Tensor, Tensor]] = {}

    def affine(index: int, op: AffineOp, value: Interval, shape: Shape) -> Interval:
        return _interval_image(
            lambda y: op.transpose(y, shape), lambda y: op.absolute_transpose(y, shape), op.terms, value
        )

    def split(op: Concat, value: Interval, shapes: list[Shape]) -> list[Interval]:
        return list(zip(op.split(value[0], shapes), op.split(value[1], shapes), strict=True))

    def nonlinear(index: int, value: Interval) -> Interval | None:
        found[index] = _ends(*value)
        return _interval_product(*found[index], *ranges[index]) if index in ranges else None

    rules = Backward(affine, split, nonlinear, lambda node, total, value: _interval_sum([value, total]))
    backward(network, len(network.nodes) - 1, (cotangents, torch.zeros_like(cotangents)), rules)
    return found


def _centred(low: Tensor, high: Tensor) -> Interval:
    middle = 0.5 * (low + high)
    return middle, up(torch.maximum(high - middle, middle - low))


def _ends(middle: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
    """(low, high), outward."""
    return next_below(middle - radius), next_above(middle + radius)


def _interval_image(
    linear: Callable[[Tensor], Tensor], absolute: Callable[[Tensor], Tensor], terms: int, interval: Interval
) -> Interval:
    """W [interval]: the midpoint by W, the radius and the midpoint's rounding by one pass through |W|."""
    middle, radius = interval
    rounding = gamma(terms + 2)
    spread = absolute(up(radius + rounding * middle.abs(), 2))
    return linear(middle), up(spread * (1 + rounding), 4) + UNDERFLOW


def _interval_sum(parts: Sequence[Interval]) -> Interval:
    middle, radius = parts[0]
    for other in parts[1:]:
        middle = middle + other[0]
        radius = up(radius + other[1] + UNIT * middle.abs(), 4)
    return middle, radius


def _interval_product(low: Tensor, high: Tensor, least: Tensor | float, most: Tensor | float) -> Interval:
    """[least, most] * [low, high], the radius rounded up."""
    corners = torch.stack([low * least, low * most, high * least, high * most])
    middle = 0.5 * (corners.amin(0) + corners.amax(0))
    radius = torch.maximum(corners.amax(0) - middle, middle - corners.amin(0))
    return middle, up(radius + 2.0**-52 * corners.abs().amax(0), 4) + UNDERFLOW
