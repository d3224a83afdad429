"""Architectures: the module and the declared spec are the same network, and so is the exported program."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from certify_cli.errors import ModelError, UsageError
from certify_cli.load.safetensors.architecture import build
from certify_cli.network.activations import ACTIVATIONS, from_module, to_module
from certify_cli.training.architectures import ARCHITECTURES, Style, architecture, described
from certify_cli.training.differentiable import DifferentiableNetwork
from certify_cli.training.elementwise import Elementwise
from certify_cli.training.sll import Returning

NAMES = [
    *("mlp:784-20-10", "mlp:784-10", "conv:4,6-20", "conv:4", "4c3f", "6c2f"),
    *("resnet:4-2", "resnet:3", "resnet", "sll:5-2", "sll:4", "sll"),
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("activation", ["softplus:5", "erf", "maxmin", "clip:0,6 learned", "maxmin:-0.1,0.1 learned"])
def test_the_spec_declares_the_module(name: str, activation: str) -> None:
    if "maxmin" in activation:
        name = name.replace("5", "6").replace("resnet:3", "resnet:4")  # it pairs channels
    text, learned = activation.removesuffix(" learned"), activation.endswith("learned")
    made = architecture(name, text, (1, 28, 28), 10, Style(learned_thresholds=learned))
    module, x = made.module(), torch.rand(3, 1, 28, 28)
    if learned:
        with torch.no_grad():
            for parameter in module.parameters():
                parameter += 0.01 * torch.randn_like(parameter)
    declared = build(module.spec, module.declared())
    expected = module.double()(x.double())
    assert torch.allclose(declared(x.double()), expected, rtol=0, atol=1e-6)
    exported = DifferentiableNetwork(module, (1, 28, 28)).network()
    assert torch.allclose(exported(x.double()), expected, rtol=0, atol=1e-6)


def test_every_architecture_is_tried() -> None:
    assert {name.partition(":")[0] for name in NAMES} == set(ARCHITECTURES)
    assert [text.partition(":")[0] for text in described()] == list(ARCHITECTURES)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("transformer", "is not known; choose one of mlp:784-1024-10"),
        ("mlp:100-10", "must begin with the 784 inputs and end with the 10 classes"),
        ("mlp:784-0-10", "not between 1 and"),
        ("mlp:784-99999-10", "not between 1 and"),
        ("mlp:784-\x1b[31m-10", "is not a list of at most"),
        ("mlp:" + "-".join(["10"] * 100), "is not a list of at most"),
        ("4c3f:7", "takes no widths"),
        ("conv:a", "is not a list"),
        ("sll:3", "the width must be at least 4"),
    ],
)
def test_what_is_no_architecture(text: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        architecture(text, "softplus", (1, 28, 28), 10)


def test_images_that_do_not_fit() -> None:
    with pytest.raises(UsageError, match="too small for this architecture"):
        architecture("4c3f", "tanh", (1, 1, 1), 10)
    with pytest.raises(UsageError, match="takes images"):
        architecture("conv:4", "tanh", (784,), 10)
    with pytest.raises(UsageError, match="unknown activation"):
        architecture("conv:4", "swoosh", (1, 8, 8), 10)


@pytest.mark.parametrize("convolutional", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_sll_blocks_are_1_lipschitz_by_their_jacobians(convolutional: bool, seed: int) -> None:
    torch.manual_seed(seed)
    into = nn.Conv2d(3, 5, 3, padding=1) if convolutional else nn.Linear(12, 7)
    back = Returning(into.double()).double()
    shape = (3, 4, 4) if convolutional else (12,)
    with torch.no_grad():
        into.weight *= 10 * torch.randn(len(into.weight), dtype=torch.float64).abs().reshape(
            -1, *[1] * (into.weight.dim() - 1)
        )
        into.weight[2] = 0.0  # a row of zeros is no division by zero
        back.log_q.normal_()
    declared = back.weight
    assert bool(declared.isfinite().all())
    for scale in (0.1, 1.0, 10.0):
        x = scale * torch.randn(shape, dtype=torch.float64)
        block = torch.autograd.functional.jacobian(lambda x: x + back(F.relu(into(x.unsqueeze(0))))[0], x)
        matrix = block.reshape(x.numel(), x.numel())
        assert float(torch.linalg.matrix_norm(matrix, 2)) <= 1 + 1e-12
    slopes_of_one = torch.autograd.functional.jacobian(lambda x: x + back(into(x.unsqueeze(0)))[0], x)
    singular = torch.linalg.svdvals(slopes_of_one.reshape(x.numel(), x.numel()))
    assert float(singular.max()) <= 1 + 1e-12  # with all slopes at their end, too


def test_the_layer_back_of_an_sll_block_learns_through_both_of_its_layers() -> None:
    made = architecture("sll:4-1", "softplus", (1, 4, 4), 2).module()
    made(torch.rand(3, 1, 4, 4))[:, 0].sum().backward()
    gradients = {name: p.grad for name, p in made.named_parameters()}
    assert all(g is not None and bool((g != 0).any()) for g in gradients.values())
    assert [name for name in gradients if "block" in name] == ["block1_in.weight", "block1_in.bias", "block1_out.log_q"]


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_an_activation_as_a_module(name: str) -> None:
    arguments = {"clip": (0.0, 6.0)}.get(name, ())
    row = ACTIVATIONS[name](*arguments)
    module = to_module(row)
    z = torch.linspace(-3, 3, 13, dtype=torch.float64)
    if module is not None:
        found = from_module(module)
        assert found is not None
        assert found.name == name
        assert torch.allclose(module(z), row.value(z), atol=3e-9)
    own = Elementwise(row)
    z = z.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(own(z).sum(), z)
    assert torch.equal(own(z), row.value(z))
    assert torch.equal(gradient, row.slope(z.detach()))


class Everything(nn.Module):
    """Functions, methods and layers, as people write them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, 4, 3, padding="same"), nn.BatchNorm2d(4), nn.Linear(16, 4)
        self.up = nn.ConvTranspose2d(4, 4, 2, stride=2)
        self.gain, self.mixed = nn.Parameter(torch.rand(4, 1, 1)), nn.Parameter(torch.randn(4, 4))
        self.register_buffer("mean", torch.full((1, 1, 1), 0.3))

    def forward(self, x: Tensor) -> Tensor:
        h = F.softplus(self.norm(self.conv((x - self.mean) / 0.4)), beta=3) * self.gain.exp()
        h = F.max_pool2d(h, 2) + F.avg_pool2d(torch.tanh(h), 2) - F.adaptive_avg_pool2d(h, 2)
        h = F.gelu(self.up(h))[:, :, ::2, 1:3] + F.pad(h, (1, 0, 0, 0))[..., :2]
        h = torch.cat([h, F.elu(h)], 1).permute(0, 2, 3, 1).reshape(x.size(0), 2, 2, 8)[..., 2:6].permute(0, 3, 1, 2)
        h = F.dropout(h.contiguous(), 0.5, self.training)
        z = self.head(h.view(x.shape[0], -1)) + h.mean((2, 3)) @ self.mixed - 2 * h.flatten(1).sum(1, keepdim=True)
        return -F.hardtanh(F.silu(z).clamp(-1, 5), -4.0, 4.0) + F.leaky_relu(z, 0.2).relu()


def test_any_code_is_the_network_that_it_computes() -> None:
    torch.manual_seed(2)
    module = Everything().double()
    module.norm.running_mean, module.norm.running_var = torch.rand(4).double(), 0.5 + torch.rand(4).double()
    x = torch.rand(5, 1, 4, 4, dtype=torch.float64)
    network = DifferentiableNetwork(module, (1, 4, 4)).network()
    assert torch.allclose(network(x), module.eval()(x), rtol=0, atol=1e-7)  # constants of the code are float32
    network(x).sum().backward()
    assert all(p.grad is not None for p in module.parameters())


@pytest.mark.parametrize(
    ("module", "says"),
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(16, 4), nn.Softmax(1)), "this operator is not supported"),
        (nn.Sequential(nn.Flatten(0), nn.Linear(32, 4)), "batch|traced|logits"),
        (nn.Sequential(nn.Flatten(), nn.BatchNorm1d(16, track_running_stats=False)), "mixes the samples"),
        (nn.Sequential(nn.Flatten(), nn.Linear(16, 1)), "at least two logits"),
    ],
)
def test_what_has_no_bound_is_refused(module: Any, says: str) -> None:
    with pytest.raises(ModelError, match=says):
        DifferentiableNetwork(module, (1, 4, 4)).network()


def test_writing_a_model_out_draws_no_random_number() -> None:
    for name in NAMES:
        module = architecture(name, "softplus", (1, 28, 28), 10).module()
        before = torch.get_rng_state()
        module.declared()
        assert torch.equal(torch.get_rng_state(), before), name
