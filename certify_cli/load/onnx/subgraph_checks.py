"""Every rewriting is checked where it happens: the subgraph of the file before, evaluated in float64, against the subgraph of
the network after, on inputs of the subgraph's own.

A check of the whole file sees no unit that sleeps, and nothing that a large logit hides; a subgraph by itself can be given
any input.
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
"""Relative to what is added up in an entry; two evaluations in float64 differ by rounding."""

SCALES = (1.0, 10.0, 1e2, 1e4)
"""Of the inputs of a subgraph with kinks or curves; both signs."""
LINEAR_SCALES = (1.0, 1e4)
"""And of one that should be affine: a clip in it shows at the larger one."""
LOGARITHM = 700.0
"""Beyond it a logarithm is of a number with few digits left, or none."""
CONVOLVING = {"Conv", "ConvTranspose", "Gemm", "MatMul"}
"""Operators that are affine by themselves: one input tells."""


def check(rewritten: RewrittenGraph, network: Network, holding: dict[str, int], source: str) -> None:
    """ModelError, naming the node, where a subgraph of the network computes something else than the file's.

    holding: which node of the network holds a value of the rewritten graph.
    """
    random = np.random.default_rng(1)
    for subgraph in rewritten.subgraphs:
        target = _held(rewritten, holding, source, subgraph.value)
        inputs = [_held(rewritten, holding, source, value) for value in subgraph.inputs]
        if target is None or None in inputs:
            continue  # does not lead to the logits, as a second half of a split may not
        _check_piece(rewritten.trace, subgraph, network, target, [i for i in inputs if i is not None], random)


def _held(rewritten: RewrittenGraph, holding: dict[str, int], source: str, value: str) -> int | None:
    name = rewritten.resolved(value)
    return 0 if name == source else holding.get(name)


def _check_piece(
    trace: Trace,
    subgraph: Subgraph,
    network: Network,
    target: int,
    inputs: list[int],
    random: np.random.Generator,
) -> None:
    last = subgraph.before[-1]
    try:
        after = needed(network, target, set(inputs))
    except OutsideError:
        raise trace.refuse(last, "was rewritten into something that reads other values; please report it") from None
    kinked = any(isinstance(network.nodes[index].op, Nonlinear) for index in after)
    compared = False
    for scale in _scales(subgraph, kinked):
        drawn = {index: scale * random.normal(size=(1, *network.nodes[index].shape)) for index in inputs}
        samples = [drawn[i].reshape(trace.shape(value)) for i, value in zip(inputs, subgraph.inputs, strict=True)]
        before = _before(trace, subgraph, samples)
        given = {index: torch.from_numpy(sample) for index, sample in drawn.items()}
        with torch.no_grad():
            value, size, deviation = value_and_size(network, target, given)
        if tuple(value.shape) != before.shape:
            raise trace.refuse(
                last, f"has shape {list(before.shape)} in the file and {list(value.shape)} here; please report it"
            )
        off = np.abs(value.numpy() - before)
        allowed = TOLERANCE * size.numpy() + 2 * deviation + 1e-300
        finite = np.isfinite(before)  # at large inputs a formula may overflow where its function does not
        if any(node.op_type == "Log" for node in subgraph.before):
            finite &= np.abs(before) < LOGARITHM
        compared = compared or bool(finite.all())
        if not (off <= allowed)[finite].all():
            worst = float((off / allowed)[finite].max()) * TOLERANCE
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
    if all(node.op_type in CONVOLVING for node in subgraph.before):
        return (1.0, 0.0)
    return (*LINEAR_SCALES, 0.0)


def _before(trace: Trace, subgraph: Subgraph, samples: list[np.ndarray]) -> np.ndarray:
    """What the file's nodes make of one sample, in float64."""
    values = {name: trace.to_file_shape(name, sample) for name, sample in zip(subgraph.inputs, samples, strict=True)}
    for node in subgraph.before:
        operands = [
            None if not name else values[name] if name in values else trace.constants.get(name) for name in node.input
        ]
        if any(name and operand is None for name, operand in zip(node.input, operands, strict=True)):
            raise ModelError(f"{trace.path}: {trace.origin[node.name]} cannot be checked by itself; please report it")
        values.update(zip(node.output, widened(trace, node, operands), strict=False))
    return trace.samples(subgraph.value, values[subgraph.value])[:1]
