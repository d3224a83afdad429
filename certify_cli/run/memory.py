"""How much memory a run may take, and what it leaves out for it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from certify_cli.certificates.footprints import WITH_JACOBIANS, needed
from certify_cli.certificates.local import footprint
from certify_cli.certificates.methods import Method
from certify_cli.errors import UsageError
from certify_cli.network.graph import Network
from certify_cli.plain import binary_size

SHARE = 2
"""A run takes at most one part in so many of the memory that is free."""
LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current")
"""Of a container: what it may take, and what it has taken."""


def allowed(device: torch.device, requested: int | None, most: int) -> int:
    """Bytes as requested; else half of a GPU's free memory, or on a CPU half of what is free, but at most `most`."""
    if requested is not None:
        return requested
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0]) // SHARE
    free = available()
    return most if free is None else min(most, free // SHARE)


def available() -> int | None:
    """Bytes of main memory that a process may still take without swapping; None where the system does not say."""
    found = []
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
        if "MemAvailable" in lines:
            found.append(int(lines["MemAvailable"].split()[0]) * 1024)
    elif "SC_PHYS_PAGES" in os.sysconf_names:  # not what is free, but what there is
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    limit, taken = (Path(name).read_text().strip() if Path(name).is_file() else "max" for name in LIMITS)
    if limit.isdecimal() and taken.isdecimal():
        found.append(max(0, int(limit) - int(taken)))
    return min(found) if found else None


def within_memory(
    methods: Sequence[Method], network: Network, memory: int, asked: str
) -> tuple[tuple[Method, ...], tuple[str, ...]]:
    """The methods that fit the memory, in order, and a note for everything that is left out.

    asked: the method asked for. Raises UsageError where it is a single one and does not fit, or none does.
    """
    kept: list[Method] = []
    notes = []
    for method in methods:
        names = method.name.split("+")
        too_large = [name for name in names if needed(name, network) > memory]
        if too_large:
            size, room = binary_size(needed(too_large[0], network)), binary_size(memory)
            if method.name == asked:
                raise UsageError(
                    f"--memory {room} is too little for --method {asked}: one sample of this model takes about {size}; "
                    "allow more, or use --method auto, which leaves out what does not fit"
                )
            if not kept and method is methods[-1]:
                smallest = binary_size(min(needed(name, network) for m in methods for name in m.name.split("+")))
                raise UsageError(
                    f"--memory {room} is too little for any method: it takes {smallest} at least; allow more"
                )
            notes.append(f"{' and '.join(names)} left out: one sample takes about {size}, more than the {room} allowed")
            continue
        kept.append(method)
        notes += [
            f"{name} without Jacobians: one sample's take about {binary_size(footprint(network))}, more than the "
            f"{binary_size(memory)} allowed; {WITH_JACOBIANS[name]}"
            for name in names
            if name in WITH_JACOBIANS and footprint(network) > memory
        ]
    return tuple(kept), tuple(notes)
