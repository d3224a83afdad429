"""Matrices by groups of rows multiply as they do whole, whatever is shared, and whichever rows see nothing."""

from __future__ import annotations

import pytest
import torch

from certify_cli.bounds.linear_maps.row_matrices import Grouped, Whole, by_columns

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
    found, whole = by_columns(matrix), Whole(matrix)
    assert isinstance(found, Grouped)
    assert not found.structural  # an entry may be 0 as computed only
    assert found.values.numel() < 0.3 * matrix.numel()
    assert found.shape == whole.shape == (128, 64)
    assert torch.equal(found.dense, matrix)
    assert torch.allclose(found.row_norms, whole.row_norms, rtol=1e-14)
    g = torch.Generator().manual_seed(1)
    d, p = (torch.randn(3, n, dtype=D, generator=g) for n in (64, 128))
    several = torch.randn(3, 5, 64, dtype=D, generator=g)
    assert torch.allclose(found.times(d), whole.times(d), rtol=1e-12, atol=1e-12)
    assert torch.allclose(found.times(several), whole.times(several), rtol=1e-12, atol=1e-12)
    assert torch.allclose(found.times(several[:1]), whole.times(several[:1]), rtol=1e-12, atol=1e-12)
    assert torch.allclose(found.transposed(p), whole.transposed(p), rtol=1e-12, atol=1e-12)
    scaled, apart = (m.put_values(m.values * m.at_columns(d)) for m in (found, whole))
    assert torch.allclose(scaled.dense, apart.dense)
    assert torch.allclose(scaled.row_sums(scaled.values), apart.row_sums(apart.values), atol=1e-12)
    forms = torch.zeros(2, 3, 64, 64, dtype=D)
    for matrix_form, total in zip((found, whole), forms, strict=True):
        matrix_form.add_form(total, p.square())
    assert torch.allclose(forms[0], forms[1], rtol=1e-12, atol=1e-12)
    index = torch.tensor([2, 0])
    if batch > 1:
        assert torch.equal(found.at(index).times(d[index]), found.times(d)[index])
    else:
        assert found.at(index) is found  # what it remembers is not lost
    single = found.over(4.0, torch.float32).times(d.float())
    assert single.dtype == torch.float32
    assert torch.allclose(4 * single.double(), found.times(d), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batch", [1, 3])
def test_parts_are_those_of_the_whole(batch: int) -> None:
    """Any rows and columns, in any order, of any number, and zeros in their padding."""
    matrix = convolution(2, batch)
    g = torch.Generator().manual_seed(2)
    rows = torch.stack([torch.randperm(129, generator=g)[:9] for _ in range(20)])
    columns = torch.stack([torch.randperm(65, generator=g)[:30] for _ in range(20)])
    expected = torch.nn.functional.pad(matrix, (0, 1, 0, 1))[:, rows.unsqueeze(2), columns.unsqueeze(1)]
    for found in (by_columns(matrix), Whole(matrix)):
        assert torch.equal(found.within(rows, columns), expected)


def test_a_sample_that_is_no_number_spoils_its_own_products_only() -> None:
    found = by_columns(convolution(2, 1))
    d = torch.ones(3, 64, dtype=D)
    d[1] = torch.nan
    assert bool(found.times(d)[[0, 2]].isfinite().all())
    assert bool(found.transposed(torch.nn.functional.pad(d, (0, 64), value=1.0))[[0, 2]].isfinite().all())


def test_dense_rows_stay_whole() -> None:
    assert isinstance(by_columns(torch.ones(1, 4, 9, dtype=D)), Whole)
