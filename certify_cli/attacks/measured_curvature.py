"""Curvature, gradients and their change, measured at samples: what low-curvature training reports of a network.

Nothing here is a bound. The norm of a Hessian is found from below, by power iteration on Hessian-vector products, and
gradients are compared at a few random points; a number could be larger at another point, or in another direction. All
is of the loss l(x) = log sum_i exp(z_i - z_y), the cross-entropy with a class y, in float64.

What holds at every point is the bounds of the same loss that `loss_bounds` derives from those of the margins.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from certify_cli.bounds.global_bounds.curvature import why_no_curvature
from certify_cli.network.activations import ACTIVATIONS
from certify_cli.network.graph import Network
from certify_cli.numerics.rounding import TINY, up

EPSILON = 1e-6
"""Added to the gradient's norm, by which curvature is divided, as the paper does."""
DIRECTIONS = 8
"""Random directions in which gradients are compared, the same ones for every sample."""
ITERATIONS, CONVERGED = 100, 1e-5
"""Of the power iteration: at most so many; it ends when no sample's norm grows by more than this part."""
ENTRIES_AT_ONCE = 2**23
"""Entries of all nodes, over the samples that are measured together."""

FIGURES = ("gradient_norm", "curvature", "normalised_curvature", "gradient_change", "largest_gradient_change")
"""The measured fields of `MeasuredSample`."""


@dataclass(frozen=True)
class MeasuredSample:
    """Estimates at one sample x. None: not measured, or not finite.

    index: of the sample.   label: the class y.   gradient_norm: ||g||, g the gradient of the loss.
    curvature: ||H||, the spectral norm of the loss's Hessian, from below.
    normalised_curvature: ||H|| / (||g|| + EPSILON).
    gradient_change: ||g(x + d) - g|| / ||g||, the mean over directions of d; largest_gradient_change: the largest.
    """

    index: int
    label: int
    gradient_norm: float | None
    curvature: float | None
    normalised_curvature: float | None
    gradient_change: float | None
    largest_gradient_change: float | None


@dataclass(frozen=True)
class Measurement:
    """Estimates at some samples.

    loss: of which function.   radius: the norm of d.   note: why there is no curvature, where there is none.
    """

    loss: str
    radius: float
    samples: tuple[MeasuredSample, ...]
    note: str | None

    def over_samples(self, figure: str, statistic: Callable[[list[float]], float]) -> float | None:
        """A statistic of one of FIGURES over the samples that have it; None without any."""
        values = [value for sample in self.samples if (value := getattr(sample, figure)) is not None]
        return statistic(values) if values else None

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "estimate": True,
            "loss": self.loss,
            "radius": self.radius,
            "directions": DIRECTIONS,
            "epsilon": EPSILON,
            "note": self.note,
            "mean": {figure: self.over_samples(figure, statistics.fmean) for figure in FIGURES},
            "median": {figure: self.over_samples(figure, statistics.median) for figure in FIGURES},
            "samples": [asdict(sample) for sample in self.samples],
        }


def loss_bounds(lipschitz: float, curvature: float | None) -> dict[str, float | None]:
    """Upper bounds of gradient norm and curvature of the loss at every point, rounded up.

    lipschitz, curvature: bounds L and K of every margin's Lipschitz constant and Hessian norm.

    With the probabilities p of the softmax the gradient is sum_i p_i grad(z_i - z_y), of norm at most L. The Hessian is
    sum_i p_i Hess(z_i - z_y) plus the covariance of the grad z_i under p; along a unit vector that is the variance of
    numbers that lie in an interval of length L, at most L^2 / 4 (Popoviciu). The formula is this project's own.
    """
    return {
        "gradient_norm": lipschitz,
        "curvature": None if curvature is None else up(curvature + lipschitz * lipschitz / 4, 4),
    }


def measured(
    network: Network,
    x: Tensor,
    y: Tensor | None,
    indices: tuple[int, ...],
    radius: float,
    advance: Callable[[], None] = lambda: None,
) -> Measurement:
    """Estimates at samples x (N, *input shape), with labels y (N,) or, without, the network's own predictions.

    indices: of the samples.   advance: is called after each.
    """
    why = why_no_curvature(network)
    note = (
        None
        if why is None
        else f"{why}: curvature is not measured, as second derivatives do not see kinks; changes of gradients do"
    )
    at_once = max(1, ENTRIES_AT_ONCE // sum(node.size for node in network.nodes))
    start, *directions = _directions(network, 1 + DIRECTIONS)
    found: list[MeasuredSample] = []
    for positions in torch.arange(len(x)).split(at_once):
        part = x[positions].to(torch.float64)
        labels = _predictions(network, part) if y is None else y[positions]
        gradient, norm = _curvature(network, part, labels, start if why is None else None)
        size = _norms(gradient)
        changes = torch.stack(
            [_norms(_gradient(network, part + radius * d, labels)[0] - gradient) / size for d in directions]
        )
        columns = (size, norm, norm / (size + EPSILON), changes.mean(0), changes.amax(0))
        rows = zip(*(column.tolist() for column in columns), strict=True)
        for position, label, row in zip(positions.tolist(), labels.tolist(), rows, strict=True):
            figures = (value if math.isfinite(value) else None for value in row)
            found.append(MeasuredSample(indices[position], label, *figures))
            advance()
    name = "cross-entropy with the " + ("prediction" if y is None else "label")
    return Measurement(name, radius, tuple(found), note)


def _directions(network: Network, count: int) -> list[Tensor]:
    """Random unit vectors of the input's shape, always the same."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(count, *network.input_shape, dtype=torch.float64, generator=generator)
    return list(_along(drawn))


def _predictions(network: Network, x: Tensor) -> Tensor:
    with torch.no_grad():
        return network(x).argmax(1)


def _losses(network: Network, x: Tensor, labels: Tensor) -> Tensor:
    """Losses (batch,), as softplus of log sum_(i != y) exp(z_i - z_y): its slopes are exact where p_y rounds to 1."""
    logits = network(x)
    own = labels.unsqueeze(1)
    others = (logits - logits.gather(1, own)).scatter(1, own, -torch.inf)
    return ACTIVATIONS["softplus"]().apply(others.logsumexp(1))


def _gradient(network: Network, x: Tensor, labels: Tensor, twice: bool = False) -> tuple[Tensor, Tensor]:
    """Gradients (batch, *shape) of the losses, and the points that they can be differentiated by once more."""
    x = x.detach().requires_grad_(True)
    (gradient,) = torch.autograd.grad(_losses(network, x, labels).sum(), x, create_graph=twice)
    return gradient, x


def _curvature(network: Network, x: Tensor, labels: Tensor, start: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gradients, and Hessian norms (batch,) from below by power iteration from `start`; NaN without a start.

    The norms of H v for unit vectors v never exceed ||H||, and never fall from step to step, as H is symmetric.
    """
    gradient, points = _gradient(network, x, labels, twice=start is not None)
    norm = torch.full((len(x),), torch.nan if start is None else 0.0, dtype=torch.float64)
    if start is None:
        return gradient, norm
    vector = start.expand_as(x)
    for _ in range(ITERATIONS):
        (product,) = torch.autograd.grad((gradient * vector).sum(), points, retain_graph=True)
        before, norm = norm, _norms(product)
        if bool((norm <= before * (1 + CONVERGED)).all()):
            break
        vector = _along(product)
    return gradient.detach(), norm


def _norms(vectors: Tensor) -> Tensor:
    """Norms (batch,); squares of the smallest numbers would be 0."""
    flat = vectors.flatten(1)
    largest = flat.abs().amax(1).clamp(min=TINY)
    return (flat / largest.unsqueeze(1)).norm(dim=1) * largest


def _along(vectors: Tensor) -> Tensor:
    """Unit vectors of the same directions; zeros stay zeros."""
    return vectors / _norms(vectors).clamp(min=TINY).reshape(-1, *[1] * (vectors.dim() - 1))
