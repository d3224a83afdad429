"""Certificates and attacks from bounds anchored at the sample, for the rivals that can decide (theory section 1)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from certify_cli.bounds.global_bounds.anchored import Anchored
from certify_cli.certificates.closed_form import anchored_radii, attack_radius
from certify_cli.certificates.dual import weakest_rivals
from certify_cli.network.evaluated import EvaluatedPoints


@dataclass(frozen=True, eq=False)
class Constants:
    """What a closed form takes, (batch, classes): bounds of -lambda_min (`lower`) and lambda_max (`upper`) of the
    margins' Hessians, and Lipschitz constants; or what takes their place around a sample."""

    lower: Tensor
    upper: Tensor
    lipschitz: Tensor


def anchored(
    anchors: Anchored, point: EvaluatedPoints, radius: Tensor, constants: Constants
) -> tuple[Tensor, Constants]:
    """The table of certified radii (batch, classes), raised where the anchored constants certify more, and the
    constants that decided each entry. `constants` are the global ones.

    Raised for the rivals that can be a sample's weakest: the same least radii as for all, at the price of few.
    """
    radius = radius.clone()
    lower, lipschitz = constants.lower.clone(), constants.lipschitz.clone()
    for todo, rival in weakest_rivals(point, radius):
        curvature, slope = constants.lower[todo, rival], constants.lipschitz[todo, rival]
        change, remainder = anchors.change(todo, rival), anchors.lower(todo, rival)
        secant = anchors.lipschitz(todo, rival)
        ways = torch.stack(
            anchored_radii(
                point.margin_low[todo, rival], point.gradient_norm[todo, rival], curvature, slope,
                change, remainder, secant,
            )
        )  # fmt: skip
        best, way = ways.max(0)
        better = best > radius[todo, rival]
        index, rival, way = todo[better], rival[better], way[better]
        radius[index, rival] = best[better]
        used = torch.stack([change, remainder, curvature])[:, better].gather(0, way.unsqueeze(0)).squeeze(0)
        lower[index, rival] = torch.minimum(lower[index, rival], used)
        used = torch.where(way == 2, secant[better], slope[better])
        lipschitz[index, rival] = torch.minimum(lipschitz[index, rival], used)
    return radius, Constants(lower, constants.upper, lipschitz)


def certified_attack(
    anchors: Anchored, point: EvaluatedPoints, constants: Constants
) -> tuple[Tensor, Tensor, Constants]:
    """The nearest promised attack: its radius (batch,), inf where there is none, the class it is towards, and the
    constants with those that promised it.

    Anchored for one rival a sample, the nearest to first order.
    """
    blocked = point.own | ~point.finite.unsqueeze(1)
    every = torch.arange(len(blocked), device=blocked.device)
    distance = (point.margin_high / point.gradient_norm_low).masked_fill(blocked, torch.inf)
    rival = distance.argmin(1)
    upper = constants.upper.clone()
    upper[every, rival] = torch.minimum(upper[every, rival], anchors.upper(every, rival))
    promised = attack_radius(point.margin_high, point.gradient_norm_low, upper).masked_fill(blocked, torch.inf)
    nearest, target = promised.min(1)
    return nearest, target, Constants(constants.lower, upper, constants.lipschitz)
