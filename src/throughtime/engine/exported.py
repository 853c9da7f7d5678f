"""What torch.onnx.export makes of `torch.ops.throughtime.recurrence`: operations that the ONNX exporter knows.

The standard's own operator where it has the cell, torch's higher-order `scan` over the reference's step otherwise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from throughtime.engine.problem import Problem, step_mask
from throughtime.engine.targets import reference
from throughtime.equations.standard import Standard, standard


def decomposed(problem: Problem) -> list[Tensor]:
    """The outputs [T, B, width] and the last states [B, width]; `problem.lengths` is a tensor, or None."""
    known = standard(problem.cell)
    if known is None or problem.reset is not None or problem.x.dtype != torch.float32:  # as ONNX Runtime has them
        return _scanned(problem)
    return _native(problem, known)


def _native(problem: Problem, known: Standard) -> list[Tensor]:
    steps, rows, _ = problem.x.shape
    size = problem.hidden_size
    lengths = None if problem.lengths is None else torch.as_tensor(problem.lengths)
    tensors = _stacked(problem, known)
    begin = [problem.states[place].unsqueeze(0) for place in known.states]
    inputs = [
        problem.x,
        tensors["W"],
        tensors["R"],
        tensors.get("B"),
        None if lengths is None else lengths.to(torch.int32),
        *begin,
        *([tensors["P"]] if "P" in tensors else []),
    ]
    direction = "reverse" if problem.reverse else "forward"
    shown, *found = torch.onnx.ops.symbolic_multi_out(
        known.operator,
        inputs,
        {"hidden_size": size, "direction": direction, **known.attributes(1)},
        dtypes=[problem.x.dtype] * (1 + len(begin)),
        shapes=[(steps, 1, rows, size), *[(1, rows, size)] * len(begin)],
        version=14,
    )
    last = [state.squeeze(0) for state in found]
    if lengths is not None:  # the state of an empty row is the one given; ONNX Runtime says zero
        empty = step_mask(lengths == 0)
        last = [torch.where(empty, before.squeeze(0), after) for before, after in zip(begin, last, strict=True)]
    return [shown.squeeze(1), *(last[known.states.index(place)] for place in range(len(last)))]


def _stacked(problem: Problem, known: Standard) -> dict[str, Tensor]:
    """The operator's W, R, B and P, each [1, ...]."""
    found: dict[tuple[str, str], Tensor] = {}
    for parameter, tensor in zip(problem.cell.parameters, problem.parameters, strict=True):
        blocks = tensor.chunk(len(parameter.gates))
        found |= {(parameter.name, gate): block for gate, block in zip(parameter.gates, blocks, strict=True)}
    stacks: dict[str, Tensor] = {}
    for name, wanted in known.blocks(problem.cell).items():
        like = next(found[block] for block in wanted if block in found)
        parts = [found[block] if block in found else torch.zeros_like(like) for block in wanted]
        stacks[name] = torch.cat(parts).unsqueeze(0)
    return stacks


def _scanned(problem: Problem) -> list[Tensor]:
    """Time in the order of computation, so turned over before and after where it runs backwards."""
    cell, count = problem.cell, len(problem.states)
    per_step, per_sequence = problem.outside[: len(cell.per_step)], problem.outside[len(cell.per_step) :]
    over = [problem.x, *per_step]
    device = problem.x.device
    if problem.lengths is not None:
        times = torch.arange(problem.steps, device=device).unsqueeze(1)
        over.append(times < torch.as_tensor(problem.lengths, device=device))
    if problem.reset is not None:
        over.append(problem.reset)
    if problem.reverse:
        over = [value.flip(0) for value in over]
    beside = [*problem.parameters, *per_sequence, *problem.initial]

    def step(*tensors: Tensor) -> list[Tensor]:
        states, rest = tensors[:count], tensors[count:]
        (x_t, *at), around = rest[: len(over)], rest[len(over) :]
        parameters, more = around[: len(problem.parameters)], around[len(problem.parameters) :]
        outside_t = (*at[: len(per_step)], *more[: len(per_sequence)])
        restart = at.pop() if problem.reset is not None else None
        running = step_mask(at.pop()) if problem.lengths is not None else None
        if restart is not None:
            again = step_mask(restart) if running is None else step_mask(restart) & running
            begin = more[len(per_sequence) :]
            states = tuple(torch.where(again, i, s) for i, s in zip(begin, states, strict=True))
        here = problem.with_tensors([x_t, *states, *parameters, *outside_t, *problem.initial])
        after = reference.step(here, x_t, states, outside_t)
        shown = after[cell.output]
        if running is not None:
            after = tuple(torch.where(running, new, old) for new, old in zip(after, states, strict=True))
            shown = torch.where(running, shown, torch.zeros_like(shown))
        return [*(state.clone() for state in after), shown.clone()]

    # Copies, for a tracer knows a tensor by its identity: a state that is also an initial one would be taken for it.
    begin = [state.clone() for state in problem.states]
    *last, shown = torch.ops.higher_order.scan(step, begin, over, beside)
    return [shown.flip(0) if problem.reverse else shown, *last]
