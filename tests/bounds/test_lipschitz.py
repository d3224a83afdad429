"""Lipschitz constants: never below any slope that sampling finds, and equal to known ones."""

from __future__ import annotations

import pytest
import torch

from certify_cli.bounds.global_bounds.expansion import lipschitz_expansion, product_expansion, weight_blocks
from certify_cli.bounds.global_bounds.lipschitz import Lipschitz
from certify_cli.bounds.global_bounds.model_bounds import ModelBounds
from certify_cli.efforts import EFFORTS, Budget
from certify_cli.network.affine import Dense
from certify_cli.network.graph import Builder, Network
from certify_cli.network.propagate import nonlinear_nodes, pre_activation
from tests.networks import PIECEWISE, SMOOTH, all_pairs, mlp, points

NETWORKS = SMOOTH | PIECEWISE
TINY = Budget(norm=0.0, eigenvalues=0.0)


def jacobians(network: Network, x: torch.Tensor) -> torch.Tensor:
    """(batch, classes, inputs) by autograd: the oracle."""
    x = x.requires_grad_(True)
    out = network(x)
    rows = [torch.autograd.grad(out[:, c].sum(), x, retain_graph=True)[0].flatten(1) for c in range(network.classes)]
    return torch.stack(rows, dim=1)


@pytest.mark.parametrize("effort", ["fast", "normal", "matrix-free"])
@pytest.mark.parametrize("name", NETWORKS)
def test_margins_never_change_faster(name: str, effort: str) -> None:
    network = NETWORKS[name]
    model_bounds = ModelBounds(network, EFFORTS["normal" if effort == "matrix-free" else effort])
    if effort == "matrix-free":
        model_bounds.budget = TINY
    pairs = all_pairs(network.classes)
    bound = model_bounds.lipschitz.of_margins(pairs)
    jacobian = jacobians(network, points(network, 400))
    slopes = (jacobian[:, pairs[:, 0]] - jacobian[:, pairs[:, 1]]).norm(dim=2).amax(0)
    assert (bound >= slopes).all()
    # chords between far points, too
    a, b = points(network, 300, 1), points(network, 300, 2)
    with torch.no_grad():
        change = network(a) - network(b)
    chord = (change[:, pairs[:, 0]] - change[:, pairs[:, 1]]).abs() / (a - b).flatten(1).norm(dim=1, keepdim=True)
    assert (bound >= chord.amax(0)).all()


@pytest.mark.parametrize("name", NETWORKS)
def test_every_head_and_every_source_is_bounded(name: str) -> None:
    """m_l bounds dz_l/dx and its rows, and the sensitivity to a hidden layer bounds the margin's slope in it."""
    network = NETWORKS[name]
    lipschitz = ModelBounds(network).lipschitz
    x = points(network, 60).requires_grad_(True)
    values = network.values(x)
    pairs = all_pairs(network.classes)
    for k in nonlinear_nodes(network):
        z = values[pre_activation(network, k)].flatten(1)
        rows = torch.stack(
            [torch.autograd.grad(z[:, i].sum(), x, retain_graph=True)[0].flatten(1) for i in range(z.shape[1])], dim=1
        )
        assert (torch.linalg.svdvals(rows)[:, 0] <= lipschitz.to_pre_activation(pre_activation(network, k))).all()
        assert (rows.norm(dim=2).amax(1) <= lipschitz.rows(pre_activation(network, k))).all()
        bound = lipschitz.sensitivity(k, pairs)
        for (a, b), limit in zip(pairs.tolist(), bound.tolist(), strict=True):
            margin = (values[-1][:, a] - values[-1][:, b]).sum()
            (adjoint,) = torch.autograd.grad(margin, values[k], retain_graph=True)
            assert (adjoint.flatten(1).norm(dim=1) <= limit).all()


def test_liplt_beats_the_product_on_a_relu_chain() -> None:
    network = PIECEWISE["relu"]
    model_bounds = ModelBounds(network)
    pairs = all_pairs(network.classes)
    product = product_expansion(network, model_bounds.weights).sensitivity(0, pairs)
    liplt = lipschitz_expansion(network, model_bounds.budget).sensitivity(0, pairs)
    assert (liplt < product).all()
    assert torch.equal(model_bounds.lipschitz.of_margins(pairs), torch.minimum(liplt, product))


def test_a_linear_classifier_is_exact() -> None:
    weight = torch.tensor([[3.0, 0.0], [0.0, 4.0]], dtype=torch.float64)
    builder = Builder((2,))
    network = builder.build(builder.add("fc", Dense(weight), 0))
    bound = Lipschitz.of(network, ModelBounds(network).weights, EFFORTS["normal"].budget).of_margins(all_pairs(2))
    assert bound.tolist() == pytest.approx([5.0, 5.0], rel=1e-12)
    assert (bound >= 5.0).all()


def test_two_layer_liplt_by_hand() -> None:
    """S_1 of a GELU layer is 1.129, not m_0 = 1: the pre-activation's bound is not the output's (theory section 3)."""
    builder = Builder((1,))
    one = torch.ones(1, 1, dtype=torch.float64)
    from certify_cli.network.activations import from_name

    z = builder.add("fc0", Dense(one), 0)
    h = builder.add("act", from_name("gelu"), z)
    network = builder.build(builder.add("fc1", Dense(torch.tensor([[1.0], [0.0]], dtype=torch.float64)), h))
    lipschitz = ModelBounds(network).lipschitz
    assert lipschitz.to_pre_activation(z) == pytest.approx(1.0, rel=1e-9)
    assert lipschitz.to_output(h) == pytest.approx(1.128904146, rel=1e-8)
    assert float(lipschitz.of_margins(torch.tensor([[0, 1]]))) >= 1.1289041


def test_deep_networks_finish() -> None:
    network = mlp((10, *[20] * 12, 5), "relu")
    assert ModelBounds(network).lipschitz.of_margins(all_pairs(5)).isfinite().all()


@pytest.mark.parametrize("name", ["convolutional", "residual", "concatenating, softsign", "relu, convolutional"])
def test_a_block_that_is_not_written_out_has_a_norm_of_its_own_for_every_row(name: str) -> None:
    """Against the rows of the blocks written out, where these do not fit; without means there is one norm for all."""
    network = (SMOOTH | PIECEWISE)[name]
    written = weight_blocks(network, Budget(1e12, 1e12))
    adjoints = weight_blocks(network, Budget(1e12, 1e12, memory=0))
    poor = weight_blocks(network, Budget(0.0, 0.0))
    assert adjoints.keys() == written.keys() == poor.keys()
    for key, block in adjoints.items():
        size = network.nodes[key[0]].size
        assert block.matrix is None
        exact = written[key].rows.expand(size)
        assert len(block.rows) == size
        assert torch.allclose(block.rows, exact, rtol=1e-9, atol=1e-12)
        assert bool((poor[key].rows >= block.rows * (1 - 1e-12)).all())
