"""ONNX -> Network.

    read (safely) -> interpret (one sample) -> normalise -> onnx2torch -> lower -> parity with onnx.reference

onnx2torch stays behind `_convert`. What it is given is normalised, so that it sees few operators of one opset; what it
gives is lowered, so that no layer of it is ever bounded; and the result is held to the standard's own evaluation of the
file as it was.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import ModelProto, NodeProto
from onnx.reference import ReferenceEvaluator
from torch import Tensor, fx

from certify_cli.errors import ModelError, first_line
from certify_cli.load.interpret import CORRECTED, MAX_ENTRIES, interpret
from certify_cli.load.loaded import LoadedModel
from certify_cli.load.normal import attributes_of
from certify_cli.load.normalise import normalise, to_model
from certify_cli.load.onnx_file import FLOATS, OnnxFile, read_onnx
from certify_cli.network.graph import Network
from certify_cli.network.lower import lower
from certify_cli.records import ModelInfo

EXACT_PARITY = 1e-6
"""Largest difference from the float64 interpretation of the file, relative to the largest logit. The two differ by
rounding, and by the constants of fused activations (`patterns.TOLERANCE`)."""

STORED_PARITY = {"float64": 1e-6, "float32": 1e-3, "float16": 5e-2, "bfloat16": 3e-1}
"""The same for an evaluation of the file in its own type, whose rounding it has to allow for."""

SAMPLES = 3
"""How many samples the parity checks run on; more than one, as mixing samples must show."""


def load_onnx(path: Path) -> LoadedModel:
    """The classifier in `path`, logits last.

    A trailing softmax is dropped (and noted): it changes no prediction. Raises ModelError, naming file and node, for
    everything that is unreadable, unsafe, or outside what can be certified.
    """
    file = read_onnx(path)
    source, shape, free_batch = _input(path, file)
    output = _output(path, file)
    samples = _samples(shape)
    found = interpret(path, file.graph, file.opset, source, samples[:1])
    if output not in found.values:
        raise ModelError(f"{path}: the output {output!r} does not depend on the input; export the classifier again")
    logits, notes = _before_softmax(output, found.nodes, found.shape(output))
    normal = normalise(found, logits)
    if not normal.nodes:
        raise ModelError(f"{path}: the model computes nothing; export the classifier again")
    try:
        module = _convert(path, to_model(normal, source, logits))
        names = _label(module, normal.origin)
        network = lower(module, shape, names)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from error
    _check_parity(path, file, network, source, logits, samples, found.values[logits], free_batch)
    if file.stored_dtype in ("float16", "bfloat16"):
        notes.append(f"the weights are stored in {file.stored_dtype} and upcast exactly to float64")
    info = ModelInfo(str(path), file.sha256, "onnx", file.opset, network.classes)
    return LoadedModel(network, info, shape, file.stored_dtype, tuple(notes))


def _input(path: Path, file: OnnxFile) -> tuple[str, tuple[int, ...], bool]:
    """The input's name, its shape without the batch, and whether the batch is free."""
    initialised = {tensor.name for tensor in file.graph.initializer}
    inputs = [value for value in file.graph.input if value.name not in initialised]
    if len(inputs) != 1:
        raise ModelError(
            f"{path}: the model has {len(inputs)} inputs ({', '.join(value.name for value in inputs)}); "
            "export a classifier of one input"
        )
    value = inputs[0]
    tensor = value.type.tensor_type
    if tensor.elem_type not in FLOATS:
        raise ModelError(
            f"{path}: the input {value.name!r} is not a floating-point tensor; export one that takes floats"
        )
    dims = [dim.dim_value if dim.HasField("dim_value") else 0 for dim in tensor.shape.dim]
    if len(dims) < 2 or any(size <= 0 for size in dims[1:]):
        shown = [dim.dim_param or (dim.dim_value if dim.HasField("dim_value") else "?") for dim in tensor.shape.dim]
        raise ModelError(
            f"{path}: the input {value.name!r} of shape {shown} must be a batch of samples of one fixed size; "
            "export it with only the batch free"
        )
    if int(np.prod(dims[1:], dtype=np.float64)) > MAX_ENTRIES:
        raise ModelError(f"{path}: the input {value.name!r} of shape {dims} is too large to certify")
    return value.name, tuple(dims[1:]), dims[0] <= 0


def _output(path: Path, file: OnnxFile) -> str:
    names = [value.name for value in file.graph.output]
    if len(names) != 1:
        raise ModelError(f"{path}: the model has {len(names)} outputs ({', '.join(names)}); export only the logits")
    return str(names[0])


def _samples(shape: tuple[int, ...]) -> np.ndarray:
    """A few images' worth of numbers in [0, 1], representable in every stored type."""
    random = np.random.default_rng(0).integers(0, 129, size=(SAMPLES, *shape))
    return random / 128.0


def _before_softmax(output: str, nodes: list[NodeProto], shape: tuple[int, ...]) -> tuple[str, list[str]]:
    """The value in front of a softmax over the classes that ends the model, and the note about it."""
    maker = next((node for node in nodes if output in node.output), None)
    if maker is None or maker.op_type not in ("Softmax", "LogSoftmax"):
        return output, []
    # before opset 13 the default axis is 1 and the rest is flattened, which is the same on two axes
    if len(shape) != 2 or int(attributes_of(maker).get("axis", 1)) not in (1, -1):
        return output, []
    return maker.input[0], [
        f"the final {maker.op_type} is left out: it changes no prediction, and margins are of logits"
    ]


def _convert(path: Path, model: ModelProto) -> fx.GraphModule:
    """onnx2torch's module for a normalised model."""
    from certify_cli.load.torchvision_schemas import import_torchvision

    import_torchvision()
    from onnx2torch import convert

    from certify_cli.load import converters, onnx_layers  # noqa: F401  (register with onnx2torch and with the lowering)

    try:
        return convert(model).eval()  # a normalised model holds no layer in training mode
    except NotImplementedError as error:
        raise ModelError(f"cannot be converted: {first_line(error)}; replace the layer") from error


def _label(module: fx.GraphModule, origin: dict[str, NodeProto]) -> dict[str, str]:
    """Tell each converted layer which operator of the file it stands for; the file's names by module path."""
    names = {}
    for path, name in zip((n.target for n in module.graph.nodes if n.op == "call_module"), origin, strict=True):
        layer = module.get_submodule(str(path))
        layer.onnx_type = origin[name].op_type  # type: ignore[assignment]
        names[str(path)] = name
    return names


# --- parity -----------------------------------------------------------------------------------------------------


def _check_parity(
    path: Path,
    file: OnnxFile,
    network: Network,
    source: str,
    logits: str,
    samples: np.ndarray,
    interpreted: np.ndarray,
    free_batch: bool,
) -> None:
    """The network against the file: in float64 on one sample, in the file's type on all, and as a batch."""
    with torch.no_grad():
        together = network(torch.from_numpy(samples))
        singly = torch.cat([network(torch.from_numpy(sample[None])) for sample in samples])
    _compare(path, "a batch of samples differs from the same samples one by one", together, singly, 1e-9)
    first = torch.from_numpy(interpreted.reshape(1, -1))
    _compare(path, "the loaded network differs from the file evaluated in float64", together[:1], first, EXACT_PARITY)
    reference = _reference(path, file, source, logits, samples, free_batch)
    tolerance = STORED_PARITY[file.stored_dtype]
    _compare(
        path, "the loaded network differs from the file evaluated by onnx.reference", together, reference, tolerance
    )


def _compare(path: Path, what: str, left: Tensor, right: Tensor, tolerance: float) -> None:
    if left.shape != right.shape:
        raise ModelError(f"{path}: {what} in shape, {tuple(left.shape)} against {tuple(right.shape)}; please report it")
    scale = float(right.abs().max())
    off = float((left - right).abs().max())
    if not off <= tolerance * max(scale, 1e-6):
        raise ModelError(f"{path}: {what} by {off:.3g} on logits of size {scale:.3g}; please report it with the model")


def _reference(path: Path, file: OnnxFile, source: str, logits: str, samples: np.ndarray, free_batch: bool) -> Tensor:
    """Logits of the file as it is, in its own type: as one batch where its batch is free, else sample by sample."""
    model = ModelProto()
    model.CopyFrom(file.model)
    del model.graph.output[:]
    model.graph.output.append(onnx.ValueInfoProto(name=logits))
    declared = next(value for value in model.graph.input if value.name == source)
    dtype = onnx.helper.tensor_dtype_to_np_dtype(declared.type.tensor_type.elem_type)
    batches = [samples] if free_batch else [sample[None] for sample in samples]
    try:
        run: Any = ReferenceEvaluator(model, new_ops=CORRECTED).run
        with np.errstate(all="ignore"):
            outputs = [run([logits], {source: batch.astype(dtype)})[0] for batch in batches]
    except Exception as error:  # the evaluator raises whatever numpy does
        raise ModelError(
            f"{path}: the file cannot be evaluated by onnx.reference ({first_line(error)}); export it anew"
        ) from error
    rows = np.concatenate([np.asarray(output, dtype=np.float64) for output in outputs])
    return torch.from_numpy(rows.reshape(rows.shape[0], -1))
