"""`curvcert train`: its files, its resumption after a kill, and its refusals."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from certify_cli.training.recipe import KEYS, OBJECTIVES, Recipe, as_toml, read_recipe, suited
from tests.cli.conftest import Outcome

Curvcert = Callable[..., Outcome]
SMALL = ("--data", "digits", "--arch", "mlp:64-16-10", "--epochs", "2", "--set", "checked=20", "--threads", "1")


def declared(path: Path) -> Any:
    with safe_open(path, framework="pt") as file:
        return json.loads((file.metadata() or {})["curvcert"])


def test_a_model_is_trained_certified_and_made_again(curvcert: Curvcert, tmp_path: Path) -> None:
    model, onnx, plot = tmp_path / "m.safetensors", tmp_path / "m.onnx", tmp_path / "m.svg"
    made = curvcert("train", *SMALL, "-o", model, "--onnx", onnx, "--save-plot", plot, "--format", "json")
    assert made.code == 0, made.err
    document = json.loads(made.out)
    assert [epoch["number"] for epoch in document["epochs"]] == [1, 2]
    assert document["recipe"]["arch"] == "mlp:64-16-10"
    training = declared(model)["training"]
    assert {key: document[key] for key in training} == training
    assert re.search("epoch 2 of 2: loss [0-9.]+, accuracy [0-9.]+, certified at 0.5 [0-9.]+", made.err)
    assert plot.read_text().lstrip().startswith("<?xml")
    assert not list(tmp_path.glob("*.checkpoint"))

    records = [
        json.loads(curvcert("certify", file, "--data", "digits", "--samples", "5", "--format", "json", "-q").out)
        for file in (model, onnx)
    ]
    first, second = ([sample["certified_radius"] for sample in whole["samples"]] for whole in records)
    assert first == pytest.approx(second, rel=1e-6)

    again, drawn = tmp_path / "again.safetensors", tmp_path / "again.svg"
    words = ("train", "--recipe", model, "--threads", "1", "-o", again, "--save-plot", drawn, "-q")
    assert curvcert(*words).code == 0
    assert again.read_bytes() == model.read_bytes()
    assert drawn.read_bytes() == plot.read_bytes()
    assert curvcert("convert", model, tmp_path / "copy.safetensors").code == 0


def test_a_default_name_and_the_table(curvcert: Curvcert, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made = curvcert("train", *SMALL, "--objective", "plain", "-q")
    assert made.code == 0
    assert made.err == ""
    assert "digits_plain.safetensors" in made.out
    assert "curvcert certify digits_plain.safetensors --data digits --eps 0.5" in made.out
    assert curvcert("train", *SMALL, "--objective", "plain", "-q").code == 2


def test_a_kill_loses_at_most_the_epoch_in_flight(tmp_path: Path) -> None:
    target, expected = tmp_path / "killed.safetensors", tmp_path / "whole.safetensors"
    command = [sys.executable, "-m", "certify_cli", "train", *SMALL[:4], "--epochs", "6", *SMALL[6:], "-q"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    assert subprocess.run([*command, "-o", expected], env=environment, check=False).returncode == 0
    checkpoint = tmp_path / "killed.safetensors.checkpoint"
    kills = 0
    while not target.exists():
        process = subprocess.Popen([*command, "-o", target, "--resume"], env=environment, stderr=subprocess.DEVNULL)
        before = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
        while process.poll() is None and kills < 2:
            if checkpoint.exists() and checkpoint.stat().st_mtime_ns > before:
                os.kill(process.pid, signal.SIGKILL)
                kills += 1
                break
            time.sleep(0.005)
        process.wait()
    assert kills == 2
    assert target.read_bytes() == expected.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed.safetensors", "whole.safetensors"]


def test_what_cannot_be_done_is_one_sentence(curvcert: Curvcert, tmp_path: Path) -> None:
    recipe, model = tmp_path / "recipe.toml", tmp_path / "m.safetensors"
    recipe.write_text('data = "digits"\nepoch = 3\n')
    wrong = tmp_path / "wrong.toml"
    wrong.write_text("epochs = true\n")
    huge, nameless = tmp_path / "huge.toml", tmp_path / "nameless.toml"
    huge.write_text(f"rate = 0x{'F' * 6000}\n")
    nameless.write_text("epochs = 1\n")
    for name in ("taken.safetensors", "taken.onnx", "taken.svg"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "begun.safetensors.checkpoint").write_bytes(b"no checkpoint")
    digits = ("train", "--data", "digits", "-o", model)
    cases: list[tuple[tuple[Any, ...], int, str]] = [
        (("train",), 2, "name the data with --data, such as mnist or digits, or in a recipe with --recipe"),
        (("train", "--recipe", recipe), 2, "a recipe has no key epoch; it may set"),
        (("train", "--recipe", wrong), 2, "the recipe's epochs = true is not an integer"),
        (("train", "--recipe", tmp_path / "none.toml"), 2, "cannot be read"),
        (("train", "--recipe", huge), 2, "the recipe's rate = a value that is too long to show (int) is not a number"),
        (("train", "--recipe", nameless), 2, "name the data with --data, such as mnist or digits, or in a recipe"),
        (("train", "--data", "digits", "-o", tmp_path / "m.onnx"), 2, "must end in .safetensors"),
        (("train", "--data", "digits", "-o", tmp_path / "no" / "m.safetensors"), 2, "cannot be written: No such file"),
        (("train", "--data", "digits", "-o", tmp_path / "taken.safetensors"), 2, "exists already"),
        (("train", "--data", "digits", "-o", tmp_path / "taken.safetensors", "--resume"), 2, "exists already"),
        (("train", "--data", "digits", "-o", tmp_path / "begun.safetensors"), 2, "an unfinished run; go on with"),
        (("train", "--data", "digits", "-o", tmp_path / "begun.safetensors", "--resume"), 2, "not a checkpoint"),
        (("train", "--data", "digits", "-o", tmp_path / f"{'m' * 300}.safetensors"), 2, "File name too long"),
        ((*digits, "--onnx", tmp_path / "no" / "m.onnx"), 2, "m.onnx cannot be written: No such file"),
        ((*digits, "--onnx", tmp_path / "taken.onnx"), 2, "taken.onnx: exists already; name another file"),
        ((*digits, "--save-plot", tmp_path / "taken.svg"), 2, "taken.svg: exists already; name another file"),
        ((*digits, "--save-plot", tmp_path / f"{'m' * 300}.svg"), 2, "File name too long"),
        ((*digits, "--activation", "softplus:1e308"), 2, "beta = 1e+308 cannot be trained in float32; choose a size"),
        ((*digits, "--activation", "softplus:1e-300"), 2, "beta = 1e-300 cannot be trained in float32; choose"),
        ((*digits, "--arch", "resnet:4-1-7"), 2, "'4-1-7' has more than a width and a number of blocks, as in resnet"),
        ((*digits, "--arch", "sll:4-99"), 2, "99 blocks are more than 64, as in sll:32-3"),
        ((*digits, "--objective", "magic"), 2, f"is not one of {', '.join(OBJECTIVES)}"),
        ((*digits, "--radius", "big"), 2, "the recipe's radius = 'big' is not a number"),
        ((*digits, "--radius", "0"), 2, "the recipe's radius = 0.0 is not between 1e-09 and"),
        ((*digits, "--arch", "mlp:64-16384-16384-10"), 2, "has more than 134217728 weights; choose smaller widths"),
        ((*digits, "--activation", "erf", "--onnx", tmp_path / "m.onnx"), 3, "torch has no module for erf"),
        ((*digits, "--epochs", "0"), 2, "the recipe's epochs = 0 is not between 1 and"),
        ((*digits, "--set", "speed=9"), 2, "is not KEY=VALUE with a key among"),
        ((*digits, "--set", "batch"), 2, "is not KEY=VALUE with a key among"),
        ((*digits, "--arch", "mlp:784-10"), 2, "must begin with the 64 inputs and end with the 10 classes"),
        ((*digits, "--activation", "relu"), 3, "no bounded second derivative; curvature objectives need smooth"),
        ((*digits, "--set", "validation=1437"), 3, "are too few where 1437 are kept for validation"),
        ((*digits, "--device", "tpu"), 2, "--device 'tpu' is not one of"),
        ((*digits, "--onnx", tmp_path / "m.txt"), 2, "must end in .onnx"),
        (("train", "--data", tmp_path / "none.npz", "-o", model), 3, "none.npz"),
    ]
    for words, code, says in cases:
        outcome = curvcert(*words)
        assert outcome.code == code, (words, outcome.err)
        assert says in outcome.last, (words, outcome.last)
        assert "Traceback" not in outcome.err
    assert not model.exists()


def test_the_next_command_is_quoted(curvcert: Curvcert, tmp_path: Path) -> None:
    made = curvcert("train", *SMALL, "--objective", "plain", "-q", "-o", tmp_path / "a b; c.safetensors")
    assert f"curvcert certify '{tmp_path}/a b; c.safetensors' --data digits --eps 0.5" in made.out


def test_no_path_that_a_model_holds_is_opened(curvcert: Curvcert, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    path = tmp_path / "m.safetensors"
    training = {"recipe": {"data": str(tmp_path / "secret.npz"), "epochs": 1}}
    spec = {"format": "curvcert-architecture/1", "input": [4], "layers": [], "training": training}
    save_file({"w": torch.zeros(2)}, path, metadata={"curvcert": json.dumps(spec)})
    outcome = curvcert("train", "--recipe", path, "-o", tmp_path / "o.safetensors")
    assert outcome.code == 2
    assert "name the data with --data" in outcome.last


def test_a_hostile_recipe_in_a_model_is_refused(curvcert: Curvcert, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    path = tmp_path / "m.safetensors"
    for training in ({"recipe": {"data": "\x1b[2J", "epochs": "rm"}}, {"recipe": []}, [], {"recipe": {"\x1b[2J": 1}}):
        spec = {"format": "curvcert-architecture/1", "input": [4], "layers": [], "training": training}
        save_file({"w": torch.zeros(2)}, path, metadata={"curvcert": json.dumps(spec)})
        outcome = curvcert("train", "--recipe", path, "-o", tmp_path / "o.safetensors")
        assert outcome.code == 2
        assert "\x1b" not in outcome.err
        assert "Traceback" not in outcome.err


def test_a_recipe_as_toml_comes_back(tmp_path: Path) -> None:
    recipe = Recipe(data='a"b\\.npz', flip=True, radius=36 / 255)
    path = tmp_path / "recipe.toml"
    path.write_text(as_toml(recipe))
    assert Recipe().with_values(read_recipe(str(path))) == recipe
    assert set(KEYS) == set(recipe.values())


def test_a_file_is_trained_on_and_a_resumed_run_wants_the_same(curvcert: Curvcert, tmp_path: Path) -> None:
    import numpy as np

    file, model = tmp_path / "d.npz", tmp_path / "m.safetensors"
    y = np.arange(60) % 3
    x = (0.3 * np.random.default_rng(0).random((60, 4)) + np.eye(4)[y]).astype(np.float32)
    words = ("train", "--data", file, "--arch", "mlp:4-8-3", "--threads", "1", "-o", model, "-q", "--epochs", "3")
    np.savez(file, x=x, y=y)
    assert curvcert(*words).code == 0
    assert curvcert("certify", model, "--data", file, "--samples", "3", "-q").code == 0

    from certify_cli.cli.train import recipe_of
    from certify_cli.training.checkpoint import write_checkpoint
    from certify_cli.training.loop import Training, TrainingData

    options = {"data": str(file), "arch": "mlp:4-8-3", "epochs": "3"}
    recipe = recipe_of(None, options, ())
    begun = Training(recipe, TrainingData.of(torch.from_numpy(x), torch.from_numpy(y), recipe), torch.device("cpu"))
    next(begun.epochs())
    model.unlink()
    write_checkpoint(model.with_name("m.safetensors.checkpoint"), begun)
    np.savez(file, x=x, y=(y + 1) % 3)
    refused = curvcert(*words, "--resume")
    assert refused.code == 2
    assert "is of other data" in refused.err
    refused = curvcert(*words, "--resume", "--activation", "tanh")
    assert refused.code == 2
    assert "is of another recipe: activation is softplus:2 here and tanh there" in refused.err


def test_a_recipe_leaves_out_what_suits_its_data(tmp_path: Path) -> None:
    from certify_cli.cli.train import recipe_of

    (tmp_path / "r.toml").write_text('data = "digits"\nepochs = 3\n')
    assert recipe_of(str(tmp_path / "r.toml"), {}, ()) == suited("digits").with_values({"epochs": 3})
    assert recipe_of(str(tmp_path / "r.toml"), {"data": "mnist"}, ()) == Recipe(epochs=3)
