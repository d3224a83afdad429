"""A network as dense matrices between its activations: z_l = sum over earlier k of W_lk h_k + b_l, h_k = phi_k(z_k).

Every computed number has an upper bound of its error: entrywise on the way, as a Frobenius norm in the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from certify_cli.audit.verify.functions import FUNCTIONS, Function
from certify_cli.errors import quoted
from certify_cli.network.activations import Activation
from certify_cli.network.affine import Dense, Scale, Shift
from certify_cli.network.convolution import Conv, ConvTranspose
from certify_cli.network.graph import Add, Concat, Network
from certify_cli.network.movement import Reshape, Select

U = 2.0**-53
"""Unit roundoff of float64."""
UP = 1 + 4e-9
"""Factor that covers the rounding of any sum of non-negative numbers in this check: they have at most LARGEST terms."""
TINY = 1e-150
"""Added to every Euclidean norm: squares lose less than this by underflow."""
LARGEST = 3 * 10**7
"""Entries of the largest matrix; a model that needs a larger one is not read."""
SVD_WORK, GRAM_WORK = 4e9, 1e12
"""Multiplications up to which a spectral norm is taken from an SVD, and up to which from powers of a Gram matrix."""
INPUT = -1
"""The input's number as a layer."""


class UnreadableError(Exception):
    """A network that is not read as matrices; the message says why."""


@dataclass(eq=False)
class Matrix:
    """A computed matrix `value` (rows, columns), and an upper bound of the Frobenius norm of its `error`."""

    value: Tensor
    error: float
    _norm: float | None = field(default=None, repr=False)

    @property
    def frobenius(self) -> float:
        """Upper bound of the exact matrix's Frobenius norm."""
        return (float(upper_norm(self.value)) + self.error) * UP

    @property
    def norm(self) -> float:
        """Upper bound of the exact matrix's spectral norm."""
        if self._norm is None:
            self._norm = (spectral(self.value) + self.error) * UP
        return self._norm


@dataclass(frozen=True, eq=False)
class Layer:
    """z = sum of W h + bias, and h = function(z).

    function: None for the logits.   weights: by the layer of h, INPUT for the input.   bias_error: upper bound of the
    Euclidean norm of the bias' error.
    """

    function: Function | None
    weights: dict[int, Matrix]
    bias: Tensor
    bias_error: float


def upper_norm(a: Tensor, dim: int | tuple[int, ...] | None = None) -> Tensor:
    """Upper bounds of Euclidean norms: of all entries, or along `dim`."""
    return torch.linalg.vector_norm(a, dim=dim) * UP + TINY


def spectral(a: Tensor) -> float:
    """Upper bound of the spectral norm ||a||, every rounding counted.

    From a computed SVD and its residuals (theory section 2); where that is too much work, from the powers of a Gram
    matrix, ||a||^2 <= ||(a a^T)^q||_F^(1/q); beyond GRAM_WORK the Frobenius norm.
    """
    a = a if a.shape[0] <= a.shape[1] else a.T
    m, n = a.shape
    scale = float(a.abs().max())
    if scale == 0.0 or not math.isfinite(scale):
        return 0.0 if scale == 0.0 else math.inf
    a = a / scale
    frobenius = float(upper_norm(a))
    rounding = U * frobenius  # of the division
    if m * m * n <= SVD_WORK:
        u, s, vt = torch.linalg.svd(a, full_matrices=False)
        gamma = (n + 4) * U * UP
        product = (u * s) @ vt
        magnitude = float(upper_norm((u.abs() * s) @ vt.abs()))
        apart = float(upper_norm(a - product)) + gamma * (magnitude + frobenius)
        eye = torch.eye(m, dtype=a.dtype)
        skew = [float(upper_norm(q.T @ q - eye)) + gamma * float(upper_norm(q)) ** 2 for q in (u, vt.T)]
        found = float(s.max()) * math.sqrt((1 + skew[0]) * (1 + skew[1])) + apart
        return min(found + rounding, frobenius) * scale * UP + TINY
    if m * m * n > GRAM_WORK:
        return frobenius * scale * UP + TINY
    gram = a @ a.T
    error = (n + 3) * U * UP * frobenius**2  # of the Gram matrix, in the Frobenius norm
    # invariant: ||a||^2 <= (||gram|| + error) ^ (1/power) / scaling, kept as logarithms
    log, power = 0.0, 1.0
    for _ in range(8):
        size = float(upper_norm(gram))
        gram, error = gram / size, error / size + U
        log += math.log(size) / power
        error = (2 * error + error * error + (m + 3) * U) * UP
        gram = gram @ gram
        power *= 2
    largest = (float(upper_norm(gram)) + error) * UP
    squared = math.exp(log + math.log(largest) / power) * (1 + 1e-12)
    return min(math.sqrt(squared) + rounding, frobenius) * scale * UP + TINY


@dataclass(eq=False)
class _AffineForm:
    """An affine function of earlier layers (the sources).

    parts: by source, the matrix (source entries, *shape) and its entrywise error.   bias, bias_error: (1, *shape).
    """

    parts: dict[int, tuple[Tensor, Tensor]]
    bias: Tensor
    bias_error: Tensor


def read(network: Network) -> list[Layer]:
    """A layer for every activation in order, then the logits.

    Raises UnreadableError for a nonlinearity that is no activation (max pooling, MaxMin) and for too large a matrix.
    """
    layers: list[Layer] = []
    forms = [_identity(INPUT, network.input_shape)]
    for node in network.nodes[1:]:
        inputs = [forms[i] for i in node.inputs]
        op = node.op
        if isinstance(op, Activation):
            layers.append(_layer(FUNCTIONS[op.name](**op.parameters), inputs[0]))
            forms.append(_identity(len(layers) - 1, node.shape))
        elif isinstance(op, Add):
            forms.append(_added(inputs))
        elif isinstance(op, Concat):
            forms.append(_concatenated(op.axis, inputs, [network.nodes[i].shape for i in node.inputs]))
        elif type(op) in LINEAR:
            for source in inputs[0].parts:
                if inputs[0].parts[source][0].shape[0] * node.size > LARGEST:
                    raise UnreadableError(f"layer {quoted(node.name)} needs too large a matrix")
            forms.append(_mapped(op, inputs[0]))
        else:
            raise UnreadableError(f"layer {quoted(node.name)} ({op.title}) is none that is written as a matrix")
    return [*layers, _layer(None, forms[-1])]


def _identity(source: int, shape: tuple[int, ...]) -> _AffineForm:
    size = math.prod(shape)
    if size * size > LARGEST:
        raise UnreadableError("a layer is too large to be written as a matrix")
    eye = torch.eye(size, dtype=torch.float64).reshape(size, *shape)
    none = torch.zeros(1, *shape, dtype=torch.float64)
    return _AffineForm({source: (eye, torch.zeros_like(eye))}, none, none)


def _layer(function: Function | None, form: _AffineForm) -> Layer:
    weights = {
        source: Matrix(value.flatten(1).T.contiguous(), float(upper_norm(error)))
        for source, (value, error) in form.parts.items()
    }
    return Layer(function, weights, form.bias.flatten(), float(upper_norm(form.bias_error)))


def _added(forms: list[_AffineForm]) -> _AffineForm:
    parts: dict[int, tuple[Tensor, Tensor]] = {}
    for form in forms:
        for source, (value, error) in form.parts.items():
            if source in parts:
                old, old_error = parts[source]
                value, error = old + value, (old_error + error) * UP + U * (old + value).abs()
            parts[source] = value, error
    biases = torch.stack([form.bias for form in forms])
    error = torch.stack([form.bias_error for form in forms]).sum(0) * UP + len(forms) * U * biases.abs().sum(0)
    return _AffineForm(parts, biases.sum(0), error)


def _concatenated(axis: int, forms: list[_AffineForm], shapes: list[tuple[int, ...]]) -> _AffineForm:
    parts = {}
    for source in dict.fromkeys(s for form in forms for s in form.parts):
        size = next(len(form.parts[source][0]) for form in forms if source in form.parts)
        none = [torch.zeros(size, *shape, dtype=torch.float64) for shape in shapes]
        pairs = [form.parts.get(source, (zero, zero)) for form, zero in zip(forms, none, strict=True)]
        parts[source] = tuple(torch.cat([pair[i] for pair in pairs], dim=axis + 1) for i in (0, 1))
    return _AffineForm(
        parts,  # type: ignore[arg-type]
        torch.cat([form.bias for form in forms], dim=axis + 1),
        torch.cat([form.bias_error for form in forms], dim=axis + 1),
    )


def _mapped(op: Any, form: _AffineForm) -> _AffineForm:
    """The form behind an affine operation: |error| <= |W| e + gamma |W| (|value| + e)."""
    apply, terms = LINEAR[type(op)]
    count = terms(op) + 4 + getattr(op, "weight_error", 0)
    gamma = count * U / (1 - count * U)

    def through(value: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
        moved = apply(op, error, torch.abs) + gamma * apply(op, value.abs() + error, torch.abs)
        return apply(op, value, lambda w: w), moved * UP

    parts = {source: through(*pair) for source, pair in form.parts.items()}
    bias, error = through(form.bias, form.bias_error)
    offset = getattr(op, "offset", None)
    if offset is not None:
        if isinstance(op, Conv | ConvTranspose):
            offset = offset.reshape(-1, *[1] * (op.weight.dim() - 2))
        bias = bias + offset
        error = error + U * (bias.abs() + offset.abs())
    return _AffineForm(parts, bias, error)


Change = Callable[[Tensor], Tensor]


def _convolved(op: Conv, x: Tensor, change: Change) -> Tensor:
    function = (F.conv1d, F.conv2d, F.conv3d)[op.weight.dim() - 3]
    return function(x, change(op.weight), None, op.stride, op.padding, op.dilation, op.groups)


def _transposed(op: ConvTranspose, x: Tensor, change: Change) -> Tensor:
    function = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[op.weight.dim() - 3]
    return function(x, change(op.weight), None, op.stride, op.padding, op.output_padding, op.groups, op.dilation)


def _selected(op: Select, x: Tensor, change: Change) -> Tensor:
    index = op.index.flatten()
    picked = F.pad(x.flatten(1), (0, 1))[:, torch.where(index < 0, x[0].numel(), index)]
    return picked.reshape(len(x), *op.index.shape)


LINEAR: dict[Any, tuple[Callable[..., Tensor], Callable[[Any], int]]] = {
    Dense: (lambda op, x, change: x @ change(op.weight).T, lambda op: op.weight.shape[1]),
    Conv: (_convolved, lambda op: op.weight[0].numel()),
    ConvTranspose: (_transposed, lambda op: op.weight.shape[0] * op.weight[0].numel()),
    Scale: (lambda op, x, change: x * change(op.weight), lambda op: 1),
    Shift: (lambda op, x, change: x, lambda op: 0),
    Reshape: (lambda op, x, change: x.reshape(len(x), *op.shape), lambda op: 0),
    Select: (_selected, lambda op: 0),
}
"""By affine operation: (op, x, change of the weights) -> W x, and the number of products that an entry adds up."""
