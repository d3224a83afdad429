"""The methods: one table, from a name to a function that certifies a batch.

A new method is one entry here. `auto` runs every method that applies, in the table's order, and keeps the largest
certified radius and the nearest attack of each sample. First comes what costs little, then what leaves little to do for
those behind it, which look no further where they cannot certify more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from certify_cli.attacks.replay import replayed_along
from certify_cli.bounds.global_bounds.curvature import why_no_curvature
from certify_cli.bounds.global_bounds.model_bounds import ModelBounds
from certify_cli.certificates.anchoring import Constants, anchored, certified_attack
from certify_cli.certificates.ball_search import BallBound, linear_bound, lipschitz_bound, search_balls
from certify_cli.certificates.certificates import Certificates
from certify_cli.certificates.closed_form import hybrid_radius, lipschitz_radius
from certify_cli.certificates.dual import refined
from certify_cli.certificates.dual_on_ball import certified_attack_on_ball, extended_on_balls
from certify_cli.certificates.local import fits, local_radii
from certify_cli.certificates.local_attack import certified_local_attack
from certify_cli.errors import MethodError, UsageError, quoted
from certify_cli.network.evaluated import EvaluatedPoints
from certify_cli.network.graph import Network

AUTO = "auto"
TANGENT_METHODS = ("curvature", "dual")


Certify = Callable[[ModelBounds, EvaluatedPoints, bool, Certificates | None], Certificates]
"""(analysis, point, attack?, what cheaper methods have found for these samples or None) -> certificates."""


@dataclass(frozen=True)
class Method:
    """A method of certification, and how `auto` uses it.

    applies: gives None, or why the method cannot apply to a network.
    attacks: whether it can certify attacks. Of several methods only the first that can does: on the models measured,
    expensive ones add an attack for few samples, at the price of a search.
    expensive: `auto` leaves out a sample whose verdicts are known.   searched: it tries many balls a sample, so that
    small batches suffice.
    """

    name: str
    summary: str
    applies: Callable[[Network], str | None]
    certify: Certify
    attacks: bool = False
    expensive: bool = False
    searched: bool = False


def by_lipschitz(
    model_bounds: ModelBounds, point: EvaluatedPoints, attack: bool, before: Certificates | None
) -> Certificates:
    """Margin over Lipschitz constant, for every rival."""
    lipschitz = model_bounds.lipschitz_pairs.rows(point.prediction)
    radius, rival = _weakest(point, lipschitz_radius(point.margin_low, lipschitz))
    none = torch.full_like(radius, torch.nan)
    return Certificates(
        radius=radius,
        rival=rival,
        gradient=none,
        curvature_lower=none,
        curvature_upper=none,
        lipschitz=_at(lipschitz, rival),
        attack=none,
        witness=point.x,
        near=point.x,
        method=torch.full_like(rival, _index("lipschitz")),
    )


def by_curvature(
    model_bounds: ModelBounds, point: EvaluatedPoints, attack: bool, before: Certificates | None
) -> Certificates:
    """The closed form with the global curvature bound, joined with the Lipschitz constant, at the sample and at few
    further points, or with bounds anchored at the sample, whichever certifies more; attack along -g."""
    return _by_tangents("curvature", model_bounds.effort.tangents, model_bounds, point, attack)


def by_dual(
    model_bounds: ModelBounds, point: EvaluatedPoints, attack: bool, before: Certificates | None
) -> Certificates:
    """The same, at further points until the gap stops closing: the published dual (CRC) for all rivals; then with the
    curvature of balls little larger than what is certified."""
    return _by_tangents("dual", model_bounds.effort.dual_steps, model_bounds, point, attack, balls=True)


def _by_tangents(
    name: str,
    steps: int,
    model_bounds: ModelBounds,
    point: EvaluatedPoints,
    attack: bool,
    balls: bool = False,
) -> Certificates:
    predicted = point.prediction
    everywhere = Constants(
        lower=model_bounds.curvature_pairs.rows(predicted),
        upper=model_bounds.curvature_pairs.columns(predicted),
        lipschitz=model_bounds.lipschitz_pairs.rows(predicted),
    )
    gradient, anchors = point.gradient_norm, model_bounds.anchored_at(point)
    table = hybrid_radius(point.margin_low, gradient, everywhere.lower, everywhere.lipschitz)
    # a tangent at another point needs a bound of the Hessian: the global one
    sharp = refined(point, table, everywhere.lower, everywhere.upper, steps)
    raised, decided = anchored(anchors, point, sharp.radius, everywhere)
    sharp = replace(sharp, radius=raised)
    if balls:
        sharp = extended_on_balls(model_bounds, point, sharp, everywhere.lower, everywhere.upper, steps)
    radius, rival = _weakest(point, sharp.radius)
    norm, witness = torch.full_like(radius, torch.nan), point.x
    if attack:
        nearest, target, decided = certified_attack(anchors, point, decided)
        if balls:
            nearest, target = certified_attack_on_ball(model_bounds, point, nearest, target)
        witness, norm = _along_gradient(point, target, nearest)
    return Certificates(
        radius=radius,
        rival=rival,
        gradient=_at(gradient, rival),
        curvature_lower=_at(decided.lower, rival),
        curvature_upper=_at(decided.upper, rival),
        lipschitz=_at(decided.lipschitz, rival),
        attack=norm,
        witness=witness,
        near=sharp.ends,
        method=torch.full_like(rival, _index(name)),
    )


def by_local(
    model_bounds: ModelBounds, point: EvaluatedPoints, attack: bool, before: Certificates | None
) -> Certificates:
    """Curvature on the ball around the sample, expanded there layer by layer; never less than what was found before, or
    `curvature` finds."""
    found = by_curvature(model_bounds, point, attack, None) if before is None else before
    radius, rival = local_radii(model_bounds, point, found.radius)
    own = torch.full_like(rival, _index("local"))
    found = _raised(point, found, radius, rival, own, alone=before is None)
    open_ = found.attack.isnan().nonzero()[:, 0]
    if not attack or not len(open_):
        return found
    part = point.at(open_)
    nearest, target = certified_local_attack(
        model_bounds, part, model_bounds.effort.local is not None and fits(model_bounds)
    )
    witness, norm = _along_gradient(part, target, nearest)
    return replace(
        found,
        attack=found.attack.index_copy(0, open_, norm),
        witness=found.witness.index_copy(0, open_, witness),
    )


def by_ball_search(*names: str) -> Certify:
    """The bounds of `names` in one search, for networks with or without curvature; never less than what was found
    before, or `lipschitz` finds."""
    bounds = tuple(BALL_BOUNDS[name] for name in names)

    def certify(
        model_bounds: ModelBounds, point: EvaluatedPoints, attack: bool, before: Certificates | None
    ) -> Certificates:
        found = by_lipschitz(model_bounds, point, False, None) if before is None else before
        balls = search_balls(bounds, model_bounds, point, found.radius)
        own = torch.tensor([_index(name) for name in names], dtype=torch.int64, device=balls.bound.device)[balls.bound]
        return _raised(point, found, balls.radius, balls.rival, own, alone=before is None)

    return certify


BALL_BOUNDS: dict[str, BallBound] = {"linear": linear_bound, "local-lipschitz": lipschitz_bound}
"""Bounds that hold for all rivals at once, and where the earlier ones' ranges are as good for the later ones: `auto`
searches them together."""


def _raised(
    point: EvaluatedPoints, found: Certificates, radius: Tensor, rival: Tensor, own: Tensor, alone: bool
) -> Certificates:
    """`found` with the larger radii, of the methods `own` (batch,), and NaN for their figures. alone: every sample is
    theirs, larger or not."""
    better = radius > found.radius
    none = torch.full_like(radius, torch.nan)
    gradient = _at(point.gradient_norm, rival) if point.smooth else none
    return replace(
        found,
        radius=torch.where(better, radius, found.radius),
        rival=torch.where(better, rival, found.rival),
        gradient=torch.where(better, gradient, found.gradient),
        curvature_lower=torch.where(better, none, found.curvature_lower),
        curvature_upper=torch.where(better, none, found.curvature_upper),
        lipschitz=torch.where(better, none, found.lipschitz),
        method=own if alone else torch.where(better, own, found.method),
    )


def _along_gradient(point: EvaluatedPoints, target: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
    """Adversarial examples promised at `radius` (batch,) down the margin to `target` (batch,), and their norms."""
    every = torch.arange(len(target), device=target.device)
    return replayed_along(point, -point.gradients.value[every, target], radius)


def _weakest(point: EvaluatedPoints, radius: Tensor) -> tuple[Tensor, Tensor]:
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
            "closed form with curvature and Lipschitz bounds, global or anchored at the sample; attack certificates",
            why_no_curvature,
            by_curvature,
            attacks=True,
        ),
        Method(
            "dual",
            "the same closed form at further points until the gap stops closing (CRC, all rivals)",
            why_no_curvature,
            by_dual,
            attacks=True,
            expensive=True,
        ),
        Method(
            "local",
            "curvature on the ball around the sample, expanded there layer by layer, proved ball by ball",
            why_no_curvature,
            by_local,
            attacks=True,
            expensive=True,
            searched=True,
        ),
        Method(
            "linear",
            "linear relaxation over the ball, substituted backward, for every activation and max pooling",
            _everywhere,
            by_ball_search("linear"),
            expensive=True,
            searched=True,
        ),
        Method(
            "local-lipschitz",
            "margin over a Lipschitz constant on the ball, by the slopes that its pre-activations allow",
            _everywhere,
            by_ball_search("local-lipschitz"),
            expensive=True,
            searched=True,
        ),
    )
}


def _index(name: str) -> int:
    return list(METHODS).index(name)


def method_name(index: int) -> str:
    return list(METHODS)[index]


def select(name: str, network: Network) -> tuple[Method, ...]:
    """The methods that `name` stands for on this network: itself, or for `auto` every one that applies, those of
    BALL_BOUNDS as one.

    Raises UsageError for an unknown name and MethodError (naming the layer) for one that cannot apply.
    """
    if name == AUTO:
        applying = [method for method in METHODS.values() if method.applies(network) is None]
        joined = replace(
            METHODS[next(iter(BALL_BOUNDS))], name="+".join(BALL_BOUNDS), certify=by_ball_search(*BALL_BOUNDS)
        )
        return (*(method for method in applying if method.name not in BALL_BOUNDS), joined)
    if name not in METHODS:
        raise UsageError(f"--method {quoted(name)} is not known; choose from {', '.join((AUTO, *METHODS))}")
    reason = METHODS[name].applies(network)
    if reason is not None:
        raise MethodError(f"--method {name} cannot apply to this model: {reason}; use --method auto or lipschitz")
    return (METHODS[name],)


def certify_batch(
    methods: tuple[Method, ...],
    model_bounds: ModelBounds,
    point: EvaluatedPoints,
    attack: bool,
    levels: tuple[float, ...] = (),
) -> Certificates:
    """The best of the given methods, sample by sample, in their order.

    levels: radii whose verdicts are wanted. Where they are given, a sample for which every verdict is known (certified
    above the level, or attacked at or below it) is spared the dear methods, unless the effort is `max`.
    """
    best = methods[0].certify(model_bounds, point, attack and methods[0].attacks, None)
    asked = methods[0].attacks
    for method in methods[1:]:
        todo = torch.arange(len(point.x), device=point.x.device)
        if method.expensive and levels and not model_bounds.effort.every_verdict:
            todo = (~_decided(best, levels)).nonzero().squeeze(1)
        if not len(todo):
            continue
        part = point if len(todo) == len(point.x) else point.at(todo)
        known = best.at(todo)
        found = method.certify(model_bounds, part, attack and method.attacks and not asked, known)
        best = best.put(todo, known.best_of(found))
        asked = asked or method.attacks
    return best


def _decided(found: Certificates, levels: tuple[float, ...]) -> Tensor:
    known = [(found.radius > level) | (found.attack <= level) for level in levels]
    return torch.stack(known).all(0)
