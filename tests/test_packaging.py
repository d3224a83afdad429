"""The wheel: built, installed by itself, and complete."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from certify_cli.version import __version__

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout, installed alone into a folder."""
    work = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", str(work), str(ROOT)], check=True)
    (wheel,) = work.glob("curvcert-*.whl")
    assert wheel.name == f"curvcert-{__version__}-py3-none-any.whl"
    subprocess.run([*pip, "install", "--no-deps", "--target", str(work / "site"), str(wheel)], check=True)
    return work / "site"


def test_the_wheel_runs_and_knows_its_version(installed: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "certify_cli", "--version"],
        capture_output=True, text=True, check=True, cwd=installed, env={"PYTHONPATH": str(installed), "PATH": ""},
    )  # fmt: skip
    assert __version__ in done.stdout


def test_the_wheel_holds_types_schema_and_licence_and_no_tests(installed: Path) -> None:
    assert (installed / "certify_cli" / "py.typed").is_file()
    schema = json.loads((installed / "certify_cli" / "schema" / "curvcert-1.json").read_text())
    assert schema["$schema"].endswith("2020-12/schema")
    (info,) = installed.glob("curvcert-*.dist-info")
    assert "Apache License" in next(info.rglob("LICENSE")).read_text()
    assert not (installed / "tests").exists()


def test_one_version_source() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["dynamic"] == ["version"]
    assert (
        f"[{__version__}]" in (ROOT / "CHANGELOG.md").read_text() or "Unreleased" in (ROOT / "CHANGELOG.md").read_text()
    )
