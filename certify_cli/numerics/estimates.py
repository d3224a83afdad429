"""Norms that training differentiates: estimates from below by singular vectors, which are kept between steps.

At the leading singular vectors the norm is u^T A v, and its gradient is that of u^T A v with u and v held fixed. One or
two power iterations a step follow a matrix that training changes little, provided that they start at the vectors of
the step before (`KeptVectors`). The results are labelled by their use: no claim is ever made of one, since every claim
is computed without gradients, and `norms` proves its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

FIRST_STEPS, STEPS = 30, 2
"""Power iterations from a new vector, and from one that was kept."""


class KeptVectors:
    """Singular vectors by the order in which norms are asked for, which is the same at every step of training.

    Norms may be asked for in batches, one for each row of weights (`weighted_gram_estimates`). Where the rows stand for
    other things from step to step, `stands_for` says so, and their vectors begin anew; as do those of another shape.
    """

    def __init__(self) -> None:
        self._vectors: dict[int, Tensor] = {}
        self._rows = torch.empty(0, dtype=torch.int64)
        self._other = False
        self._asked = 0

    @contextmanager
    def step(self) -> Iterator[None]:
        """Context of one step: norms within it start at the vectors of the step before, and leave theirs."""
        self._asked = 0
        token = _PRESENT.set(self)
        try:
            yield
        finally:
            _PRESENT.reset(token)

    def stands_for(self, rows: Tensor) -> None:
        """What the rows of this step's batches stand for: integers (count,)."""
        rows = rows.detach().cpu()
        self._other = not torch.equal(rows, self._rows)
        self._rows = rows

    def refined(
        self, shape: torch.Size, like: Tensor, improve: Callable[[Tensor], Tensor], batch: bool, samples: int = 0
    ) -> Tensor:
        """The next vectors of this step, of norm 1.   improve: one power iteration.   batch: one a row of weights.

        samples: so many vectors that all begin at one, (1, *shape): their mean is kept.
        """
        asked, self._asked = self._asked, self._asked + 1  # first: an iteration may ask for norms of its own
        kept = self._vectors.get(asked)
        new = kept is None or kept.shape != shape or (batch and self._other)
        vector = _start(shape, like) if kept is None or new else _alive(kept.to(like.device, like.dtype))
        if samples:
            vector = vector.expand(samples, *shape[1:])
        for _ in range(FIRST_STEPS if new else STEPS):
            vector = improve(vector)
        # from one start, vectors of alike matrices have alike signs
        self._vectors[asked] = normalize(vector.sum(0).flatten(), dim=0).reshape(shape) if samples else vector
        return vector

    def state_dict(self) -> dict[str, Tensor]:
        """The vectors and what rows stand for, for a checkpoint of training."""
        return {"rows": self._rows, **{f"{number}": vector for number, vector in self._vectors.items()}}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` gave. ValueError for anything else."""
        numbers = {name for name in state if name != "rows"}
        if numbers != {f"{number}" for number in range(len(numbers))} or "rows" not in state:
            raise ValueError("the vectors are not numbered from 0")
        if not all(vector.is_floating_point() and vector.dim() for name, vector in state.items() if name != "rows"):
            raise ValueError("a vector is none")
        self._rows, self._other = state["rows"], False
        self._vectors = {number: state[f"{number}"] for number in range(len(numbers))}


_PRESENT: ContextVar[KeptVectors | None] = ContextVar("kept vectors", default=None)


def _start(shape: torch.Size, like: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(like.device, like.dtype)


def _alive(kept: Tensor) -> Tensor:
    """The kept vectors; those that a matrix of zeros made 0, or an overflow not finite, begin anew."""
    norms = kept.reshape(kept.shape[0] if kept.dim() > 1 else 1, -1).norm(dim=1)
    lost = ~((norms > 0) & norms.isfinite())
    if not bool(lost.any()):
        return kept
    return torch.where(lost.reshape(-1, *[1] * (kept.dim() - 1)), _start(kept.shape, kept), kept)


def _refined(
    shape: tuple[int, ...],
    like: Tensor,
    improve: Callable[[Tensor], Tensor],
    batch: bool = False,
    samples: int = 0,
) -> Tensor:
    with torch.no_grad():
        return (_PRESENT.get() or KeptVectors()).refined(torch.Size(shape), like, improve, batch, samples)


def norm_estimate(matrix: Tensor) -> float:
    """Estimate from below of the spectral norm of a real (m, n) matrix: a tensor of one entry with its gradient."""
    held = matrix.detach()
    v = _refined((matrix.shape[1],), held, lambda v: normalize(held.T @ (held @ v), dim=0))
    u = normalize(held @ v, dim=0)
    return u @ matrix @ v  # type: ignore[return-value]  # it stands for the number


def operator_norm_estimate(
    linear: Callable[[Tensor], Tensor], transpose: Callable[[Tensor], Tensor], shape: tuple[int, ...], like: Tensor
) -> float:
    """The same of a linear map of values of `shape`, batch first, and its transpose.   like: its weights."""

    def improve(v: Tensor) -> Tensor:
        image = transpose(linear(v))
        return image / image.norm().clamp(min=torch.finfo(image.dtype).tiny)

    v = _refined((1, *shape), like.detach(), improve)
    return linear(v / v.norm().clamp(min=torch.finfo(v.dtype).tiny)).norm()


def operator_norm_estimates(
    linear: Callable[[Tensor], Tensor], transpose: Callable[[Tensor], Tensor], shape: tuple[int, ...], like: Tensor
) -> Tensor:
    """The same (batch,) of as many maps as samples, which map the samples of a batch; all begin at one kept vector.

    like: a tensor (batch,) of their device and type.
    """

    def unit(v: Tensor) -> Tensor:
        return normalize(v.flatten(1), dim=1).reshape(v.shape)

    v = _refined((1, *shape), like.detach(), lambda v: unit(transpose(linear(v))), samples=len(like))
    return linear(unit(v)).flatten(1).norm(dim=1)


@dataclass(frozen=True, eq=False)
class Maps:
    """A matrix T by its products.   linear: from (count, *shape) to (count, rows).   transpose: back.

    like: a tensor of its device and type.
    """

    linear: Callable[[Tensor], Tensor]
    transpose: Callable[[Tensor], Tensor]
    shape: tuple[int, ...]
    like: Tensor

    @classmethod
    def of(cls, matrix: Tensor) -> Maps:
        """Those of a matrix that is written out."""
        return cls(lambda v: v @ matrix.T, lambda u: u @ matrix, (matrix.shape[1],), matrix)


def weighted_gram_estimates(maps: Maps, weights: Tensor) -> Tensor:
    """Estimates from below (count,) of lambda_max(T^T diag(w) T).   weights: w (count, rows), >= 0."""
    w = weights.detach()

    def improve(v: Tensor) -> Tensor:
        image = maps.transpose(w * maps.linear(v))
        return normalize(image.flatten(1), dim=1).reshape(v.shape)

    v = _refined((len(w), *maps.shape), maps.like.detach(), improve, batch=True)
    return (weights * maps.linear(normalize(v.flatten(1), dim=1).reshape(v.shape)).square()).sum(1)
