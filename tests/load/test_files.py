"""The files that people have: any batch, free sizes, several outputs, scikit-learn's operators; and refusals."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from certify_cli import load_model
from certify_cli.certificates.methods import METHODS
from certify_cli.errors import ModelError
from certify_cli.load.onnx.loader import load_onnx
from certify_cli.load.onnx.runtime import Runtime

CASES = Path(__file__).parents[2].parent / "shared" / "cases"
FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64
RANDOM = np.random.default_rng(0)


def node(operator: str, inputs: list[str], outputs: list[str], **attributes: Any) -> NodeProto:
    return helper.make_node(operator, inputs, outputs, **attributes)


def model(
    nodes: list[NodeProto],
    weights: dict[str, Any],
    shape: list[Any],
    outputs: dict[str, Any] | None = None,
    opset: int = 17,
    kind: int = FLOAT,
    functions: tuple[Any, ...] = (),
    domains: tuple[str, ...] = (),
) -> ModelProto:
    """Of the input x; `outputs`: name -> (element type, shape), or a whole type."""
    declared = []
    for name, said in (outputs or {"y": (kind, None)}).items():
        if isinstance(said, tuple):
            declared.append(helper.make_tensor_value_info(name, said[0], said[1]))
        else:
            declared.append(helper.make_value_info(name, said))
    arrays = {k: np.asarray(v, np.float32) if np.asarray(v).dtype == np.float64 else v for k, v in weights.items()}
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", kind, shape)],
        declared,
        [numpy_helper.from_array(np.asarray(a), k) for k, a in arrays.items()],
    )
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in domains)]
    return helper.make_model(graph, opset_imports=opsets, functions=list(functions), ir_version=10)


def written(folder: Path, made: ModelProto) -> Path:
    path = folder / "model.onnx"
    onnx.save(made, path)
    return path


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


MLP = {"w": normal(64, 16), "v": normal(16, 10)}
SCORES = [node("MatMul", ["x", "w"], ["a"]), node("Relu", ["a"], ["b"]), node("MatMul", ["b", "v"], ["z"])]
CONV = {"k": normal(6, 1, 8, 8), "l": normal(10, 6, 1, 1)}
CONVS = [node("Conv", ["x", "k"], ["a"]), node("Relu", ["a"], ["b"]), node("Conv", ["b", "l"], ["z"])]
FLAT = {"s": np.array([8, 64]), "w": normal(10, 64)}
FREE = {"k": normal(6, 3, 3, 3), "w": normal(10, 6)}
DEEP = [
    node("Conv", ["x", "k"], ["a"]), node("Relu", ["a"], ["b"]), node("GlobalAveragePool", ["b"], ["c"]),
    node("Flatten", ["c"], ["d"]), node("Gemm", ["d", "w"], ["y"], transB=1),
]  # fmt: skip
PAIR = normal(64, 2)
MAP = helper.make_sequence_type_proto(
    helper.make_map_type_proto(INT64, helper.make_tensor_type_proto(FLOAT, [])),
)
LABELS = {"label": (INT64, ["N"]), "probabilities": (FLOAT, ["N", 10])}
CLASSES = {"classlabels_ints": list(range(10))}
LINEAR = {"coefficients": normal(10, 64).ravel().tolist(), "intercepts": normal(10).tolist(), **CLASSES}
ML = "ai.onnx.ml"


def renamed(nodes: list[NodeProto], last: str) -> list[NodeProto]:
    """The nodes, the last one's value under another name."""
    copies = [NodeProto.FromString(n.SerializeToString()) for n in nodes]
    copies[-1].output[0] = last
    return copies


FILES: dict[str, tuple[ModelProto, tuple[int, ...]]] = {
    "a batch of eight": (
        model([node("Reshape", ["x", "s"], ["r"]), node("Gemm", ["r", "w"], ["y"], transB=1)], FLAT, [8, 1, 8, 8]),
        (1, 8, 8),
    ),
    "a batch of eight, its bias too": (
        model(
            [node("MatMul", ["x", "w"], ["a"]), node("Add", ["a", "b"], ["y"])],
            {"w": normal(64, 10), "b": np.tile(normal(1, 10), (8, 1))},
            [8, 64],
        ),
        (64,),
    ),
    "no batch axis": (model(renamed(SCORES, "y"), MLP, [64]), (64,)),
    "no batch axis, an image": (
        model(
            [node("Reshape", ["x", "s"], ["r"]), node("MatMul", ["r", "w"], ["y"])],
            {"s": np.array([64]), "w": normal(64, 10)},
            [8, 8],
        ),
        (8, 8),
    ),
    "no batch axis, an image of three channels": (
        model(
            [node("Flatten", ["x"], ["r"], axis=0), node("MatMul", ["r", "w"], ["y"])], {"w": normal(48, 10)}, [3, 4, 4]
        ),
        (3, 4, 4),
    ),
    "a matrix from the left": (
        model([node("MatMul", ["u", "x"], ["a"]), node("Relu", ["a"], ["y"])], {"u": normal(10, 64)}, [64]),
        (64,),
    ),
    "logits of four axes": (model(renamed(SCORES, "y"), MLP, [1, 1, 1, 64]), (1, 1, 64)),
    "no squeeze": (model(renamed(CONVS, "y"), CONV, ["N", 1, 8, 8]), (1, 8, 8)),
    "softmax of four axes": (
        model([*CONVS, node("Softmax", ["z"], ["y"], axis=1)], CONV, ["N", 1, 8, 8]),
        (1, 8, 8),
    ),
    "softmax below opset 13": (
        model([*CONVS, node("Softmax", ["z"], ["y"], axis=1)], CONV, ["N", 1, 8, 8], opset=11),
        (1, 8, 8),
    ),
    "squeeze of everything": (model([*CONVS, node("Squeeze", ["z"], ["y"])], CONV, [1, 1, 8, 8]), (1, 8, 8)),
    "softmax and what follows": (
        model(
            [*SCORES, node("LogSoftmax", ["z"], ["p"], axis=-1), node("Identity", ["p"], ["q"]),
             node("Reshape", ["q", "s"], ["y"])],
            MLP | {"s": np.array([-1, 10, 1])}, ["N", 64],
        ),
        (64,),
    ),
    "free height and width": (model(DEEP, FREE, ["N", 3, "H", "W"]), (3, 9, 7)),
    "all sizes free": (model(DEEP, FREE, ["N", "C", "H", "W"]), (3, 9, 7)),
    "max and min": (
        model(
            [node("MatMul", ["x", "w"], ["a"]), node("Max", ["a", "lo"], ["b"]), node("Min", ["hi", "b"], ["c"]),
             node("MatMul", ["c", "v"], ["y"])],
            MLP | {"lo": -0.3, "hi": np.full(16, 0.6)}, ["N", 64],
        ),
        (64,),
    ),
    "a bound for every unit": (
        model(
            [node("MatMul", ["x", "w"], ["a"]), node("Max", ["a", "lo"], ["b"]), node("MatMul", ["b", "v"], ["y"])],
            MLP | {"lo": normal(16)}, ["N", 64],
        ),
        (64,),
    ),
    "a slope for every channel": (
        model(
            [node("Reshape", ["x", "s"], ["r"]), node("PRelu", ["r", "p"], ["q"]), node("Flatten", ["q"], ["f"]),
             node("MatMul", ["f", "w"], ["y"])],
            {"s": np.array([-1, 4, 4, 4]), "p": normal(4, 1, 1), "w": normal(64, 10)}, ["N", 64],
        ),
        (64,),
    ),
    "a decomposed log-sigmoid": (
        model([node("Sigmoid", ["x"], ["s"]), node("Log", ["s"], ["l"]), node("MatMul", ["l", "w"], ["y"])],
              {"w": normal(64, 10)}, ["N", 64]),
        (64,),
    ),
    "max pooling padded over half of the window": (
        model(
            [node("MaxPool", ["x"], ["p"], kernel_shape=[3, 3], pads=[2, 2, 2, 2]),
             node("Flatten", ["p"], ["f"]), node("MatMul", ["f", "w"], ["y"])], {"w": normal(100, 10)}, ["N", 1, 8, 8],
        ),
        (1, 8, 8),
    ),
    "a constant condition": (
        model(
            [node("Where", ["c", "x", "o"], ["a"]), node("Neg", ["x"], ["n"]), node("Where", ["c", "a", "n"], ["b"]),
             node("MatMul", ["b", "w"], ["y"])],
            {"c": np.arange(64) % 3 > 0, "o": normal(1, 64), "w": normal(64, 10)}, ["N", 64],
        ),
        (64,),
    ),
    "max with zero": (
        model([node("MatMul", ["x", "w"], ["a"]), node("Max", ["a", "o"], ["b"]), node("MatMul", ["b", "v"], ["y"])],
              MLP | {"o": 0.0}, ["N", 64]),
        (64,),
    ),
    "clip without bounds, power one": (
        model(
            [node("Clip", ["x"], ["c"]), node("Pow", ["c", "one"], ["p"]), node("MatMul", ["p", "w"], ["a"]),
             node("Relu", ["a"], ["b"]), node("MatMul", ["b", "v"], ["y"])],
            MLP | {"one": 1.0}, ["N", 64],
        ),
        (64,),
    ),
    "constants between data": (
        model(
            [node("Concat", ["c", "x", "c"], ["j"], axis=1), node("Slice", ["j", "two", "end", "one"], ["s"]),
             node("MatMul", ["s", "w"], ["y"])],
            {"c": normal(1, 2), "two": np.array([1]), "end": np.array([66]), "one": np.array([1]), "w": normal(65, 10)},
            ["N", 64],
        ),
        (64,),
    ),
    "one logit": (model([node("MatMul", ["x", "w"], ["y"])], {"w": normal(64, 1)}, ["N", 64]), (64,)),
    "one probability": (
        model(
            [node("MatMul", ["x", "w"], ["z"]), node("Sigmoid", ["z"], ["p"]), node("Squeeze", ["p", "a"], ["y"])],
            {"w": normal(64, 1), "a": np.array([1])}, ["N", 64],
        ),
        (64,),
    ),
    "label and probabilities": (
        model(
            [*SCORES, node("Softmax", ["z"], ["probabilities"], axis=1), node("ArgMax", ["probabilities"], ["label"],
             axis=1, keepdims=0)], MLP, ["N", 64], LABELS,
        ),
        (64,),
    ),
    "logits and probabilities": (
        model(
            [*SCORES, node("Softmax", ["z"], ["p"], axis=1)], MLP, ["N", 64], {"p": (FLOAT, None), "z": (FLOAT, None)}
        ),
        (64,),
    ),
    "a linear classifier": (
        model(
            [node("LinearClassifier", ["x"], ["label", "p"], domain=ML, post_transform="SOFTMAX", **LINEAR),
             node("Normalizer", ["p"], ["probabilities"], domain=ML, norm="L1")], {}, ["N", 64], LABELS, domains=(ML,),
        ),
        (64,),
    ),
    "a linear classifier, one against the rest": (
        model(
            [node("Scaler", ["x"], ["s"], domain=ML, offset=normal(64).tolist(), scale=[0.5] * 64),
             node("LinearClassifier", ["s"], ["label", "p"], domain=ML, post_transform="LOGISTIC", **LINEAR),
             node("ZipMap", ["p"], ["m"], domain=ML, classlabels_int64s=list(range(10)))],
            {}, ["N", 64], {"label": (INT64, ["N"]), "m": MAP}, domains=(ML,),
        ),
        (64,),
    ),
    "uneven padding": (
        model(
            [node("MaxPool", ["x"], ["p"], kernel_shape=[3, 3], strides=[2, 2], pads=[0, 0, 1, 1]),
             node("Flatten", ["p"], ["f"]), node("MatMul", ["f", "w"], ["y"])], {"w": normal(16, 10)}, ["N", 1, 8, 8],
        ),
        (1, 8, 8),
    ),
    "sizes rounded up": (
        model(
            [node("MaxPool", ["x"], ["p"], kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1),
             node("AveragePool", ["p"], ["q"], kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1], ceil_mode=1,
                  count_include_pad=1),
             node("Flatten", ["q"], ["f"]), node("MatMul", ["f", "w"], ["y"])], {"w": normal(9, 10)}, ["N", 1, 8, 8],
        ),
        (1, 8, 8),
    ),
    "pads over half of the window": (
        model(
            [node("AveragePool", ["x"], ["p"], kernel_shape=[3, 3], pads=[2, 2, 2, 2]),
             node("Flatten", ["p"], ["f"]), node("MatMul", ["f", "w"], ["y"])], {"w": normal(100, 10)}, ["N", 1, 8, 8],
        ),
        (1, 8, 8),
    ),
    "global pooling along a line": (
        model([node("GlobalMaxPool", ["x"], ["p"]), node("Flatten", ["p"], ["y"])], {}, ["N", 10, 7]),
        (10, 7),
    ),
    "global pooling of a volume": (
        model([node("GlobalMaxPool", ["x"], ["p"]), node("Flatten", ["p"], ["y"])], {}, ["N", 10, 2, 3, 2]),
        (10, 2, 3, 2),
    ),
    "no declared output shape, half precision": (
        model([node("MatMul", ["x", "w"], ["y"])], {"w": normal(64, 10).astype(np.float16)}, ["N", 64],
              kind=TensorProto.FLOAT16),
        (64,),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_loads_and_predicts_as_onnxruntime(name: str, tmp_path: Path) -> None:
    """Predictions on ten inputs of several sizes, sample by sample as the file takes them."""
    made, shape = FILES[name]
    path = written(tmp_path, made)
    loaded = load_onnx(path, sample_shape=lambda: shape)
    assert loaded.input_shape == shape
    assert loaded.network.classes == (2 if "one logit" in name or "one prob" in name else 10)
    assert loaded.deployment is not None
    assert any(method.applies(loaded.network) is None for method in METHODS.values())
    x = np.random.default_rng(1).normal(size=(10, *shape)) * np.logspace(-1, 1, 10).reshape(-1, *[1] * len(shape))
    if "log-sigmoid" in name:
        x = x / 10  # float32 has nothing left of it further out
        assert any("log(sigmoid(z))" in note for note in loaded.notes)
    model_input = loaded.deployment.model_input
    dtype = helper.tensor_dtype_to_np_dtype(model_input.kind)
    x = x.astype(dtype).astype(np.float64)
    ours = loaded.network(torch.from_numpy(x))
    runtime = Runtime(path, None)
    for row, sample in enumerate(x):
        last = runtime.run(model_input.to_file_shape(sample[None]).astype(dtype))
        theirs = next(_as_row(value) for value in last if _scores(value))
        theirs = theirs[: max(1, theirs.size // (model_input.batch or 1))]
        threshold = 0.5 if "probability" in name else 0.0
        predicted = int(theirs[0] > threshold) if theirs.size == 1 else int(theirs.argmax())
        tied = (theirs == theirs.max()).sum() > 1  # probabilities that round to 1
        assert tied or predicted == int(ours[row].argmax())


def _as_row(value: Any) -> np.ndarray:
    return np.array(list(value[0].values()) if isinstance(value[0], dict) else np.ravel(value))


def _scores(value: Any) -> bool:
    """The scores among a file's outputs: floats, or a table by class."""
    array = np.asarray(value)
    return array.dtype.kind == "f" or array.dtype == object


def test_a_softmax_along_a_batch_as_long_as_the_classes_is_none_over_them(tmp_path: Path) -> None:
    """It compares samples with one another, and changes predictions."""
    nodes = [node("MatMul", ["x", "w"], ["z"]), node("Softmax", ["z"], ["y"], axis=0)]
    with pytest.raises(ModelError, match=r"\(Softmax\) is not supported"):
        load_onnx(written(tmp_path, model(nodes, {"w": normal(4, 3)}, [3, 4])))


MIXED: dict[str, tuple[list[NodeProto], dict[str, Any]]] = {
    "a product across the batch": ([node("MatMul", ["a", "x"], ["z"])], {"a": normal(3, 3)}),
    "another offset for every sample": ([node("Add", ["x", "b"], ["z"])], {"b": normal(3, 4)}),
    "another scale for every sample": ([node("Mul", ["x", "b"], ["z"])], {"b": normal(3, 4)}),
    "another bound for every sample": ([node("Max", ["x", "b"], ["z"])], {"b": normal(3, 4)}),
    "another choice for every sample": (
        [node("Where", ["c", "x", "b"], ["z"])], {"c": np.arange(12).reshape(3, 4) % 2 > 0, "b": normal(1, 4)},
    ),
    "the first sample for all": ([node("Gather", ["x", "i"], ["z"], axis=0)], {"i": np.array([0, 0, 0])}),
    "samples turned round": ([node("Gather", ["x", "i"], ["z"], axis=0)], {"i": np.array([2, 1, 0])}),
    "the batch and the features exchanged": (
        [node("MatMul", ["x", "s"], ["q"]), node("Transpose", ["q"], ["z"])], {"s": normal(4, 3)},
    ),
    "the mean of the batch": (
        [node("ReduceMean", ["x"], ["m"], axes=[0]), node("Sub", ["x", "m"], ["z"])], {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MIXED)
def test_a_fixed_batch_whose_samples_meet_is_refused(name: str, tmp_path: Path) -> None:
    nodes, weights = MIXED[name]
    width = 3 if "exchanged" in name else 4
    ends = [node("MatMul", ["z", "w"], ["y"])]
    with pytest.raises(ModelError):
        load_onnx(written(tmp_path, model([*nodes, *ends], weights | {"w": normal(width, 3)}, [3, 4], opset=13)))


# --- outputs --------------------------------------------------------------------------------------------------------


TWO = model(
    [*SCORES, node("MatMul", ["x", "u"], ["other"])],
    MLP | {"u": normal(64, 3)}, ["N", 64], {"z": (FLOAT, None), "other": (FLOAT, None), "l": (INT64, None)},
)  # fmt: skip
TWO.graph.node.append(node("ArgMax", ["z"], ["l"]))


@pytest.mark.parametrize(("name", "classes"), [("z", 10), ("other", 3)])
def test_an_output_is_chosen_by_name(name: str, classes: int, tmp_path: Path) -> None:
    loaded = load_model(written(tmp_path, TWO), output=name)
    assert loaded.network.classes == classes
    assert any(f"'{name}' is certified" in note for note in loaded.notes)


@pytest.mark.parametrize(
    ("name", "says"),
    [(None, "--output NAME"), ("nothing", "none of its outputs ('z', 'other', 'l')"), ("l", "no floating-point")],
)
def test_a_choice_that_is_none_is_refused(name: str | None, says: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError) as caught:
        load_model(written(tmp_path, TWO), output=name)
    assert says in str(caught.value)


def test_free_sizes_without_data_are_refused_with_the_option_to_give(tmp_path: Path) -> None:
    path = written(tmp_path, FILES["free height and width"][0])
    with pytest.raises(ModelError, match="--input-shape 3,32,32"):
        load_model(path)
    assert load_model(path, input_shape=(3, 5, 5)).input_shape == (3, 5, 5)
    with pytest.raises(ModelError, match="do not fit"):
        load_model(path, input_shape=(1, 5, 5))


# --- no fixed function ------------------------------------------------------------------------------------------------


def scaled(by: NodeProto, weights: dict[str, Any]) -> ModelProto:
    """x times the value r of a node, and a head."""
    nodes = [by, node("Mul", ["x", "r"], ["s"]), node("MatMul", ["s", "w"], ["y"])]
    return model(nodes, weights | {"w": normal(4, 3)}, ["N", 4])


DRAWS = {
    "RandomNormal": node("RandomNormal", [], ["r"], shape=[4], seed=1.0),
    "RandomUniform": node("RandomUniform", [], ["r"], shape=[4]),
    "RandomNormalLike": node("RandomNormalLike", ["c"], ["r"], seed=2.0),
    "RandomUniformLike": node("RandomUniformLike", ["x"], ["r"]),
    "Bernoulli": node("Bernoulli", ["c"], ["r"], seed=1.0),
    "Multinomial": node("Multinomial", ["d"], ["m"], dtype=TensorProto.INT32, sample_size=4),
}


@pytest.mark.parametrize("operator", DRAWS)
def test_random_nodes_are_refused_by_name(operator: str, tmp_path: Path) -> None:
    made = scaled(DRAWS[operator], {"c": np.full(4, 0.5), "d": np.full((1, 4), 0.5)})
    if operator == "Multinomial":
        made.graph.node.insert(1, node("Cast", ["m"], ["r"], to=FLOAT))
    with pytest.raises(ModelError, match=rf"\({operator}\) draws random numbers"):
        load_onnx(written(tmp_path, made))


@pytest.mark.parametrize("source", ["c", "x"])
def test_dropout_that_draws_is_refused(source: str, tmp_path: Path) -> None:
    weights = {"c": np.full(4, 0.5), "q": 0.5, "t": np.array(True)}
    with pytest.raises(ModelError, match=r"\(Dropout\) is in training mode"):
        load_onnx(written(tmp_path, scaled(node("Dropout", [source, "q", "t"], ["r"], seed=3), weights)))


def test_dropout_at_rest_of_a_constant_is_that_constant(tmp_path: Path) -> None:
    made = scaled(node("Dropout", ["c"], ["r"]), {"c": np.full(4, 0.5)})
    assert load_onnx(written(tmp_path, made)).network.classes == 3


# --- casts and types ------------------------------------------------------------------------------------------------


def cast(to: int, then: int | None = FLOAT) -> ModelProto:
    nodes = [node("Cast", ["x"], ["c"], to=to)]
    nodes += [node("Cast", ["c"], ["d"], to=then), node("MatMul", ["d", "w"], ["y"])]
    return model(nodes, {"w": normal(4, 3)}, ["N", 4])


@pytest.mark.parametrize("kind", [TensorProto.FLOAT16, TensorProto.BFLOAT16])
def test_a_cast_of_data_to_sixteen_bits_is_no_identity(kind: int, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"\(Cast\) rounds data to 16 bits"):
        load_onnx(written(tmp_path, cast(kind)))


def test_a_cast_to_double_and_back_is_one(tmp_path: Path) -> None:
    assert load_onnx(written(tmp_path, cast(TensorProto.DOUBLE))).network.classes == 3


def test_a_constant_that_is_cast_to_sixteen_bits_is_rounded(tmp_path: Path) -> None:
    """As onnxruntime runs it: the rounded weights, not those that are stored."""
    nodes = [
        node("Cast", ["w"], ["h"], to=TensorProto.FLOAT16), node("Cast", ["h"], ["v"], to=FLOAT),
        node("MatMul", ["x", "v"], ["y"]),
    ]  # fmt: skip
    weight = normal(4, 3)
    loaded = load_onnx(written(tmp_path, model(nodes, {"w": weight}, ["N", 4])))
    found = loaded.network(torch.eye(4, dtype=torch.float64)).numpy()
    assert np.array_equal(found, weight.astype(np.float16).astype(np.float64))


@pytest.mark.parametrize("value", [0.1, 0.7, 1.1])
def test_an_index_from_float32_constants_is_that_of_float32(value: float, tmp_path: Path) -> None:
    """floor(value * 10) of a float32 number: .7 * 10 is 6.9999999 in float32 as stored, widened 6.99999988."""
    nodes = [
        node("Mul", ["v", "ten"], ["m"]), node("Floor", ["m"], ["f"]), node("Cast", ["f"], ["i"], to=INT64),
        node("Gather", ["x", "i"], ["g"], axis=1), node("Mul", ["g", "w"], ["y"]),
    ]  # fmt: skip
    weights = {"v": np.array([value], np.float32), "ten": np.array([10], np.float32), "w": normal(1, 3)}
    made = model([*nodes[:-1], node("Mul", ["g", "w"], ["y"])], weights, ["N", 16])
    path = written(tmp_path, made)
    position = int(np.floor(np.float32(value) * np.float32(10)))
    x = torch.zeros(1, 16, dtype=torch.float64)
    x[0, position] = 1.0
    assert load_onnx(path).network(x).abs().sum() > 0


# --- functions ------------------------------------------------------------------------------------------------------


def calling(domain: str, name: str, body: list[NodeProto], opset: int = 17, function_opset: int = 17) -> ModelProto:
    function = helper.make_function(domain, name, ["a"], ["b"], body, [helper.make_opsetid("", function_opset)])
    nodes = [node(name, ["x"], ["h"], domain=domain), node("MatMul", ["h", "w"], ["y"])]
    domains = (domain,) if domain else ()
    return model(nodes, {"w": normal(4, 3)}, ["N", 4], opset=opset, functions=(function,), domains=domains)


NEGATES = [node("Neg", ["a"], ["b"])]


def test_a_function_of_the_file_is_what_runs(tmp_path: Path) -> None:
    path = written(tmp_path, calling("own", "Relu", NEGATES))
    x = np.ones((1, 4), np.float32)
    expected = Runtime(path).run(x)[0]
    assert np.allclose(load_onnx(path).network(torch.from_numpy(x).double()).numpy(), expected, atol=1e-5)


@pytest.mark.parametrize(
    "domain", ["", "ai.onnx", "com.microsoft", "com.microsoft.nchwc", "ai.onnx.ml", "org.pytorch.aten"]
)
def test_a_function_that_onnxruntime_would_not_run_is_refused(domain: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError):
        load_onnx(written(tmp_path, calling(domain, "Gelu", NEGATES)))


def test_a_function_that_is_not_inlined_is_no_operator(tmp_path: Path) -> None:
    """A function of another opset stays a call, which must not be read as the operator of that name."""
    path = written(tmp_path, calling("own", "Relu", NEGATES, function_opset=11))
    try:
        loaded = load_onnx(path)
    except ModelError as error:
        assert "cannot be inlined" in str(error)  # noqa: PT017  (either is right)
    else:
        assert not any(n.op.title == "relu" for n in loaded.network.nodes)


# --- external data --------------------------------------------------------------------------------------------------


def external(folder: Path, parts: list[bytes]) -> Path:
    """Two matrices in two files, a and b, of the bytes given."""
    made = model([node("MatMul", ["x", "a"], ["h"]), node("MatMul", ["h", "b"], ["y"])], {}, ["N", 2])
    for name, content in zip("ab", parts, strict=True):
        tensor = made.graph.initializer.add(name=name, data_type=FLOAT, dims=[2, 2], data_location=TensorProto.EXTERNAL)
        tensor.external_data.add(key="location", value=f"{name}.bin")
        tensor.external_data.add(key="length", value="16")
        (folder / f"{name}.bin").write_bytes(content)
    path = folder / "model.onnx"
    path.write_bytes(made.SerializeToString())
    return path


def test_bytes_that_move_to_the_next_file_change_the_digest(tmp_path: Path) -> None:
    content = np.arange(1, 13, dtype=np.float32).tobytes()
    digests = []
    for number, cut in enumerate((16, 20, 32)):
        folder = tmp_path / str(number)
        folder.mkdir()
        digests.append(load_onnx(external(folder, [content[:cut], content[cut:]])).info.sha256)
    assert len(set(digests)) == 3


def test_the_digest_of_one_file_is_that_file_s(tmp_path: Path) -> None:
    path = written(tmp_path, FILES["no squeeze"][0])
    assert load_onnx(path).info.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


# --- blocks ---------------------------------------------------------------------------------------------------------


def squeeze_and_excitation() -> torch.nn.Module:
    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down, self.up, self.head = torch.nn.Linear(3, 2), torch.nn.Linear(2, 3), torch.nn.Linear(3, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            share = self.up(torch.relu(self.down(x.mean((2, 3))))).sigmoid()
            return self.head((x * share[:, :, None, None]).mean((2, 3)))

    return Block()


def attention() -> torch.nn.Module:
    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = torch.nn.Linear(16, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            rows = x.flatten(2)
            return self.head(((rows @ rows.transpose(1, 2)).softmax(-1) @ rows)[:, 0])

    return Block()


def layer_norm() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LayerNorm(48), torch.nn.Linear(48, 4))


def gate() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.GLU(), torch.nn.Linear(24, 4))


BLOCKS: dict[str, tuple[Callable[[], torch.nn.Module], int]] = {
    "squeeze-and-excitation block": (squeeze_and_excitation, 17),
    "attention block": (attention, 17),
    "layer norm": (layer_norm, 17),
    "layer norm, in its parts": (layer_norm, 13),
    "gate": (gate, 17),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("block", BLOCKS)
def test_a_block_that_is_refused_is_named(block: str, tmp_path: Path) -> None:
    build, opset = BLOCKS[block]
    path = tmp_path / "model.onnx"
    torch.onnx.export(build(), (torch.rand(1, 3, 4, 4),), path, dynamo=False, opset_version=opset)
    with pytest.raises(ModelError, match=f"is part of an? {block.split(',')[0]}"):
        load_onnx(path)


# --- the shared cases -------------------------------------------------------------------------------------------------


def shared(pattern: str) -> list[Path]:
    return sorted(CASES.glob(pattern))


@pytest.mark.skipif(not shared("files/*.onnx"), reason="the shared cases are not beside this repository")
@pytest.mark.parametrize("path", shared("files/*.onnx"), ids=lambda path: path.stem)
def test_shared_file_loads(path: Path) -> None:
    loaded = load_model(path, input_shape=(3, 16, 16))
    assert loaded.network.classes == 10
    assert any(method.applies(loaded.network) is None for method in METHODS.values())


@pytest.mark.skipif(not shared("*.onnx"), reason="the shared cases are not beside this repository")
@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("random_node", "in training mode and draws random numbers"),
        ("resize_fraction", "float32 and float64 take other pixels"),
        ("resize_extrapolation", "crops an axis that it does not resize"),
    ],
)
def test_shared_case_is_refused_by_name(name: str, says: str) -> None:
    with pytest.raises(ModelError, match=says):
        load_model(CASES / f"{name}.onnx")


@pytest.mark.skipif(not shared("*.onnx"), reason="the shared cases are not beside this repository")
def test_shared_case_writes_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_model(CASES / "code_in_node_name.onnx").network.classes == 2
    assert list(tmp_path.iterdir()) == []


# --- found by strangers -----------------------------------------------------------------------------------------------


NUMBERS: dict[str, tuple[list[NodeProto], dict[str, Any]]] = {
    "a squeezed logit": (
        [node("Gemm", ["x", "w"], ["g"]), node("Squeeze", ["g", "a"], ["s"]), node("Sigmoid", ["s"], ["y"])],
        {"w": normal(4, 1), "a": np.array([1])},
    ),
    "a mean": (
        [node("ReduceMean", ["x"], ["m"], axes=[1], keepdims=0), node("Relu", ["m"], ["r"]),
         node("Unsqueeze", ["r", "a"], ["u"]), node("MatMul", ["u", "w"], ["y"])],
        {"w": normal(1, 3), "a": np.array([1])},
    ),
    "one entry": (
        [node("Gather", ["x", "i"], ["g"], axis=1), node("Min", ["g", "c"], ["r"]),
         node("Unsqueeze", ["r", "a"], ["u"]), node("MatMul", ["u", "w"], ["y"])],
        {"w": normal(1, 3), "a": np.array([1]), "i": np.array(0), "c": np.array([0.9])},
    ),
}  # fmt: skip


@pytest.mark.parametrize("method", ["lipschitz", "linear", "local-lipschitz", "auto"])
@pytest.mark.parametrize("name", NUMBERS)
def test_a_single_number_a_sample_is_certified_through(name: str, method: str, tmp_path: Path) -> None:
    from certify_cli import certify, load_data

    nodes, weights = NUMBERS[name]
    loaded = load_onnx(written(tmp_path, model(nodes, weights, ["N", 4], opset=13)))
    np.savez(tmp_path / "d.npz", x=np.random.default_rng(0).random((3, 4)).astype(np.float32))
    assert len(certify(loaded, load_data(str(tmp_path / "d.npz")), method=method).samples) == 3


def test_a_refused_fixed_batch_is_not_read_as_one_sample(tmp_path: Path) -> None:
    """y[8, 1] of x[8, 5]: eight samples of one logit, never one sample of eight classes."""
    nodes = [node("Transpose", ["x"], ["t"]), node("MatMul", ["v", "t"], ["m"]), node("Transpose", ["m"], ["u"]),
             node("Gemm", ["u", "w"], ["y"])]  # fmt: skip
    weights = {"v": normal(5, 5), "w": normal(5, 1)}
    with pytest.raises(ModelError):
        load_onnx(written(tmp_path, model(nodes, weights, [8, 5], {"y": (FLOAT, [8, 1])})))


@pytest.mark.parametrize("operator", ["Conv", "ConvTranspose"])
def test_uneven_padding_in_a_reading_without_a_batch_is_refused(operator: str, tmp_path: Path) -> None:
    nodes = [node(operator, ["x", "k"], ["a"], pads=[1, 0, 0, 1]), node("Cos", ["a"], ["b"]),
             node("Flatten", ["b"], ["y"])]  # fmt: skip
    with pytest.raises(ModelError):
        load_onnx(written(tmp_path, model(nodes, {"k": normal(3, 3, 2, 2)}, [8, 3, 4, 4])))


def test_another_constant_for_every_sample_is_not_joined(tmp_path: Path) -> None:
    nodes = [node("Concat", ["x", "c"], ["j"], axis=1), node("MatMul", ["j", "w"], ["y"])]
    with pytest.raises(ModelError, match="another constant to every sample"):
        load_onnx(written(tmp_path, model(nodes, {"c": normal(8, 1), "w": normal(4, 3)}, [8, 3])))


@pytest.mark.parametrize("name", ["Add", "Mul", "Sub", "Div", "Gather"])
def test_a_function_of_one_input_under_an_operator_s_name_does_not_abort(name: str, tmp_path: Path) -> None:
    """onnxruntime's optimiser takes the call for the operator, and reads its second input."""
    assert load_onnx(written(tmp_path, calling("own", name, NEGATES))).network.classes == 3
