"""`curvcert check`, and settings from files and the environment."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.cli.conftest import Outcome
from tests.schema import conforms

Curvcert = Callable[..., Outcome]
pytestmark = pytest.mark.usefixtures("fake")
# the stand-in's samples: class 0, radius 0.123456789, an attack at 1.0000123
MET = 'data = "6"\n[policy]\naccuracy = 1\ncertified_accuracy = { "0.1" = 0.9 }\n'
NOT_MET = 'data = "6"\n[policy]\naccuracy = 1\ncertified_accuracy = { "0.2" = 0.5, "0.1" = 0.5 }\n'


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in list(os.environ):
        if name.startswith(("CURVCERT_", "GITHUB_")):
            monkeypatch.delenv(name)
    return tmp_path


def written(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.mark.smoke
def test_a_policy_that_is_met(curvcert: Curvcert, here: Path) -> None:
    done = curvcert("check", "two.onnx", "--policy", written(here / "ci.toml", MET))
    assert done.code == 0
    assert "policy met" in done.out
    assert "settings from" in done.err


@pytest.mark.smoke
def test_one_that_is_not_names_figure_and_samples(curvcert: Curvcert, here: Path) -> None:
    written(here / "curvcert.toml", NOT_MET)
    done = curvcert("check", "two.onnx", "--exact", "--format", "json")
    assert conforms(done.out, "check")
    found = json.loads(done.out)["check"]
    assert (done.code, found["met"]) == (1, False)
    rows = {(r["figure"], r["eps"]): r for r in found["requirements"]}
    assert [r["met"] for r in rows.values()] == [True, False, True]
    assert rows["certified_accuracy", "0.2"]["samples"] == [0, 1, 2, 3, 4, 5]
    assert rows["certified_accuracy", "0.2"]["found"] == 0.0
    table = curvcert("check", "two.onnx", "--exact").out
    assert "not met: 2 of 3 requirements hold" in table
    assert "certified accuracy at 0.2" in table


def test_it_stops_when_the_verdict_is_certain(curvcert: Curvcert, here: Path) -> None:
    """Batches are of two: after four of six samples the half asked for can no longer be had."""
    written(here / "curvcert.toml", NOT_MET)
    early = json.loads(curvcert("check", "two.onnx", "--format", "json").out)["check"]
    assert (early["samples"], early["certified_samples"], early["met"]) == (6, 4, False)
    found = next(r for r in early["requirements"] if r["eps"] == "0.2")
    assert (found["found"], found["found_at_least"]) == (None, 0.0)
    assert found["found_at_most"] == pytest.approx(2 / 6)
    assert "certain after 4 of 6 samples" in curvcert("check", "two.onnx").out


def test_a_baseline(curvcert: Curvcert, here: Path) -> None:
    old = here / "old.json"
    assert curvcert("certify", "two.onnx", "--data", "6", "--eps", "0.1", "-o", str(old)).code == 0
    written(here / "curvcert.toml", 'data = "6"\n[policy]\nbaseline = "old.json"\n')
    assert curvcert("check", "two.onnx").code == 0
    document = json.loads(old.read_text())
    document["summary"]["mean_certified_radius"] *= 1.02
    old.write_text(json.dumps(document))
    done = curvcert("check", "two.onnx")
    assert done.code == 1
    assert "old.json: 0.1259" in done.out
    document["run"]["data"]["sha256"] = "0" * 64
    old.write_text(json.dumps(document))
    done = curvcert("check", "two.onnx")
    assert done.code == 3
    assert "not about the same samples" in done.last


def test_every_format_of_ci(curvcert: Curvcert, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(here / "curvcert.toml", NOT_MET)
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(here / "summary.md"))
    outputs = {}
    for form in ("junit", "sarif", "github", "markdown"):
        done = curvcert("check", "two.onnx", "--exact", "--format", form)
        assert done.code == 1
        outputs[form] = done.out
    suites = ElementTree.fromstring(outputs["junit"].partition("\n")[2])
    assert sum(int(suite.get("failures", "")) for suite in suites) == 1
    results = json.loads(outputs["sarif"])["runs"][0]["results"]
    assert [r["ruleId"] for r in results] == ["certified-accuracy-at-0.2"]
    assert "::error file=two.onnx,title=certified accuracy at 0.2::" in outputs["github"]
    assert (here / "summary.md").read_text() == outputs["markdown"]
    assert re.search(r"\| certified accuracy at 0.2 +\| +at least 0.5 \|", outputs["markdown"])
    target = here / "report.xml"
    assert curvcert("check", "two.onnx", "--exact", "-o", str(target)).code == 1
    assert target.read_text() == outputs["junit"]


def test_flag_before_environment_before_file(curvcert: Curvcert, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(here / "curvcert.toml", 'data = "3"\neffort = "max"\neps = ["0.1", "1/5"]\nbatch-size = 2\n')

    def arguments(*words: str) -> dict[str, object]:
        done = curvcert("certify", "two.onnx", "--format", "json", *words)
        assert done.code == 0, done.err
        found: dict[str, object] = json.loads(done.out)["run"]["arguments"]
        return found

    assert {k: arguments()[k] for k in ("data", "effort", "eps", "batch_size", "method")} == {
        "data": "3",
        "effort": "max",
        "eps": ["0.1", "1/5"],
        "batch_size": "2",
        "method": "auto",
    }
    monkeypatch.setenv("CURVCERT_EFFORT", "fast")
    monkeypatch.setenv("CURVCERT_EPS", "0.3 0.4")
    assert arguments()["effort"] == "fast"
    assert arguments()["eps"] == ["0.3", "0.4"]
    assert arguments("--effort", "normal")["effort"] == "normal"
    assert arguments("--data", "2")["data"] == "2"
    monkeypatch.setenv("CURVCERT_DATA", str(here))  # the root, not the source
    assert arguments()["data"] == "3"
    assert arguments()["data_root"] == str(here)


def test_settings_in_pyproject(curvcert: Curvcert, here: Path) -> None:
    written(
        here / "pyproject.toml",
        '[project]\nname = "x"\n[tool.curvcert]\ndata = "2"\n[tool.curvcert.policy]\naccuracy = 1\n',
    )
    done = curvcert("check", "two.onnx")
    assert (done.code, "settings from pyproject.toml" in done.err) == (0, True)
    written(here / "curvcert.toml", 'data = "wrong:2"\n[policy]\naccuracy = 0.5\n')  # goes before
    assert curvcert("check", "two.onnx").code == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("metod = 'auto'", ["curvcert.toml: metod is not known", "method"]),
        ("model = 'x.onnx'", ["model is not known"]),
        ("quiet = true", ["quiet is not known"]),
        ("method = ['auto']", ["method = ['auto'] is not a text or number"]),
        ("shuffle = 'yes'", ["shuffle = 'yes' is not true or false"]),
        ("eps = [true]", ["eps", "list of texts or numbers"]),
        ("policy = 3", ["policy is a table"]),
        ("method = ", ["is not TOML"]),
        ("[policy]\nacuracy = 1", ["policy.acuracy is not known"]),
        ("effort = 'much'\n[policy]\naccuracy = 1", ["--effort 'much' is not one of"]),
        ("batch-size = 0\n[policy]\naccuracy = 1", ["--batch-size '0'"]),
    ],
)
def test_a_mistake_in_the_file_is_named(curvcert: Curvcert, here: Path, text: str, words: list[str]) -> None:
    written(here / "curvcert.toml", text)
    done = curvcert("check", "two.onnx", "--data", "2")
    assert (done.code, done.out) == (2, "")
    for word in words:
        assert word in done.last


def test_what_is_missing_is_said(curvcert: Curvcert, here: Path) -> None:
    assert "--policy FILE" in curvcert("check", "two.onnx", "--data", "2").last
    assert "cannot be read" in curvcert("check", "two.onnx", "--data", "2", "--policy", "none.toml").last
    written(here / "curvcert.toml", "seed = 1")
    assert "has no table [policy]" in curvcert("check", "two.onnx", "--data", "2").last
    written(here / "pyproject.toml", "[project]\nname = 'x'")
    assert "[tool.curvcert]" in curvcert("check", "two.onnx", "--data", "2", "--policy", "pyproject.toml").last
    written(here / "curvcert.toml", "[policy]\naccuracy = 1")
    assert "missing option '--data'" in curvcert("check", "two.onnx").last
    assert "no labels" in curvcert("check", "two.onnx", "--data", "unlabelled:3").last


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        ("accuracy = 95", ["policy.accuracy = 95", "0.95"]),
        ('certified_accuracy = { "0.1" = 90 }', ["policy.certified_accuracy.0.1 = 90", "share"]),
        ("certified_accuracy = { 0.1 = 0.9 }", ["quotes around the radius"]),
        ("baseline = 'old.json'\nfall = 5", ["policy.fall = 5", "one percent is 0.01"]),
        ("baseline = 'old.json'\nfall = { largest_lipschitz = 0.1 }", ["no figure of a baseline"]),
    ],
)
def test_a_gate_that_would_stand_open_is_refused(curvcert: Curvcert, here: Path, policy: str, words: list[str]) -> None:
    written(here / "curvcert.toml", f'data = "6"\n[policy]\n{policy}\n')
    done = curvcert("check", "two.onnx")
    assert (done.code, done.out) == (2, "")
    for word in words:
        assert word in done.last


@pytest.mark.parametrize("figure", ["certified_accuracy", "attack_accuracy", "largest_unknown"])
def test_without_labels_nothing_is_correct(curvcert: Curvcert, here: Path, figure: str) -> None:
    written(here / "curvcert.toml", f'data = "unlabelled:6"\n[policy]\n{figure} = {{ "0.1" = 0.0 }}\n')
    done = curvcert("check", "two.onnx", "--exact")
    assert (done.code, "no labels" in done.last) == (2, True)


def test_no_attack_is_not_robustness(curvcert: Curvcert, here: Path) -> None:
    written(here / "curvcert.toml", 'data = "6"\nattack = "none"\n[policy]\nattack_accuracy = { "3" = 1 }\n')
    assert "--attack none" in curvcert("check", "two.onnx").last


def test_a_baseline_of_another_kind_is_said(curvcert: Curvcert, here: Path) -> None:
    old = here / "old.json"
    assert curvcert("certify", "two.onnx", "--data", "6", "--effort", "fast", "-o", str(old)).code == 0
    written(here / "curvcert.toml", 'data = "6"\n[policy]\nbaseline = "old.json"\n')
    assert "--effort fast there, normal here" in curvcert("check", "two.onnx").err
    again = here / "again.json"
    assert curvcert("certify", "two.onnx", "--data", "6", "-o", str(again)).code == 0
    assert "--effort fast there, normal here" in curvcert("diff", str(old), str(again)).err


def test_a_reader_that_goes_away_changes_no_verdict(here: Path) -> None:
    written(here / "curvcert.toml", NOT_MET)
    code = (
        "import os, sys; from tests.cli import fake; fake.install(); from certify_cli.cli.app import main; "
        "read, write = os.pipe(); os.close(read); os.dup2(write, 1); "
        "sys.exit(main(['check', 'two.onnx', '--exact', '-q']))"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], check=False, env=os.environ | {"PYTHONPATH": str(root)})
    assert done.returncode == 1


def test_what_is_certain_at_once_needs_no_sample(curvcert: Curvcert, here: Path) -> None:
    """And no batch is begun after the verdict: the stand-in would take a second for every sample."""
    written(here / "curvcert.toml", 'data = "slow:600"\n[policy]\nlargest_lipschitz = 1\n')
    done = curvcert("check", "two.onnx")
    assert done.code == 1
    assert "certain after 0 of 600" in done.out


def test_no_variable_asks_for_help(curvcert: Curvcert, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(here / "curvcert.toml", NOT_MET)
    monkeypatch.setenv("CURVCERT_HELP", "1")
    assert curvcert("check", "two.onnx").code == 1


def test_shares_are_shown_as_they_are(curvcert: Curvcert, here: Path) -> None:
    """0.7 is no float64: rounded down it would be shown below what is asked."""
    written(here / "curvcert.toml", 'data = "wrong:10"\n[policy]\nlargest_unknown = { "0.1" = 0.7 }\naccuracy = 0.7\n')
    text = curvcert("check", "two.onnx", "--exact").out
    assert "at least 0.7" in text
    assert re.search(r"at least 0\.7 +0 +not met", text)


@pytest.mark.parametrize("table", ["curvcert = 3", "curvcert = []"])
def test_a_project_table_that_is_none(curvcert: Curvcert, here: Path, table: str) -> None:
    written(here / "pyproject.toml", f"[tool]\n{table}\n")
    done = curvcert("check", "two.onnx", "--data", "3")
    assert (done.code, "tool.curvcert is a table" in done.last) == (2, True)


def test_a_variable_with_a_typo_is_said(curvcert: Curvcert, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CURVCERT_METOD", "local")
    done = curvcert("certify", "two.onnx", "--data", "2")
    assert done.code == 0
    assert "CURVCERT_METOD" in done.err
    assert curvcert("certify", "two.onnx", "--data", "2", "--quiet").err == ""


def test_help_needs_no_settings_and_no_torch(here: Path) -> None:
    """Not even a broken file stops it; completion reads none either."""
    written(here / "curvcert.toml", "method = ")
    code = (
        "import sys; from certify_cli.cli.app import main; c = main(['check', '--help']); "
        "assert 'torch' not in sys.modules; sys.exit(c)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, "--policy FILE" in done.stdout) == (0, True)
