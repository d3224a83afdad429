"""Low-curvature networks: their layers are what they claim, and load, certify and convert like any other."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import parametrize

from certify_cli import certify, load_model
from certify_cli.errors import UsageError
from certify_cli.load.convert import convert
from certify_cli.load.safetensors.architecture import build
from certify_cli.network.activations import from_name
from certify_cli.training import CRT, CentredSoftplus, LipschitzBatchNorm, LowCurvature, spectral_norm
from certify_cli.training.architectures import LayeredModule, Style, architecture
from certify_cli.training.differentiable import DifferentiableNetwork
from certify_cli.training.export import Made, write_onnx
from certify_cli.training.loop import Training, TrainingData
from certify_cli.training.low_curvature import betas, log_gammas
from certify_cli.training.objectives import GRADIENT_SCALE
from certify_cli.training.recipe import NORMS, OBJECTIVES, Recipe
from tests.training.modules import CLASSES, SHAPE, assert_gradients_fit, batch, convolutional, dense, prepared
from tests.training.runs import CPU, STYLE


def low_curvature(image: bool) -> nn.Module:
    """In float32 and evaluation mode, with statistics and vectors of some batches."""
    torch.manual_seed(1)
    first: list[nn.Module] = (
        [spectral_norm(nn.Conv2d(1, 5, 3, padding=1)), LipschitzBatchNorm(5), CentredSoftplus(), nn.Flatten()]
        if image
        else [nn.Flatten(), spectral_norm(nn.Linear(16, 80)), LipschitzBatchNorm(80, gamma=0.5), CentredSoftplus(2.0)]
    )
    last = [spectral_norm(nn.Linear(80, 9)), LipschitzBatchNorm(9), CentredSoftplus(), spectral_norm(nn.Linear(9, 4))]
    module = nn.Sequential(*first, *last)
    for _ in range(5):
        module(torch.rand(20, *SHAPE))
    return module.eval()


@pytest.mark.parametrize("image", [False, True])
def test_a_module_loads_certifies_and_converts(image: bool, tmp_path: Path) -> None:
    module = low_curvature(image)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    x = torch.randn(7, *SHAPE)
    expected = module.double()(x.double())
    module = low_curvature(image)
    loaded = load_model(module, input_shape=SHAPE)
    convert(module, tmp_path / "module.safetensors", input_shape=SHAPE)
    networks = (
        loaded.network,
        load_model(tmp_path / "module.safetensors").network,
        DifferentiableNetwork(module.train(), SHAPE).network(),
    )
    for network in networks:
        assert torch.allclose(network(x.double()), expected, rtol=0, atol=1e-6)
    module.eval()
    y = module(x).argmax(1)
    samples = certify(module, x, y, eps=0.1).samples
    assert all(sample.certified_radius > 0 for sample in samples)
    for sample, point in zip(samples, x, strict=True):
        directions = torch.randn(200, *SHAPE)
        directions *= sample.certified_radius / directions.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)
        assert bool((module(point + directions).argmax(1) == sample.prediction).all())
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert parametrize.is_parametrized(module[0 if image else 1])  # as it was, and its class is whole
    assert torch.isfinite(module[-1].weight).all()


@pytest.mark.parametrize("image", [False, True])
def test_objectives_take_them(image: bool) -> None:
    module, (x, y) = low_curvature(image).train(), batch()
    CRT(module, SHAPE, radius=0.1, weight=0.1)(x.float(), y).backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in module.parameters())
    assert all(float(part.log_beta.grad.abs()) > 0 for part in module if isinstance(part, CentredSoftplus))


@pytest.mark.parametrize("beta", [0.3, 5.0, 40.0])
def test_the_activation_is_its_row(beta: float) -> None:
    module, row = CentredSoftplus(beta).double(), from_name(f"centred_softplus:{beta}")
    z = torch.linspace(-4, 4, 401, dtype=torch.float64).requires_grad_(True)
    assert float(torch.as_tensor(module.beta).detach()) == pytest.approx(beta, rel=1e-6)
    assert torch.allclose(module(z), row.value(z), rtol=0, atol=1e-6)
    (slope,) = torch.autograd.grad(module(z).sum(), z, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), z)
    assert 0 <= float(slope.detach().min()) <= float(slope.detach().max()) <= 1
    assert float(curvature.abs().max()) == pytest.approx(beta / 4, rel=1e-5)
    assert torch.allclose(module.written_out()(z), module(z), rtol=0, atol=1e-12)
    assert not list(module.written_out().state_dict())


@pytest.mark.parametrize("wrong", [0.0, -1.0, 1e-3, math.nan, math.inf])
def test_what_is_no_beta_or_gamma(wrong: float) -> None:
    with pytest.raises(UsageError, match=r"is not a number above 0\.001"):
        CentredSoftplus(wrong)
    with pytest.raises(UsageError, match="is not a number above 0"):
        LipschitzBatchNorm(3, gamma=-abs(wrong) if wrong == 1e-3 else wrong)


@pytest.mark.parametrize("gamma", [0.01, 0.7, 1.0, 10.0, 1e6])
@pytest.mark.parametrize("spread", [1e-6, 0.5, 30.0])
def test_the_lipschitz_constant_of_a_norm(gamma: float, spread: float) -> None:
    """min(1 / s, gamma), from the statistics of evaluation; the channel of least variance reaches it."""
    torch.manual_seed(0)
    norm = LipschitzBatchNorm(6, gamma=gamma).double()
    for _ in range(200):  # so that the statistics are the data's
        norm(spread * torch.randn(40, 6, 2, 2, dtype=torch.float64) * torch.linspace(1, 2, 6).reshape(-1, 1, 1) + 3)
    norm.eval()
    first, second = (torch.randn(500, 6, 2, 2, dtype=torch.float64) for _ in range(2))
    least = norm.running_var.argmin()
    second[:100] = first[:100]
    second[:100, least] += 1.0
    ratios = (norm(first) - norm(second)).flatten(1).norm(dim=1) / (first - second).flatten(1).norm(dim=1)
    claim = float(torch.minimum((norm.running_var.min() + norm.eps).rsqrt(), norm.gamma))
    assert float(ratios.max()) <= claim * (1 + 1e-9) <= gamma * (1 + 1e-6)
    assert float(ratios.max()) >= claim * (1 - 1e-6)
    assert torch.allclose(norm.written_out()(first), norm(first), rtol=1e-9, atol=1e-12)


def test_spectral_norms() -> None:
    torch.manual_seed(0)
    layer, conv = spectral_norm(nn.Linear(12, 7)), spectral_norm(nn.Conv2d(2, 6, 3, padding=1))
    for _ in range(100):
        layer.weight, conv.weight  # noqa: B018 (an iteration each)
    layer.eval(), conv.eval()
    assert float(torch.linalg.matrix_norm(layer.weight.detach(), 2)) == pytest.approx(1, rel=1e-3)
    assert float(torch.linalg.matrix_norm(conv.weight.detach().flatten(1), 2)) == pytest.approx(1, rel=1e-3)
    x = torch.zeros(2, 5, 5)
    matrix = torch.autograd.functional.jacobian(lambda x: conv(x.unsqueeze(0)), x).reshape(150, 50)
    assert 1 < float(torch.linalg.matrix_norm(matrix, 2)) <= 3.003  # as a matrix only: the docstring says so


# --- the objective ----------------------------------------------------------------------------------------------


def curved(image: bool) -> nn.Module:
    """In float64, with betas and gammas that act."""
    module = low_curvature(image).double()
    for part in module.modules():
        if isinstance(part, LipschitzBatchNorm):
            part.log_gamma.data.fill_(-0.7)
    return module


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("image", [False, True])
def test_the_objective_has_the_gradients_of_its_values(image: bool, training: bool) -> None:
    module, (x, y) = curved(image).train(training), batch()
    for part in module.modules():
        if parametrize.is_parametrized(part):
            part.eval()  # each step would move its vectors
        if isinstance(part, LipschitzBatchNorm):
            part.momentum = 0.0  # nor do running statistics move, through which no gradient goes
    objective = LowCurvature(module, SHAPE, weight_beta=0.1, weight_gamma=0.2, gradient_penalty=1e-3)
    assert_gradients_fit(objective, x, y, rel=1e-3)


def test_the_objective_is_its_formula() -> None:
    module, (x, y) = curved(True), batch()
    x.requires_grad_(True)
    entropy = cross_entropy(module(x), y)
    (gradient,) = torch.autograd.grad(entropy, x)
    expected = float(entropy) + 0.1 * 2 * 5.0 + 0.2 * 2 * 0.7
    expected += 1e-3 * GRADIENT_SCALE * float(gradient.norm() ** 2) / len(x)
    objective = LowCurvature(module, SHAPE, weight_beta=0.1, weight_gamma=0.2, gradient_penalty=1e-3)
    assert float(objective(x, y).detach()) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("make", [dense, convolutional])
def test_a_module_without_such_layers_has_cross_entropy_alone(make: Any) -> None:
    module, (x, y) = prepared(make, nn.ReLU), batch()
    assert float(LowCurvature(module, SHAPE)(x, y)) == pytest.approx(float(cross_entropy(module(x), y)), rel=1e-12)
    assert not list(betas(module))
    assert not list(log_gammas(module))


# --- architectures ----------------------------------------------------------------------------------------------


def styled(name: str, style: Style, classes: int = CLASSES) -> LayeredModule:
    torch.manual_seed(0)
    activation = "centred_softplus:3" if style.learned_beta else "softplus"
    module = architecture(name, activation, (1, 8, 8), classes, style).module()
    for parameter in (p for n, p in module.named_parameters() if "log_" in n):
        parameter.data -= 0.3
    for _ in range(3):
        module(torch.rand(20, 1, 8, 8))
    return module.eval()


@pytest.mark.parametrize("name", ["mlp:64-20-9-4", "conv:4-9", "resnet:3-1"])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("spectral", "learned"), [(True, True), (False, True), (True, False)])
def test_the_spec_declares_the_module(name: str, norm: str, spectral: bool, learned: bool) -> None:
    module, x = styled(name, Style(norm, spectral, learned)), torch.rand(3, 1, 8, 8)
    declared = build(module.spec, module.declared())
    expected = module(x).double()
    assert torch.allclose(declared(x.double()), expected, rtol=0, atol=2e-5)
    exported = DifferentiableNetwork(module, (1, 8, 8)).network()
    assert torch.allclose(exported(x.double()), expected, rtol=0, atol=2e-5)
    types = {entry["type"] for entry in module.spec["layers"]}
    assert types <= {"Conv2d", "Linear", "Flatten", "add", "BatchNorm1d", "BatchNorm2d", "softplus", "centred_softplus"}
    for entry in module.spec["layers"]:
        if entry["type"] == "centred_softplus":
            assert entry["beta"] == pytest.approx((3 - 1e-3) * math.exp(-0.3) + 1e-3, rel=1e-6)


@pytest.mark.parametrize(
    ("arch", "activation", "style", "says"),
    [
        ("sll:4-1", "softplus", Style("lipschitz"), "sll has weights of known norm"),
        ("sll:4-1", "softplus", Style(spectral=True), "sll has weights of known norm"),
        ("mlp:64-5-4", "tanh", Style(learned_beta=True), "learned_beta is for the activation centred_softplus, not"),
        ("mlp:64-5-4", "centred_softplus:0.001", Style(learned_beta=True), "learned_beta begins above 0.001"),
    ],
)
def test_styles_that_do_not_fit(arch: str, activation: str, style: Style, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        architecture(arch, activation, (1, 8, 8), 4, style)
    for values in ({"norm": "batch"}, {"spectral": True}):
        with pytest.raises(UsageError, match=r"choose start = torch"):
            Recipe(start="identity").with_values(values)


def trained(**values: Any) -> Training:
    torch.manual_seed(1)
    x, y = torch.rand(34, 1, 8, 8), torch.arange(34) % 3
    recipe = Recipe(objective="lcnn", epochs=2, batch=8, checked=2, validation=1).with_values(values)
    training = Training(recipe, TrainingData.of(x, y, recipe), CPU)  # 33 samples: the last batch is a single one
    assert len(list(training.epochs())) == 2
    return training


@pytest.mark.parametrize("arch", ["mlp:64-9-8-3", "conv:3-9"])
@pytest.mark.parametrize(("norm", "average"), [("lipschitz", 0.0), ("batch", 0.0), ("lipschitz", 0.5)])
def test_both_files_are_the_best_model(arch: str, norm: str, average: float, tmp_path: Path) -> None:
    training = trained(**{**STYLE, "arch": arch, "norm": norm, "average": average, "gradient_penalty": 1e-3})
    Made.of(training).write(tmp_path / "model.safetensors")
    write_onnx(training, tmp_path / "model.onnx")
    x = torch.rand(20, 1, 8, 8, dtype=torch.float64)
    one, other = (load_model(tmp_path / f"model.{end}").network for end in ("safetensors", "onnx"))
    assert torch.allclose(one(x), other(x), rtol=0, atol=1e-5)
    source = training.present()
    source.load_state_dict(training.best_state)
    assert torch.allclose(one(x).float(), source.eval()(x.float()), rtol=0, atol=1e-4)
    learned = [node.op.parameters["beta"] for node in one.nodes if getattr(node.op, "name", "") == "centred_softplus"]
    assert len(learned) == 2
    assert all(beta != 5.0 for beta in learned)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("norm", NORMS)
def test_every_objective_trains_every_norm(objective: str, norm: str) -> None:
    training = trained(**{**STYLE, "arch": "mlp:64-9-3", "norm": norm, "objective": objective})
    assert all(math.isfinite(epoch.loss) and not epoch.skipped for epoch in training.history)
    assert training.best is not None


def test_steps_that_are_taken_back_leave_statistics_as_they_were() -> None:
    recipe = Recipe(arch="mlp:64-9-3", objective="lcnn").with_values(STYLE)
    x, y = torch.rand(30, 1, 8, 8), torch.arange(30) % 3
    training = Training(recipe, TrainingData.of(x, y, recipe), CPU)
    before = {name: buffer.clone() for name, buffer in training.module.named_buffers()}
    assert len(before) == 6
    training.module.train()
    assert training._step(torch.full((4, 1, 8, 8), torch.nan), torch.arange(4) % 3, 1) is None
    assert all(torch.equal(buffer, before[name]) for name, buffer in training.module.named_buffers())


def test_vectors_of_an_average_are_those_of_the_present_weights() -> None:
    training = trained(**{**STYLE, "arch": "mlp:64-9-3", "average": 0.9})
    assert training.average is not None
    held = dict(training.module.named_buffers())
    vectors = {n: b for n, b in training.average.module.named_buffers() if "parametrizations" in n}
    assert len(vectors) == 4
    assert all(torch.equal(vector, held[name]) for name, vector in vectors.items())
