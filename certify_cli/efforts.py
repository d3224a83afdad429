"""What `fast`, `normal` and `max` mean: the limits of every method, in one place that loads nothing.

The command line knows an effort by its name; everything below the engine is handed the `Effort` itself. A limit decides
how long is looked, or which proofs are afforded, never whether a bound holds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Budget:
    """Floating-point operations that bounds of one matrix may take: a verified norm, and proved eigenvalues."""

    norm: float
    eigenvalues: float


@dataclass(frozen=True)
class LocalLimits:
    """Limits of the search of `local`.

    balls: tried at most.   first, further: steps of the ascent on the first ball and on each further one.
    close: relative accuracy of the radius.   relaxed: whether the search begins on the ranges of linear relaxation.
    """

    balls: int
    first: int
    further: int
    close: float
    relaxed: bool = False


@dataclass(frozen=True)
class BallSearchLimits:
    """Limits of the search of `linear` and `local-lipschitz`.

    balls: tried at most.   close: relative accuracy of the radius.
    range_operations: floating-point operations for the ranges of one pre-activation node, a sample and ball.
    slope_steps: of the ascent for the slopes of a margin's relaxation.
    range_slope_steps: of the ascents for slopes of every range's own, in a second search behind the first.
    range_slope_operations: floating-point operations that these may take, a sample and ball.
    range_slope_depth: from how many relaxed pre-activation nodes on they are made.   kinks: whether also where every
    activation is piecewise linear, so that lines above have no choice.
    """

    balls: int
    close: float
    range_operations: float
    slope_steps: int
    range_slope_steps: int
    range_slope_operations: float
    range_slope_depth: int
    kinks: bool = False


@dataclass(frozen=True)
class Effort:
    """One effort. Numbers of points, balls and rounds are a sample's, and upper limits.

    budget: of the global bounds.   tangents: further points at which `curvature` takes the closed form, for each rival
    that can be the nearest.   dual_steps: the same of `dual`, which ends where a step gains nothing.
    dual_balls: balls on which `dual` bounds the Hessian; attack_balls: the same for attacks.
    ball_eigenvalue: floating-point operations for one eigenvalue of a pair on a ball; where one takes more, the layer's
    bound does without.   local: None where `local` uses the tangent bound alone.
    attack_steps: of the gradient search for attacks.   attack_rivals: rivals that it tries one by one.
    every_verdict: whether `auto` runs expensive methods also on samples whose verdicts are known.
    """

    name: str
    budget: Budget
    tangents: int
    dual_steps: int
    dual_balls: int
    attack_balls: int
    ball_eigenvalue: float
    local: LocalLimits | None
    ball_search: BallSearchLimits
    attack_steps: int
    attack_rivals: int
    every_verdict: bool = False


FAST = Effort(
    name="fast",
    budget=Budget(norm=1e9, eigenvalues=1e10),
    tangents=0,
    dual_steps=4,
    dual_balls=0,
    attack_balls=0,
    ball_eigenvalue=0.0,
    local=None,
    ball_search=BallSearchLimits(
        balls=8,
        close=1e-2,
        range_operations=2e9,
        slope_steps=0,
        range_slope_steps=0,
        range_slope_operations=0.0,
        range_slope_depth=0,
    ),
    attack_steps=30,
    attack_rivals=0,
)
# On five layers of 200 sigmoids slopes of every range's own add 16 % to the radius, on three of 100 some 5 %, on a
# single one next to nothing: hence `range_slope_depth`.
NORMAL = Effort(
    name="normal",
    budget=Budget(norm=2e10, eigenvalues=5e11),
    tangents=1,
    dual_steps=20,
    dual_balls=1,
    attack_balls=0,
    ball_eigenvalue=1e8,
    local=LocalLimits(balls=8, first=16, further=8, close=1e-2),
    ball_search=BallSearchLimits(
        balls=20,
        close=1e-3,
        range_operations=5e10,
        slope_steps=10,
        range_slope_steps=5,
        range_slope_operations=3e10,
        range_slope_depth=3,
    ),
    attack_steps=100,
    attack_rivals=2,
)
MAX = Effort(
    name="max",
    budget=Budget(norm=3e11, eigenvalues=1e13),
    tangents=4,
    dual_steps=100,
    dual_balls=4,
    attack_balls=3,
    ball_eigenvalue=2e10,
    local=LocalLimits(balls=14, first=40, further=20, close=2e-3, relaxed=True),
    ball_search=BallSearchLimits(
        balls=30,
        close=1e-4,
        range_operations=math.inf,
        slope_steps=40,
        range_slope_steps=10,
        range_slope_operations=1e12,
        range_slope_depth=1,
        kinks=True,
    ),
    attack_steps=300,
    attack_rivals=9,
    every_verdict=True,
)

EFFORTS: Mapping[str, Effort] = {effort.name: effort for effort in (FAST, NORMAL, MAX)}
"""By name, from the least time to the tightest bounds."""
