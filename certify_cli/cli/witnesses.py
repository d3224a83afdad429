"""The arrays that a run writes beside its records: replayed attacks, and the points of its tangents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from certify_cli.run.engine import TangentPoint, Witness


def save_witnesses(stream: IO[bytes], witnesses: Sequence[Witness], shape: tuple[int, ...]) -> None:
    """Write arrays `index` (K,), `x` and `d` (K, *shape) as npz: x + d is predicted differently from x.

    float64 and in data units, as the run replayed them.
    """
    import numpy as np

    count = len(witnesses)
    np.savez_compressed(
        stream,
        index=np.array([witness.index for witness in witnesses], dtype=np.int64),
        x=np.array([np.asarray(witness.x) for witness in witnesses], dtype=np.float64).reshape(count, *shape),
        d=np.array([np.asarray(witness.d) for witness in witnesses], dtype=np.float64).reshape(count, *shape),
    )


def save_tangents(stream: IO[bytes], tangents: Sequence[TangentPoint], shape: tuple[int, ...]) -> None:
    """Write arrays `index`, `rival` (K,) and `d` (K, *shape) as npz: the tangent at x + d certifies x.

    float64 and in data units, as the run took them.
    """
    import numpy as np

    np.savez_compressed(
        stream,
        index=np.array([tangent.index for tangent in tangents], dtype=np.int64),
        rival=np.array([tangent.rival for tangent in tangents], dtype=np.int64),
        d=np.array([np.asarray(tangent.d) for tangent in tangents], dtype=np.float64).reshape(len(tangents), *shape),
    )
