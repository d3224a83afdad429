"""The exit codes that are not an error's own (`certify_cli.errors`), and those of a stopped process."""

from __future__ import annotations

DONE = 0
NOT_MET = 1
"""The command worked, and its answer is no: a policy not met, a regression, a contradiction, a faulty installation."""
USAGE = 2
INTERNAL = 4
SIGNALLED = 128
"""To which the number of the signal that stopped the process is added."""
