"""The machine's own peak: independent chains of fused multiply-adds on vectors, on one core and on several.

python benchmarks/peak.py '{"threads": [1, 2], "seconds": 0.1}'
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from throughtime.engine.targets.cpu import llvm
from throughtime.engine.targets.cpu.machine import machine

CHAINS = 24
"""More than any core's latency times its units for fma; fewer where there are fewer registers."""

TRIALS = 7
Turn = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64)


def chains() -> int:
    """How many chains stay in registers, beside the two constants."""
    return min(CHAINS, machine().registers - 4)


def kernel() -> Callable[[int, int], None]:
    """`run(turns, address of a vector)`: every chain takes one fma a turn. It holds no lock of the interpreter's."""
    code = llvm.Code("peak", ["turns", "target"], 4)
    sums = [code.vector_variable(code.fill(number)) for number in range(chains())]
    with code.loop(code["turns"]):
        for total in sums:
            total.set(total.get().fma(0.5, 0.25))
    whole = sums[0].get()
    for total in sums[1:]:
        whole = whole.add(total.get())
    code.store(whole, code["target"])
    return Turn(llvm.load(llvm.compiled(code.text()), "peak"))


def measure(threads: list[int], seconds: float) -> dict[int, float]:
    """Operations per second with each number of threads: the best of a few trials of about so many seconds."""
    run = kernel()
    per_turn = 2 * chains() * machine().lanes(4)
    rate = 1_000_000 / _elapsed(run, 1, 1_000_000)
    turns = int(rate * seconds) + 1
    best = {count: min(_elapsed(run, count, turns) for _ in range(TRIALS)) for count in threads}
    return {count: per_turn * turns * count / elapsed for count, elapsed in best.items()}


def _elapsed(run: Callable[[int, int], None], threads: int, turns: int) -> float:
    targets = [(ctypes.c_float * 64)() for _ in range(threads)]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda target: run(1, ctypes.addressof(target)), targets))
        begin = time.perf_counter()
        list(pool.map(lambda target: run(turns, ctypes.addressof(target)), targets))
        return time.perf_counter() - begin


if __name__ == "__main__":
    print(json.dumps(measure(**json.loads(sys.argv[1]))))
