"""Blocks of layers that cannot be certified, recognised by their operators, so that a refusal can name the block."""

from __future__ import annotations

from collections.abc import Callable

from onnx import NodeProto

from certify_cli.load.onnx.interpret import Trace

NORMS = {"LayerNormalization", "InstanceNormalization", "GroupNormalization", "RMSNormalization", "LpNormalization"}


def block_of(trace: Trace, node: NodeProto) -> str | None:
    """The block of which the node is a part, as the end of a sentence; None for no known block."""
    return next((text for test, text in BLOCKS if test(trace, node)), None)


def _data(trace: Trace, node: NodeProto) -> list[str]:
    return [value for value in node.input if value in trace.values]


def _producers(trace: Trace, names: list[str], depth: int) -> list[NodeProto]:
    """The nodes within `depth` steps above these values."""
    nodes: list[NodeProto] = []
    for _ in range(depth):
        above = [node for node in trace.nodes if set(node.output) & set(names)]
        nodes += above
        names = [value for node in above for value in node.input]
    return nodes


def _has(nodes: list[NodeProto], *operators: str) -> bool:
    return all(any(node.op_type == operator for node in nodes) for operator in operators)


def _consumers(trace: Trace, node: NodeProto, depth: int) -> list[NodeProto]:
    """The nodes within `depth` steps below this one."""
    nodes, names = [], set(node.output)
    for _ in range(depth):
        below = [other for other in trace.nodes if names & set(other.input)]
        nodes += below
        names = {value for other in below for value in other.output}
    return nodes


def _layer_norm(trace: Trace, node: NodeProto) -> bool:
    """x - mean(x), squared, averaged, its root, and a quotient."""
    if node.op_type in NORMS:
        return True
    near = [node, *_producers(trace, list(node.input), 4), *_consumers(trace, node, 4)]
    return node.op_type in ("Pow", "Mul", "Div", "Sqrt", "ReduceMean") and _has(near, "ReduceMean", "Sub", "Sqrt")


def _attention(trace: Trace, node: NodeProto) -> bool:
    """A softmax between two matrix products, or a product of two values."""
    if node.op_type in ("Attention", "MultiHeadAttention"):
        return True
    if node.op_type == "MatMul":
        return len(_data(trace, node)) > 1
    return node.op_type == "Softmax" and _has(_consumers(trace, node, 4), "MatMul")


def _squeeze_and_excitation(trace: Trace, node: NodeProto) -> bool:
    """An image times one number a channel."""
    shapes = [trace.shape(value) for value in _data(trace, node)]
    if node.op_type != "Mul" or len(shapes) != 2 or len(shapes[0]) < 3 or len(shapes[0]) != len(shapes[1]):
        return False
    return any(set(shape[2:]) == {1} for shape in shapes) and shapes[0][:2] == shapes[1][:2] and shapes[0] != shapes[1]


def _gate(trace: Trace, node: NodeProto) -> bool:
    """Two values of one shape, one of them through a sigmoid or the like."""
    data = _data(trace, node)
    return (
        node.op_type == "Mul"
        and len(set(data)) == 2
        and bool({"Sigmoid", "Tanh", "Softmax", "Relu", "Gelu"} & {n.op_type for n in _producers(trace, data, 1)})
    )


Test = Callable[[Trace, NodeProto], bool]
BLOCKS: tuple[tuple[Test, str], ...] = (
    (_layer_norm, "a layer norm, which divides by a value of the data's own: certify a model with batch norm instead"),
    (_attention, "an attention block, a product of values that depend on the input: no bound for it is built in"),
    (
        _squeeze_and_excitation,
        "a squeeze-and-excitation block, a product of values that depend on the input: no bound for it is built in",
    ),
    (_gate, "a gate, a product of values that depend on the input: no bound for it is built in"),
)
