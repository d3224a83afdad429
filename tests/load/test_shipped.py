"""The shipped models: small, accurate, the same in both formats; and conversion from ONNX."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from certify_cli.data.datasets import load_data
from certify_cli.load.convert import convert
from certify_cli.load.model import load_model
from certify_cli.load.preprocessing import fit

MODELS = Path(__file__).parents[2] / "models"
SHARED = Path(__file__).parents[3] / "shared" / "models"
NAMES = ("digits_mlp", "digits_mlp_v2", "digits_conv")


@pytest.mark.smoke
@pytest.mark.parametrize("name", NAMES)
def test_shipped_models_reach_their_accuracy_and_agree(name: str) -> None:
    data = load_data("digits")
    assert data.y is not None
    logits = []
    for suffix in ("onnx", "safetensors"):
        file = MODELS / f"{name}.{suffix}"
        assert file.stat().st_size < 100_000
        network = fit(load_model(file).network, data.x.shape[1:])
        logits.append(network(data.x.double()))
        assert float((logits[-1].argmax(dim=1) == data.y).double().mean()) >= 0.95
    torch.testing.assert_close(*logits, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_converting_onnx_changes_nothing(name: str, tmp_path: Path) -> None:
    source, target = MODELS / f"{name}.onnx", tmp_path / "converted.safetensors"
    convert(source, target)
    one, other = load_model(source), load_model(target)
    x = load_data("digits", samples=20).x.double()
    assert torch.equal(one.network(x), other.network(x))
    assert [node.op.title for node in one.network.nodes] == [node.op.title for node in other.network.nodes]


@pytest.mark.parametrize(
    "name", ["vnn21_verivital_mnist_Convnet_maxpool", "vnn21_cifar10_resnet_2b", "vnn21_marabou_cifar10_small"]
)
def test_converting_published_models_changes_nothing(name: str, tmp_path: Path) -> None:
    source, target = SHARED / f"{name}.onnx", tmp_path / "converted.safetensors"
    if not source.is_file():
        pytest.skip("the shared models are not beside this clone")
    convert(source, target)
    one, other = load_model(source), load_model(target)
    x = torch.rand(3, *one.input_shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(one.network(x), other.network(x))
