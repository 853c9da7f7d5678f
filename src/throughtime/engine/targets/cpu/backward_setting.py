"""Backward runs, prepared: the ring of deltas, the sums of the weights' gradients, and the gradients handed back."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from throughtime.engine import memory
from throughtime.engine import plan as plans
from throughtime.engine.plan import BackwardPlan, Stage
from throughtime.engine.problem import Problem
from throughtime.engine.targets.cpu import kernels
from throughtime.engine.targets.cpu.backward import CHUNK, FEW_COLUMNS, FEW_INPUTS, OUTER_COLUMNS
from throughtime.engine.targets.cpu.compiled import columns, compiled, dot, gather_table, outer, outer_table
from throughtime.engine.targets.cpu.kept import Again, Kept, Values
from throughtime.engine.targets.cpu.machine import machine
from throughtime.engine.targets.cpu.setting import Crew, Setting
from throughtime.engine.targets.cpu.sharing import Sharing
from throughtime.equations import calculus
from throughtime.equations.cell import Cell, Parameter
from throughtime.equations.expr import Node

RING_BYTES = 384 * 1024
"""Deltas kept before their share of the gradients is taken: they should still be in the second caches then."""

RING_ROWS = CHUNK
"""Rows that a block of the backward pass should have a multiple of: a sum is read and written once for each chunk."""

READ_BYTES = 4_500_000
"""Input weights of more than this, which each block reads whole for dx, are read for two chunks of rows at once."""

MOST_RING_ROWS = 1024
"""The most rows of a block, so that no sum over rows becomes a long chain of roundings."""


def block_steps(problem: Problem, shared: Sharing) -> int:
    """The steps of a block: their deltas fit the ring, and are rows enough to be worth a sum, but not too many."""
    item = problem.x.element_size()
    lanes = machine().lanes(item)
    units = {"hidden": problem.hidden_size, "projected": problem.proj_size}
    rows = max(share.count for share in shared.shares)
    rings = [
        (slots, b.split(":")[1]) for b, slots in plans.backward(problem.cell).slots.items() if b.startswith("ring")
    ]
    step = sum(slots * -(-units[width] // lanes) for slots, width in rings) * lanes * item * rows
    chunk = max(1, RING_ROWS // rows)
    pairs = zip(problem.cell.parameters, problem.parameters, strict=True)
    read = sum(tensor.numel() * item for parameter, tensor in pairs if parameter.namespace == "W")
    block = max(RING_BYTES // max(1, step) // chunk, 2 if read > READ_BYTES else 1) * chunk
    return max(1, min(problem.steps, block, MOST_RING_ROWS // rows))


class BackwardSetting(Setting):
    """Backward runs for one set of sizes and of gradients that are wanted."""

    plan: BackwardPlan

    def __init__(self, problem: Problem, needs: Sequence[bool], shared: Sharing) -> None:
        cell = problem.cell
        super().__init__(problem, compiled(cell, problem.x.element_size(), "backward", True, False), shared)
        assert isinstance(self.code.plan, BackwardPlan)
        self.plan = self.code.plan
        counts = [1, len(cell.states), len(cell.parameters), len(cell.outside), len(problem.initial)]
        edges = [sum(counts[:i]) for i in range(len(counts) + 1)]
        self.needs = [list(needs[a:b]) for a, b in pairwise(edges)]
        self.resets = problem.reset is not None
        self.most_rows = max(share.count for share in shared.shares)
        self.block = block_steps(problem, shared)
        self.ring_rows = self.block * self.most_rows
        self.put("block", self.block)
        self.put("ring.rows", self.ring_rows)
        self.put("outer", ctypes.addressof(outer_table(self.item)))
        self.put("gather", ctypes.addressof(gather_table(self.item)))
        self.put("d_x.wanted", int(self.needs[0][0] and _has_input_product(cell)))
        self.put("leaving", int(any(self.needs[1]) or self.resets))
        if not self.resets:
            self.absent(*(f"d_initial:{state}.base" for state in cell.states))
        self._parts(problem)
        self._buffers()
        self._tables()
        self._weights()
        self._inputs()
        self.used = [stage for stage in self.code.stages if self._is_used(stage)]
        for stage in self.used:
            self.panel(stage)
        for stage in self.code.stages:
            names = [kernels.panel_name(stage, group) for group in stage.groups]
            self.absent(*(f"{n}.{part}" for n in names if f"{n}.base" not in self.values for part in ("base", "tile")))
        self._prepare()

    def _parts(self, problem: Problem) -> None:
        """Gradients of the rows of every frame but the first, which are added to the first one's in the end."""
        self.crews = self.sharing.crews()
        self.parts: dict[str, list[int]] = {}
        self.part_tables: dict[str, int] = {}
        for parameter, tensor, need in zip(self.cell.parameters, problem.parameters, self.needs[2], strict=True):
            others = self.crews[1:]
            self.parts[parameter.name] = [self.arena.bytes(tensor.numel() * self.item) if need else 0 for _ in others]
            self.part_tables[parameter.name] = self.arena.integers(self.parts[parameter.name] or [0])
            for label, offset in self._gates(parameter, tensor):
                self.put(f"{label}.stride", (tensor.shape[1] if parameter.is_matrix else 1) * self.item)
                for crew, part in zip(others, self.parts[parameter.name], strict=True):
                    for frame in crew:
                        self.put_for(frame, f"{label}.base", part + offset if part else 0)
        self.put("sums", self.arena.bytes(8 + 32 * len(self.cell.parameters)))

    def _gates(self, parameter: Parameter, tensor: Tensor) -> list[tuple[str, int]]:
        """Each gate's name among the fields, and where its part of the parameter begins, in bytes."""
        size = tensor.numel() // len(parameter.gates) * self.item
        return [(f"d_weight:{parameter.namespace}.{gate}", i * size) for i, gate in enumerate(parameter.gates)]

    def _buffers(self) -> None:
        for buffer, slots in self.plan.slots.items():
            kind, width = buffer.split(":")
            if kind == "ring":
                for crew in self.sharing.crews():
                    self._ring(crew, buffer, width, slots)
            elif kind in ("carry", "scratch"):
                self.tiled(buffer, self.rows, width, slots)
                if kind == "carry":
                    size = self.rows * self.values[f"{buffer}.size"]
                    self.zeroed.append((self.values[f"{buffer}.origin"], size))
        for operand, place in self.plan.operands.items():
            name, width = place.data[0], plans.operand_width(self.cell, operand)
            self.tiled(name, 0, width, 1)
            for crew in self.sharing.crews():
                self.put_all(crew, f"{name}.origin", self.arena.bytes(self.ring_rows * self.values[f"{name}.row"]))

    def put_all(self, crew: list[int], name: str, value: int) -> None:
        """Set a field of the frames that see the same buffers."""
        self.values.setdefault(name, value)
        for frame in crew:
            self.put_for(frame, name, value)

    def _ring(self, crew: list[int], buffer: str, width: str, slots: int) -> None:
        """[tiles][rows][slots] of vectors; after the block's rows come those kept from the block before, then zeros."""
        size = slots * self.vector_bytes
        rows = self.ring_rows + self.most_rows + 1
        tile = rows * size + 128  # so that the tiles of a row do not fall on one set of the first cache
        base = self.arena.bytes(tile * self.tiles[width])
        zero = base + (rows - 1) * size
        for number in range(self.tiles[width]):
            ctypes.memset(zero + number * tile, 0, size)
        parts = {"size": size, "row": size, "tile": tile, "tiles": self.tiles[width], "origin": base, "base": base}
        for part, value in {**parts, "zero": zero}.items():
            self.put_all(crew, f"{buffer}.{part}", value)
        following = buffer.replace("ring:", "ring_next:")
        self.put(f"{following}.tile", tile)
        self.put(f"{following}.tiles", self.tiles[width])
        self.put(f"{following}.row", 8)
        for frame in crew:
            self.put_for(frame, f"{following}.base", self.arena.bytes(self.most_rows * 8))
        vectors = [n for n, p in zip(self.needs[2], self.cell.parameters, strict=True) if not p.is_matrix]
        if any(vectors):
            self.put(f"column_sums:{width}", columns(self.item, slots, 0))
            self.put(f"sums:{width}.wanted", 1)
            sums = self.cleared(self.tiles[width] * slots * self.vector_bytes)
            self.put_all(crew, f"sums:{width}.base", sums)
        else:
            self.absent(f"column_sums:{width}", f"sums:{width}.wanted", f"sums:{width}.base")

    def _tables(self) -> None:
        """Tables of row addresses, an entry for each row of the ring."""
        names = [f"before:{state}" for state in self.cell.states] + ["x_rows", "d_x_rows"]
        for crew in self.sharing.crews():
            for name in [*names, *(place.data[0] for place in self.plan.operands.values())]:
                self.put_all(crew, f"{name}.table", self.arena.bytes(self.ring_rows * 8))
        for state in self.cell.states:
            self.put(f"before:{state}.entry", 8)
            self.put(f"history:{state}.depth", 0)
        for frame in range(len(self.frames)):
            panel = CHUNK * OUTER_COLUMNS * self.vector_bytes
            self.put_for(frame, "panel.base", self.arena.bytes(panel))

    def _weights(self) -> None:
        """Which weight gradients are wanted, and room for those of few columns."""
        need = {p.namespace: n for p, n in zip(self.cell.parameters, self.needs[2], strict=True)}
        adjoint = calculus.adjoint(self.cell)
        for number, (operand, products) in enumerate(self.plan.weights.items()):
            wanted = [product for product in products if need[product.data[0]]]
            few = [f"few{number}.{part}" for part in ("base", "kernel")] if operand.op == "input" else []
            if not wanted:
                self.absent(f"weights{number}.wanted", f"weights{number}.columns", *few)
                continue
            self.put(f"weights{number}.wanted", 1)
            self.put(f"weights{number}.columns", self._columns(operand))
            ring = self.plan.delta_slot[adjoint.delta[products[0]]].data[0]
            width = ring.split(":")[1]
            if operand.op == "input" and self._columns(operand) <= FEW_COLUMNS:
                slots, count = self.plan.slots[ring], self._columns(operand)
                size = self.tiles[width] * count * slots * self.vector_bytes
                for crew in self.sharing.crews():
                    self.put_all(crew, f"few{number}.base", self.cleared(size))
                self.put(f"few{number}.kernel", columns(self.item, slots, count))
            else:
                self.absent(*few)
                outer(self.item, self.units[width], self._columns(operand))

    def _inputs(self) -> None:
        """Dot products for the gradient of an x of few numbers."""
        stage = next((s for s in self.code.stages if s.name == "input_gradient"), None)
        if stage is not None and len(stage.groups) == 1 and self.units["input"] <= FEW_INPUTS:
            group = stage.groups[0]
            runs = kernels.slot_runs(self.plan.ring_slots(group))
            if len(runs) == 1:
                slots = self.plan.slots[group.operand.data[0].replace("ring_all:", "ring:")]
                self.put("few_inputs", 1)
                self.put("dot", dot(self.item, slots, *runs[0], self.units["input"]))
                return
        self.absent("few_inputs", "dot")

    def _columns(self, operand: Node) -> int:
        if operand.op == "input":
            return self.units["input"]
        if operand.op == "state":
            return self.sizes[self.cell.states.index(operand.data[0])]
        return self.units[plans.operand_width(self.cell, operand)]

    def _is_used(self, stage: Stage) -> bool:
        if stage.name == "input_gradient":
            return bool(self.values["d_x.wanted"])
        return stage.name.startswith("stage") or bool(self.values["leaving"])

    def _prepare(self) -> None:
        """The kernels for the numbers of rows of this run."""
        for share in self.sharing.shares:
            counts = self.counts(share)
            for stage in self.used:
                if stage.name != "input_gradient":
                    self._have(stage, counts, self.tile_ranges(stage.width))
                elif not self.values["few_inputs"]:
                    self._have(stage, self._gradient_counts(), [(0, self.tiles["input"])])

    def _gradient_counts(self) -> list[int]:
        """Numbers of rows of a block whose input gradients a frame takes."""
        active = self.active[::-1] if self.reverse else self.active
        pieces = len(self.frames) if self.sharing.units_shared else 1
        found: set[int] = set()
        for share in self.sharing.shares:
            counts = [share.running(n) for n in active]
            for begin in range(0, len(counts), self.block):
                rows = sum(counts[begin : begin + self.block])
                found |= {rows * (k + 1) // pieces - rows * k // pieces for k in range(pieces)}
        return sorted(found - {0})

    # one run

    def run(
        self,
        problem: Problem,
        kept: Kept | Again,
        d_output: Tensor | None,
        d_states: Sequence[Tensor | None],
        crew: Crew,
    ) -> tuple[Tensor | None, ...]:
        """One run on these tensors."""
        self.bind(problem)
        if problem.lengths is not None:
            self._prepare()
        if d_output is None:
            d_output = torch.zeros_like(kept.result.output)
        self.steps_of("d_output", d_output)
        self._look_ahead("d_output")
        self._bind_opening(problem, d_output, d_states[self.cell.output])
        self._make_gradients(problem, d_states)
        self.pack(crew)
        self._carry(d_states)
        for first, last in kept.ranges:
            self._bind_values(kept.values(first, last))
            self.walk(crew, first, last)
        self.add_up(crew)
        return self._gradients(problem)

    def _bind_values(self, values: Values) -> None:
        """What the forward run left of the steps to come."""
        for state, history in zip(self.cell.states, values.histories, strict=True):
            self.steps_of(f"history:{state}", history, values.first - values.before)
            self.steps_of(f"after:{state}", history, values.first - values.before)
            self._look_ahead(f"after:{state}")
        saved = iter(values.saved)
        for buffer, slots in plans.forward(self.cell).slots.items():
            if buffer.startswith("saved"):
                self.steps_of(buffer, next(saved), values.first)
                self.put(f"{buffer}.tile", slots * self.vector_bytes)
                self._look_ahead(buffer)

    def _look_ahead(self, buffer: str) -> None:
        """How far from a step of a buffer the next one back in time of the run lies."""
        step = self.values[f"{buffer}.step"]
        self.put(f"{buffer}.ahead", step if self.reverse else -step)

    def _bind_opening(self, problem: Problem, d_output: Tensor, d_last: Tensor | None) -> None:
        """The adjoint of the output state at each row's last phase, where the final state adds to it."""
        if d_last is None:
            self.absent("d_output_open.origin", "d_output_open.size")
        elif problem.reverse or problem.lengths is None:
            self.rows_of("d_output_open", d_output[0 if problem.reverse else -1] + d_last)
        else:
            times = torch.tensor(problem.lengths).sub_(1).clamp_(min=0)
            self.rows_of("d_output_open", d_output[times, torch.arange(self.rows)] + d_last)

    def _make_gradients(self, problem: Problem, d_states: Sequence[Tensor | None]) -> None:
        """Tensors for the gradients."""
        cell, x = self.cell, problem.x
        self.d_x = self.d_x_direct = None
        if self.needs[0][0]:
            whole = problem.lengths is None and _has_input_product(cell)
            batch_first = self.rows > 1 and x.stride(0) < x.stride(1)
            lead = (self.rows, self.steps) if batch_first else (self.steps, self.rows)
            d_x = memory.result((*lead, x.shape[2]), self.dtype)
            if not whole:
                d_x.zero_()
            self.d_x = d_x.transpose(0, 1) if batch_first else d_x
            self.steps_of("d_x", self.d_x)
        else:
            self.absent("d_x.origin", "d_x.step", "d_x.size")
        if any(place.data[0] == "d_x_direct" for stage in self.plan.stages for _, place in stage.stores):
            self.d_x_direct = torch.zeros_like(x, memory_format=torch.contiguous_format)
            self.steps_of("d_x_direct", self.d_x_direct)
        self.d_outside = []
        for place, name in enumerate(cell.outside):
            d = x.new_zeros(self.steps, self.rows, self.outside_units(place))
            self.d_outside.append(d)
            self.steps_of(f"d_outside:{name}", d)
        self.d_start: list[Tensor | None] = [None] * len(cell.states)
        self.d_initial: list[Tensor | None] = [None] * len(problem.initial)
        if self.values["leaving"]:
            self._make_state_gradients(problem, d_states)
        else:
            self.absent(*(name for s in cell.states for name in (f"d_start:{s}.base", f"leaving:{s}.size")))
        self.d_parameters: list[Tensor | None] = []
        entries = [0]
        for parameter, tensor, need in zip(cell.parameters, problem.parameters, self.needs[2], strict=True):
            d_parameter = memory.result(tensor.shape, self.dtype) if need else None
            self.d_parameters.append(d_parameter)
            start = d_parameter.data_ptr() if d_parameter is not None else 0
            for label, offset in self._gates(parameter, tensor):
                for frame in self.crews[0]:
                    self.put_for(frame, f"{label}.base", start + offset if start else 0)
            if need:
                entries += [start, self.part_tables[parameter.name], len(self.crews) - 1, tensor.numel()]
        entries[0] = len(entries) // 4
        ctypes.memmove(self.values["sums"], (ctypes.c_int64 * len(entries))(*entries), 8 * len(entries))

    def _make_state_gradients(self, problem: Problem, d_states: Sequence[Tensor | None]) -> None:
        for i, state in enumerate(self.cell.states):
            d_start = torch.zeros(self.rows, self.sizes[i], dtype=self.dtype)
            self.d_start[i] = d_start
            self.rows_of(f"d_start:{state}", d_start)
            self.put(f"leaving:{state}.size", self.values[f"d_start:{state}.size"])
            if self.resets:
                d_initial = self.d_initial[i] = torch.zeros_like(d_start)
                self.rows_of(f"d_initial:{state}", d_initial)
            d_last = d_states[i]
            if d_last is not None and problem.lengths is not None and 0 in problem.lengths:
                empty = torch.tensor([length == 0 for length in problem.lengths])
                d_start[empty] = d_last[empty]  # a row without steps hands its state through

    def _carry(self, d_states: Sequence[Tensor | None]) -> None:
        """What the final states' adjoints add to the states that are carried unit by unit."""
        for state, place in self.plan.direct.items():
            index = self.cell.states.index(state)
            d_last = d_states[index]
            if index == self.cell.output or d_last is None:
                continue
            buffer, slot = place.data
            width = buffer.split(":")[1]
            tiles = self.tiles[width]
            shape = (self.rows, tiles, self.plan.slots[buffer], self.lanes)
            whole = self.arena.view(self.values[f"{buffer}.origin"], shape, self.dtype)
            padded = torch.nn.functional.pad(d_last, (0, tiles * self.lanes - self.sizes[index]))
            whole[:, :, slot] = padded.view(self.rows, tiles, self.lanes)

    # results

    def _gradients(self, problem: Problem) -> tuple[Tensor | None, ...]:
        cell = self.cell
        if self.d_x is not None and self.d_x_direct is not None:
            self.d_x += self.d_x_direct
        d_outside: list[Tensor | None] = []
        for i, (d, value) in enumerate(zip(self.d_outside, problem.outside, strict=True)):
            d = d if i < len(cell.per_step) else d.sum(0)
            d_outside.append(d.sum(-1, keepdim=True) if value.shape[-1] < d.shape[-1] else d)
        groups = [[self.d_x], self.d_start, self.d_parameters, d_outside, self.d_initial]
        gradients = tuple(
            d if need else None
            for ds, needs in zip(groups, self.needs, strict=True)
            for d, need in zip(ds, needs, strict=True)
        )
        self.d_x, self.d_x_direct, self.d_start, self.d_parameters = None, None, [], []
        self.d_outside, self.d_initial = [], []
        return gradients


def _has_input_product(cell: Cell) -> bool:
    return any(product.args[0].op == "input" for product in cell.products)
