"""Every shared model: loads, reaches its stated accuracy, and no attack gets inside a certified ball."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from certify_cli import load_model
from certify_cli.bounds.global_bounds.model_bounds import ModelBounds
from certify_cli.certificates.methods import certify_batch, select
from certify_cli.errors import ModelError
from certify_cli.network.evaluate import exact_kernels
from certify_cli.network.evaluated import EvaluatedPoints
from tests.adversary import pgd
from tests.shared_models import INDEX, load

REFUSED = "vnn23_cifar_vit_ibp_3_3_8.onnx"
LOADABLE = sorted(set(INDEX) - {REFUSED}) or ["no shared models"]
QUICK = {
    "act_small_sigmoid_mnist_cnn.onnx": 10,
    "o4lc_mnist_tanh_200_100.onnx": 10,
    "marabou_mnist5x20_leaky_relu.onnx": 10,
    "autolirpa_mnist_fc_3layer_relu.onnx": 10,
    "abcrown_mnist_conv_small_relu.onnx": 2,
}
"""Samples in the default run."""
COUNTS = {
    "vnn22_cifar_sri_resnet_a.onnx": 2,
    "vnn21_cifar10_resnet_2b.onnx": 5,
    "vnn21_marabou_cifar10_small.onnx": 5,
    "vnn21_oval_cifar_base_kw.onnx": 20,
    "abcrown_cifar_conv_small_sigmoid.onnx": 20,
    "abcrown_mnist_conv_small_relu.onnx": 20,
    "vnn21_verivital_mnist_Convnet_avgpool.onnx": 20,
    "vnn21_verivital_mnist_Convnet_maxpool.onnx": 10,
    "vnn21_mnist_relu_9_200.onnx": 50,
    "vnn21_mnist_ffnnSIGMOID__Point_6x200.onnx": 50,
}
"""Samples in the slow run; 100 of the others."""
CASES = [
    *((name, count) for name, count in QUICK.items() if name in LOADABLE),
    *(pytest.param(name, COUNTS.get(name, 100), marks=pytest.mark.slow) for name in LOADABLE),
]


@pytest.mark.parametrize(("name", "count"), CASES)
def test_no_attack_inside_a_certified_ball(shared: Path, name: str, count: int) -> None:
    network, data, _ = load(shared, name, str(count))
    x = data.x.double()
    with exact_kernels():
        point = EvaluatedPoints(network, x)
        found = certify_batch(select("auto", network), ModelBounds(network), point, True)
    radius, prediction = found.radius, point.prediction
    tied = ~(point.margin_low.amin(1) > 0)
    assert ((radius > 0) | tied).all()
    assert (radius[tied] == 0).all()
    attacked = found.attack.isfinite()
    assert (found.attack[attacked] > radius[attacked]).all()
    for factor in (1 - 1e-9, 1.3, 2.0, 4.0):
        d = pgd(network, x, prediction, radius.clamp(min=1e-6) * factor)
        norm = d.flatten(1).norm(dim=1)
        with torch.no_grad():
            flipped = network(x + d).argmax(1) != prediction
        assert not (flipped & (norm < radius)).any(), factor


ACCURACIES = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in LOADABLE]


@pytest.mark.parametrize("name", ACCURACIES)
def test_stated_accuracy_is_reached(shared: Path, name: str) -> None:
    """index.json states it for the float32 model: a handful of samples near a tie may differ."""
    count = "1000" if INDEX[name]["dataset"] == "mnist" else "761"
    network, data, entry = load(shared, name, count)
    with torch.no_grad():
        prediction = torch.cat([network(part.double()).argmax(1) for part in data.x.split(250)])
    assert data.y is not None
    accuracy = float((prediction == data.y).double().mean())
    assert accuracy == pytest.approx(entry["accuracy"], abs=0.0015)


def test_the_vision_transformer_is_refused_by_name(shared: Path) -> None:
    with pytest.raises(ModelError, match=r"is part of an attention block"):
        load_model(shared / "models" / REFUSED)
