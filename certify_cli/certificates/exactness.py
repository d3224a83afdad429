"""Samples whose certified radius an attack all but reaches: no method can certify more, so none is asked.

On networks of low curvature the dual is exact for most samples: its own end points lead to an example at the certified
distance. The search for it takes a few passes, a search of balls thousands.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from certify_cli.attacks.ddn import nearest_attacks
from certify_cli.certificates.certificates import Certificates
from certify_cli.efforts import Effort
from certify_cli.network.evaluated import EvaluatedPoints

STEPS = 8
"""Gradient steps of the search, which begins where the certificate is weakest."""
NEAR = 1e-3
"""What lies nearer to an attack than this part of its distance counts as exact: the accuracy of a search of balls."""


def nearly_exact(point: EvaluatedPoints, found: Certificates, effort: Effort) -> Tensor:
    """Mask (batch,): samples with an adversarial example at hardly more than their certified radius.

    Nothing is claimed from it: it only decides whether further methods are worth while.
    """
    quick = replace(effort, attack_steps=STEPS, attack_rivals=0)
    _, distance = nearest_attacks(point, found.near, found.radius, quick)
    distance = torch.fmin(distance, found.attack)
    return found.radius >= (1 - NEAR) * distance
