"""What only a process of its own can show: pipes that close, signals, terminals. The engine is a stand-in."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from certify_cli.output.read import read_document
from certify_cli.records import seal

ROOT = Path(__file__).parents[2]
PROGRAM = """
import sys
from tests.cli import fake
fake.install()
from certify_cli.cli.app import main
sys.exit(main())
"""


def command(*words: str) -> list[str]:
    return [sys.executable, "-c", PROGRAM, "certify", "two.onnx", *words]


def default_signals() -> None:
    """The test runner may have been started with SIGINT ignored, which children inherit."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_the_run_with_what_is_proved(number: int, code: int) -> None:
    process = subprocess.Popen(
        command("--data", "slow:60", "--format", "jsonl"),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=default_signals,
    )
    assert process.stdout is not None
    assert json.loads(process.stdout.readline())["type"] == "run"  # streamed: the run has begun
    process.send_signal(number)
    out, err = process.communicate(timeout=10)
    assert process.returncode == code
    summary = json.loads(out.splitlines()[-1])
    assert (summary["type"], summary["stopped"]) == ("summary", "signal")
    count = summary["samples"]
    assert count == len(out.splitlines()) - 1 < 10
    ended = f"after {count} of 60 samples"
    assert err.splitlines()[-1] == (
        f"curvcert: stopped by {signal.Signals(number).name} {ended}; what was proved by then is written"
    )
    assert f"note: the run was ended by a signal {ended}" in err
    assert "Traceback" not in err


def test_a_stopped_run_leaves_its_file(tmp_path: Path) -> None:
    """Whole, sealed, and read by the commands that read runs."""
    target = tmp_path / "out.json"
    words = command("--data", "slow:60", "--format", "json", "-o", str(target))
    process = subprocess.Popen(words, cwd=ROOT, stderr=subprocess.PIPE, text=True, preexec_fn=default_signals)
    assert process.stderr is not None
    assert process.stderr.readline().startswith("note:")
    time.sleep(1.5)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=10)
    assert process.returncode == 130
    assert os.listdir(tmp_path) == ["out.json"]
    found = read_document(str(target))
    assert 1 <= len(found.samples) < 60
    assert found.summary.stopped == "signal"
    assert found.summary.seal == seal(found.run, found.samples, found.summary)


def test_a_second_signal_ends_it_at_once_and_leaves_no_file(tmp_path: Path) -> None:
    target = tmp_path / "out.json"
    process = subprocess.Popen(
        command("--data", "slow:60", "--format", "json", "-o", str(target)),
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=default_signals,
    )
    assert process.stderr is not None
    assert process.stderr.readline().startswith("note:")
    assert os.listdir(tmp_path) != []  # the temporary file
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.1)
    process.communicate(timeout=10)
    assert process.returncode == 130
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("form", ["jsonl", "table", "csv", "json"])
def test_a_closed_pipe_ends_quietly(form: str) -> None:
    writer = subprocess.Popen(
        command("--data", "5000", "--all", "--quiet", "--format", form),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert writer.stdout is not None
    assert writer.stderr is not None
    reader = subprocess.Popen(["head", "-1"], stdin=writer.stdout, stdout=subprocess.PIPE)
    writer.stdout.close()  # only head holds the pipe's other end now
    first, _ = reader.communicate(timeout=60)
    err = writer.stderr.read()
    writer.wait(timeout=60)
    assert first.count(b"\n") == 1
    assert (writer.returncode, err) == (0, b"")


def test_help_into_a_closed_pipe_ends_quietly() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import os, sys\n" + PIPE_WITHOUT_READER],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, b"")


PIPE_WITHOUT_READER = """
reader, writer = os.pipe()
os.dup2(writer, 1)
os.close(reader)
from certify_cli.cli.app import main
sys.exit(main(["certify", "--help"]))
"""


@pytest.mark.parametrize("redirection", ["2>&-", "2> >(exec true)"])
def test_stderr_that_nobody_reads_costs_no_data(redirection: str, tmp_path: Path) -> None:
    target = tmp_path / "out.json"
    words = command("--data", "wrong:30", "--format", "json")
    script = f'"$@" {redirection}; echo $? >&3'
    done = subprocess.run(
        ["bash", "-c", f"exec 3>&1 >{target}; {script}", "bash", *words],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["0"]
    assert json.loads(target.read_text())["summary"]["samples"] == 30


def test_stdout_that_is_closed_breaks_nothing() -> None:
    words = command("--data", "2", "--quiet")
    done = subprocess.run(["bash", "-c", '"$@" >&-', "bash", *words], cwd=ROOT, stderr=subprocess.PIPE, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("form", ["json", "jsonl"])
def test_a_full_disk_behind_stdout_is_one_sentence(form: str) -> None:
    words = command("--data", "2", "--quiet", "--format", form)
    with open("/dev/full", "w") as full:
        done = subprocess.run(words, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    said = "curvcert: error: the output cannot be written: No space left on device\n"
    assert (done.returncode, done.stderr) == (2, said)


def test_samples_stream_line_by_line() -> None:
    process = subprocess.Popen(
        command("--data", "slow:60", "--format", "jsonl", "--quiet"),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    kinds = [json.loads(process.stdout.readline())["type"] for _ in range(2)]
    process.terminate()
    process.communicate(timeout=10)
    assert kinds == ["run", "sample"]  # long before the sixty seconds are over


def on_terminal(*words: str, stdout_too: bool = False, **environment: str) -> tuple[str, str]:
    """(stdout, what the terminal showed) of a run whose stderr is a terminal of 200 columns."""
    master, slave = pty.openpty()
    process = subprocess.Popen(
        command(*words),
        cwd=ROOT,
        stdout=slave if stdout_too else subprocess.PIPE,
        stderr=slave,
        env={"TERM": "xterm", "COLUMNS": "200", **environment},
    )
    os.close(slave)
    shown = b""
    while True:
        try:
            piece = os.read(master, 65536)
        except OSError:  # Linux: the other end is closed
            break
        if not piece:
            break
        shown += piece
    out = b"" if process.stdout is None else process.stdout.read()
    process.wait(timeout=10)
    os.close(master)
    assert process.returncode == 0, shown
    return out.decode(), shown.decode()


def test_progress_is_drawn_on_a_terminal_and_stdout_stays_clean() -> None:
    out, shown = on_terminal("--data", "slow:3", "--format", "jsonl")
    assert "certifying: linear, ball 4" in shown
    assert "/s" in shown
    assert "note: a trailing softmax was dropped" in shown
    assert [json.loads(line)["type"] for line in out.splitlines()] == ["run", "sample", "sample", "sample", "summary"]


def test_quiet_draws_nothing() -> None:
    out, shown = on_terminal("--data", "slow:1", "--quiet")
    assert shown == ""
    assert "\x1b" not in out


def test_colour_on_a_terminal_unless_refused() -> None:
    assert "\x1b[" in on_terminal("--data", "wrong:2", "--quiet", stdout_too=True)[1]
    assert "\x1b[" not in on_terminal("--data", "wrong:2", "--quiet", stdout_too=True, NO_COLOR="1")[1]
    assert "\x1b[" not in on_terminal("--data", "wrong:2", "--quiet", stdout_too=True, TERM="dumb")[1]


def test_no_bar_among_the_lines_of_a_stream_on_the_same_terminal() -> None:
    shown = on_terminal("--data", "slow:2", "--format", "jsonl", stdout_too=True)[1]
    assert "certifying" not in shown


def test_the_module_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "certify_cli", "--version"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("curvcert ")
