"""How threads of torch wait for one another: soon asleep, so that waiting does not take a busy machine's cores."""

from __future__ import annotations

import os
import sys

SPINS, COUNT = "GOMP_SPINCOUNT", "3000"
"""How often a waiting thread looks before it sleeps; the runtime's own figure is 300,000. On two idle cores 3,000 cost
some 1 % and no spins at all 12 to 56 %; beside a busy process 3,000 took a third of the time of 300,000 (two models;
`benchmarks/threads.py` measures it)."""
OTHERS = ("OMP_WAIT_POLICY", "KMP_BLOCKTIME")
"""Variables by which a user has decided already."""


def wait_asleep() -> None:
    """Let OpenMP's threads sleep soon when they wait, where the user has not decided and torch is not imported yet.

    The runtime reads the variable when it is loaded. By default threads spin for milliseconds at the end of every
    parallel loop; beside another busy process each spin takes away the time of one that has work.
    """
    if "torch" not in sys.modules and not any(name in os.environ for name in (SPINS, *OTHERS)):
        os.environ[SPINS] = COUNT
