"""Any text at any place of a model or data file: it loads with printable names, or is refused in a sentence."""

from __future__ import annotations

import copy
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from certify_cli.cli.app import main
from certify_cli.cli.inspect import as_text, describe
from certify_cli.data.datasets import load_data
from certify_cli.errors import CurvcertError
from certify_cli.load.convert import convert
from certify_cli.load.model import load_model
from certify_cli.output.document import View
from tests.files import tensors
from tests.hostile import TEXTS, is_sentence

SPEC: dict[str, Any] = {
    "format": "curvcert-architecture/1",
    "input": [1, 4, 4],
    "layers": [
        {"type": "Conv2d", "name": "conv", "padding": 1},
        {"type": "softplus", "name": "act"},
        {"type": "reshape", "name": "flat", "shape": [32], "title": "flat"},
        {"type": "Linear", "name": "fc"},
    ],
}
LoweringContext = Callable[[dict[str, Any], dict[str, Any], dict[str, str], str], None]


def layer(position: int, **fields: Any) -> LoweringContext:
    """`TEXT` in the fields stands for the text."""

    def put(spec: dict[str, Any], held: dict[str, Any], metadata: dict[str, str], text: str) -> None:
        spec["layers"][position].update({key: text if value == "TEXT" else value for key, value in fields.items()})

    return put


def named(spec: dict[str, Any], held: dict[str, Any], metadata: dict[str, str], text: str) -> None:
    """A layer with weights, and its tensors by the names that follow."""
    spec["layers"][3]["name"] = text
    for part in ("weight", "bias"):
        held[f"{text}.{part}"] = held.pop(f"fc.{part}")


def referred(spec: dict[str, Any], held: dict[str, Any], metadata: dict[str, str], text: str) -> None:
    spec["layers"][3]["weight"] = text
    held[text] = held.pop("fc.weight")


def chained(spec: dict[str, Any], held: dict[str, Any], metadata: dict[str, str], text: str) -> None:
    spec["layers"][1]["name"] = text
    spec["layers"][2]["inputs"] = [text]


PLACES: dict[str, LoweringContext] = {
    "name": layer(1, name="TEXT"),
    "name with tensors": named,
    "tensor": referred,
    "name and input": chained,
    "missing tensor": layer(3, weight="TEXT"),
    "title": layer(2, title="TEXT"),
    "title where none belongs": layer(0, title="TEXT"),
    "type": layer(1, type="TEXT"),
    "inputs": layer(1, inputs=["TEXT"]),
    "inputs as text": layer(1, inputs="TEXT"),
    "choice": layer(0, padding_mode="TEXT"),
    "number": layer(1, beta="TEXT"),
    "integers": layer(0, stride=["TEXT", 1]),
    "field": lambda spec, held, metadata, text: spec["layers"][0].update({text: 1}),
    "field of the spec": lambda spec, held, metadata, text: spec.update({text: 1}),
    "format": lambda spec, held, metadata, text: spec.update(format=text),
    "input": lambda spec, held, metadata, text: spec.update(input=[text]),
    "layers": lambda spec, held, metadata, text: spec.update(layers=[text]),
    "spare tensor": lambda spec, held, metadata, text: held.update({text: torch.zeros(2)}),
    "tensor with a NaN": lambda spec, held, metadata, text: held.update({text: torch.full((2,), float("nan"))}),
    "metadata": lambda spec, held, metadata, text: metadata.update({text: text}),
    "metadata of ours": lambda spec, held, metadata, text: metadata.update(curvcert=text),
}
OF_TENSORS = ("name with tensors", "tensor", "spare tensor", "tensor with a NaN", "metadata")


def refusal(error: CurvcertError, *typed: object) -> str:
    """What it says behind the paths that the user typed, checked."""
    text = str(error)
    for path in typed:
        text = text.replace(str(path), "FILE")
    assert is_sentence(text), text
    return text


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", TEXTS)
def test_texts_of_a_model_file(name: str, place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = TEXTS[name]
    spec, held, metadata = copy.deepcopy(SPEC), dict(tensors()), {}
    PLACES[place](spec, held, metadata, text)
    metadata.setdefault("curvcert", json.dumps(spec))
    path = tmp_path / "m.safetensors"
    if "\ud800" in text and (place in OF_TENSORS or metadata["curvcert"] == text):
        pytest.skip("safetensors writes no lone surrogates")
    if text == "" and place == "metadata of ours":
        metadata["curvcert"] = " "
    save_file(held, path, metadata)
    try:
        loaded = load_model(path)
    except CurvcertError as error:
        refusal(error, path)
        return
    nodes = loaded.network.nodes
    assert len({node.name for node in nodes}) == len(nodes)
    for node in nodes:
        assert node.name.isprintable()
        assert len(node.name) <= 110
        assert node.op.title.isprintable()
        assert len(node.op.title) <= 110
    capsys.readouterr()
    assert main(["bounds", str(path), "--quiet"]) == 0
    shown = as_text(describe(loaded), View(width=80)) + capsys.readouterr().out
    assert all(line.isprintable() and not line.lstrip().startswith("::") for line in shown.split("\n"))
    assert "##[" not in shown
    convert(path, tmp_path / "again.safetensors")
    again = load_model(tmp_path / "again.safetensors").network
    assert [node.name for node in again.nodes] == [node.name for node in nodes]  # tame names stay as they are


@pytest.mark.parametrize("name", [n for n, text in TEXTS.items() if "\ud800" not in text])
def test_tensors_of_a_plain_stack(name: str, tmp_path: Path) -> None:
    text = TEXTS[name]
    path = tmp_path / "m.safetensors"
    for held in (
        {f"{text}1.weight": torch.eye(3), f"{text}2.weight": torch.eye(3)},
        {f"{text}.weight": torch.eye(3), f"{text}{'9' * 5000}.weight": torch.ones(2, 3)},
        {f"{text}1.weight": torch.ones(4, 3), f"{text}2.weight": torch.ones(2, 3)},
        {f"{text}.weight": torch.eye(3), f"{text}.spare": torch.eye(3)},
    ):
        save_file(held, path)
        try:
            loaded = load_model(path, activation="tanh")
        except CurvcertError as error:
            refusal(error, path)
            continue
        assert all(node.name.isprintable() and len(node.name) <= 110 for node in loaded.network.nodes)


@pytest.mark.parametrize("name", TEXTS)
def test_an_activation_typed(name: str, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"a.weight": torch.eye(2)}, path)
    for text in (TEXTS[name], f"softplus:{TEXTS[name]}", f"{TEXTS[name]}:1"):
        with pytest.raises(CurvcertError) as error:
            load_model(path, activation=text)
        refusal(error.value, path)


@pytest.mark.parametrize("name", TEXTS)
def test_names_in_an_npz(name: str, tmp_path: Path) -> None:
    path = tmp_path / "d.npz"
    text = TEXTS[name][:60000].replace("\ud800", "\udc80")
    with zipfile.ZipFile(path, "w") as archive:
        try:
            archive.writestr(f"{text}.npy", b"garbage")
        except UnicodeEncodeError:
            pytest.skip("zipfile writes no lone surrogates")
    with pytest.raises(CurvcertError) as error:
        load_data(str(path))
    refusal(error.value, path)


def on_disk(text: str) -> str | None:
    """The text as the name of a file, where the system takes it."""
    name = text.replace("/", "_").replace("\x00", "_").replace("\ud800", "\udc80")[:60]
    return None if name.strip(". ") == "" or os.name == "nt" else name


@pytest.mark.parametrize("name", TEXTS)
def test_names_of_folders_and_images(name: str, tmp_path: Path) -> None:
    text = on_disk(TEXTS[name])
    if text is None:
        pytest.skip("no name of a file")
    folder = tmp_path / text
    for part in (text, f"{text}2"):
        (folder / part).mkdir(parents=True)
        Image.new("L", (3, 3)).save(folder / part / "plain.png")
        os.replace(folder / part / "plain.png", folder / part / f"{text}.png")
    data = load_data(str(folder))
    assert data.classes is not None
    assert all(label.isprintable() for label in data.classes)
    (folder / text / f"{text}.png").write_bytes(b"no image")
    with pytest.raises(CurvcertError) as error:
        load_data(str(folder))
    assert len(str(error.value)) < 2000 + 4 * len(str(folder))


class Bomb:
    def __reduce__(self) -> Any:
        return pytest.fail, ("the pickle was opened",)


def test_objects_in_an_npz_are_never_opened(tmp_path: Path) -> None:
    path = tmp_path / "d.npz"
    np.savez(path, x=np.array([[Bomb()]], dtype=object))
    with pytest.raises(CurvcertError, match="Python objects"):
        load_data(str(path))
