"""Certification methods: a table from name to function.

To add a method, add an entry to METHODS, and its name and summary to `names.SUMMARIES` (docs/architecture.md has every
place). `auto` runs every applicable method in table order and keeps, per sample, the largest certified radius and the
nearest attack. The order is by cost: cheap methods first, so that expensive ones can skip samples that they cannot
improve.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from certify_cli.attacks.replay import replayed_along
from certify_cli.bounds.global_bounds.curvature import why_no_curvature
from certify_cli.bounds.global_bounds.model_bounds import ModelBounds
from certify_cli.certificates.anchoring import Constants, anchored, certified_attack
from certify_cli.certificates.ball_bounds import BallBound, linear_bound, lipschitz_bound
from certify_cli.certificates.ball_search import search_balls
from certify_cli.certificates.certificates import Certificates
from certify_cli.certificates.closed_form import hybrid_radius, lipschitz_radius
from certify_cli.certificates.dual import refined
from certify_cli.certificates.dual_on_ball import certified_attack_on_ball, extended_on_balls
from certify_cli.certificates.exactness import nearly_exact
from certify_cli.certificates.local import fits, local_radii
from certify_cli.certificates.local_attack import certified_local_attack
from certify_cli.errors import MethodError, UsageError, quoted
from certify_cli.names import AUTO
from certify_cli.network.evaluated import EvaluatedPoints
from certify_cli.network.graph import Network
from certify_cli.numerics.deadline import OutOfTime, present
from certify_cli.records import certifies, refutes

Certify = Callable[[ModelBounds, EvaluatedPoints, bool, Certificates | None], Certificates]
"""(model bounds, samples, whether to certify attacks, previous certificates of these samples or None) -> certificates.

The previous certificates are those of cheaper methods: a search begins with them. The result may be worse than they
are, and `certify_batch` keeps the better of the two."""


Prepare = Callable[[ModelBounds, Tensor], object]
"""(model bounds, predicted classes (batch,)) -> the global bounds, which the model bounds keep."""


def _no_bounds(model_bounds: ModelBounds, predicted: Tensor) -> object:
    """Nothing to prepare."""
    return None


@dataclass(frozen=True)
class Method:
    """A method of certification, and how `auto` uses it.

    applies: network -> None, or the reason why the method cannot apply to it.
    certify: certifies a batch.   prepare: computes the global bounds that it needs, whose time is no sample's.
    attacks: whether it can certify attacks. Of several methods only the first such one does, because on the models
    measured expensive methods certify attacks for few further samples, at the cost of a search.
    expensive: whether `auto` skips samples whose verdicts earlier methods settled.
    searched: whether it tries many balls per sample, so that small batches suffice.
    """

    name: str
    applies: Callable[[Network], str | None]
    certify: Certify
    prepare: Prepare = _no_bounds
    attacks: bool = False
    expensive: bool = False
    searched: bool = False


def by_lipschitz(
    model_bounds: ModelBounds, point: EvaluatedPoints, attack: bool, previous: Certificates | None
) -> Certificates:
    """Margin over the global Lipschitz constant, for every rival."""
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
    model_bounds: ModelBounds, point: EvaluatedPoints, attack: bool, previous: Certificates | None
) -> Certificates:
    """The best of two closed forms, and attacks along -g.

    The one combines the global curvature bound with the Lipschitz constant, at the sample and at few further points;
    the other uses bounds anchored at the sample.
    """
    return _by_tangents("curvature", model_bounds.effort.tangents, model_bounds, point, attack)


def by_dual(
    model_bounds: ModelBounds, point: EvaluatedPoints, attack: bool, previous: Certificates | None
) -> Certificates:
    """`by_curvature` with further points until the radius stops growing, then with curvature bounds on balls.

    The first part is the published dual (CRC) for all rivals; the balls are a little larger than the certified ones.
    """
    return _by_tangents("dual", model_bounds.effort.dual_steps, model_bounds, point, attack, balls=True)


def _by_tangents(
    name: str,
    steps: int,
    model_bounds: ModelBounds,
    point: EvaluatedPoints,
    attack: bool,
    balls: bool = False,
) -> Certificates:
    """Certificates of the method `name` from tangents at `steps` further points; balls: and from bounds on balls."""
    predicted = point.prediction
    constants = Constants(
        lower=model_bounds.curvature_pairs.rows(predicted),
        upper=model_bounds.curvature_pairs.columns(predicted),
        lipschitz=model_bounds.lipschitz_pairs.rows(predicted),
    )
    gradient, anchors = point.gradient_norm, model_bounds.anchored_at(point)
    table = hybrid_radius(point.margin_low, gradient, constants.lower, constants.lipschitz)
    # tangents at other points need a bound of the Hessian, so the global one and no anchored constant
    sharp = refined(point, table, constants.lower, constants.upper, steps)
    enlarged, decided = anchored(anchors, point, sharp.radius, constants)
    sharp = replace(sharp, radius=enlarged)
    if balls:
        sharp = extended_on_balls(model_bounds, point, sharp, constants.lower, constants.upper, steps)
    radius, rival = _weakest(point, sharp.radius)
    norm, witness = torch.full_like(radius, torch.nan), point.x
    if attack:
        with suppress(OutOfTime):
            nearest, target, with_upper = certified_attack(anchors, point, decided)
            if balls:
                nearest, target = certified_attack_on_ball(model_bounds, point, nearest, target)
            witness, norm = _along_gradient(point, target, nearest)
            decided = with_upper
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
    model_bounds: ModelBounds, point: EvaluatedPoints, attack: bool, previous: Certificates | None
) -> Certificates:
    """Curvature on the ball around the sample, expanded there layer by layer.

    The radius is at least the previous one or, without previous certificates, that of `curvature`.
    """
    base = by_curvature(model_bounds, point, attack, None) if previous is None else previous
    radius, rival = local_radii(model_bounds, point, base.radius)
    own = torch.full_like(rival, _index("local"))
    certificates = _enlarged(point, base, radius, rival, own, alone=previous is None)
    todo = certificates.attack.isnan().nonzero()[:, 0]
    if not attack or not len(todo):
        return certificates
    samples = point.at(todo)
    with suppress(OutOfTime):
        nearest, target = certified_local_attack(
            model_bounds, samples, model_bounds.effort.local is not None and fits(model_bounds)
        )
        witness, norm = _along_gradient(samples, target, nearest)
        certificates = certificates.put(todo, replace(certificates.at(todo), attack=norm, witness=witness))
    return certificates


def by_ball_search(*names: str) -> Certify:
    """A method that searches balls by the bounds `names` of BALL_BOUNDS, for networks with or without curvature.

    The radius is at least the previous one or, without previous certificates, that of `lipschitz`.
    """
    bounds = tuple(BALL_BOUNDS[name] for name in names)

    def certify(
        model_bounds: ModelBounds, point: EvaluatedPoints, attack: bool, previous: Certificates | None
    ) -> Certificates:
        base = by_lipschitz(model_bounds, point, False, None) if previous is None else previous
        indices = torch.tensor([_index(name) for name in names], dtype=torch.int64, device=base.rival.device)
        try:
            balls = search_balls(bounds, model_bounds, point, base.radius)
            return _enlarged(point, base, balls.radius, balls.rival, indices[balls.bound], alone=previous is None)
        except OutOfTime:  # before the first ball
            return replace(base, method=indices[:1].expand(len(base.rival))) if previous is None else base

    return certify


BALL_BOUNDS: dict[str, BallBound] = {"linear": linear_bound, "local-lipschitz": lipschitz_bound}
"""Bounds that hold for all rivals at once. `auto` searches with all of them together, because the ranges of each are
good enough for the later ones."""


def _enlarged(
    point: EvaluatedPoints, base: Certificates, radius: Tensor, rival: Tensor, own: Tensor, alone: bool
) -> Certificates:
    """`base` with the radii of another method where these are larger, and NaN for the upper bounds that it lacks.

    radius, rival (batch,): of the other method.   own (batch,): index of that method.
    alone: whether that method runs by itself, and every sample counts as certified by it.
    """
    better = radius > base.radius
    none = torch.full_like(radius, torch.nan)
    gradient = _at(point.gradient_norm, rival) if point.smooth else none
    enlarged = replace(
        base,
        radius=radius,
        rival=rival,
        gradient=gradient,
        curvature_lower=none,
        curvature_upper=none,
        lipschitz=none,
        method=own,
    )
    found = base.where(better, enlarged)
    return replace(found, method=own) if alone else found


def _along_gradient(point: EvaluatedPoints, target: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
    """Witnesses (batch, *input shape) of attacks certified along -g, and their norms (batch,); see `replayed_along`.

    target (batch,): rival of the margin whose gradient is g.   radius (batch,): of the certified attack.
    """
    every = torch.arange(len(target), device=target.device)
    return replayed_along(point, -point.gradients.value[every, target], radius)


def _weakest(point: EvaluatedPoints, radius: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest radius (batch,) over all rivals, and its rival: the runner-up where the radius is infinite."""
    smallest, rival = radius.masked_fill(point.own, torch.inf).min(1)
    runner_up = point.margin.masked_fill(point.own, torch.inf).argmin(1)
    return smallest, torch.where(smallest.isinf(), runner_up, rival)


def _at(table: Tensor, rival: Tensor) -> Tensor:
    """The entries (batch,) of a table (batch, classes) at each sample's rival."""
    return table.gather(1, rival.unsqueeze(1)).squeeze(1)


def _of_lipschitz(model_bounds: ModelBounds, predicted: Tensor) -> object:
    return model_bounds.lipschitz_pairs.rows(predicted)


def _of_curvature(model_bounds: ModelBounds, predicted: Tensor) -> object:
    pairs = model_bounds.curvature_pairs
    return pairs.rows(predicted), pairs.columns(predicted), _of_lipschitz(model_bounds, predicted)


def _of_weights_and_lipschitz(model_bounds: ModelBounds, predicted: Tensor) -> object:
    figures = [(block.rows, block.norm) for block in model_bounds.weights.values()]  # each is computed when asked for
    return figures, _of_lipschitz(model_bounds, predicted)


def _everywhere(network: Network) -> None:
    """No network is refused."""


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("lipschitz", _everywhere, by_lipschitz, _of_lipschitz),
        Method("curvature", why_no_curvature, by_curvature, _of_curvature, attacks=True),
        Method("dual", why_no_curvature, by_dual, _of_curvature, attacks=True, expensive=True),
        Method("local", why_no_curvature, by_local, _of_curvature, attacks=True, expensive=True, searched=True),
        Method(
            "linear", _everywhere, by_ball_search("linear"), _of_weights_and_lipschitz, expensive=True, searched=True
        ),
        Method(
            "local-lipschitz",
            _everywhere,
            by_ball_search("local-lipschitz"),
            _of_weights_and_lipschitz,
            expensive=True,
            searched=True,
        ),
    )
}
"""Name -> method, in the order in which `auto` runs them. A batch of certificates holds positions in this table."""


def _index(name: str) -> int:
    return list(METHODS).index(name)


def method_name(index: int) -> str:
    """The name of the method at this position in METHODS."""
    return list(METHODS)[index]


def select(name: str, network: Network) -> tuple[Method, ...]:
    """The methods of a name for this network: one, or for `auto` all that apply, those of BALL_BOUNDS joined in one.

    Raises UsageError for an unknown name, and MethodError, naming the layer, for a method that cannot apply.
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
    """Certificates by the given methods in their order: per sample the largest radius and the nearest attack.

    attack: whether to certify attacks.
    levels: radii eps whose verdicts matter. If any are given, expensive methods skip samples that are certified or
    attacked at each of them. Where curvature is bounded, methods that search balls skip samples whose radius an attack
    all but reaches (`exactness`). Neither where the effort asks for every verdict.

    When time ends (`deadline`), certificates are what is proved by then. Raises OutOfTime if that is nothing.
    """
    best = _certify(methods[0], model_bounds, point, attack, None)
    attack = attack and not methods[0].attacks  # only the first method that can certify attacks does
    effort, exact = model_bounds.effort, None
    with suppress(OutOfTime):
        for method in methods[1:]:
            wanted = torch.ones(len(point.x), dtype=torch.bool, device=point.x.device)
            if method.expensive and levels and not effort.every_verdict:
                wanted = ~decided(best, levels)
            if method.searched and point.smooth and not effort.every_verdict:
                exact = nearly_exact(point, best, effort) if exact is None else exact
                wanted = wanted & ~exact
            todo = wanted.nonzero()[:, 0]
            if not len(todo):
                continue
            samples = point if len(todo) == len(point.x) else point.at(todo)
            previous = best.at(todo)
            certificates = _certify(method, model_bounds, samples, attack, previous)
            best = best.put(todo, previous.best_of(certificates))
            attack = attack and not method.attacks
    return best


def _certify(
    method: Method, model_bounds: ModelBounds, point: EvaluatedPoints, attack: bool, previous: Certificates | None
) -> Certificates:
    """Certificates by one method; global bounds that it is the first to need are not part of the samples' time."""
    deadline = present()
    deadline.begin(f"global bounds for {method.name}")
    deadline.check()
    with deadline.clock_stopped():
        method.prepare(model_bounds, point.prediction)
    deadline.begin(method.name)
    return method.certify(model_bounds, point, attack and method.attacks, previous)


def nothing_proved(point: EvaluatedPoints) -> Certificates:
    """Radius 0 for every sample, and no attack."""
    rival = point.margin.argmin(1)
    zero = torch.zeros_like(point.margin[:, 0])
    none = torch.full_like(zero, torch.nan)
    figures = {"gradient": none, "curvature_lower": none, "curvature_upper": none, "lipschitz": none, "attack": none}
    return Certificates(
        radius=zero, rival=rival, witness=point.x, near=point.x, method=torch.zeros_like(rival), **figures
    )


def decided(certificates: Certificates, levels: tuple[float, ...]) -> Tensor:
    """Mask (batch,): samples that are certified or attacked at every level."""
    verdicts = [certifies(certificates.radius, eps) | refutes(certificates.attack, eps) for eps in levels]
    return torch.stack(verdicts).all(0)
