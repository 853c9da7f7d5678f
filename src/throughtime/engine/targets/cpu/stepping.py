"""One step at a time on the CPU target: weights packed once, frames made once, one call for a step of all layers.

The driver that walks a whole sequence walks the single step too, on the same kernels, so a step has the bits that the
whole run gives it. States lie in two places and change sides at each step: what a step reads is never what it writes,
and a step that does not come to its end has changed nothing.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from throughtime.engine import border
from throughtime.engine.problem import Problem
from throughtime.engine.targets.cpu import cache, gang, kernels, sharing
from throughtime.engine.targets.cpu.compiled import Compiled
from throughtime.engine.targets.cpu.forward_setting import ForwardSetting
from throughtime.engine.targets.cpu.llvm import Code
from throughtime.engine.targets.cpu.setting import UNSET, check_frame
from throughtime.engine.targets.cpu.sharing import Share, Sharing, by_rows
from throughtime.errors import ThroughtimeError

Frame = ctypes.Array[ctypes.c_int64]


class Steps:
    """A stack of layers that takes one step of B rows at a time.

    `layers` are problems of one step, a layer each, whose parameters are packed here and not read again; their x and
    states are looked at for their sizes alone. States are zero at first (`write`). Without `batched` there is one row,
    and outputs have no dimension for it. `like` are steps of the same layers for any number of rows, whose packed
    weights are used in place of packing anew. One caller at a time.
    """

    def __init__(self, layers: Sequence[Problem], batched: bool, like: Steps | None = None) -> None:
        first = layers[0]
        self.cell, self.rows, self.depth, self.dtype = first.cell, first.rows, len(layers), first.x.dtype
        shared = _sharing(layers)
        self.settings = [ForwardSetting(layer, False, shared, layer.steps) for layer in layers]
        self.outside_units = [self.settings[0].outside_units(place) for place in range(len(self.cell.outside))]
        self.packed: list[_Packed] = like.packed if like else list(map(_pack, self.settings, layers))
        with torch.inference_mode(False):  # states are written in place later, wherever that may be
            self.states = [torch.zeros(2, self.depth, self.rows, n, dtype=first.x.dtype) for n in first.sizes]
            self.initial = [[value[0].detach().clone() for value in layer.initial] for layer in layers]
        self.call = gang.Call(cache.function(("steps",), "steps", _steps_text))
        self.place = self.settings[0].place
        self.side = 0
        self.unchecked = {0, 1}  # sides whose frames have not been run yet
        self.frames = [[self._stack(side, share) for share in range(len(shared.shares))] for side in (0, 1)]
        self.entries = [[stack[0] for stack in stacks] for stacks in self.frames]
        self.tables = [[self._table(stack) for stack in stacks] for stacks in self.frames]
        self.addresses = [[ctypes.addressof(table) for table in tables] for tables in self.tables]
        self.x_origin = self.place["x.origin"]
        self.alone = len(shared.shares) == 1
        shown = [self.states[self.cell.output][1 - side, -1] for side in (0, 1)]
        self.shown = shown if batched else [rows[0] for rows in shown]

    def beside(self, layers: Sequence[Problem], batched: bool) -> Steps:
        """Steps of the same layers for another number of rows, or of their own for as many, with the same weights."""
        return Steps(layers, batched, like=self)

    # frames

    def _stack(self, side: int, share: int) -> list[Frame]:
        """The layers' frames of one thread's rows, for a step that reads the states on this side."""
        return [self._frame(side, share, depth) for depth in range(self.depth)]

    def _frame(self, side: int, share: int, depth: int) -> Frame:
        setting = self.settings[depth]
        item, output = setting.item, self.states[self.cell.output]
        fields = {f"{name}.base": base for name, base in self.packed[depth].bases.items()}
        fields |= {"walk.first": 0, "walk.last": 1, "reset": 0}
        fields |= {"x.step": 0, "x.size": setting.units["input"] * item}
        fields["x.origin"] = output[1 - side, depth - 1].data_ptr() if depth > 0 else UNSET
        fields |= {f"outside:{name}.{part}": UNSET for name in self.cell.outside for part in ("origin", "step", "size")}
        for state, sides, initial in zip(self.cell.states, self.states, self.initial[depth], strict=True):
            size = sides.shape[-1] * item
            old, new = sides[side, depth].data_ptr(), sides[1 - side, depth].data_ptr()
            for name, start in ((f"start:{state}", old), (f"history:{state}", new), (f"next:{state}", new)):
                fields |= {f"{name}.base": start, f"{name}.origin": start, f"{name}.size": size, f"{name}.step": 0}
            fields |= {f"initial:{state}.base": initial.data_ptr(), f"initial:{state}.size": 0}
        frame = (ctypes.c_int64 * len(self.place))(*setting.frames[share])
        for name, value in fields.items():
            frame[self.place[name]] = value
        return frame

    def _table(self, stack: list[Frame]) -> Frame:
        """What the driver of a step reads: how many layers, then for each the time loop and its frame."""
        walks = [setting.code.walk.address for setting in self.settings]
        pairs = [n for walk, frame in zip(walks, stack, strict=True) for n in (walk, ctypes.addressof(frame))]
        return (ctypes.c_int64 * (1 + len(pairs)))(self.depth, *pairs)

    def _check(self, side: int) -> None:
        """Every field that the walk and its kernels read is set, in every frame of this side."""
        for stack in self.frames[side]:
            for setting, frame in zip(self.settings, stack, strict=True):
                check_frame(frame, self.place, setting.code.needs("walk", setting.stages), setting.code.label("walk"))
        self.unchecked.discard(side)

    # steps

    def step(self, x: Tensor) -> Tensor:
        """One step on rows of x that lie one behind the other; the output, a tensor of its own."""
        side = self.side
        start = _address(x, self.dtype)
        for frame in self.entries[side]:
            frame[self.x_origin] = start
        if self.unchecked:
            self._check(side)
        if self.alone:
            self.call.function(self.addresses[side][0])
        else:
            self._together(self.addresses[side])
        self.side = 1 - side
        return self.shown[side].clone()

    def step_with(self, x: Tensor, outside: Sequence[Tensor], reset: Tensor | None) -> Tensor:
        """A step with outside inputs, [B, 1 or H] each, and rows [B] that return to their initial states before it."""
        frames = [frame for stack in self.frames[self.side] for frame in stack]
        border.check(outside, self.dtype)
        border.check((reset,), torch.bool)
        wide = [v.expand(self.rows, n).contiguous() for v, n in zip(outside, self.outside_units, strict=True)]
        fields = {"reset": 0 if reset is None else reset.data_ptr()}
        for name, value in zip(self.cell.outside, wide, strict=True):
            size = value.shape[1] * value.element_size()
            fields |= {f"outside:{name}.origin": value.data_ptr(), f"outside:{name}.step": 0}
            fields[f"outside:{name}.size"] = size
        for frame in frames:
            for field, number in fields.items():
                frame[self.place[field]] = number
        try:
            return self.step(x)
        finally:
            for frame in frames:
                frame[self.place["reset"]] = 0

    def go_back(self) -> None:
        """Forget the last step: the states before it lie on the other side still."""
        self.side = 1 - self.side

    def _together(self, addresses: list[int]) -> None:
        """Each share of the rows through all layers, on as many threads as torch uses now."""
        with gang.gathered(min(torch.get_num_threads(), len(addresses))) as crew:
            threads = 1 + crew.helpers if crew else 1
            for first in range(0, len(addresses), threads):
                taken = addresses[first : first + threads]
                if crew and len(taken) > 1:
                    crew.run(self.call, taken)
                else:
                    self.call.function(taken[0])

    # states

    def read(self) -> tuple[Tensor, ...]:
        """The states, [layers, B, width] each, copied."""
        return tuple(sides[self.side].clone() for sides in self.states)

    def write(self, states: Sequence[Tensor]) -> None:
        """Take over states of these shapes and this dtype."""
        for sides, state in zip(self.states, states, strict=True):
            sides[self.side].copy_(state)


class HalfSteps:
    """Steps in bfloat16 or float16: states are carried in float32, and what each layer shows is rounded once.

    `layers` are the steps of each layer alone, for the next layer reads what was rounded, as in a whole run.
    """

    def __init__(self, layers: Sequence[Steps], dtype: torch.dtype) -> None:
        self.layers, self.dtype = layers, dtype

    def beside(self, layers: Sequence[Problem], batched: bool) -> HalfSteps:
        """Steps of the same layers for another number of rows."""
        wide = [layer.with_tensors([tensor.float() for tensor in layer.tensors]) for layer in layers]
        pairs = zip(self.layers, wide, strict=True)
        return HalfSteps([own.beside([layer], batched) for own, layer in pairs], self.dtype)

    def step(self, x: Tensor) -> Tensor:
        """One step on rows of x."""
        return self._through(x, lambda layer, rows: layer.step(rows))

    def step_with(self, x: Tensor, outside: Sequence[Tensor], reset: Tensor | None) -> Tensor:
        """A step with outside inputs and resets."""
        wide = [value.float() for value in outside]
        return self._through(x, lambda layer, rows: layer.step_with(rows, wide, reset))

    def _through(self, x: Tensor, step: Callable[[Steps, Tensor], Tensor]) -> Tensor:
        border.check((x,), self.dtype)
        done: list[Steps] = []
        try:
            for layer in self.layers:
                x = step(layer, x.float()).to(self.dtype)
                done.append(layer)
        except BaseException:
            for layer in done:
                layer.go_back()
            raise
        return x

    def read(self) -> tuple[Tensor, ...]:
        """The states, [layers, B, width] each, in float32."""
        return tuple(torch.cat(states) for states in zip(*(layer.read() for layer in self.layers), strict=True))

    def write(self, states: Sequence[Tensor]) -> None:
        """Take over states of these shapes."""
        for depth, layer in enumerate(self.layers):
            layer.write([state[depth : depth + 1] for state in states])


def _address(x: Tensor, dtype: torch.dtype) -> int:
    """Where the rows of x begin. Raises ThroughtimeError under a tracer, which would write this address down."""
    if torch._C._is_tracing():
        raise ThroughtimeError(
            "a stream cannot be traced: its state lives outside the graph; trace the layer itself, with h_0 as an input"
        )
    border.check((x,), dtype)
    return x.data_ptr()


class _Packed:
    """Where the packed weights of one layer begin, by the name of the buffer, and what owns their memory."""

    def __init__(self, setting: ForwardSetting) -> None:
        self.arena = setting.arena
        self.bases = {name: setting.values[f"{name}.base"] for name in _panels(setting.code)}


def _panels(code: Compiled) -> list[str]:
    """The buffers that hold weights and biases as the kernels read them."""
    names = [kernels.panel_name(stage, group) for stage in code.stages for group in stage.groups]
    names += [f"vectors:{width}" for width in code.plan.vectors]
    names += [f"drive_bias:{stage.width}" for stage in code.stages if stage.name.startswith("drive")]
    return list(dict.fromkeys(names))


def _pack(setting: ForwardSetting, layer: Problem) -> _Packed:
    """Pack a layer's weights into the setting's memory."""
    setting.open(layer, None)
    setting.drop()
    return _Packed(setting)


def _sharing(layers: Sequence[Problem]) -> Sharing:
    """How threads share the rows. Units are not shared: meeting once a stage costs more than it gives in one step."""
    rows, threads = layers[0].rows, torch.get_num_threads()
    work = sum(rows * p.numel() for layer in layers for p in layer.parameters if p.dim() == 2)
    if threads == 1 or rows < 16 or work < sharing.ALONE:
        return Sharing((Share(0, 1, rows),))
    return by_rows(min(threads, rows // 8), rows, ragged=False)


def _steps_text() -> str:
    """`steps(table)`: the time loop of each layer in turn, on its frame."""
    code = Code("steps", ["table"], 4)
    with code.loop(code.load_integer(code["table"])) as layer:
        pair = code["table"] + 8 + layer * 16
        code.call(code.load_integer(pair), [code.load_integer(pair, 8)])
    return code.text()
