"""Small torch modules for the tests of training, of every topology that the objectives claim to cover."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from certify_cli.training import Objective

SHAPE, CLASSES = (1, 4, 4), 4


def dense(activation: Callable[[], nn.Module]) -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(16, 12), activation(), nn.Linear(12, 9), activation(), nn.Linear(9, CLASSES)
    )


def convolutional(activation: Callable[[], nn.Module]) -> nn.Module:
    norm = nn.BatchNorm2d(3)
    norm.running_mean, norm.running_var = 0.1 * torch.randn(3), 0.5 + torch.rand(3)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), norm, activation(), nn.Conv2d(3, 4, 3, stride=2), activation(), nn.Flatten(),
        nn.Linear(4, CLASSES),
    )  # fmt: skip


class Residual(nn.Module):
    """A stem, one residual block and a head."""

    def __init__(self, activation: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.stem, self.inner, self.outer, self.head = (nn.Linear(n, m) for n, m in ((16, 8), (8, 7), (7, 8), (8, 4)))
        self.activation = activation()

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x.flatten(1))
        return self.head(self.activation(h + self.outer(self.activation(self.inner(h)))))


def pooled(activation: Callable[[], nn.Module]) -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), activation(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 4))


def prepared(make: Callable[[Callable[[], nn.Module]], nn.Module], activation: Callable[[], nn.Module]) -> nn.Module:
    """In float64 and evaluation mode, with biases and gains that are no ties of one another."""
    torch.manual_seed(3)
    module = make(activation).double().eval()
    for parameter in module.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return module


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    x = torch.rand(6, *SHAPE, dtype=torch.float64, generator=generator)
    return x, torch.randint(CLASSES, (6,), generator=generator)


def assert_gradients_fit(objective: Objective, x: Tensor, y: Tensor, rel: float) -> None:
    """One entry of each parameter's gradient against a finite difference of the objective's values."""
    objective(x, y).backward()
    generator, step = torch.Generator().manual_seed(1), 1e-5
    for name, parameter in objective.module.named_parameters():
        flat = parameter.data.view(-1)
        at = int(torch.randint(len(flat), (1,), generator=generator))
        before, values = flat[at].item(), []
        for sign in (1.0, -1.0):
            flat[at] = before + sign * step
            values.append(float(objective(x, y).detach()))
        flat[at] = before
        expected = (values[0] - values[1]) / (2 * step)
        assert parameter.grad is not None, name
        assert float(parameter.grad.view(-1)[at]) == pytest.approx(expected, rel=rel, abs=1e-6), name
