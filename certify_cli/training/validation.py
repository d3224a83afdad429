"""Clean and certified accuracy of a model in training: what models are selected by, on samples kept for it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from certify_cli.bounds.global_bounds.curvature import why_no_curvature
from certify_cli.bounds.global_bounds.model_bounds import ModelBounds
from certify_cli.certificates.methods import METHODS, certify_batch
from certify_cli.efforts import FAST, NORMAL
from certify_cli.network.evaluate import exact_kernels
from certify_cli.network.evaluated import EvaluatedPoints
from certify_cli.network.graph import Network
from certify_cli.records import certifies

SELECTION = replace(FAST, name="selection", budget=NORMAL.budget, dual_steps=NORMAL.dual_steps)
"""Global bounds that are as sharp as those of an ordinary run, and no bound of curvature on a ball.

A model is trained towards its sharp bounds: by weaker ones a later, better model can look worse.
"""
SMOOTH, KINKED = ("curvature", "dual"), ("lipschitz", "linear", "local-lipschitz")
"""Methods by which models are compared, with and without curvature.

Each is tried on what those before it left. Of 100 images at 1.58, a small convolutional ReLU network that was trained
by local Lipschitz bounds certifies 37 by these, and 23 by either of the others at this effort.
"""
BATCH = 100
"""Samples that are certified together."""


@dataclass(frozen=True)
class Score:
    """Shares of the validation samples: predicted correctly, and of those that were certified, so at the radius."""

    accuracy: float
    certified: float

    @property
    def key(self) -> tuple[float, float]:
        """The larger, the better the model."""
        return self.certified, self.accuracy


def score(network: Network, x: Tensor, y: Tensor, radius: float, checked: int) -> Score:
    """The score on samples (N, ...), of which the first `checked` are certified."""
    with torch.no_grad():
        right = [network(part.double()).argmax(1) == labels for part, labels in _parts(x, y, 1000)]
    smooth = why_no_curvature(network) is None
    methods = tuple(METHODS[name] for name in (SMOOTH if smooth else KINKED))
    bounds = ModelBounds(network, SELECTION, expected=torch.arange(network.classes))
    certified = []
    for part, labels in _parts(x[:checked], y[:checked], BATCH):
        with exact_kernels():
            point = EvaluatedPoints(network, part.double())
            found = certify_batch(methods, bounds, point, attack=False, levels=(radius,))
        certified.append((point.prediction == labels) & certifies(found.radius, radius))
    return Score(float(torch.cat(right).double().mean()), float(torch.cat(certified).double().mean()))


def _parts(x: Tensor, y: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(x.split(size), y.split(size), strict=True))
