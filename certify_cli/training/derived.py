"""Layers in training whose declared form, an ordinary layer of the spec, follows from other numbers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import nn


class Derived(nn.Module, ABC):
    """A layer that is written to a file as another one, which computes the same in evaluation mode."""

    @abstractmethod
    def written_out(self) -> nn.Module:
        """The layer with the tensors that the spec names, and no others."""

    def entry(self) -> dict[str, Any]:
        """Fields of the layer's entry in the spec that follow from what it has learned."""
        return {}
