"""`curvcert certify` around the engine: options, outputs, notes, exit codes. The engine is a stand-in."""

from __future__ import annotations

import csv
import io
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from certify_cli.records import summarise
from certify_cli.run.doubts import at_chance_level
from tests.cli.conftest import Outcome
from tests.records import sample
from tests.schema import SCHEMA

pytestmark = pytest.mark.usefixtures("fake")
Curvcert = Callable[..., Outcome]


def test_a_table_by_default(curvcert: Curvcert) -> None:
    done = curvcert("certify", "two.onnx", "--data", "3", "--eps", "0.1")
    assert done.code == 0
    assert "certified accuracy at 0.1" in done.out
    assert done.out.count("curvature") == 3
    assert done.err == "note: a trailing softmax was dropped\n"


def test_json_fits_the_published_schema(curvcert: Curvcert) -> None:
    done = curvcert("certify", "two.onnx", "--data", "3", "--eps", "0.1", "--eps", "36/255", "--format", "json")
    document = json.loads(done.out)
    jsonschema.Draft202012Validator(SCHEMA).validate(document)
    assert [row["index"] for row in document["samples"]] == [0, 1, 2]
    assert list(document["summary"]["certified_accuracy"]) == ["0.1", "36/255"]
    assert document["run"]["notes"] == ["a trailing softmax was dropped"]


def test_jsonl_and_csv(curvcert: Curvcert) -> None:
    lines = curvcert("certify", "two.onnx", "--data", "2", "--format", "jsonl").out.splitlines()
    assert [json.loads(line)["type"] for line in lines] == ["run", "sample", "sample", "summary"]
    rows = csv.DictReader(io.StringIO(curvcert("certify", "two.onnx", "--data", "2", "--format", "csv").out))
    assert [row["status"] for row in rows] == ["certified", "certified"]


@pytest.mark.parametrize(
    ("name", "words", "start"),
    [
        ("x.json", "", '{\n"schema"'),
        ("X.JSON", "", '{\n"schema"'),
        ("x.jsonl", "", '{"type": "run"'),
        ("x.csv", "", "index,"),
        ("x.json", "--format csv", "index,"),
        ("x.txt", "", "index  label"),
        ("json", "", "index  label"),
    ],
)
def test_the_suffix_of_the_output_is_the_format_unless_one_is_given(
    curvcert: Curvcert, tmp_path: Path, name: str, words: str, start: str
) -> None:
    assert curvcert("certify", "two.onnx", "--data", "1", "-o", tmp_path / name, *words.split()).code == 0
    assert (tmp_path / name).read_text().startswith(start)


def test_csv_says_where_the_accuracy_at_eps_is(curvcert: Curvcert) -> None:
    words = ("certify", "two.onnx", "--data", "1", "--format", "csv")
    assert "note: csv has one row a sample" in curvcert(*words, "--eps", "0.2").err
    assert "csv" not in curvcert(*words).err
    assert curvcert(*words, "--eps", "0.2", "--quiet").err == ""


def without_time(document: str) -> str:
    return "".join(
        line for line in document.splitlines(keepends=True) if '"seconds"' not in line and '"seal"' not in line
    )


def test_quiet_silences_stderr_and_leaves_stdout_as_it_is(curvcert: Curvcert) -> None:
    words = ("certify", "two.onnx", "--data", "wrong:30", "--format", "json")
    loud, quiet = curvcert(*words), curvcert(*words, "--quiet")
    assert "note:" in loud.err
    assert "warning:" in loud.err
    assert quiet.err == ""
    assert without_time(quiet.out) == without_time(loud.out)


def test_quiet_never_silences_an_error(curvcert: Curvcert) -> None:
    done = curvcert("certify", "absent.onnx", "--data", "3", "--quiet")
    assert (done.code, done.out, done.err) == (3, "", "curvcert: error: absent.onnx: no such file\n")


def test_the_run_line_holds_the_options_and_none_that_change_no_result(curvcert: Curvcert, tmp_path: Path) -> None:
    words = ("certify", "two.onnx", "--data", "1", "--mean", "0.1,0.2", "--seed", "7", "--format", "jsonl", "--all")
    done = curvcert(*words, "--witnesses", tmp_path / "w.npz")
    arguments = json.loads(done.out.splitlines()[0])["arguments"]
    assert arguments["model"] == "two.onnx"
    assert arguments["mean"] == ["0.1,0.2"]
    assert arguments["seed"] == 7
    assert not {"quiet", "format", "output_file", "all_rows", "witnesses"} & set(arguments)


def test_settings_arrive(curvcert: Curvcert, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    engine = sys.modules["certify_cli.run.engine"]
    seen: dict[str, Any] = {}
    real = engine.prepare  # type: ignore[attr-defined]

    def prepare(model: Any, data: Any, settings: Any, arguments: Any) -> Any:
        seen.update(vars(settings))
        return real(model, data, settings, arguments)

    monkeypatch.setattr(engine, "prepare", prepare)
    words = "--mean 0.1 --mean 0.2 --std 1,2 --layout nhwc --memory 2GB --threads 2 --batch-size 16 --seed 3"
    assert curvcert("certify", "two.onnx", "--data", "1", *words.split(), "--effort", "fast").code == 0
    assert seen == {
        "method": "auto",
        "effort": "fast",
        "attack": "certificate",
        "eps": (),
        "device": "auto",
        "batch_size": 16,
        "threads": 2,
        "memory": 2_000_000_000,
        "seconds": None,
        "total_seconds": None,
        "seed": 3,
        "mean": (0.1, 0.2),
        "std": (1.0, 2.0),
        "layout": "nhwc",
    }


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            "--method nonsense",
            "--method 'nonsense' is not one of auto, lipschitz, curvature, dual, local, linear, local-lipschitz",
        ),
        ("--effort extreme", "--effort 'extreme' is not one of fast, normal, max"),
        ("--attack magic", "--attack 'magic' is not one of certificate, search, none"),
        ("--format yaml", "--format 'yaml' is not one of table, json, jsonl, csv, markdown, junit, sarif, github"),
        ("--layout chw", "--layout 'chw' is not one of nchw, nhwc, flat"),
        ("--data-layout chw", "--data-layout 'chw' is not one of nchw, nhwc"),
        ("--split dev", "--split 'dev' is not one of test, train"),
        ("--eps nought", "--eps 'nought' is not a positive number or fraction such as 0.5 or 36/255"),
        ("--eps 1/0", "--eps '1/0' is not a positive number or fraction such as 0.5 or 36/255"),
        ("--mean 0.1,,0.2", "--mean '' is not a number"),
        ("--std nan", "--std 'nan' is not a number"),
        ("--batch-size 0", "--batch-size '0' is not a positive integer or auto"),
        ("--threads many", "--threads 'many' is not a positive integer or auto"),
        ("--memory 2XB", "--memory '2XB' is not a size such as 2GB or 512MB, nor auto"),
        ("--memory 0GB", "--memory '0GB' is not a size such as 2GB or 512MB, nor auto"),
        ("--output-file nowhere/x.json", "--output-file 'nowhere/x.json' cannot be written: No such file or directory"),
        (
            "--witnesses w.txt",
            "--witnesses 'w.txt': the file is written as npz, so its name must end in .npz",
        ),
        (
            "--witnesses w.npz --attack none",
            "--witnesses writes the attacks that are found, but --attack none looks for none; leave out one of the two",
        ),
        ("--witnesses nowhere/x.npz", "--witnesses 'nowhere/x.npz' cannot be written: No such file or directory"),
    ],
)
def test_options_that_cannot_be_used(curvcert: Curvcert, words: str, said: str) -> None:
    done = curvcert("certify", "two.onnx", "--data", "1", *words.split())
    assert (done.code, done.out, done.last) == (2, "", f"curvcert: error: {said}")


def test_a_method_that_does_not_apply_is_exit_3(curvcert: Curvcert) -> None:
    done = curvcert("certify", "two.onnx", "--data", "1", "--method", "curvature", "--effort", "max")
    assert done.code == 3
    assert "does not apply" in done.last


def test_data_that_is_missing_is_exit_3(curvcert: Curvcert) -> None:
    assert curvcert("certify", "two.onnx", "--data", "nothing").code == 3


def test_a_bug_is_exit_4_in_one_line_and_asks_for_a_report(curvcert: Curvcert, monkeypatch: pytest.MonkeyPatch) -> None:
    done = curvcert("certify", "bug.onnx", "--data", "1")
    assert done.code == 4
    assert done.err.count("\n") == 1
    assert "ZeroDivisionError: a bug in two lines" in done.err
    assert "please report it" in done.err
    monkeypatch.setenv("CURVCERT_DEBUG", "1")
    debugged = curvcert("certify", "bug.onnx", "--data", "1")
    assert "Traceback (most recent call last)" in debugged.err
    assert debugged.last == done.last


def test_output_replaces_a_file_whole(curvcert: Curvcert, tmp_path: Path) -> None:
    target = tmp_path / "out.json"
    target.write_text("before")
    target.chmod(0o640)
    done = curvcert("certify", "two.onnx", "--data", "1", "--format", "json", "-o", target)
    assert (done.code, done.out) == (0, "")
    assert json.loads(target.read_text())["summary"]["samples"] == 1
    assert stat.S_IMODE(target.stat().st_mode) == 0o640
    assert os.listdir(tmp_path) == ["out.json"]


@pytest.mark.parametrize("words", [("bug.onnx", "--data", "1"), ("two.onnx", "--data", "nothing")])
def test_output_stays_as_it_was_when_the_run_fails(curvcert: Curvcert, tmp_path: Path, words: tuple[str, ...]) -> None:
    target = tmp_path / "out.json"
    target.write_text("before")
    assert curvcert("certify", *words, "-o", target).code in (3, 4)
    assert target.read_text() == "before"
    assert os.listdir(tmp_path) == ["out.json"]


def test_output_through_a_link_keeps_the_link(curvcert: Curvcert, tmp_path: Path) -> None:
    real, link = tmp_path / "real.csv", tmp_path / "link.csv"
    real.write_text("before")
    link.symlink_to(real)
    curvcert("certify", "two.onnx", "--data", "1", "--format", "csv", "-o", link)
    assert link.is_symlink()
    assert real.read_text().startswith("index,")


def test_output_to_a_device_does_not_replace_it(curvcert: Curvcert) -> None:
    assert curvcert("certify", "two.onnx", "--data", "1", "-o", os.devnull).code == 0
    assert not Path(os.devnull).is_file()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_sentence(curvcert: Curvcert, tmp_path: Path) -> None:
    done = curvcert("certify", "two.onnx", "--data", "1", "-o", "/dev/full")
    assert (done.code, done.last) == (2, "curvcert: error: the output cannot be written: No space left on device")
    full = tmp_path / "full.npz"
    full.symlink_to("/dev/full")
    done = curvcert("certify", "two.onnx", "--data", "1", "--witnesses", full)
    assert (done.code, done.last) == (2, "curvcert: error: --witnesses cannot be written: No space left on device")


def test_witnesses_hold_every_attack(curvcert: Curvcert, tmp_path: Path) -> None:
    curvcert("certify", "two.onnx", "--data", "4", "--witnesses", tmp_path / "w.npz")
    with np.load(tmp_path / "w.npz", allow_pickle=False) as file:
        assert sorted(file) == ["d", "index", "x"]
        assert file["index"].tolist() == [0, 1, 2, 3]
        assert file["x"].shape == file["d"].shape == (4, 2, 3)
        assert file["d"].dtype == np.float64


def test_witnesses_of_no_attack_keep_the_shape(curvcert: Curvcert, tmp_path: Path) -> None:
    curvcert("certify", "two.onnx", "--data", "0", "--witnesses", tmp_path / "w.npz")
    with np.load(tmp_path / "w.npz", allow_pickle=False) as file:
        assert file["x"].shape == (0, 2, 3)


def test_chance_level_is_warned_about(curvcert: Curvcert) -> None:
    done = curvcert("certify", "two.onnx", "--data", "wrong:20")
    assert done.last.startswith("warning: accuracy 0.0000 is no better than guessing among 3 classes")
    assert "--mean" in done.last
    for fine in ("wrong:19", "20", "unlabelled:20"):
        assert "warning" not in curvcert("certify", "two.onnx", "--data", fine).err


@pytest.mark.parametrize(
    ("correct", "of", "classes", "suspicious"),
    [(15, 100, 10, True), (16, 100, 10, False), (60, 100, 2, True), (61, 100, 2, False), (0, 19, 10, False)],
)
def test_chance_level(correct: int, of: int, classes: int, suspicious: bool) -> None:
    rows = [sample(index, label=int(index >= correct)) for index in range(of)]
    assert at_chance_level(summarise(rows, (), 0.0), classes) is suspicious


def test_all_shows_every_row(curvcert: Curvcert) -> None:
    assert "5 more samples" in curvcert("certify", "two.onnx", "--data", "25").out
    assert "more samples" not in curvcert("certify", "two.onnx", "--data", "25", "--all").out


def test_columns_are_respected(curvcert: Curvcert, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    table = curvcert("certify", "two.onnx", "--data", "wrong:2").out.split("\n\n")[0]
    assert max(map(len, table.splitlines())) <= 100
