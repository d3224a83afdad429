"""Certificates and attacks from bounds anchored at the sample (theory section 1).

Anchored bounds are more expensive than global ones, and evaluated only for rivals that can decide a sample.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from certify_cli.bounds.global_bounds.anchored import Anchored
from certify_cli.certificates.closed_form import anchored_radii, attack_radius
from certify_cli.certificates.dual import weakest_rivals
from certify_cli.network.evaluated import EvaluatedPoints
from certify_cli.numerics.deadline import OutOfTime


@dataclass(frozen=True, eq=False)
class Constants:
    """Upper bounds for the margins towards all classes, (batch, classes) each: the arguments of the closed forms.

    lower, upper: of -lambda_min and lambda_max of the Hessian.   lipschitz: Lipschitz constants.
    Entries may be replaced by constants anchored at the sample that take the same place in a closed form.
    """

    lower: Tensor
    upper: Tensor
    lipschitz: Tensor


def anchored(
    anchors: Anchored, point: EvaluatedPoints, radius: Tensor, constants: Constants
) -> tuple[Tensor, Constants]:
    """The table of certified radii, enlarged by anchored constants, and the constants that gave each entry.

    radius (batch, classes): certified already.   constants: the global ones.

    Only rivals that can be a sample's weakest are treated; the smallest radius is the same as if all were.
    """
    radius = radius.clone()
    lower, lipschitz = constants.lower.clone(), constants.lipschitz.clone()
    for todo, rival in weakest_rivals(point, radius):
        curvature, slope = constants.lower[todo, rival], constants.lipschitz[todo, rival]
        try:
            change, remainder = anchors.change(todo, rival), anchors.lower(todo, rival)
            secant = anchors.lipschitz(todo, rival)
        except OutOfTime:
            break
        radii = torch.stack(
            anchored_radii(
                point.margin_low[todo, rival], point.gradient_norm[todo, rival], curvature, slope,
                change, remainder, secant,
            )
        )  # fmt: skip
        best, form = radii.max(0)
        better = best > radius[todo, rival]
        index, rival, form = todo[better], rival[better], form[better]
        radius[index, rival] = best[better]
        used = torch.stack([change, remainder, curvature])[:, better].gather(0, form.unsqueeze(0)).squeeze(0)
        lower[index, rival] = torch.minimum(lower[index, rival], used)
        used = torch.where(form == 2, secant[better], slope[better])
        lipschitz[index, rival] = torch.minimum(lipschitz[index, rival], used)
    return radius, Constants(lower, constants.upper, lipschitz)


def certified_attack(
    anchors: Anchored, point: EvaluatedPoints, constants: Constants
) -> tuple[Tensor, Tensor, Constants]:
    """The nearest certified attack of each sample.

    Returns its radius (batch,), rounded up, inf where there is none; its rival (batch,); and the constants, with
    anchored ones where they were used. These are evaluated for one rival per sample, the nearest to first order.
    """
    blocked = point.own | ~point.finite.unsqueeze(1)
    every = torch.arange(len(blocked), device=blocked.device)
    distance = (point.margin_high / point.gradient_norm_low).masked_fill(blocked, torch.inf)
    rival = distance.argmin(1)
    upper = constants.upper.clone()
    upper[every, rival] = torch.minimum(upper[every, rival], anchors.upper(every, rival))
    certified = attack_radius(point.margin_high, point.gradient_norm_low, upper).masked_fill(blocked, torch.inf)
    nearest, target = certified.min(1)
    return nearest, target, Constants(constants.lower, upper, constants.lipschitz)
