"""Layers in TorchScript: what `torch.jit.trace` and `torch.jit.script` record, for any batch size and length.

A recorded program calls the registered operator, so that whoever loads it must have imported throughtime. What stands
here walks layers and directions as `Layer` does, but in TorchScript, where sizes stay open.
"""

from __future__ import annotations

import inspect
import itertools
import linecache
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from types import MethodType
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from throughtime.errors import ShapeError, ThroughtimeError

if TYPE_CHECKING:
    from throughtime.nn.cells import StepModule
    from throughtime.nn.recurrent import Call, Layer


def is_tracing() -> bool:
    """Whether `torch.jit.trace` is recording, so that sizes are tensors, and what is computed of them is a constant."""
    return torch._C._get_tracing_state() is not None


def walk(
    x: Tensor,
    given: list[Tensor] | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    outside: list[Tensor],
    weights: list[Tensor],
    learnt: list[Tensor],
    dropout: float,
    batch_first: bool,
    cell: str,
    sizes: list[int],
    per_step: int,
    num_layers: int,
    directions: int,
    segments: int | None,
    target: str,
) -> tuple[Tensor, list[Tensor]]:
    """`Layer._compute` in TorchScript; `weights` and `learnt` have all runs' tensors, one run after the other.

    The first `per_step` of the outside inputs have a value for each step. Without `learnt` states begin at zero.
    """
    if x.dim() != 2 and x.dim() != 3:
        raise ValueError(f"x has {x.dim()} dimensions; a layer takes three, or two for one sequence")
    batched = x.dim() == 3
    turned = batched and batch_first
    steps = x.transpose(0, 1) if turned else x if batched else x.unsqueeze(1)
    rows = steps.size(1)
    runs = num_layers * directions

    around: list[Tensor] = []
    for place, value in enumerate(outside):
        if place < per_step:
            around.append(value.transpose(0, 1) if turned else value if batched else value.unsqueeze(1))
        else:
            around.append(value if batched else value.unsqueeze(0))
    mask = reset
    if mask is not None:
        mask = mask.transpose(0, 1) if turned else mask if batched else mask.unsqueeze(1)
    states: list[Tensor] = []
    if given is not None:
        for state, size in zip(given, sizes):  # noqa: B905 - it knows no strict=
            states.append(state if batched else state.unsqueeze(1))
            if states[-1].dim() != 3 or states[-1].size(0) != runs or states[-1].size(2) != size:
                raise ValueError(
                    f"a state in h_0 has shape {state.size()}; it must be [layers * directions, B, width] with "
                    f"{runs} layers * directions and a width of {size}"
                )

    counts = lengths
    order = torch.zeros(0, dtype=torch.int64)
    if counts is not None:  # the kernels want rows by falling length
        if counts.dim() != 1 or counts.size(0) != rows or counts.is_floating_point():
            raise ValueError(f"lengths has shape {counts.size()}; give one integer for each of {rows} sequences")
        counts, order = counts.to(x.device).sort(descending=True)
        steps = steps.index_select(1, order)
        states = [state.index_select(1, order) for state in states]
        around = [value.index_select(1 if k < per_step else 0, order) for k, value in enumerate(around)]
        if mask is not None:
            mask = mask.index_select(1, order)

    finals: list[list[Tensor]] = []
    a_run, of_learnt = len(weights) // runs, len(learnt) // runs
    for depth in range(num_layers):
        if depth > 0 and dropout > 0:
            steps = torch.dropout(steps, dropout, True)
        outputs: list[Tensor] = []
        for direction in range(directions):
            run = depth * directions + direction
            tensors = [steps]
            initial: list[Tensor] = []
            for k, size in enumerate(sizes):
                if of_learnt > 0:
                    initial.append(learnt[run * of_learnt + k].expand(rows, size))
                else:
                    initial.append(steps.new_zeros(rows, size))
            tensors += initial if given is None else [state[run] for state in states]
            tensors += weights[run * a_run : (run + 1) * a_run]
            tensors += around
            restart = mask
            if mask is not None:
                tensors += initial
                if direction == 1:  # an episode begins at its last step, the one before the next episode's first
                    restart = torch.cat([mask[1:], torch.zeros_like(mask[:1])])
                    if counts is not None:
                        last = counts.sub(1).clamp(min=0)
                        restart = restart & (torch.arange(mask.size(0), device=mask.device).unsqueeze(1) < last)
            found = torch.ops.throughtime.recurrence(tensors, cell, counts, restart, direction == 1, segments, target)
            outputs.append(found[0])
            finals.append(found[1:])
        steps = torch.cat(outputs, -1)

    shown = steps
    last_states = [torch.stack([final[k] for final in finals]) for k in range(len(sizes))]
    if counts is not None:
        back = order.argsort()
        shown = shown.index_select(1, back)
        last_states = [state.index_select(1, back) for state in last_states]
    if not batched:
        return shown.squeeze(1), [state.squeeze(1) for state in last_states]
    return shown.transpose(0, 1) if turned else shown, last_states


@cache
def _walk() -> Any:
    with warnings.catch_warnings():  # torch says of all TorchScript that it is deprecated, and the caller has heard it
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.script(walk)


# ---------------------------------------------------------------------------------------------------------------------
# torch.jit.trace


def traced(layer: Layer, call: Call) -> tuple[Any, Any]:
    """The layer's forward for a tracer: the same walk, with nothing of the example's sizes in it.

    As in any trace, what is no tensor (lengths as a list, whether dropout acts) stays as it was for the example.
    """
    if call.masks is not None:
        raise ThroughtimeError("masks= does not go into a trace, whose dropout is torch's own; leave it out")
    x, lengths, batch_first, packed = call.x, call.lengths, layer.batch_first, None
    several = len(layer.cell.states) > 1
    given: list[Any] | None = None if call.h_0 is None else list(call.h_0) if several else [call.h_0]
    if isinstance(x, PackedSequence):
        if lengths is not None:
            raise ShapeError("lengths= came together with a PackedSequence, which carries its own; leave lengths= out")
        packed, batch_first = x, False
        x, lengths = pad_packed_sequence(PackedSequence(packed.data, packed.batch_sizes))  # rows as they are packed
        given = None if given is None else [_permuted(state, packed.sorted_indices) for state in given]
    names, given_outside = layer.cell.outside, call.outside or {}
    if set(given_outside) != set(names):
        raise ShapeError(f"the outside inputs of {layer.cell.name} are {', '.join(names) or 'none'}; give each by name")
    runs = _runs(layer)
    output, states = _walk()(
        x,
        given,
        _as_tensor(lengths),
        _as_tensor(call.reset),
        [given_outside[name] for name in names],
        [tensor for run in runs for tensor in layer._weights_of(*run)],
        [tensor for run in runs for tensor in layer._learnt_of(*run)],
        dropout=layer.dropout if layer.training else 0.0,
        batch_first=batch_first,
        **_constants(layer),
    )
    if packed is not None:
        data = pack_padded_sequence(output, cast(Tensor, lengths)).data
        output = PackedSequence(data, packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices)
        states = [_permuted(state, packed.unsorted_indices) for state in states]
    return output, tuple(states) if several else states[0]


def _as_tensor(value: Any) -> Tensor | None:
    return value if value is None or isinstance(value, Tensor) else torch.as_tensor(value)


def _permuted(state: Tensor, order: Tensor | None) -> Tensor:
    return state if order is None else state.index_select(1, order)


def _runs(layer: Layer) -> list[tuple[int, str]]:
    """Every layer and direction, in the order of their weights."""
    return list(itertools.product(range(layer.num_layers), ("", "_reverse") if layer.bidirectional else ("",)))


def _constants(layer: Layer) -> dict[str, Any]:
    """What `walk` is told of the layer beside its tensors."""
    cell = layer.cell
    return {
        "cell": cell.json,
        "sizes": list(cell.sizes(layer.hidden_size, layer.proj_size)),
        "per_step": len(cell.per_step),
        "num_layers": layer.num_layers,
        "directions": 2 if layer.bidirectional else 1,
        "segments": 0 if layer.segments == "auto" else layer.segments,
        "target": layer.target or "",
    }


# ---------------------------------------------------------------------------------------------------------------------
# torch.jit.script


class Scriptable(torch.nn.Module):
    """Base of what `torch.jit.script` can take: it is given a forward of its own to read, made for the module at hand.

    That forward stands in the module itself from then on, since torch tells nobody when it is done; called from Python
    it is the class's own.
    """

    __constants__: list[str]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        # TorchScript takes annotations for its own types, and cannot read those that are text.
        cls.__annotations__ = {
            n: kind for n, kind in vars(cls).get("__annotations__", {}).items() if type(kind) is not str
        }
        # It lets modules share a program unless their constants differ, and here each has a forward of its own.
        cls.__constants__ = [*getattr(cls, "__constants__", ()), _SOURCE]

    def __prepare_scriptable__(self) -> torch.nn.Module:
        """What torch asks a module for before it scripts it; raises ThroughtimeError for what cannot be carried."""
        forward = self._scriptable_forward()
        vars(self)[_SOURCE] = "".join(linecache.getlines(forward.__code__.co_filename))
        vars(self)[_FORWARD] = MethodType(forward, self)
        return self

    def _scriptable_forward(self) -> Callable[..., Any]:
        """A forward that TorchScript can read."""
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        state = dict(super().__getstate__())
        forget(state)
        return state


_FORWARD, _SOURCE = "forward", "_torchscript"
_file_numbers = itertools.count()


def forget(attributes: dict[str, Any]) -> None:
    """Remove the forward that scripting left among a module's attributes, and nobody else's."""
    found = getattr(attributes.get(_FORWARD), "__func__", None)
    if found is not None and found.__code__.co_filename.startswith(_FILE):
        del attributes[_FORWARD], attributes[_SOURCE]


def layer_forward(layer: Layer) -> Callable[..., Any]:
    """The forward of a layer for padded tensors, with lengths and resets as tensors; no PackedSequence and no masks."""
    cell, runs = layer.cell, _runs(layer)
    weights = [f"{parameter.name}_l{depth}{suffix}" for depth, suffix in runs for parameter in cell.parameters]
    with_learnt = any(layer._learnt_of(*run) for run in runs)
    learnt = [f"initial_{name}_l{depth}{suffix}" for depth, suffix in runs for name in cell.states]
    x, h_0, *named = list(inspect.signature(type(layer).forward).parameters)[1:]
    return _scriptable(
        layer,
        _LAYER,
        weights,
        learnt if with_learnt else [],
        x=x,
        h_0=h_0,
        named=", ".join(f"{name}={name}" for name in named),
        outside=", ".join(f"outside[{name!r}]" for name in cell.outside),
        dropout=repr(layer.dropout),
        batch_first=layer.batch_first,
        constants=", ".join(f"{name}={value!r}" for name, value in _constants(layer).items()),
    )


def step_forward(module: StepModule) -> Callable[..., Any]:
    """The forward of a single-step cell: one step of the same walk."""
    cell, size = module.cell, module.hidden_size
    given = {"cell": cell.json, "sizes": list(cell.sizes(size, 0)), "per_step": 0, "num_layers": 1, "directions": 1}
    constants = {**given, "segments": None, "target": module.target or ""}
    return _scriptable(
        module,
        _STEP,
        [parameter.name for parameter in cell.parameters],
        [],
        constants=", ".join(f"{name}={value!r}" for name, value in constants.items()),
    )


def _scriptable(module: Any, template: str, weights: list[str], learnt: list[str], **parts: Any) -> Callable[..., Any]:
    """The function of a source that names the module's own parameters, which TorchScript reads again by its file.

    TorchScript must read every parameter by its name. Whatever a cell brings along, names included, stands there as a
    literal, so that no file of a cell can put code in.
    """
    _check_scriptable(module, [*weights, *learnt])
    places = range(len(module.cell.states))
    several = len(places) > 1
    text = template.format(
        state=f"tuple[{', '.join('Tensor' for _ in places)}]" if several else "Tensor",
        given=", ".join(f"begin[{k}]" for k in places) if several else "begin",
        found=f"({', '.join(f'states[{k}]' for k in places)})" if several else "states[0]",
        weights=", ".join(f"getattr(self, {name!r})" for name in weights),
        learnt=", ".join(f"getattr(self, {name!r})" for name in learnt),
        **parts,
    )
    file = f"{_FILE}{next(_file_numbers)}>"
    linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
    names: dict[str, Any] = {"torch": torch, "Tensor": Tensor, "walk": walk, "eager": type(module).forward}
    exec(compile(text, file, "exec"), names)
    forward: Callable[..., Any] = names[_FORWARD]
    return forward


def _check_scriptable(module: torch.nn.Module, names: Sequence[str]) -> None:
    kind = type(module)
    own = next(base for base in kind.__mro__ if _FORWARD in vars(base))
    forget(vars(module))
    if not own.__module__.startswith("throughtime.") or _FORWARD in vars(module):
        raise ThroughtimeError(
            f"{kind.__name__} has a forward of its own on top of throughtime's, which TorchScript cannot read; let a "
            "module of yours hold the layer instead of inheriting from it, or use torch.export"
        )
    if computed := [name for name in names if module._parameters.get(name) is None]:
        raise ThroughtimeError(
            f"{computed[0]} of {kind.__name__} is no plain parameter but computed (by a parametrization?), which "
            "TorchScript cannot carry; make it plain first (torch.nn.utils.parametrize.remove_parametrizations), or "
            "use torch.export"
        )


_FILE = "<throughtime TorchScript "

_LAYER = """
def forward(
    self,
    {x}: Tensor,
    {h_0}: {state} | None = None,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    outside: dict[str, Tensor] | None = None,
    masks: int | None = None,
) -> tuple[Tensor, {state}]:
    if not torch.jit.is_scripting():
        return eager(self, {x}, {h_0}, {named})
    if masks is not None:
        raise ValueError("masks= does not go into TorchScript, whose dropout is torch's own; leave it out")
    begin = {h_0}
    given: list[Tensor] | None = None
    if begin is not None:
        given = [{given}]
    around: list[Tensor] = []
    if outside is not None:
        around = [{outside}]
    weights: list[Tensor] = [{weights}]
    learnt: list[Tensor] = [{learnt}]
    dropout = {dropout} if self.training else 0.0
    output, states = walk(
        {x}, given, lengths, reset, around, weights, learnt, dropout=dropout, batch_first={batch_first}, {constants}
    )
    return output, {found}
"""

_STEP = """
def forward(self, input: Tensor, hx: {state} | None = None) -> {state}:
    if not torch.jit.is_scripting():
        return eager(self, input, hx)
    begin = hx
    given: list[Tensor] | None = None
    if begin is not None:
        given = [state.unsqueeze(0) for state in [{given}]]
    weights: list[Tensor] = [{weights}]
    around: list[Tensor] = []
    _, after = walk(
        input.unsqueeze(0), given, None, None, around, weights, around, dropout=0.0, batch_first=False, {constants}
    )
    states = [state.squeeze(0) for state in after]
    return {found}
"""
