"""Select, replace and choose items of batched values: written once for every dataclass that holds a batch.

A frozen dataclass that derives from `Batched` holds one item a row in each of its tensors, however deep they stand in
mappings, lists, tuples and other dataclasses; what is no tensor is the same for all items. The class says which of its
fields are otherwise:

    class Rows(Batched, shared=("blocks",), constant=("groups",), along={"slopes": 1}):

`shared`: tensors with one row for all items, or one an item. `constant`: the same for all items. `along`: items along
another axis than the first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

Rule = Callable[..., Tensor]
"""(axis of the items, the tensors that stand at one place of all trees) -> the tensor that stands there."""


class Batched:
    """A frozen dataclass of a batch of items (see the module)."""

    _shared: ClassVar[frozenset[str]] = frozenset()
    _constant: ClassVar[frozenset[str]] = frozenset()
    _axes: ClassVar[Mapping[str, int]] = {}

    def __init_subclass__(
        cls, shared: Iterable[str] = (), constant: Iterable[str] = (), along: Mapping[str, int] | None = None
    ) -> None:
        super().__init_subclass__()
        cls._shared, cls._constant, cls._axes = frozenset(shared), frozenset(constant), along or {}

    def at(self, index: Tensor) -> Self:
        """The items at `index` (count,), in this order."""
        found: Self = select(self, index)
        return found

    def put(self, index: Tensor, items: Self) -> Self:
        """The same with the items at `index` (count,) replaced by `items`."""
        found: Self = _map(lambda axis, mine, theirs: mine.index_copy(axis, index, theirs), (self, items))
        return found

    def where(self, take: Tensor, other: Self) -> Self:
        """The other one's items, or entries, where `take` (batch, ...) is true."""

        def chosen(axis: int, mine: Tensor, theirs: Tensor) -> Tensor:
            wide = take.reshape(*[1] * axis, *take.shape, *[1] * (mine.dim() - axis - take.dim()))
            return torch.where(wide, theirs, mine)

        found: Self = _map(chosen, (self, other))
        return found


def select(tree: Any, index: Tensor) -> Any:
    """The items at `index` (count,) of anything that a field of a `Batched` can be."""
    return _map(lambda axis, tensor: tensor[(*[slice(None)] * axis, index)], (tree,))


def joined(trees: Iterable[Any]) -> Any:
    """The items of all trees, in order."""
    return _map(lambda axis, *tensors: torch.cat(tensors, axis), tuple(trees))


def _map(rule: Rule, trees: tuple[Any, ...], axis: int = 0, shared: bool = False) -> Any:
    """The rule for the tensors at the same place of all trees; elsewhere what the first one has."""
    first = trees[0]
    if isinstance(first, Tensor):
        return first if shared and len(first) == 1 else rule(axis, *trees)
    if isinstance(first, Mapping):
        return {key: _map(rule, tuple(tree[key] for tree in trees), axis, shared) for key in first}
    if isinstance(first, list | tuple):
        return type(first)(_map(rule, parts, axis, shared) for parts in zip(*trees, strict=True))
    if not is_dataclass(first) or isinstance(first, type):
        return first
    roles = first if isinstance(first, Batched) else Batched
    values = {}
    for name in (item.name for item in fields(first)):
        parts = tuple(getattr(tree, name) for tree in trees)
        inner_axis, inner_shared = roles._axes.get(name, axis), shared or name in roles._shared
        values[name] = parts[0] if name in roles._constant else _map(rule, parts, inner_axis, inner_shared)
    if all(value is getattr(first, name) for name, value in values.items()):
        return first  # shared by all items, with what it has remembered
    return type(first)(**values)
