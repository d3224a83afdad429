"""One of two numbers, entry by entry, in float64."""

from __future__ import annotations

import torch
from torch import Tensor


def either(condition: Tensor, yes: float, no: float) -> Tensor:
    """`yes` where the condition holds, `no` elsewhere: float64, of the condition's shape, on its device.

    `torch.where` of two Python numbers is float32 and rounds them to seven digits.
    """
    return torch.where(condition, torch.tensor(yes, dtype=torch.float64, device=condition.device), no)
