"""Training for certificates: objectives for anyone's training loop, and the loop behind `curvcert train`.

    from certify_cli.training import CRT

    objective = CRT(model, input_shape=(1, 28, 28), radius=1.58, weight=0.02)
    loss = objective(x, y)

`CurvaturePenalty`, `CRT`, `LocalCurvature` and `LocalLipschitz` are losses of a torch module. They differentiate the
bounds that `certify` proves, so that a network is trained on what it will be certified by (theory section 9).
`SortedPairs`, `ClippedReLU` and `ClippedMaxMin` are layers for the last of them. `LowCurvature` is the loss of
low-curvature networks, whose layers are `CentredSoftplus`, `LipschitzBatchNorm` and `spectral_norm`. Nothing heavy is
imported before one of these names is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from certify_cli.training.clipped_relu import ClippedReLU
    from certify_cli.training.local_lipschitz import LocalLipschitz
    from certify_cli.training.low_curvature import CentredSoftplus, LipschitzBatchNorm, spectral_norm
    from certify_cli.training.max_min import ClippedMaxMin, SortedPairs
    from certify_cli.training.objectives import CRT, CurvaturePenalty, LocalCurvature, LowCurvature, Objective, Plain

__all__ = [
    "CRT",
    "CentredSoftplus",
    "ClippedMaxMin",
    "ClippedReLU",
    "CurvaturePenalty",
    "LipschitzBatchNorm",
    "LocalCurvature",
    "LocalLipschitz",
    "LowCurvature",
    "Objective",
    "Plain",
    "SortedPairs",
    "spectral_norm",
]

_ROOMS = {
    "CentredSoftplus": "low_curvature",
    "ClippedMaxMin": "max_min",
    "ClippedReLU": "clipped_relu",
    "LipschitzBatchNorm": "low_curvature",
    "LocalLipschitz": "local_lipschitz",
    "SortedPairs": "max_min",
    "spectral_norm": "low_curvature",
}
"""Where names are that are not in `objectives`."""


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'certify_cli.training' has no attribute {name!r}")
    return getattr(import_module(f"certify_cli.training.{_ROOMS.get(name, 'objectives')}"), name)
