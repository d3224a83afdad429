"""Bounds that are cheap, once more and by other arithmetic: global Lipschitz and curvature constants, and what the
remainders on a ball may take from the expansion at the sample (theory sections 3 and 4, Jacobian tier).

All numbers are upper (or lower) bounds in float64 with their errors counted, as Euclidean norms of whole vectors.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from certify_cli.audit.verify.functions import Function
from certify_cli.audit.verify.reading import GRAM_WORK, INPUT, UP, Layer, Matrix, U, length, spectral

LEAST = 1e-70
"""Added to fourth roots, and to sums of squares: what fourth powers may lose by underflow is less."""
ORTHONORMAL = 1e-11
"""A basis of the input's space may be so far from orthonormal."""


@dataclass(frozen=True, eq=False)
class Vectors:
    """`value` (..., size) and `error` (...): at most so far from the exact vectors, in the Euclidean norm."""

    value: Tensor
    error: Tensor

    def at(self, rows: list[int]) -> Vectors:
        return Vectors(self.value[rows], self.error[rows])

    @property
    def size(self) -> Tensor:
        return (length(self.value, -1) + self.error) * UP


@dataclass(frozen=True, eq=False)
class Values:
    """A batch at its samples: pre-activations and activations by layer, `logits` with the deployed network's own
    deviation counted."""

    z: list[Vectors]
    h: dict[int, Vectors]

    def at(self, rows: list[int]) -> Values:
        return Values([z.at(rows) for z in self.z], {k: h.at(rows) for k, h in self.h.items()})

    @property
    def logits(self) -> Vectors:
        return self.z[-1]


@dataclass(frozen=True, eq=False)
class Balls:
    """What is known on balls of `radius` (batch, 1): layer by layer the range [low, high] of D_l, how far it lies from
    A_l d (`rest`), the range of 2 q / t^2 (`bend`); `gram` A_k A_j^T, and bounds of its squared entries."""

    radius: Tensor
    low: dict[int, Tensor]
    high: dict[int, Tensor]
    rest: dict[int, Tensor]
    bend: dict[int, tuple[Tensor, Tensor]]
    gram: dict[tuple[int, int], Tensor]
    squared: dict[tuple[int, int], Tensor]

    def reach(self, k: int) -> Tensor:
        return torch.maximum(-self.low[k], self.high[k])

    def half_squares(self, u: Tensor, k: int) -> Tensor:
        """At most: half the sum of u_j D_kj^2 for every row of u (batch, rows, size) >= 0."""
        apart = (u @ (self.reach(k) ** 2)[:, :, None])[..., 0]
        fourth = ((u @ self.squared[k, k]) * u).sum(2) * UP
        spread = (u @ (self.rest[k] ** 2)[:, :, None])[..., 0] * UP
        return torch.minimum(apart, (self.radius * (fourth**0.25 + LEAST) + spread**0.5) ** 2) / 2 * UP + LEAST


class Prover:
    """Of one network, for all rivals of all samples. The prediction's own column is infinite, or 0 as a bound."""

    def __init__(self, layers: list[Layer]) -> None:
        self.layers = layers
        self.last = len(layers) - 1
        self.classes = len(layers[-1].bias)
        self.smooth = all(f.smooth for f in self._functions.values())

    @cached_property
    def _functions(self) -> dict[int, Function]:
        return {k: layer.function for k, layer in enumerate(self.layers) if layer.function is not None}

    # --- at the samples ------------------------------------------------------------------------------------------

    def values(self, x: Tensor) -> Values:
        """Of samples x (batch, inputs), taken as exact."""
        none = torch.zeros(len(x), dtype=x.dtype)
        h, z = {INPUT: Vectors(x, none)}, []
        deviation = {INPUT: 0.0}
        for k, layer in enumerate(self.layers):
            found = self._sum(Vectors(layer.bias.expand(len(x), -1), none + layer.bias_flaw), layer.weights, h)
            off = sum(matrix.norm * deviation[s] for s, matrix in layer.weights.items())
            z.append(Vectors(found.value, (found.error + off) * UP))
            if layer.function is not None:
                h[k] = self._activated(layer.function, found)
                # of the deployed network from the exact one, at any input; kept apart: it moves with x + d
                deviation[k] = layer.function.lipschitz * off + layer.function.deviation * len(layer.bias) ** 0.5
        return Values(z, h)

    @staticmethod
    def _sum(start: Vectors, weights: dict[int, Matrix], sources: dict[int, Vectors], back: bool = False) -> Vectors:
        """start + sum of W h, or of W^T h."""
        value, error = start.value, start.error
        for source, matrix in weights.items():
            w, h = matrix.value.T if back else matrix.value, sources[source]
            gamma = (w.shape[1] + 4) * U * UP
            value = value + h.value @ w.T
            error = error + matrix.norm * h.error + (matrix.flaw + gamma * matrix.size) * h.size
        rounding = 2 * len(weights) * U * (length(value, -1) + length(start.value, -1))
        return Vectors(value, (error + rounding) * UP)

    @staticmethod
    def _activated(function: Function, z: Vectors) -> Vectors:
        value = function.value(z.value)
        own = length(value, -1) + function.gain * length(z.value, -1) + function.size * value.shape[-1] ** 0.5
        return Vectors(value, (function.lipschitz * z.error + 64 * U * own) * UP)

    def margins(self, values: Values, prediction: Tensor) -> Tensor:
        """z_y - z_i from below, (batch, classes); inf at i = y."""
        logits = values.logits
        top = logits.value.gather(1, prediction[:, None])
        margin = top - logits.value
        low = margin - (2 * logits.error[:, None] + 4 * U * (top.abs() + logits.value.abs())) * UP
        return low.scatter(1, prediction[:, None], torch.inf)

    def tops(self, prediction: Tensor) -> Tensor:
        """The margins z_y - z_i of every class i as rows over the logits, (batch, classes, classes)."""
        eye = torch.eye(self.classes, dtype=torch.float64)
        return eye[prediction][:, None] - eye

    def adjoints(self, values: Values, tops: Tensor) -> dict[int, Vectors]:
        """v_k of every margin in `tops` (batch, count, classes), by layer; the gradient at INPUT."""
        none = torch.zeros(tops.shape[:2], dtype=tops.dtype)
        at_head = {self.last: Vectors(tops, none)}
        found: dict[int, Vectors] = {}
        for k in [*range(self.last - 1, -1, -1), INPUT]:
            fed = {t: layer.weights[k] for t, layer in enumerate(self.layers) if k in layer.weights}
            size = next(iter(fed.values())).value.shape[1]
            found[k] = self._sum(Vectors(tops.new_zeros(*tops.shape[:2], size), none), fed, at_head, back=True)
            if k != INPUT:
                at_head[k] = self._sloped(self._functions[k], values.z[k], found[k])
        return found

    @staticmethod
    def _sloped(function: Function, z: Vectors, v: Vectors) -> Vectors:
        """phi'(z) o v; the slope's error is at most that of z times sup |phi''|, and its evaluation's."""
        slope = function.slope(z.value)
        off = _slope_error(function, z)
        value = slope[:, None] * v.value
        return Vectors(value, (function.lipschitz * v.error + off[:, None] * v.size + U * v.size) * UP)

    # --- everywhere ----------------------------------------------------------------------------------------------

    @cached_property
    def _expansions(self) -> list[dict[tuple[int, int], Matrix]]:
        """Blocks B_lk of the network linearised at the middle slopes, and those of the network cut there: W_lk."""
        linear: dict[tuple[int, int], Matrix] = {}
        for t, layer in enumerate(self.layers):
            for source in [INPUT, *range(t)]:
                parts = [layer.weights[source]] if source in layer.weights else []
                for k in range(source + 1, t):
                    if k in layer.weights and (k, source) in linear and (c := self._centre(k)[0]):
                        parts.append(_product(layer.weights[k], c, linear[k, source]))
                if parts:
                    linear[t, source] = _total(parts)
        return [linear, {(t, s): m for t, layer in enumerate(self.layers) for s, m in layer.weights.items()}]

    def _centre(self, k: int) -> tuple[float, float]:
        """Middle of phi' and how far it may be away."""
        low, high = self._functions[k].slopes
        middle = (low + high) / 2
        return middle, max(high - middle, middle - low) * UP

    @cached_property
    def _changes(self) -> list[list[float]]:
        """Lipschitz constants of every pre-activation, by either expansion (theory section 3)."""
        found = []
        for blocks, radius in zip(self._expansions, self._radii, strict=True):
            m: list[float] = []
            for t in range(self.last):
                own = blocks[t, INPUT].norm if (t, INPUT) in blocks else 0.0
                m.append((own + sum(blocks[t, k].norm * radius[k] * m[k] for k in range(t) if (t, k) in blocks)) * UP)
            found.append(m)
        return found

    @property
    def _radii(self) -> list[dict[int, float]]:
        return [{k: self._centre(k)[1] for k in self._functions}, {k: f.lipschitz for k, f in self._functions.items()}]

    @property
    def tight(self) -> bool:
        """Whether every norm is proved near the true one: beyond GRAM_WORK it is a Frobenius norm, far above."""
        shapes = [tuple(matrix.value.shape) for layer in self.layers for matrix in layer.weights.values()]
        return all(min(shape) ** 2 * max(shape) <= GRAM_WORK for shape in shapes)

    @cached_property
    def gain(self) -> float:
        """The product of all layers' norms: what rounding errors of a Lipschitz constant are relative to."""
        product = 1.0
        for layer in self.layers:
            own = 1.0 if layer.function is None else layer.function.lipschitz
            product *= own * sum(matrix.norm for matrix in layer.weights.values())
        return product

    @cached_property
    def lipschitz(self) -> Tensor:
        """Of margins z_y - z_i, (y, i), everywhere."""
        ways = []
        for blocks, radius, m in zip(self._expansions, self._radii, self._changes, strict=True):
            total = torch.zeros(self.classes, self.classes, dtype=torch.float64)
            for source, factor in [(INPUT, 1.0), *((k, radius[k] * m[k]) for k in range(self.last))]:
                if (self.last, source) in blocks:
                    block = blocks[self.last, source]
                    rows = length(block.value[:, None] - block.value[None], 2)
                    total = total + (rows * (1 + 4 * U) + 2 * block.flaw) * factor
            ways.append(total * UP)
        return torch.stack(ways).amin(0)

    @cached_property
    def _curvatures(self) -> dict[tuple[int, int], float]:
        return {}

    def curvature(self, top: int, rival: int) -> float:
        """Of the margin z_top - z_rival everywhere: at most so large is -lambda_min of its Hessian, the sum over layers
        of  A_l^T diag(v_l o phi'') A_l  with v_l and phi'' from intervals that hold everywhere."""
        if (top, rival) not in self._curvatures:
            change = [min(ways) for ways in zip(*self._changes, strict=True)]
            low, high = self._adjoint_ranges(top, rival)
            total = 0.0
            for k in range(self.last):
                least, most = self._functions[k].curvatures
                corners = torch.stack([-low[k] * least, -low[k] * most, -high[k] * least, -high[k] * most])
                weight = corners.amax(0).clamp(min=0) * UP
                # z_k = T u, u the sources, each moving by at most its Lipschitz constant times ||d||
                sources = self.layers[k].weights
                reach = {s: 1.0 if s == INPUT else self._functions[s].lipschitz * change[s] * UP for s in sources}
                root = weight.sqrt() * UP
                scaled = root[:, None] * torch.cat([sources[s].value * reach[s] for s in sources], dim=1)
                flaw = float(root.max()) * sum(sources[s].flaw * reach[s] for s in sources)
                rounding = 4 * U * float(length(scaled))
                ways = [change[k] ** 2 * float(weight.max())]
                ways.append(len(sources) * ((spectral(scaled) + flaw + rounding) * UP) ** 2)
                total += min(ways) * UP
            self._curvatures[top, rival] = total * UP
        return self._curvatures[top, rival]

    def _adjoint_ranges(self, top: int, rival: int) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """Intervals of v_k for every slope there may be, by interval arithmetic backward."""
        row = torch.zeros(self.classes, dtype=torch.float64)
        row[top], row[rival] = 1.0, -1.0
        head = {self.last: (row, row)}
        low, high = {}, {}
        for k in range(self.last - 1, -1, -1):
            bottom = roof = torch.zeros(len(self.layers[k].bias), dtype=torch.float64)
            for t, layer in enumerate(self.layers):
                if k in layer.weights:
                    w, (a, b) = layer.weights[k].value.T, head[t]
                    middle, radius = (a + b) / 2, (b - a) / 2 * UP + U * (a.abs() + b.abs())
                    spread = w.abs() @ radius + 1e-13 * len(middle) * (w.abs() @ middle.abs())
                    spread = (spread + layer.weights[k].flaw * (length(middle) + length(radius))) * UP
                    bottom, roof = bottom + w @ middle - spread, roof + w @ middle + spread
            near, spread = self._adjoint_about(k, top, rival)
            bottom, roof = torch.maximum(bottom, near - spread), torch.minimum(roof, near + spread)
            low[k], high[k] = bottom, roof
            least, most = self._functions[k].slopes
            corners = torch.stack([bottom * least, bottom * most, roof * least, roof * most])
            slack = 4 * U * corners.abs().amax(0)
            head[k] = corners.amin(0) - slack, corners.amax(0) + slack
        return low, high

    def _adjoint_about(self, k: int, top: int, rival: int) -> tuple[Tensor, Tensor]:
        """v_k in the network linearised at the middle slopes, and how far the true one may lie from it, entrywise:
        the sum over later j of ||B_jk e|| r_j ||v_j||."""
        blocks, radius = self._expansions[0], self._radii[0]
        size = len(self.layers[k].bias)
        middle, spread = torch.zeros(size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)
        lengths: dict[int, float] = {}
        for j in range(self.last - 1, k - 1, -1):
            own = blocks.get((self.last, j))
            row = (
                own.value[top] - own.value[rival] if own else torch.zeros(len(self.layers[j].bias), dtype=torch.float64)
            )
            flaw = (2 * own.flaw + 4 * U * own.size) * UP if own else 0.0
            later = [(t, blocks[t, j]) for t in range(j + 1, self.last) if (t, j) in blocks]
            if j == k:
                columns = [(length(m.value, 0) + m.flaw) * radius[t] * lengths[t] for t, m in later]
                middle, spread = row, (sum(columns, torch.zeros(size, dtype=torch.float64)) + flaw) * UP
            else:
                lengths[j] = (float(length(row)) + flaw + sum(m.norm * radius[t] * lengths[t] for t, m in later)) * UP
        return middle, spread

    # --- on balls ------------------------------------------------------------------------------------------------

    def balls(self, values: Values, radius: Tensor) -> Balls:
        """Where pre-activations can go in the balls of `radius` (batch,), by D_l = A_l d + sum over k of B_lk q_k(D_k)
        (theory section 4, Jacobian tier)."""
        e = radius[:, None]
        found = Balls(e, {}, {}, {}, {}, {}, {})
        blocks = self._jacobians(values)
        for k in range(self.last):
            jacobian, error = blocks[k, INPUT]
            low = high = torch.zeros_like(values.z[k].value)
            for j in range(k):
                if (k, j) in blocks:
                    b, b_error = blocks[k, j]
                    ends = torch.stack([b * found.bend[j][0][:, None], b * found.bend[j][1][:, None]])
                    extra = b_error[:, None, None] * torch.stack(found.bend[j]).abs().amax(0)[:, None]
                    high = high + found.half_squares((ends.amax(0).clamp(min=0) + extra) * UP, j)
                    low = low + found.half_squares(((-ends).amax(0).clamp(min=0) + extra) * UP, j)
            straight = (length(jacobian, 2) + error[:, None]) * e * UP  # UP is more than ORTHONORMAL
            found.rest[k] = torch.maximum(low, high) * UP
            found.low[k], found.high[k] = -(straight + low) * UP, (straight + high) * UP
            found.bend[k] = self._bends(self._functions[k], values.z[k], found.low[k], found.high[k])
            for j in range(k + 1):
                other, other_error = blocks[j, INPUT]
                slack = error * length(other, (1, 2)) + other_error * length(jacobian, (1, 2)) + error * other_error
                rounding = (
                    ((other.shape[2] + 4) * U + 2 * ORTHONORMAL) * length(jacobian, (1, 2)) * length(other, (1, 2))
                )
                found.gram[k, j] = jacobian @ other.mT
                square = found.gram[k, j].abs() + ((slack + rounding) * UP)[:, None, None]
                found.squared[k, j] = square.square() * UP
        return found

    def remainders(self, values: Values, adjoints: dict[int, Vectors], radius: Tensor) -> Tensor:
        """At most so far below its tangent at the sample a margin lies anywhere in the ball of `radius` (batch,):
        (batch, classes)."""
        if not self.last:  # affine: nothing remains
            return torch.zeros_like(adjoints[INPUT].error)
        ball = self.balls(values, radius)
        weights = {k: self._weights(adjoints[k], ball.bend[k]) for k in range(self.last)}
        apart = sum((weights[k] * ball.reach(k)[:, None] ** 2).sum(2) for k in weights)
        spread = sum((weights[k] * ball.rest[k][:, None] ** 2).sum(2) for k in weights)
        fourth = sum(
            (1 if j == k else 2) * ((weights[k] @ squared) * weights[j]).sum(2)
            for (k, j), squared in ball.squared.items()
        )
        together = (
            ball.radius * ((torch.as_tensor(fourth, dtype=torch.float64) * UP) ** 0.25 + LEAST)
            + (torch.as_tensor(spread, dtype=torch.float64) * UP) ** 0.5
        ) ** 2
        return torch.minimum(torch.as_tensor(apart, dtype=torch.float64), together) / 2 * UP + LEAST

    @staticmethod
    def _bends(function: Function, z: Vectors, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Range of 2 q(t) / t^2 for t in [low, high] about the exact z: as z moves, it does by at most `third`."""
        off = z.error[:, None]
        least, most = function.curvature_range(z.value + low - off, z.value + high + off)
        if function.third == float("inf"):
            return least, most
        lowest, highest = function.bend_range(z.value, low, high)
        return torch.maximum(least, lowest - function.third * off), torch.minimum(most, highest + function.third * off)

    @cached_property
    def _inputs(self) -> dict[int, Matrix]:
        """The weights on the input in an orthonormal basis of the space that their rows span, where that is smaller:
        norms and inner products of rows stay what they are but for ORTHONORMAL and the flaws."""
        own = {k: layer.weights[INPUT] for k, layer in enumerate(self.layers) if INPUT in layer.weights}
        stacked = torch.cat([matrix.value for matrix in own.values()])
        if len(stacked) >= stacked.shape[1]:
            return own
        basis = torch.linalg.qr(stacked.T).Q.T
        skew = float(length(basis @ basis.T - torch.eye(len(basis), dtype=basis.dtype)))
        gamma = (stacked.shape[1] + 4) * U * UP
        if skew + gamma * len(basis) > ORTHONORMAL:
            return own
        found = {}
        for k, matrix in own.items():
            value = matrix.value @ basis.T
            left = float(length(matrix.value - value @ basis)) + 2 * gamma * matrix.size * len(basis) ** 0.5
            found[k] = Matrix(value, (matrix.flaw + left) * UP)
        return found

    def _jacobians(self, values: Values) -> dict[tuple[int, int], tuple[Tensor, Tensor]]:
        """A_k at (k, INPUT) and B_kj of every sample, (batch, size, source size), and their errors (batch,), in the
        Frobenius norm."""
        found: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        count = len(values.h[INPUT].value)
        none = torch.zeros(count, dtype=torch.float64)
        for t in range(self.last):
            for source in [INPUT, *range(t)]:
                parts = []
                if source in self.layers[t].weights:
                    matrix = self._inputs[t] if source == INPUT else self.layers[t].weights[source]
                    parts.append((matrix.value.expand(count, -1, -1), none + matrix.flaw))
                for k in range(source + 1, t):
                    if k in self.layers[t].weights and (k, source) in found:
                        matrix, function = self.layers[t].weights[k], self._functions[k]
                        before, error = found[k, source]
                        slope = function.slope(values.z[k].value)
                        off = _slope_error(function, values.z[k])
                        sloped = slope[:, :, None] * before
                        size = length(before, (1, 2))
                        error = function.lipschitz * error + (off + U) * (size + error)
                        gamma = (before.shape[1] + 4) * U * UP
                        whole = matrix.norm * error
                        whole = whole + (matrix.flaw + gamma * matrix.size) * (function.lipschitz * size + error)
                        parts.append((matrix.value @ sloped, whole * UP))
                if parts:
                    value = torch.stack([part for part, _ in parts]).sum(0) if len(parts) > 1 else parts[0][0]
                    error = torch.stack([error for _, error in parts]).sum(0)
                    rounding = len(parts) * U * sum(length(part, (1, 2)) for part, _ in parts)
                    found[t, source] = value, (error + rounding) * UP
        return found

    @staticmethod
    def _weights(v: Vectors, bend: tuple[Tensor, Tensor]) -> Tensor:
        """max(0, -v phi'') for every phi'' in the range, (batch, classes, size)."""
        least, most = bend[0][:, None], bend[1][:, None]
        weight = torch.maximum(-v.value * least, -v.value * most).clamp(min=0)
        return (weight + v.error[..., None] * torch.maximum(least.abs(), most.abs())) * UP


def _slope_error(function: Function, z: Vectors) -> Tensor:
    """At most so far is a slope at the computed z from that at the exact one, entrywise: (batch,)."""
    return (function.bend * (z.error + 64 * U * length(z.value, -1)) + 1e-13 * function.gain) * UP


def _product(left: Matrix, factor: float, right: Matrix) -> Matrix:
    """left factor right."""
    gamma = (left.value.shape[1] + 6) * U * UP
    flaw = left.norm * right.flaw + left.flaw * right.size + gamma * left.size * right.size
    return Matrix((left.value * factor) @ right.value, abs(factor) * flaw * UP)


def _total(parts: list[Matrix]) -> Matrix:
    value = torch.stack([part.value for part in parts]).sum(0)
    flaw = sum(part.flaw for part in parts) + len(parts) * U * sum(part.size for part in parts)
    return Matrix(value, flaw * UP if len(parts) > 1 else parts[0].flaw)
