"""Chooses the output that holds the logits: the user's choice, or the float output from which all others derive."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from onnx import GraphProto, NodeProto, TensorProto, ValueInfoProto

from certify_cli.errors import ModelError, shown

FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)
SOFTMAX = {"Softmax", "LogSoftmax"}
RESHAPING = {"Identity", "Cast", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Dropout"}
"""Operators that may follow the logits, provided that they keep the order of the entries."""
WRAPPING = {"ZipMap", "Normalizer"}
"""Operators of ai.onnx.ml that make a table of scores by class, and divide scores by a positive number."""
CLASSIFIERS = {"LinearClassifier"}
"""Operators whose label output is a function of their scores."""


def leading_to(output: str, nodes: Sequence[NodeProto]) -> list[NodeProto]:
    """The nodes that lead to the value `output`, in order."""
    producers: dict[str, list[NodeProto]] = {}
    for node in nodes:
        for name in node.output:
            producers.setdefault(name, []).append(node)
    needed, stack = {""}, [output]
    while stack:
        name = stack.pop()
        if name not in needed:
            needed.add(name)
            stack.extend(operand for node in producers.get(name, ()) for operand in node.input)
    needed.remove("")
    return [node for node in nodes if needed.intersection(node.output)]


def chosen_output(path: Path, graph: GraphProto, wanted: str | None) -> tuple[str, tuple[str, ...]]:
    """The name of the tensor of the chosen output, before ZipMap and Normalizer, and a note where there was a choice.

    wanted: the user's choice. ModelError, naming the outputs, where it is none of them or no choice is evident.
    """
    outputs = list(graph.output)
    producers = {name: node for node in graph.node for name in node.output if name}
    listed = ", ".join(f"'{shown(value.name)}'" for value in outputs)
    if wanted is not None:
        found = [value for value in outputs if value.name == wanted]
        if not found:
            raise ModelError(
                f"{path}: --output {shown(wanted)} is none of its outputs ({listed}); a file to write to is named by -o"
            )
    elif len(outputs) == 1:
        found = outputs
    else:
        found = [value for value in outputs if _holds_floats(value) and _all_derive(value, graph, producers)]
        if not found:
            raise ModelError(
                f"{path}: the model has {len(outputs)} outputs ({listed}), and not all derive from one; "
                "say with --output NAME which one holds the logits"
            )
    if not _holds_floats(found[0]):
        raise ModelError(
            f"{path}: the output '{shown(found[0].name)}' holds no floating-point numbers; choose or export the logits"
        )
    name = found[0].name
    notes = () if len(outputs) == 1 else (f"of its outputs {listed} '{shown(name)}' is certified",)
    return _unwrapped(name, producers), notes


def _holds_floats(value: ValueInfoProto) -> bool:
    """Whether an output may hold logits: floats, the table that ZipMap makes, or a tensor of undeclared type."""
    kind = value.type.WhichOneof("value")
    return kind != "tensor_type" or value.type.tensor_type.elem_type in (*FLOATS, TensorProto.UNDEFINED)


def _all_derive(value: ValueInfoProto, graph: GraphProto, producers: dict[str, NodeProto]) -> bool:
    """Whether every output depends on the input only through the base of `value` (see `_base`)."""
    base = _base(value.name, producers)
    producer = producers.get(base)
    seen = {base} | (set(producer.output) if producer is not None and producer.op_type in CLASSIFIERS else set())
    seen.update(tensor.name for tensor in graph.initializer)
    stack = [other.name for other in graph.output]
    while stack:
        name = stack.pop()
        if name in seen:
            continue
        if name not in producers:
            return False  # the input itself
        seen.add(name)
        stack.extend(operand for operand in producers[name].input if operand)
    return True


def _base(name: str, producers: dict[str, NodeProto]) -> str:
    """The value behind an output, before all reshaping, wrapping and softmax nodes."""
    while (producer := producers.get(name)) is not None and producer.op_type in RESHAPING | WRAPPING | SOFTMAX:
        name = producer.input[0]
    return name


def _unwrapped(name: str, producers: dict[str, NodeProto]) -> str:
    """The tensor before ZipMap and Normalizer, where they end the model."""
    at = last = name
    while (producer := producers.get(at)) is not None and producer.op_type in WRAPPING | {"Identity", "Cast"}:
        at = producer.input[0]
        if producer.op_type in WRAPPING:
            last = at
    return last
