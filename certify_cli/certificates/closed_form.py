"""From a margin, a gradient and a bound to a radius: the closed forms of theory section 1.

Entrywise on float64 tensors of one shape. `margin` and `gradient_low` are lower bounds, everything else upper bounds;
certified radii come out rounded down, attack radii up. A margin that is not positive gives radius 0.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from certify_cli.numerics.rounding import UNIT, down, up

TINY = 1e-150
"""Added to gradient norms (a sound direction), so that no square or product below them can vanish by underflow."""


def lipschitz_radius(margin: Tensor, lipschitz: Tensor) -> Tensor:
    """f / L: no smaller perturbation brings the margin to 0. inf where L = 0 (the rival cannot flip)."""
    return _positive(margin, down(margin / lipschitz, 2), lipschitz == 0)


def curvature_radius(margin: Tensor, gradient: Tensor, curvature: Tensor) -> Tensor:
    """2 f / (||g|| + sqrt(||g||^2 + 2 M f)), M >= -lambda_min of the Hessian everywhere. inf where g = 0 and M = 0.

    The form without cancellation: the textbook one over-claims without limit as M f / ||g||^2 approaches u.
    """
    steep = gradient + TINY
    root = (steep.square() + 2.0 * curvature * margin).sqrt()
    return _positive(margin, down(margin / (0.5 * (steep + root)), 11), (gradient == 0) & (curvature == 0))


def hybrid_radius(margin: Tensor, gradient: Tensor, curvature: Tensor, lipschitz: Tensor) -> Tensor:
    """The radius from f(x+d) >= f - int_0^|d| min(||g|| + M t, L) dt.

    The integrand is bounded by ||g|| + M t up to any t and by L beyond it, so every split point t is a proof; the best
    is t* = (L - ||g||)/M. L must hold on the whole ball (an anchored constant may not enter the integral).
    """
    ends = curvature_radius(margin, gradient, curvature)
    split = ((lipschitz - gradient) / curvature).nan_to_num(nan=0.0, posinf=math.inf).clamp(min=0.0)
    split = torch.minimum(split, torch.where(ends.isfinite(), ends, torch.zeros_like(ends)))
    zero = torch.zeros_like(split)
    used = torch.where(split > 0, gradient * split + 0.5 * curvature * split * split, zero)
    left = margin - used - 8 * UNIT * (margin + used)
    beyond = down(left.clamp(min=0.0) / lipschitz, 2)
    mixed = torch.where(left > 0, down(split + beyond, 1), zero)
    return torch.maximum(ends, _positive(margin, mixed, lipschitz == 0))


def anchored_radii(
    margin: Tensor,
    gradient: Tensor,
    curvature: Tensor,
    lipschitz: Tensor,
    change: Tensor,
    remainder: Tensor,
    secant: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Three radii, each of them certified, from constants anchored at the sample.

    1. `change`, at least ||grad f(x+d) - grad f(x)|| / ||d||, serves the integral as well as a global `curvature`, and
       the global `lipschitz` constant bounds the gradient there.
    2. `remainder` M: f(x+d) >= f + <g, d> - M ||d||^2 / 2, which says nothing of the gradient on the way.
    3. `secant` L: |f(x+d) - f(x)| <= L ||d||, which does not either: joined to a curvature in the integral it
       certified 1.6 where f = 0 at 1.414.
    """
    return (
        hybrid_radius(margin, gradient, torch.minimum(curvature, change), lipschitz),
        curvature_radius(margin, gradient, torch.minimum(curvature, remainder)),
        lipschitz_radius(margin, torch.minimum(lipschitz, secant)),
    )


def attack_radius(margin: Tensor, gradient_low: Tensor, curvature_upper: Tensor) -> Tensor:
    """2 f / (||g|| + sqrt(||g||^2 - 2 M+ f)): along -g the margin reaches 0 within it. inf where no attack is proved.

    Here `margin` is an upper bound (and may be any positive number), `gradient_low` a lower bound of ||g||.
    """
    square = down(gradient_low.square(), 1)
    discriminant = square - up(2.0 * curvature_upper * margin, 3)
    discriminant = discriminant - 2 * UNIT * discriminant.abs()
    radius = up(2.0 * margin / (gradient_low + discriminant.clamp(min=0.0).sqrt()), 8)
    promised = (gradient_low > 0) & (discriminant >= 0) & (margin > 0)
    return torch.where(promised, radius, torch.full_like(radius, math.inf))


def _positive(margin: Tensor, radius: Tensor, never_flips: Tensor) -> Tensor:
    """`radius` where the margin is positive, inf where the rival cannot flip; else 0: NaN and ties certify nothing."""
    zero = torch.zeros_like(margin)
    finite = torch.where(radius.isnan(), zero, radius)
    return torch.where(margin > 0, torch.where(never_flips, torch.full_like(margin, math.inf), finite), zero)
