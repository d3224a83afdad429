"""Selection: models are compared by bounds as sharp as those that they are trained towards and certified by."""

from __future__ import annotations

import torch

from certify_cli import certify
from certify_cli.load.safetensors.architecture import build
from certify_cli.training.architectures import architecture
from certify_cli.training.validation import score


def test_a_wide_model_is_selected_by_the_bounds_that_it_will_be_certified_by() -> None:
    torch.manual_seed(0)
    made = architecture("mlp:784-800-10", "softplus", (1, 28, 28), 10)
    module = made.module()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter *= 4  # curvature counts
    network, x = build(module.spec, module.declared()), torch.randn(12, 1, 28, 28)
    y = network(x.double()).argmax(1)
    sharp, weak = (
        torch.tensor([s.certified_radius for s in certify(module, x, y, method="dual", effort=effort).samples])
        for effort in ("normal", "fast")
    )
    widest = int((sharp - weak).argmax())
    between = float(0.5 * (sharp + weak)[widest])
    assert int((sharp > between).sum()) > int((weak > between).sum())  # else this test shows nothing
    found = score(network, x, y, between, checked=len(x))
    assert found.certified >= float((sharp > between).double().mean())
    assert found.accuracy == 1.0


def test_wrong_predictions_are_not_certified() -> None:
    torch.manual_seed(0)
    for activation in ("softplus", "relu"):
        module = architecture("mlp:4-8-3", activation, (4,), 3).module()
        network, x = build(module.spec, module.declared()), torch.randn(30, 4)
        right = network(x.double()).argmax(1)
        for y, expected in ((right, 1.0), ((right + 1) % 3, 0.0)):
            found = score(network, x, y, 1e-6, checked=20)
            assert (found.accuracy, found.certified) == (expected, expected)
