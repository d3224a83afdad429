"""Training for certificates: objectives for anyone's training loop, and the loop behind `curvcert train`.

    from certify_cli.training import CRT

    objective = CRT(model, input_shape=(1, 28, 28), radius=1.58, weight=0.02)
    loss = objective(x, y)

`CurvaturePenalty`, `CRT` and `LocalCurvature` are losses of a torch module. They differentiate the bounds that
`certify` proves, so that a network is trained on what it will be certified by (theory section 9). `LowCurvature` is the
loss of low-curvature networks, whose layers are `CentredSoftplus`, `LipschitzBatchNorm` and `spectral_norm`. Nothing
heavy is imported before one of these names is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from certify_cli.training.low_curvature import CentredSoftplus, LipschitzBatchNorm, spectral_norm
    from certify_cli.training.objectives import CRT, CurvaturePenalty, LocalCurvature, LowCurvature, Objective, Plain

__all__ = [
    "CRT",
    "CentredSoftplus",
    "CurvaturePenalty",
    "LipschitzBatchNorm",
    "LocalCurvature",
    "LowCurvature",
    "Objective",
    "Plain",
    "spectral_norm",
]

_LAYERS = ("CentredSoftplus", "LipschitzBatchNorm", "spectral_norm")


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'certify_cli.training' has no attribute {name!r}")
    room = "low_curvature" if name in _LAYERS else "objectives"
    return getattr(import_module(f"certify_cli.training.{room}"), name)
