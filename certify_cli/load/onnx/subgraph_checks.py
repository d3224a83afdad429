"""Each rewritten subgraph is checked by itself: the file's, evaluated in float64, against the network's.

A comparison of the whole file misses neurons that are inactive on its inputs, and differences that are small beside a
large logit; a subgraph can be given any inputs.
"""

from __future__ import annotations

import numpy as np
import torch

from certify_cli.errors import ModelError
from certify_cli.load.onnx.interpret import Trace, widened
from certify_cli.load.onnx.rewriting import RewrittenGraph, Subgraph
from certify_cli.load.onnx.subnetwork import OutsideError, needed, value_and_size
from certify_cli.network.graph import Network, Nonlinear

TOLERANCE = 1e-10
"""Largest difference between two evaluations in float64, relative to the sum of absolute terms of an entry."""

SCALES = (1.0, 10.0, 1e2, 1e4)
"""Sizes of the inputs, of both signs, of a subgraph with a nonlinear node."""
LINEAR_SCALES = (1.0, 1e4)
"""Those of a subgraph that should be affine: a clip in it shows at the larger one."""
LOGARITHM = 700.0
"""Absolute values beyond it are logarithms of numbers near the end of float64's range, and are not compared."""
CONVOLVING = {"Conv", "ConvTranspose", "Gemm", "MatMul"}
"""Operators that are affine in any case: one input suffices."""


def check(rewritten: RewrittenGraph, network: Network, node_of: dict[str, int], source: str) -> None:
    """ModelError, naming the node, where a subgraph of the network computes something else than the file's.

    node_of: value of the rewritten graph -> the network node that holds it.   source: the input's name.
    """
    random = np.random.default_rng(1)
    for subgraph in rewritten.subgraphs:
        target = _held(rewritten, node_of, source, subgraph.value)
        inputs = [_held(rewritten, node_of, source, value) for value in subgraph.inputs]
        if target is None or None in inputs:
            continue  # does not lead to the logits; for example the second half of a split
        _check_piece(rewritten.trace, subgraph, network, target, [i for i in inputs if i is not None], random)


def _held(rewritten: RewrittenGraph, node_of: dict[str, int], source: str, value: str) -> int | None:
    name = rewritten.resolved(value)
    return 0 if name == source else node_of.get(name)


def _check_piece(
    trace: Trace,
    subgraph: Subgraph,
    network: Network,
    target: int,
    inputs: list[int],
    random: np.random.Generator,
) -> None:
    last = subgraph.nodes[-1]
    try:
        after = needed(network, target, set(inputs))
    except OutsideError:
        raise trace.refuse(last, "was rewritten into something that reads other values; please report it") from None
    kinked = any(isinstance(network.nodes[index].op, Nonlinear) for index in after)
    compared = False
    for scale in _scales(subgraph, kinked):
        drawn = {index: scale * random.normal(size=(1, *network.nodes[index].shape)) for index in inputs}
        samples = [drawn[i].reshape(trace.shape(value)) for i, value in zip(inputs, subgraph.inputs, strict=True)]
        expected = _value_in_file(trace, subgraph, samples)
        given = {index: torch.from_numpy(sample) for index, sample in drawn.items()}
        with torch.no_grad():
            value, size, deviation = value_and_size(network, target, given)
        if tuple(value.shape) != expected.shape:
            raise trace.refuse(
                last, f"has shape {list(expected.shape)} in the file and {list(value.shape)} here; please report it"
            )
        error = np.abs(value.numpy() - expected)
        allowed = TOLERANCE * size.numpy() + 2 * deviation + 1e-300
        finite = np.isfinite(expected)  # at large inputs a formula may overflow where its function does not
        if any(node.op_type == "Log" for node in subgraph.nodes):
            finite &= np.abs(expected) < LOGARITHM
        compared = compared or bool(finite.all())
        if not (error <= allowed)[finite].all():
            worst = float((error / allowed)[finite].max()) * TOLERANCE
            raise trace.refuse(
                last,
                f"computes something else in the file than what it was read as (off by {worst:.3g} of its size at "
                f"inputs of size {scale:g}); please report it with the model",
            )
    if not compared:
        raise trace.refuse(last, "gives no finite numbers to compare it by; replace the layer")


def _scales(subgraph: Subgraph, kinked: bool) -> tuple[float, ...]:
    if kinked:
        return (*SCALES, 0.0)
    if all(node.op_type in CONVOLVING for node in subgraph.nodes):
        return (1.0, 0.0)
    return (*LINEAR_SCALES, 0.0)


def _value_in_file(trace: Trace, subgraph: Subgraph, samples: list[np.ndarray]) -> np.ndarray:
    """The subgraph's value for one sample, evaluated in float64."""
    values = {name: trace.to_file_shape(name, sample) for name, sample in zip(subgraph.inputs, samples, strict=True)}
    for node in subgraph.nodes:
        operands = [
            None if not name else values[name] if name in values else trace.constants.get(name) for name in node.input
        ]
        if any(name and operand is None for name, operand in zip(node.input, operands, strict=True)):
            raise ModelError(f"{trace.path}: {trace.origin[node.name]} cannot be checked by itself; please report it")
        values.update(zip(node.output, widened(trace, node, operands), strict=False))
    return trace.samples(subgraph.value, values[subgraph.value])[:1]
