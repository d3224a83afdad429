"""What a run leaves: the ONNX file and the safetensors file are one network, for every architecture."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from certify_cli import load_model
from certify_cli.training.architectures import ARCHITECTURES
from certify_cli.training.export import Made, write_onnx
from certify_cli.training.loop import Training, TrainingData
from certify_cli.training.recipe import Recipe

ARCHS = ("mlp:64-9-8-10", "conv:3,4-9", "4c3f", "6c2f", "resnet:3-1", "sll:4-2")


def test_every_architecture_is_tried() -> None:
    assert {arch.partition(":")[0] for arch in ARCHS} == set(ARCHITECTURES)


@pytest.mark.parametrize(
    ("arch", "average", "activation"),
    [
        *((arch, 0.0, "softplus:2") for arch in ARCHS if arch != "6c2f"),
        pytest.param("6c2f", 0.0, "softplus:2", marks=pytest.mark.slow),
        ("sll:4-2", 0.5, "softplus:2"),
        ("mlp:64-9-8-10", 0.5, "softplus:2"),
        ("conv:4,4-8", 0.5, "maxmin"),
        ("conv:4,4-8", 0.0, "maxmin:-0.5,0.5"),
        ("conv:4,4-8", 0.5, "maxmin:-0.5,0.5 learned"),
        ("mlp:64-9-8-10", 0.0, "clip:0,0.5 learned"),
        ("conv:3,4-9", 0.5, "clip:0,0.5 learned"),
    ],
)
def test_both_files_are_the_best_model(arch: str, average: float, activation: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    x, y = torch.rand(24, 1, 8, 8), torch.arange(24) % 10
    name, learned = activation.removesuffix(" learned"), activation.endswith("learned")
    values = {"activation": name, "learned_thresholds": learned, "average": average}
    recipe = Recipe(arch=arch, objective="plain", epochs=1, batch=8, checked=1).with_values(values)
    training = Training(recipe, TrainingData.of(x, y, recipe), torch.device("cpu"))
    for _ in training.epochs():
        pass
    Made.of(training).write(tmp_path / "model.safetensors")
    write_onnx(training, tmp_path / "model.onnx")
    one, other = (load_model(tmp_path / f"model.{end}").network for end in ("safetensors", "onnx"))
    assert torch.allclose(one(x.double()), other(x.double()), rtol=0, atol=1e-6)
    module = training.best_module()
    assert torch.allclose(one(x.double()).float(), module(x), rtol=0, atol=1e-4)
