"""Random changes of training images, by torchvision's transforms."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from certify_cli.errors import UsageError
from certify_cli.torchvision_schemas import import_torchvision
from certify_cli.training.recipe import Recipe

GROUP = 8
"""A transform draws its numbers once for so many images: one draw an image would take longer than the training."""


class Augmentation:
    """The changes that a recipe asks for; batches of images (batch, channels, height, width) or of any other shape."""

    def __init__(self, recipe: Recipe, input_shape: tuple[int, ...]) -> None:
        self._noise = recipe.noise
        moves = recipe.shift or recipe.rotate or recipe.scale or recipe.flip
        self._transform: Any = None
        if moves and len(input_shape) != 3:
            raise UsageError("shift, rotate, scale and flip are for images; the data has none")
        if moves:
            self._transform = _transform(recipe, input_shape)

    def __call__(self, x: Tensor) -> Tensor:
        if self._transform is not None:
            x = torch.cat([self._transform(group) for group in x.split(GROUP)])
        return x + self._noise * torch.randn_like(x) if self._noise else x


def _transform(recipe: Recipe, input_shape: tuple[int, ...]) -> Any:
    import_torchvision()
    from torchvision.transforms import InterpolationMode, v2

    _, height, width = input_shape
    steps: list[Any] = []
    if recipe.shift or recipe.rotate or recipe.scale:
        steps.append(
            v2.RandomAffine(
                degrees=recipe.rotate,
                translate=(min(1.0, recipe.shift / width), min(1.0, recipe.shift / height)),
                scale=(1 - recipe.scale, 1 + recipe.scale),
                interpolation=InterpolationMode.BILINEAR,
            )
        )
    if recipe.flip:
        steps.append(v2.RandomHorizontalFlip())
    return v2.Compose(steps)
