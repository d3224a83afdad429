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
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from certify_cli.network.affine import AffineOp
from certify_cli.network.graph import Add, Concat, Network, Node, Nonlinear
from certify_cli.numerics.rounding import UNDERFLOW, UNIT, gamma, up, vector_norm_up
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
        return up(float(values) + float(errors), 2)

    def back(self, vectors: Vectors) -> Vectors:
        """The `NodeVjp` that is the same for every row."""
        value = self.value.unsqueeze(1) if isinstance(self.value, Tensor) else self.value
        error = self.error.unsqueeze(1) if isinstance(self.error, Tensor) else self.error
        return _scaled(vectors, Slope(value, error))


@dataclass(frozen=True, eq=False)
class Vectors(Batched):
    """`value` (*batch, *shape) and `error` (*batch): a bound of the Euclidean error of each vector."""

    value: Tensor
    error: Tensor

    @cached_property
    def size(self) -> Tensor:
        """Euclidean norm of each computed vector, up: (*batch)."""
        return vector_norm_up(self.value.flatten(self.error.dim()))

    @cached_property
    def magnitudes(self) -> Tensor:
        """|value|, kept: what bounds from below by the sign of each entry asks for it more than once."""
        return self.value.abs()

    def squared_products(self, other: Vectors) -> Tensor:
        """Entrywise upper bounds (batch, rows, others) of the squares of all inner products of the exact vectors.

        Both are (batch or 1, count, inputs).
        """
        sizes, others = self.size.unsqueeze(2), other.size.unsqueeze(1)
        error, off = self.error.unsqueeze(2), other.error.unsqueeze(1)
        # |a.b - (a+p).(b+q)| <= |a||q| + |p||b| + |p||q|, and the product's own rounding
        slack = gamma(self.value.shape[2] + 2) * sizes * others + sizes * off + error * (others + off)
        return up(((self.value @ other.value.mT).abs() + slack).square(), 8) + UNDERFLOW

    def __add__(self, other: Vectors) -> Vectors:
        total = Vectors(self.value + other.value, self.error)
        return Vectors(total.value, up(self.error + other.error + UNIT * total.size, 4))


Slopes = Mapping[int, Slope]


class NodeVjp(Protocol):
    """What a nonlinear node that was made linear does to vectors that arrive at its output."""

    def back(self, vectors: Vectors) -> Vectors:
        """(batch or 1, rows, *shape of the node) to (batch, rows, *shape of its input)."""


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


def jvp(network: Network, source: int, tangents: Tensor, slopes: Slopes) -> dict[int, Vectors]:
    """Images of tangents (batch, *shape of node `source`) at every later head that they reach."""
    wanted = set(pre_activations(network))
    last_use = {i: n for n, node in enumerate(network.nodes) for i in node.inputs}
    active = {
        source: Vectors(
            tangents,
            torch.zeros(tangents.shape[0], dtype=tangents.dtype, device=tangents.device),
        )
    }
    found = {source: active[source]} if source in wanted else {}
    for index in range(source + 1, len(network.nodes)):
        node = network.nodes[index]
        inputs = [active.get(i) for i in node.inputs]
        image = _forward(network, node, inputs, slopes.get(index))
        if image is not None:
            active[index] = image
            if index in wanted:
                found[index] = image
        for i in node.inputs:
            if last_use[i] == index:
                active.pop(i, None)
    return found


def _forward(network: Network, node: Node, inputs: list[Vectors | None], slope: Slope | None) -> Vectors | None:
    present = [v for v in inputs if v is not None]
    if not present:
        return None
    op = node.op
    if isinstance(op, AffineOp):
        shape = network.nodes[node.inputs[0]].shape
        return _through(op, present[0], shape, op.linear(present[0].value))
    if isinstance(op, Add):
        total = present[0]
        for other in present[1:]:
            total = total + other
        return total
    if isinstance(op, Concat):
        batch = present[0].value.shape[0]
        shapes = [network.nodes[i].shape for i in node.inputs]
        parts = [
            present[0].value.new_zeros(batch, *s) if v is None else v.value for v, s in zip(inputs, shapes, strict=True)
        ]
        return Vectors(op.apply(*parts), up(torch.stack([v.error for v in present]).sum(0), len(present)))
    return None if slope is None else _scaled(present[0], slope)


def _through(op: AffineOp, vectors: Vectors, shape: tuple[int, ...], image: Tensor) -> Vectors:
    """Error of a linear map or its transpose (their norms agree)."""
    rounding = gamma(op.terms) * op.frobenius_norm(shape) if op.terms else 0.0
    error = up(op.norm(shape) * vectors.error + rounding * vectors.size, 4)
    return Vectors(image, error + UNDERFLOW if op.terms else error)


def _scaled(vectors: Vectors, slope: Slope) -> Vectors:
    """The product with slopes that broadcast to the vectors; their own error e enters as ||e o vector|| <= max e
    ||vector||."""
    dims = vectors.error.dim()
    largest, off = _largest(slope.value, dims), _largest(slope.error, dims)
    error = (largest + off) * vectors.error + (UNIT * largest + off) * vectors.size
    return Vectors(vectors.value * slope.value, up(error, 8) + UNDERFLOW)


def _largest(slopes: Tensor | float, dims: int) -> Tensor | float:
    """Of each sample by itself: one that overflowed must not spoil its neighbours in the batch."""
    return slopes.abs().flatten(dims).amax(-1) if isinstance(slopes, Tensor) else abs(slopes)


def vjp(
    network: Network, cotangents: Tensor, node_vjps: Mapping[int, NodeVjp], start: int | None = None
) -> dict[int, Vectors]:
    """Cotangents (batch, rows, *shape of node `start`) pulled back to every nonlinear node's output and the input.

    `start` is the logits unless given; a nonlinear node without a passage is cut. Slope tensors are (batch or 1,
    *shape); cotangents of batch 1 serve all samples, and vectors keep batch 1 until they meet a passage of more.
    Returns vectors of shape (batch or 1, rows, *shape), keyed by node; node 0 is
    always there (zeros if nothing arrives).
    """
    start = len(network.nodes) - 1 if start is None else start
    batch, rows = cotangents.shape[:2]
    zero = torch.zeros(batch, rows, dtype=cotangents.dtype, device=cotangents.device)
    active = {start: Vectors(cotangents, zero)}
    found: dict[int, Vectors] = {}
    for index in range(start, 0, -1):
        vectors = active.pop(index, None)
        if vectors is None:
            continue
        node = network.nodes[index]
        if is_nonlinear(node):
            found[index] = vectors
        for i, image in zip(node.inputs, _backward(network, node, vectors, node_vjps.get(index)), strict=True):
            if image is not None:
                active[i] = active[i] + image if i in active else image
    shape = network.input_shape
    found[0] = active.get(0, Vectors(cotangents.new_zeros(batch, rows, *shape), zero))
    return found


def _backward(network: Network, node: Node, vectors: Vectors, passage: NodeVjp | None) -> list[Vectors | None]:
    op, (batch, rows) = node.op, vectors.error.shape
    if isinstance(op, AffineOp):
        shape = network.nodes[node.inputs[0]].shape
        image = op.transpose(vectors.value.flatten(0, 1), shape).reshape(batch, rows, *shape)
        return [_through(op, vectors, shape, image)]
    if isinstance(op, Add):
        return [vectors for _ in node.inputs]
    if isinstance(op, Concat):
        shapes = [network.nodes[i].shape for i in node.inputs]
        parts = op.split(vectors.value.flatten(0, 1), shapes)
        return [Vectors(p.reshape(batch, rows, *s), vectors.error) for p, s in zip(parts, shapes, strict=True)]
    return [None if passage is None else passage.back(vectors)]


def offsets(
    network: Network,
    d: Tensor,
    slopes: Mapping[int, Tensor],
    sources: Mapping[int, Tensor],
    start: int | None = None,
) -> dict[int, Tensor]:
    """What d (batch, inputs) does to the heads of the nodes in `slopes` (batch, size), in the network linearised there
    with `sources` (batch, size) added to their outputs. Other nonlinear nodes are cut, and those after `start` left
    out. No bound."""
    values: list[Tensor] = [d.reshape(-1, *network.input_shape)]
    for index, node in enumerate(network.nodes[1:start], start=1):
        inputs = [values[i] for i in node.inputs]
        if isinstance(node.op, AffineOp):
            values.append(node.op.linear(inputs[0]))
        elif isinstance(node.op, Add | Concat):
            values.append(node.op.apply(*inputs))
        elif index in slopes:
            moved = slopes[index] * inputs[0].flatten(1) + sources[index]
            values.append(moved.reshape(-1, *node.shape))
        else:
            values.append(d.new_zeros(len(d), *node.shape))
    return {pre_activation(network, k): values[pre_activation(network, k)].flatten(1) for k in slopes}


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
    active = {source: _centred(low, high)}
    needed = set(targets)
    for index in range(max(needed, default=source), source, -1):
        if index in needed and not is_nonlinear(network.nodes[index]):
            needed.update(network.nodes[index].inputs)
    for index in sorted(i for i in needed if i > source):
        node = network.nodes[index]
        inputs = [active.get(i) for i in node.inputs]
        present = [v for v in inputs if v is not None]
        if not present or is_nonlinear(node):
            continue
        op = node.op
        if isinstance(op, AffineOp):
            active[index] = _interval_image(op.linear, op.absolute, op.terms, present[0])
        elif isinstance(op, Add):
            active[index] = _interval_sum(present)
        else:
            shapes = [network.nodes[i].shape for i in node.inputs]
            zeros = [low.new_zeros(low.shape[0], *shape) for shape in shapes]
            full = [(zero, zero) if v is None else v for v, zero in zip(inputs, zeros, strict=True)]
            active[index] = (op.apply(*(v[0] for v in full)), op.apply(*(v[1] for v in full)))
    return {target: _ends(*active[target]) for target in targets if target in active}


def interval_vjp(
    network: Network, cotangents: Tensor, ranges: Mapping[int, tuple[Tensor | float, Tensor | float]]
) -> dict[int, tuple[Tensor, Tensor]]:
    """Bounds, outward, of the adjoints v_l at every nonlinear node, for any slopes within `ranges` (theory section 3).

    cotangents (rows, classes); ranges[l] = (lowest, highest slope) of node l, numbers or tensors (rows, *shape), and a
    node without one is cut. Returns (low, high), each (rows, *shape), keyed by nonlinear node.
    """
    last = len(network.nodes) - 1
    active = {last: (cotangents, torch.zeros_like(cotangents))}
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for index in range(last, 0, -1):
        if index not in active:
            continue
        here = active.pop(index)
        op, inputs = network.nodes[index].op, network.nodes[index].inputs
        shapes = [network.nodes[i].shape for i in inputs]
        images: list[Interval | None]
        if isinstance(op, AffineOp):
            images = [_interval_image(*_transposes(op, shapes[0]), op.terms, here)]
        elif isinstance(op, Add):
            images = [here for _ in inputs]
        elif isinstance(op, Concat):
            images = list(zip(op.split(here[0], shapes), op.split(here[1], shapes), strict=True))
        else:
            found[index] = _ends(*here)
            images = [_interval_product(*found[index], *ranges[index]) if index in ranges else None]
        for i, image in zip(inputs, images, strict=True):
            if image is not None:
                active[i] = _interval_sum([image, active[i]]) if i in active else image
    return found


def _transposes(op: AffineOp, shape: tuple[int, ...]) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    return lambda y: op.transpose(y, shape), lambda y: op.absolute_transpose(y, shape)


def _centred(low: Tensor, high: Tensor) -> Interval:
    middle = 0.5 * (low + high)
    return middle, up(torch.maximum(high - middle, middle - low))


def _ends(middle: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
    """(low, high), outward."""
    low = torch.nextafter(middle - radius, torch.full_like(middle, -torch.inf))
    return low, torch.nextafter(middle + radius, torch.full_like(middle, torch.inf))


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
