"""Spans: an activation around a pre-activation, and everything the bounds ask of phi(z+t) - phi(z).

One mechanism serves all. Each side of z is mirrored to t >= 0 and cut by knots into a few cells. phi, phi' and phi''
are evaluated once a knot, and between neighbouring knots their ranges are exact (`curves`). So on a cell

    phi(z+t) lies between two tents       phi_k + [S_lo, S_hi] tau  and  phi_k+1 - [S_lo, S_hi] (w - tau)
    phi(z+t) lies between two parabolas   phi_k + phi'_k tau + [K_lo, K_hi] tau^2 / 2

with tau = t - t_k, w the cell's width, S and K the ranges of phi' and phi'' (Taylor). Every quantity is the extreme of
a tent or parabola, divided by t or t^2: at the cell's ends, the tent's peak or the parabola's vertex. Knots need no
exact places: they cover the span and are evaluated where they are. (Theory sections 3, "Anchored", and 4.)

The true pre-activation z' is within `error` of z. The knots are fixed places on the axis, so only their offsets from
z', phi(z') and phi'(z') are uncertain; each rule of `_Cells` says by how much. Near t = 0, where that divided by t
explodes, the range of the derivative takes over.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from certify_cli.network.activations.monotone_pieces import TINY, Curve
from certify_cli.network.activations.table import Activation
from certify_cli.numerics.rounding import UNIT

CELLS = ((0.1, 4), (0.5, 6), (2.0, 10), (6.0, 16), (1e6, 24), (math.inf, 64))
"""(longest side of the span in units of the length on which phi bends, cells a side)."""

GRADING = 1.25
"""Knots crowd a little towards t = 0, where the divisor is small."""

CHUNK = 2**15
"""Numbers a tensor of knots may have: it stays in the cache, and below what torch splits between threads."""

SLACK = 64 * UNIT
"""All roundings of one rule, in units of the size of what is added: fewer than thirty sums, products and quotients.
Evaluation errors are added on their own."""

FENCE = 2.0**-44
"""Half the relative width of the sliver of a cell that holds a jump: only there the range has both of its sides."""

FAR = 1e6
"""Beyond this times 1 + |z| a span without end is the activation's tail. A span that has an end is cut up to there."""

NEVER = 1e300
"""Added to what must not decide; finite, so that it is no NaN when multiplied by 0."""

Ends = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class ActivationOnInterval:
    """An activation around a pre-activation z, over the offsets t in [lo, hi].

    z, lo and hi have one shape. Results are (least, most), float64, entrywise, rounded outward, and hold for every true
    pre-activation within `error` of z; offsets are counted from the true one. NaN gives NaN.
    """

    activation: Activation
    z: Tensor
    error: Tensor | float
    lo: Tensor  # <= 0, may be -inf
    hi: Tensor  # >= 0, may be +inf

    def at(self, mask: Tensor) -> ActivationOnInterval:
        """The entries where the mask is true, in a row."""
        return ActivationOnInterval(self.activation, self.z[mask], self._errors[mask], self.lo[mask], self.hi[mask])

    def slopes(self) -> Ends:
        """phi'(z + t) over the span."""
        return self.activation.slope.on(*self._places)

    def curvatures(self) -> Ends:
        """phi''(z + t) over the span; ValueError where phi' jumps."""
        return self.activation.curvature_on(*self._places)

    def secants(self) -> Ends:
        """(phi(z+t) - phi(z)) / t over the span, phi'(z) at t = 0; never outside `slopes`."""
        value, slope = self.activation.value, self.activation.slope
        return _within(self._by_cells(lambda cells, _: cells.means(value, slope), slope), self.slopes())

    def slope_secants(self) -> Ends:
        """(phi'(z+t) - phi'(z)) / t over the span, never outside `curvatures`; ValueError where phi' jumps."""
        bounds, slope, curvature = self.curvatures(), self.activation.slope, self._curvature
        return _within(self._by_cells(lambda cells, _: cells.means(slope, curvature), curvature), bounds)

    def quadratic_coefficients(self) -> Ends:
        """2 (phi(z+t) - phi(z) - phi'(z) t) / t^2 over the span, never outside `curvatures`; ValueError likewise."""
        bounds = self.curvatures()
        return _within(
            self._by_cells(lambda cells, _: cells.quadratic_coefficients(self.activation), self._curvature), bounds
        )

    def remainders(self, slope: Tensor) -> Ends:
        """phi(z+t) - phi(z) - slope t over the span, for any slopes of the shape of z; least <= 0 <= most.

        (-inf, inf) for a span without end.
        """
        activation, slopes = self.activation, slope.double().expand(self.z.shape).reshape(-1)
        least, most = self._by_cells(
            lambda cells, entries: cells.remainders(activation, slopes[entries]), activation.slope
        )
        return least.clamp(max=0.0), most.clamp(min=0.0)

    @property
    def _curvature(self) -> Curve:
        assert self.activation.curvature is not None  # else `curvatures` has refused
        return self.activation.curvature

    @cached_property
    def _errors(self) -> Tensor:
        return torch.as_tensor(self.error, dtype=torch.float64, device=self.z.device).expand(self.z.shape)

    @cached_property
    def _places(self) -> Ends:
        """The interval of z' + t for every true z' and every offset."""
        z, lo, hi = (tensor.double() for tensor in (self.z, self.lo, self.hi))
        return -_sum_up(_sum_up(-z, -lo), self._errors), _sum_up(_sum_up(z, hi), self._errors)

    def _by_cells(self, rule: Callable[[_Cells, Tensor], Ends], jumping: Curve) -> Ends:
        """The rule on the cells of a few entries (given by their numbers) at a time, the jumps of `jumping` fenced."""
        z, error, low, high = (t.reshape(-1) for t in (self.z.double(), self._errors, *self._places))
        least, most = torch.full_like(z, math.nan), torch.full_like(z, math.nan)
        knots = _Knots(self.activation, jumping)
        reach = torch.maximum(high - z, z - low) / knots.length
        shortest = -math.inf
        for longest, count in CELLS:
            members = ((reach > shortest) & (reach <= longest)).nonzero().squeeze(1)
            for entries in members.split(CHUNK // (2 * knots.number(count))):
                cells = knots.cut(count, z[entries], error[entries], low[entries], high[entries])
                least[entries], most[entries] = rule(cells, entries)
            shortest = longest
        return least.reshape(self.z.shape), most.reshape(self.z.shape)


def _sum_up(a: Tensor, b: Tensor) -> Tensor:
    """a + b, rounded up."""
    total = a + b
    return torch.nextafter(total, torch.full_like(total, math.inf))


def _within(ends: Ends, bounds: Ends) -> Ends:
    return torch.maximum(ends[0], bounds[0]), torch.minimum(ends[1], bounds[1])


@dataclass(frozen=True, eq=False)
class _Knots:
    """Where the spans of one activation are cut: by fences around each jump, and between the fences evenly."""

    activation: Activation
    jumping: Curve

    @cached_property
    def fences(self) -> list[float]:
        jumps = sorted(
            (t.abscissa, FENCE * (1 + abs(t.abscissa)) + 2 * t.slack) for t in self.jumping.critical_points if t.jump
        )
        return [place + side * gap for place, gap in jumps for side in (-1, 1)]

    @cached_property
    def length(self) -> float:
        """The length on which phi bends: sup |phi'| / sup |phi''|; where phi' jumps, that to its farthest kink."""
        sup = self.activation.curvature_sup
        return max([1.0, *map(abs, self.fences)]) if math.isinf(sup) else self.activation.lipschitz / sup

    def number(self, count: int) -> int:
        """Knots a side."""
        pieces = len(self.fences) // 2 + 1
        return pieces * self._between(count) + pieces

    def _between(self, count: int) -> int:
        """Cells from fence to fence."""
        slope = self.activation.slope
        if slope.relative == slope.absolute == 0.0:  # computed without error: constant from jump to jump
            return 1
        return math.ceil(3 * count / (3 + len(self.fences) // 2))

    def cut(self, count: int, z: Tensor, error: Tensor, low: Tensor, high: Tensor) -> _Cells:
        """Both sides of z from z - error (mirrored: -z - error) to the end of the span, no cell without end."""
        signs = z.new_tensor([[1.0], [-1.0]])
        centre = signs * z
        first = -_sum_up(-centre, error)
        ends = torch.stack((high, -low))
        last = torch.where(ends.isinf(), FAR * (1 + z.abs()), ends)
        fences = z.new_tensor([self.fences, [-fence for fence in reversed(self.fences)]]).T.unsqueeze(2)
        walls = [first, *(wall.clamp(first, last) for wall in fences), last]
        period = self.jumping.period
        middle, length = (centre, period) if period else (torch.zeros_like(centre), self.length)
        pieces = [
            left[None] if index % 2 else _divided(left, right, self._between(count), middle, length)
            for index, (left, right) in enumerate(pairwise(walls))
        ]
        return _Cells(signs, z, error, torch.cat((*pieces, last[None])), ends)


def _divided(left: Tensor, right: Tensor, cells: int, middle: Tensor, length: float) -> Tensor:
    """`cells` knots from left (included) to right (excluded), never decreasing: (cells, *shape).

    Up to the grading they are equidistant in u = y / (length + |y|), y counted from the middle: even where
    [left, right] is short, dense around the middle where it is long. Every step is monotone in floating point.
    """
    start, stop = ((end - middle).div_(length + (end - middle).abs()) for end in (left, right))
    steps = torch.arange(1, cells, dtype=left.dtype, device=left.device).div_(cells).pow_(GRADING)
    u = start + (stop - start) * steps.reshape(-1, 1, 1)
    inner = (u / (1.0 - u.abs())).mul_(length).add_(middle)
    return torch.cat((left[None], inner.clamp(left, right)))


@dataclass(frozen=True, eq=False)
class _Cells:
    """Both sides of some entries, cut into cells. Shapes: (knots, 2, entries) and (cells, 2, entries).

    Side 0 looks right and side 1 left. The knots are mirrored places y, never decreasing and finite; the curves are
    evaluated at `places`, exactly. The offset y - signs z' is within error + u |offset| of `offsets`.
    """

    signs: Tensor  # (2, 1)
    z: Tensor  # (entries,)
    error: Tensor  # (entries,)
    knots: Tensor
    ends: Tensor  # (2, entries), inf where the activation's tail follows on the last knot

    @cached_property
    def places(self) -> Tensor:
        return self.signs * self.knots

    @cached_property
    def offsets(self) -> Tensor:
        return self.knots - self.signs * self.z

    @cached_property
    def divisors(self) -> Tensor:
        """Offsets known to an eighth: `error` makes a relative error of no more. Too small ones are replaced."""
        return torch.maximum(self.offsets, self._least_divisor)

    @cached_property
    def unusable(self) -> Tensor:
        """NEVER for an offset that is no divisor, else 0."""
        return (self.offsets <= self._least_divisor).double().mul_(NEVER)

    @cached_property
    def _least_divisor(self) -> Tensor:
        return (8 * self.error).clamp(min=1e-100)

    @cached_property
    def widths(self) -> Tensor:
        return self.knots[1:] - self.knots[:-1]

    @cached_property
    def endless(self) -> Tensor | None:
        """Which sides have no end; None if each has one."""
        infinite = self.ends.isinf()
        return infinite if bool(infinite.any()) else None

    def rises(self, curve: Curve) -> tuple[Tensor, Tensor]:
        """signs (curve at the knots - curve at z), computed, and the evaluation error at z."""
        base = curve(self.z)
        return (curve(self.places) - base).mul_(self.signs), curve.error_of(base, self.z)

    def ranges(self, curve: Curve) -> Ends:
        """The computed range of the curve on each cell: exact but for the error of evaluation at the knots."""
        computed, places = curve(self.places), self.places
        least, most = torch.minimum(computed[:-1], computed[1:]), torch.maximum(computed[:-1], computed[1:])
        lo, hi = torch.minimum(places[:-1], places[1:]), torch.maximum(places[:-1], places[1:])
        for point in curve.critical_points:
            if math.isfinite(point.abscissa):
                away = (~curve.may_contain(lo, hi, point)).double().mul_(NEVER)
                least, most = torch.minimum(least, away + point.low), torch.maximum(most, point.high - away)
        return least, most

    def tails(self, curve: Curve) -> Ends:
        """The range of the curve beyond the last knot, (2, entries); the empty range on a side that has an end."""
        assert self.endless is not None
        last, never = self.knots[-1], torch.full_like(self.ends, math.inf)
        right, left = curve.on(last[0], never[0]), curve.on(-never[1], -last[1])
        least, most = (torch.stack(ends) for ends in zip(right, left, strict=True))
        return torch.where(self.endless, least, never), torch.where(self.endless, most, -never)

    def tents(self, heights: Tensor, least: Tensor, most: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(p, peak, q, pit) of a curve through `heights` at the knots with slopes in [least, most].

        The curve is below two lines that meet at p from the left knot and above two that meet at q = width - p; left of
        the computed place the one bounds it and right of it the other, so that bounds hold wherever that is. Peak and
        pit are the higher and the lower of the two lines there.
        """
        rise = heights[1:] - heights[:-1]
        p = rise.addcmul_(least, self.widths, value=-1).div_((most - least).clamp_(min=TINY)).clamp_(min=0.0)
        p = torch.minimum(p, self.widths)
        q = self.widths - p
        left, right = heights[:-1], heights[1:]
        peak = torch.maximum(torch.addcmul(left, most, p), torch.addcmul(right, least, q, value=-1))
        pit = torch.minimum(torch.addcmul(left, least, q), torch.addcmul(right, most, p, value=-1))
        return p, peak, q, pit

    def means(self, curve: Curve, derivative: Curve) -> Ends:
        """(curve(z'+t) - curve(z')) / t, the mean of the derivative from 0 to t.

        A straight line divided by t is monotone, so the tents' ends and peaks decide. As a second bound the mean is
        no more than the derivative's maximum from 0 to the cell's end, the only one where the left knot's offset is no
        divisor. Beyond the last knot it lies between the mean there and the derivatives that follow.

        Errors, D = sup |derivative|: `error` moves curve(z') by D error and an offset by error, which counts D error
        as no mean exceeds D; a computed value is at most |curve(z)| + D t, hence its error E(z) + 2 u relative D t.
        """
        sup = _sup(derivative)
        rises, base = self.rises(curve)
        slack = SLACK * sup + 2 * UNIT * curve.relative * sup + _evaluation(derivative)
        base = 2 * base + 4 * sup * self.error
        t = self.divisors
        least, most = self.ranges(derivative)
        mean, spread = rises / t, base / t + slack + self.unusable
        p, peak, q, pit = self.tents(rises, least, most)
        excess = base + slack * t[1:]
        lower, upper = mean - spread, mean + spread
        tent_lower = torch.minimum(torch.minimum(lower[:-1], lower[1:]), (pit - excess) / (t[:-1] + q))
        tent_upper = torch.maximum(torch.maximum(upper[:-1], upper[1:]), (peak + excess) / (t[:-1] + p))
        if self.endless is not None:  # a tent up to FAR is blurred by rounding; the mean is between these two as well
            tent_lower = torch.maximum(tent_lower, torch.minimum(lower[:-1], least))
            tent_upper = torch.minimum(tent_upper, torch.maximum(upper[:-1], most))
        return self._hull(tent_lower, tent_upper, least, most, slack, derivative)

    def quadratic_coefficients(self, activation: Activation) -> Ends:
        """2 Q / t^2, Q = phi(z'+t) - phi(z') - phi'(z') t: the mean of phi'' weighted by 2 (t - s) / t^2.

        With r = t_k / t, q = 2 Q_k / t_k^2 and d = Q'_k / t_k a cell's parabola divided by t^2 / 2 is
        q r^2 + 2 d r (1-r) + K (1-r)^2, r from t_k / t_k+1 to 1: a parabola in r, whose ends and vertex decide. As a
        second bound the mean is no more than phi'' maximal from 0 to the cell's end. Beyond the last knot it lies
        between q and d there and the phi'' that follow.

        Errors, h = sup |phi''|: `error` moves Q_k by h error t_k, Q'_k by h error and, relative to t_k, the offset by
        error / t_k, q and d being at most h: 8 h error / t_k covers each. A computed phi is at most |phi(z)| + L t.
        """
        value, slope, curvature = activation.value, activation.slope, activation.curvature
        assert curvature is not None
        sup, lipschitz = _sup(curvature), activation.lipschitz
        rises, base = self.rises(value)
        bends, _ = self.rises(slope)
        t = self.divisors
        slack = SLACK * sup + _evaluation(curvature)
        d = bends / t
        q = (rises - slope(self.z) * t).mul_(2 * self.signs).div_(t).div_(t)
        per_offset = 8 * sup * self.error + 2 * _evaluation(slope)
        d_error = per_offset / t
        q_error = 4 * base / t + (2 * per_offset + (SLACK + 4 * UNIT * value.relative) * lipschitz)
        q_error = q_error.div_(t).add_(self.unusable)
        least, most = self.ranges(curvature)
        ratio = ((t[:-1] - self.error).clamp_(min=0.0) / t[1:]).mul_(1 - 8 * UNIT)
        upper = _most_of_parabola((q + q_error)[:-1], (d + d_error)[:-1], most, ratio)
        lower = -_most_of_parabola((q_error - q)[:-1], (d_error - d)[:-1], -least, ratio)
        last = d[-1] - d_error[-1], d[-1] + d_error[-1]
        return self._hull(lower, upper, least, most, slack, curvature, last)

    def _hull(
        self, lower: Tensor, upper: Tensor, least: Tensor, most: Tensor, slack: float, derivative: Curve, *last: Ends
    ) -> Ends:
        """Over all cells and sides, each bounded also by the derivative's range up to its end; then the tails."""
        lower = torch.maximum(lower, _so_far(least, torch.minimum)).amin(0)
        upper = torch.minimum(upper, _so_far(most, torch.maximum)).amax(0)
        if self.endless is not None:
            for low, high in (self.tails(derivative), *last):
                lower = torch.where(self.endless, torch.minimum(lower, low), lower)
                upper = torch.where(self.endless, torch.maximum(upper, high), upper)
        return lower.amin(0) - slack, upper.amax(0) + slack

    def remainders(self, activation: Activation, slope: Tensor) -> Ends:
        """phi(z'+t) - phi(z') - slope t: the extremes of tents. On the mirrored side the remainder is minus a tent's.

        `error` moves phi(z') by D error and slope t by |slope| error, D the Lipschitz constant of phi.
        """
        rises, base = self.rises(activation.value)
        size = activation.lipschitz + slope.abs()
        relative = SLACK + 2 * UNIT * activation.value.relative
        errors = (
            2 * base + 2 * size * self.error + (relative * size + _evaluation(activation.slope)) * self.offsets.abs()
        )
        heights = rises - slope * self.offsets
        least, most = (end - slope for end in self.ranges(activation.slope))
        _, peak, _, pit = self.tents(heights, least, most)
        excess = errors[1:]
        lower = torch.minimum((heights - errors).amin(0), (pit - excess).amin(0))
        upper = torch.maximum((heights + errors).amax(0), (peak + excess).amax(0))
        if self.endless is not None:
            lower, upper = lower.masked_fill(self.endless, -math.inf), upper.masked_fill(self.endless, math.inf)
        return torch.minimum(lower[0], -upper[1]), torch.maximum(upper[0], -lower[1])


def _sup(curve: Curve) -> float:
    return max(map(abs, curve.range))


def _evaluation(curve: Curve) -> float:
    """The largest evaluation error of a bounded curve. Jumps that are not known from their neighbours are fenced."""
    return UNIT * (curve.relative * _sup(curve) + curve.absolute) * (1 + 1e-9) + TINY


def _so_far(ends: Tensor, extreme: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """The extreme over each cell and those before it."""
    rows = [ends[0]]
    for row in ends[1:]:
        rows.append(extreme(rows[-1], row))
    return torch.stack(rows)


def _most_of_parabola(q: Tensor, d: Tensor, most: Tensor, ratio: Tensor) -> Tensor:
    """At least q r^2 + 2 d r (1-r) + most (1-r)^2 for r from ratio to 1, but for rounding.

    Any r in there may be added to the ends; where the parabola is concave it is the vertex, whose place is off by what
    costs the square of a rounding error.
    """
    linear = (d - most).mul_(2.0)
    bend = (q - most).sub_(linear)
    vertex = (linear * -0.5).div_(bend.clamp(max=-TINY))
    vertex = torch.maximum(vertex, ratio).clamp_(max=1.0)
    at_ratio, at_vertex = (torch.addcmul(most, r, torch.addcmul(linear, r, bend)) for r in (ratio, vertex))
    return torch.maximum(torch.maximum(q, at_ratio), at_vertex)
