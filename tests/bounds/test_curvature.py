"""Curvature bounds against Hessians computed by autograd, rule by rule; and the counter-examples theory.md names."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from certify_cli.bounds.global_bounds.curvature import COMPOSITION, RULES, why_no_curvature
from certify_cli.bounds.global_bounds.model_bounds import ModelBounds
from certify_cli.bounds.linear_maps.weighted_gram import weighted_gram_norms
from certify_cli.efforts import Budget
from certify_cli.network.graph import Network
from tests.networks import PIECEWISE, SMOOTH, all_pairs, mlp, points


def hessians(network: Network, x: Tensor, pair: tuple[int, int]) -> Tensor:
    """(batch, inputs, inputs) of z_a - z_b, by double backward."""
    x = x.flatten(1).requires_grad_(True)
    out = network(x.reshape(-1, *network.input_shape))
    (gradient,) = torch.autograd.grad((out[:, pair[0]] - out[:, pair[1]]).sum(), x, create_graph=True)
    if not gradient.requires_grad:
        return torch.zeros(*x.shape, x.shape[1], dtype=x.dtype)
    rows = [torch.autograd.grad(gradient[:, i].sum(), x, retain_graph=True)[0] for i in range(x.shape[1])]
    return torch.stack(rows, dim=1)


def worst_eigenvalues(network: Network, x: Tensor, pair: tuple[int, int]) -> tuple[float, float]:
    """Largest -lambda_min and lambda_max over the points."""
    values = torch.linalg.eigvalsh(hessians(network, x, pair))
    return float(-values[:, 0].min()), float(values[:, -1].max())


@pytest.mark.smoke
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n == "convolutional, mish" else n for n in SMOOTH]
)
def test_no_sampled_hessian_exceeds_any_rule(name: str) -> None:
    network = SMOOTH[name]
    curvature = ModelBounds(network).curvature
    pairs = all_pairs(network.classes)
    x = torch.cat([points(network, 60, spread=s) for s in (0.3, 1.0, 3.0)])[:: 4 if network.nodes[0].size > 20 else 1]
    found = [worst_eigenvalues(network, x, (a, b)) for a, b in pairs.tolist()]
    below, above = torch.tensor(found, dtype=torch.float64).T
    for rule in [*((rule,) for rule in RULES), COMPOSITION, tuple(RULES)]:
        assert (curvature.lower(pairs, rule) >= below).all(), rule
        assert (curvature.lower(pairs.flip(1), rule) >= above).all(), rule


@pytest.mark.parametrize("name", SMOOTH)
def test_all_rules_together_are_the_least_of_each_layer(name: str) -> None:
    network = SMOOTH[name]
    curvature = ModelBounds(network).curvature
    pairs = all_pairs(network.classes)
    together = curvature.terms(pairs)
    for rule in RULES:
        assert (together <= curvature.terms(pairs, (rule,)) * (1 + 1e-12)).all()


@pytest.mark.parametrize("activation", ["softplus:4", "tanh", "sigmoid"])
def test_two_layers_by_the_published_formula(activation: str) -> None:
    """M- = lambda_max(W^T diag(max(0, -v h_lo, -v h_hi)) W); softplus: only v < 0 enters; tanh: |v| h."""
    network = mlp((6, 12, 3), activation, seed=7)
    first, act, last = (network.nodes[i].op for i in (1, 2, 3))
    low, high = act.curvature_range
    pairs = all_pairs(3)
    bound = ModelBounds(network).curvature.lower(pairs)
    for row, (a, b) in enumerate(pairs.tolist()):
        v = last.weight[a] - last.weight[b]
        w = torch.stack([-v * low, -v * high]).amax(0).clamp(min=0.0)
        oracle = float(torch.linalg.eigvalsh(first.weight.T @ (w.unsqueeze(1) * first.weight))[-1])
        assert oracle * (1 - 1e-12) <= float(bound[row]) <= oracle * (1 + 1e-6)


def test_softplus_formula_is_wrong_for_tanh() -> None:
    """phi'' >= 0 keeps only v < 0; on tanh that falls below the true curvature, and ours does not."""
    weight_in = torch.tensor([[1.0]], dtype=torch.float64)
    network = mlp((1, 1, 2), "tanh")
    object.__setattr__(network.nodes[1].op, "weight", weight_in)
    object.__setattr__(network.nodes[3].op, "weight", torch.tensor([[1.0], [0.0]], dtype=torch.float64))
    down, _ = worst_eigenvalues(network, torch.linspace(-3, 3, 601, dtype=torch.float64).reshape(-1, 1), (0, 1))
    only_negative = 0.0  # v = +1: the softplus formula sees no curvature at all
    assert only_negative < down <= float(ModelBounds(network).curvature.lower(torch.tensor([[0, 1]])))


def _frozen_sign_bound(network: Network, x: Tensor, pair: tuple[int, int]) -> float:
    """The mistake: signs of v taken at the sample x instead of intervals over all inputs (softplus chain)."""
    values = network.values(x.requires_grad_(True))
    margin = values[-1][0, pair[0]] - values[-1][0, pair[1]]
    layers = [i for i, node in enumerate(network.nodes) if hasattr(node.op, "curvature_sup")]
    adjoints = torch.autograd.grad(margin, [values[i] for i in layers])
    lipschitz = ModelBounds(network).lipschitz
    total = 0.0
    for k, v in zip(layers, adjoints, strict=True):
        w = (-v[0]).clamp(min=0.0) * network.nodes[k].op.curvature_sup
        weight = network.nodes[k - 1].op.weight
        before = 1.0 if k == layers[0] else lipschitz.to_output(k - 2)
        total += float(torch.linalg.eigvalsh(weight.T @ (w.unsqueeze(1) * weight))[-1]) * before**2
    return total


def test_signs_need_intervals_from_three_layers_on() -> None:
    """With v taken at a sample a softplus net of three layers violates the bound; with intervals it never does."""
    violated = 0
    for seed in range(40):
        network = mlp((2, 3, 2, 2), "softplus:4", seed=seed, gain=2.5)
        frozen = _frozen_sign_bound(network, points(network, 1, seed), (0, 1))
        down, _ = worst_eigenvalues(network, points(network, 800, seed + 1), (0, 1))
        assert float(ModelBounds(network).curvature.lower(torch.tensor([[0, 1]]))) >= down
        violated += frozen < down
    assert violated > 0


def test_a_linear_network_has_no_curvature() -> None:
    assert ModelBounds(SMOOTH["linear"]).curvature.lower(all_pairs(3)).max() < 1e-300


def test_piecewise_networks_are_refused_with_the_layer_named() -> None:
    assert "act0 (relu)" in (why_no_curvature(PIECEWISE["relu"]) or "")
    assert why_no_curvature(SMOOTH["residual"]) is None


@pytest.mark.parametrize("flops", [1e12, 0.0], ids=["proved", "perron"])
@pytest.mark.parametrize("shape", [(30, 8), (8, 30), (20, 20), (40, 1)])
def test_weighted_gram_against_lapack(shape: tuple[int, int], flops: float) -> None:
    matrix = torch.randn(*shape, dtype=torch.float64)
    weights = torch.rand(7, shape[0], dtype=torch.float64) * (torch.rand(7, shape[0]) > 0.4)
    weights[3] = 0.0
    oracle = torch.linalg.eigvalsh(matrix.T @ (weights.unsqueeze(2) * matrix))[:, -1]
    bound = weighted_gram_norms(matrix, weights, Budget(norm=1e9, eigenvalues=flops))
    assert (bound >= oracle * (1 - 1e-13)).all()
    if flops:
        assert (bound <= oracle * (1 + 1e-3) + 1e-12).all()
    noisy = matrix + 1e-3 * torch.randn(*shape, dtype=torch.float64)
    error = float((noisy - matrix).norm())
    assert (weighted_gram_norms(noisy, weights, Budget(norm=1e9, eigenvalues=flops), error) >= oracle).all()
