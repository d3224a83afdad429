"""Every affine primitive against the matrix it stands for: values, transpose, |W| and the four norms."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from certify_cli.network.affine import AffineOp, Dense, Scale, Shift, materialise
from certify_cli.network.convolution import Conv, ConvTranspose
from certify_cli.network.graph import Add, Builder, Concat, Shape
from certify_cli.network.movement import Reshape, Select


def _randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


CASES: dict[str, tuple[AffineOp, Shape]] = {
    "dense": (Dense(_randn(4, 7), _randn(4)), (7,)),
    "dense on the last axis": (Dense(_randn(4, 7)), (3, 7)),
    "dense with rounded weights": (Dense(_randn(2, 9), _randn(2), weight_error=5), (9,)),
    "conv 1d": (Conv(_randn(3, 2, 3), _randn(3), (2,), (1,), (1,)), (2, 9)),
    "conv": (Conv(_randn(3, 2, 3, 3), _randn(3), (1, 1), (1, 1), (1, 1)), (2, 6, 5)),
    "conv strided and dilated": (Conv(_randn(3, 2, 3, 2), None, (2, 1), (1, 0), (2, 1)), (2, 8, 5)),
    "conv grouped": (Conv(_randn(4, 1, 3, 3), _randn(4), (1, 1), (0, 0), (1, 1), 2), (2, 5, 5)),
    "conv 3d": (Conv(_randn(2, 1, 2, 2, 2), None, (1, 1, 1), (0, 1, 0), (1, 1, 1)), (1, 3, 3, 4)),
    "transposed conv": (ConvTranspose(_randn(2, 3, 3, 3), _randn(3), (2, 2), (1, 1), (1, 1), (1, 1)), (2, 4, 4)),
    "transposed conv grouped": (
        ConvTranspose(_randn(4, 1, 3, 3), None, (1, 1), (0, 0), (0, 0), (1, 1), 2),
        (4, 3, 3),
    ),
    "scale": (Scale(_randn(3, 1, 1)), (3, 2, 2)),
    "shift": (Shift(_randn(3, 1, 1)), (3, 2, 2)),
    "reshape": (Reshape((12,)), (3, 2, 2)),
    "transpose": (Select.of(lambda t: t.permute(0, 3, 1, 2), (4, 3, 2)), (4, 3, 2)),
    "slice": (Select.of(lambda t: t[:, 1:3, ::2], (4, 5)), (4, 5)),
    "zero padding": (Select.of(lambda t: F.pad(t, (1, 2, 0, 1)), (1, 3, 3)), (1, 3, 3)),
    "reflection": (Select.of(lambda t: F.pad(t, (2, 2, 1, 1), mode="reflect"), (1, 6, 4)), (1, 6, 4)),
    "replication": (Select.of(lambda t: F.pad(t, (2, 1, 2, 1), mode="replicate"), (1, 3, 3)), (1, 3, 3)),
    "one-pixel replication": (Select.of(lambda t: F.pad(t, (1, 2), mode="replicate"), (2, 1)), (2, 1)),
    "circular": (Select.of(lambda t: F.pad(t, (2, 1, 2, 1), mode="circular"), (1, 3, 3)), (1, 3, 3)),
    "expansion": (Select.of(lambda t: t.expand(-1, 3, 4), (1, 4)), (1, 4)),
    "nearest upsampling": (Select.of(lambda t: F.interpolate(t, scale_factor=2), (2, 3, 3)), (2, 3, 3)),
}


@pytest.fixture(params=CASES, name="case")
def _case(request: pytest.FixtureRequest) -> tuple[AffineOp, Shape, Tensor]:
    op, shape = CASES[request.param]
    basis = torch.eye(math.prod(shape), dtype=torch.float64).reshape(-1, *shape)
    return op, shape, op.linear(basis).flatten(1).T


def test_apply_is_linear_plus_bias_and_batches(case: tuple[AffineOp, Shape, Tensor]) -> None:
    op, shape, matrix = case
    x = _randn(3, *shape)
    out = op.apply(x)
    assert tuple(out.shape[1:]) == op.output_shape(shape)
    zero = op.apply(torch.zeros(1, *shape, dtype=torch.float64)).flatten(1)
    assert torch.allclose(out.flatten(1), x.flatten(1) @ matrix.T + zero, atol=1e-12)
    bias = op.bias()
    expected = torch.zeros_like(out[0]) if bias is None else bias.expand_as(out[0])
    assert torch.equal(zero[0], expected.flatten())


def test_transpose_and_absolute_value(case: tuple[AffineOp, Shape, Tensor]) -> None:
    op, shape, matrix = case
    y = _randn(2, *op.output_shape(shape))
    x = _randn(2, *shape)
    assert torch.allclose(op.transpose(y, shape).flatten(1), y.flatten(1) @ matrix, atol=1e-12)
    assert torch.allclose(op.absolute(x).flatten(1), x.flatten(1) @ matrix.abs().T, atol=1e-12)
    assert torch.allclose(op.absolute_transpose(y, shape).flatten(1), y.flatten(1) @ matrix.abs(), atol=1e-12)
    assert torch.equal(materialise(op, shape, chunk=5), matrix)


@pytest.mark.smoke
def test_norms_bound_the_matrix(case: tuple[AffineOp, Shape, Tensor]) -> None:
    op, shape, matrix = case
    spectral = float(torch.linalg.svdvals(matrix)[0])
    bounds = {
        "norm": (op.norm(shape), spectral),
        "quick": (op.quick_norm(shape), spectral),
        "row": (op.row_norm(shape), float(matrix.norm(dim=1).max())),
        "infinity": (op.infinity_norm(shape), float(matrix.abs().sum(1).max())),
        "frobenius": (op.frobenius_norm(shape), float(matrix.norm())),
    }
    for name, (bound, oracle) in bounds.items():
        assert bound >= oracle * (1 - 1e-14), name
    assert op.norm(shape) <= spectral * (1 + 1e-6) + 1e-12


def test_padding_multiplicities_are_theorys() -> None:
    """Replicate: pad + 1 an axis (one-pixel axis: all copies); reflect: 2 an axis; zero padding: 1."""
    assert CASES["zero padding"][0].norm((1, 3, 3)) == 1.0
    assert CASES["replication"][0].norm((1, 3, 3)) == pytest.approx(math.sqrt(3 * 3))
    assert CASES["one-pixel replication"][0].norm((2, 1)) == pytest.approx(math.sqrt(1 + 2 + 1))
    # six rows padded by 1: twice at most; four columns padded by 2: the reflections meet, three times
    assert CASES["reflection"][0].norm((1, 6, 4)) == pytest.approx(math.sqrt(2 * 3))
    assert CASES["circular"][0].norm((1, 3, 3)) == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("op", "shape"),
    [
        (CASES["dense"][0], (6,)),
        (CASES["conv"][0], (3, 6, 6)),
        (CASES["conv"][0], (2, 6)),
        (Conv(_randn(1, 1, 5, 5), None, (1, 1), (0, 0), (1, 1)), (1, 3, 3)),
        (CASES["transposed conv"][0], (3, 4, 4)),
        (CASES["scale"][0], (4, 2, 2)),
        (CASES["shift"][0], (2, 2)),
        (CASES["reshape"][0], (13,)),
        (CASES["slice"][0], (5, 5)),
        (Add(), (3,)),
    ],
)
def test_shapes_that_do_not_fit_are_refused(op: AffineOp, shape: Shape) -> None:
    builder = Builder(shape)
    other = builder.add("pad", Select.of(lambda t: F.pad(t, (0, 1)), shape), 0)
    inputs = (0, other) if isinstance(op, Add) else (0,)
    with pytest.raises(ValueError, match=r"cannot|does not fit|larger"):
        builder.add("node", op, *inputs)


def test_builder_drops_what_does_not_lead_to_the_output_and_keeps_names_unique() -> None:
    builder = Builder((4,))
    left = builder.add("fc", Dense(_randn(3, 4)), 0)
    builder.add("unused", Dense(_randn(2, 4)), 0)
    right = builder.add("fc", Dense(_randn(2, 4)), 0)
    network = builder.build(builder.add("join", Concat(0), left, right))
    assert [node.name for node in network.nodes] == ["input", "fc", "fc.2", "join"]
    assert network.classes == 5
    assert network(_randn(2, 4)).shape == (2, 5)


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize(("channels", "outputs", "groups"), [(1, 1, 1), (3, 2, 1), (2, 6, 1), (4, 8, 2), (3, 3, 3)])
@pytest.mark.parametrize(("kernel", "dilation"), [((3, 3), 1), ((3, 2), 2), ((1, 5), 3), ((1, 1), 1)])
def test_quick_norms_are_bounds_at_equal_weights(
    stride: int, channels: int, outputs: int, groups: int, kernel: tuple[int, int], dilation: int
) -> None:
    """Of one sign, the weights of overlapping windows add up as far as they can: on average more than random ones."""
    shape, size = (channels, 12, 14), (outputs, channels // groups, *kernel)
    for weight in (torch.ones(size, dtype=torch.float64), _randn(*size)):
        op = Conv(weight, None, (stride, stride), (1, 0), (dilation, dilation), groups)
        spectral = float(torch.linalg.matrix_norm(materialise(op, shape), 2))
        assert spectral <= op.quick_norm(shape) <= 3.5 * spectral


TINY = [
    ((2, 2), (3, 3), (1, 1), (1, 1), (1, 1)),
    ((2, 1), (3, 2), (2, 1), (2, 1), (1, 1)),
    ((3, 2), (3, 3), (1, 1), (2, 2), (2, 2)),
    ((3,), (5,), (2,), (2,), (1,)),
    ((4, 4), (3, 3), (2, 2), (1, 1), (1, 1)),
    ((1, 1, 2), (2, 1, 2), (1, 1, 1), (1, 0, 0), (1, 1, 1)),
]


@pytest.mark.parametrize(("image", "kernel", "stride", "padding", "dilation"), TINY)
def test_a_tiny_image_is_convolved_by_a_matrix_of_the_weights(
    image: Shape, kernel: Shape, stride: Shape, padding: Shape, dilation: Shape
) -> None:
    """Each weight stands at its place, bit by bit as torch's convolution places it."""
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 3, *kernel, dtype=torch.float64, generator=g)
    op, shape = Conv(weight, None, stride, padding, dilation), (3, *image)
    assert op._tiny(shape)
    inputs, outputs = math.prod(shape), math.prod(op.output_shape(shape))
    convolve = (torch.nn.functional.conv1d, torch.nn.functional.conv2d, torch.nn.functional.conv3d)[len(image) - 1]
    units = torch.eye(inputs, dtype=torch.float64).reshape(inputs, *shape)
    placed = convolve(units, weight, None, stride, padding, dilation).flatten(1).T
    assert torch.equal(op.linear(units).flatten(1).T, placed)
    assert torch.equal(op.absolute(units).flatten(1).T, placed.abs())
    back = torch.eye(outputs, dtype=torch.float64).reshape(outputs, *op.output_shape(shape))
    assert torch.equal(op.transpose(back, shape).flatten(1), placed)
    assert torch.equal(op.absolute_transpose(back, shape).flatten(1), placed.abs())
    x = torch.randn(4, *shape, dtype=torch.float64, generator=g)
    expected = convolve(x, weight, None, stride, padding, dilation)
    slack = 2 * op.terms * 2.0**-53 * op.absolute(x.abs())
    assert bool(((op.linear(x) - expected).abs() <= slack).all())


def test_a_transposed_convolution_whose_transpose_is_too_large_is_refused_when_it_is_built() -> None:
    op = ConvTranspose(torch.zeros(1, 512, 5, 5, dtype=torch.float64), None, (1, 1), (0, 0), (0, 0), (1, 1))
    with pytest.raises(ValueError, match="12100 places is too large"):
        op.output_shape((1, 110, 110))
    assert op.output_shape((1, 4, 4)) == (512, 8, 8)
