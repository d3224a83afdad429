"""Spans: an activation around a pre-activation, and everything the bounds ask of phi(z+t) - phi(z).

One mechanism serves all. Each side of z is mirrored to t >= 0 and cut by knots into a few cells. phi, phi' and phi''
are evaluated once a knot, and between neighbouring knots their ranges are exact (`curves`). So on a cell

    phi(z+t) lies between two tents       phi_k + [S_lo, S_hi] tau  and  phi_k+1 - [S_lo, S_hi] (w - tau)
    phi(z+t) lies between two parabolas   phi_k + phi'_k tau + [K_lo, K_hi] tau^2 / 2

with tau = t - t_k, w the cell's width, S and K the ranges of phi' and phi'' (Taylor). Every quantity is the extreme of a
tent or parabola, divided by t or t^2: at the cell's ends, the tent's peak or the parabola's vertex. Knots need no exact
places: they cover the span and are evaluated where they are. (Theory sections 3, "Anchored", and 4.)

The true pre-activation z' is within `error` of z. The knots are fixed places on the axis, so only their offsets from z',
phi(z') and phi'(z') are uncertain; `_Cells` says by how much. Near t = 0, where these divided by t would explode, the
range of the derivative takes over.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from certify_cli.network.activations import Activation
from certify_cli.network.curves import TINY, Curve
from certify_cli.numerics.rounding import UNIT

CELLS = 8
"""Cells a side of a finite span: ends are then within 2 % of the range's width (see the tests)."""

WHOLE_CELLS = 48
"""Cells a side of a span with an infinite end: these are asked once a sample."""

CHUNK = 2048
"""Entries treated at once, so that the knots of both sides stay in the cache."""

SLACK = 64 * UNIT
"""All roundings of a mean, in units of sup |derivative|: fewer than thirty additions, products and quotients of numbers
of that size (and the evaluation errors, which are added on their own)."""

FENCE = 2.0**-44
"""Half the relative width of the sliver of a cell that holds a jump: only there the range has both of its sides."""

Ends = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class Span:
    """An activation around a pre-activation z, over the offsets t in [lo, hi].

    All tensors have one shape, in float64. Results are (least, most), entrywise, rounded outward, and hold for each true
    pre-activation within `error` of z; offsets are counted from the true one. NaN gives NaN.
    """

    activation: Activation
    z: Tensor
    error: Tensor | float
    lo: Tensor  # <= 0, may be -inf
    hi: Tensor  # >= 0, may be +inf

    def slopes(self) -> Ends:
        """phi'(z + t) over the span."""
        return self.activation.slope.on(*self._places)

    def curvatures(self) -> Ends:
        """phi''(z + t) over the span; ValueError where phi' jumps."""
        return self.activation.curvature_on(*self._places)

    def secants(self) -> Ends:
        """(phi(z+t) - phi(z)) / t over the span, phi'(z) at t = 0; never outside `slopes`."""
        activation = self.activation
        means = self._by_chunks(lambda cells, _: cells.means(activation.value, activation.slope), activation.slope)
        return _within(means, self.slopes())

    def bends(self) -> Ends:
        """(phi'(z+t) - phi'(z)) / t over the span; never outside `curvatures`. ValueError where phi' jumps."""
        bounds, curvature = self.curvatures(), self._curvature
        means = self._by_chunks(lambda cells, _: cells.means(self.activation.slope, curvature), curvature)
        return _within(means, bounds)

    def quadratics(self) -> Ends:
        """2 (phi(z+t) - phi(z) - phi'(z) t) / t^2 over the span; never outside `curvatures`.

        ValueError where phi' jumps.
        """
        bounds, curvature = self.curvatures(), self._curvature
        return _within(self._by_chunks(lambda cells, _: cells.quadratics(self.activation), curvature), bounds)

    def remainders(self, slope: Tensor) -> Ends:
        """phi(z+t) - phi(z) - slope t over the span, for any slopes of the shape of z; least <= 0 <= most.

        An infinite end gives infinities unless the slope bounds the remainder there.
        """
        activation = self.activation
        slopes = slope.double().expand(self.z.shape).reshape(-1)
        least, most = self._by_chunks(
            lambda cells, part: cells.remainders(activation, slopes[part]), activation.slope
        )
        zero = torch.where(self._places[0] <= self._places[1], 0.0, math.nan)
        return torch.minimum(least, zero), torch.maximum(most, zero)

    @property
    def _curvature(self) -> Curve:
        assert self.activation.curvature is not None  # `curvatures` has refused
        return self.activation.curvature

    @cached_property
    def _errors(self) -> Tensor:
        return torch.as_tensor(self.error, dtype=torch.float64, device=self.z.device).expand(self.z.shape)

    @cached_property
    def _places(self) -> Ends:
        """The interval that holds z' + t for every true z' and every offset."""
        return -_beyond(-self.z, -self.lo, self._errors), _beyond(self.z, self.hi, self._errors)

    def _by_chunks(self, rule: Callable[[_Cells, slice], Ends], jumping: Curve) -> Ends:
        """The rule on the cells of a few entries at a time; `jumping` is the curve whose jumps are fenced."""
        z, error = self.z.double().reshape(-1), self._errors.reshape(-1)
        low, high = (place.reshape(-1) for place in self._places)
        results = []
        for first in range(0, max(len(z), 1), CHUNK):
            part = slice(first, first + CHUNK)
            results.append(rule(_cells(self.activation, jumping, z[part], error[part], low[part], high[part]), part))
        least, most = (torch.cat(ends).reshape(self.z.shape) for ends in zip(*results, strict=True))
        return least, most


def _beyond(z: Tensor, offset: Tensor, error: Tensor) -> Tensor:
    """At least z + offset + error, two sums rounded up."""
    above = torch.full_like(z, math.inf, dtype=torch.float64)
    return torch.nextafter(torch.nextafter(z + offset, above) + error, above)


def _within(ends: Ends, bounds: Ends) -> Ends:
    return torch.maximum(ends[0], bounds[0]), torch.minimum(ends[1], bounds[1])


def _cells(activation: Activation, jumping: Curve, z: Tensor, error: Tensor, low: Tensor, high: Tensor) -> _Cells:
    """Both sides of z cut into cells, from z - error (mirrored: -z - error) to the end of the span."""
    signs = z.new_tensor([[1.0], [-1.0]])
    centre = signs * z
    first = torch.nextafter(centre - error, torch.full_like(centre, -math.inf))
    last = torch.stack((high, -low))
    jumps = sorted((turn.place, FENCE * (1 + abs(turn.place)) + 2 * turn.slack) for turn in jumping.turns if turn.jump)
    fences = [z.new_tensor([[place + side * gap], [-place + side * gap]]) for place, gap in jumps for side in (-1, 1)]
    # mirrored, the jumps come in the opposite order
    mirrored = [fences[2 * (len(jumps) - 1 - i // 2) + i % 2] for i in range(len(fences))]
    walls = [torch.stack((right[0], left[1])) for right, left in zip(fences, mirrored, strict=True)]
    corners = [first, *(torch.minimum(torch.maximum(wall, first), last) for wall in walls), last]
    count = CELLS if bool(last.isfinite().all()) else WHOLE_CELLS
    pieces = len(jumps) + 1
    period = jumping.period
    knots = []
    for index, (left, right) in enumerate(zip(corners, corners[1:], strict=False)):
        cells = 1 if index % 2 else -(-count // pieces)
        knots.append(_cut(left, right, cells, *((centre, period) if period else (0.0, _length(activation)))))
    places = torch.cat([*knots, last[None]])
    return _Cells(signs, z, error, places)


def _length(activation: Activation) -> float:
    """The length on which phi bends."""
    sup = activation.curvature_sup
    return 1.0 if math.isinf(sup) else activation.lipschitz / sup


def _cut(left: Tensor, right: Tensor, cells: int, centre: Tensor | float, length: float) -> Tensor:
    """`cells` knots from left (included) to right (excluded), never decreasing: (cells, *shape).

    They are equidistant in u = y / (length + |y|), y counted from the centre: uniform where [left, right] is short, dense
    around the centre where it is long, and an infinite end is nothing special. Every step is monotone in floating point.
    """
    if cells == 1:
        return left[None]
    start, stop = (_squeezed(end - centre, length) for end in (left, right))
    steps = torch.arange(1, cells, dtype=left.dtype, device=left.device).reshape(-1, *(1 for _ in left.shape)) / cells
    inner = start + (stop - start) * steps
    inner = centre + length * (inner / (1.0 - inner.abs()))
    return torch.cat((left[None], torch.minimum(torch.maximum(inner, left), right)))


def _squeezed(y: Tensor, length: float) -> Tensor:
    return y.sign() / (1.0 + length / y.abs())


@dataclass(frozen=True, eq=False)
class _Cells:
    """Both sides of a few entries, cut into cells between knots. Shapes: (knots, 2, entries) and (cells, 2, entries).

    Side 0 looks right, side 1 left: the knots are mirrored places y, the arguments are `signs * y`, the offsets from
    the true z' are y - signs z', within `error + u |offset|` of `offsets`.
    """

    signs: Tensor  # (2, 1)
    z: Tensor  # (entries,)
    error: Tensor  # (entries,)
    knots: Tensor

    @cached_property
    def finite(self) -> Tensor:
        return self.knots.isfinite()

    @cached_property
    def arguments(self) -> Tensor:
        """Where the curves are evaluated: at the knots, and for infinite ones at z, where nothing is asked."""
        return torch.where(self.finite, self.signs * self.knots, self.z)

    @cached_property
    def offsets(self) -> Tensor:
        return self.knots - self.signs * self.z

    @cached_property
    def widths(self) -> Tensor:
        """0 for a cell without end."""
        return torch.where(self.finite[1:], self.knots[1:] - self.knots[:-1], 0.0)

    @cached_property
    def usable(self) -> Tensor:
        """Knots whose offset is known to an eighth: divided by it, `error` is no more than a relative error."""
        return (self.offsets > (8 * self.error).clamp(min=1e-100)) & self.finite

    def rises(self, curve: Curve) -> tuple[Tensor, Tensor]:
        """signs (curve at the knots - curve at z) and a bound of its evaluation error."""
        computed, base = curve(self.arguments), curve(self.z)
        error = curve.error_of(computed, self.arguments) + curve.error_of(base, self.z)
        return self.signs * (computed - base), error

    def ranges(self, curve: Curve) -> Ends:
        """The range of the curve on each cell; rounding aside (SLACK), exact."""
        x = self.arguments
        computed = curve(x)
        error = curve.error_of(computed, x)
        below = torch.where(self.finite, computed - error, math.inf)
        above = torch.where(self.finite, computed + error, -math.inf)
        least, most = torch.minimum(below[:-1], below[1:]), torch.maximum(above[:-1], above[1:])
        places = self.signs * self.knots
        lo, hi = torch.minimum(places[:-1], places[1:]), torch.maximum(places[:-1], places[1:])
        endless = not bool(self.finite.all())
        for turn in curve.turns:
            if math.isfinite(turn.place) or endless:
                inside = curve.may_turn_in(lo, hi, turn)
                least = torch.where(inside, least.clamp(max=turn.low), least)
                most = torch.where(inside, most.clamp(min=turn.high), most)
        return least, most

    def means(self, curve: Curve, derivative: Curve) -> Ends:
        """(curve(z'+t) - curve(z')) / t, the mean of the derivative from 0 to t.

        On a cell the numerator is below a tent; a straight line divided by t is monotone, so the tent's ends and peak
        decide. Where the left knot is not usable, and as a second bound everywhere, the mean is no more than the
        derivative's maximum from 0 to the cell's end. With D = sup |derivative|, `error` moves curve(z') by
        D error and each offset by error: 4 D error / t covers both, as |mean| <= D.
        """
        sup = max(map(abs, derivative.range))
        rises, error = self.rises(curve)
        error = error + sup * (4 * self.error + SLACK * self.offsets.abs())
        least, most = self.ranges(derivative)
        slack = SLACK * sup
        upper = self._most_mean(rises + error, least, most)
        lower = -self._most_mean(error - rises, -most, -least)
        return lower - slack, upper + slack

    def _most_mean(self, above: Tensor, least: Tensor, most: Tensor) -> Tensor:
        """`above` bounds the numerators at the knots from above."""
        at_knots = torch.where(self.finite, above / self.offsets, -math.inf)
        reach, peak = _tent(above, least, most, self.widths)
        peak = torch.where(self.finite[1:], peak / (self.offsets[:-1] + reach), most)
        by_tent = torch.maximum(torch.maximum(at_knots[:-1], at_knots[1:]), peak)
        return self._most_of(by_tent, most)

    def quadratics(self, activation: Activation) -> Ends:
        """2 Q / t^2, Q = phi(z'+t) - phi(z') - phi'(z') t: the mean of phi'' weighted by 2 (t - s) / t^2.

        With r = t_k / t, q = 2 Q_k / t_k^2 and d = Q'_k / t_k a cell's parabola divided by t^2 / 2 is
        q r^2 + 2 d r (1-r) + K (1-r)^2, r from t_k / t_k+1 to 1 (t without end: from 0): a parabola in r, whose ends and
        vertex decide. As a second bound the mean is no more than phi'' maximal from 0 to the cell's end. With
        h = sup |phi''|, `error` moves Q_k by h error t_k and Q'_k by h error, and relative to t_k the offset by
        error / t_k, q and d being at most h: 8 h error / t_k covers both.
        """
        curvature = activation.curvature
        assert curvature is not None
        t, sup = self.offsets, activation.curvature_sup
        rises, error = self.rises(activation.value)
        bends, slope_error = self.rises(activation.slope)
        slope = activation.slope(self.z)
        base_error = activation.slope.error_of(slope, self.z) + 8 * UNIT * activation.lipschitz
        q = 2 * self.signs * (rises - slope * t) / t / t
        d = bends / t
        moved = 8 * sup * self.error / t
        q_error = 2 * (error / t + base_error) / t + moved
        d_error = slope_error / t + moved
        least, most = self.ranges(curvature)
        ratio = ((t[:-1] - self.error) / t[1:]).clamp(min=0.0) * (1 - 8 * UNIT)
        upper = self._most_quadratic(q + q_error, d + d_error, most, ratio)
        lower = -self._most_quadratic(q_error - q, d_error - d, -least, ratio)
        slack = SLACK * sup
        return lower - slack, upper + slack

    def _most_quadratic(self, q: Tensor, d: Tensor, most: Tensor, ratio: Tensor) -> Tensor:
        q, d = q[:-1], d[:-1]
        bend = q - 2 * d + most
        vertex = torch.where(bend < 0, (most - d) / bend, 1.0)
        vertex = torch.minimum(torch.maximum(vertex, ratio), torch.ones_like(vertex))
        top = q
        for r in (ratio, vertex):
            rest = 1 - r
            top = torch.maximum(top, r * (q * r + 2 * d * rest) + most * rest * rest)
        return self._most_of(top, most)

    def _most_of(self, by_cell: Tensor, most: Tensor) -> Tensor:
        """The largest over cells and sides, each bounded also by the derivative's maximum up to its end."""
        so_far = torch.cummax(most, 0).values
        return torch.where(self.usable[:-1], torch.minimum(by_cell, so_far), so_far).amax((0, 1))

    def remainders(self, activation: Activation, slope: Tensor) -> Ends:
        """phi(z'+t) - phi(z') - slope t: the extremes of the tents. Mirrored, the remainder is signs times that of a tent.

        `error` moves phi(z') by D error and slope t by |slope| error, D the Lipschitz constant of phi.
        """
        rises, error = self.rises(activation.value)
        size = activation.lipschitz + slope.abs()
        reach = torch.where(self.finite, self.offsets.abs(), 0.0)
        rises = torch.where(self.finite, rises - slope * self.offsets, 0.0)
        error = error + size * (2 * self.error + SLACK * reach)
        least, most = (end - slope for end in self.ranges(activation.slope))
        slack = SLACK * size * self.widths
        upper = self._most_remainder(rises + error, least, most, slack)
        lower = -self._most_remainder(error - rises, -most, -least, slack)
        return torch.minimum(lower[0], -upper[1]), torch.maximum(upper[0], -lower[1])

    def _most_remainder(self, above: Tensor, least: Tensor, most: Tensor, slack: Tensor) -> Tensor:
        _, peak = _tent(above, least, most, self.widths)
        right = torch.maximum(peak + slack, above[1:])
        endless = torch.where(most > 0, math.inf, above[:-1])
        return torch.maximum(above[:-1], torch.where(self.finite[1:], right, endless)).amax(0)


def _tent(above: Tensor, least: Tensor, most: Tensor, widths: Tensor) -> Ends:
    """(where, height): the peak of min(above_k + most tau, above_k+1 - least (width - tau)), 0 <= tau <= width.

    The height belongs to the computed place, and is a bound wherever that is: left of it the first line rises to it or
    falls from above_k, right of it the second.
    """
    rise = above[1:] - above[:-1]
    place = (rise - least * widths) / (most - least).clamp(min=TINY)
    place = torch.minimum(place.clamp(min=0.0), widths)
    return place, torch.maximum(above[:-1] + most * place, above[1:] - least * (widths - place))


