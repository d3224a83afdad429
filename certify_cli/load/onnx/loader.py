"""ONNX -> Network.

    read (safely, under neutral names) -> interpret (one sample) -> normalise -> onnx2torch -> lower
        -> check each subgraph, and the whole against the float64 evaluation and onnxruntime

Only `_convert` uses onnx2torch. Its input is normalised, so that it meets few operators, of one opset, under neutral
names; its output is lowered, so that no bound depends on its layers.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from onnx import ModelProto
from torch import fx

from certify_cli.errors import ModelError, first_line
from certify_cli.load.loaded_model import Deployment, LoadedModel
from certify_cli.load.onnx import parity, subgraph_checks
from certify_cli.load.onnx.file import OnnxFile, read_onnx
from certify_cli.load.onnx.interpret import interpret
from certify_cli.load.onnx.logits import logits as logits_of
from certify_cli.load.onnx.model_input import ModelInput, Shape, readings
from certify_cli.load.onnx.normalise import normalise, to_model
from certify_cli.load.onnx.outputs import leading_to
from certify_cli.load.onnx.probes import images
from certify_cli.load.onnx.rewriting import RewrittenGraph
from certify_cli.network.lowering.fx_graph import lower_traced
from certify_cli.records import ModelInfo


def no_data() -> Shape | None:
    """The default of `sample_shape`: there are no data."""
    return None


def load_onnx(
    path: Path,
    *,
    output: str | None = None,
    sample_shape: Callable[[], Shape | None] = no_data,
    layout: str | None = None,
) -> LoadedModel:
    """The classifier in `path`; its last node holds the logits.

    A trailing softmax is dropped, with a note: it changes no prediction.
    output: name of the output that holds the logits, where there are several.
    sample_shape: returns the shape of the data's samples, channels first; called only where the file leaves sizes free.
    layout: the order in which the model reads such samples.
    ModelError, naming file and node, for files that are unreadable, unsafe or cannot be certified.
    """
    file = read_onnx(path, output)
    refusal: ModelError | None = None
    for model_input in readings(path, file.inputs, file.graph.named, sample_shape, layout):
        if refusal is not None and file.rows == file.inputs[0].type.tensor_type.shape.dim[0].dim_value:
            break  # as many rows of the output as of the input: the first axis is a batch
        try:
            return _load(path, file, model_input)
        except ModelError as error:
            # a reading in which some value has no batch axis is not the right one
            refusal = error if refusal is None or "keep the batch" in str(refusal) else refusal
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "allocate memory" not in str(error):
                raise
            raise ModelError(f"{path}: loading it takes more memory than there is ({first_line(error)})") from error
    assert refusal is not None, "a file has at least one reading"
    raise refusal


def _load(path: Path, file: OnnxFile, model_input: ModelInput) -> LoadedModel:
    end = file.graph.named(file.output)
    nodes = leading_to(end, file.graph.nodes)
    trace = interpret(path, file.graph, nodes, file.opset, model_input, images(model_input.shape)[:1])
    if end not in trace.values:
        raise ModelError(f"{path}: the output does not depend on the input; export the classifier again")
    logits, tail, notes = logits_of(trace, end)
    rewritten = normalise(trace, logits)
    if not rewritten.nodes:
        raise ModelError(f"{path}: the model computes nothing; export the classifier again")
    try:
        module = _convert(to_model(rewritten, model_input.source))
        names, values = _label(module, rewritten)
        network, node_of = lower_traced(module, model_input.shape, names)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from error
    subgraph_checks.check(rewritten, network, {values[at]: index for at, index in node_of.items()}, model_input.source)
    notes = [*file.notes, *notes, *parity.check(path, file, trace, network, logits, tail)]
    if trace.size(logits) == 1:
        notes.append("its one logit z is read as the two logits (0, z): class 1 where z is positive")
    if file.stored_dtype in ("float16", "bfloat16"):
        notes.append(f"the weights are stored in {file.stored_dtype} and upcast exactly to float64")
    info = ModelInfo(str(path), file.sha256, "onnx", file.opset, network.classes)
    threshold = 0.5 if tail and trace.size(logits) == 1 else 0.0
    deployment = Deployment(model_input, file.output, threshold)
    return LoadedModel(network, info, model_input.shape, file.stored_dtype, tuple(notes), deployment)


def _convert(model: ModelProto) -> fx.GraphModule:
    """onnx2torch's module for a normalised model."""
    from certify_cli.torchvision_schemas import deferred_torchvision

    with deferred_torchvision():
        from onnx2torch import convert

        from certify_cli.load.onnx import converters, layers  # noqa: F401  (register with onnx2torch and the lowering)

    try:
        return convert(model).eval()  # a normalised model holds no layer in training mode
    except NotImplementedError as error:
        raise ModelError(f"cannot be converted: {first_line(error)}; replace the layer") from error


def _label(module: fx.GraphModule, rewritten: RewrittenGraph) -> tuple[dict[str, str], dict[str, str]]:
    """By module path: the file's name for the layer, and the name of its value. Sets each layer's `onnx_type`."""
    names, values = {}, {}
    paths = [str(n.target) for n in module.graph.nodes if n.op == "call_module"]
    for path, node in zip(paths, rewritten.nodes, strict=True):
        origin = rewritten.trace.origin[rewritten.origin[node.name]]
        module.get_submodule(path).onnx_type = origin.operator  # type: ignore[assignment]
        names[path], values[path] = origin.name, node.output[0]
    return names, values
