"""docs/safetensors-spec.md: every type that the loader knows, with all its fields and no other; the example works."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn

from certify_cli.cli.app import main
from certify_cli.errors import ModelError
from certify_cli.load.safetensors.architecture import FORMAT, MAX_LAYERS, build, declare
from certify_cli.load.safetensors.declared_layers import DECLARED
from certify_cli.network.activations import ACTIVATIONS
from certify_cli.network.graph import Network
from certify_cli.network.lowering.fx_graph import lower
from tests.layers import LAYER_CASES

PAGE = (Path(__file__).parents[1] / "docs" / "safetensors-spec.md").read_text(encoding="utf-8")
TABLES = PAGE[PAGE.index("## torch.nn's layers") :]
STRANGE = "strange"


def listed() -> dict[str, set[str]]:
    """Type -> fields and tensors, as the page has them; values in quotes are no fields."""
    found: dict[str, set[str]] = {}
    for line in TABLES.splitlines():
        cells = line.split("|")[1:-1]
        types = re.findall(r"`([^`]+)`", cells[0]) if len(cells) > 2 else []
        fields = set(re.findall(r"`(\w+)`", re.sub(r": as `padding`", "", " ".join(cells[1:-1]))))
        for name in types:
            assert name not in found, f"{name} is listed twice"
            found[name] = fields
    return found


LISTED = listed()


def taken(spec: dict[str, Any], tensors: dict[str, torch.Tensor], position: int) -> set[str]:
    """What a layer says that it takes, where it is given a field that it does not know."""
    spec["layers"][position][STRANGE] = 1
    with pytest.raises(ModelError, match=f"unknown field {STRANGE}; it takes ") as refusal:
        build(spec, tensors)
    fields = str(refusal.value).partition("it takes ")[2]
    return set() if fields == "none" else set(fields.split(", "))


def one_layer(kind: str, fields: dict[str, Any], shape: list[int]) -> dict[str, Any]:
    layers = [{"type": kind, "name": "layer", **fields}, {"type": "Flatten"}, {"type": "Linear", "name": "head"}]
    return {"format": FORMAT, "input": shape, "layers": layers}


def test_every_type_is_on_the_page_and_no_other() -> None:
    assert set(LISTED) == set(DECLARED)


@pytest.mark.parametrize("kind", [kind for kind, *_ in LAYER_CASES if kind not in ACTIVATIONS])
def test_a_layer_takes_the_fields_on_the_page(kind: str) -> None:
    kind, fields, module, shape = next(case for case in LAYER_CASES if case[0] == kind)
    tensors = {f"layer.{key}": value for key, value in module.state_dict().items()}
    assert taken(one_layer(kind, fields, shape), tensors, 0) == LISTED[kind]


@pytest.mark.parametrize(
    ("kind", "fields"), [("Normalise", {"mean": 0.5, "std": 2}), ("add", {}), ("concat", {"axis": 0})]
)
def test_a_layer_without_a_module_takes_the_fields_on_the_page(kind: str, fields: dict[str, Any]) -> None:
    own = {} if kind == "Normalise" else {"inputs": ["input", "input"]}
    assert taken(one_layer(kind, {**fields, **own}, [3]), {}, 0) == LISTED[kind]


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_an_activation_takes_the_fields_on_the_page(kind: str) -> None:
    fields = {"high": 1} if kind == "clip" else {}
    assert taken(one_layer(kind, fields, [3]), {}, 0) == LISTED[kind]


def every_primitive() -> list[Network]:
    """Networks in which every primitive occurs."""
    convolving = nn.Sequential(
        nn.Conv2d(2, 4, 2), nn.BatchNorm2d(4), nn.MaxPool2d(2), nn.ZeroPad2d(1), nn.Flatten(), nn.Linear(64, 2)
    )
    nets = [
        (convolving, (2, 5, 5)),
        (nn.Sequential(nn.ConvTranspose2d(2, 2, 2), nn.Flatten(), nn.Linear(18, 2)), (2, 2, 2)),
    ]
    found = [lower(fx.symbolic_trace(net.double().eval()), shape) for net, shape in nets]
    spec = one_layer("MaxMin", {}, [4])
    return [*found, build(spec, {"head.weight": torch.randn(2, 4)})]


def test_a_primitive_takes_the_fields_on_the_page() -> None:
    seen = set()
    for network in every_primitive():
        spec, tensors = declare(network)
        for position, layer in enumerate(spec["layers"]):
            fresh = {**spec, "layers": [dict(entry) for entry in spec["layers"]]}
            assert taken(fresh, tensors, position) == LISTED[layer["type"]]
            seen.add(layer["type"])
    assert seen == {name for name in DECLARED if name.islower()} - set(ACTIVATIONS) - {"add", "concat"}


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_the_defaults_of_activations_are_the_code_s(kind: str) -> None:
    line = next(line for line in TABLES.splitlines() if line.startswith(f"| `{kind}` |"))
    shown = dict(re.findall(r"`(\w+)` \(([^)]+)\)", line.split("|")[2]))
    values = {key: None if text == "null" else eval(text) for key, text in shown.items()}
    given = {"high": 1.0} if kind == "clip" else {}
    made = ACTIVATIONS[kind](**given).parameters
    assert {key: value for key, value in made.items() if key not in given} == {
        key: value for key, value in values.items() if key not in given
    }


def test_the_example_loads_and_certifies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    exec(example, {})
    (commands,) = re.findall(r"^```console\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    for command in commands.splitlines():
        code = main(command.removeprefix("$ curvcert ").split())
        printed = capsys.readouterr()
        assert code == 0, printed.err
    assert "mean certified radius" in printed.out


def test_the_limits_are_the_code_s() -> None:
    assert f"{MAX_LAYERS:,} layers" in PAGE
    assert FORMAT in PAGE
