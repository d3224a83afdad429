"""No norm bound lies below the true norm, not by the last bit: against oracles in rational arithmetic (tests.exact).

About two hundred cases of each kind by default, 10,000 with `-m slow`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from fractions import Fraction

import mpmath
import numpy as np
import pytest
import torch
from torch import Tensor

from certify_cli.network.affine import AffineOp, Dense, Scale
from certify_cli.network.convolution import Conv, ConvTranspose
from certify_cli.network.graph import Shape
from certify_cli.network.movement import Select
from certify_cli.numerics import norms
from certify_cli.numerics.norms import WAVE_ERROR, conv_symbol_norm, frobenius_norm, matrix_norm
from certify_cli.numerics.rounding import UNIT
from tests.exact import Exact, Floats, convolution_matrix, excess, leading

FEW, MANY = 192, 10_000
COUNTS = [FEW, pytest.param(MANY, marks=pytest.mark.slow)]
LARGEST = 60
"""Rows or columns of a random case, about."""


@dataclass(frozen=True)
class Figures:
    """Of many cases: how far bounds lie above the true norms, relatively, and below what LAPACK says, at most."""

    count: int
    least: float
    most: float
    worst: object

    @classmethod
    def of(cls, bounds: Iterable[tuple[object, float, Floats]]) -> Figures:
        """(case, bound, matrix) of each; AssertionError, naming the case, where a bound is too small.

        LAPACK's largest singular value s of an (m, n) matrix is within max(m, n) 2^-52 s of the true one.
        """
        found = []
        for case, bound, matrix in bounds:
            s, _, right = leading(matrix)
            if s == 0.0:
                assert bound >= 0.0, case
                continue
            above = excess(bound, Exact.of(matrix).stretch_squared(right))
            assert above >= 0.0, (case, bound, s, above)
            assert bound >= s * (1 - max(matrix.shape) * 2 * UNIT), (case, bound, s)
            found.append((above, case))
        least, worst = min(found, key=lambda pair: pair[0])
        return cls(len(found), least, max(above for above, _ in found), worst)


# --- convolutions --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    kind: str
    seed: int
    weight: Floats
    sizes: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def __repr__(self) -> str:
        kernel = self.weight.shape
        return f"{self.kind} {self.seed}: {kernel} on {self.sizes}, {self.stride}, {self.padding}, {self.dilation}"

    @property
    def matrix(self) -> Floats:
        return convolution_matrix(self.weight, self.sizes, self.stride, self.padding, self.dilation, self.groups)

    @property
    def into(self) -> int:
        """Channels in, of all groups."""
        return self.weight.shape[1] * self.groups

    @property
    def bound(self) -> float:
        return conv_symbol_norm(
            torch.from_numpy(self.weight), self.sizes, self.stride, self.padding, self.dilation, self.groups
        )


def _channels(random: np.random.Generator) -> tuple[int, int, int]:
    """Groups, and channels of each: out and in."""
    return int(random.choice([1, 1, 1, 2, 3])), int(random.integers(1, 4)), int(random.integers(1, 4))


def _any(random: np.random.Generator, seed: int) -> Case:
    """Any convolution of 1 to 3 dimensions, some pixel of which is seen."""
    dims = int(random.integers(1, 4))
    groups, out, into = _channels(random)
    longest = max(2, int((LARGEST / (groups * max(out, into))) ** (1 / dims)))
    while True:
        sizes = random.integers(1, longest + 1, dims)
        kernel = random.integers(1, 5, dims)
        stride, dilation = random.integers(1, 4, dims), random.integers(1, 3, dims)
        padding = random.integers(0, 4, dims)
        counts = (sizes + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
        if (counts < 1).any() or counts.prod() * groups * out > 2 * LARGEST:
            continue
        plain = [tuple(int(v) for v in values) for values in (sizes, stride, padding, dilation)]
        case = Case("any", seed, random.standard_normal((groups * out, into, *kernel)), *plain, groups)
        if case.matrix.any():
            return case


def _attained(random: np.random.Generator, seed: int) -> Case:
    """Two taps of opposite signs an axis, seen by an even number n of pixels and all of n + 1 outputs: a chain, whose
    norm, that of the path of n nodes, is the symbol's at the frequency n / 2 of n + 1. Dilation d makes d such chains.
    """
    dims = int(random.integers(1, 4))
    groups, out, into = _channels(random)
    dilation = random.integers(1, 3, dims) if dims < 3 else np.ones(3, dtype=int)
    longest = max(1, int((LARGEST / (groups * max(out, into))) ** (1 / dims) / 2 / dilation.max()))
    sizes = 2 * random.integers(1, longest + 1, dims) * dilation
    taps = np.ones(())
    for _ in range(dims):
        pair = random.uniform(0.2, 1.0, 2) * np.array([-1.0, 1.0])
        taps = np.multiply.outer(taps, pair)
    mixing = random.standard_normal((groups * out, into))
    weight = np.multiply.outer(mixing, taps)
    return Case(
        "attained", seed, weight, tuple(map(int, sizes)), (1,) * dims, tuple(map(int, dilation)),
        tuple(map(int, dilation)), groups,
    )  # fmt: skip


def _own_symbol(random: np.random.Generator, seed: int) -> Case:
    """One tap, or patches that do not overlap: the norm is the symbol's at every frequency."""
    dims = int(random.integers(1, 4))
    groups, out, into = _channels(random)
    kernel = random.integers(1, 4, dims) if random.random() < 0.5 else np.ones(dims, dtype=int)
    stride = kernel + random.integers(0, 2, dims)
    sizes = kernel + stride * random.integers(0, 2, dims)
    weight = random.standard_normal((groups * out, into, *kernel))
    return Case(
        "own symbol", seed, weight, tuple(map(int, sizes)), tuple(map(int, stride)), (0,) * dims, (1,) * dims, groups
    )


def _apart(random: np.random.Generator, seed: int) -> Case:
    """Every tap reads a channel of its own: the norm is that of the taps as a vector, whatever the waves' phases."""
    kernel = int(random.integers(2, 5))
    weight = np.zeros((1, kernel, kernel))
    weight[0, np.arange(kernel), np.arange(kernel)] = random.standard_normal(kernel)
    return Case("apart", seed, weight, (kernel + int(random.integers(0, 4)),), (1,), (0,), (1,), 1)


KINDS = (_any, _attained, _own_symbol, _apart)
ROUGH: dict[str, Callable[[Floats, np.random.Generator], Floats]] = {
    "as it is": lambda w, random: w,
    "float32": lambda w, random: w.astype(np.float32).astype(np.float64),
    "whole numbers": lambda w, random: np.rint(2 * w),
    "huge": lambda w, random: w * 1e200,
    "small": lambda w, random: w * 1e-200,
    "sparse": lambda w, random: w * (random.random(w.shape) < 0.5),
}


def convolutions(count: int) -> Iterable[Case]:
    """Kinds in turn; every second weight is rounded, scaled or thinned."""
    for seed in range(count):
        random = np.random.default_rng(seed)
        case = KINDS[seed % len(KINDS)](random, seed)
        rough = list(ROUGH)[seed // (2 * len(KINDS)) % len(ROUGH)] if seed // len(KINDS) % 2 else "as it is"
        made = replace(case, kind=f"{case.kind}, {rough}", weight=ROUGH[rough](case.weight, random))
        yield made if made.matrix.any() else case


@pytest.mark.parametrize("count", COUNTS)
def test_the_symbol_bound_is_never_below_the_norm(count: int) -> None:
    figures = Figures.of((case, case.bound, case.matrix) for case in convolutions(count))
    assert figures.count == count
    assert 0.0 <= figures.least < 1e-13


def test_the_oracle_s_matrix_is_torch_s() -> None:
    for case in convolutions(60):
        function = (torch.conv1d, torch.conv2d, torch.conv3d)[len(case.sizes) - 1]
        shape = (case.groups * case.weight.shape[1], *case.sizes)
        basis = torch.eye(int(np.prod(shape)), dtype=torch.float64).reshape(-1, *shape)
        weight = torch.from_numpy(case.weight)
        made = function(basis, weight, None, case.stride, case.padding, case.dilation, case.groups)
        assert np.array_equal(made.flatten(1).T.numpy(), case.matrix), case


def test_where_the_norm_is_attained_the_bound_is_sharp() -> None:
    """These are the cases that tell: any other angle of a tap would show."""
    for seed in range(24):
        for make in (_attained, _own_symbol, _apart):
            case = make(np.random.default_rng(seed), seed)
            _, _, right = leading(case.matrix)
            assert excess(case.bound, Exact.of(case.matrix).stretch_squared(right)) < 1e-8, case


def test_the_oracle_finds_an_angle_in_single_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch makes of integers over an integer, as it once was."""

    waves = norms.waves_at

    def rounded(axes: list[norms.Axis], frequencies: Tensor, kernel: tuple[int, ...], counts: list[int]) -> Tensor:
        turns = (waves(axes, frequencies, kernel, counts).angle() / (2 * torch.pi)).float().double()
        return torch.polar(torch.ones_like(turns), 2 * torch.pi * turns)

    monkeypatch.setattr(norms, "waves_at", rounded)
    with pytest.raises(AssertionError, match="attained"):
        Figures.of((case, case.bound, case.matrix) for case in convolutions(FEW))


def test_frequencies_in_small_chunks_give_the_same_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [case for case in convolutions(24) if case.weight.any()]
    whole = [case.bound for case in cases]
    monkeypatch.setattr(norms, "CHUNK_ENTRIES", 1)
    assert [case.bound for case in cases] == pytest.approx(whole, rel=1e-8)
    Figures.of((case, case.bound, case.matrix) for case in cases)


def test_the_norm_of_the_whole_matrix_of_a_convolution_is_sharp() -> None:
    """From W W^T by the convolution's own products, for wide and tall matrices."""
    cases = [case for case in convolutions(FEW) if case.weight.any() and case.matrix.any()]

    def whole(case: Case) -> float:
        form = (case.stride, case.padding, case.dilation, case.groups)
        return Conv(torch.from_numpy(case.weight), None, *form)._whole_norm((case.into, *case.sizes))

    assert Figures.of((case, whole(case), case.matrix) for case in cases).most < 1e-3
    assert {case.matrix.shape[0] > case.matrix.shape[1] for case in cases} == {False, True}


def test_a_coarse_grid_never_lies_below_the_convolution(monkeypatch: pytest.MonkeyPatch) -> None:
    """The coarsest grid with its factor, against the convolution's matrix; above every torus by the factor at most."""
    cases = [case for case in convolutions(FEW) if case.weight.any()]
    exact = [case.bound for case in cases]
    monkeypatch.setattr(norms, "SYMBOL_OPERATIONS", 0.0)
    Figures.of((case, case.bound, case.matrix) for case in cases)
    monkeypatch.setattr(norms, "DENSITIES", (3,))  # a factor of 2 an axis, of which most is needed somewhere
    coarse = Figures.of((case, case.bound, case.matrix) for case in cases)
    assert coarse.least >= 0
    monkeypatch.setattr(norms, "_grid_factor", lambda degree, count: 1.0)
    assert min(case.bound / bound for case, bound in zip(cases, exact, strict=True)) < 0.75


def test_the_factor_of_a_grid_is_attained() -> None:
    """By cos(m t - pi m / N): between two of N frequencies it is 1, at both of them cos(pi m / N)."""
    for degree, count in ((1.0, 3), (1.0, 16), (2.5, 6), (0.5, 2)):
        grid = 2 * np.pi * np.arange(count) / count
        largest = np.abs(np.cos(degree * (grid - np.pi / count))).max()
        factor = norms._grid_factor(degree, count)
        assert largest * factor >= 1 - 1e-15
        if degree == 1.0 and count % 2 == 0:
            assert factor * np.cos(np.pi * degree / count) == pytest.approx(1.0, rel=1e-14)
    assert norms._grid_factor(0.0, 1) == 1.0
    with pytest.raises(ValueError, match="do not bound"):
        norms._grid_factor(2.0, 4)


def test_a_large_image_takes_a_coarse_grid_and_a_few_per_cent(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(24, 16, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    arguments = (weight, (90, 80), (1, 1), (1, 1), (1, 1))
    exact = conv_symbol_norm(*arguments)
    for budget, most in ((1.1e8, 1.003), (3e7, 1.01), (0.0, 1.04)):
        monkeypatch.setattr(norms, "SYMBOL_OPERATIONS", budget)
        assert exact <= conv_symbol_norm(*arguments) <= most * exact


@pytest.mark.parametrize("toruses", [(5,), (7, 11), (12, 35, 9), (97, 89, 101), (3, 2**20 + 7)])
def test_waves_are_as_near_as_they_are_said_to_be(toruses: tuple[int, ...]) -> None:
    """Against 40 digits: a third of WAVE_ERROR at most, what `norms` proves, for any number of axes."""
    random = np.random.default_rng(len(toruses))
    axes = []
    for torus in toruses:
        axis = norms.Axis(1, 3, 1, 0, 1)
        axis.torus, axis.offset = torus, [int(v) for v in random.integers(-torus, torus, 3)]
        axes.append(axis)
    frequencies = torch.from_numpy(np.stack([random.integers(0, torus, 60) for torus in toruses], axis=1))
    waves = norms.waves_at(axes, frequencies, (3,) * len(toruses), toruses)
    indices = norms.tap_indices((3,) * len(toruses))
    with mpmath.workdps(40):
        for row, wave in zip(frequencies.tolist(), waves.tolist(), strict=True):
            for index, computed in zip(indices, wave, strict=True):
                parts = zip(axes, row, index, strict=True)
                turns = sum(Fraction(f * axis.offset[t], axis.torus) for axis, f, t in parts)
                exact = mpmath.expjpi(mpmath.mpf(2 * turns.numerator) / turns.denominator)
                assert abs(mpmath.mpc(computed) - exact) <= 23 * UNIT
    assert 2 * 23 * UNIT < WAVE_ERROR


# --- matrices ------------------------------------------------------------------------------------------------------


def _orthogonal(random: np.random.Generator, m: int, n: int) -> Floats:
    """All singular values 1, but for rounding."""
    q, _ = np.linalg.qr(random.standard_normal((max(m, n), min(m, n))))
    return q if m >= n else q.T


def _graded(random: np.random.Generator, m: int, n: int) -> Floats:
    return random.standard_normal((m, n)) * np.logspace(0, -14, n)


def _twins(random: np.random.Generator, m: int, n: int) -> Floats:
    """The two largest singular values a relative 1e-12 apart."""
    values = np.linspace(0.1, 1.0, min(m, n))
    values[-2:-1] = 1.0 - 1e-12
    left, right = _orthogonal(random, m, len(values)), _orthogonal(random, n, len(values))
    return (left * values) @ right.T


MATRICES: dict[str, Callable[[np.random.Generator, int, int], Floats]] = {
    "any": lambda random, m, n: random.standard_normal((m, n)),
    "rank one": lambda random, m, n: np.outer(random.standard_normal(m), random.standard_normal(n)),
    "orthogonal": _orthogonal,
    "graded": _graded,
    "twins": _twins,
    "whole numbers": lambda random, m, n: np.rint(2 * random.standard_normal((m, n))),
    "positive": lambda random, m, n: random.uniform(0.9, 1.1, (m, n)),
    "huge": lambda random, m, n: 1e200 * random.standard_normal((m, n)),
    "small": lambda random, m, n: 1e-200 * random.standard_normal((m, n)),
    "denormal": lambda random, m, n: 1e-310 * random.standard_normal((m, n)),
    "diagonal": lambda random, m, n: np.eye(m, n) * random.standard_normal(n),
}


def matrices(count: int) -> Iterable[tuple[str, Floats]]:
    for seed in range(count):
        random = np.random.default_rng(seed)
        kind = list(MATRICES)[seed % len(MATRICES)]
        m, n = (int(v) for v in random.integers(1, LARGEST // 2, 2))
        yield f"{kind} {seed}: {m} x {n}", MATRICES[kind](random, m, n)


@pytest.mark.parametrize("count", COUNTS)
def test_the_matrix_bound_is_never_below_the_norm(count: int) -> None:
    figures = Figures.of((name, matrix_norm(torch.from_numpy(matrix)), matrix) for name, matrix in matrices(count))
    assert figures.count > 0.98 * count  # whole numbers may all be 0
    assert figures.most < 1e-3


# --- operations ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Operation:
    """An affine operation, its matrix, and where it has a weight error, which entries' errors go which way: `signs`
    turns signs of the matrix' entries into those of an error of the weights that moves the norm most, about."""

    name: str
    op: AffineOp
    shape: Shape
    matrix: Floats
    error: int = 0
    signs: Callable[[Floats], Floats] = np.sign


def _of_conv(case: Case, error: int) -> Operation:
    """A weight's error is the same wherever the weight is."""
    weight = case.weight
    where = convolution_matrix(
        np.arange(1.0, weight.size + 1).reshape(weight.shape), case.sizes, case.stride, case.padding, case.dilation,
        case.groups,
    ).astype(np.int64)  # fmt: skip

    def signs(wanted: Floats) -> Floats:
        total = np.bincount(where.ravel(), wanted.ravel(), minlength=weight.size + 1)
        return np.where(total >= 0, 1.0, -1.0)[where]

    op = Conv(torch.from_numpy(weight), None, case.stride, case.padding, case.dilation, case.groups, error)
    return Operation(f"conv {case}", op, (case.groups * weight.shape[1], *case.sizes), case.matrix, error, signs)


def _of_transposed(case: Case, random: np.random.Generator) -> Operation | None:
    """The adjoint of a convolution whose outputs are the sizes of `case`, as torch counts them."""
    dims = len(case.sizes)
    kernel = case.weight.shape[2:]
    more = tuple(int(random.integers(0, max(s, d))) for s, d in zip(case.stride, case.dilation, strict=True))
    axes = zip(case.sizes, case.stride, case.padding, case.dilation, kernel, more, strict=True)
    sizes = tuple((n - 1) * s - 2 * p + d * (k - 1) + o + 1 for n, s, p, d, k, o in axes)
    if min(sizes) < 1 or np.prod(sizes) * case.groups * case.weight.shape[1] > 3 * LARGEST:
        return None
    weight = torch.from_numpy(case.weight)
    op = ConvTranspose(weight, None, case.stride, case.padding, more, case.dilation, case.groups)
    shape = (case.weight.shape[0], *case.sizes)
    forward = convolution_matrix(case.weight, sizes, case.stride, case.padding, case.dilation, case.groups)
    if forward.shape[0] != int(np.prod(shape)) or len(sizes) != dims:
        return None
    return Operation(f"transposed {case} + {more}", op, shape, forward.T)


def _copies(random: np.random.Generator, seed: int) -> Operation:
    """Data movement: zeros, and entries that are used once, twice, ..."""
    inputs, outputs = (int(v) for v in random.integers(1, 12, 2))
    index = random.integers(-1, inputs, outputs)
    matrix = np.zeros((outputs, inputs))
    matrix[np.flatnonzero(index >= 0), index[index >= 0]] = 1.0
    return Operation(f"select {seed}", Select(torch.from_numpy(index), inputs), (inputs,), matrix)


def operations(count: int) -> Iterable[Operation]:
    cases = iter(convolutions(count))
    for seed, (name, matrix) in enumerate(matrices(count)):
        random, case = np.random.default_rng(seed), next(cases)
        error = int(random.integers(0, 4)) * (1 if seed % 3 else 2**20)
        weight = torch.from_numpy(matrix)
        if seed % 5 == 0:
            yield Operation(f"dense {name}", Dense(weight, None, error), (matrix.shape[1],), matrix, error)
        elif seed % 5 == 1:
            factors = matrix[0]
            scale = Scale(torch.from_numpy(factors.copy()), error)
            yield Operation(f"scale {name}", scale, factors.shape, np.diag(factors), error)
        elif seed % 5 == 2:
            yield _copies(random, seed)
        elif seed % 5 == 3:
            yield _of_conv(case, error)
        elif (transposed := _of_transposed(case, random)) is not None:
            yield transposed


@pytest.mark.parametrize("count", COUNTS)
def test_no_norm_of_an_operation_is_below_the_true_one(count: int) -> None:
    """Spectral, longest row, largest row sum and Frobenius, with weights as stored and off by what they may be off."""
    seen = 0
    for operation in operations(count):
        op, shape, matrix = operation.op, operation.shape, operation.matrix
        assert (matrix.shape[1], matrix.shape[0]) == (np.prod(shape), np.prod(op.output_shape(shape))), operation.name
        s, left, right = leading(matrix)
        if s == 0.0:
            continue
        seen += 1
        one = Exact(np.full(matrix.shape, 2**53, dtype=object), -53)
        for signs in (operation.signs(np.outer(left, right) * matrix), np.ones(matrix.shape)):
            off = Exact(one.values + operation.error * signs.astype(np.int64).astype(object), -53)
            exact = Exact.of(matrix).times(off)
            rows = exact.norms_squared()
            assert excess(op.norm(shape), exact.stretch_squared(right)) >= 0.0, operation.name
            assert excess(op.row_norm(shape), max(rows)) >= 0.0, operation.name
            assert excess(op.frobenius_norm(shape), sum(rows, Fraction(0))) >= 0.0, operation.name
            assert excess(op.infinity_norm(shape), max(exact.absolute_sums()) ** 2) >= 0.0, operation.name
    assert seen > 0.8 * count


def test_the_frobenius_bound_is_never_below_the_norm() -> None:
    for name, matrix in matrices(FEW):
        if matrix.any():
            squared = sum(Exact.of(matrix).norms_squared(), Fraction(0))
            assert 0.0 <= excess(frobenius_norm(torch.from_numpy(matrix)), squared) < 1e-9, name
