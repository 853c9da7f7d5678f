"""What a user meets first: the first training call of a process, and a cell of one's own beside the built-in one.

    python benchmarks/first_call.py '{"what": "first", "threads": 2}'     # THROUGHTIME_CACHE says where code is kept
    python benchmarks/first_call.py '{"what": "own cell", "threads": 2}'

A GRU on (100,32,64,128), forward and backward; importing is not counted.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from typing import Any

import torch
from peers import stay_on
from problems import Shape

import throughtime as tt
from throughtime import sigmoid, tanh

SHAPE = Shape(100, 32, 64, 128)
PAIRS = 41


@tt.cell(states="s")
def OwnGRU(x, s, W, U, b, c):
    """The GRU's equations with another hand's names: other gates and states make another graph, and so other code."""
    erase = sigmoid(W.erase @ x + b.erase + U.erase @ s + c.erase)
    keep = sigmoid(W.keep @ x + b.keep + U.keep @ s + c.keep)
    fresh = tanh(W.fresh @ x + b.fresh + erase * (U.fresh @ s + c.fresh))
    return (1 - keep) * fresh + keep * s


def train_once(layer: torch.nn.Module, x: torch.Tensor, d_output: torch.Tensor) -> float:
    """The seconds of one forward and backward pass."""
    x.grad = None
    layer.zero_grad()
    begin = time.perf_counter()
    layer(x)[0].backward(d_output)
    return time.perf_counter() - begin


def measure(what: str, threads: int) -> dict[str, Any]:
    """The seconds of a first call, or the medians of two cells that take turns."""
    stay_on(threads)
    torch.set_num_threads(threads)
    T, B, I, H = SHAPE
    x, d_output = torch.randn(T, B, I).requires_grad_(), torch.randn(T, B, H)
    built_in = tt.nn.GRU(I, H)
    if what == "first":
        return {"seconds": train_once(built_in, x, d_output)}
    if OwnGRU.hash == tt.GRU.hash:
        raise SystemExit("the cell of one's own is the built-in one to the engine: nothing would be compared")
    own = tt.nn.Recurrent(OwnGRU, I, H)
    pairs = [(train_once(built_in, x, d_output), train_once(own, x, d_output)) for _ in range(PAIRS)][1:]
    return {"built-in": statistics.median(a for a, _ in pairs), "own": statistics.median(b for _, b in pairs)}


if __name__ == "__main__":
    print(json.dumps(measure(**json.loads(sys.argv[1]))))
