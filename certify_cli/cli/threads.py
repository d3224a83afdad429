"""How threads of torch wait for one another: asleep, so that a busy machine does not spend its cores on waiting."""

from __future__ import annotations

import os
import sys

POLICY = "OMP_WAIT_POLICY"
OTHERS = ("GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""Variables by which a user has decided already."""


def wait_asleep() -> None:
    """Let OpenMP's threads sleep while they wait, where the user has not decided and torch is not imported yet.

    The runtime reads the variable when it is loaded. By default threads spin for milliseconds at the end of every
    parallel loop; beside another busy process each spin takes away the time of one that has work.
    """
    if "torch" not in sys.modules and not any(name in os.environ for name in (POLICY, *OTHERS)):
        os.environ[POLICY] = "passive"
