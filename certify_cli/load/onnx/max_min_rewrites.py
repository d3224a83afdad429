"""Rewriting rules of Max and Min.

Of two values, as MaxMin layers are exported (Split, Max, Min, Concat), they become the halves of one `MaxMin`; of a
value and constants, a clip.
"""

from __future__ import annotations

import json

import numpy as np
from onnx import NodeProto

from certify_cli.load.onnx.affine_rewrites import join
from certify_cli.load.onnx.rewriting import DOMAIN, RewrittenGraph, emit_index, numbered_entries, rewrites
from certify_cli.network.activations import ACTIVATIONS


@rewrites("Max", "Min")
def _largest(rewritten: RewrittenGraph, node: NodeProto) -> None:
    """The first half of the sorted pair for Max, the second for Min; both share one `MaxMin` node."""
    trace = rewritten.trace
    data = [value for value in node.input if value in trace.values]
    if len(data) == 1:
        _clipped(rewritten, node, data[0])
        return
    shapes = [rewritten.shapes[value] for value in data]
    if len(node.input) != 2 or len(shapes) != 2 or shapes[0] != shapes[1] or len(shapes[0]) < 2:
        raise trace.refuse(
            node, "is supported of two values of one shape that depend on the input, or of one and constants"
        )
    batch, channels, *space = shapes[0]
    both = (batch, 2 * channels, *space)
    key = tuple(sorted(rewritten.resolved(value) for value in data))
    if key not in rewritten.pairs:
        joined, rewritten.pairs[key] = rewritten.fresh_value(both), rewritten.fresh_value(both)
        join(rewritten, node, data, joined, axis=1)
        rewritten.emit(node, "MaxMin", [joined], rewritten.pairs[key], DOMAIN)
    half = np.split(numbered_entries(both), 2, axis=1)[node.op_type == "Min"]
    emit_index(rewritten, node, rewritten.pairs[key], node.output[0], half)


def _clipped(rewritten: RewrittenGraph, node: NodeProto, value: str) -> None:
    """max(x, c) = c + max(x - c, 0), entrywise; a plain clip where c is one number."""
    trace = rewritten.trace
    constants = [trace.constants[name] for name in node.input if name != value]
    largest = node.op_type == "Max"
    bound = (np.maximum if largest else np.minimum).reduce(np.broadcast_arrays(*constants))
    if rewritten.shapes[node.output[0]] != rewritten.shapes[value]:
        raise trace.refuse(node, "spreads a value over more entries, which is not supported; export a clamp")
    single = np.ptp(bound) == 0
    level = float(bound.flat[0]) if single else 0.0
    if largest and level == 0:
        clip = ACTIVATIONS["relu"]()
    else:
        clip = ACTIVATIONS["clip"](**{"low" if largest else "high": level})
    row = json.dumps({"name": clip.name, "parameters": clip.parameters, "deviation": clip.deviation})
    if single:
        rewritten.emit(node, "Activation", [value], node.output[0], DOMAIN, row=row)
        return
    offset, above, cut = rewritten.constant(bound), rewritten.fresh_value(), rewritten.fresh_value()
    rewritten.emit(node, "Sub", [value, offset], above)
    rewritten.emit(node, "Activation", [above], cut, DOMAIN, row=row)
    rewritten.emit(node, "Add", [cut, offset], node.output[0])
