"""`--attack search` against foolbox's attacks: as near as the best of them, never nearer than a proof allows.

Without foolbox (the extra `oracle`) the file is skipped.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from certify_cli.attacks.ddn import nearest_attacks
from certify_cli.bounds.global_bounds.model_bounds import ModelBounds
from certify_cli.certificates.certificates import Certificates
from certify_cli.certificates.methods import certify_batch, select
from certify_cli.data.datasets import load_data
from certify_cli.load.model import load_model
from certify_cli.load.preprocessing import fit
from certify_cli.names import AUTO
from certify_cli.network.evaluate import exact_kernels
from certify_cli.network.evaluated import EvaluatedPoints
from certify_cli.network.graph import Network

fb = pytest.importorskip("foolbox", reason="an oracle of its own: pip install 'curvcert[oracle]'")

MODELS = Path(__file__).parents[2] / "models"
SAMPLES = "40"
BOX = (-1.0, 2.0)
"""Our search leaves the pixels' [0, 1]; foolbox gets as much room as it can use."""


class _Module(nn.Module):
    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)


def _nearest(network: Network, x: Tensor, prediction: Tensor) -> Tensor:
    """(batch,): distances of the nearest adversarials of DDN (untargeted, and towards each rival) and of CW."""
    model = fb.PyTorchModel(_Module(network).eval(), bounds=BOX, device="cpu")
    any_rival = fb.criteria.Misclassification(prediction)
    each_rival = [
        fb.criteria.TargetedMisclassification((prediction + k) % network.classes) for k in range(1, network.classes)
    ]
    cw = fb.attacks.L2CarliniWagnerAttack(binary_search_steps=6, steps=500, stepsize=5e-3, initial_const=1.0)
    runs: list[tuple[Any, Any]] = [(fb.attacks.DDNAttack(steps=300), goal) for goal in (any_rival, *each_rival)]
    best = torch.full((len(x),), torch.inf, dtype=torch.float64)
    for attack, goal in (*runs, (cw, any_rival)):
        moved, _, _ = attack(model, x, goal, epsilons=None)
        distance = (moved - x).flatten(1).norm(dim=1)
        flipped = network(moved).argmax(1) != prediction
        best = torch.where(flipped, torch.minimum(best, distance), best)
    return best


@dataclass(frozen=True, eq=False)
class Case:
    point: EvaluatedPoints
    found: Certificates
    foolbox: Tensor


@pytest.fixture(scope="module", params=["digits_mlp", "digits_conv"])
def case(request: pytest.FixtureRequest) -> Case:
    torch.manual_seed(0)
    data = load_data("digits", samples=SAMPLES)
    network = fit(load_model(MODELS / f"{request.param}.onnx").network, data.x.shape[1:])
    with exact_kernels():
        point = EvaluatedPoints(network, data.x.double())
        found = certify_batch(select(AUTO, network), ModelBounds(network), point, True)
    return Case(point, found, _nearest(network, point.x, point.prediction))


def test_no_foolbox_adversarial_lies_inside_a_certified_ball(case: Case) -> None:
    assert bool(case.foolbox.isfinite().all())
    assert bool((case.found.radius > 0).all())
    assert bool((case.foolbox > case.found.radius).all())


@pytest.mark.parametrize("effort", ["normal", pytest.param("max", marks=pytest.mark.slow)])
def test_the_search_comes_as_near_as_foolbox(case: Case, effort: str) -> None:
    with exact_kernels():
        _, norm = nearest_attacks(case.point, case.found.near, case.found.radius, effort)
    assert bool((norm > case.found.radius).all())
    ratio = norm / case.foolbox
    assert float(ratio.mean()) < 1.03, ratio
    assert float(ratio.max()) < 1.1, ratio
