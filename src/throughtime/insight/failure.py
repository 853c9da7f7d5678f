"""The first failure: where the first NaN or infinity was born, on the way forward or on the way back."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from throughtime.engine.codegen import torch_spelling
from throughtime.engine.recurrence import Record
from throughtime.equations import expr
from throughtime.equations.cell import Cell
from throughtime.equations.expr import Node
from throughtime.insight.gates import writer
from throughtime.insight.rehearsal import Place, Rehearsal, lengths_of, rehearse
from throughtime.nn.layout import within
from throughtime.nn.recurrent import Layer

Way = Literal["forward", "backward"]


@dataclass(frozen=True)
class Failure:
    """Where the first NaN or infinity was born. Made by `first_failure`; `str(failure)` says it in one sentence.

    `way` is "forward" or "backward". `place` is the recurrence, or in words what else it was: another module by its
    name, "the batch", "the loss". `step`, `row` and `unit` say which number (the step of the layer's input, the row of
    the batch), `gate` whose equation it is in, `operation` what was computed, `value` what came out of it. `operands`
    are the numbers that it was computed from, by name; of a vector times a row of a matrix, the largest in size. What
    is not known, or has no meaning there, is None.
    """

    way: Way
    place: Place | str
    operation: str
    value: float
    step: int | None = None
    row: int | None = None
    unit: int | None = None
    gate: str | None = None
    operands: tuple[tuple[str, float], ...] = ()

    def __str__(self) -> str:
        numbers = {"step": self.step, "row": self.row, "unit": self.unit, "gate": self.gate}
        where = "".join(f", {name} {number}" for name, number in numbers.items() if number not in (None, ""))
        made = "is" if self.way == "forward" else "makes the gradient"
        operands = ", ".join(f"{name} = {value:.6g}" for name, value in self.operands)
        above = f", where {operands}" if operands else ""
        return f"on the way {self.way}, in {self.place}{where}: {self.operation} {made} {self.value:g}{above}"


def first_failure(model: nn.Module, batch: Any, loss: Callable[[Any], Tensor] | None = None) -> Failure | None:
    """Where the first NaN or infinity of a run was born, or None where everything stays finite.

    `batch` is what the model's forward takes: a tuple of positional arguments, a dict of keywords, or one object. With
    `loss`, a callable on the model's output (its losses are added up; those of steps [T, B] past a row's end are not
    used), the way back is searched too. The model runs on a copy, in its own dtype, for that decides what overflows,
    and on the reference loop. An infinity that does no harm, such as exp(-x) in 1 / (1 + exp(-x)), is no failure: what
    counts is what makes a state, the loss (without one, the model's output) or a parameter's gradient infinite or NaN.
    What lies past a row's end does not count.

    Raises ThroughtimeError for a model without a recurrent layer or a batch too large.
    """
    passed = _Passed()
    run = rehearse(model, batch, loss, dtype=None, values=True, prepare=passed.listen)
    found = _forward_in_layers(run, passed)
    if found is not None:
        return found
    end = run.output if run.loss is None else _whole(run.records[0], run.loss)
    if (value := _odd(end)) is not None:
        what = "the model's output" if run.loss is None else "the loss"
        return passed.birth() or Failure("forward", what, f"{what}, outside of every module,", value)
    return None if run.loss is None else _on_the_way_back(run, end, passed)


# ---------------------------------------------------------------------------------------------------------------------
# Modules


class _Passed:
    """What went through the modules that are no recurrent layers: inputs and outputs that were not finite, in order."""

    def __init__(self) -> None:
        self.events: list[tuple[str, nn.Module, float | None, float | None]] = []
        self.outputs: list[tuple[str, Tensor]] = []
        self.before: dict[tuple[str, int], int] = {}

    def listen(self, model: nn.Module) -> None:
        """Hear of every call in the model."""
        for name, module in model.named_modules():
            if isinstance(module, Layer):
                module.register_forward_pre_hook(partial(self._reached, name))
            elif not list(module.children()):
                module.register_forward_hook(partial(self._heard, name), with_kwargs=True)

    def _reached(self, name: str, *_: Any) -> None:
        call = sum(known == name for known, _ in self.before)
        self.before[name, call] = len(self.events)

    def _heard(self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self.events.append((name, module, _odd([args, kwargs]), _odd(output)))
        self.outputs += [(name, tensor) for tensor in _tensors(output) if tensor.requires_grad]

    def birth(self, place: Place | None = None) -> Failure | None:
        """The first call, or the last before a recurrence, that made NaN or infinity of finite inputs."""
        until = len(self.events) if place is None else self.before[place.module, place.call]
        born = [
            (name, module, made)
            for name, module, given, made in self.events[:until]
            if given is None and made is not None
        ]
        if not born:
            return None
        name, module, made = born[0 if place is None else -1]
        for parameter, tensor in module.named_parameters():
            if (value := _odd(tensor)) is not None:
                return Failure("forward", name, f"its {parameter}", value)
        return Failure("forward", name, type(module).__name__, made)


def _odd(value: Any) -> float | None:
    """The first number that is infinite or NaN, in a tensor or in whatever holds tensors."""
    for tensor in _tensors(value):
        wrong = ~torch.isfinite(tensor.detach())
        if bool(wrong.any()):
            return float(tensor.detach()[wrong][0])
    return None


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, PackedSequence):
        yield value.data
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)


# ---------------------------------------------------------------------------------------------------------------------
# Forward


def _forward_in_layers(run: Rehearsal, passed: _Passed) -> Failure | None:
    for place, record in zip(run.places, run.records, strict=True):
        found = _forward(place, record)
        if found is not None:
            return passed.birth(place) or found if found.operation == INPUT else found
    return None


def _forward(place: Place, record: Record) -> Failure | None:
    """The birth of the first state that is not finite, traced down its equation to an operand that still was."""
    for moment, (t, states) in enumerate(zip(record.problem.order(), record.states, strict=True)):
        for node, state in zip(record.cell.next, states, strict=True):
            wrong = ~torch.isfinite(state.detach()) & _running(record, t)
            if bool(wrong.any()):
                row, unit = wrong.nonzero()[0].tolist()
                return _birth(place, record, moment, node, row, unit)
    return None


def _birth(place: Place, record: Record, moment: int, node: Node, row: int, unit: int) -> Failure:
    cell, values = record.cell, _values(record)[moment]
    node, unit = _traced(values, node, row, unit)
    weights = record.problem.block(node).detach() if node.op in ("product", "parameter") else None
    if weights is not None and (value := _odd(weights[unit])) is not None:
        return Failure("forward", place, f"the parameter {_parameter(cell, node)}", value, unit=unit, gate=_gate(node))
    return Failure(
        way="forward",
        place=place,
        operation=_operation(cell, node),
        value=_at(values[node], row, unit),
        step=record.problem.order()[moment],
        row=row,
        unit=unit,
        gate=_gate(node),
        operands=_operands(record, values, node, row, unit),
    )


def _traced(values: Mapping[Node, Tensor], node: Node, row: int, unit: int) -> tuple[Node, int]:
    """From a number that is not finite down to one whose operands all are, or that has none."""
    while node.args:
        if node.op == "product":
            wrong = ~torch.isfinite(values[node.args[0]].detach()[row])
            if not bool(wrong.any()):
                break
            node, unit = node.args[0], int(wrong.nonzero()[0])
            continue
        args = node.args
        if node.op == "where":  # the branch that was not taken does no harm
            args = (args[1] if _at(values[args[0]], row, unit) else args[2],)
        below = next((arg for arg in args if not math.isfinite(_at(values[arg], row, unit))), None)
        if below is None:
            break
        node = below
    return node, unit


def _operands(
    record: Record, values: Mapping[Node, Tensor], node: Node, row: int, unit: int
) -> tuple[tuple[str, float], ...]:
    """What a value was computed from, by name; of a product's many numbers the largest on either side."""
    write = writer(record.cell)
    if node.op != "product":
        return tuple((write(arg).text, _at(values[arg], row, unit)) for arg in node.args)
    vector, weights = values[node.args[0]][row], record.problem.block(node)[unit]
    return (write(node.args[0]).text, _largest(vector)), (write.script.symbol(*node.data), _largest(weights))


INPUT = "the input x"


def _operation(cell: Cell, node: Node) -> str:
    if node.op == "input":
        return INPUT
    if node.op == "state":
        return f"the state {node.data[0]} that it began with"
    if node.op == "outside":
        return f"the outside input {node.data[0]}"
    return writer(cell).definition(node).text


def _parameter(cell: Cell, node: Node) -> str:
    return next(parameter.name for parameter in cell.parameters if parameter.namespace == node.data[0])


def _gate(node: Node) -> str | None:
    """The gate whose equation a value belongs to: the one letter of the products and vectors under it, if it is one."""
    letters = {n.data[1] for n in expr.postorder([node]) if n.op in ("product", "parameter") and n.data[1]}
    return letters.pop() if len(letters) == 1 else None


# ---------------------------------------------------------------------------------------------------------------------
# Backward


@dataclass(frozen=True)
class _Spot:
    """A value whose gradient is not finite: of a step of a recurrence, or what a module returned."""

    name: str = ""
    place: Place | None = None
    record: Record | None = None
    moment: int = 0
    node: Node | None = None


def _on_the_way_back(run: Rehearsal, loss: Tensor, passed: _Passed) -> Failure | None:
    """The first gradient, in the order in which they are computed, that is not finite; if it reaches a parameter's."""
    first: list[tuple[_Spot, Tensor, Tensor]] = []
    gradients: dict[tuple[int, int, Node], Tensor] = {}

    def hear(spot: _Spot, gradient: Tensor | None) -> None:
        if gradient is None:  # nothing comes this way
            return
        wrong = ~torch.isfinite(gradient)
        if spot.record is not None and spot.node is not None:
            gradients[id(spot.record), spot.moment, spot.node] = gradient
            if gradient.dim() == 2:
                wrong = wrong & _running(spot.record, spot.record.problem.order()[spot.moment])
        if not first and bool(wrong.any()):
            first.append((spot, gradient, wrong))

    for name, tensor in passed.outputs:
        tensor.register_hook(partial(hear, _Spot(name)))
    for place, record in zip(run.places, run.records, strict=True):
        for moment, values in enumerate(_values(record)):
            for node, value in values.items():
                raw = node.op == "input" and record.problem.x.is_leaf  # no training asks for the gradient of the data
                if value.requires_grad and node.op != "parameter" and not raw:
                    value.register_hook(partial(hear, _Spot("", place, record, moment, node)))
    named = {name: parameter for name, parameter in run.model.named_parameters() if parameter.requires_grad}
    if not named or not loss.requires_grad:
        return None
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    odd = [(name, _odd(gradient)) for name, gradient in zip(named, found, strict=True) if gradient is not None]
    harmed = [(name, value) for name, value in odd if value is not None]
    if not harmed:
        return None
    if not first:
        return Failure("backward", harmed[0][0], "the sum over steps and rows", harmed[0][1])
    return _backward_birth(*first[0], gradients)


def _whole(record: Record, loss: Tensor) -> Tensor:
    if loss.shape == (record.problem.steps, record.problem.rows):
        loss = torch.where(within(lengths_of(record), len(loss), loss.device), loss, 0.0)
    return loss.sum()


def _backward_birth(
    spot: _Spot, gradient: Tensor, wrong: Tensor, gradients: Mapping[tuple[int, int, Node], Tensor]
) -> Failure:
    place, record, node = spot.place, spot.record, spot.node
    if place is None or record is None or node is None:
        return Failure("backward", f"what follows {spot.name}", "its derivative", float(gradient[wrong][0]))
    values, moment = _values(record)[spot.moment], spot.moment
    row, unit = wrong.reshape(-1, wrong.shape[-1]).nonzero()[0].tolist()
    found = partial(
        Failure,
        way="backward",
        place=place,
        value=_at(gradient, row, unit),
        step=record.problem.order()[moment],
        row=row,
        unit=unit,
    )
    for user in record.cell.nodes:
        above = gradients.get((id(record), moment, user))
        if above is not None and any(arg is node for arg in user.args):
            part = _contribution(record, user, node, values, above)
            if not math.isfinite(_at(part, row, unit)):
                return found(gate=_gate(user), **_use(record, user, node, values, above, row, unit))
    shown = node.op == "state" or any(node is after for after in record.cell.next)
    what = "what comes from above to" if shown else "the sum of the gradients of"
    return found(gate=_gate(node), operation=f"{what} {writer(record.cell)(node).text}")


def _use(
    record: Record, user: Node, node: Node, values: Mapping[Node, Tensor], above: Tensor, row: int, unit: int
) -> dict[str, Any]:
    """The use of a value that spoilt its gradient, in words, and the numbers in it."""
    write = writer(record.cell)
    if user.op == "product":
        matrix = write.script.transposed.format(write.script.symbol(*user.data))
        weights = record.problem.block(user)[:, unit]
        return {
            "operation": f"{matrix} times the gradient of {write.definition(user).text}",
            "operands": (("that gradient", _largest(above[row])), ("weight", _largest(weights))),
        }
    numbers = [(write(arg).text, _at(values[arg], row, unit)) for arg in user.args]
    return {
        "operation": f"the derivative of {write.definition(user).text} by {write(node).text}",
        "operands": (*numbers, ("the gradient from above", _at(above, row, unit))),
    }


def _contribution(record: Record, user: Node, node: Node, values: Mapping[Node, Tensor], above: Tensor) -> Tensor:
    """What one use of a value adds to its gradient."""
    if user.op == "product":
        return above @ record.problem.block(user).detach()
    args = [values[arg].detach().requires_grad_(arg is node) for arg in user.args]
    with torch.enable_grad():
        result = torch_spelling(user.op)(*args)
    mine = [arg for arg, was in zip(args, user.args, strict=True) if was is node]
    return torch.stack(torch.autograd.grad(result, mine, above.expand_as(result))).sum(0)


# ---------------------------------------------------------------------------------------------------------------------
# Values of a step


def _values(record: Record) -> list[dict[Node, Tensor]]:
    return record.values or []


def _running(record: Record, t: int) -> Tensor:
    """[B, 1]: which rows have this step."""
    return (lengths_of(record) > t).unsqueeze(1).to(record.problem.x.device)


def _at(value: Tensor, row: int, unit: int) -> float:
    """One number of a value that may be the same for all rows, or all units."""
    value = value.detach()
    while value.dim() < 2:
        value = value.unsqueeze(0)
    return float(value[min(row, len(value) - 1), min(unit, value.shape[1] - 1)])


def _largest(numbers: Tensor) -> float:
    numbers = numbers.detach()
    return float(numbers[numbers.abs().argmax()])
