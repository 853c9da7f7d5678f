"""Threads that run one driver together: plain Python threads that wait and work without holding the interpreter's lock.

Only one caller at a time has the gang; another runs alone, with the same bits. A worker that finds no work for a moment
goes to sleep. After a fork the child starts its own.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from throughtime.engine.targets import cache
from throughtime.engine.targets.llvm import Code

_MAILBOX = (
    24  # integers: [0] work is there, [8] work is done, [16] the driver, [17] its frame; 8 apart, a cache line each
)
_PATIENCE = 4000  # turns of the waiting loop before a worker sleeps: some tens of microseconds

Function = ctypes.CFUNCTYPE(None, ctypes.c_int64)
_Wait = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64)


def _serve_text() -> str:
    """`serve(mailbox, patience)`: do work as long as some comes, and return when none has come for a while."""
    code = Code("serve", ["mailbox", "patience"], 4)
    idle = code.integer_variable(0)
    with code.forever() as leave_when:
        with code.when(code.load_shared(code["mailbox"]) > 0):
            code.store_shared(0, code["mailbox"])
            code.call(code.load_integer(code["mailbox"], 8 * 16), [code.load_integer(code["mailbox"], 8 * 17)])
            code.store_shared(1, code["mailbox"] + 8 * 8)
            idle.set(code.integer(0))
        code.pause()
        idle.set(idle.get() + 1)
        leave_when(idle.get() > code["patience"])
    return code.text()


def _await_text() -> str:
    """`wait(mailbox, yield)`: until the mailbox says that the work is done."""
    code = Code("wait", ["mailbox", "yield"], 4)
    turns = code.integer_variable(0)
    with code.forever() as leave_when:
        leave_when(code.load_shared(code["mailbox"] + 8 * 8) > 0)
        code.pause()
        turns.set(turns.get() + 1)
        with code.when(turns.get() > 2000):
            code.call(code["yield"], [])
    return code.text()


class Worker:
    """One thread with its mailbox."""

    def __init__(self) -> None:
        self.memory = (ctypes.c_int64 * (_MAILBOX + 8))()
        start = ctypes.addressof(self.memory)
        self.mailbox = start + (-start) % 64
        self.cell = (ctypes.c_int64 * _MAILBOX).from_address(self.mailbox)
        self.asleep = False
        self.wake = threading.Semaphore(0)
        self.serve = _Wait(cache.function(("serve",), "serve", _serve_text))
        self.thread = threading.Thread(target=self._live, name="throughtime", daemon=True)
        self.thread.start()

    def _live(self) -> None:
        while True:
            self.serve(self.mailbox, _PATIENCE)
            self.asleep = True
            if not self.cell[0]:
                self.wake.acquire()
            self.asleep = False

    def give(self, function: int, frame: int) -> None:
        """Let the thread call a function with a frame."""
        self.cell[16], self.cell[17], self.cell[8] = function, frame, 0
        self.cell[0] = 1
        if self.asleep:
            self.wake.release()


class Gang:
    """The workers beside the calling thread."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.workers: list[Worker] = []
        self.wait = _Wait(cache.function(("wait",), "wait", _await_text))

    def run(self, call: Callable[[int], None], function: int, frames: Sequence[int]) -> None:
        """Call the function (also given as `call`) once per frame, all at the same time; return when all have."""
        helpers = len(frames) - 1
        while len(self.workers) < helpers:
            self.workers.append(Worker())
        for worker, frame in zip(self.workers, frames[1:], strict=False):
            worker.give(function, frame)
        call(frames[0])
        for worker in self.workers[:helpers]:
            self.wait(worker.mailbox, yield_address())


_gang: Gang | None = None
_making = threading.Lock()


@contextmanager
def gathered(threads: int) -> Iterator[Gang | None]:
    """The gang if more than one thread is wanted and no one else has it, else None."""
    global _gang
    if threads <= 1:
        yield None
        return
    with _making:
        if _gang is None:
            _gang = Gang()
        gang = _gang
    if not gang.lock.acquire(blocking=False):
        yield None
        return
    try:
        yield gang
    finally:
        gang.lock.release()


def yield_address() -> int:
    """The C function that offers this core to other threads."""
    return _YIELD


def _find_yield() -> int:
    library = ctypes.windll.kernel32 if os.name == "nt" else ctypes.CDLL(None)  # type: ignore[attr-defined,unused-ignore]
    function = library.SwitchToThread if os.name == "nt" else library.sched_yield
    return ctypes.cast(function, ctypes.c_void_p).value or 0


_YIELD = _find_yield()


def _forget() -> None:
    """In a forked child the workers do not exist, and a lock may have been held by a thread that is gone."""
    global _gang, _making
    _gang, _making = None, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
