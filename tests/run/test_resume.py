"""Runs that were stopped go on where they ended, and end as if they had never been stopped."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from certify_cli.cli.app import main
from certify_cli.output.read import read_document
from certify_cli.records import seal

MODEL = Path(__file__).parents[2] / "models" / "digits_mlp.onnx"
COMMAND = ("certify", str(MODEL), "--data", "digits", "--method", "curvature", "--batch-size", "7", "--threads", "1")
COUNT = ("--samples", "60")


def curvcert(*words: str) -> int:
    return main([str(word) for word in words])


def lines(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True)


def samples(path: Path) -> list[bytes]:
    return [line for line in lines(path) if line.startswith(b'{"type": "sample"')]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("run") / "whole.jsonl"
    assert curvcert(*COMMAND, *COUNT, "-o", target, "--resume", "-q") == 0
    return target


@pytest.fixture
def whole(uninterrupted: Path, tmp_path: Path) -> Path:
    """An uninterrupted run, to be altered."""
    return Path(shutil.copy(uninterrupted, tmp_path))


def test_a_resumable_run_ends_like_any_other(whole: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain.jsonl"
    assert curvcert(*COMMAND, *COUNT, "-o", plain, "-q") == 0
    assert samples(whole) == samples(plain)
    summaries = [json.loads(lines(path)[-1]) for path in (whole, plain)]
    assert [s.pop("seconds") > 0 for s in summaries] == [True, True]
    assert [len(s.pop("seal")) for s in summaries] == [64, 64]
    assert summaries[0] == summaries[1]


@pytest.mark.parametrize("kept", [0, 0.01, 0.2, 0.5, 0.8, 0.97, 1.0])
def test_from_any_byte_on(whole: Path, tmp_path: Path, kept: float) -> None:
    """Cut anywhere: in the run line, between records, in the middle of one, in the summary."""
    content = whole.read_bytes()
    for shift in range(3):
        target = tmp_path / f"cut{shift}.jsonl"
        target.write_bytes(content[: max(0, int(kept * len(content)) - shift)])
        assert curvcert(*COMMAND, *COUNT, "-o", target, "--resume", "-q") == 0
        assert samples(target) == samples(whole)
        assert [json.loads(line)["type"] for line in (lines(target)[0], lines(target)[-1])] == ["run", "summary"]
        assert len(lines(target)) == 62


def test_the_seal_is_that_of_the_run_that_was_begun(whole: Path, tmp_path: Path) -> None:
    """Not of the one that ended it, which started later."""
    target = tmp_path / "earlier.jsonl"
    content = re.sub(rb'"started": "[^"]*"', b'"started": "2020-01-01T00:00:00+00:00"', whole.read_bytes())
    target.write_bytes(content[: len(content) // 2])
    assert curvcert(*COMMAND, *COUNT, "-o", target, "--resume", "-q") == 0
    found = read_document(str(target))
    assert found.run.started.startswith("2020")
    assert found.summary.seal == seal(found.run, found.samples, found.summary)


@pytest.mark.parametrize("name", ["certified_radius", "margin", "prediction", "label", "attack_radius", "index"])
@pytest.mark.parametrize("number", [1, 9, 30])
def test_an_altered_record_is_not_gone_on_with(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, number: int
) -> None:
    """It would be sealed with what was computed."""
    content = lines(whole)[:40]
    record = json.loads(content[number])
    record[name] = 2 * (record[name] or 1)
    content[number] = json.dumps(record).encode() + b"\n"
    target = tmp_path / "altered.jsonl"
    target.write_bytes(b"".join(content))
    before = target.read_bytes()
    assert curvcert(*COMMAND, *COUNT, "-o", target, "--resume", "-q") == 2
    assert f"line {number + 1}: this record, or one before it, was changed" in capsys.readouterr().err
    assert target.read_bytes() == before


@pytest.mark.parametrize("change", ["left out", "exchanged", "without its link"])
def test_records_that_are_moved_are_not_gone_on_with(whole: Path, tmp_path: Path, change: str) -> None:
    content = lines(whole)[:40]
    if change == "left out":
        del content[5]
    elif change == "exchanged":
        content[5], content[6] = content[6], content[5]
    else:
        record = json.loads(content[5])
        del record["chain"]
        content[5] = json.dumps(record).encode() + b"\n"
    target = tmp_path / "moved.jsonl"
    target.write_bytes(b"".join(content))
    assert curvcert(*COMMAND, *COUNT, "-o", target, "--resume", "-q") == 2


def test_a_finished_run_is_left_as_it_is(whole: Path) -> None:
    before = whole.read_bytes()
    assert curvcert(*COMMAND, *COUNT, "-o", whole, "--resume", "-q") == 0
    assert whole.read_bytes() == before


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (("--samples", "61"), "--samples"),
        (("--attack", "none"), "--attack"),
        (("--eps", "0.1"), "--eps"),
        (("--method", "lipschitz"), "--method"),
        (("--batch-size", "8"), "batch size"),
        (("--shuffle",), "--shuffle"),
    ],
)
def test_another_run_is_refused(
    whole: Path, capsys: pytest.CaptureFixture[str], change: tuple[str, ...], word: str
) -> None:
    before = whole.read_bytes()
    assert curvcert(*COMMAND, *COUNT, *change, "-o", whole, "--resume", "-q") == 2
    assert word in capsys.readouterr().err
    assert whole.read_bytes() == before


@pytest.mark.parametrize("content", ["my notes", "my notes\n", '{"a": 1}\n', '{"type": "sample"}\n', "\n"])
def test_a_file_of_something_else_is_never_overwritten(tmp_path: Path, content: str) -> None:
    target = tmp_path / "notes.jsonl"
    target.write_text(content)
    assert curvcert(*COMMAND, *COUNT, "-o", target, "--resume", "-q") == 2
    assert target.read_text() == content


def test_what_it_needs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (("--resume",), ("--resume", "-o", "x.json"), ("--resume", "-o", "x.jsonl", "--witnesses", "w.npz")):
        assert curvcert(*COMMAND, *COUNT, *words) == 2
        assert "--resume" in capsys.readouterr().err.splitlines()[-1]


def _heeds_signals() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


def started(target: Path, *more: str) -> subprocess.Popen[str]:
    words = [sys.executable, "-m", "certify_cli", *COMMAND, *more, "-o", str(target), "--resume"]
    # a test run in the background ignores SIGINT, and what it starts would inherit that
    return subprocess.Popen(words, stderr=subprocess.PIPE, text=True, preexec_fn=_heeds_signals)


def wait_for(target: Path, size: int, process: subprocess.Popen[str]) -> None:
    limit = time.monotonic() + 300
    while process.poll() is None and (not target.exists() or target.stat().st_size < size):
        assert time.monotonic() < limit
        time.sleep(0.005)


def repeated(tmp_path: Path, copies: int) -> tuple[str, ...]:
    """A larger data set, so that there is time to stop a run: noisy copies of the test digits."""
    from sklearn.datasets import load_digits

    x = load_digits().data[-400:].reshape(-1, 8, 8).astype(np.float32) / 16
    noise = np.random.default_rng(0).normal(0, 0.01, (copies, *x.shape)).astype(np.float32)
    path = tmp_path / "digits.npz"
    np.savez(path, x=(x + noise).reshape(-1, 8, 8), y=np.tile(load_digits().target[-400:], copies))
    return ("--data", str(path))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_with_what_is_proved(tmp_path: Path, number: int) -> None:
    """The same command then goes on from the last whole batch, and ends as if it had never been stopped."""
    more = repeated(tmp_path, 5)
    target = tmp_path / "out.jsonl"
    process = started(target, *more)
    wait_for(target, 5000, process)
    process.send_signal(number)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 128 + number
    assert "the same command goes on from there" in err.splitlines()[-1]
    found = read_document(str(target))
    assert found.summary.stopped == "signal"
    assert found.summary.seal == seal(found.run, found.samples, found.summary)
    assert len(found.samples) < 2000
    cut = [sample for sample in found.samples if sample.stopped is not None]
    assert len(found.samples) % 7 == 0
    assert len(cut) in (0, 7)
    assert [*found.samples[len(found.samples) - len(cut) :]] == cut
    assert curvcert(*COMMAND, *more, "-o", target, "--resume", "-q") == 0
    expected = tmp_path / "expected.jsonl"
    assert curvcert(*COMMAND, *more, "-o", expected, "--resume", "-q") == 0
    assert samples(target) == samples(expected)
    assert read_document(str(target)).summary.stopped is None


def killed(tmp_path: Path, kills: int, copies: int, seed: int) -> None:
    """Kill -9 at random moments, then let it end: the samples are those of a run that nobody stopped."""
    more = repeated(tmp_path, copies)
    expected = tmp_path / "expected.jsonl"
    assert curvcert(*COMMAND, *more, "-o", expected, "--resume", "-q") == 0
    draw = random.Random(seed)
    target, done = tmp_path / "killed.jsonl", 0
    size = expected.stat().st_size
    for _ in range(kills):
        if target.exists() and len(lines(target)) > 1 and lines(target)[-1].startswith(b'{"type": "summary"'):
            target.unlink()  # finished: begin again
        process = started(target, *more)
        before = target.stat().st_size if target.exists() else 0
        wait_for(target, min(size - 1, before + draw.randrange(1, size // 8)), process)
        time.sleep(draw.random() * 0.02)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            done += 1
        process.communicate()
    assert done > kills // 2
    process = started(target, *more)
    process.communicate(timeout=300)
    assert process.returncode == 0
    assert samples(target) == samples(expected)


def test_kills_lose_nothing(tmp_path: Path) -> None:
    killed(tmp_path, 3, 2, seed=0)


@pytest.mark.slow
def test_fifty_kills_lose_nothing(tmp_path: Path) -> None:
    killed(tmp_path, 50, 10, seed=1)
