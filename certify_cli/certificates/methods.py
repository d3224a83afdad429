"""The methods: one table, from a name to a function that certifies a batch.

A new method is one entry here. `auto` runs every method that applies, cheapest (first in the table) first, and keeps
the largest certified radius and the nearest attack of each sample.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from certify_cli.bounds.analysis import Analysis
from certify_cli.bounds.curvature import why_no_curvature
from certify_cli.certificates.attack import replayed
from certify_cli.certificates.certificates import Certificates
from certify_cli.certificates.closed_form import attack_radius, hybrid_radius, lipschitz_radius
from certify_cli.certificates.point import Point
from certify_cli.certificates.tangent import sharpened
from certify_cli.errors import MethodError, UsageError
from certify_cli.network.graph import Network

AUTO = "auto"
TANGENTS = {"fast": 0, "normal": 1, "max": 4}
"""By effort: at how many further points the closed form is taken, for each rival that can still be the nearest."""


@dataclass(frozen=True)
class Method:
    """`applies` gives None, or why the method cannot apply to a network. `certify` takes (analysis, point, attack?)."""

    name: str
    summary: str
    applies: Callable[[Network], str | None]
    certify: Callable[[Analysis, Point, bool], Certificates]


def by_lipschitz(analysis: Analysis, point: Point, attack: bool) -> Certificates:
    """Margin over Lipschitz constant, for every rival."""
    lipschitz = analysis.lipschitz_pairs.rows(point.prediction)
    radius, rival = _weakest(point, lipschitz_radius(point.margin_low, lipschitz))
    none = torch.full_like(radius, torch.nan)
    return Certificates(
        radius,
        rival,
        none,
        none,
        none,
        _at(lipschitz, rival),
        none,
        point.x,
        torch.full_like(rival, _index("lipschitz")),
    )


def by_curvature(analysis: Analysis, point: Point, attack: bool) -> Certificates:
    """The closed form with the global curvature bound, joined with the Lipschitz constant, then at further points;
    attack along -g."""
    predicted = point.prediction
    lipschitz = analysis.lipschitz_pairs.rows(predicted)
    lower = analysis.curvature_pairs.rows(predicted)
    upper = analysis.curvature_pairs.columns(predicted)
    gradient = point.gradient_norm
    table = hybrid_radius(point.margin_low, gradient, lower, lipschitz)
    radius, rival = _weakest(point, sharpened(point, table, lower, TANGENTS[analysis.effort]))
    norm, witness = torch.full_like(radius, torch.nan), point.x
    if attack:
        promised = attack_radius(point.margin_high, point.gradient_norm_low, upper)
        nearest, target = promised.masked_fill(point.own | ~point.finite.unsqueeze(1), torch.inf).min(1)
        direction = -point.gradients.value[torch.arange(len(target), device=target.device), target]
        witness, norm = replayed(point, direction, nearest)
    return Certificates(
        radius,
        rival,
        _at(gradient, rival),
        _at(lower, rival),
        _at(upper, rival),
        _at(lipschitz, rival),
        norm,
        witness,
        torch.full_like(rival, _index("curvature")),
    )


def _weakest(point: Point, radius: Tensor) -> tuple[Tensor, Tensor]:
    """The least radius over all rivals and the rival that has it; the prediction itself is no rival."""
    least, rival = radius.masked_fill(point.own, torch.inf).min(1)
    runner_up = point.margin.masked_fill(point.own, torch.inf).argmin(1)
    return least, torch.where(least.isinf(), runner_up, rival)


def _at(table: Tensor, rival: Tensor) -> Tensor:
    return table.gather(1, rival.unsqueeze(1)).squeeze(1)


def _everywhere(network: Network) -> None:
    return None


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(
            "lipschitz", "margin over a global Lipschitz constant (product of norms, LipLT)", _everywhere, by_lipschitz
        ),
        Method(
            "curvature",
            "closed form with a global curvature bound, joined with the Lipschitz constant; attack certificates",
            why_no_curvature,
            by_curvature,
        ),
    )
}


def _index(name: str) -> int:
    return list(METHODS).index(name)


def method_name(index: int) -> str:
    return list(METHODS)[index]


def select(name: str, network: Network) -> tuple[Method, ...]:
    """The methods that `name` stands for on this network: itself, or for `auto` every one that applies.

    Raises UsageError for an unknown name and MethodError (naming the layer) for one that cannot apply.
    """
    if name == AUTO:
        return tuple(m for m in METHODS.values() if m.applies(network) is None)
    if name not in METHODS:
        raise UsageError(f"--method {name!r} is not known; choose from {', '.join((AUTO, *METHODS))}")
    reason = METHODS[name].applies(network)
    if reason is not None:
        raise MethodError(f"--method {name} cannot apply to this model: {reason}; use --method auto or lipschitz")
    return (METHODS[name],)


def certify_batch(methods: tuple[Method, ...], analysis: Analysis, point: Point, attack: bool) -> Certificates:
    """The best of the given methods, sample by sample."""
    best = methods[0].certify(analysis, point, attack)
    for method in methods[1:]:
        best = best.best_of(method.certify(analysis, point, attack))
    return best
