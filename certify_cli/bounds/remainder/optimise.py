"""The parameters of the margin bound, optimised: slopes, weights and mu of `margin_bound.Choice`, on fixed balls.

On fixed ranges the bound is concave in the parameters of each layer: it is a minimum of functions linear in s and w,
less a norm and a largest eigenvalue. So a few steps of gradient ascent help, wherever they start. At the minimiser d of
the trust-region problem, and the offsets t at which the neurons' minorants touch, the gradient is

    d/ds_l = v_l (D_l - t_l) ,      d/dw_l = (t_l^2 - (1+tau) (A_l d)^2 - (1+1/tau) residual^2) / 2 ,

D_l being the offset that d causes at pre-activation l in the network linearised at s with the sources q_l(t_l). Nothing
here is a bound: offsets come from a grid, d from a few Lanczos steps. `margin_bound.lower_bound` proves the result.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from certify_cli.bounds.on_ball.interval_ranges import activation_on_range
from certify_cli.bounds.remainder.expansion import MIXED, BallExpansion
from certify_cli.bounds.remainder.margin_bound import Choice
from certify_cli.bounds.remainder.trust_region import Quadratic
from certify_cli.bounds.remainder.trust_region_estimate import (
    Solution,
    estimated_minimiser,
    largest_eigenvalue_estimate,
)
from certify_cli.network.activations.grid_estimates import Grid, SoftMinimiser
from certify_cli.network.evaluated import EvaluatedPoints
from certify_cli.network.propagate import Slope, nonlinear_nodes, offsets, pre_activation, vjp
from certify_cli.numerics.choose import either
from certify_cli.numerics.momentum import RATE, SLOPE_STEP, WEIGHT_STEP, MomentumAscent, adjoint_sizes, ascend
from certify_cli.numerics.trees import Batched

SLIP, SHORTER, CALMER, LONGER = 0.03, 0.4, 0.7, 1.3
"""A step may lose this part of the margin against the best one; one that loses more is taken back. Factors of the rate
after a step that is taken back, that loses, and that gains."""
SLOPE, WEIGHT = "slope", "weight"
COARSE_STEPS = 6


@dataclass(frozen=True, eq=False)
class Optimised(Batched):
    """The parameters found.   estimate: (batch,), of the bound there, from the grid. No proof."""

    choice: Choice
    estimate: Tensor

    def better_of(self, other: Optimised, among: Tensor) -> Optimised:
        """The items with the larger estimate; outside of `among` (batch,) this one's."""
        return self.where(among & (other.estimate > self.estimate), other)


def optimise(
    point: EvaluatedPoints,
    ball: BallExpansion,
    margin: Tensor,
    cotangents: Tensor,
    begin: Choice | None,
    steps: int,
    enough: Tensor | None = None,
) -> Optimised:
    """The best parameters met in `steps` steps of ascent.

    margin: (items,), lower bounds at the samples.   cotangents: (items, classes), of the margins.
    begin: where to begin; None for each item's best start (`Problem.starts`).
    enough: (items,), estimates at which an item's ascent ends.
    """
    problem = Problem(point, ball, margin, cotangents)
    if begin is not None:
        first = problem.at(begin, None)
    else:
        first = problem.at(problem.best_start()[0], None)
        if steps:
            shifted = problem.at(problem.shifted(first), first)
            first = first.where(shifted.optimised.estimate > first.optimised.estimate, shifted)
    best = first.optimised
    done = _reached(best, enough)
    if not steps or bool(done.all()):
        return best
    variables: dict[tuple[str, int], MomentumAscent] = {}
    for k in nonlinear_nodes(point.network):
        w, (steepness, bending, width) = best.choice.weights[k], problem.grids[k].scales()
        v = adjoint_sizes(first.adjoints[k])
        # gradients by slopes are at most about |v| width, by weights about width^2 / 8
        variables[SLOPE, k] = MomentumAscent(best.choice.slopes[k], SLOPE_STEP * steepness / (v * width))
        scale = WEIGHT_STEP * 8 * torch.maximum(w, v * bending) / width.square()
        variables[WEIGHT, k] = MomentumAscent(w, scale, lambda value: value.clamp(min=0.0))

    def evaluate(before: _State) -> _State:
        slopes, weights = ({k: a.value for (of, k), a in variables.items() if of == kind} for kind in (SLOPE, WEIGHT))
        return problem.at(Choice(slopes, weights, before.optimised.choice.mu, before.optimised.choice.tau), before)

    def judge(before: _State, after: _State) -> tuple[Tensor, Tensor]:
        nonlocal best
        best = best.better_of(after.optimised, ~done)  # a finished item stays as it is, whatever the others need
        good = after.optimised.estimate > best.estimate - SLIP * margin
        better = after.optimised.estimate > before.optimised.estimate
        return good, torch.where(better, LONGER, either(good, CALMER, SHORTER))

    rate = torch.full_like(margin, RATE)
    for _ in ascend(variables, first, steps, evaluate, problem.gradient, judge, rate):
        done = _reached(best, enough)
        if bool(done.all()):
            break
    return best


def _reached(found: Optimised, enough: Tensor | None) -> Tensor:
    return torch.zeros_like(found.estimate, dtype=torch.bool) if enough is None else found.estimate > enough


def coarse_estimate(point: EvaluatedPoints, ball: BallExpansion, margin: Tensor, cotangents: Tensor) -> Tensor:
    """An estimate (items,) of the bound at each item's best start, without a trust region: mostly too low."""
    return Problem(point, ball, margin, cotangents).best_start()[1]


def starts(point: EvaluatedPoints, ball: BallExpansion, cotangents: Tensor) -> list[Choice]:
    """The starting points of an ascent (`Problem.starts`)."""
    return Problem(point, ball, torch.zeros_like(ball.radius), cotangents).starts()


@dataclass(frozen=True, eq=False)
class _State(Batched):
    """The bound at one choice of parameters.

    adjoints: v_l by node.   touch: where the minorants touch, by node.   solution: of the trust-region problem.
    """

    optimised: Optimised
    adjoints: Mapping[int, Tensor]
    touch: Mapping[int, SoftMinimiser]
    solution: Solution


class Problem:
    """The bound of a batch of items on given balls, as a function of its parameters."""

    def __init__(self, point: EvaluatedPoints, ball: BallExpansion, margin: Tensor, cotangents: Tensor) -> None:
        self.network, self.jacobians, self.ball = point.network, ball.jacobians, ball
        self.margin, self.cotangents, self.radius = margin, cotangents.unsqueeze(1), ball.radius
        self.layers = nonlinear_nodes(point.network)
        self.grids = {k: Grid.of(activation_on_range(point, k, ball.ranges)) for k in self.layers}
        self.residual = torch.cat([ball.residual[t] for t in self.jacobians.pre_activations], dim=1)

    def quadratic(self, weights: Mapping[int, Tensor]) -> Quadratic:
        """The quadratic with these weights; those of nodes that share a pre-activation add up."""
        total: dict[int, Tensor] = {}
        for k, w in weights.items():
            target = pre_activation(self.network, k)
            total[target] = total[target] + w if target in total else w
        return Quadratic(
            self.jacobians.rows, torch.cat([total[t] for t in self.jacobians.pre_activations], dim=1), self.residual
        )

    def starts(self) -> list[Choice]:
        """Four starting points of the ascent.

        1. Tangents at the sample with the quadratics that need no constant.
        2. Half way between the first and the third, as the bound is concave.
        3. The lines of the convex envelopes.
        4. Lines where they leave little against the quadratic's end, else the first: all neurons can be as deep as
           their lines at once, but no d moves all of them to their ends.
        """
        none = torch.zeros_like(self.margin)
        found: list[tuple[dict[int, Tensor], dict[int, Tensor]]] = [({}, {}) for _ in range(4)]
        v, _ = self._adjoints_and_gradient({k: grid.op.slope(grid.z) for k, grid in self.grids.items()})
        for k, grid in self.grids.items():
            sign = either(v[k] < 0, -1.0, 1.0)
            zero = torch.zeros_like(sign)
            tangent, coefficient = grid.expansion_at(zero, sign)
            line, depth = grid.supporting_line(zero, sign)
            magnitude = torch.maximum(-grid.ends[0], grid.ends[1])
            flat = depth < MIXED * 0.5 * coefficient * magnitude.square()
            pairs = (
                (tangent, coefficient),
                (0.5 * (tangent + line), 0.5 * coefficient),
                (line, zero),
                (torch.where(flat, line, tangent), torch.where(flat, zero, coefficient)),
            )
            for (slopes, weights), (slope, weight) in zip(found, pairs, strict=True):
                slopes[k], weights[k] = slope, v[k].abs() * weight
        return [Choice(slopes, weights, none, none) for slopes, weights in found]

    def best_start(self) -> tuple[Choice, Tensor]:
        """Each item's best starting point, and its coarse estimate (items,)."""
        begin, *others = self.starts()
        value = self.coarse(begin)
        for start in others:
            other = self.coarse(start)
            take = other > value
            begin, value = begin.where(take, start), torch.where(take, other, value)
        return begin, value

    def coarse(self, choice: Choice) -> Tensor:
        """An estimate (items,) of the bound with gradient and curvature each at their worst: no trust region."""
        _, g, touch, quadratic = self._parts(choice)
        largest = largest_eigenvalue_estimate(quadratic, COARSE_STEPS)
        quadratic_loss = 0.5 * (self.radius * largest.sqrt() + quadratic.residual_sum.sqrt()).square()
        value = self.margin + _total(touch) - g.norm(dim=1) * self.radius - quadratic_loss
        return value.nan_to_num(nan=-torch.inf)

    def _parts(self, choice: Choice) -> tuple[dict[int, Tensor], Tensor, dict[int, SoftMinimiser], Quadratic]:
        """Adjoints, gradient, touching points, and the quadratic."""
        s, w = choice.slopes, choice.weights
        v, g = self._adjoints_and_gradient(s)
        touch = {k: self.grids[k].soft_minimum(v[k], s[k], w[k]) for k in self.layers}
        return v, g, touch, self.quadratic(w)

    def straight(self, d: Tensor) -> dict[int, Tensor]:
        """A_l d by pre-activation node, (items, size)."""
        return self._by_pre_activation(self.jacobians.rows.apply(d))

    def _by_pre_activation(self, rows: Tensor) -> dict[int, Tensor]:
        """Stacked rows (items, count), split by pre-activation node."""
        parts = rows.split(self.jacobians.rows.sizes, dim=1)
        return dict(zip(self.jacobians.pre_activations, parts, strict=True))

    def gradient_of(self, choice: Choice) -> Tensor:
        """The margins' gradients (batch, inputs) in the network linearised at the choice's slopes."""
        return self._adjoints_and_gradient(choice.slopes)[1]

    def _adjoints_and_gradient(self, slopes: Mapping[int, Tensor]) -> tuple[dict[int, Tensor], Tensor]:
        """Adjoints and gradient of the network linearised at `slopes`."""
        shaped = {k: Slope(s.reshape(-1, *self.network.nodes[k].shape)) for k, s in slopes.items()}
        adjoints = vjp(self.network, self.cotangents, shaped)
        return {k: adjoints[k].value[:, 0].flatten(1) for k in self.layers}, adjoints[0].value[:, 0].flatten(1)

    def at(self, choice: Choice, before: _State | None) -> _State:
        """The state at a choice; `before`, an earlier state, is where the trust region's estimates begin."""
        s, w, radius = choice.slopes, choice.weights, self.radius
        v, g, touch, quadratic = self._parts(choice)
        solution = estimated_minimiser(quadratic, g, radius, None if before is None else before.solution)
        mu, tau = solution.mu, solution.tau
        estimate = (
            self.margin
            + _total(touch)
            - 0.5 * (mu * radius.square() + solution.form + (1 + 1 / tau) * quadratic.residual_sum)
        )
        estimate = estimate.nan_to_num(nan=-torch.inf)
        return _State(Optimised(Choice(s, w, mu, tau), estimate), v, touch, solution)

    def shifted(self, state: _State) -> Choice:
        """The expansion about another point: for each neuron the offset p that the minimiser causes.

        At p the tangent has slope phi'(z+p), and the remainder a quadratic coefficient b, the largest from p on; about
        z this is the slope phi'(z+p) + sign(v) b p with the same coefficient.
        """
        moved = self._moved(state)
        slopes, coefficients = {}, {}
        for k in self.layers:
            sign = either(state.adjoints[k] < 0, -1.0, 1.0)
            slopes[k], coefficients[k] = self.grids[k].expansion_at(moved[pre_activation(self.network, k)], sign)
        v, _ = self._adjoints_and_gradient(slopes)
        none = torch.zeros_like(self.margin)
        return Choice(slopes, {k: v[k].abs() * coefficients[k] for k in self.layers}, none, none)

    def _moved(self, state: _State) -> dict[int, Tensor]:
        """Offsets of the pre-activations at the trust region's minimiser, with the sources at the touching points."""
        choice, touch = state.optimised.choice, state.touch
        sources = {k: touch[k].increment - choice.slopes[k] * touch[k].offset for k in self.layers}
        return offsets(self.network, -state.solution.y, choice.slopes, sources)

    def gradient(self, state: _State) -> dict[tuple[str, int], Tensor]:
        """By slopes and weights, at the state's minimiser d = -y and its touching points."""
        choice, touch = state.optimised.choice, state.touch
        d = -state.solution.y
        straight, ridge = self.straight(d), self._by_pre_activation(state.solution.ridge)
        moved = self._moved(state)
        found = {}
        for k in self.layers:
            t, target = touch[k].offset, pre_activation(self.network, k)
            found[SLOPE, k] = state.adjoints[k] * (moved[target] - t)
            second = (1 + choice.tau).unsqueeze(1) * (straight[target].square() + ridge[target])
            second = second + (1 + 1 / choice.tau).unsqueeze(1) * self.ball.residual[target].square()
            found[WEIGHT, k] = 0.5 * (touch[k].square - second)
        return found


def _total(touch: Mapping[int, SoftMinimiser]) -> Tensor:
    return torch.stack([t.value.sum(1) for t in touch.values()]).sum(0)
