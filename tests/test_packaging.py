"""The wheel: built, installed by itself, and complete; and the files that other people's programs read.

These are the workflow, the action, the hooks, the issue forms, the citation and the README's picture.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
import yaml

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


HOME = "https://github.com/curvcert/curvcert"
YAML = [".github/workflows/ci.yml", "action.yml", ".pre-commit-config.yaml", ".pre-commit-hooks.yaml", "CITATION.cff"]
FORMS = sorted(path.name for path in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml") if path.name != "config.yml")


def read_yaml(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", YAML)
def test_yaml_is_read(name: str) -> None:
    assert read_yaml(name)


def test_one_home() -> None:
    """Every file that names the project's repository names the same one."""
    files = [ROOT / name for name in (*YAML, "pyproject.toml", "SECURITY.md", "certify_cli/output/sarif.py")]
    files += [*(ROOT / "docs").glob("*.md"), *(ROOT / ".github/ISSUE_TEMPLATE").iterdir()]
    found = [link for file in files for link in re.findall(r"https?://[^\s\"')]*/curvcert\b", file.read_text("utf-8"))]
    assert len(found) > 5
    assert set(found) == {HOME}
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]
    assert all(url.startswith(HOME) for url in urls.values())


def test_the_workflow_runs_the_gate_on_every_python_from_the_oldest() -> None:
    gate = read_yaml(".github/workflows/ci.yml")["jobs"]["gate"]
    oldest = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"].removeprefix(">=")
    assert gate["strategy"]["matrix"]["python"][0] == oldest
    (step,) = [step for step in gate["steps"] if step.get("run") == ".ci/run"]
    assert step["env"] == {"PYTHON": "python"}
    assert os.access(ROOT / ".ci/run", os.X_OK)


@pytest.mark.parametrize("name", FORMS)
def test_issue_forms_have_what_github_needs(name: str) -> None:
    form = read_yaml(f".github/ISSUE_TEMPLATE/{name}")
    assert {"name", "description", "body"} <= form.keys()
    asked = [item for item in form["body"] if item["type"] != "markdown"]
    assert len({item["id"] for item in asked}) == len(asked) >= 2
    assert all(item["attributes"]["label"] for item in asked)


def test_the_citation_has_the_version_and_licence_of_the_package() -> None:
    citation = read_yaml("CITATION.cff")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert citation["cff-version"] == "1.2.0"
    assert (citation["version"], citation["license"]) == (__version__, project["license"])
    assert citation["authors"]
    assert citation["message"]


def act(tmp_path: Path, **inputs: str) -> subprocess.CompletedProcess[str]:
    """The action's last step, as a runner executes it, on a shipped model."""
    action = read_yaml("action.yml")
    step = action["runs"]["steps"][-1]
    values = {name: given.get("default", "") for name, given in action["inputs"].items()} | inputs
    assert inputs.keys() <= action["inputs"].keys()
    assert "${{" not in step["run"]
    environment = {
        name: values[re.fullmatch(r"\$\{\{ inputs\.(.*) \}\}", text)[1]] for name, text in step["env"].items()
    }
    (tmp_path / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (tmp_path / "python").chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]],
        capture_output=True, text=True, check=False, cwd=tmp_path,
        env=os.environ | environment | {"PATH": path, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def test_the_action_annotates_and_fails_where_the_policy_is_not_met(tmp_path: Path) -> None:
    (tmp_path / "my policy.toml").write_text('[policy]\naccuracy = 0.9\ncertified_accuracy = { "0.3" = 0.9 }\n')
    done = act(
        tmp_path,
        model=str(ROOT / "models/digits_mlp.onnx"),
        policy="my policy.toml",
        data="digits",
        args="--samples 20\n--method curvature",
    )
    assert done.returncode == 1, done.stderr
    assert "::error" in done.stdout
    assert "20 samples" in done.stdout


def test_the_action_writes_sarif(tmp_path: Path) -> None:
    (tmp_path / "curvcert.toml").write_text(
        'data = "digits"\nsamples = 20\nmethod = "curvature"\n[policy]\naccuracy = 0.9\n'
    )
    done = act(tmp_path, model=str(ROOT / "models/digits_mlp.onnx"), sarif="curvcert.sarif")
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert json.loads((tmp_path / "curvcert.sarif").read_text())["version"] == "2.1.0"


@pytest.mark.parametrize("name", ["certified-light.svg", "certified-dark.svg"])
def test_the_picture_is_small_and_in_the_readme(name: str) -> None:
    file = ROOT / "docs" / name
    assert ET.parse(file).getroot().tag == "{http://www.w3.org/2000/svg}svg"
    assert file.stat().st_size < 60_000
    assert f'"docs/{name}"' in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "models/README.md"])
def test_links_lead_somewhere(name: str) -> None:
    """As those of the README and of the pages in docs/ do (tests/cli/test_docs.py)."""
    page = ROOT / name
    for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
        assert "://" in link or (page.parent / link).exists(), link
