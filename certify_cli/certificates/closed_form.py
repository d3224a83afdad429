"""Closed forms for radii, from a margin, a gradient's norm and a bound (theory section 1).

Entrywise on float64 tensors of one shape:

- margin: lower bound of the margin f at the sample (for attacks an upper bound)
- gradient: upper bound of the norm of its gradient g (for attacks a lower bound, gradient_low)
- curvature, lipschitz and the like: upper bounds

Certified radii are rounded down, attack radii up. A margin that is not positive gives radius 0.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from certify_cli.numerics.rounding import UNIT, down, up

SQUARABLE = 1e-150
"""Added to gradient norms (a sound direction), so that no square or product below them can vanish by underflow."""


def lipschitz_radius(margin: Tensor, lipschitz: Tensor) -> Tensor:
    """f / L: below this norm no perturbation brings the margin to 0. inf where L = 0, because the rival cannot win."""
    return _positive(margin, down(margin / lipschitz, 2), lipschitz == 0)


def curvature_radius(margin: Tensor, gradient: Tensor, curvature: Tensor) -> Tensor:
    """2 f / (||g|| + sqrt(||g||^2 + 2 M f)), where M >= -lambda_min of the Hessian. inf where g = 0 and M = 0.

    M must hold everywhere, or on a ball to which the caller then limits the radius.

    This form has no cancellation: (sqrt(||g||^2 + 2 M f) - ||g||) / M has an unbounded relative error as M f / ||g||^2
    approaches the unit roundoff.
    """
    steep = gradient + SQUARABLE
    root = (steep.square() + 2.0 * curvature * margin).sqrt()
    return _positive(margin, down(margin / (0.5 * (steep + root)), 11), (gradient == 0) & (curvature == 0))


def hybrid_radius(margin: Tensor, gradient: Tensor, curvature: Tensor, lipschitz: Tensor) -> Tensor:
    """The radius from f(x+d) >= f - int_0^|d| min(||g|| + M t, L) dt, with M = curvature and L = lipschitz.

    For every split point the integrand is at most ||g|| + M t below it and at most L above it, so each one yields a
    proof; the best one is (L - ||g||) / M. L must be a Lipschitz constant on the whole ball: a constant anchored at the
    sample may not enter the integral.
    """
    by_curvature = curvature_radius(margin, gradient, curvature)
    split = ((lipschitz - gradient) / curvature).nan_to_num(nan=0.0, posinf=math.inf).clamp(min=0.0)
    split = torch.minimum(split, torch.where(by_curvature.isfinite(), by_curvature, torch.zeros_like(by_curvature)))
    zero = torch.zeros_like(split)
    loss = torch.where(split > 0, gradient * split + 0.5 * curvature * split * split, zero)
    remaining = margin - loss - 8 * UNIT * (margin + loss)
    after_split = down(remaining.clamp(min=0.0) / lipschitz, 2)
    mixed = torch.where(remaining > 0, down(split + after_split, 1), zero)
    return torch.maximum(by_curvature, _positive(margin, mixed, lipschitz == 0))


def anchored_radii(
    margin: Tensor,
    gradient: Tensor,
    curvature: Tensor,
    lipschitz: Tensor,
    change: Tensor,
    remainder: Tensor,
    secant: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Three certified radii, from global constants and constants anchored at the sample.

    curvature, lipschitz: hold everywhere.   The anchored constants hold for all d:

    1. change: ||grad f(x+d) - grad f(x)|| <= change ||d||. It may replace `curvature` in the integral of
       `hybrid_radius`, together with the global `lipschitz`.
    2. remainder: f(x+d) >= f + <g, d> - remainder ||d||^2 / 2. It does not bound the gradient between x and x+d.
    3. secant: |f(x+d) - f(x)| <= secant ||d||. It does not bound the gradient either: in the integral, joined with a
       curvature, it would certify 1.6 for a margin that is 0 at 1.414.
    """
    return (
        hybrid_radius(margin, gradient, torch.minimum(curvature, change), lipschitz),
        curvature_radius(margin, gradient, torch.minimum(curvature, remainder)),
        lipschitz_radius(margin, torch.minimum(lipschitz, secant)),
    )


def attack_radius(margin: Tensor, gradient_low: Tensor, curvature_upper: Tensor) -> Tensor:
    """2 f / (||g|| + sqrt(||g||^2 - 2 M f)): within it the margin reaches 0 along -g. inf where no attack is proved.

    margin: upper bound of f.   gradient_low: lower bound of ||g||.   curvature_upper: M >= lambda_max of the Hessian.
    """
    square = down(gradient_low.square(), 1)
    discriminant = square - up(2.0 * curvature_upper * margin, 3)
    discriminant = discriminant - 2 * UNIT * discriminant.abs()
    radius = up(2.0 * margin / (gradient_low + discriminant.clamp(min=0.0).sqrt()), 8)
    certified = (gradient_low > 0) & (discriminant >= 0) & (margin > 0)
    return torch.where(certified, radius, torch.full_like(radius, math.inf))


def _positive(margin: Tensor, radius: Tensor, never_flips: Tensor) -> Tensor:
    """`radius` where the margin is positive, but inf where `never_flips`; 0 for other margins, and where it is NaN."""
    zero = torch.zeros_like(margin)
    finite = torch.where(radius.isnan(), zero, radius)
    return torch.where(margin > 0, torch.where(never_flips, torch.full_like(margin, math.inf), finite), zero)
