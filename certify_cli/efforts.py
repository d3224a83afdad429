"""Efforts: what `fast`, `normal` and `max` mean, as the limits of every method.

The command line knows an effort by its name; the engine hands the `Effort` itself to everything below it. A limit
decides how long a search runs and which proofs are affordable, never whether a bound holds. This module imports the
standard library only, because help and completion read it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

MEMORY = 2**31
"""Bytes that the bounds of a batch may take, unless the caller states another figure."""


@dataclass(frozen=True)
class Budget:
    """Upper limits for global bounds: of floating-point operations, and of bytes.

    norm: for the verified spectral norm of one matrix.   eigenvalues: for proved eigenvalues of one matrix.
    blocks: for all that refines the blocks of one expansion beyond products of norms (`block_costs`). Two cores do
    some 2e10 such operations a second.   memory: bytes.
    writing: for the passes that write out one block; one that is a single dense layer takes none.
    """

    norm: float
    eigenvalues: float
    blocks: float = math.inf
    memory: int = MEMORY
    writing: float = math.inf


@dataclass(frozen=True)
class LocalLimits:
    """Limits of the search of `local`.

    balls: largest number of balls tried.
    first_steps, further_steps: ascent steps on the first ball, and on each further one.
    tolerance: relative accuracy of the radius.
    relaxed_ranges: whether every expansion begins with the pre-activation ranges of linear relaxation.
    """

    balls: int
    first_steps: int
    further_steps: int
    tolerance: float
    relaxed_ranges: bool = False


@dataclass(frozen=True)
class BallSearchLimits:
    """Limits of the search of `linear` and `local-lipschitz`.

    balls: largest number of balls tried.
    tolerance: relative accuracy of the radius.
    range_operations: floating-point operations for the ranges of one pre-activation node, per sample and ball.
    column_operations: floating-point operations for the columns of a sample's linearised network, which give ranges
        where `range_operations` does not suffice.
    bend_operations: floating-point operations for the columns of units that bend on one ball.
    slope_steps: ascent steps for the slopes of a margin's relaxation.
    range_slope_steps: ascent steps for slopes optimised for each range, in a second search after the first.
    range_slope_operations: floating-point operations that these ascents may take, per sample and ball.
    range_slope_depth: number of relaxed pre-activation nodes from which on the second search is made.
    kinks: whether it is made also where every activation is piecewise linear, which leaves the upper lines no choice.
    """

    balls: int
    tolerance: float
    range_operations: float
    column_operations: float
    bend_operations: float
    slope_steps: int
    range_slope_steps: int
    range_slope_operations: float
    range_slope_depth: int
    kinks: bool = False


@dataclass(frozen=True)
class Effort:
    """Limits of one effort. Numbers of points, balls, steps and rivals are upper limits for one sample.

    budget: for the global bounds.
    tangents: further points at which `curvature` evaluates the closed form, per rival that can be the nearest.
    dual_steps: the same for `dual`, which stops where a step gains nothing.
    dual_balls, attack_balls: balls on which `dual` bounds the Hessian, for radii and for attacks.
    ball_eigenvalue: floating-point operations for one eigenvalue on a ball; where one takes more, the layer's bound
    uses no eigenvalue.
    local: limits of `local`; None where it uses the tangent bound alone.
    ball_search: limits of `linear` and `local-lipschitz`.
    attack_steps: gradient steps of the search for attacks.
    attack_rivals: rivals that this search tries one by one.
    every_verdict: whether `auto` runs expensive methods also on samples whose verdicts earlier methods settled.
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
    budget=Budget(norm=1e9, eigenvalues=1e10, blocks=2e10),
    tangents=0,
    dual_steps=4,
    dual_balls=0,
    attack_balls=0,
    ball_eigenvalue=0.0,
    local=None,
    ball_search=BallSearchLimits(
        balls=8,
        tolerance=1e-2,
        range_operations=2e9,
        column_operations=0.0,
        bend_operations=0.0,
        slope_steps=0,
        range_slope_steps=0,
        range_slope_operations=0.0,
        range_slope_depth=0,
    ),
    attack_steps=30,
    attack_rivals=0,
)
# Slopes optimised for each range add 16 % to the radius on five layers of 200 sigmoids, some 5 % on three layers of 100
# and next to nothing on a single layer: hence `range_slope_depth`.
NORMAL = Effort(
    name="normal",
    budget=Budget(norm=2e10, eigenvalues=5e11, blocks=2e11),
    tangents=1,
    dual_steps=20,
    dual_balls=1,
    attack_balls=0,
    ball_eigenvalue=1e8,
    local=LocalLimits(balls=8, first_steps=16, further_steps=8, tolerance=1e-2),
    ball_search=BallSearchLimits(
        balls=20,
        tolerance=1e-3,
        range_operations=5e10,
        column_operations=5e12,
        bend_operations=2e11,
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
    budget=Budget(norm=3e11, eigenvalues=1e13, blocks=4e12),
    tangents=4,
    dual_steps=100,
    dual_balls=4,
    attack_balls=3,
    ball_eigenvalue=2e10,
    local=LocalLimits(balls=14, first_steps=40, further_steps=20, tolerance=2e-3, relaxed_ranges=True),
    ball_search=BallSearchLimits(
        balls=30,
        tolerance=1e-4,
        range_operations=math.inf,
        column_operations=math.inf,
        bend_operations=2e12,
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
"""Name -> effort, from the shortest run to the tightest bounds."""
