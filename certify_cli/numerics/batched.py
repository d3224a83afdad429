"""Products of vectors with matrices of their own or a shared one, and the precision of estimates."""

from __future__ import annotations

import torch
from torch import Tensor

SMALL = 128
"""Size of a matrix up to which single precision saves no time."""


def vector_times_matrix(vectors: Tensor, matrix: Tensor) -> Tensor:
    """(batch, m) and (batch or 1, m, n) -> (batch, n)."""
    return vectors @ matrix[0] if len(matrix) == 1 else (vectors.unsqueeze(1) @ matrix).squeeze(1)


def estimate_dtype(size: int) -> torch.dtype:
    """Type of matrices, of `size` rows, that enter estimates only: single precision where it saves time."""
    return torch.float64 if size <= SMALL else torch.float32
