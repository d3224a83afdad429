"""`curvcert diff`: two runs against each other, on files as certify writes them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.cli.conftest import Outcome
from tests.records import sample, save_records
from tests.schema import conforms

Curvcert = Callable[..., Outcome]
OLD = [sample(0, radius=0.30), sample(1, radius=0.20), sample(2, radius=0.10), sample(3, label=1, radius=0.25)]
WEAKER = [replace(s, certified_radius=(s.certified_radius or 0) * f) for s, f in zip(OLD, (1, 0.4, 1, 2), strict=True)]


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_a_weaker_model_is_named_with_the_samples_that_lose(curvcert: Curvcert, tmp_path: Path, suffix: str) -> None:
    old, new = save_records(tmp_path / f"old.{suffix}", OLD), save_records(tmp_path / f"new.{suffix}", WEAKER)
    done = curvcert("diff", old, new, "--format", "json")
    assert conforms(done.out, "diff")
    found = json.loads(done.out)["diff"]
    assert (done.code, found["regressed"], found["samples"]) == (1, True, 4)
    assert {f["name"] for f in found["figures"] if f["regressed"]} == {
        "certified accuracy at 0.15",  # 2 of 4 -> 1 of 4
        "mean certified radius",
        "median certified radius",
        "mean certified radius, correct samples",
    }
    changed = found["changed"]
    assert [s["index"] for s in changed] == [1, 3]  # the worst first
    assert changed[0]["change"] == pytest.approx(-0.12)
    assert (changed[0]["lost"], changed[1]["lost"], changed[1]["gained"]) == (["0.15"], [], [])  # 3 is misclassified
    assert (found["lower"], found["higher"], found["predictions_changed"]) == (1, 1, 0)


def test_the_same_run_and_a_better_one_pass(curvcert: Curvcert, tmp_path: Path) -> None:
    old, new = save_records(tmp_path / "old.json", OLD), save_records(tmp_path / "new.json", WEAKER)
    assert curvcert("diff", old, old).code == 0
    assert curvcert("diff", new, old).code == 0


def test_how_far_a_figure_may_fall(curvcert: Curvcert, tmp_path: Path) -> None:
    """Radii by a part of themselves, accuracies by points: a quarter of four samples, exactly, is within 0.25."""
    old = save_records(tmp_path / "old.json", OLD)
    new = save_records(
        tmp_path / "new.json", [replace(s, certified_radius=(s.certified_radius or 0) * 0.9) for s in OLD]
    )
    assert curvcert("diff", old, new, "--tolerance", "0.11").code == 0
    assert curvcert("diff", old, new, "--tolerance", "0.09").code == 1
    lost = save_records(tmp_path / "lost.json", [OLD[0], replace(OLD[1], prediction=2, correct=False), *OLD[2:]])
    for tolerance, fell in (("0.25", False), ("0.24", True)):
        found = json.loads(curvcert("diff", old, lost, "--tolerance", tolerance, "--format", "json").out)
        assert {f["name"]: f["regressed"] for f in found["diff"]["figures"]}["accuracy"] is fell


def test_markdown_and_table_say_the_same(curvcert: Curvcert, tmp_path: Path) -> None:
    old, new = save_records(tmp_path / "old.json", OLD), save_records(tmp_path / "new.json", WEAKER)
    table = curvcert("diff", old, new)
    target = tmp_path / "diff.md"
    assert curvcert("diff", old, new, "-o", str(target)).code == 1
    text = target.read_text()
    for words in ("Regressed beyond 0.01: certified accuracy at 0.15", "-0.1200", "0.0800"):
        assert words in table.out
        assert words in text
    for part in text.split("\n\n"):
        rows = [line.replace("\\|", "") for line in part.splitlines() if line.startswith("|")]
        assert len({row.count("|") for row in rows}) <= 1


def test_a_class_that_changed_and_a_radius_that_went(curvcert: Curvcert, tmp_path: Path) -> None:
    new = [replace(OLD[0], prediction=2, correct=False), sample(1, radius=None), *OLD[2:]]
    done = curvcert(
        "diff", save_records(tmp_path / "old.json", OLD), save_records(tmp_path / "new.json", new), "--format", "json"
    )
    changed = {s["index"]: s for s in json.loads(done.out)["diff"]["changed"]}
    assert (changed[0]["old_prediction"], changed[0]["new_prediction"], changed[0]["lost"]) == (0, 2, ["0.15"])
    assert (changed[1]["new_radius"], changed[1]["lost"]) == (0.0, ["0.15"])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "cannot be read"),
        ("", "its schema is None"),
        ("not json\n", "line 1: is no record"),
        ('{"type": "run", "schema": "curvcert/9"}\n', "its schema is 'curvcert/9'"),
        ('{"type": "run", "schema": "curvcert/1"}\n', "the run is not finished"),
        ('{"type": "run", "schema": "curvcert/1"}\n{"type": "summary"}\n', "not as curvcert writes it"),
        ("[1, 2]\n", "line 1: is no record"),
        ("\xff", "line 1: is no record"),
    ],
)
def test_what_is_no_run_is_refused_by_name(curvcert: Curvcert, tmp_path: Path, text: str | None, words: str) -> None:
    path = tmp_path / "broken.jsonl"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    done = curvcert("diff", save_records(tmp_path / "old.json", OLD), str(path))
    assert done.code == 3
    assert "broken.jsonl" in done.err.splitlines()[-1]
    assert words in done.err.splitlines()[-1]


def test_other_data_is_an_error_and_no_verdict(curvcert: Curvcert, tmp_path: Path) -> None:
    old = save_records(tmp_path / "old.json", OLD)
    for other in (
        save_records(tmp_path / "a.json", OLD, sha256="ef" * 32),
        save_records(tmp_path / "b.json", OLD[:3], sha256="12" * 32),
    ):
        done = curvcert("diff", old, other)
        assert (done.code, done.out) == (3, "")
        assert "not about the same samples" in done.err
    done = curvcert("diff", old, save_records(tmp_path / "c.json", OLD[:3]))
    assert (done.code, done.out) == (3, "")
    assert "do not have the same samples" in done.last
    assert curvcert("diff", old, old, "--tolerance", "2").code == 2


@pytest.mark.parametrize(
    ("part", "field", "value"),
    [
        ("samples", "certified_radius", "abc"),
        ("samples", "index", True),
        ("summary", "accuracy", "x"),
        ("summary", "certified_accuracy", [1]),
        ("run", "notes", None),
        ("run", "classes", [1]),
        ("run", "arguments", None),
    ],
)
def test_values_of_another_kind_are_refused(
    curvcert: Curvcert, tmp_path: Path, part: str, field: str, value: object
) -> None:
    path = save_records(tmp_path / "old.json", OLD)
    document = json.loads(Path(path).read_text())
    (document[part][0] if part == "samples" else document[part])[field] = value
    Path(path).write_text(json.dumps(document))
    done = curvcert("diff", path, path)
    assert done.code == 3
    assert "old.json" in done.last


def test_a_figure_that_is_gone_has_fallen(curvcert: Curvcert, tmp_path: Path) -> None:
    old, new = save_records(tmp_path / "old.json", OLD), save_records(tmp_path / "new.json", OLD, eps=())
    done = curvcert("diff", old, new)
    assert (done.code, "certified accuracy at 0.15" in done.out) == (1, True)
    assert curvcert("diff", new, old).code == 0


def test_two_states_of_one_file_are_told_apart(curvcert: Curvcert, tmp_path: Path) -> None:
    old, new = save_records(tmp_path / "old.json", OLD), save_records(tmp_path / "new.json", OLD)
    path = Path(new)
    path.write_text(path.read_text().replace("ab" * 32, "12" * 32))
    found = json.loads(curvcert("diff", old, new, "--format", "json").out)["diff"]
    assert (found["old"], found["new"]) == ("two.onnx (abababab)", "two.onnx (12121212)")
