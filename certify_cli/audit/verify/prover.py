"""Bounds of a network for the check of a run: margins and gradients at samples, and global constants.

The constants are of Lipschitz continuity and of curvature (theory section 3). Everything is computed in float64 with
its error bounded, as the Euclidean norm of a whole vector or the Frobenius norm of a whole matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from certify_cli.audit.verify.functions import Function
from certify_cli.audit.verify.reading import GRAM_WORK, INPUT, UP, Layer, Matrix, U, spectral, upper_norm

ORTHONORMAL = 1e-11
"""Upper bound of the distance (Frobenius norm) of a basis' Gram matrix from the identity."""


@dataclass(frozen=True, eq=False)
class Vectors:
    """Computed vectors with bounds of their errors.

    value: (..., entries).   error: (...), upper bounds of the Euclidean distances from the exact vectors.
    """

    value: Tensor
    error: Tensor

    def at(self, rows: list[int]) -> Vectors:
        return Vectors(self.value[rows], self.error[rows])

    @property
    def norm(self) -> Tensor:
        """Upper bound of the exact vectors' Euclidean norms, (...)."""
        return (upper_norm(self.value, -1) + self.error) * UP


@dataclass(frozen=True, eq=False)
class Values:
    """A batch of evaluated samples: pre-activations `z` and activations `h` by layer, each (batch, entries).

    The errors of `h` are those of the exact network; `z` (and `logits`) count the deployed operators' deviation, too.
    """

    z: list[Vectors]
    h: dict[int, Vectors]

    def at(self, rows: list[int]) -> Values:
        return Values([z.at(rows) for z in self.z], {k: h.at(rows) for k, h in self.h.items()})

    @property
    def logits(self) -> Vectors:
        return self.z[-1]


class Prover:
    """Bounds of one network for all rivals at once; global bounds are computed once, at their first use.

    Where a result has a column a class, that of the prediction itself is no rival's: inf as a margin, 0 as a constant.
    """

    def __init__(self, layers: list[Layer]) -> None:
        self.layers = layers
        self.last = len(layers) - 1
        self.classes = len(layers[-1].bias)
        self.smooth = all(f.smooth for f in self.functions.values())

    @cached_property
    def functions(self) -> dict[int, Function]:
        return {k: layer.function for k, layer in enumerate(self.layers) if layer.function is not None}

    # --- at the samples ------------------------------------------------------------------------------------------

    def values(self, x: Tensor) -> Values:
        """The network at samples x (batch, inputs), which are taken as exact."""
        none = torch.zeros(len(x), dtype=x.dtype)
        h, z = {INPUT: Vectors(x, none)}, []
        deviation = {INPUT: 0.0}
        for k, layer in enumerate(self.layers):
            exact = self._affine(Vectors(layer.bias.expand(len(x), -1), none + layer.bias_error), layer.weights, h)
            off = sum(matrix.norm * deviation[s] for s, matrix in layer.weights.items())
            z.append(Vectors(exact.value, (exact.error + off) * UP))
            if layer.function is not None:
                h[k] = self._activated(layer.function, exact)
                # of the deployed network from the exact one, at any input; kept apart: it moves with x + d
                deviation[k] = layer.function.lipschitz * off + layer.function.deviation * len(layer.bias) ** 0.5
        return Values(z, h)

    @staticmethod
    def _affine(start: Vectors, weights: dict[int, Matrix], sources: dict[int, Vectors], back: bool = False) -> Vectors:
        """start + sum of W h over the sources, or of W^T h where `back`; by the source's layer."""
        value, error = start.value, start.error
        for source, matrix in weights.items():
            w, h = matrix.value.T if back else matrix.value, sources[source]
            gamma = (w.shape[1] + 4) * U * UP
            value = value + h.value @ w.T
            error = error + matrix.norm * h.error + (matrix.error + gamma * matrix.frobenius) * h.norm
        rounding = 2 * len(weights) * U * (upper_norm(value, -1) + upper_norm(start.value, -1))
        return Vectors(value, (error + rounding) * UP)

    @staticmethod
    def _activated(function: Function, z: Vectors) -> Vectors:
        value = function.value(z.value)
        rounded = upper_norm(value, -1) + function.amplification * upper_norm(z.value, -1)
        rounded = rounded + function.magnitude * value.shape[-1] ** 0.5
        return Vectors(value, (function.lipschitz * z.error + 64 * U * rounded) * UP)

    def margins(self, values: Values, prediction: Tensor) -> Tensor:
        """Lower bounds of the margins z_y - z_i, (batch, classes), y the prediction (batch,); inf at i = y."""
        logits = values.logits
        top = logits.value.gather(1, prediction[:, None])
        margin = top - logits.value
        low = margin - (2 * logits.error[:, None] + 4 * U * (top.abs() + logits.value.abs())) * UP
        return low.scatter(1, prediction[:, None], torch.inf)

    def margin_rows(self, prediction: Tensor) -> Tensor:
        """The margins z_y - z_i of every class i as linear functions of the logits, (batch, classes, classes)."""
        eye = torch.eye(self.classes, dtype=torch.float64)
        return eye[prediction][:, None] - eye

    def adjoints(self, values: Values, rows: Tensor) -> dict[int, Vectors]:
        """v_k, the gradient with respect to h_k, of every function in `rows` (batch, count, classes) of the logits.

        By layer k, each (batch, count, entries); at INPUT the gradient with respect to the sample.
        """
        none = torch.zeros(rows.shape[:2], dtype=rows.dtype)
        at_preactivation = {self.last: Vectors(rows, none)}
        found: dict[int, Vectors] = {}
        for k in [*range(self.last - 1, -1, -1), INPUT]:
            consumers = {t: layer.weights[k] for t, layer in enumerate(self.layers) if k in layer.weights}
            size = next(iter(consumers.values())).value.shape[1]
            start = Vectors(rows.new_zeros(*rows.shape[:2], size), none)
            found[k] = self._affine(start, consumers, at_preactivation, back=True)
            if k != INPUT:
                at_preactivation[k] = self._times_slope(self.functions[k], values.z[k], found[k])
        return found

    @staticmethod
    def _times_slope(function: Function, z: Vectors, v: Vectors) -> Vectors:
        """phi'(z) o v."""
        slope = function.slope(z.value)
        off = slope_error(function, z)
        value = slope[:, None] * v.value
        return Vectors(value, (function.lipschitz * v.error + off[:, None] * v.norm + U * v.norm) * UP)

    # --- everywhere ----------------------------------------------------------------------------------------------

    @cached_property
    def _expansions(self) -> list[dict[tuple[int, int], Matrix]]:
        """Blocks B_lk of two expansions of the network (theory section 3), each keyed by (l, k).

        The first is of the network linearised at the middle slopes; the second of the network cut at its activations,
        where the blocks are the weights W_lk.
        """
        linear: dict[tuple[int, int], Matrix] = {}
        for t, layer in enumerate(self.layers):
            for source in [INPUT, *range(t)]:
                parts = [layer.weights[source]] if source in layer.weights else []
                for k in range(source + 1, t):
                    if k in layer.weights and (k, source) in linear and (c := self._mid_slope(k)[0]):
                        parts.append(_product(layer.weights[k], c, linear[k, source]))
                if parts:
                    linear[t, source] = _total(parts)
        return [linear, {(t, s): m for t, layer in enumerate(self.layers) for s, m in layer.weights.items()}]

    def _mid_slope(self, k: int) -> tuple[float, float]:
        """The middle of the range of phi' at layer k, and an upper bound of the distance of any slope from it."""
        low, high = self.functions[k].slopes
        middle = (low + high) / 2
        return middle, max(high - middle, middle - low) * UP

    @cached_property
    def _lipschitz_constants(self) -> list[list[float]]:
        """Lipschitz constants of every pre-activation with respect to the input, by either expansion, each by layer."""
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
        """By expansion and layer: upper bounds of the distance of a slope from the one that was expanded at."""
        return [{k: self._mid_slope(k)[1] for k in self.functions}, {k: f.lipschitz for k, f in self.functions.items()}]

    @property
    def tight(self) -> bool:
        """Whether every spectral norm is a close upper bound; of a matrix beyond GRAM_WORK it is the Frobenius norm."""
        shapes = [tuple(matrix.value.shape) for layer in self.layers for matrix in layer.weights.values()]
        return all(min(shape) ** 2 * max(shape) <= GRAM_WORK for shape in shapes)

    @cached_property
    def norm_product(self) -> float:
        """The product of all layers' norms, to which rounding errors of a Lipschitz constant are relative."""
        product = 1.0
        for layer in self.layers:
            own = 1.0 if layer.function is None else layer.function.lipschitz
            product *= own * sum(matrix.norm for matrix in layer.weights.values())
        return product

    @cached_property
    def lipschitz(self) -> Tensor:
        """Global Lipschitz constants of the margins z_y - z_i, (y, i): of both expansions' the smaller."""
        ways = []
        for blocks, radius, m in zip(self._expansions, self._radii, self._lipschitz_constants, strict=True):
            total = torch.zeros(self.classes, self.classes, dtype=torch.float64)
            for source, factor in [(INPUT, 1.0), *((k, radius[k] * m[k]) for k in range(self.last))]:
                if (self.last, source) in blocks:
                    block = blocks[self.last, source]
                    rows = upper_norm(block.value[:, None] - block.value[None], 2)
                    total = total + (rows * (1 + 4 * U) + 2 * block.error) * factor
            ways.append(total * UP)
        return torch.stack(ways).amin(0)

    @cached_property
    def _curvatures(self) -> dict[tuple[int, int], float]:
        return {}

    def curvature(self, top: int, rival: int) -> float:
        """Upper bound of -lambda_min of the Hessian of the margin z_top - z_rival, everywhere.

        The Hessian is the sum over layers of  A_l^T diag(v_l o phi'') A_l, with v_l and phi'' from global intervals.
        """
        if (top, rival) not in self._curvatures:
            lipschitz = [min(ways) for ways in zip(*self._lipschitz_constants, strict=True)]
            low, high = self.adjoint_ranges(top, rival)
            total = 0.0
            for k in range(self.last):
                lower, upper = self.functions[k].curvatures
                corners = torch.stack([-low[k] * lower, -low[k] * upper, -high[k] * lower, -high[k] * upper])
                weight = corners.amax(0).clamp(min=0) * UP
                # z_k = T u, u the sources, each of which moves by at most its Lipschitz constant times ||d||
                sources = self.layers[k].weights
                step = {s: 1.0 if s == INPUT else self.functions[s].lipschitz * lipschitz[s] * UP for s in sources}
                root = weight.sqrt() * UP
                scaled = root[:, None] * torch.cat([sources[s].value * step[s] for s in sources], dim=1)
                error = float(root.max()) * sum(sources[s].error * step[s] for s in sources)
                rounding = 4 * U * float(upper_norm(scaled))
                ways = [lipschitz[k] ** 2 * float(weight.max())]
                ways.append(len(sources) * ((spectral(scaled) + error + rounding) * UP) ** 2)
                total += min(ways) * UP
            self._curvatures[top, rival] = total * UP
        return self._curvatures[top, rival]

    def adjoint_ranges(self, top: int, rival: int) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """Lower and upper bounds, by layer and entrywise, of the margin's adjoints v_k whatever the slopes.

        The tighter of two: interval arithmetic backward, and the bounds of `linearised_adjoint`.
        """
        row = torch.zeros(self.classes, dtype=torch.float64)
        row[top], row[rival] = 1.0, -1.0
        at_preactivation = {self.last: (row, row)}
        low, high = {}, {}
        for k in range(self.last - 1, -1, -1):
            lower = upper = torch.zeros(len(self.layers[k].bias), dtype=torch.float64)
            for t, layer in enumerate(self.layers):
                if k in layer.weights:
                    w, (a, b) = layer.weights[k].value.T, at_preactivation[t]
                    middle, radius = (a + b) / 2, (b - a) / 2 * UP + U * (a.abs() + b.abs())
                    spread = w.abs() @ radius + 1e-13 * len(middle) * (w.abs() @ middle.abs())
                    spread = (spread + layer.weights[k].error * (upper_norm(middle) + upper_norm(radius))) * UP
                    lower, upper = lower + w @ middle - spread, upper + w @ middle + spread
            centre, spread = self.linearised_adjoint(k, top, rival)
            lower, upper = torch.maximum(lower, centre - spread), torch.minimum(upper, centre + spread)
            low[k], high[k] = lower, upper
            shallow, steep = self.functions[k].slopes
            corners = torch.stack([lower * shallow, lower * steep, upper * shallow, upper * steep])
            slack = 4 * U * corners.abs().amax(0)
            at_preactivation[k] = corners.amin(0) - slack, corners.amax(0) + slack
        return low, high

    def linearised_adjoint(self, k: int, top: int, rival: int) -> tuple[Tensor, Tensor]:
        """v_k in the network linearised at the middle slopes, and an upper bound of its distance from the true v_k.

        Both entrywise, (entries of k,); the distance is bounded by the sum over later j of ||B_jk e|| r_j ||v_j||.
        """
        blocks, radius = self._expansions[0], self._radii[0]
        size = len(self.layers[k].bias)
        centre, spread = torch.zeros(size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)
        norms: dict[int, float] = {}
        for j in range(self.last - 1, k - 1, -1):
            own = blocks.get((self.last, j))
            row = (
                own.value[top] - own.value[rival] if own else torch.zeros(len(self.layers[j].bias), dtype=torch.float64)
            )
            error = (2 * own.error + 4 * U * own.frobenius) * UP if own else 0.0
            later = [(t, blocks[t, j]) for t in range(j + 1, self.last) if (t, j) in blocks]
            if j == k:
                columns = [(upper_norm(m.value, 0) + m.error) * radius[t] * norms[t] for t, m in later]
                centre, spread = row, (sum(columns, torch.zeros(size, dtype=torch.float64)) + error) * UP
            else:
                norms[j] = (float(upper_norm(row)) + error + sum(m.norm * radius[t] * norms[t] for t, m in later)) * UP
        return centre, spread

    # --- the weights on the input ----------------------------------------------------------------------------------

    @cached_property
    def input_weights(self) -> dict[int, Matrix]:
        """The weights on the input by layer, in an orthonormal basis of the space that their rows span.

        Norms and inner products of rows stay the same up to ORTHONORMAL and the errors. Where that space is not smaller
        than the input, or the computed basis is not orthonormal within ORTHONORMAL, they are the weights as they stand.
        """
        weights = {k: layer.weights[INPUT] for k, layer in enumerate(self.layers) if INPUT in layer.weights}
        stacked = torch.cat([matrix.value for matrix in weights.values()])
        if len(stacked) >= stacked.shape[1]:
            return weights
        basis = torch.linalg.qr(stacked.T).Q.T
        skew = float(upper_norm(basis @ basis.T - torch.eye(len(basis), dtype=basis.dtype)))
        gamma = (stacked.shape[1] + 4) * U * UP
        if skew + gamma * len(basis) > ORTHONORMAL:
            return weights
        found = {}
        for k, matrix in weights.items():
            value = matrix.value @ basis.T
            left = float(upper_norm(matrix.value - value @ basis)) + 2 * gamma * matrix.frobenius * len(basis) ** 0.5
            found[k] = Matrix(value, (matrix.error + left) * UP)
        return found


def slope_error(function: Function, z: Vectors) -> Tensor:
    """Upper bound, (batch,), of the distance between any slope at the computed z and the same at the exact z."""
    moved = z.error + 64 * U * upper_norm(z.value, -1)
    return (function.largest_curvature * moved + 1e-13 * function.amplification) * UP


def _product(left: Matrix, factor: float, right: Matrix) -> Matrix:
    """left factor right."""
    gamma = (left.value.shape[1] + 6) * U * UP
    error = left.norm * right.error + left.error * right.frobenius + gamma * left.frobenius * right.frobenius
    return Matrix((left.value * factor) @ right.value, abs(factor) * error * UP)


def _total(parts: list[Matrix]) -> Matrix:
    value = torch.stack([part.value for part in parts]).sum(0)
    error = sum(part.error for part in parts) + len(parts) * U * sum(part.frobenius for part in parts)
    return Matrix(value, error * UP if len(parts) > 1 else parts[0].error)
