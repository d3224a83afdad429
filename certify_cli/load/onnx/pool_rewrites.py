"""Rewriting rules of max and average pooling: one form with explicit windows, for any padding, rounding and axes."""

from __future__ import annotations

from onnx import NodeProto

from certify_cli.load.onnx.operators import Windows, attributes_of, windows_of
from certify_cli.load.onnx.rewriting import DOMAIN, RewrittenGraph, rewrites


@rewrites("MaxPool", "GlobalMaxPool")
def _max_pool(rewritten: RewrittenGraph, node: NodeProto) -> None:
    trace = rewritten.trace
    if len(node.output) > 1 and node.output[1] and any(node.output[1] in other.input for other in trace.nodes):
        raise trace.refuse(node, "gives its indices to other nodes, which is not supported")
    at = _windows(rewritten, node)
    pads = _pads(at, trace.shape(node.input[0])[2:])
    rewritten.emit(node, "MaxPool", [node.input[0]], node.output[0], DOMAIN, pads=pads, **_form(at))


@rewrites("AveragePool")
def _average_pool(rewritten: RewrittenGraph, node: NodeProto) -> None:
    """The mean of every window over its pixels in the image, or in the image and its padding."""
    at = _windows(rewritten, node)
    pads = _pads(at, rewritten.trace.shape(node.input[0])[2:])
    counted = int(attributes_of(node).get("count_include_pad", 0))
    form = _form(at) | {"padded": list(at.padded), "count": list(at.count), "count_include_pad": counted}
    rewritten.emit(node, "AveragePool", [node.input[0]], node.output[0], DOMAIN, pads=pads, **form)


def _windows(rewritten: RewrittenGraph, node: NodeProto) -> Windows:
    trace = rewritten.trace
    if node.input[0] in trace.unbatched:
        raise trace.refuse(node, "pools a value without a batch axis, which is not supported")
    return windows_of(node, trace.shape(node.input[0])[2:])


def _pads(at: Windows, sizes: tuple[int, ...]) -> list[int]:
    """[begin..., end...]: how far the windows reach beyond the image; negative where they omit pixels."""
    return [*(-begin for begin in at.begin), *at.end(sizes)]


def _form(at: Windows) -> dict[str, list[int]]:
    return {"kernel_shape": list(at.kernel), "strides": list(at.stride), "dilations": list(at.dilation)}
