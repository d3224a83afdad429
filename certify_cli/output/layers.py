"""How a layer is named in tables for people."""

from __future__ import annotations

from collections.abc import Sequence


def shape_text(shape: Sequence[int]) -> str:
    """Sizes with a cross between them: (3, 32, 32) becomes 3x32x32."""
    return "x".join(map(str, shape)) or "scalar"


def layer_title(name: str, kind: str, shape: Sequence[int]) -> str:
    """Name, kind and shape of a layer; the line may break in front of the kind's parameters."""
    return f"{name} {kind.replace('(', ' (')} {shape_text(shape)}"
