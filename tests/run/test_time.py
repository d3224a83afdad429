"""Runs whose time ends: what is proved by then is recorded, marked, and read by every command that reads runs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from certify_cli.audit.verify.claims import run_contradictions
from certify_cli.cli.app import main
from certify_cli.errors import CurvcertWarning, UsageError
from certify_cli.output.read import read_document
from certify_cli.records import Result, collect, seal, sealed, summarise
from certify_cli.run.doubts import shortfalls
from certify_cli.run.engine import prepare
from certify_cli.run.library import certify
from certify_cli.run.resume import begun
from certify_cli.run.sample_records import TIME_ENDED
from certify_cli.run.settings import Settings
from tests.networks import PIECEWISE, mlp, points
from tests.records import SETTINGS, render, run, sample
from tests.run.common import data_of, model_of

MODEL = str(Path(__file__).parents[2] / "models" / "digits_mlp.onnx")
NETWORK = PIECEWISE["relu"]


def after(count: int) -> Callable[[], str | None]:
    """Ends a run at its `count`-th question."""
    left = [count]

    def halted() -> str | None:
        left[0] -= 1
        return "signal" if left[0] < 0 else None

    return halted


def stopped_run(count: int, samples: int = 9) -> Result:
    data = data_of(points(NETWORK, samples), torch.zeros(samples, dtype=torch.int64))
    job = prepare(model_of(NETWORK), data, Settings(batch_size=4))
    return collect(job.records(halted=after(count)))


@pytest.fixture(scope="module")
def asked() -> int:
    """How many questions a whole run asks."""
    found = [0]

    def halted() -> None:
        found[0] += 1

    data = data_of(points(NETWORK, 9), torch.zeros(9, dtype=torch.int64))
    collect(prepare(model_of(NETWORK), data, Settings(batch_size=4)).records(halted=halted))
    return found[0]


@pytest.mark.parametrize("part", [0.0, 0.02, 0.3, 0.6, 0.9, 0.99])
def test_a_run_that_is_halted_holds_what_was_proved(part: float, asked: int) -> None:
    whole, found = stopped_run(10**9), stopped_run(int(part * asked))
    assert whole.summary.stopped is None
    assert found.summary.stopped == "signal"
    assert found.summary.samples == len(found.samples)
    assert found.summary.seal == seal(found.run, found.samples, found.summary)
    for a, b in zip(found.samples, whole.samples, strict=False):
        if a.stopped is None:
            assert a == b
        else:
            assert a.stopped == "signal"
            assert (a.certified_radius or 0.0) <= (b.certified_radius or 0.0)


def test_more_time_gives_more(asked: int) -> None:
    counts = [len(stopped_run(int(part * asked)).samples) for part in (0.0, 0.3, 0.7, 0.99)]
    assert counts == [0, 4, 8, 9]


def test_a_batch_is_left_out_if_nothing_is_proved_of_it() -> None:
    """A signal in the global bounds: no record says that nothing is certified."""
    assert stopped_run(60).samples == ()


@pytest.mark.smoke
def test_seconds_of_a_sample() -> None:
    network = mlp((20, 60, 60, 60, 5), "relu", seed=1)
    data = data_of(points(network, 4), torch.zeros(4, dtype=torch.int64))
    whole = certify(model_of(network), data, effort="max")
    with pytest.warns(CurvcertWarning, match="time ended for 4 of 4 samples"):
        found = certify(model_of(network), data, effort="max", seconds=0.05)
    assert found.run.arguments["seconds"] == 0.05
    assert found.summary.stopped is None
    for a, b in zip(found.samples, whole.samples, strict=True):
        assert (a.stopped, b.stopped) == ("seconds", None)
        assert a.certified_radius is not None
        assert b.certified_radius is not None
        assert 0 < a.certified_radius <= b.certified_radius


def test_no_time_at_all_is_a_reason() -> None:
    data = data_of(points(NETWORK, 2))
    with pytest.warns(CurvcertWarning, match="time ended"):
        found = certify(model_of(NETWORK), data, seconds=1e-9)
    assert [s.reason for s in found.samples] == [TIME_ENDED] * 2
    assert [s.status for s in found.samples] == ["not_certified"] * 2


def test_seconds_of_a_run() -> None:
    network = mlp((20, 60, 60, 60, 5), "relu", seed=1)
    data = data_of(points(network, 400))
    with pytest.warns(CurvcertWarning) as told:
        found = certify(model_of(network), data, batch_size=4, total_seconds=1.0)
    assert any("the run was ended by --total-seconds after" in str(warning.message) for warning in told)
    assert found.summary.stopped == "total-seconds"
    assert len(found.samples) < 400
    assert found.summary.seconds < 20  # the machine may be busy


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["seconds", "total_seconds"])
def test_seconds_are_positive(name: str, value: float) -> None:
    with pytest.raises(UsageError, match=f"--{name.replace('_', '-')} {value} must be"):
        Settings(**{name: value})


@pytest.mark.parametrize("text", ["0", "-1", "1e10", "nan", "soon", "1/2"])
def test_seconds_as_typed(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["certify", MODEL, "--data", "digits", "--seconds", text]) == 2
    assert "is not a number of seconds" in capsys.readouterr().err


def cut_file(path: Path, extra: tuple[str, ...] = ()) -> Path:
    """A run of the digits that was ended within its second batch of seven, as `certify` writes it."""
    words = ["certify", MODEL, "--data", "digits", "--samples", "20", "--method", "curvature", "--batch-size", "7"]
    words += ["--threads", "1", *extra]
    assert main([*words, "-o", str(path), "-q"]) == 0
    whole = read_document(str(path))
    samples = [s if s.index < 7 else replace(s, stopped="signal") for s in whole.samples[:14]]
    summary = replace(summarise(samples, (), 1.0), stopped="signal")
    path.write_text(render("jsonl", [whole.run, *samples, sealed(whole.run, samples, summary)]))
    return path


def test_every_reader_takes_a_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = cut_file(tmp_path / "part.jsonl")
    assert main(["verify", str(path), MODEL]) == 0
    assert main(["report", str(path), "--svg", str(tmp_path)]) == 0
    assert main(["diff", str(path), str(path)]) == 0
    assert "14 samples" in capsys.readouterr().out


def test_a_part_is_compared_with_as_much_of_a_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    part, whole = cut_file(tmp_path / "part.jsonl"), tmp_path / "whole.jsonl"
    words = ["certify", MODEL, "--data", "digits", "--samples", "20", "--method", "curvature", "--threads", "1"]
    assert main([*words, "-o", str(whole), "-q"]) == 0
    assert main(["diff", str(whole), str(part)]) == 0
    captured = capsys.readouterr()
    assert "14 samples" in captured.out
    assert "only the first 14 samples are compared" in captured.err


def test_a_part_is_no_baseline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    part, policy = cut_file(tmp_path / "part.jsonl"), tmp_path / "policy.toml"
    policy.write_text(f'[policy]\nbaseline = "{part}"\n')
    assert main(["check", MODEL, "--data", "digits", "--samples", "20", "--policy", str(policy)]) == 3
    assert "was ended early" in capsys.readouterr().err


def test_a_part_that_leaves_out_samples_in_between_is_a_contradiction(tmp_path: Path) -> None:
    path = cut_file(tmp_path / "part.jsonl")
    found = read_document(str(path))
    samples = found.samples[1:]
    summary = sealed(found.run, samples, replace(summarise(samples, (), 1.0), stopped="signal"))
    data = data_of(torch.zeros(20, 1))
    data = replace(data, indices=tuple(range(20)))
    network = mlp((3, 10), "tanh")
    told = list(run_contradictions(Result(found.run, samples, summary), data, network))
    assert any("not those of the data" in text for text in told)
    assert not list(run_contradictions(found, data, network))


def test_a_part_is_gone_on_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From its last whole batch on; the summary of the part is replaced. Another --total-seconds may be given."""
    path = cut_file(tmp_path / "part.jsonl", ("--total-seconds", "1000"))
    past = begun(str(path))
    assert past is not None
    assert (past.finished, past.whole) == (False, 7)
    words = ["certify", MODEL, "--data", "digits", "--samples", "20", "--method", "curvature", "--batch-size", "7"]
    words += ["--threads", "1", "--total-seconds", "999", "--resume"]
    assert main([*words, "-o", str(path)]) == 0
    assert "going on after 7 of 20 samples" in capsys.readouterr().err
    found = read_document(str(path))
    assert len(found.samples) == 20
    assert found.summary.stopped is None
    assert [s.stopped for s in found.samples] == [None] * 20


def test_a_sample_whose_own_time_ended_is_done(tmp_path: Path) -> None:
    """A run that goes on keeps it."""
    path = tmp_path / "own.jsonl"
    made = replace(run({}, SETTINGS, 6, []), batch_size=2)
    path.write_text(render("jsonl", [made, *(sample(k, stopped="seconds") for k in range(4))]))
    past = begun(str(path))
    assert past is not None
    assert past.whole == 4


def test_what_is_said() -> None:
    rows = [sample(0), sample(1, stopped="seconds"), sample(2, radius=None, stopped="seconds")]
    summary = summarise(rows, (), 1.0)
    made = run({}, SETTINGS, 9, [])
    assert shortfalls(made, rows[:1], summarise(rows[:1], (), 1.0)) == []
    assert shortfalls(made, rows, summary) == ["time ended for 2 of 3 samples; what was proved by then counts"]
    ended = replace(summary, stopped="total-seconds")
    assert shortfalls(made, rows, ended)[0] == "the run was ended by --total-seconds after 3 of 9 samples"
    table = render("table", [made, *rows, ended])
    assert "cut short" in table
    assert "ended by --total-seconds after 3 of 9 samples" in table


def test_seals_of_runs_from_before_stay_valid() -> None:
    """They had no `stopped`: a seal over them is the same with the field and without."""
    rows, made = [sample(0), sample(1)], run({}, SETTINGS, 2, [])
    summary = summarise(rows, (), 1.0)
    digest = hashlib.sha256()
    for record in (made, *rows, summary):
        content = record.to_dict()
        content.pop("stopped", None)
        digest.update(json.dumps(content, sort_keys=True).encode())
    assert seal(made, rows, summary) == digest.hexdigest()
    marked = [replace(rows[0], stopped="seconds"), rows[1]]
    assert seal(made, marked, summary) != seal(made, rows, summary)
