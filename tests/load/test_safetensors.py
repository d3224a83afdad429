"""safetensors: each declared layer against torch's own, inference of a stack, and the way there from any network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, fx, nn

from certify_cli.errors import ModelError, UsageError
from certify_cli.load.convert import convert, write_safetensors
from certify_cli.load.model import load_model
from certify_cli.load.safetensors.architecture import FORMAT, build, declare
from certify_cli.load.safetensors.declared_layers import DECLARED
from certify_cli.load.safetensors.loader import linear_stack
from certify_cli.network.activations import ACTIVATIONS
from certify_cli.network.graph import Network
from certify_cli.network.lowering.fx_graph import lower
from tests import networks
from tests.layers import LAYER_CASES

Layers = list[dict[str, Any]]


def architecture(shape: list[int], layers: Layers) -> dict[str, Any]:
    return {"format": FORMAT, "input": shape, "layers": layers}


def randomised(module: nn.Module) -> nn.Module:
    """Weights and running statistics unlike those of a fresh module; evaluation mode."""
    generator = torch.Generator().manual_seed(1)
    for tensor in module.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.1)
    return module.double().eval()


def same(network: Network, reference: nn.Module, shape: list[int]) -> None:
    x = torch.randn(3, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        torch.testing.assert_close(network(x), reference(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("kind", "fields", "module", "shape"), LAYER_CASES)
def test_a_declared_layer_computes_what_torchs_does(
    kind: str, fields: dict[str, Any], module: nn.Module, shape: list[int]
) -> None:
    module = randomised(module)
    size = module(torch.zeros(1, *shape, dtype=torch.float64)).numel()
    head = randomised(nn.Linear(size, 2))
    reference = nn.Sequential(module, nn.Flatten(), head)
    tensors = {f"layer.{key}": value for key, value in module.state_dict().items()}
    tensors |= {f"head.{key}": value for key, value in head.state_dict().items()}
    layers = [{"type": kind, "name": "layer", **fields}, {"type": "Flatten"}, {"type": "Linear", "name": "head"}]
    network = build(architecture(shape, layers), tensors)
    same(network, reference, shape)
    spec, written = declare(network)
    same(build(json.loads(json.dumps(spec)), written), reference, shape)


def test_every_type_of_the_table_is_tested() -> None:
    tested = {case[0] for case in LAYER_CASES} | {"Normalise", "add", "concat"}
    primitives = {"dense", "conv", "conv_transpose", "scale", "shift", "reshape", "select", "max_pool", "max_min"}
    assert set(DECLARED) - set(ACTIVATIONS) - primitives == tested - set(ACTIVATIONS)


@pytest.mark.parametrize("name", [name for name in ACTIVATIONS if name != "clip"])
def test_every_activation_may_be_declared(name: str) -> None:
    weights = {"fc.weight": torch.randn(2, 3), "out.weight": torch.randn(2, 2)}
    layers = [{"type": "Linear", "name": "fc"}, {"type": name}, {"type": "Linear", "name": "out"}]
    network = build(architecture([3], layers), weights)
    again = build(*declare(network))
    assert again.nodes[2].op.title == network.nodes[2].op.title
    x = torch.randn(5, 3, dtype=torch.float64)
    assert torch.equal(again(x), network(x))


def test_normalise_residual_and_concat() -> None:
    class Reference(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.out = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 2, 1), nn.Linear(5 * 16, 4)

        def forward(self, x: Tensor) -> Tensor:
            mean = torch.tensor([0.1, 0.2, 0.3], dtype=x.dtype).reshape(3, 1, 1)
            x = (x - mean) / 0.25
            hidden = x + torch.tanh(self.a(x))
            return self.out(torch.cat([hidden, self.b(hidden)], dim=1).flatten(1))

    reference = Reference().double()
    layers: Layers = [
        {"type": "Normalise", "name": "norm", "mean": [0.1, 0.2, 0.3], "std": 0.25},
        {"type": "Conv2d", "name": "a", "padding": 1},
        {"type": "tanh", "name": "t"},
        {"type": "add", "name": "sum", "inputs": ["norm", "t"]},
        {"type": "Conv2d", "name": "b"},
        {"type": "concat", "inputs": ["sum", "b"], "axis": 0},
        {"type": "Flatten"},
        {"type": "Linear", "name": "out"},
    ]
    network = build(architecture([3, 4, 4], layers), reference.state_dict())
    same(network, reference, [3, 4, 4])
    same(build(*declare(network)), reference, [3, 4, 4])


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Softplus(5, 1000), nn.Linear(16, 3)).double()


MLP_SPEC = architecture(
    [8], [{"type": "Linear", "name": "0"}, {"type": "softplus", "beta": 5}, {"type": "Linear", "name": "2"}]
)


def single(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.float() for name, tensor in module.state_dict().items()}


def test_the_spec_in_the_metadata_beside_the_file_and_by_option(tmp_path: Path) -> None:
    reference = mlp().float().double()
    inside, beside, bare = (tmp_path / f"{name}.safetensors" for name in ("inside", "beside", "bare"))
    write_safetensors(inside, MLP_SPEC, single(reference))
    save_file(single(reference), beside)
    beside.with_suffix(".json").write_text(json.dumps(MLP_SPEC))
    save_file(single(reference), bare)
    for path, activation in ((inside, None), (beside, None), (bare, "softplus:5")):
        loaded = load_model(path, activation=activation)
        same(loaded.network, reference, [8])
        assert loaded.info.format == "safetensors"
        assert loaded.info.classes == 3
        assert loaded.input_shape == (8,)
        assert loaded.stored_dtype == "float32"
        assert not loaded.notes
    digest = load_model(beside).info.sha256
    beside.with_suffix(".json").write_text(json.dumps(MLP_SPEC) + " ")
    assert load_model(beside).info.sha256 != digest


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit_weights_are_upcast_exactly_and_said_so(tmp_path: Path, dtype: torch.dtype) -> None:
    reference = mlp().to(dtype)
    path = tmp_path / "half.safetensors"
    write_safetensors(path, MLP_SPEC, reference.state_dict())
    loaded = load_model(path)
    same(loaded.network, reference.double(), [8])
    assert loaded.stored_dtype == str(dtype).removeprefix("torch.")
    assert any("upcast exactly" in note for note in loaded.notes)


def test_batch_counters_of_a_state_dict_count_as_used() -> None:
    reference = randomised(nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2)))
    layers = [{"type": "BatchNorm1d", "name": "0"}, {"type": "Linear", "name": "1"}]
    assert "0.num_batches_tracked" in reference.state_dict()
    same(build(architecture([4], layers), reference.state_dict()), reference, [4])


# the order of an undeclared stack


def weights(**shapes: tuple[int, int]) -> dict[str, Tensor]:
    return {f"{name.replace('_', '.')}.weight": torch.randn(shape) for name, shape in shapes.items()}


def order(tensors: dict[str, Tensor]) -> list[str]:
    return [layer["name"] for layer in linear_stack(tensors, "tanh")["layers"] if layer["type"] == "Linear"]


def test_numbers_in_the_names_give_the_order() -> None:
    stack = {f"fc{i}": (8, 8) for i in (10, 2, 1)}
    assert order(weights(**stack)) == ["fc1", "fc2", "fc10"]
    assert order(weights(net_2=(3, 8), net_0=(8, 8))) == ["net.0", "net.2"]


def test_shapes_give_the_order_of_names_without_numbers() -> None:
    assert order(weights(head=(3, 6), body=(6, 5), stem=(5, 4))) == ["stem", "body", "head"]


@pytest.mark.parametrize(
    ("tensors", "what"),
    [
        (weights(a=(8, 8), b=(8, 8), c=(3, 8)), "ambiguous"),
        (weights(a=(4, 8), b=(8, 4)), "one order only"),
        (weights(a=(4, 8), b=(3, 5)), "one order only"),
        (weights(fc1=(4, 8), fc2=(3, 5)), "'fc2' takes 5 values, but layer 'fc1' before it gives 4"),
        ({**weights(fc1=(3, 8)), "conv.weight": torch.zeros(2, 1, 3, 3)}, "conv.weight"),
        ({}, "no tensors"),
    ],
)
def test_doubtful_stacks_are_refused(tensors: dict[str, Tensor], what: str) -> None:
    with pytest.raises(ModelError, match=what):
        linear_stack(tensors, "tanh")


def test_activation_misplaced_or_unknown(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    write_safetensors(path, MLP_SPEC, single(mlp()))
    with pytest.raises(UsageError, match="declares one"):
        load_model(path, activation="tanh")
    save_file(single(mlp()), path)
    with pytest.raises(UsageError, match="nonsense"):
        load_model(path, activation="nonsense")


# any network, there and back


@pytest.mark.parametrize(
    "make", [networks.conv_net, networks.residual_net, lambda: networks.mlp((5, 6, 4), "softplus:3")]
)
def test_every_network_survives_declaration_bit_for_bit(make: Any, tmp_path: Path) -> None:
    network: Network = make()
    spec, tensors = declare(network)
    path = tmp_path / "n.safetensors"
    write_safetensors(path, spec, tensors)
    again = load_model(path).network
    assert [node.name for node in again.nodes] == [node.name for node in network.nodes]
    assert [node.op.title for node in again.nodes] == [node.op.title for node in network.nodes]
    assert [getattr(node.op, "weight_error", 0) for node in again.nodes] == [
        getattr(node.op, "weight_error", 0) for node in network.nodes
    ]
    x = torch.randn(4, *network.input_shape, dtype=torch.float64)
    for one, other in zip(network.values(x), again.values(x), strict=True):
        assert torch.equal(one, other)


def test_tails_of_rounded_constants_survive_and_are_checked(tmp_path: Path) -> None:
    """A tail beyond the stated error would make two networks of one file: one for bounds, one for values."""
    network = lower(fx.symbolic_trace(nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2)).double().eval()), (3,))
    spec, tensors = declare(network)
    (key,) = (name for name in tensors if name.endswith("weight_tail"))
    assert bool((tensors[key][0] != 0).all())
    path = tmp_path / "n.safetensors"
    write_safetensors(path, spec, tensors)
    loaded = [getattr(node.op, "weight_tail", None) for node in load_model(path).network.nodes]
    assert any(tail is not None and torch.equal(tail, tensors[key]) for tail in loaded)
    for wrong, what in (
        (2.0**-40 * torch.ones_like(tensors[key]), "is larger than a weight_error of 3 allows"),
        (tensors[key][0], "does not fit a weight of shape"),
        (tensors[key][:0], "does not fit a weight of shape"),
    ):
        write_safetensors(path, spec, tensors | {key: wrong})
        with pytest.raises(ModelError, match=what):
            load_model(path)


def test_convert_keeps_the_function_the_type_and_the_bytes(tmp_path: Path) -> None:
    source, target, again = (tmp_path / f"{name}.safetensors" for name in ("source", "target", "again"))
    write_safetensors(source, MLP_SPEC, single(mlp()))
    convert(source, target)
    convert(source, again)
    assert target.read_bytes() == again.read_bytes()
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(p.name for p in (source, target, again))
    loaded = load_model(target)
    assert loaded.stored_dtype == "float32"
    x = torch.randn(4, 8, dtype=torch.float64)
    assert torch.equal(loaded.network(x), load_model(source).network(x))


def test_convert_refuses_a_target_it_cannot_write(tmp_path: Path) -> None:
    source = tmp_path / "m.safetensors"
    write_safetensors(source, MLP_SPEC, single(mlp()))
    with pytest.raises(UsageError, match=r"\.safetensors"):
        convert(source, tmp_path / "m.onnx")
    with pytest.raises(UsageError, match="cannot be written"):
        convert(source, tmp_path / "missing" / "m.safetensors")
