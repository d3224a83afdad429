"""The gradient norm and the Lipschitz constant of a record are bounds as well, whatever the method."""

from __future__ import annotations

import pytest
import torch

from certify_cli.certificates.methods import METHODS
from certify_cli.data.datasets import Dataset
from certify_cli.load.loaded_model import LoadedModel
from certify_cli.network.graph import Network
from certify_cli.records import ModelInfo
from certify_cli.run.library import certify
from tests.networks import conv_net, mlp, residual_net

NETWORKS: dict[str, Network] = {
    f"{kind} {activation}": build
    for activation in ("tanh", "softplus:5", "relu", "leaky_relu:0.2", "clip:0,1", "elu:1", "hard_swish")
    for kind, build in (
        ("mlp", mlp((5, 9, 8, 3), activation, gain=2.0)),
        ("convolutional", conv_net(activation)),
        ("residual", residual_net(activation)),
    )
}


@pytest.mark.parametrize("method", ["auto", *METHODS])
@pytest.mark.parametrize("name", NETWORKS)
def test_figures_of_a_record_are_bounds(name: str, method: str) -> None:
    network = NETWORKS[name]
    if method != "auto" and METHODS[method].applies(network) is not None:
        pytest.skip("the method does not apply")
    x = torch.rand(5, *network.input_shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).float()
    data = Dataset("d", x, None, tuple(range(len(x))), None, False, "0" * 64, ())
    info = ModelInfo("m", "0" * 64, "onnx", 13, network.classes)
    loaded = LoadedModel(network, info, network.input_shape, "float64", ())
    for sample in certify(loaded, data, method=method, effort="fast").samples:
        if sample.rival is None:
            continue
        at = x[sample.index : sample.index + 1].double().requires_grad_()
        logits = network(at)[0]
        (gradient,) = torch.autograd.grad(logits[sample.prediction] - logits[sample.rival], at)
        norm = float(gradient.norm())
        if sample.gradient_norm is not None:
            assert sample.gradient_norm >= norm * (1 - 1e-9)
        if sample.lipschitz is not None:
            assert sample.lipschitz >= norm * (1 - 1e-9)
