"""The activation table against 50-digit arithmetic: values, errors, extreme values, ranges on intervals, lookups."""

from __future__ import annotations

import math

import mpmath
import pytest
import torch
from mpmath import mpf
from torch import Tensor, nn

from certify_cli.errors import ModelError, UsageError
from certify_cli.network.activations import ACTIVATIONS, Activation, from_module, from_name, from_onnx
from certify_cli.network.activations.monotone_pieces import Curve
from certify_cli.network.activations.table import row
from tests.oracles import EVERY_CASE, EXACT, Exact, double

ORACLE = mpf(10) ** -45
"""What numerical differentiation with 50 digits may be off by."""


def curves(activation: Activation) -> list[tuple[int, Curve]]:
    """(order of the derivative, curve)."""
    listed = [(0, activation.value), (1, activation.slope)]
    return listed if activation.curvature is None else [*listed, (2, activation.curvature)]


def derivative(exact: Exact, order: int, z: float) -> mpf:
    return exact(mpf(z)) if order == 0 else mpmath.diff(exact, mpf(z), order)


def grid(jumps: tuple[float, ...]) -> list[float]:
    """Dense near the origin, then tails up to 1e6; no point at or next to a jump."""
    generator = torch.Generator().manual_seed(0)
    near = (torch.rand(160, generator=generator, dtype=torch.float64) * 24 - 12).tolist()
    tails = [s * 10.0**e * f for s in (-1, 1) for e in range(1, 6) for f in (1.0, 2.7, 7.4)] + [-1e6, 1e6]
    tiny = [s * 10.0**-e for s in (-1, 1) for e in (1, 3, 6, 9, 12)]
    points = near + tails + tiny + ([] if jumps else [0.0])
    return [z for z in points if all(abs(z - jump) > 1e-14 for jump in jumps)]


def test_every_row_is_tested() -> None:
    assert {name for name, _ in EXACT} == set(ACTIVATIONS)


@pytest.mark.smoke
@EVERY_CASE
def test_computed_values_honour_half_their_stated_error(name: str, numbers: tuple[float, ...]) -> None:
    exact, jumps = EXACT[name, numbers]
    activation = ACTIVATIONS[name](*numbers)
    points = grid(jumps)
    for order, curve in curves(activation):
        computed, stated = curve(double(points)), curve.error(double(points))
        assert bool(computed.isfinite().all())
        assert float(stated.max()) < 1e-13 * max(1.0, float(computed.abs().max()))
        for z, got, bound in zip(points, computed.tolist(), stated.tolist(), strict=True):
            error = abs(mpf(got) - derivative(exact, order, z))
            assert error <= bound / 2 + ORACLE, f"order {order} at {z}: off by {float(error)}, stated {bound}"


@EVERY_CASE
def test_stored_turning_points_against_fifty_digits(name: str, numbers: tuple[float, ...]) -> None:
    """Smooth turns: the derivative changes sign within the stated slack, and the value is in the stated interval."""
    exact, jumps = EXACT[name, numbers]
    for order, curve in curves(ACTIVATIONS[name](*numbers)):
        for point in curve.critical_points:
            if not math.isfinite(point.abscissa) or any(abs(point.abscissa - jump) < 1e-9 for jump in jumps):
                continue
            slack = max(point.slack, 1e-15 * abs(point.abscissa), 1e-25)
            before = derivative(exact, order + 1, mpf(point.abscissa) - slack)
            after = derivative(exact, order + 1, mpf(point.abscissa) + slack)
            assert before * after < 0, f"order {order}: no point at {point.abscissa}"
            place = mpmath.findroot(
                lambda z, order=order: mpmath.diff(exact, z, order + 1),
                (mpf(point.abscissa) - slack, mpf(point.abscissa) + slack),
                solver="anderson",
                tol=1e-40,
                verify=False,
            )
            value = derivative(exact, order, place)
            assert point.low - mpf(10) ** -40 <= value <= point.high + mpf(10) ** -40
            assert point.high - point.low <= 1e-14 * (1 + abs(point.high))


@EVERY_CASE
def test_jumps_hold_the_one_sided_limits(name: str, numbers: tuple[float, ...]) -> None:
    exact, jumps = EXACT[name, numbers]
    activation = ACTIVATIONS[name](*numbers)
    for jump in jumps:
        step = mpf(10) ** -12
        for order, curve in curves(activation)[1:]:
            low, high = (float(t) for t in curve.on(double([jump - 1e-9]), double([jump + 1e-9])))
            sides = [mpmath.diff(exact, mpf(jump) + side * step, order) for side in (-1, 1)]
            assert low <= min(sides) + 1e-9
            assert high >= max(sides) - 1e-9
            assert low >= min(sides) - 1e-6
            assert high <= max(sides) + 1e-6


@EVERY_CASE
def test_global_ranges_are_attained_and_never_exceeded(name: str, numbers: tuple[float, ...]) -> None:
    activation = ACTIVATIONS[name](*numbers)
    places = [
        point.abscissa
        for _, curve in curves(activation)
        for point in curve.critical_points
        if math.isfinite(point.abscissa)
    ]
    beside = [place + side for place in places for side in (-1e-9, 0.0, 1e-9)]
    z = torch.cat([torch.linspace(-30, 30, 200_001, dtype=torch.float64), double([*beside, -1e6, 1e6])])
    for order, curve in curves(activation):
        low, high = curve.range
        values, error = curve(z), curve.error(z)
        assert bool((values + error >= low).all())
        assert bool((values - error <= high).all())
        if order > 0:
            assert float(values.min()) <= low + 1e-6
            assert float(values.max()) >= high - 1e-6
    assert activation.slope_range == activation.slope.range
    assert activation.lipschitz == max(abs(activation.slope_range[0]), abs(activation.slope_range[1]))


def intervals() -> tuple[Tensor, Tensor]:
    """Thousands: narrow, moderate, wide, at and across jumps, far tails, points."""
    generator = torch.Generator().manual_seed(1)
    uniform = torch.rand(6, 1000, generator=generator, dtype=torch.float64) * 2 - 1
    centres = torch.cat([uniform[0] * 6, uniform[1] * 6, uniform[2] * 6, uniform[3] * 1e3, uniform[4] * 0.1])
    widths = torch.cat([torch.full((1000,), w, dtype=torch.float64) for w in (1e-6, 0.3, 3.0, 40.0, 1e-2)])
    widths = widths * torch.rand(5000, generator=generator, dtype=torch.float64)
    centres = torch.cat([centres, double([0, 0, 0, -3, 3, 6, 1e6, -1e6, -1.5, 3.5])])
    widths = torch.cat([widths, double([0, 1e-300, 1, 0, 0, 0, 1, 1, 0, 0])])
    return centres - widths, centres + widths


@EVERY_CASE
def test_ranges_on_intervals_hold_every_sample_and_are_tight(name: str, numbers: tuple[float, ...]) -> None:
    activation, jumps = ACTIVATIONS[name](*numbers), EXACT[name, numbers][1]
    lo, hi = intervals()
    fractions = torch.linspace(0, 1, 401, dtype=torch.float64)
    samples = torch.minimum(torch.maximum(lo[:, None] + (hi - lo)[:, None] * fractions, lo[:, None]), hi[:, None])
    tight = (hi - lo > 1e-3) & (hi - lo < 1)
    for jump in jumps:
        tight &= (lo > jump) | (hi < jump)
    for order, curve in curves(activation):
        low, high = curve.on(lo, hi)
        values, error = curve(samples), curve.error(samples)
        # Rounded sample and rounded end may differ by one evaluation error each.
        assert bool((values + error >= low[:, None]).all())
        assert bool((values - error <= high[:, None]).all())
        # a grid of 400 steps misses a smooth extreme by at most |g''| step^2 / 8
        tolerance = 1e-4 if order else 1e-5
        assert bool((low >= values.min(dim=1).values - tolerance)[tight].all())
        assert bool((high <= values.max(dim=1).values + tolerance)[tight].all())


@EVERY_CASE
def test_ranges_on_moderate_intervals_are_tight_to_a_millionth(name: str, numbers: tuple[float, ...]) -> None:
    lo = double([-5.2, -2.9, -2.31, -1.3, -0.6, 0.1, 0.35, 0.8, 1.4, 2.2])
    hi = lo + 0.5
    samples = lo[:, None] + 0.5 * torch.linspace(0, 1, 20_001, dtype=torch.float64)
    for _, curve in curves(ACTIVATIONS[name](*numbers)):
        values = curve(samples)
        low, high = curve.on(lo, hi)
        assert float((values.min(dim=1).values - low).max()) <= 1e-6
        assert float((high - values.max(dim=1).values).max()) <= 1e-6


@EVERY_CASE
def test_infinite_ends_nan_and_shapes(name: str, numbers: tuple[float, ...]) -> None:
    whole = double([-math.inf]).reshape(1, 1), double([math.inf]).reshape(1, 1)
    for _, curve in curves(ACTIVATIONS[name](*numbers)):
        low, high = curve.on(*whole)
        assert low.shape == high.shape == (1, 1)
        assert (float(low), float(high)) == curve.range
        left, right = curve.on(double([-math.inf, 1.0]), double([-1.0, math.inf]))
        z = torch.linspace(1, 50, 4001, dtype=torch.float64)
        for side, low_, high_ in zip((-z, z), left, right, strict=True):
            assert float(curve(side).min()) >= float(low_) - 1e-14
            assert float(curve(side).max()) <= float(high_) + 1e-14
        nan = double([math.nan])
        assert bool(torch.stack(curve.on(nan, nan)).isnan().all()), "NaN must not pass for a range"


def test_the_whole_jump_is_the_error_where_a_rounded_kink_cannot_be_told() -> None:
    activation = ACTIVATIONS["hard_sigmoid"](0.2, 0.3)
    kink = -0.3 / 0.2
    low, high = activation.slope_on(double([kink]), double([kink]))
    assert (float(low), float(high)) == (0.0, 0.2)
    assert float(activation.slope_error(double([kink]))) >= 0.2
    assert float(activation.slope_error(double([kink + 1e-9]))) < 1e-15


def test_a_wave_is_unknown_where_float64_has_lost_its_phase() -> None:
    sine = ACTIVATIONS["sin"]()
    for z in (1e17, -1e17, 1e300):
        assert [float(end) for end in sine.slope_on(double([z]), double([z]))] == [-1.0, 1.0]
    low, high = sine.slope_on(double([1e6 * math.pi + 0.1]), double([1e6 * math.pi + 0.2]))
    assert float(low) == pytest.approx(math.cos(0.2), abs=1e-8)
    assert float(high) == pytest.approx(math.cos(0.1), abs=1e-8)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@EVERY_CASE
def test_devices_agree_within_the_stated_error(name: str, numbers: tuple[float, ...]) -> None:
    z = double(grid(EXACT[name, numbers][1]))
    for _, curve in curves(ACTIVATIONS[name](*numbers)):
        assert bool(((curve(z.cuda()).cpu() - curve(z)).abs() <= curve.error(z)).all())
        low, high = curve.on(z.cuda() - 0.1, z.cuda() + 0.1)
        assert low.is_cuda
        assert bool((low <= high).all())


@EVERY_CASE
def test_sup_of_the_third_derivative(name: str, numbers: tuple[float, ...]) -> None:
    activation = ACTIVATIONS[name](*numbers)
    if activation.curvature is None:
        assert activation.third_sup is None
        return
    assert activation.third_sup is not None
    z = torch.linspace(-9, 9, 360_002, dtype=torch.float64)  # 0 is not among the points
    curvature = activation.curvature(z)
    quotient = (curvature[1:] - curvature[:-1]) / (z[1:] - z[:-1])
    quotient = quotient[~((z[:-1] < 0) & (z[1:] > 0))] if EXACT[name, numbers][1] else quotient
    steepest = float(quotient.abs().max())
    assert steepest <= activation.third_sup * (1 + 1e-9)
    assert steepest >= activation.third_sup * (1 - 1e-3)


@EVERY_CASE
def test_curves_keep_the_type_and_agree_with_autograd(name: str, numbers: tuple[float, ...]) -> None:
    activation = ACTIVATIONS[name](*numbers)
    z = torch.linspace(-7.03, 7.01, 300, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(activation.value(z).sum(), z)
    torch.testing.assert_close(gradient, activation.slope(z.detach()), rtol=1e-9, atol=1e-9)
    for _, curve in curves(activation):
        assert curve(z.detach().float()).dtype == torch.float32


MODULES: list[tuple[nn.Module, str]] = [
    (nn.Tanh(), "tanh"),
    (nn.Sigmoid(), "sigmoid"),
    (nn.Softplus(), "softplus(beta=1, threshold=20)"),
    (nn.Softplus(beta=5, threshold=30), "softplus(beta=5, threshold=30)"),
    (nn.LogSigmoid(), "log_sigmoid"),
    (nn.GELU(), "gelu"),
    (nn.GELU(approximate="tanh"), "gelu_tanh"),
    (nn.SiLU(), "silu"),
    (nn.Mish(), "mish"),
    (nn.Softsign(), "softsign"),
    (nn.ELU(), "elu(alpha=1)"),
    (nn.ELU(alpha=0.5), "elu(alpha=0.5)"),
    (nn.CELU(alpha=0.5), "celu(alpha=0.5)"),
    (nn.SELU(), "selu(alpha=1.67326, gamma=1.0507)"),
    (nn.ReLU(), "relu"),
    (nn.LeakyReLU(0.2), "leaky_relu(negative_slope=0.2)"),
    (nn.ReLU6(), "clip(low=0, high=6)"),
    (nn.Hardtanh(-2.0, 3.0), "clip(low=-2, high=3)"),
    (nn.Hardsigmoid(), "hard_sigmoid(alpha=0.166667, beta=0.5)"),
    (nn.Hardswish(), "hard_swish"),
]


@pytest.mark.parametrize(("module", "title"), MODULES, ids=[title for _, title in MODULES])
def test_modules_become_their_row(module: nn.Module, title: str) -> None:
    activation = from_module(module)
    assert activation is not None
    assert activation.title == title
    z = torch.linspace(-50, 50, 4001, dtype=torch.float64)
    allowed = activation.value_error(z) * 2 + activation.deviation
    assert bool(((activation.apply(z) - module(z)).abs() <= allowed).all())
    again = ACTIVATIONS[activation.name](**activation.parameters)
    assert torch.equal(again.value(z), activation.value(z))
    assert activation.output_shape((3, 4)) == (3, 4)


def test_modules_are_known_by_their_exact_type() -> None:
    class Shifted(nn.Tanh):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + x.sin()

    assert from_module(Shifted()) is None
    assert from_module(nn.Softmax(dim=1)) is None


def test_the_deviation_of_a_thresholded_softplus_is_attained() -> None:
    module = nn.Softplus(beta=2, threshold=20)
    activation = from_module(module)
    assert activation is not None
    z = 10 + torch.linspace(0, 1e-6, 1001, dtype=torch.float64)
    worst = float((module(z) - activation.value(z)).abs().max())
    assert 0.99 * activation.deviation <= worst <= activation.deviation + float(activation.value_error(z).max())
    assert mpf(activation.deviation) >= mpmath.log1p(mpmath.exp(-20)) / 2


def test_unusable_parameters_are_refused_with_the_reason() -> None:
    with pytest.raises(ModelError, match="threshold=5"):
        from_module(nn.Softplus(threshold=5))
    with pytest.raises(ModelError, match="beta=-1"):
        ACTIVATIONS["softplus"](beta=-1)
    with pytest.raises(ModelError, match="negative_slope=nan"):
        from_module(nn.LeakyReLU(math.nan))
    with pytest.raises(ModelError, match="below high"):
        ACTIVATIONS["clip"](low=3, high=1)
    with pytest.raises(ModelError, match="changes nothing"):
        ACTIVATIONS["clip"]()


def test_names_with_numbers() -> None:
    assert from_name("tanh").name == "tanh"
    assert from_name("softplus:5").parameters == {"beta": 5.0, "threshold": None}
    assert from_name(" Leaky-ReLU:0.2 ").title == "leaky_relu(negative_slope=0.2)"
    assert from_name("clip:0,6").title == "clip(low=0, high=6)"


@pytest.mark.parametrize("text", ["softmax", "softplus:five", "tanh:3", "softplus:1,20,3", "softplus:-1", ""])
def test_names_that_are_refused(text: str) -> None:
    with pytest.raises(UsageError):
        from_name(text)


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(UsageError, match="unknown activation 'gulu'") as caught:
        from_name("gulu")
    assert all(name in str(caught.value) for name in ACTIVATIONS)


def test_onnx_operators() -> None:
    def title(operator: str, **attributes: object) -> str | None:
        activation = from_onnx(operator, attributes)
        return None if activation is None else activation.title

    assert title("Tanh") == "tanh"
    assert title("Gelu") == "gelu"
    assert title("Gelu", approximate="tanh") == "gelu_tanh"
    assert title("Elu", alpha=0.5) == "elu(alpha=0.5)"
    assert title("LeakyRelu", alpha=0.25) == "leaky_relu(negative_slope=0.25)"
    assert title("LeakyRelu") == "leaky_relu(negative_slope=0.01)"
    assert title("HardSigmoid") == "hard_sigmoid(alpha=0.2, beta=0.5)"
    assert title("Clip", min=0.0, max=6.0) == "clip(low=0, high=6)"
    assert title("Clip", min=0.0) == "clip(low=0)"
    assert title("Swish", alpha=2.0) is None
    assert title("Softmax") is None


def test_onnx_operators_and_defaults_are_those_of_the_standard() -> None:
    """Every operator named in the table exists, with the attributes and defaults that the table says."""
    defs = pytest.importorskip("onnx.defs")
    from certify_cli.network.activations import table as activation_table

    for operator, spellings in activation_table._OPERATORS.items():
        schema = defs.get_schema(operator, 6 if operator == "Clip" else defs.onnx_opset_version())
        for _, spelling in spellings:
            for key in (*spelling.parameters.values(), *spelling.requires):
                assert key in schema.attributes, f"{operator} has no attribute {key}"
            for key, value in spelling.defaults.items():
                default = schema.attributes[key].default_value
                assert value == (default.s.decode() if default.s else default.f)


def test_a_second_entry_of_a_name_is_refused() -> None:
    def tanh() -> Activation:
        return ACTIVATIONS["relu"]()

    with pytest.raises(ValueError, match="entered twice"):
        row()(tanh)


def test_a_jumping_slope_has_no_curvature() -> None:
    activation = ACTIVATIONS["relu"]()
    assert activation.curvature_range is None
    assert activation.curvature_sup == math.inf
    with pytest.raises(ValueError, match="no curvature"):
        activation.curvature_on(double([0.0]), double([1.0]))


def test_theory_table_ranges() -> None:
    """The decimals of theory's table, as it prints them."""
    table = {
        "tanh": ((0, 1), 4 / (3 * math.sqrt(3)), 2),
        "gelu": ((-0.128904146, 1.128904146), 0.797884561, 0.778769636),
        "gelu_tanh": ((-0.12899307, 1.12899307), 0.797884561, 0.7766915),
        "silu": ((-0.09983933, 1.09983933), 0.5, 0.3081816),
        "mish": ((-0.11252613, 1.08849817), 0.64420464, 0.58841205),
        "erf": ((0, 2 / math.sqrt(math.pi)), 0.9678829, 4 / math.sqrt(math.pi)),
    }
    for name, (slopes, curvature, third) in table.items():
        activation = ACTIVATIONS[name]()
        assert activation.slope_range == pytest.approx(slopes, abs=2e-8)
        assert activation.curvature_sup == pytest.approx(curvature, abs=2e-8)
        assert activation.third_sup == pytest.approx(third, abs=2e-7)


def test_importing_the_table_loads_no_model_library() -> None:
    import subprocess
    import sys

    probe = (
        "import sys, certify_cli.network.activations.rows; "
        "print([m for m in ('onnx', 'onnx2torch', 'torchvision', 'sklearn', 'mpmath') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
