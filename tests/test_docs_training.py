"""docs/training.md: every key of a recipe with its default, and the names of the architectures."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

from certify_cli.training.architectures import ARCHITECTURES
from certify_cli.training.recipe import OBJECTIVES, Recipe

PAGE = (Path(__file__).parents[1] / "docs" / "training.md").read_text(encoding="utf-8")


def test_every_key_is_listed_with_its_default_and_meaning() -> None:
    (table,) = re.findall(r"<!-- recipe keys -->\n(.*?)<!-- end recipe keys -->", PAGE, re.DOTALL)
    wanted = "| key | default | |\n|---|---|---|\n"
    for item in fields(Recipe):
        limits = item.metadata["limits"]
        default = str(item.default).lower() if isinstance(item.default, bool) else f"{item.default}"
        choices = f" ({', '.join(f'`{choice}`' for choice in limits.choices)})" if limits.choices else ""
        wanted += f"| `{item.name}` | `{default}` | {limits.says}{choices} |\n"
    assert table == wanted


def test_every_architecture_and_objective_is_named() -> None:
    assert all(re.search(rf"`{name}[:`]", PAGE) for name in ARCHITECTURES)
    assert all(f"`{name}`" in PAGE for name in OBJECTIVES)
