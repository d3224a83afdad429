"""An oracle for values of networks: fixed-point numbers of BITS bits behind the point, Python's integers in arrays.

Written from the operations' definitions, without torch. Every product is cut off at one unit of 2^-BITS, which the
layers behind multiply, as they do the 2^-963 that bounds add for underflow.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import mpmath
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from certify_cli.network.activations import Activation
from certify_cli.network.affine import Dense, Scale, Shift
from certify_cli.network.convolution import Conv, ConvTranspose
from certify_cli.network.graph import Add, Concat, Network
from certify_cli.network.movement import Reshape, Select
from certify_cli.network.pooling import MaxMin, MaxPool
from tests.exact import Exact
from tests.oracles import EXACT

BITS = 1100
ONE = 1 << BITS

Fixed = NDArray[Any]


def fixed(numbers: Tensor) -> Fixed:
    """Float64 numbers, exactly but for what lies behind the last bit."""
    return _shifted(Exact.of(numbers.detach().numpy()), BITS)


def fixed_values(network: Network, x: Tensor) -> list[Fixed]:
    """The value of every node at one sample, without the batch."""
    values = [fixed(x)]
    for node in network.nodes[1:]:
        values.append(_image(node.op, [values[i] for i in node.inputs], node.shape))
    return values


def worst_error(value: Tensor, bound: Tensor, exact: Fixed) -> float:
    """The largest |value - exact| / bound of one sample's entries; more than 1 just where a bound does not hold."""
    errors, bounds = abs(fixed(value) - exact), fixed(bound)
    return max(
        (int(e) / int(b) if e > b + 2 or e < b else 1.0 for e, b in zip(errors.flat, bounds.flat, strict=True)),
        default=0.0,
    )


def _shifted(exact: Exact, bits: int) -> Fixed:
    power = exact.power + bits
    return exact.values << power if power >= 0 else exact.values >> -power


def _weight(op: Any) -> Exact:
    """The stored weight and the rest of rounded constants, exactly."""
    parts = [op.weight] if op.weight_tail is None else [op.weight, *op.weight_tail.expand(-1, *op.weight.shape)]
    exact = [Exact.of(part.numpy()) for part in parts]
    least = min(part.power for part in exact)
    return Exact(sum(part.values << (part.power - least) for part in exact), least)


def _image(op: Any, inputs: list[Fixed], shape: tuple[int, ...]) -> Fixed:
    h = inputs[0]
    if isinstance(op, Dense):
        w = _weight(op)
        out = _shifted(Exact(h @ w.values.T, w.power), 0)
        return out if op.offset is None else out + fixed(op.offset)
    if isinstance(op, Scale):
        w = _weight(op)
        return _shifted(Exact(h * w.values, w.power), 0)
    if isinstance(op, Shift):
        return h + fixed(op.offset)
    if isinstance(op, Reshape):
        return h.reshape(shape)
    if isinstance(op, Select):
        index = op.index.numpy()
        return np.where(index >= 0, h.flatten()[np.maximum(index, 0)], 0)
    if isinstance(op, Add):
        return sum(inputs[1:], h)
    if isinstance(op, Concat):
        return np.concatenate(inputs, axis=op.axis)
    if isinstance(op, MaxMin):
        first, second = np.split(h, 2)
        return np.concatenate([np.maximum(first, second), np.minimum(first, second)])
    if isinstance(op, MaxPool):
        return _max_pool(op, h, shape)
    if isinstance(op, Conv):
        return _conv(op, h, shape)
    if isinstance(op, ConvTranspose):
        return _conv_transpose(op, h, shape)
    assert isinstance(op, Activation)
    return _PIECEWISE[op.name](h, **op.parameters) if op.name in _PIECEWISE else _smooth(op, h)


def _places(op: Any, sizes: tuple[int, ...], tap: tuple[int, ...]) -> tuple[slice, ...]:
    """Where the outputs (a transposed convolution's inputs) of a tap lie in the padded image."""
    axes = zip(sizes, tap, op.stride, op.dilation, strict=True)
    return tuple(slice(t * d, t * d + (n - 1) * s + 1, s) for n, t, s, d in axes)


def _bias(op: Any) -> Any:
    return 0 if op.offset is None else fixed(op.offset).reshape(-1, *[1] * len(op.stride))


def _padded(h: Fixed, widths: list[tuple[int, int]], value: int) -> Fixed:
    """With a Python integer all around, where np.pad would put numpy's."""
    sizes = [n + low + high for n, (low, high) in zip(h.shape[1:], widths, strict=True)]
    out = np.full((len(h), *sizes), value, dtype=object)
    out[(slice(None), *(slice(low, low + n) for n, (low, _) in zip(h.shape[1:], widths, strict=True)))] = h
    return out


def _product(weight: Fixed, image: Fixed) -> Fixed:
    return (weight @ image.reshape(len(image), -1)).reshape(-1, *image.shape[1:])


def _conv(op: Conv, h: Fixed, shape: tuple[int, ...]) -> Fixed:
    padded = _padded(h, [(p, p) for p in op.padding], 0)
    w = _weight(op)
    out = np.zeros(shape, dtype=object)
    each, into = shape[0] // op.groups, op.weight.shape[1]
    for tap in np.ndindex(*op.weight.shape[2:]):
        seen = padded[(slice(None), *_places(op, shape[1:], tap))]
        for g in range(op.groups):
            weight = w.values[(slice(g * each, (g + 1) * each), slice(None), *tap)]
            out[g * each : (g + 1) * each] += _product(weight, seen[g * into : (g + 1) * into])
    return _shifted(Exact(out, w.power), 0) + _bias(op)


def _conv_transpose(op: ConvTranspose, h: Fixed, shape: tuple[int, ...]) -> Fixed:
    kernel = op.weight.shape[2:]
    full = [
        (n - 1) * s + (k - 1) * d + 1 for n, s, k, d in zip(h.shape[1:], op.stride, kernel, op.dilation, strict=True)
    ]
    out = np.zeros([shape[0], *(n + o for n, o in zip(full, op.output_padding, strict=True))], dtype=object)
    w = Exact.of(op.weight.numpy())
    each, into = op.weight.shape[1], h.shape[0] // op.groups
    for tap in np.ndindex(*kernel):
        where = _places(op, h.shape[1:], tap)
        for g in range(op.groups):
            weight = w.values[(slice(g * into, (g + 1) * into), slice(None), *tap)]
            out[(slice(g * each, (g + 1) * each), *where)] += _product(weight.T, h[g * into : (g + 1) * into])
    inner = tuple(slice(p, p + n) for p, n in zip(op.padding, shape[1:], strict=True))
    return _shifted(Exact(out[(slice(None), *inner)], w.power), 0) + _bias(op)


def _max_pool(op: MaxPool, h: Fixed, shape: tuple[int, ...]) -> Fixed:
    lowest = -(1 << 4 * BITS)
    ends = op.padding if op.end is None else op.end
    room = [(p, max(e, 0) + k * s) for p, e, k, s in zip(op.padding, ends, op.kernel, op.stride, strict=True)]
    padded = _padded(h, room, lowest)
    taps = [padded[(slice(None), *_places(op, shape[1:], tap))] for tap in np.ndindex(*op.kernel)]
    return np.maximum.reduce(taps)


def _times(h: Fixed, number: float) -> Fixed:
    return _shifted(Exact(h * Exact.of(np.array([number])).values, Exact.of(np.array([number])).power), 0)


def _fixed(number: float) -> int:
    return int(Fraction(number) * ONE)


def _clip(h: Fixed, low: float | None, high: float | None) -> Fixed:
    h = h if low is None else np.maximum(h, _fixed(low))
    return h if high is None else np.minimum(h, _fixed(high))


_PIECEWISE: dict[str, Callable[..., Fixed]] = {
    "relu": lambda h: np.maximum(h, 0),
    "leaky_relu": lambda h, negative_slope: np.where(h > 0, h, _times(h, negative_slope)),
    "clip": _clip,
    "hard_sigmoid": lambda h, alpha, beta: np.minimum(np.maximum(_times(h, alpha) + _fixed(beta), 0), ONE),
}


def _smooth(op: Activation, h: Fixed) -> Fixed:
    """By mpmath; the functions of `tests.oracles`, softplus with any beta."""
    function = EXACT[op.name, ()][0] if (op.name, ()) in EXACT else EXACT[op.name, (1.0,)][0]
    beta = Fraction(op.parameters.get("beta", 1.0)) if op.name == "softplus" else Fraction(1)
    with mpmath.workprec(BITS + 100):
        factor = mpmath.mpf(beta.numerator) / beta.denominator
        images = [int(mpmath.floor(function(factor * int(v) / ONE) / factor * ONE)) for v in h.flatten()]
    return np.array(images, dtype=object).reshape(h.shape)
