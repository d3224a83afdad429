"""Shared ground of the tests: the same examples every time, and where the large files are, if they are there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

settings.register_profile("steady", derandomize=True, deadline=None)
settings.load_profile("steady")

if "PYTEST_XDIST_WORKER" in os.environ:  # one of several processes, and so are the programs that it starts
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
THREADS = torch.get_num_threads()

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(autouse=True)
def _steady() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(THREADS)  # a run with --threads sets them for its process


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of models and data that are not part of the project; tests that need it skip without it."""
    if not SHARED.is_dir():
        pytest.skip("needs the folder shared/ beside the checkout, with models and data that are not shipped")
    return SHARED
