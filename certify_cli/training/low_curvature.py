"""Layers of low-curvature networks (Srinivas, Matoba, Lakkaraju, Fleuret, LCNN, NeurIPS 2022), as torch modules.

    net = nn.Sequential(
        nn.Flatten(), spectral_norm(nn.Linear(784, 256)), LipschitzBatchNorm(256), CentredSoftplus(), nn.Linear(256, 10)
    )

Every factor of a network's curvature is learned or kept small: the curvature of the activations (beta / 4), the
weights' norms, and the Lipschitz constants of batch norms (gamma). They are parts of any module; `certify` takes them
for what they compute in evaluation mode, and `objectives.LowCurvature` finds their betas and gammas.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm, softplus
from torch.nn.utils import parametrizations

from certify_cli.errors import UsageError
from certify_cli.training.derived import Derived

BETA, GAMMA = 5.0, 10.0
"""Where training starts, as in the paper."""
LEAST_BETA = 1e-3
"""beta = exp(log_beta) + LEAST_BETA."""

Layer = TypeVar("Layer", nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class CentredSoftplus(Derived):
    """(softplus(beta z) - log 2) / beta, entrywise, the activation `centred_softplus`: 0 at 0, slopes in [0, 1].

    beta: the activation's, or where its learning starts; its curvature is at most beta / 4.   learned: one number for
        all entries, beta = exp(log_beta) + LEAST_BETA.
    """

    def __init__(self, beta: float = BETA, *, learned: bool = True) -> None:
        super().__init__()
        if not (math.isfinite(beta) and beta > (LEAST_BETA if learned else 0.0)):
            raise UsageError(
                f"beta = {beta} of a centred softplus is not a number above {LEAST_BETA if learned else 0:g}"
            )
        self._fixed = beta
        start = torch.tensor(math.log(beta - LEAST_BETA), dtype=torch.float32) if learned else None
        self.log_beta = None if start is None else nn.Parameter(start)

    @property
    def beta(self) -> Tensor | float:
        """The present beta: one number, with its gradient where it is learned."""
        return self._fixed if self.log_beta is None else self.log_beta.exp() + LEAST_BETA

    def forward(self, z: Tensor) -> Tensor:
        beta = self.beta
        return (softplus(beta * z) - math.log(2)) / beta

    def entry(self) -> dict[str, Any]:
        return {"type": "centred_softplus", "beta": self._number}

    def written_out(self) -> CentredSoftplus:
        return CentredSoftplus(self._number, learned=False)

    @property
    def _number(self) -> float:
        beta = self.beta
        return float(beta.detach()) if isinstance(beta, Tensor) else beta


class LipschitzBatchNorm(Derived):
    """Batch norm without gain and offset, times one number, so that its Lipschitz constant is at most gamma.

    BN(x) s min(1 / s, gamma) with s = min_c sqrt(running_var_c + eps). BN's own constant is 1 / s, from the statistics
    that evaluation uses; with the factor it is min(1 / s, gamma), at which the channel of least variance is scaled.
    The claim holds in evaluation mode alone: in training mode the batch's own statistics normalise.

    features: channels C of the values (batch, C, ...).   gamma: where the learned bound, exp(log_gamma), starts.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, features: int, *, gamma: float = GAMMA, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        if not (math.isfinite(gamma) and gamma > 0):
            raise UsageError(f"gamma = {gamma} of a Lipschitz batch norm is not a number above 0")
        self.features, self.eps, self.momentum = features, eps, momentum
        self.log_gamma = nn.Parameter(torch.tensor(math.log(gamma), dtype=torch.float32))
        self.register_buffer("running_mean", torch.zeros(features, dtype=torch.float32))
        self.register_buffer("running_var", torch.ones(features, dtype=torch.float32))

    @property
    def gamma(self) -> Tensor:
        """The present bound of the Lipschitz constant."""
        return self.log_gamma.exp()

    @property
    def factor(self) -> Tensor:
        """s min(1 / s, gamma), at most 1."""
        scale = (self.running_var.min() + self.eps).sqrt()
        return scale * torch.minimum(1 / scale, self.gamma)

    def forward(self, x: Tensor) -> Tensor:
        normal = batch_norm(x, self.running_mean, self.running_var, None, None, self.training, self.momentum, self.eps)
        return normal * self.factor

    def written_out(self) -> PlainBatchNorm:
        gain = self.factor.detach().expand(self.features).clone()
        return PlainBatchNorm(self.running_mean.clone(), self.running_var.clone(), gain, self.eps)


class PlainBatchNorm(nn.Module):
    """Batch norm in evaluation mode, for values of any number of axes, with the tensors of torch's layers.

    mean, variance, gain: (channels,).
    """

    def __init__(self, mean: Tensor, variance: Tensor, gain: Tensor, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight, self.bias = nn.Parameter(gain), nn.Parameter(torch.zeros_like(gain))
        self.register_buffer("running_mean", mean)
        self.register_buffer("running_var", variance)

    def forward(self, x: Tensor) -> Tensor:
        statistics = self.get_buffer("running_mean"), self.get_buffer("running_var")
        return batch_norm(x, *statistics, self.weight, self.bias, False, eps=self.eps)


def spectral_norm(layer: Layer) -> Layer:
    """The layer with its weight divided by an estimate of its spectral norm (torch's parametrisation, in place).

    The estimate u^T W v comes from below, by power iterations that go on in training mode, so that the norm is 1 or
    slightly more. Of a convolution torch normalises the kernel as a matrix (out, in kernel...), not the convolution,
    whose norm may be larger by up to the square root of the kernel's size. So this is no proof of a Lipschitz constant;
    `certify` bounds the weights that come out.
    """
    parametrizations.spectral_norm(layer)
    return layer


def betas(module: nn.Module) -> Iterator[Tensor]:
    """The learned betas of a module's parts."""
    for part in module.modules():
        if isinstance(part, CentredSoftplus) and isinstance(part.beta, Tensor):
            yield part.beta


def log_gammas(module: nn.Module) -> Iterator[Tensor]:
    """The logarithms of the learned Lipschitz bounds of a module's parts."""
    for part in module.modules():
        if isinstance(part, LipschitzBatchNorm):
            yield part.log_gamma


def copy_vectors(source: nn.Module, target: nn.Module) -> None:
    """Take over the vectors of spectral norms: their average over steps would have no norm of 1."""
    held = dict(source.named_buffers())
    for name, vector in target.named_buffers():
        if name.startswith("parametrizations.") or ".parametrizations." in name:
            vector.copy_(held[name])
