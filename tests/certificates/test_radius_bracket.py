"""The search for the largest radius: on known curves it closes in on the zero, and never calls inside what is not."""

from __future__ import annotations

import math

import pytest
import torch

from certify_cli.certificates.radius_bracket import Bracket

D = torch.float64


@pytest.mark.parametrize("start", [1e-3, 1.0, 50.0])
@pytest.mark.parametrize("power", [1.0, 1.5, 2.0, 4.0])
def test_zeros_of_powers(power: float, start: float) -> None:
    """value = 1 - (r / zero)^power, many zeros at once."""
    zeros = torch.tensor([0.02, 0.7, 1.0, 9.0], dtype=D)
    bracket = Bracket.around(torch.full_like(zeros, start))
    active = torch.arange(4)
    for _ in range(25):
        value = 1 - (bracket.radius[active] / zeros[active]) ** power
        raised = bracket.update(active, value)
        assert bool((~raised | (value > 0)).all())
        active = bracket.unresolved(active, 1e-3)
        if not len(active):
            break
    assert not len(active)
    assert bool((bracket.lower.radius < zeros).all())
    assert bool((bracket.lower.radius > zeros * (1 - 5e-3)).all())


def test_a_curve_with_a_step_and_values_that_are_no_numbers() -> None:
    bracket = Bracket.around(torch.tensor([1.0, 1.0, 1.0], dtype=D))
    active = torch.arange(3)
    for _ in range(40):
        here = bracket.radius[active]
        step = torch.where(here < 0.37, 0.9, -50.0)
        value = torch.stack([step, torch.full_like(here, math.nan), torch.full_like(here, -math.inf)])[
            active, torch.arange(len(active))
        ]
        bracket.update(active, value.double())
        active = bracket.unresolved(active, 1e-3)
    assert 0.36 < float(bracket.lower.radius[0]) < 0.37
    assert bool((bracket.lower.radius[1:] == 0).all())


def test_a_ball_that_was_outside_before_the_bound_became_better() -> None:
    """The first ball is judged by a poor bound; what is left on smaller ones by a better bound belies it."""
    bracket, active = Bracket.around(torch.tensor([1.0], dtype=D)), torch.arange(1)
    for count in range(12):
        value = 1 - (bracket.radius / (0.7 if count == 0 else 1.3)) ** 1.5
        bracket.update(active, value)
        if not len(bracket.unresolved(active, 1e-2)):
            break
    assert 1.28 < float(bracket.lower.radius) < 1.3
