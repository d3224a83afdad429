"""Names in ONNX files are text from outside: they reach no generated code, attribute, path or terminal."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from certify_cli.cli.inspect import as_text, describe
from certify_cli.errors import LONGEST_NAME, ModelError, shown
from certify_cli.load.onnx.loader import load_onnx
from certify_cli.output.document import View
from certify_cli.torchvision_schemas import import_torchvision

CODE = 'a"); __import__("pathlib").Path("written").touch(); ("'
HOSTILE = {
    "code": CODE,
    "code in single quotes": CODE.replace('"', "'"),
    "line": "a\nimport os\nos.mkdir('written')",
    "carriage return": "a\rb",
    "escape": "\x1b[31mred\x1b[0m",
    "bidirectional": "a\u202eb\u2066c",
    "zero byte": "a\x00b",
    "long": "x" * 100_000,
    "dots": "../../a.b..c",
    "module attribute": "forward",
    "training": "training",
    "dunder": "__class__",
    "ours": "v0",
    "our node": "n1",
    "markup": "[red]<script>${{x}}|`",
    "blank": "   ",
}


def network(names: dict[str, str], function: bool = False) -> onnx.ModelProto:
    """Gemm, Tanh, Gemm under the given names; `function` puts the first one into a function of the file's own."""

    def called(key: str) -> str:
        return names.get(key, key)

    random = np.random.default_rng(0)
    first, second = (random.normal(size=shape).astype(np.float32) for shape in ((3, 4), (4, 2)))
    x, y, w, h = called("x"), called("y"), called("w"), called("h")
    nodes = [
        helper.make_node("MatMul", [x, w], [h], name=called("node"), domain=called("domain") if function else ""),
        helper.make_node("Tanh", [h], ["t"], name="second"),
        helper.make_node("MatMul", ["t", "w2"], [y], name="third"),
    ]
    graph = helper.make_graph(
        nodes,
        called("graph"),
        [helper.make_tensor_value_info(x, TensorProto.FLOAT, [called("axis"), 3])],
        [helper.make_tensor_value_info(y, TensorProto.FLOAT, [called("axis"), 2])],
        [numpy_helper.from_array(first, w), numpy_helper.from_array(second, "w2")],
        doc_string=called("doc"),
    )
    opsets, functions = [helper.make_opsetid("", 13)], []
    if function:
        domain = called("domain")
        body = [helper.make_node("MatMul", ["a", "b"], [called("inner")], name=called("inside"))]
        functions = [helper.make_function(domain, "MatMul", ["a", "b"], [called("inner")], body, opsets)]
        opsets = [*opsets, helper.make_opsetid(domain, 1)]
    model = helper.make_model(graph, opset_imports=opsets, functions=functions, ir_version=8)
    helper.set_model_props(model, {called("key"): called("value")})
    return model


PLACES = ("x", "y", "w", "h", "node", "graph", "axis", "doc", "key", "value")
IN_FUNCTION = ("domain", "inner", "inside", "h", "node")


def outcome(model: onnx.ModelProto, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Load, inspect and lower; the refusal, or the text of `inspect`."""
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    monkeypatch.chdir(folder)
    import_torchvision()  # before onnx2torch does
    import onnx2torch

    convert, seen = onnx2torch.convert, []

    def spied(normal: onnx.ModelProto) -> Any:
        seen.append(normal)
        module = convert(normal)
        seen.append(module.code)
        return module

    monkeypatch.setattr(onnx2torch, "convert", spied)
    try:
        loaded = load_onnx(path)
    except ModelError as error:
        return str(error)
    normal, code = seen
    for node in normal.graph.node:
        assert re.fullmatch(r"n\d+", node.name)
        assert all(re.fullmatch(r"v\d+", name) for name in (*node.input, *node.output))
    assert all(re.fullmatch(r"v\d+", tensor.name) for tensor in normal.graph.initializer)
    assert not {"import", "open(", "touch", "mkdir"} & set(re.findall(r"\w+\(?", code))
    expected = loaded.network(torch.ones(1, 3, dtype=torch.float64))
    weights = [torch.from_numpy(numpy_helper.to_array(t).astype(np.float64)) for t in model.graph.initializer]
    assert torch.allclose(expected, (torch.ones(1, 3).double() @ weights[0]).tanh() @ weights[1])
    return as_text(describe(loaded), View())


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_name_is_data(name: str, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = outcome(network({place: HOSTILE[name]}), tmp_path, monkeypatch)
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
    assert all(letter.isprintable() or letter == "\n" for letter in text)
    assert max(map(len, text.splitlines())) < 600


@pytest.mark.parametrize("place", IN_FUNCTION)
@pytest.mark.parametrize("name", HOSTILE)
def test_in_a_function_of_the_file(name: str, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = outcome(network({"domain": "own"} | {place: HOSTILE[name]}, function=True), tmp_path, monkeypatch)
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
    assert all(letter.isprintable() or letter == "\n" for letter in text)


def test_a_file_under_plain_names_loads_with_and_without_functions(tmp_path: Path) -> None:
    """The tables above would hold if nothing loaded at all."""
    for function in (False, True):
        (tmp_path / "model.onnx").write_bytes(network({"domain": "own"}, function).SerializeToString())
        assert load_onnx(tmp_path / "model.onnx").network.classes == 2


@pytest.mark.parametrize("name", HOSTILE)
def test_attributes_and_operators_of_hostile_names_are_refused(name: str, tmp_path: Path) -> None:
    """onnx.reference would set an attribute of that name on an object of its own."""
    path = tmp_path / "model.onnx"
    for change in ("attribute", "operator"):
        model = network({})
        if change == "attribute":
            model.graph.node[1].attribute.append(helper.make_attribute(HOSTILE[name], 1.0))
        else:
            model.graph.node[1].op_type = HOSTILE[name]
        path.write_bytes(model.SerializeToString())
        with pytest.raises(ModelError) as caught:
            load_onnx(path)
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("text", HOSTILE.values(), ids=list(HOSTILE))
def test_shown_is_one_printable_line(text: str) -> None:
    assert shown(text).isprintable()
    assert len(shown(text)) <= LONGEST_NAME


COLLIDING = ("z/constant/2", "z/part/3", "r/constant/0", "a/sorted/b", "v7", "v11", "n2", "s", "/sorted/", "t/part/1")


@pytest.mark.parametrize("name", COLLIDING)
def test_no_name_is_taken_for_one_of_ours(name: str, tmp_path: Path) -> None:
    """A margin of 101 at zero, one constant named as the loader might name its own: 101 it stays."""
    eye = np.eye(2, dtype=np.float32)
    weights = {
        "W1": eye, "b1": np.zeros(2, np.float32), name: np.array([[100.0, 0.0]], np.float32),
        "c": np.array([[1.0, 0.0]], np.float32), "W2": eye, "b2": np.zeros(2, np.float32),
    }  # fmt: skip
    nodes = [
        helper.make_node("Gemm", ["x", "W1", "b1"], ["z"], transB=1, alpha=1.0, beta=0.5),
        helper.make_node("Relu", ["z"], ["r"]),
        helper.make_node("Add", ["r", name], ["sum"]),
        helper.make_node("Add", ["sum", "c"], ["t"]),
        helper.make_node("Gemm", ["t", "W2", "b2"], ["y"], transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 2])],
        [numpy_helper.from_array(array, key) for key, array in weights.items()],
    )
    path = tmp_path / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), path)
    logits = load_onnx(path).network(torch.zeros(1, 2, dtype=torch.float64))
    assert logits.tolist() == [[101.0, 0.0]]


def test_sorted_pairs_of_values_whose_names_run_together(tmp_path: Path) -> None:
    """max(a/sorted/b, c) and max(a, b/sorted/c) are two pairs."""
    nodes = [
        helper.make_node("Mul", ["x", "two"], ["a/sorted/b"]),
        helper.make_node("Mul", ["x", "three"], ["c"]),
        helper.make_node("Neg", ["x"], ["a"]),
        helper.make_node("Mul", ["x", "five"], ["b/sorted/c"]),
        helper.make_node("Max", ["a/sorted/b", "c"], ["p"]),
        helper.make_node("Max", ["a", "b/sorted/c"], ["q"]),
        helper.make_node("Add", ["p", "q"], ["y"]),
    ]
    weights = {key: np.array(value, np.float32) for key, value in (("two", 2), ("three", 3), ("five", 5))}
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 2])],
        [numpy_helper.from_array(array, key) for key, array in weights.items()],
    )
    path = tmp_path / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), path)
    x = torch.tensor([[1.0, -1.0]], dtype=torch.float64)
    assert load_onnx(path).network(x).tolist() == [[8.0, -1.0]]
