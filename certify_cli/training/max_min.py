"""MaxMin as a torch module, and clipped MaxMin with thresholds that are learned."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from certify_cli.network.lowering.context import Data, LoweringContext, lowers
from certify_cli.network.pooling import MaxMin
from certify_cli.training.derived import Derived


@torch.library.custom_op("curvcert::max_min", mutates_args=())
def _sorted_pairs(z: Tensor) -> Tensor:
    """`MaxMin` of z (batch, channels, *space): one operator, which a bound knows, where torch would write five."""
    return MaxMin().apply(z)


@_sorted_pairs.register_fake
def _(z: Tensor) -> Tensor:
    return torch.empty_like(z)


def _keep(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    first, second = inputs[0].chunk(2, dim=1)
    ctx.save_for_backward(first >= second)


def _backward(ctx: Any, gradient: Tensor) -> Tensor:
    (kept,) = ctx.saved_tensors
    larger, smaller = gradient.chunk(2, dim=1)
    return torch.cat([torch.where(kept, larger, smaller), torch.where(kept, smaller, larger)], dim=1)


_sorted_pairs.register_autograd(_backward, setup_context=_keep)


@lowers(torch.ops.curvcert.max_min.default)
def _max_min(context: LoweringContext, x: Any) -> Data:
    return context.add(MaxMin(), context.data(x))


class SortedPairs(nn.Module):
    """The halves of the channels as sorted pairs, the larger ones first."""

    def forward(self, z: Tensor) -> Tensor:
        if torch.onnx.is_in_onnx_export():
            return MaxMin().apply(z)
        result: Tensor = _sorted_pairs(z)
        return result


class ClippedMaxMin(Derived):
    """Sorted pairs whose larger ones are at most `high`, and whose smaller ones are at least `low`.

    learned: whether the two thresholds are parameters.
    """

    def __init__(self, low: float, high: float, learned: bool = True) -> None:
        super().__init__()
        self.sorted = SortedPairs()
        for name, value in (("low", low), ("high", high)):
            threshold = torch.tensor(value, dtype=torch.float32)
            if learned:
                self.register_parameter(name, nn.Parameter(threshold))
            else:
                self.register_buffer(name, threshold, persistent=False)

    def forward(self, z: Tensor) -> Tensor:
        low, high = self.get_threshold("low"), self.get_threshold("high")
        half, axes = (z.shape[1] // 2,), (-1, *[1] * (z.dim() - 2))
        level = torch.cat([high.expand(half), low.expand(half)]).reshape(axes)
        one = torch.ones(half, dtype=low.dtype, device=low.device)
        side = torch.cat([-one, one]).reshape(axes)
        # one ReLU for both halves, as the declared layer is lowered: two clips joined would double their norm
        return side * torch.relu(side * (self.sorted(z) - level)) + level

    def get_threshold(self, name: str) -> Tensor:
        """`low` or `high`."""
        threshold = getattr(self, name)
        assert isinstance(threshold, Tensor)  # what was registered
        return threshold

    def entry(self) -> dict[str, Any]:
        low, high = (float(self.get_threshold(name).detach()) for name in ("low", "high"))
        return {"type": "MaxMin", "low": low, "high": high}

    def written_out(self) -> nn.Module:
        entry = self.entry()
        return ClippedMaxMin(entry["low"], entry["high"], learned=False)
