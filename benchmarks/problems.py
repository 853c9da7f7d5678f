"""What is measured: sizes, cells, and for each of them the same numbers in every peer.

Needs NumPy alone, so that a peer's process holds that peer and nothing else.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]

GATES = {"elman": 1, "gru": 3, "gru-reset-before": 3, "lstm": 4}
MODES = ("inference", "training", "step")
"""Forward alone; forward and backward to x and all weights; a step of Adam with a read-out and a squared error."""

READ_OUT = 10
"""The outputs of the read-out in a whole training step."""


class Shape(NamedTuple):
    """T time steps, B rows, I inputs and H units."""

    T: int
    B: int
    I: int
    H: int

    @classmethod
    def parse(cls, text: str) -> Shape:
        """Read "100,32,64,128". Raises ValueError for anything else than four positive integers."""
        sizes = [int(part) for part in text.split(",")]
        if len(sizes) != 4 or min(sizes) < 1:
            raise ValueError(f"{text!r} is not T,B,I,H: four positive integers")
        return cls(*sizes)

    def __str__(self) -> str:
        return ",".join(map(str, self))


SHAPES = [
    Shape(100, 1, 64, 64),
    Shape(100, 32, 64, 128),
    Shape(100, 32, 128, 256),
    Shape(100, 64, 256, 512),
    Shape(35, 20, 650, 650),
    Shape(784, 32, 1, 128),
    Shape(1000, 16, 32, 64),
    Shape(250, 8, 40, 320),
    Shape(50, 128, 32, 96),
    Shape(20, 1, 512, 1024),
]


def flops(cell: str, shape: Shape, mode: str) -> float:
    """Useful operations of the products, twice a multiply-add; the backward pass has two products for each forward."""
    forward = 2.0 * GATES[cell] * shape.T * shape.B * shape.H * (shape.I + shape.H)
    return forward if mode == "inference" else 3 * forward


@dataclass(frozen=True)
class Numbers:
    """x [T, B, I], the gradient of the outputs [T, B, H], and the weights under torch's names and in its layout."""

    x: Array
    d_output: Array
    weights: dict[str, Array]


def numbers(cell: str, shape: Shape) -> Numbers:
    """The same in every process; the weights uniform in +-1/sqrt(H), as torch draws them."""
    random = np.random.default_rng(zlib.crc32(f"{cell} {shape}".encode()))
    T, B, I, H = shape
    rows, bound = GATES[cell] * H, 1 / math.sqrt(H)
    sizes = {
        "weight_ih_l0": (rows, I),
        "weight_hh_l0": (rows, H),
        "bias_ih_l0": (rows,),
        "bias_hh_l0": (rows,),
    }
    return Numbers(
        random.standard_normal((T, B, I), dtype=np.float32),
        random.standard_normal((T, B, H), dtype=np.float32),
        {name: random.uniform(-bound, bound, size).astype(np.float32) for name, size in sizes.items()},
    )
