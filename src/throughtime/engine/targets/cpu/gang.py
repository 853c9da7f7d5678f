"""Threads that run one driver together, without holding the interpreter's lock.

Where torch brings GNU OpenMP, its own threads are used: they spin for a while after each of torch's operations, and
other threads beside them would share a core with that. Elsewhere, and in a forked child, where OpenMP's threads are
gone, plain Python threads wait and work. Only one caller at a time has the threads; another runs alone, with the same
bits.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from throughtime.engine.targets.cpu import cache
from throughtime.engine.targets.cpu.llvm import Code

_MAILBOX = (
    24  # integers: [0] work is there, [8] work is done, [16] the driver, [17] its frame; 8 apart, a cache line each
)
_PATIENCE = 4000  # turns of the waiting loop before a worker sleeps: some tens of microseconds

_Function = ctypes.CFUNCTYPE(None, ctypes.c_int64)


class Call:
    """A compiled function of a frame: its address for other threads, and what this one calls."""

    def __init__(self, address: int) -> None:
        self.address = address
        self.function = _Function(address)


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
    """Workers of our own beside the calling thread."""

    def __init__(self) -> None:
        self.workers: list[Worker] = []
        self.helpers = 0
        self.wait = _Wait(cache.function(("wait",), "wait", _await_text))

    def run(self, call: Call, frames: Sequence[int]) -> None:
        """Call the function once per frame, all at the same time; return when all have returned."""
        workers = self.workers[: len(frames) - 1]
        for worker, frame in zip(workers, frames[1:], strict=True):
            worker.give(call.address, frame)
        try:
            call.function(frames[0])
        finally:
            for worker in workers:
                self.wait(worker.mailbox, yield_address())


class Team:
    """OpenMP's threads, those that torch uses."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.helpers = 0
        self.parallel = library.GOMP_parallel
        self.parallel.restype = None
        self.parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        self.inside, self.dynamic, self.limit = (
            library.omp_in_parallel,
            library.omp_get_dynamic,
            library.omp_get_thread_limit,
        )
        self.member = cache.function(("member",), "member", _member_text)
        self.functions = [
            ctypes.cast(f, ctypes.c_void_p).value or 0
            for f in (library.omp_get_thread_num, library.omp_get_num_threads)
        ]

    def has(self, threads: int) -> bool:
        """Whether so many threads would really run at the same time."""
        return not self.inside() and not self.dynamic() and self.limit() >= threads

    def run(self, call: Call, frames: Sequence[int]) -> None:
        """Call the function once per frame, all at the same time; return when all have returned."""
        work = (ctypes.c_int64 * (4 + len(frames)))(*self.functions, call.address, len(frames), *frames)
        self.parallel(self.member, ctypes.addressof(work), len(frames), 0)


def _member_text() -> str:
    """`member(work)`: what each of OpenMP's threads calls; it takes the frames that are its own by number."""
    code = Code("member", ["work"], 4)
    number = code.call_for_number(code.load_integer(code["work"], 0))
    members = code.call_for_number(code.load_integer(code["work"], 8))
    with code.loop(code.load_integer(code["work"], 24), start=number, step=members) as frame:
        code.call(code.load_integer(code["work"], 16), [code.load_integer(code["work"] + 32 + frame * 8)])
    return code.text()


def _openmp() -> ctypes.CDLL | None:
    """The GNU OpenMP library that torch has loaded, if it is that one."""
    for path in (Path(torch.__file__).parent / "lib").glob("libgomp*.so*"):
        return ctypes.CDLL(str(path))
    return None


_team: Team | None = None
_gang: Gang | None = None
_forked = False
_making = threading.Lock()
_taken = threading.Lock()


@contextmanager
def gathered(threads: int) -> Iterator[Team | Gang | None]:
    """The threads, if more than one is wanted and no one else has them, else None."""
    if threads <= 1 or not _taken.acquire(blocking=False):
        yield None
        return
    taken = _taken
    try:
        crew = _threads(threads)
        crew.helpers = threads - 1
        yield crew
    finally:
        taken.release()


def _threads(threads: int) -> Team | Gang:
    global _gang, _team
    with _making:
        if _team is None and not _forked and (library := _openmp()) is not None:
            _team = Team(library)
        if _team is not None and not _forked and _team.has(threads):
            return _team
        if _gang is None:
            _gang = Gang()
        while len(_gang.workers) < threads - 1:
            _gang.workers.append(Worker())
        return _gang


def yield_address() -> int:
    """The C function that offers this core to other threads."""
    return _YIELD


def _find_yield() -> int:
    library = ctypes.windll.kernel32 if os.name == "nt" else ctypes.CDLL(None)  # type: ignore[attr-defined,unused-ignore]
    function = library.SwitchToThread if os.name == "nt" else library.sched_yield
    return ctypes.cast(function, ctypes.c_void_p).value or 0


_YIELD = _find_yield()


def _forget() -> None:
    """In a forked child no other thread exists, and a lock may have been held by one that is gone."""
    global _gang, _forked, _making, _taken
    _gang, _forked = None, True
    _making, _taken = threading.Lock(), threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
