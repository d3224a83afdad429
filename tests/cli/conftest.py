"""`curvcert` in this process: exit code, stdout and stderr; and loading and certifying by a stand-in."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

import pytest

import certify_cli
from certify_cli.cli.app import main
from tests.cli import fake as fake_module


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str

    @property
    def last(self) -> str:
        """The last line of stderr."""
        return self.err.rstrip("\n").rpartition("\n")[2]


@pytest.fixture
def curvcert(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """Runs one command line in this process."""
    for name in ("NO_COLOR", "COLUMNS", "CURVCERT_DEBUG", "CURVCERT_DATA", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)

    def run(*words: str) -> Outcome:
        code = main([str(word) for word in words])
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading and certifying by `tests.cli.fake`."""
    for name, module in fake_module.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(vars(certify_cli), "load_model", fake_module.load_model)
    monkeypatch.setitem(vars(certify_cli), "load_data", fake_module.load_data)
