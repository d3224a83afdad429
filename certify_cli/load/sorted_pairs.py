"""Max and Min of two values, as MaxMin layers are exported (Split, Max, Min, Concat): the halves of one sorted pair."""

from __future__ import annotations

import numpy as np
from onnx import NodeProto

from certify_cli.load.affine_rewrites import join
from certify_cli.load.normal import DOMAIN, Normal, emit_index, numbered_entries, rewrites


@rewrites("Max", "Min")
def _largest(normal: Normal, node: NodeProto) -> None:
    """The first half of the sorted pair for Max, the second for Min; the pair is made once for both."""
    found = normal.found
    shapes = [found.shape(value) for value in node.input if value in found.values]
    if len(node.input) != 2 or len(shapes) != 2 or shapes[0] != shapes[1] or len(shapes[0]) < 2:
        raise found.refuse(node, "is supported of two values of one shape that depend on the input, and no others")
    batch, channels, *space = shapes[0]
    both = (batch, 2 * channels, *space)
    key = "/sorted/".join(sorted(normal.same.get(value, value) for value in node.input))
    if key not in normal.shapes:
        joined = normal.part(node)
        normal.shapes[joined] = normal.shapes[key] = both
        join(normal, node, list(node.input), joined, axis=1)
        normal.emit(node, "MaxMin", [joined], key, DOMAIN)
    half = np.split(numbered_entries(both), 2, axis=1)[node.op_type == "Min"]
    emit_index(normal, node, key, node.output[0], half)
