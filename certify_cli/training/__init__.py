"""Training for certificates: objectives for anyone's training loop, and the loop behind `curvcert train`.

`CurvaturePenalty`, `CRT` and `LocalCurvature` are losses of a torch module. They differentiate the bounds that
`certify` proves, so that a network is trained on what it will be certified by (theory section 9).
"""

from __future__ import annotations

from certify_cli.training.objectives import CRT, CurvaturePenalty, LocalCurvature, Objective, Plain

__all__ = ["CRT", "CurvaturePenalty", "LocalCurvature", "Objective", "Plain"]
