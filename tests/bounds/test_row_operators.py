"""Matrices by groups of rows multiply as they do whole, whatever is shared, and whichever rows see nothing."""

from __future__ import annotations

import pytest
import torch

from certify_cli.bounds.linear_maps.row_operators import Grouped, Whole, operator
from certify_cli.bounds.linear_maps.row_sparsity import RowSparsity

D = torch.float64


def convolution(channels: int, batch: int, seed: int = 0) -> torch.Tensor:
    """(batch, rows, 64): Jacobians of 3x3 convolutions with padding on 8 x 8 pixels, one row of zeros each."""
    generator = torch.Generator().manual_seed(seed)
    units = torch.eye(64, dtype=D).reshape(64, 1, 8, 8)
    weights = torch.randn(batch, channels, 1, 3, 3, dtype=D, generator=generator)
    matrices = torch.stack([torch.nn.functional.conv2d(units, w, padding=1).flatten(1).T for w in weights])
    matrices[:, 5] = 0.0
    return matrices


@pytest.mark.parametrize("batch", [1, 3])
def test_grouped_is_whole(batch: int) -> None:
    matrix = convolution(2, batch)
    found = operator(matrix, RowSparsity.of(matrix))
    assert isinstance(found, Grouped)
    assert found.values.numel() < 0.3 * matrix.numel()
    whole = Whole(matrix)
    assert found.shape == whole.shape == (128, 64)
    generator = torch.Generator().manual_seed(1)
    d, p = (torch.randn(3, n, dtype=D, generator=generator) for n in (64, 128))
    assert torch.allclose(found.times(d), whole.times(d), rtol=1e-12, atol=1e-12)
    assert torch.allclose(found.transposed(p), whole.transposed(p), rtol=1e-12, atol=1e-12)
    index = torch.tensor([2, 0])
    if batch > 1:
        assert torch.equal(found.at(index).times(d[index]), found.times(d)[index])
    single = found.over(4.0, torch.float32).times(d.float())
    assert single.dtype == torch.float32
    assert torch.allclose(4 * single.double(), found.times(d), rtol=1e-5, atol=1e-5)


def test_dense_rows_stay_whole() -> None:
    matrix = torch.ones(1, 4, 9, dtype=D)
    assert isinstance(operator(matrix, RowSparsity.of(matrix)), Whole)
