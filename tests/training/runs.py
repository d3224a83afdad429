"""Small runs of training."""

from __future__ import annotations

import torch
from torch import Tensor

from certify_cli.training.loop import Training, TrainingData
from certify_cli.training.recipe import Recipe

RECIPE = Recipe(
    data="memory", arch="mlp:16-12-3", radius=0.1, epochs=4, batch=16, rotate=5.0, noise=0.01, average=0.9, checked=8
)
STYLE = {"norm": "lipschitz", "spectral": True, "learned_beta": True, "activation": "centred_softplus:5"}
"""Values of a recipe for a low-curvature network."""
CPU = torch.device("cpu")


def data(count: int = 72) -> TrainingData:
    """Three classes of images that differ in their brightest row."""
    generator = torch.Generator().manual_seed(7)
    y = torch.arange(count) % 3
    x = 0.2 * torch.rand(count, 1, 4, 4, generator=generator)
    x[torch.arange(count), 0, y] += 0.7
    return TrainingData.of(x, y, RECIPE)


def trained(recipe: Recipe = RECIPE, samples: TrainingData | None = None) -> Training:
    training = Training(recipe, samples or data(), CPU)
    assert len(list(training.epochs())) == recipe.epochs
    return training


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(t, second[name]) for name, t in first.items())
