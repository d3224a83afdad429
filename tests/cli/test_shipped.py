"""The trained models that are shipped: their records are of these files and recipes, and are proved anew."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from certify_cli.cli.train import recipe_of
from certify_cli.data.datasets import named_shape
from certify_cli.load.safetensors.loader import read_declared
from certify_cli.training.architectures import architecture
from certify_cli.training.recipe import Recipe, read_recipe
from tests.cli.conftest import Outcome

MODELS = Path(__file__).parents[2] / "models"
RECORDS = sorted(MODELS.glob("*.json"))
RECIPES = sorted((MODELS / "recipes").rglob("*.toml"))
LARGEST, IN_ALL = 12 * 2**20, 60 * 2**20


def test_there_are_some_and_they_are_small() -> None:
    sizes = [path.stat().st_size for path in MODELS.iterdir() if path.is_file()]
    assert RECORDS
    assert RECIPES
    assert max(sizes) < LARGEST
    assert sum(sizes) < IN_ALL


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_records_are_of_the_shipped_file_and_its_recipe(path: Path) -> None:
    model = path.with_suffix(".safetensors")
    run = json.loads(path.read_text())["run"]
    assert run["model"]["sha256"] == hashlib.sha256(model.read_bytes()).hexdigest()
    assert run["arguments"]["data_root"] is None  # verify would look for the data there
    recipe = Recipe().with_values(read_recipe(str(MODELS / "recipes" / f"{path.stem.replace('_', '-')}.toml")))
    _, spec = read_declared(model)
    assert isinstance(spec, dict)
    assert Recipe().with_values(spec["training"]["recipe"]) == recipe


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.stem}-{path.stem}")
def test_recipes_can_be_used(path: Path) -> None:
    recipe = recipe_of(str(path), {}, ())
    shape = named_shape(recipe.data)
    assert shape is not None
    assert architecture(recipe.arch, recipe.activation, shape, 10).input_shape == shape


@pytest.mark.slow
@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_every_record_is_proved_anew(path: Path, shared: Path, curvcert: Callable[..., Outcome]) -> None:
    words = ("--certificate", path.with_suffix(".npz"), "--data-root", shared / "data", "--offline", "--format", "json")
    done = curvcert("verify", path, path.with_suffix(".safetensors"), *words)
    assert done.code == 0
    counts = json.loads(done.out)["outcomes"]
    assert {outcome for outcome, count in counts.items() if count} == {"proved"}
