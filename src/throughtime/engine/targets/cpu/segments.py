"""Segments of time: the steps whose inside a backward run computes anew, so that a forward run need not keep it.

Chen et al. 2016 (arXiv:1604.06174) trade a second forward pass for memory that grows with the square root of the
steps. Here nothing is approximated: a segment is a whole number of the blocks in which weight gradients are summed, so
that every sum has the terms, and the order, of a run that keeps everything.
"""

from __future__ import annotations

import math
import warnings
from typing import Literal

Segments = int | Literal["auto"] | None
"""Steps of a segment, "auto" for about the square root of all steps, or None to keep every step."""


def length(asked: Segments, steps: int, block: int, say: bool = False) -> int:
    """Steps of a segment: what is asked for, or about the root of `steps`, in whole blocks; `steps` if that is less.

    With `say`, warns of a number that had to be rounded.
    """
    if asked is None:
        return steps
    wanted = math.isqrt(steps - 1) + 1 if asked == "auto" else asked
    whole = -(-wanted // block) * block
    if say and asked != "auto" and whole != wanted < steps:
        warnings.warn(
            f"segments={asked} is not a whole number of the {block} steps in which this layer sums its gradients; "
            f"{min(whole, steps)} is used (segments='auto' would take {length('auto', steps, block)})",
            stacklevel=2,
        )
    return min(whole, steps)


def ranges(steps: int, segment: int) -> list[tuple[int, int]]:
    """The first phase of each segment and the one after its last."""
    return [(first, min(first + segment, steps)) for first in range(0, steps, segment)]
