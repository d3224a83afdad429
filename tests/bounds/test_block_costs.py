"""Costs of blocks: each pair by the cheaper direction, within a budget, the most promising first."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from certify_cli.bounds.global_bounds import expansion as lipschitz_module
from certify_cli.bounds.global_bounds.expansion import lipschitz_expansion, weight_blocks
from certify_cli.bounds.global_bounds.lipschitz import Lipschitz
from certify_cli.bounds.global_bounds.model_bounds import ModelBounds, PairTable
from certify_cli.bounds.linear_maps import weight_blocks as blocks_module
from certify_cli.bounds.linear_maps.block_costs import Costs, affordable, contributions, shared
from certify_cli.efforts import NORMAL, Budget
from certify_cli.network.graph import Network
from certify_cli.network.propagate import Slope, Slopes, jvp, nonlinear_nodes
from tests.networks import PIECEWISE, SMOOTH, all_pairs, mlp

NETWORKS = SMOOTH | PIECEWISE


def centred(network: Network) -> Slopes:
    return {k: Slope(0.5) for k in nonlinear_nodes(network)}


def written_out(network: Network, slopes: Slopes) -> dict[tuple[int, int], Tensor]:
    """Every block as a matrix (target size, source size), by unit vectors of the source alone."""
    found = {}
    for source in (0, *nonlinear_nodes(network)):
        node = network.nodes[source]
        units = torch.eye(node.size, dtype=torch.float64).reshape(node.size, *node.shape)
        for target, image in jvp(network, source, units, slopes).items():
            found[target, source] = image.value.flatten(1).T
    return found


@pytest.mark.parametrize("name", NETWORKS)
def test_blocks_are_the_same_in_either_direction(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices, norms, rows and columns, whatever the sides of a block are; in small chunks as well."""
    network = NETWORKS[name]
    radii = dict.fromkeys(nonlinear_nodes(network), 1.0)
    monkeypatch.setattr(blocks_module, "CHUNK_ENTRIES", 1)
    family = blocks_module.Blocks(network, centred(network), radii, NORMAL.budget, keep=True)
    exact = written_out(network, centred(network))
    assert set(family) == set(exact)
    for pair, matrix in exact.items():
        block = family[pair]
        assert block.matrix is not None
        assert torch.allclose(block.matrix, matrix, rtol=1e-12, atol=1e-12)
        norm = float(torch.linalg.matrix_norm(matrix, 2))
        assert norm * (1 - 1e-13) <= block.norm
        if pair in family.proved:
            assert block.norm <= norm * (1 + 1e-3) + 1e-9
        for bound, true in ((block.rows, matrix.norm(dim=1)), (block.columns, matrix.norm(dim=0))):
            assert bool((bound >= true * (1 - 1e-13)).all())


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("budget", [Budget(0.0, 0.0, 0.0), Budget(1e12, 1e12, 0.0), Budget(1e12, 1e12, 3e4)])
def test_no_budget_makes_a_bound_too_small_and_more_never_makes_it_larger(name: str, budget: Budget) -> None:
    network = NETWORKS[name]
    pairs = all_pairs(network.classes)
    poor = Lipschitz.of(network, weight_blocks(network, budget), budget).of_margins(pairs)
    rich = ModelBounds(network).lipschitz.of_margins(pairs)
    assert bool((poor >= rich * (1 - 1e-9)).all())


def test_a_pair_is_written_out_from_its_smaller_side() -> None:
    network = mlp((6, 50, 20, 40, 3), "relu")
    costs, sizes = Costs(network), [node.size for node in network.nodes]
    family = lipschitz_expansion(network, NORMAL.budget).blocks
    for target, source in family:
        passes = costs.passes((target, source))
        assert sizes[passes.node] == min(sizes[target], sizes[source])
        assert passes.node == (source if passes.forward else target)
        assert costs.writing((target, source)) <= sizes[source] * costs.between(target, source)
        assert costs.writing((target, source)) <= sizes[target] * costs.between(target, source)


def test_what_is_not_affordable_is_never_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    network = mlp((6, *[30] * 6, 4), "relu")
    radii = dict.fromkeys(nonlinear_nodes(network), 0.5)

    def refuse(*arguments: object) -> None:
        raise AssertionError("a vector was carried through the network")

    monkeypatch.setattr(blocks_module, "jvp", refuse)
    monkeypatch.setattr(blocks_module, "vjp", refuse)
    family = blocks_module.Blocks(network, centred(network), radii, replace(NORMAL.budget, blocks=0.0))
    assert not family.proved
    assert all(block.norm > 0 for block in family.values())
    rich = blocks_module.Blocks(network, centred(network), radii, NORMAL.budget)
    assert rich.proved
    with pytest.raises(AssertionError, match="carried"):
        [block.norm for block in rich.values()]


def test_the_most_promising_blocks_come_first_and_the_budget_holds() -> None:
    network = mlp((6, *[30] * 5, 4), "relu")
    family = lipschitz_expansion(network, NORMAL.budget).blocks
    costs, norms = Costs(network), {pair: block.norm for pair, block in family.items()}
    worth = contributions(network, norms, dict.fromkeys(nonlinear_nodes(network), 0.5))
    price = {pair: costs.writing(pair) + costs.proving(pair) for pair in worth}
    for budget in (0.0, 0.1 * sum(price.values()), 0.5 * sum(price.values()), sum(price.values())):
        chosen = affordable(costs, worth, worth, budget)
        assert sum(price[pair] for pair in chosen) <= budget * (1 + 1e-12)
        left = set(worth) - chosen
        best = max((worth[pair] / price[pair] for pair in chosen), default=0.0)
        for pair in left:  # one that was left out did not fit, or was worth less
            fits = price[pair] + sum(price[p] for p in chosen) <= budget
            assert not fits
            assert worth[pair] / price[pair] <= best or price[pair] > budget
    assert affordable(costs, worth, dict.fromkeys(worth, float("nan")), 1e30) == set(worth)


def test_contributions_add_up_to_the_bound() -> None:
    """Every path from the input passes one block that begins there, and one that ends at the logits."""
    network = mlp((5, 9, 8, 7, 3), "relu")
    blocks = weight_blocks(network, Budget(0.0, 0.0))
    radii = dict.fromkeys(nonlinear_nodes(network), 1.0)
    worth = contributions(network, {pair: block.norm for pair, block in blocks.items()}, radii)
    product = 1.0
    for block in blocks.values():
        product *= block.norm
    assert list(worth.values()) == pytest.approx([product] * len(blocks))


def test_blocks_share_passes_but_not_more_memory_than_said() -> None:
    network = mlp((6, *[30] * 4, 4), "relu")
    costs, pairs = Costs(network), set(lipschitz_expansion(network, NORMAL.budget).blocks)
    for entries in (1, 1000, 10**9):
        groups = shared(costs, pairs, entries)
        assert set(groups) == pairs
        for pair, (passes, group) in groups.items():
            assert pair in group
            assert len(group) == 1 or sum(costs.entries(other) for other in group) <= entries
            assert all(costs.passes(other) == passes for other in group)
    assert any(len(group) > 1 for _, group in shared(costs, pairs, 10**9).values())


@pytest.mark.parametrize("name", ["relu", "convolutional", "residual", "concatenating, softsign"])
def test_classes_in_parts_give_the_same_constants(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network = NETWORKS[name]
    pairs = all_pairs(network.classes)
    whole = ModelBounds(network).lipschitz.of_margins(pairs)
    for entries in (1, 300):
        monkeypatch.setattr(lipschitz_module, "ROW_ENTRIES", entries)
        few = pairs[pairs[:, 1] == 1]
        lipschitz = ModelBounds(network).lipschitz
        assert torch.allclose(lipschitz.of_margins(pairs), whole, rtol=1e-12)
        assert torch.allclose(lipschitz.of_margins(few), whole[pairs[:, 1] == 1], rtol=1e-12)


def test_a_table_of_pairs_holds_predicted_classes_alone() -> None:
    """As many numbers as there are classes for each; a pair once, whichever way it is first asked for."""
    classes, asked = 10**6, []

    def bound(pairs: Tensor) -> Tensor:
        asked.append(len(pairs))
        value = (3 * pairs[:, 0] + 5 * pairs[:, 1]).double()
        return value.masked_fill(pairs[:, 1] == 7, torch.nan)

    table = PairTable(classes, torch.tensor([4]), bound, most=300_000)
    every, own = torch.arange(classes), torch.tensor([2, 9, 2])
    for found, expected in (
        (table.rows(own), (3 * own.unsqueeze(1) + 5 * every).double()),
        (table.columns(own), (5 * own.unsqueeze(1) + 3 * every).double()),
        (table.rows(torch.tensor([4])), (12 + 5 * every).double().unsqueeze(0)),
    ):
        free = ~torch.isin(every, torch.tensor([2, 4, 7, 9]))
        assert torch.equal(found[:, free], expected[:, free])
    assert table.rows(own)[:, 7].isinf().all()
    assert table.rows(own)[0, 2] == table.columns(own)[1, 9] == 0
    assert table.columns(torch.tensor([9]))[0, 2] == table.rows(torch.tensor([2]))[0, 9] == 3 * 2 + 5 * 9
    assert max(asked) <= 300_000
    assert sum(asked) == 3 * (classes - 1) + 3 * (classes - 3)


@pytest.mark.parametrize("most", [2, 3, 5, 100])
def test_parts_of_pairs_hold_few_classes_and_all_pairs_once(most: int) -> None:
    pairs = torch.cartesian_prod(torch.tensor([4, 9]), torch.arange(20))
    for given in (pairs, pairs.flip(1), pairs[torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0))]):
        parts = list(lipschitz_module._in_parts(given, most))
        assert torch.equal(torch.cat(parts).sort().values, torch.arange(len(given)))
        assert all(len(given[part].unique()) <= most for part in parts)


def test_liplt_is_left_out_where_its_rows_are_beyond_the_budget() -> None:
    network = mlp((6, 30, 30, 4), "relu")
    assert len(ModelBounds(network).lipschitz.expansions) == 2
    budget = replace(NORMAL.budget, blocks=100.0)
    (product,) = Lipschitz.of(network, weight_blocks(network, budget), budget).expansions
    assert not product.centres
