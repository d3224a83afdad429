"""Forms on windows are the same forms as whole ones, on every topology; and what is rounded away is paid for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from certify_cli.bounds.relaxation.backward import pulled_back
from certify_cli.network.activations import from_name
from certify_cli.network.affine import Dense
from certify_cli.network.graph import Builder, Network
from certify_cli.network.linear_forms import Forms, WholeForms, WindowForms, unit_forms
from certify_cli.network.movement import Select
from certify_cli.network.propagate import nonlinear_nodes, pre_activations
from tests.windows import TOPOLOGIES

D = torch.float64


@dataclass(frozen=True)
class Slopes:
    """A node made linear by slopes that the sign of each entry selects, as those of a relaxation."""

    positive: Tensor
    negative: Tensor

    def back(self, forms: Forms) -> Forms:
        taken = torch.where(forms.values < 0, forms.entries(self.negative), forms.entries(self.positive))
        return forms.at(forms.values * taken)

    def rounding(self, size: Tensor) -> Tensor:
        return 2.0**-50 * size

    def loss(self, forms: Forms) -> Tensor:
        return forms.dot(forms.magnitudes, self.positive.abs())


def random_slopes(network: Network, batch: int) -> dict[int, Slopes]:
    g = torch.Generator().manual_seed(1)
    shapes = {k: network.nodes[k].shape for k in nonlinear_nodes(network)}
    return {k: Slopes(*torch.rand(2, batch, *shape, generator=g, dtype=D)) for k, shape in shapes.items()}


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_windows_give_the_same_forms(topology: Callable[[], Network]) -> None:
    """At the input and at every node between; and the same losses of a relaxation."""
    network = topology()
    slopes = random_slopes(network, 2)
    windowed = 0
    for target in pre_activations(network)[:-1]:
        node = network.nodes[target]
        count = min(node.size, 60)
        rows = torch.randperm(node.size, generator=torch.Generator().manual_seed(2))[:count]
        sign = torch.where(torch.arange(count) % 2 == 0, 1.0, -1.0).to(D)
        found = unit_forms(node.shape, rows, sign)
        whole = WholeForms(
            (torch.nn.functional.one_hot(rows, node.size) * sign.unsqueeze(1)).reshape(1, -1, *node.shape)
        )
        assert torch.equal(found.whole().values, whole.values)
        seen: list[dict[int, tuple[Tensor, Tensor]]] = []
        ends = []
        for forms in (found, whole):
            arrived: dict[int, tuple[Tensor, Tensor]] = {}

            def arrive(index: int, here: Forms, arrived: dict[int, tuple[Tensor, Tensor]] = arrived) -> None:
                arrived[index] = here.whole().values, slopes[index].loss(here)
                nonlocal windowed
                windowed += isinstance(here, WindowForms)

            end = pulled_back(network, slopes, forms, target, arrive, lambda index, size: None)
            seen.append(arrived)
            ends.append(end)
        first, second = ends
        assert first is not None
        assert second is not None
        size = second.values.abs().max()
        assert torch.allclose(first.whole().values, second.values, rtol=0, atol=1e-12 * float(size))
        assert torch.allclose(first.size, second.size, rtol=1e-12)
        assert seen[0].keys() == seen[1].keys()
        for index, (values, loss) in seen[1].items():
            assert torch.allclose(seen[0][index][0], values, rtol=1e-12, atol=1e-12 * float(values.abs().max()))
            assert torch.allclose(seen[0][index][1], loss, rtol=1e-12)
    assert windowed > 0


def test_a_movement_that_differs_by_pixel_has_no_grid() -> None:
    shape = (2, 5, 5)
    same = Select.of(lambda t: torch.nn.functional.pad(t[:, [1]], (2, 0, 0, 3)), shape).grid(shape)
    assert same is not None
    assert same.channels.tolist() == [1]
    assert (same.start, same.step) == ((0, -2), (1, 1))
    for function in (
        lambda t: t.flip(2),
        lambda t: t.transpose(2, 3),
        lambda t: t[:, :, [0, 1, 3]],
        lambda t: t.repeat(1, 1, 2, 1),
        lambda t: t.reshape(1, 5, 2, 5),
    ):
        assert Select.of(function, shape).grid(shape) is None


def test_what_is_rounded_away_is_paid_for() -> None:
    """A chain of dense layers, some almost cancelling, against exact rational arithmetic."""
    g = torch.Generator().manual_seed(3)
    builder = Builder((6,))
    x, matrices = 0, []
    for number in range(8):
        weight = torch.randn(6, 6, generator=g, dtype=D)
        if number % 2:
            weight[3:] = weight[:3] * (1 + 2.0**-40)
        matrices.append(weight)
        x = builder.add("dense", Dense(weight, None), x)
        x = builder.add("relu", from_name("relu"), x)
    network = builder.build(builder.add("last", Dense(torch.randn(2, 6, generator=g, dtype=D), None), x))
    slopes = random_slopes(network, 1)
    rows = torch.randn(1, 2, 2, generator=g, dtype=D)
    rounded: list[tuple[int, Tensor]] = []
    end = pulled_back(
        network, slopes, WholeForms(rows), len(network.nodes) - 1, lambda *_: None, lambda *pair: rounded.append(pair)
    )
    assert end is not None
    last = network.nodes[-1].op
    assert isinstance(last, Dense)
    for row in range(2):
        exact = [Fraction(v) for v in rows[0, row].tolist()]
        computed, exact = rows[0, row], _times(exact, last.weight)
        computed = computed @ last.weight
        chosen = []
        for layer, weight in zip(reversed(nonlinear_nodes(network)), reversed(matrices), strict=True):
            slope = torch.where(computed < 0, slopes[layer].negative[0], slopes[layer].positive[0])
            chosen.append((layer, slope, weight))
            exact = _times([v * Fraction(s) for v, s in zip(exact, slope.tolist(), strict=True)], weight)
            computed = (computed * slope) @ weight
        d = torch.randn(6, generator=g, dtype=D)
        # the norm of every node's change, of the network made linear by the slopes that were selected
        change, norms = d, {0: float(d.norm())}
        for layer, slope, weight in reversed(chosen):
            change = weight @ change
            norms[layer - 1] = float(change.norm())
            change = slope * change
            norms[layer] = float(change.norm())
        off = sum(
            (a - Fraction(b)) * Fraction(t)
            for a, b, t in zip(exact, end.values[0, row].tolist(), d.tolist(), strict=True)
        )
        paid = sum(float(size[0, row]) * norms[index] * (1 + 1e-9) for index, size in rounded)
        assert abs(float(off)) <= paid
        assert abs(float(off)) >= 1e-5 * paid
        assert paid < 1e-9 * float(sum(abs(v) for v in exact)) * float(d.norm())


def _times(row: list[Fraction], weight: Tensor) -> list[Fraction]:
    """The row vector times the matrix, exactly."""
    columns = zip(*weight.tolist(), strict=True)
    return [sum((v * Fraction(w) for v, w in zip(row, column, strict=True)), Fraction(0)) for column in columns]
