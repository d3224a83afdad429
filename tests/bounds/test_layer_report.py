"""The layer table: every figure an upper bound, rounded up, and the last row the network's own."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from certify_cli.bounds.global_bounds.layer_report import layer_table
from certify_cli.bounds.global_bounds.model_bounds import ModelBounds
from certify_cli.network.propagate import nonlinear_nodes
from tests.networks import PIECEWISE, SMOOTH, all_pairs


@pytest.mark.parametrize("name", SMOOTH)
def test_curvature_so_far_is_never_below_the_exact_sum_of_its_layers(name: str) -> None:
    network = SMOOTH[name]
    terms = ModelBounds(network).curvature.terms(all_pairs(network.classes))
    worst = [Fraction(term) for term in terms[int(terms.sum(1).argmax())].tolist()]
    rows = layer_table(network)
    assert len(rows) == len(nonlinear_nodes(network)) + 1
    for position, row in enumerate(rows[:-1]):
        assert row.curvature is not None
        assert Fraction(row.curvature) >= sum(worst[: position + 1])
    assert rows[-1].kind == "logits"


@pytest.mark.parametrize("name", SMOOTH | PIECEWISE)
def test_norms_of_the_weights_that_feed_a_layer(name: str) -> None:
    """Exactly summed squares of all blocks: never above the printed norm's square."""
    network = (SMOOTH | PIECEWISE)[name]
    model_bounds = ModelBounds(network)
    rows = {row.name: row for row in layer_table(network)}
    for k in nonlinear_nodes(network):
        target = network.nodes[k].inputs[0]
        norms = [Fraction(block.norm) for (t, _), block in model_bounds.weights.items() if t == target]
        printed = rows[network.nodes[k].name].norm
        assert printed is not None
        assert Fraction(printed) ** 2 >= sum(n * n for n in norms)


def test_a_piecewise_network_has_no_curvature_column() -> None:
    assert {row.curvature for row in layer_table(PIECEWISE["relu"])} == {None}
    assert torch.isfinite(torch.tensor([row.lipschitz for row in layer_table(PIECEWISE["relu"])])).all()
