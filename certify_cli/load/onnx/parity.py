"""The loaded network against the file as a whole: evaluated in float64, and as onnxruntime runs it.

The logits are compared, each relative to its own size, on the inputs of `probes`; then the predicted class.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from onnx import ModelProto, NodeProto, ValueInfoProto, helper
from torch import Tensor

from certify_cli.errors import ModelError, shown
from certify_cli.load.onnx.file import OnnxFile
from certify_cli.load.onnx.interpret import Trace, compute, widen, widened
from certify_cli.load.onnx.model_input import ModelInput
from certify_cli.load.onnx.probes import IMAGES, images, probes, rows_at_once
from certify_cli.load.onnx.runtime import NotRunnableError, Runtime
from certify_cli.network.activations import Activation
from certify_cli.network.graph import Network

EXACT_PARITY = 1e-6
"""Largest difference from the file evaluated in float64, relative to the largest logit. The two differ by rounding, and
by the constants of fused activations (`patterns.TOLERANCE`)."""

STORED_PARITY = {"float64": 1e-6, "float32": 1e-3, "float16": 5e-2, "bfloat16": 3e-1}
"""Largest difference from an evaluation in the file's own type, relative to each logit: allows for its rounding."""
UNITS = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
NOISE = 100
"""Factor allowed on the difference that float32 makes to the network itself, scaled to the file's type."""

FAR = 1e12
"""Largest probe: beyond it float32 overflows. Neurons that respond only there are left to the checks of subgraphs."""

UNSTABLE = {"log_sigmoid": -6.0}
"""Activation -> argument below which its form log(sigmoid(z)) is not compared: float32 loses it, since onnxruntime's
sigmoid is at least 1.5e-8."""


def check(
    path: Path,
    file: OnnxFile,
    trace: Trace,
    network: Network,
    logits: str,
    tail: Sequence[NodeProto],
) -> list[str]:
    """ModelError where the network does not compute what the file does. Returns notes for the user.

    logits: neutral name of the value that the network computes.   tail: the nodes between it and the output.
    """
    model_input, samples = trace.model_input, images(trace.model_input.shape)
    with torch.no_grad():
        together = network(torch.from_numpy(samples))
        singly = torch.cat([network(torch.from_numpy(sample[None])) for sample in samples])
    _compare(path, "a batch of samples differs from the same samples one by one", together, singly)
    first = torch.from_numpy(as_logits(trace.samples(logits, trace.values[logits])[:1].reshape(1, -1)))
    _compare(path, "the loaded network differs from the file evaluated in float64", together[:1], first)

    points = probes(network, samples)
    stored = np.dtype(np.float64 if file.stored_dtype == "float64" else np.float32)
    with np.errstate(over="ignore"):
        points = points.astype(stored).astype(np.float64)
    points = points[np.abs(points).reshape(len(points), -1).max(1) <= FAR][: rows_at_once(network)]
    try:
        _check_folds(path, file, trace)
        run, name, notes = _by_runtime(path, file, logits, model_input), "onnxruntime", []
        computed = run(points)
    except NotRunnableError as error:
        run, name = _by_reference(file, trace, logits), "onnx.reference"
        notes = [f"onnxruntime does not run the file ({error}); it was compared with onnx.reference"]
        points = points[: IMAGES + 2]
        computed = run(points)
    if any(getattr(node.op, "name", "") in UNSTABLE for node in network.nodes):
        notes.append(
            "it computes log(sigmoid(z)) in two steps, of which float32 keeps nothing for z below -18: radii are about "
            "exact arithmetic, and samples with such values may be predicted otherwise where the file is run"
        )
    kept = ~unstable(network, points)
    points, computed = points[kept], computed.at(kept)
    _compare_stored(
        path, file.stored_dtype, network, points, computed, name, lambda z: _outputs_of(trace, logits, tail, z)
    )
    return notes


def as_logits(rows: np.ndarray) -> np.ndarray:
    """Logits, a row per sample; a single logit z as (0, z)."""
    return np.concatenate([np.zeros_like(rows), rows], axis=1) if rows.shape[1] == 1 else rows


def _compare(path: Path, what: str, left: Tensor, right: Tensor) -> None:
    if left.shape != right.shape:
        raise ModelError(f"{path}: {what} in shape, {tuple(left.shape)} against {tuple(right.shape)}; please report it")
    scale = float(right.abs().max())
    off = float((left - right).abs().max())
    if not off <= EXACT_PARITY * max(scale, 1e-6):
        raise ModelError(f"{path}: {what} by {off:.3g} on logits of size {scale:.3g}; please report it with the model")


@dataclass(frozen=True, eq=False)
class FileOutputs:
    """What the file computes, one row per point.

    logits: None where they are inside a function or an operator of ai.onnx.ml.   outputs: the file's output tensor.
    """

    logits: np.ndarray | None
    outputs: np.ndarray

    def at(self, rows: np.ndarray) -> FileOutputs:
        return FileOutputs(None if self.logits is None else self.logits[rows], self.outputs[rows])


Run = Callable[[np.ndarray], FileOutputs]


def _by_runtime(path: Path, file: OnnxFile, logits: str, model_input: ModelInput) -> Run:
    """Runs the file in onnxruntime, with the logits as a further output where they have a name in it."""
    model = ModelProto()
    model.CopyFrom(file.model)
    names = [file.output]
    called = file.graph.called.get(logits)
    inside = {name for node in model.graph.node for name in node.output}
    if called is not None and called != file.output and called in inside:
        model.graph.output.append(ValueInfoProto(name=called))
        names.append(called)
    dtype = helper.tensor_dtype_to_np_dtype(model_input.kind)
    if dtype.kind != "f":
        raise NotRunnableError(f"its input is of type {dtype}")
    runtime = Runtime(model, names)

    def answered(feed: np.ndarray) -> list[np.ndarray]:
        samples = len(feed) if model_input.batch != 0 else 1
        arrays = [array.astype(np.float64) for array in runtime.run(feed.astype(dtype))]
        if any(array.size % samples for array in arrays):
            raise ModelError(
                f"{path}: of {samples} samples the file gives values of shapes {[list(a.shape) for a in arrays]}; "
                "every value must keep the batch on its first axis"
            )
        return [array.reshape(samples, -1) for array in arrays]

    def run(points: np.ndarray) -> FileOutputs:
        rows: list[list[np.ndarray]] = [[] for _ in names]
        with np.errstate(over="ignore"):
            feeds = model_input.feeds(points)
            try:
                found = [answered(feed) for feed in feeds]
            except NotRunnableError:
                if model_input.batch is not None:
                    raise
                found = [answered(point[None]) for point in points]  # its batch is free in name only
        for arrays in found:
            for row, array in zip(rows, arrays, strict=True):
                row.append(array)
        joined = [np.concatenate(row)[: len(points)] for row in rows]
        own = joined[1] if len(names) > 1 else joined[0] if called == file.output else None
        return FileOutputs(None if own is None else as_logits(own), joined[0])

    return run


def _check_folds(path: Path, file: OnnxFile, trace: Trace) -> None:
    """ModelError where a constant that was computed in loading differs from onnxruntime's.

    Constants are compared by themselves, since one that feeds an inactive neuron does not show in any logit.
    """
    inside = {name for node in file.model.graph.node for name in node.output}
    read = dict.fromkeys(value for node in trace.nodes for value in node.input if value in trace.constants)
    folded = {name: called for name in read if (called := file.graph.called.get(name, "")) in inside}
    if not folded:
        return
    model = ModelProto()
    model.CopyFrom(file.model)
    del model.graph.output[:]
    model.graph.output.extend(ValueInfoProto(name=called) for called in folded.values())
    dtype = helper.tensor_dtype_to_np_dtype(trace.model_input.kind)
    feed = trace.model_input.to_file_shape(images(trace.model_input.shape)[:1]).astype(dtype)
    for (name, called), array in zip(folded.items(), Runtime(model, list(folded.values())).run(feed), strict=True):
        ours, theirs = trace.constants[name], widen(array)
        if ours.shape != theirs.shape:
            raise ModelError(
                f"{path}: the constant '{shown(called)}' was computed in the shape {list(ours.shape)}, onnxruntime "
                f"gives {list(theirs.shape)}; please report it with the model"
            )
        noise = np.abs(widen(trace.native[name]) - ours) if name in trace.native else 0.1 * np.abs(ours)
        allowed = 0.0 if ours.dtype.kind != "f" else STORED_PARITY["float32"] * np.abs(ours) + NOISE * noise + 1e-30
        if not (np.abs(ours - theirs.astype(ours.dtype if ours.dtype.kind == "f" else np.float64)) <= allowed).all():
            raise ModelError(
                f"{path}: the constant '{shown(called)}' was computed otherwise than onnxruntime does; please report "
                "it with the model"
            )


def _by_reference(file: OnnxFile, trace: Trace, logits: str) -> Run:
    """Evaluates the file node by node in its own types, sample by sample."""
    model_input = trace.model_input
    dtype = helper.tensor_dtype_to_np_dtype(model_input.kind)

    def one(sample: np.ndarray) -> np.ndarray:
        values: dict[str, Any] = {model_input.source: model_input.to_file_shape(sample.astype(dtype))}
        for node in trace.nodes:
            operands = [values.get(v, trace.native.get(v, trace.constants.get(v))) if v else None for v in node.input]
            values.update(zip(node.output, compute(trace, node, operands), strict=False))
            if logits in values:
                break
        return widen(trace.samples(logits, np.asarray(values[logits])))[:1].reshape(1, -1)

    def run(points: np.ndarray) -> FileOutputs:
        rows = as_logits(np.concatenate([one(point[None]) for point in points]))
        return FileOutputs(rows, rows)

    return run


def _outputs_of(trace: Trace, logits: str, tail: Sequence[NodeProto], z: np.ndarray) -> np.ndarray:
    """The file's outputs for logits z, one row per sample: the nodes of `tail` applied."""
    rows = []
    for row in z:
        array = trace.to_file_shape(logits, row[-trace.size(logits) :].reshape(trace.shape(logits)))
        for node in tail:
            operands = [array, *(trace.constants.get(value) for value in node.input[1:])]
            array = widened(trace, node, operands)[0]
        rows.append(array.ravel()[: trace.size(logits)])
    return np.stack(rows)


def _compare_stored(
    path: Path,
    stored: str,
    network: Network,
    points: np.ndarray,
    computed: FileOutputs,
    name: str,
    outputs_of: Callable[[np.ndarray], np.ndarray],
) -> None:
    """ModelError where a logit differs by more than STORED_PARITY and NOISE allow, or a clear prediction differs."""
    with torch.no_grad():
        ours = network(torch.from_numpy(points)).numpy()
    noise = noise_of(network, points, ours)
    unit = UNITS[stored] / UNITS["float32"]
    allowed = STORED_PARITY[stored] * np.abs(ours) + NOISE * unit * noise + 1e-30
    if computed.logits is not None:
        _refuse_difference(path, name, "logits", ours, computed.logits, allowed)
    else:
        outputs = outputs_of(ours)
        spread = allowed.max(1, keepdims=True) * np.maximum(1, np.abs(outputs))
        _refuse_difference(path, name, "outputs", outputs, computed.outputs, spread)
    finite = np.isfinite(computed.outputs).all(1)
    top = np.sort(ours, axis=1)
    clear = finite & (top[:, -1] - top[:, -2] > 2 * allowed.max(1))
    both = computed.logits if computed.logits is not None else computed.outputs
    if both.shape[1] == 1:  # a probability of class 1
        both = np.concatenate([1 - both, both], axis=1)
    wrong = clear & (both.argmax(1) != ours.argmax(1)) & _untied(both)
    if wrong.any():
        raise ModelError(
            f"{path}: {name} predicts another class than the loaded network; please report it with the model"
        )


def _untied(values: np.ndarray) -> np.ndarray:
    """Which rows have a single largest entry; probabilities of large logits may round to the same number."""
    top = np.sort(values, axis=1)
    return top[:, -1] > top[:, -2]


def _refuse_difference(
    path: Path, name: str, what: str, ours: np.ndarray, theirs: np.ndarray, allowed: np.ndarray
) -> None:
    if ours.shape != theirs.shape:
        raise ModelError(
            f"{path}: the loaded network has {what} of shape {ours.shape[1:]}, {name} gives {theirs.shape[1:]}; "
            "please report it with the model"
        )
    finite = np.isfinite(theirs)  # float32 overflows where float64 does not
    off = np.where(finite, np.abs(ours - np.where(finite, theirs, 0.0)), 0.0)
    if not (off <= allowed).all() or not finite[:IMAGES].all():
        row, entry = np.unravel_index(int((off / allowed).argmax()), off.shape)
        raise ModelError(
            f"{path}: the loaded network differs from the file evaluated by {name}: number {entry} of its {what} is "
            f"{ours[row, entry]:.6g}, there {theirs[row, entry]:.6g}; please report it with the model"
        )


def noise_of(network: Network, points: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """Estimate (n, classes) of the change that float32 makes to the network's logits, which are `exact` in float64.

    Weights and values are rounded to float32, and each activation's value is moved by the rounding of its argument plus
    1, since its formula in the file is unknown. A single error may be small by chance: at each point the largest error
    at points no farther out counts.
    """
    if not len(points):
        return np.zeros((0, network.classes))
    random = torch.Generator().manual_seed(0)
    values = [torch.from_numpy(points).to(torch.float32)]
    with torch.no_grad():
        for node in in_float32(network).nodes[1:]:
            arguments = [values[i] for i in node.inputs]
            value = node.op.apply(*arguments)
            if isinstance(node.op, Activation):
                sign = 2.0 * torch.randint(0, 2, value.shape, generator=random, dtype=value.dtype) - 1.0
                value = value + UNITS["float32"] * (1 + arguments[0].abs()) * sign
            values.append(value)
    errors = (values[-1].double() - torch.from_numpy(exact)).abs().nan_to_num(nan=np.inf, posinf=np.inf).numpy()
    sizes = np.abs(points).reshape(len(points), -1).max(1)
    nearer = (sizes[None, :] <= 1.01 * sizes[:, None]) | np.eye(len(sizes), dtype=bool)
    return np.stack([errors[row].max(0) for row in nearer])


def in_float32(network: Network) -> Network:
    """The network with its weights rounded to float32."""
    nodes = []
    for node in network.nodes:
        rounded = {
            item.name: value.to(torch.float32)
            for item in fields(node.op)  # type: ignore[arg-type]
            if isinstance(value := getattr(node.op, item.name), Tensor) and value.is_floating_point()
        }
        nodes.append(replace(node, op=replace(node.op, **rounded)) if rounded else node)  # type: ignore[type-var]
    return Network(tuple(nodes))


def unstable(network: Network, points: np.ndarray) -> np.ndarray:
    """(n,): whether the file's own formula fails in float32 at a point, which is then not compared."""
    found = np.zeros(len(points), dtype=bool)
    if not any(getattr(node.op, "name", "") in UNSTABLE for node in network.nodes):
        return found
    with torch.no_grad():
        values = network.values(torch.from_numpy(points))
    for node in network.nodes:
        smallest = UNSTABLE.get(getattr(node.op, "name", ""))
        if smallest is not None:
            found |= (values[node.inputs[0]].flatten(1) < smallest).any(1).numpy()
    return found
