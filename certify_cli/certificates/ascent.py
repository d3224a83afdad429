"""Where the local bound is best: slopes, weights and mu of `bounds.local.Choice`, by gradient ascent at a fixed ball.

For fixed ranges the bound is concave in them: it is a least value of functions linear in s and w, less a norm and a
largest eigenvalue. So a few steps along its gradient help wherever it starts. At the minimiser d of the trust-region
problem, and the offsets t at which the neurons' minorants touch, the gradient is

    d/ds_l = v_l (D_l - t_l) ,      d/dw_l = (t_l^2 - (1+tau) (A_l d)^2 - (1+1/tau) rest^2) / 2 ,

D_l being what d does to pre-activation l in the network linearised at s with the sources q_l(t_l). Nothing here is a
bound: offsets come from a grid, d from a few conjugate-gradient steps. What is chosen is proved by `lower_bound`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from certify_cli.bounds.jacobians import Jacobians
from certify_cli.bounds.local import Choice, Offsets
from certify_cli.bounds.trust_region import Quadratic
from certify_cli.certificates.point import Point
from certify_cli.network.activations import Activation
from certify_cli.network.graph import Add, Concat, Network
from certify_cli.network.affine import AffineOp
from certify_cli.network.linearised import Slope, head, nonlinear_nodes, pull

GRID = 25
RATE = 0.3
SLOPE_STEP = 0.3
"""One step of rate 1 moves a slope by this part of the activation's Lipschitz constant."""
WEIGHT_STEP = 0.1
"""And a weight by this part of what the curvature's extreme would give a neuron of mean adjoint, at least."""
FIRST, SECOND = 0.8, 0.95
"""Adam's averages."""
INNER = 4
"""Conjugate-gradient steps a step, warm."""
TINY = 1e-300


def linear_offsets(
    network: Network, d: Tensor, slopes: Mapping[int, Tensor], sources: Mapping[int, Tensor]
) -> dict[int, Tensor]:
    """What d (batch, inputs) does to every head, (batch, size), in the network linearised at `slopes` with `sources`
    added to the nonlinear nodes' outputs."""
    values: list[Tensor] = [d.reshape(-1, *network.input_shape)]
    for index, node in enumerate(network.nodes[1:], start=1):
        inputs = [values[i] for i in node.inputs]
        if isinstance(node.op, AffineOp):
            values.append(node.op.linear(inputs[0]))
        elif isinstance(node.op, Add | Concat):
            values.append(node.op.apply(*inputs))
        else:
            moved = slopes[index] * inputs[0].flatten(1) + sources[index]
            values.append(moved.reshape(-1, *node.shape))
    return {head(network, k): values[head(network, k)].flatten(1) for k in nonlinear_nodes(network)}


@dataclass(eq=False)
class _Adam:
    """One tensor, its scale, and Adam's averages."""

    value: Tensor
    scale: Tensor
    first: Tensor = field(init=False)
    second: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.first, self.second = torch.zeros_like(self.value), torch.zeros_like(self.value)

    def step(self, gradient: Tensor, rate: float, count: int) -> None:
        gradient = gradient * self.scale
        self.first = FIRST * self.first + (1 - FIRST) * gradient
        self.second = SECOND * self.second + (1 - SECOND) * gradient.square()
        mean, size = self.first / (1 - FIRST**count), (self.second / (1 - SECOND**count)).sqrt()
        self.value = self.value + rate * self.scale * mean / (size + TINY)


@dataclass(frozen=True, eq=False)
class Ascended:
    """`choice`, and what the bound is there according to the grid (batch,): no proof."""

    choice: Choice
    estimate: Tensor

    def better_of(self, other: Ascended) -> Ascended:
        """Item by item the one with the larger estimate."""
        take = other.estimate > self.estimate
        return Ascended(self.choice.where(take, other.choice), torch.where(take, other.estimate, self.estimate))


def ascend(
    point: Point,
    jacobians: Jacobians,
    offsets: Offsets,
    margin: Tensor,
    cotangents: Tensor,
    starts: Sequence[Choice],
    steps: int,
) -> Ascended:
    """The best choice met: of every start, and in `steps` steps from each item's best one."""
    problem = _Problem(point, jacobians, offsets, margin, cotangents)
    best: Ascended | None = None
    for start in starts:
        here = problem.at(start, None).ascended
        best = here if best is None else best.better_of(here)
    assert best is not None
    if not steps:
        return best
    layers = nonlinear_nodes(point.network)
    first = problem.at(best.choice, None)
    slopes, weights = {}, {}
    for k in layers:
        op = point.network.nodes[k].op
        assert isinstance(op, Activation)
        s, w = best.choice.slopes[k], best.choice.weights[k]
        slopes[k] = _Adam(s, torch.full_like(s, SLOPE_STEP * op.lipschitz))
        typical = WEIGHT_STEP * op.curvature_sup * first.adjoints[k].abs().mean(1, keepdim=True)
        weights[k] = _Adam(w, torch.maximum(w.mean(1, keepdim=True), typical).expand_as(w))
    state = first
    for count in range(1, steps + 1):
        rate = RATE * (1 - (count - 1) / steps)
        by_slope, by_weight = problem.gradient(state)
        for k in layers:
            slopes[k].step(by_slope[k], rate, count)
            weights[k].step(by_weight[k], rate, count)
            weights[k].value = weights[k].value.clamp(min=0.0)
        moved = Choice(
            {k: a.value for k, a in slopes.items()},
            {k: a.value for k, a in weights.items()},
            state.ascended.choice.mu,
            state.ascended.choice.tau,
        )
        state = problem.at(moved, state)
        best = best.better_of(state.ascended)
    return best


@dataclass(frozen=True, eq=False)
class _State:
    """The bound at one choice: adjoints v_l, where the minorants touch, y, and the top direction."""

    ascended: Ascended
    adjoints: Mapping[int, Tensor]
    touch: Mapping[int, _Touch]
    y: Tensor
    top: Tensor


class _Problem:
    """The bound of a batch of items on given balls, as a function of the choice."""

    def __init__(
        self, point: Point, jacobians: Jacobians, offsets: Offsets, margin: Tensor, cotangents: Tensor
    ) -> None:
        self.network, self.jacobians, self.offsets = point.network, jacobians, offsets
        self.margin, self.cotangents, self.radius = margin, cotangents.unsqueeze(1), offsets.ranges.radius
        self.layers = nonlinear_nodes(point.network)
        self.grids = {k: _Grid.of(point, k, offsets) for k in self.layers}
        self.rest = torch.cat([offsets.rest[t] for t in jacobians.heads], dim=1)

    def quadratic(self, weights: Mapping[int, Tensor]) -> Quadratic:
        """Weights of all nonlinear nodes that share a head add up."""
        total: dict[int, Tensor] = {}
        for k, w in weights.items():
            target = head(self.network, k)
            total[target] = total[target] + w if target in total else w
        return Quadratic(
            self.jacobians.rows, torch.cat([total[t] for t in self.jacobians.heads], dim=1), self.rest
        )

    def at(self, choice: Choice, before: _State | None) -> _State:
        """Evaluated warm from the state before, or cold."""
        s, w, radius = choice.slopes, choice.weights, self.radius
        shaped = {k: Slope(v.reshape(-1, *self.network.nodes[k].shape)) for k, v in s.items()}
        pulled = pull(self.network, self.cotangents, shaped)
        v = {k: pulled[k].value[:, 0].flatten(1) for k in self.layers}
        g = pulled[0].value[:, 0].flatten(1)
        touch = {k: self.grids[k].least(v[k], s[k], w[k]) for k in self.layers}
        quadratic = self.quadratic(w)
        top, largest = _power(quadratic, torch.ones_like(g) if before is None else before.top, 12 if before is None else 2)
        of_rest = quadratic.of_rest
        tau = (of_rest.sqrt() / (radius * largest.sqrt() + TINY)).clamp(min=1e-9, max=1e9)
        bottom = (1 + tau) * largest * 1.002
        y = torch.zeros_like(g) if before is None else before.y
        y, mu = _fitted(quadratic, g, radius, choice.mu, tau, bottom, y, warm=before is not None)
        residual = g - _h(quadratic, y, mu, tau)
        form = (g * y).sum(1) + (y * residual).sum(1) + residual.square().sum(1) / (mu - bottom).clamp(min=TINY)
        lost = torch.stack([t.value.sum(1) for t in touch.values()]).sum(0)
        estimate = self.margin + lost - 0.5 * (mu * radius.square() + form + (1 + 1 / tau) * of_rest)
        estimate = estimate.nan_to_num(nan=-torch.inf)
        return _State(Ascended(Choice(s, w, mu, tau), estimate), v, touch, y, top)

    def gradient(self, state: _State) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """By slopes and by weights, at the state's minimiser d = -y and its touching points."""
        choice, touch = state.ascended.choice, state.touch
        d = -state.y
        parts = self.jacobians.rows.apply(d).split([b.shape[1] for b in self.jacobians.rows.blocks], dim=1)
        straight = dict(zip(self.jacobians.heads, parts, strict=True))
        sources = {k: self.grids[k].rise(touch[k].index) - choice.slopes[k] * touch[k].place for k in self.layers}
        moved = linear_offsets(self.network, d, choice.slopes, sources)
        by_slope, by_weight = {}, {}
        for k in self.layers:
            t, target = touch[k].place, head(self.network, k)
            by_slope[k] = state.adjoints[k] * (moved[target] - t)
            second = (1 + choice.tau).unsqueeze(1) * straight[target].square()
            second = second + (1 + 1 / choice.tau).unsqueeze(1) * self.offsets.rest[target].square()
            by_weight[k] = 0.5 * (t.square() - second)
        return by_slope, by_weight


@dataclass(frozen=True, eq=False)
class _Touch:
    """Where a minorant touches (batch, size): the grid's index, the offset, and the least value there."""

    index: Tensor
    place: Tensor
    value: Tensor


@dataclass(frozen=True, eq=False)
class _Grid:
    """phi(z+t) - phi(z) on a grid of each neuron's range: (GRID, batch, size)."""

    places: Tensor
    rises: Tensor

    @classmethod
    def of(cls, point: Point, layer: int, offsets: Offsets) -> _Grid:
        op, target = point.network.nodes[layer].op, head(point.network, layer)
        assert isinstance(op, Activation)
        z = point.evaluation.values[target].flatten(1)
        low, high = offsets.ranges.low[target], offsets.ranges.high[target]
        steps = torch.linspace(0, 1, GRID, dtype=z.dtype, device=z.device).reshape(-1, 1, 1)
        places = torch.cat([low + (high - low) * steps, torch.zeros_like(z).unsqueeze(0)])
        return cls(places, op.value(z + places) - op.value(z))

    def least(self, v: Tensor, slope: Tensor, weight: Tensor) -> _Touch:
        values = v * (self.rises - slope * self.places) + 0.5 * weight * self.places.square()
        value, index = values.min(0)
        return _Touch(index, self.places.gather(0, index.unsqueeze(0)).squeeze(0), value)

    def rise(self, index: Tensor) -> Tensor:
        return self.rises.gather(0, index.unsqueeze(0)).squeeze(0)


def _h(quadratic: Quadratic, y: Tensor, mu: Tensor, tau: Tensor) -> Tensor:
    return mu.unsqueeze(1) * y - (1 + tau).unsqueeze(1) * quadratic.product(y)


def _power(quadratic: Quadratic, start: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """A few power iterations: direction, and an estimate of the largest eigenvalue from below."""
    q = start / start.norm(dim=1, keepdim=True).clamp(min=TINY)
    value = torch.zeros_like(q[:, 0])
    for _ in range(steps):
        image = quadratic.product(q)
        value = image.norm(dim=1)
        q = torch.where((value > 0).unsqueeze(1), image / value.clamp(min=TINY).unsqueeze(1), q)
    return q, value


def _fitted(
    quadratic: Quadratic, g: Tensor, radius: Tensor, mu: Tensor, tau: Tensor, bottom: Tensor, y: Tensor, warm: bool
) -> tuple[Tensor, Tensor]:
    """y with (mu I - (1+tau) Q) y = g, about, and the mu > bottom for which ||y|| is the ball's radius."""
    length = g.norm(dim=1)
    if not warm:
        mu = bottom + length / radius.clamp(min=TINY)
    for _ in range(2 if warm else 6):
        mu = torch.maximum(mu, bottom * 1.001 + TINY)
        y = _conjugate_gradient(quadratic, g, mu, tau, y, INNER)
        size = y.norm(dim=1)
        bend = (1 + tau) * (y * quadratic.product(y)).sum(1) / size.square().clamp(min=TINY)
        mu = torch.maximum(bend + (mu - bend) * size / radius.clamp(min=TINY), bottom * 1.001 + TINY)
    return _conjugate_gradient(quadratic, g, mu, tau, y, INNER), mu


def _conjugate_gradient(quadratic: Quadratic, g: Tensor, mu: Tensor, tau: Tensor, y: Tensor, steps: int) -> Tensor:
    r = g - _h(quadratic, y, mu, tau)
    p, square = r, r.square().sum(1)
    for _ in range(steps):
        image = _h(quadratic, p, mu, tau)
        alpha = (square / (p * image).sum(1).clamp(min=TINY)).unsqueeze(1)
        y, r = y + alpha * p, r - alpha * image
        new = r.square().sum(1)
        p, square = r + (new / square.clamp(min=TINY)).unsqueeze(1) * p, new
    return y
