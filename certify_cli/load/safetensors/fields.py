"""Typed reading of one declared layer: every field is checked, and every tensor that is used is recorded."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from certify_cli.errors import LayerError, ModelError, listed, quoted, shown

_FIXED = ("type", "name", "inputs", "title")


class Tensors:
    """The tensors of a file, floats converted to float64, which is exact; records which ones layers take."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors: dict[str, Tensor] = {}
        self._taken: set[str] = set()
        for name, tensor in tensors.items():
            if tensor.is_complex():
                raise ModelError(f"tensor {quoted(name)} is complex; a classifier's weights are real")
            try:
                value = tensor.to(torch.float64) if tensor.is_floating_point() else tensor
            except NotImplementedError:  # floats of four bits, two in a byte
                kind = str(tensor.dtype).removeprefix("torch.")
                raise ModelError(
                    f"tensor {quoted(name)} holds {kind} numbers, which cannot be read; store float32"
                ) from None
            if not bool(torch.isfinite(value).all()):
                raise ModelError(f"tensor {quoted(name)} holds a NaN or an infinite value")
            self._tensors[name] = value

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def take(self, name: str) -> Tensor:
        self._taken.add(name)
        return self._tensors[name]

    @property
    def unused(self) -> list[str]:
        return sorted(set(self._tensors) - self._taken)


class Entry:
    """One layer of a spec: methods that return a field's checked value, and `finish`, which refuses unread fields.

    type, name: as in the file, for look-ups only.   title: escaped, for printing.
    All errors are ModelErrors that name the layer.
    """

    def __init__(self, raw: Any, position: int, tensors: Tensors) -> None:
        self._where = f"layer {position}"
        if not isinstance(raw, dict):
            self.fail(f"a JSON object is expected, not {quoted(raw)}")
        self._raw: dict[str, Any] = raw
        self._tensors = tensors
        self._read = set(_FIXED)
        self.type = self._text("type")
        self.name = self._text("name", f"{self.type}_{position}")
        self._where = f"layer {quoted(self.name)} ({shown(self.type)})"
        self.title = shown(self._text("title", ""))

    def fail(self, message: str) -> NoReturn:
        raise LayerError(f"{self._where}: {message}")

    def inputs(self, previous: str) -> list[str]:
        """The names of the layers whose values it takes, by default the previous one."""
        names = self._raw.get("inputs", [previous])
        if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
            self.fail(f"inputs must be a list of layer names, not {quoted(names)}")
        return names

    def finish(self) -> None:
        if unknown := sorted(set(self._raw) - self._read):
            known = sorted(self._read - set(_FIXED))
            self.fail(f"unknown field {listed(unknown)}; it takes {', '.join(known) or 'none'}")

    def _text(self, key: str, default: str | None = None) -> str:
        value = self._raw.get(key, default)
        if not isinstance(value, str):
            self.fail(f"{key} must be a text, not {quoted(value)}" if key in self._raw else f"has no {key}")
        return value

    def _value(self, key: str, default: Any) -> Any:
        self._read.add(key)
        if key not in self._raw and default is ...:
            self.fail(f"has no {key}")
        return self._raw.get(key, default)

    def integer(self, key: str, default: Any = ..., minimum: int = 0) -> int:
        value = self._value(key, default)
        if not _is_integer(value) or value < minimum:
            self.fail(f"{key} must be an integer of at least {minimum}, not {quoted(value)}")
        return value

    def integers(self, key: str, count: int | None, default: Any = ..., minimum: int = 0) -> tuple[int, ...]:
        """`count` integers, or any positive number of them if None; a single integer is repeated."""
        value = self._value(key, default)
        if count is not None and _is_integer(value):
            value = [value] * count
        fits = isinstance(value, (list, tuple)) and (len(value) == count if count is not None else len(value) > 0)
        if not fits or not all(_is_integer(item) and item >= minimum for item in value):
            how_many = "integers" if count is None else f"{count} integers"
            self.fail(f"{key} must be {how_many} of at least {minimum}, not {quoted(value)}")
        return tuple(value)

    def optional_integers(self, key: str) -> tuple[int, ...] | None:
        """Integers of any sign; None where the field is absent or null."""
        return None if self._value(key, None) is None else self.integers(key, None, minimum=-(2**31))

    def number(self, key: str, default: Any = ...) -> float:
        value = self._value(key, default)
        if not _is_number(value):
            self.fail(f"{key} must be a finite number, not {quoted(value)}")
        return float(value)

    def numbers(self, key: str, default: Any = ...) -> list[float] | None:
        value = self._value(key, default)
        if value is None:
            return None
        items = value if isinstance(value, list) else [value]
        if not items or not all(map(_is_number, items)):
            self.fail(f"{key} must be a number or a list of numbers, not {quoted(value)}")
        return [float(item) for item in items]

    def flag(self, key: str, default: bool) -> bool:
        value = self._value(key, default)
        if not isinstance(value, bool):
            self.fail(f"{key} must be true or false, not {quoted(value)}")
        return value

    def choice(self, key: str, options: Sequence[str], default: str) -> str:
        value = self._value(key, default)
        if value not in options:
            self.fail(f"{key} must be one of {', '.join(options)}, not {quoted(value)}")
        return value

    def parameters(self, accepted: Collection[str]) -> dict[str, float | None]:
        """The given ones of the accepted numbers, by name; null is None."""
        self._read.update(accepted)
        given = [key for key in accepted if key in self._raw]
        return {key: None if self._raw[key] is None else self.number(key) for key in given}

    def tensor(self, key: str) -> Tensor:
        """The float64 tensor that `key` names, by default NAME.key."""
        tensor = self.optional_tensor(key)
        if tensor is None:
            self.fail(f"has no {key}: neither the field nor a tensor {quoted(f'{self.name}.{key}')}")
        return tensor

    def optional_tensor(self, key: str) -> Tensor | None:
        default = f"{self.name}.{key}"
        tensor = self._tensor(key, default if default in self._tensors else None)
        if tensor is not None and not tensor.is_floating_point():
            self.fail(f"{key} holds {tensor.dtype} numbers; quantised weights cannot be certified")
        return tensor

    def indices(self, key: str) -> Tensor:
        """The int64 tensor that `key` names, by default NAME.key."""
        tensor = self._tensor(key, f"{self.name}.{key}")
        if tensor is None or tensor.dtype != torch.int64:
            self.fail(f"{key} must be a tensor of int64 numbers")
        return tensor

    def discard(self, key: str) -> None:
        """Record a tensor that the layer does not need as used, if it exists."""
        self._tensor(key, default if (default := f"{self.name}.{key}") in self._tensors else None)

    def _tensor(self, key: str, default: str | None) -> Tensor | None:
        name = self._value(key, default)
        if name is None:
            return None
        if not isinstance(name, str):
            self.fail(f"{key} must be the name of a tensor, not {quoted(name)}")
        if name not in self._tensors:
            self.fail(f"there is no tensor {quoted(name)} for its {key}")
        return self._tensors.take(name)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**31


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300
