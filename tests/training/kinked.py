"""Small modules with the activations that local Lipschitz training is for; widths are even, as MaxMin needs them."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from certify_cli.training import ClippedMaxMin, ClippedReLU, SortedPairs
from tests.training.modules import CLASSES

KINKED: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "clipped relu": lambda: ClippedReLU(0.4),
    "maxmin": SortedPairs,
    "clipped maxmin": lambda: ClippedMaxMin(-0.2, 0.3),
}


def shallow(activation: Callable[[], nn.Module]) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 12), activation(), nn.Linear(12, CLASSES))


def deep(activation: Callable[[], nn.Module]) -> nn.Module:
    layers = [nn.Flatten(), nn.Linear(16, 12), activation(), nn.Linear(12, 8), activation(), nn.Linear(8, CLASSES)]
    return nn.Sequential(*layers)


def images(activation: Callable[[], nn.Module]) -> nn.Module:
    first, second = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, stride=2)
    return nn.Sequential(first, activation(), second, activation(), nn.Flatten(), nn.Linear(4, CLASSES))
