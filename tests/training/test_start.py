"""Identity start: a deep network begins as a shallow one, and its middle layers have their own rate."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from certify_cli.errors import UsageError
from certify_cli.training.architectures import LayeredModule, architecture
from certify_cli.training.loop import Training, TrainingData
from certify_cli.training.recipe import Recipe
from certify_cli.training.start import middle_layers, start_from_identity


def made(name: str) -> LayeredModule:
    torch.manual_seed(0)
    return architecture(name, "softplus:2", (1, 28, 28), 10).module()


def changes(module: LayeredModule, x: Tensor) -> Tensor:
    """Logits less those of the first sample, divided by their largest entry."""
    logits = module(x).detach().double()
    moved = logits - logits[:1]
    return moved / moved.abs().max()


def test_a_deep_network_begins_as_a_shallow_one() -> None:
    x, zero = torch.rand(50, 1, 28, 28), torch.zeros(1, 1, 28, 28)
    deep, plain, shallow = made("mlp:784-64-64-64-10"), made("mlp:784-64-64-64-10"), made("mlp:784-64-10")
    start_from_identity(deep, zero)
    for other in (plain, deep):
        other.fc1.load_state_dict(shallow.fc1.state_dict())
    weight = shallow.fc2.weight.detach()
    with torch.no_grad():
        deep.fc4.weight.copy_(weight / 0.1**2)
    assert float((changes(deep, x) - changes(shallow, x)).abs().max()) < 0.05
    assert float((changes(plain, x) - changes(shallow, x)).abs().max()) > 0.3


@pytest.mark.parametrize(
    ("name", "count"), [("mlp:784-10", 0), ("mlp:784-8-10", 0), ("mlp:784-8-9-7-10", 2), ("4c3f", 2)]
)
def test_layers_in_the_middle(name: str, count: int) -> None:
    module, zero = made(name), torch.zeros(1, 1, 28, 28)
    assert len(middle_layers(module)) == count
    start_from_identity(module, zero)
    assert count == 0 or float(module(zero).detach().abs().max()) < 1e-4


def test_more_layers_than_float32_can_tell_apart_are_refused() -> None:
    zero = torch.zeros(1, 1, 28, 28)
    start_from_identity(made("mlp:784" + "-6" * 6 + "-10"), zero)
    with pytest.raises(UsageError, match="at most 5 dense layers in the middle, and this network has 6"):
        start_from_identity(made("mlp:784" + "-6" * 7 + "-10"), zero)


def test_the_middle_has_its_own_rate() -> None:
    x, y = torch.rand(30, 1, 8, 8), torch.arange(30) % 3
    recipe = Recipe(arch="mlp:64-8-8-3", start="identity", middle_rate=1e-6, objective="plain", epochs=2, batch=8)
    training = Training(recipe, TrainingData.of(x, y, recipe), torch.device("cpu"))
    before = {key: value.clone() for key, value in training.module.state_dict().items()}
    for _ in training.epochs():
        pass
    moved = {key: float((value - before[key]).abs().max()) for key, value in training.module.state_dict().items()}
    assert moved["fc2.weight"] < 1e-5 < 1e-3 < moved["fc1.weight"]
