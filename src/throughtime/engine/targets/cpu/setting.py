"""A run prepared for its sizes: buffers, kernels and a frame for each thread, made once and pointed at tensors."""

from __future__ import annotations

import ctypes
import os
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence

from torch import Tensor

from throughtime.engine import memory
from throughtime.engine import plan as plans
from throughtime.engine.plan import Stage
from throughtime.engine.problem import Problem
from throughtime.engine.targets.cpu import gang, kernels
from throughtime.engine.targets.cpu.compiled import Compiled, transpose
from throughtime.engine.targets.cpu.machine import machine
from throughtime.engine.targets.cpu.sharing import Share, Sharing
from throughtime.errors import InternalError

UNSET = -0x5A5A_5A5A_5A5A_5A5B
"""What a field of a frame holds until it is set. As an address it belongs to no process; no size is as odd."""

Crew = gang.Team | gang.Gang | None
"""The threads of a run; None is the caller's alone."""


def unset_frame(length: int) -> ctypes.Array[ctypes.c_int64]:
    """A frame in which no field is set."""
    return (ctypes.c_int64 * length)(*[UNSET] * length)


def check_frame(frame: ctypes.Array[ctypes.c_int64], place: dict[str, int], needed: Iterable[str], whose: str) -> None:
    """Raise InternalError if a field that is needed has not been set."""
    values = frame[:]
    missing = sorted(name for name in needed if values[place[name]] == UNSET)
    if missing:
        raise InternalError(
            f"the fields {', '.join(missing)} of a frame are not set, and {whose} would read them; this is a mistake "
            "in throughtime, so please report it (THROUGHTIME_TARGET=stepwise runs without frames)"
        )


class Setting:
    """Everything of one run that the sizes decide: buffers, kernels, and a frame for each thread.

    It is made once for a set of sizes and used again; a run only points it at its tensors. A setting serves one run at
    a time.
    """

    def __init__(self, problem: Problem, code: Compiled, shared: Sharing) -> None:
        self.code, self.cell, self.sharing = code, problem.cell, shared
        self.steps, self.rows, inputs = problem.x.shape
        self.dtype = problem.x.dtype
        self.item = problem.x.element_size()
        self.lanes = machine().lanes(self.item)
        self.vector_bytes = self.lanes * self.item
        self.units = {"hidden": problem.hidden_size, "projected": problem.proj_size, "input": inputs}
        self.tiles = {width: -(-units // self.lanes) for width, units in self.units.items()}
        self.sizes = problem.sizes
        self.reverse = problem.reverse
        self.ladder = problem.lengths is not None or problem.reset is not None
        self.arena = memory.Arena()
        self.place = code.frame.place
        self.frames = [unset_frame(len(self.place)) for _ in shared.shares]
        self.stages: set[str] = set()
        self.checked: dict[str, int] = {}
        self.addresses = [ctypes.addressof(frame) for frame in self.frames]
        self.zeroed: list[tuple[int, int]] = []
        self.values: dict[str, int] = {}
        self.given: list[Tensor] = []
        self.weights: list[int] = []
        self._common()
        if problem.reset is None:
            self.absent("reset")
        if not problem.initial:
            self.absent(*(f"initial:{state}.{part}" for state in self.cell.states for part in ("base", "size")))

    # fields

    def put(self, name: str, value: int) -> None:
        """Set a field of every thread's frame."""
        if self.values.get(name) == value:
            return
        self.values[name] = value
        i = self.place[name]
        for frame in self.frames:
            frame[i] = value

    def put_for(self, thread: int, name: str, value: int) -> None:
        """Set a field of one thread's frame."""
        self.frames[thread][self.place[name]] = value

    def absent(self, *names: str) -> None:
        """Say that this run does without these fields: a program may look at them, and finds 0."""
        for name in names:
            self.put(name, 0)

    def _common(self) -> None:
        self.put("yield", gang.yield_address())
        self.put("steps", self.steps)
        self.put("reverse", int(self.reverse))
        self.put("rows.batch", self.rows)
        self.put("kernels", ctypes.addressof(self.code.table))
        self.put("tile_limits", ctypes.addressof(self.code.limits))
        self.put("transpose", transpose(self.item))
        self.put("threads", len(self.frames) if self.sharing.units_shared else 1)
        self.put("ladder", int(self.ladder))
        self.put("units_shared", int(self.sharing.units_shared))
        self.put("barrier", self.arena.bytes(64))
        self.active_place = self.arena.bytes(8 * self.steps)
        self.put("active", self.active_place)
        self._set_active([self.rows] * self.steps)
        for width, units in self.units.items():
            self.put(f"tiles:{width}", self.tiles[width])
            self.put(f"units:{width}", units)
            self.put(f"lanes:{width}", units - (self.tiles[width] - 1) * self.lanes)
        for width, slots in self.code.plan.vectors.items():
            self.put(f"vectors:{width}.tile", len(slots) * self.vector_bytes)
            self.put(f"vectors:{width}.base", self.arena.bytes(self.tiles[width] * len(slots) * self.vector_bytes))
        for thread, share in enumerate(self.sharing.shares):
            self.put_for(thread, "thread", thread if self.sharing.units_shared else 0)
            self.put_for(thread, "packer", thread)
            self.put_for(thread, "rows.first", share.first)
            self.put_for(thread, "rows.stride", share.stride)
            self.put_for(thread, "rows.count", share.count)
            for width in self.units:
                first, last = self.sharing.tiles(thread, self.tiles[width])
                self.put_for(thread, f"tiles.first:{width}", first)
                self.put_for(thread, f"tiles.last:{width}", last)

    def _set_active(self, active: list[int]) -> None:
        """How many rows run at each step."""
        self.active = active
        ctypes.memmove(self.active_place, (ctypes.c_int64 * self.steps)(*active), 8 * self.steps)

    # buffers

    def cleared(self, size: int) -> int:
        """Scratch that is zero when a run begins."""
        address = self.arena.bytes(size)
        self.zeroed.append((address, size))
        return address

    def tiled(self, buffer: str, rows: int, width: str, slots: int) -> None:
        """A scratch buffer [rows][tiles][slots] of vectors that all threads see."""
        row = self.tiles[width] * slots * self.vector_bytes
        base = self.arena.bytes(rows * row)
        parts = {"tile": slots * self.vector_bytes, "row": row, "size": row, "base": base, "origin": base}
        for part, value in parts.items():
            self.put(f"{buffer}.{part}", value)
        for thread, share in enumerate(self.sharing.shares):
            self.put_for(thread, f"{buffer}.base", base + share.first * row)
            self.put_for(thread, f"{buffer}.row", share.stride * row)

    def panel(self, stage: Stage) -> None:
        """Room for the packed weights of a stage."""
        for group in stage.groups:
            name = kernels.panel_name(stage, group)
            if f"{name}.base" in self.values:
                continue
            source = group.operand.data[0]
            if source.startswith("ring"):
                slots = len(group.products)
                size = self.tiles[source.split(":")[1]] * self.lanes * slots * self.vector_bytes
            else:
                size = self.values[f"{source}.count"] * len(group.products) * self.vector_bytes
            self.put(f"{name}.tile", size)
            self.put(f"{name}.base", self.arena.bytes(self.tiles[stage.width] * size))

    # pointing at tensors

    def bind(self, problem: Problem) -> None:
        """Point at the tensors that both directions read."""
        self.given = [tensor.contiguous() for tensor in problem.parameters]
        starts = [tensor.data_ptr() for tensor in self.given]
        if starts != self.weights:
            self.weights = starts
            for parameter, tensor, start in zip(self.cell.parameters, self.given, starts, strict=True):
                size = tensor.numel() // len(parameter.gates) * self.item
                for i, gate in enumerate(parameter.gates):
                    self.put(f"weight:{parameter.namespace}.{gate}", start + i * size)
        self.steps_of("x", problem.x)
        for i, name in enumerate(self.cell.outside):
            value = problem.outside[i]
            if i >= len(self.cell.per_step):
                value = value.expand(self.steps, *value.shape)
            self.steps_of(f"outside:{name}", value.expand(self.steps, self.rows, self.outside_units(i)))
        for i, state in enumerate(self.cell.states):
            self.rows_of(f"start:{state}", problem.states[i])
            if problem.initial:
                self.rows_of(f"initial:{state}", problem.initial[i])
        if problem.reset is not None:
            reset = problem.reset.contiguous()
            self.given.append(reset)
            self.put("reset", reset.data_ptr())
        if problem.lengths is not None:
            self._set_active(problem.active())

    def outside_units(self, place: int) -> int:
        """How many units an outside input acts on."""
        return self.units[plans.outside_width(self.cell, self.cell.outside[place])]

    def rows_of(self, buffer: str, tensor: Tensor) -> None:
        """A buffer that is the rows [B, width] of a tensor."""
        tensor = self._readable(tensor)
        start = tensor.data_ptr()
        self.put(f"{buffer}.base", start)
        self.put(f"{buffer}.origin", start)
        self.put(f"{buffer}.size", tensor.stride(0) * self.item)

    def steps_of(self, buffer: str, tensor: Tensor, first: int = 0) -> None:
        """A buffer that is the rows of each step of a tensor [T, B, width], from step `first` on."""
        tensor = self._readable(tensor)
        step = tensor.stride(0) * self.item
        self.put(f"{buffer}.origin", tensor.data_ptr() - first * step)
        self.put(f"{buffer}.step", step)
        self.put(f"{buffer}.size", tensor.stride(1) * self.item)

    def _readable(self, tensor: Tensor) -> Tensor:
        """The tensor, copied if its rows are not runs of numbers; kept until the run is over."""
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            tensor = tensor.contiguous()
        self.given.append(tensor)
        return tensor

    # running

    def counts(self, share: Share) -> list[int]:
        """The different numbers of rows that a thread has at a step."""
        return sorted({share.running(n) for n in set(self.active)} - {0})

    def _have(self, stage: Stage, counts: Sequence[int], tiles: Sequence[tuple[int, int]]) -> None:
        """Have a stage's kernels for these numbers of rows, unless there are none."""
        if counts:
            self.stages.add(stage.name)
            self.code.prepare(stage, counts, self.ladder, tiles, self.units[stage.width])

    def tile_ranges(self, width: str) -> list[tuple[int, int]]:
        """The ranges of tiles that threads take in the loop."""
        return sorted({self.sharing.tiles(k, self.tiles[width]) for k in range(len(self.frames))})

    def clear(self) -> None:
        """Zero the scratch that a run adds to."""
        for address, size in self.zeroed:
            ctypes.memset(address, 0, size)

    def pack(self, crew: Crew) -> None:
        """Lay out the weights, and zero what is added to."""
        self.clear()
        packers = self._packers(crew)
        self.put("packers", packers)
        self._check("pack")
        self._run(crew, self.code.pack, self.addresses[:packers])

    def walk(self, crew: Crew, first: int, last: int) -> None:
        """Walk from one phase up to another, with as many frames at once as there are threads, and wait for all."""
        self.put("walk.first", first)
        self.put("walk.last", last)
        ctypes.memset(self.values["barrier"], 0, 64)
        self._check("walk", self.stages)
        threads = 1 + crew.helpers if crew else 1
        for frame in range(0, len(self.frames), threads):
            self._run(crew, self.code.walk, self.addresses[frame : frame + threads])

    def add_up(self, crew: Crew) -> None:
        """Add the sums of the shards of rows."""
        if self.code.add_up and len(self.sharing.crews()) > 1:
            self._check("add_up")
            self._run(crew, self.code.add_up, self.addresses[: self._packers(crew)])

    def _check(self, driver: str, stages: Iterable[str] = ()) -> None:
        """Every field that a driver and its kernels read is set; looked at again only when there are new kernels."""
        if self.checked.get(driver) != self.code.known:
            needed = self.code.needs(driver, stages)
            for frame in self.frames:
                check_frame(frame, self.place, needed, self.code.label(driver))
            self.checked[driver] = self.code.known

    def _packers(self, crew: Crew) -> int:
        return min(1 + crew.helpers if crew else 1, len(self.frames))

    def _run(self, crew: Crew, call: gang.Call, addresses: list[int]) -> None:
        if crew is None or len(addresses) == 1:
            for address in addresses:
                call.function(address)
        else:
            crew.run(call, addresses)

    def drop(self) -> None:
        """Let go of the tensors of a run."""
        self.given = []


class Settings:
    """Settings that are not in use, the last used ones, so that a run of known sizes finds everything prepared."""

    KEPT = 32
    KEPT_BYTES = 1 << 28

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.idle: OrderedDict[tuple[object, ...], list[Setting]] = OrderedDict()
        self.bytes = 0

    def take(self, key: tuple[object, ...]) -> Setting | None:
        """An idle setting for these sizes, if there is one."""
        with self.lock:
            found = self.idle.get(key)
            if not found:
                return None
            self.bytes -= found[-1].arena.size
            return found.pop()

    def give(self, key: tuple[object, ...], setting: Setting) -> None:
        """Keep a setting for later; the longest unused ones go when there are too many."""
        setting.drop()
        with self.lock:
            self.idle.setdefault(key, []).append(setting)
            self.idle.move_to_end(key)
            self.bytes += setting.arena.size
            while len(self.idle) > 1 and (len(self.idle) > self.KEPT or self.bytes > self.KEPT_BYTES):
                for old in self.idle.popitem(last=False)[1]:
                    self.bytes -= old.arena.size
                    old.arena.release()


settings = Settings()
"""Those of this process."""


def _forget() -> None:
    """A forked child keeps what was prepared, under a lock that nobody holds."""
    settings.lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
