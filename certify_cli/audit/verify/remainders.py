"""The expansion at a sample with its remainders on a ball, for the check of a run (theory section 4, Jacobian tier).

In the ball ||d|| < e pre-activation l moves by  D_l = A_l d + sum over earlier k of B_lk q_k(D_k),  where q_k is the
activation's remainder after its tangent and A, B are the Jacobians at the sample. A bound of the remainders bounds how
far a margin may lie below its tangent.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from certify_cli.audit.verify.functions import Function
from certify_cli.audit.verify.prover import ORTHONORMAL, Prover, Values, Vectors, slope_error
from certify_cli.audit.verify.reading import INPUT, UP, U, upper_norm

UNDERFLOW = 1e-70
"""Added to fourth roots, and to sums of squares: fourth powers lose less than this by underflow."""


@dataclass(frozen=True, eq=False)
class Balls:
    """Bounds on balls of `radius` (batch, 1), by layer l, each (batch, entries) unless said otherwise.

    low, high: of D_l.   residual: of |D_l - A_l d|.   quotient: lower and upper bound of 2 q_l(t) / t^2.
    gram: A_k A_j^T by (k, j), (batch, entries of k, entries of j).   squared_gram: upper bounds of its squared entries.
    """

    radius: Tensor
    low: dict[int, Tensor]
    high: dict[int, Tensor]
    residual: dict[int, Tensor]
    quotient: dict[int, tuple[Tensor, Tensor]]
    gram: dict[tuple[int, int], Tensor]
    squared_gram: dict[tuple[int, int], Tensor]

    def magnitude(self, k: int) -> Tensor:
        """Upper bound of |D_k|."""
        return torch.maximum(-self.low[k], self.high[k])

    def half_squares(self, u: Tensor, k: int) -> Tensor:
        """Upper bounds, (batch, rows), of half the sum of u_j D_kj^2 for every row of u (batch, rows, entries) >= 0."""
        separate = (u @ (self.magnitude(k) ** 2)[:, :, None])[..., 0]
        fourth = ((u @ self.squared_gram[k, k]) * u).sum(2) * UP
        spread = (u @ (self.residual[k] ** 2)[:, :, None])[..., 0] * UP
        return (
            torch.minimum(separate, (self.radius * (fourth**0.25 + UNDERFLOW) + spread**0.5) ** 2) / 2 * UP + UNDERFLOW
        )


def balls(prover: Prover, values: Values, radius: Tensor) -> Balls:
    """Bounds of the pre-activations' movements in the balls of `radius` (batch,), layer after layer."""
    e = radius[:, None]
    found = Balls(e, {}, {}, {}, {}, {}, {})
    blocks = _jacobians(prover, values)
    for k in range(prover.last):
        jacobian, error = blocks[k, INPUT]
        low = high = torch.zeros_like(values.z[k].value)
        for j in range(k):
            if (k, j) in blocks:
                b, b_error = blocks[k, j]
                ends = torch.stack([b * found.quotient[j][0][:, None], b * found.quotient[j][1][:, None]])
                doubt = b_error[:, None, None] * torch.stack(found.quotient[j]).abs().amax(0)[:, None]
                high = high + found.half_squares((ends.amax(0).clamp(min=0) + doubt) * UP, j)
                low = low + found.half_squares(((-ends).amax(0).clamp(min=0) + doubt) * UP, j)
        linear = (upper_norm(jacobian, 2) + error[:, None]) * e * UP  # UP is more than ORTHONORMAL
        found.residual[k] = torch.maximum(low, high) * UP
        found.low[k], found.high[k] = -(linear + low) * UP, (linear + high) * UP
        found.quotient[k] = _quotients(prover.functions[k], values.z[k], found.low[k], found.high[k])
        for j in range(k + 1):
            other, other_error = blocks[j, INPUT]
            slack = error * upper_norm(other, (1, 2)) + other_error * upper_norm(jacobian, (1, 2)) + error * other_error
            rounding = (
                ((other.shape[2] + 4) * U + 2 * ORTHONORMAL) * upper_norm(jacobian, (1, 2)) * upper_norm(other, (1, 2))
            )
            found.gram[k, j] = jacobian @ other.mT
            square = found.gram[k, j].abs() + ((slack + rounding) * UP)[:, None, None]
            found.squared_gram[k, j] = square.square() * UP
    return found


def remainders(prover: Prover, values: Values, adjoints: dict[int, Vectors], radius: Tensor) -> Tensor:
    """Upper bounds, (batch, classes), of how far a margin lies below its tangent at the sample, anywhere in the ball.

    radius: of the ball, (batch,).   adjoints: of the margins, as `Prover.adjoints` gives them.
    """
    if not prover.last:  # affine: nothing remains
        return torch.zeros_like(adjoints[INPUT].error)
    ball = balls(prover, values, radius)
    weights = {k: _weights(adjoints[k], ball.quotient[k]) for k in range(prover.last)}
    separate = sum((weights[k] * ball.magnitude(k)[:, None] ** 2).sum(2) for k in weights)
    spread = sum((weights[k] * ball.residual[k][:, None] ** 2).sum(2) for k in weights)
    fourth = sum(
        (1 if j == k else 2) * ((weights[k] @ squared) * weights[j]).sum(2)
        for (k, j), squared in ball.squared_gram.items()
    )
    joint = (
        ball.radius * ((torch.as_tensor(fourth, dtype=torch.float64) * UP) ** 0.25 + UNDERFLOW)
        + (torch.as_tensor(spread, dtype=torch.float64) * UP) ** 0.5
    ) ** 2
    return torch.minimum(torch.as_tensor(separate, dtype=torch.float64), joint) / 2 * UP + UNDERFLOW


def _quotients(function: Function, z: Vectors, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Range, outward, of 2 q(t) / t^2 at the exact z for t in [low, high]; it moves with z by at most `third`."""
    off = z.error[:, None]
    lower, upper = function.curvature_range(z.value + low - off, z.value + high + off)
    if function.third == float("inf"):
        return lower, upper
    smallest, largest = function.quotient_range(z.value, low, high)
    return torch.maximum(lower, smallest - function.third * off), torch.minimum(upper, largest + function.third * off)


def _jacobians(prover: Prover, values: Values) -> dict[tuple[int, int], tuple[Tensor, Tensor]]:
    """Jacobians of the pre-activations, with upper bounds of the Frobenius norms of their errors.

    A_k is at (k, INPUT) and B_kj at (k, j), each (batch, entries of k, entries of the source); the bounds are (batch,).
    """
    found: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
    count = len(values.h[INPUT].value)
    none = torch.zeros(count, dtype=torch.float64)
    for t in range(prover.last):
        for source in [INPUT, *range(t)]:
            parts = []
            if source in prover.layers[t].weights:
                matrix = prover.input_weights[t] if source == INPUT else prover.layers[t].weights[source]
                parts.append((matrix.value.expand(count, -1, -1), none + matrix.error))
            for k in range(source + 1, t):
                if k in prover.layers[t].weights and (k, source) in found:
                    matrix, function = prover.layers[t].weights[k], prover.functions[k]
                    jacobian, error = found[k, source]
                    slope = function.slope(values.z[k].value)
                    off = slope_error(function, values.z[k])
                    sloped = slope[:, :, None] * jacobian
                    size = upper_norm(jacobian, (1, 2))
                    error = function.lipschitz * error + (off + U) * (size + error)
                    gamma = (jacobian.shape[1] + 4) * U * UP
                    whole = matrix.norm * error
                    whole = whole + (matrix.error + gamma * matrix.frobenius) * (function.lipschitz * size + error)
                    parts.append((matrix.value @ sloped, whole * UP))
            if parts:
                value = torch.stack([part for part, _ in parts]).sum(0) if len(parts) > 1 else parts[0][0]
                error = torch.stack([error for _, error in parts]).sum(0)
                rounding = len(parts) * U * sum(upper_norm(part, (1, 2)) for part, _ in parts)
                found[t, source] = value, (error + rounding) * UP
    return found


def _weights(v: Vectors, quotient: tuple[Tensor, Tensor]) -> Tensor:
    """Upper bounds, (batch, classes, entries), of max(0, -v k) for every k in the range `quotient`."""
    lower, upper = quotient[0][:, None], quotient[1][:, None]
    weight = torch.maximum(-v.value * lower, -v.value * upper).clamp(min=0)
    return (weight + v.error[..., None] * torch.maximum(lower.abs(), upper.abs())) * UP
