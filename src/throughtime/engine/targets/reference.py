"""The definition of right: the plain time loop in PyTorch, in any dtype, differentiated by autograd itself.

It uses nothing of the derived adjoints and nothing of the other targets; they are tested against it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from throughtime.engine.codegen import Tape, leaves, staged, torch_spelling
from throughtime.engine.problem import Problem, Result, at_step, leaf_value, step_mask
from throughtime.engine.targets.target import Target
from throughtime.equations.cell import Cell
from throughtime.equations.expr import Node


class Reference(Target):
    """The plain loop; autograd differentiates it, any number of times and in every mode."""

    name = "reference"
    by_autograd = True

    def refusal(self, problem: Problem) -> str | None:
        """Why the problem cannot run here: never."""
        return None

    def forward(self, problem: Problem, save: bool = False) -> Result:
        """Run the recurrence in the autograd graph."""
        return forward(problem)


TARGET = Reference()


def forward(
    problem: Problem,
    history: list[tuple[Tensor, ...]] | None = None,
    seen: list[dict[Node, Tensor]] | None = None,
) -> Result:
    """Run the recurrence; `history` and `seen`, if given, are filled in the order of computation.

    `history` gets the states [B, width] after each step, and `seen` the value of every node of the cell in that step.
    """
    cell, x, states = problem.cell, problem.x, problem.states
    device = x.device
    lengths = None if problem.lengths is None else torch.as_tensor(problem.lengths, device=device)
    inputs = x.unbind()  # at once: the gradient of T single steps would be T tensors of the whole size
    outputs: list[Tensor] = [x] * problem.steps
    for t in problem.order():
        x_t, outside_t = inputs[t], at_step(problem, t)
        running = None if lengths is None else step_mask(lengths > t)
        if problem.reset is not None:
            restart = step_mask(problem.reset[t])
            restart = restart if running is None else restart & running
            states = tuple(torch.where(restart, i, s) for i, s in zip(problem.initial, states, strict=True))
        if running is None:
            states = step(problem, x_t, states, outside_t, seen)
            if history is not None:
                states = tuple(_own(state) for state in states)
            outputs[t] = states[cell.output]
        else:
            # What lies past a row's end may be anything, NaN too; it must not reach a gradient even times zero.
            x_t, *rest = (torch.where(running, v, torch.zeros_like(v)) for v in (x_t, *states, *outside_t))
            after = step(problem, x_t, rest[: len(states)], rest[len(states) :], seen)
            states = tuple(torch.where(running, new, old) for new, old in zip(after, states, strict=True))
            if history is not None:
                states = tuple(_own(state) for state in states)
            shown = states[cell.output]
            outputs[t] = torch.where(running, shown, torch.zeros_like(shown))
        if history is not None:
            history.append(states)
    if not outputs:
        return Result(x.new_zeros(0, problem.rows, problem.sizes[cell.output]), states)
    return Result(torch.stack(outputs), states)


def _own(state: Tensor) -> Tensor:
    """The state as a node of the graph that a gradient can be asked by: c_t is not counted again on its way to h_t.

    Where nothing before it has a gradient, as after a step from zeros without parameters, the graph begins with it.
    """
    if state.requires_grad or not torch.is_grad_enabled():
        return state.view_as(state)
    return state.detach().requires_grad_()


def step(
    problem: Problem,
    x_t: Tensor,
    states: Sequence[Tensor],
    outside_t: Sequence[Tensor],
    seen: list[dict[Node, Tensor]] | None = None,
) -> tuple[Tensor, ...]:
    """One step: x_t [B, I], the states [B, width] and the outside inputs [B, 1 or H] to the next states."""
    cell = problem.cell
    values = {leaf: leaf_value(problem, leaf, x_t, states, outside_t) for leaf in leaves(cell)}
    for tape, products in _plan(cell):
        values = tape.run(values, lambda number: torch.full((), number, dtype=x_t.dtype, device=x_t.device))
        for product in products:
            values[product] = values[product.args[0]] @ problem.block(product).T
    if seen is not None:
        seen.append(values)
    return tuple(_full(values[node], states[i].shape) for i, node in enumerate(cell.next))


@cache
def _plan(cell: Cell) -> list[tuple[Tape, tuple[Node, ...]]]:
    return staged(cell.next, leaves(cell), torch_spelling)


def _full(value: Tensor, shape: torch.Size) -> Tensor:
    """A next state that depends on no row (say, a bias alone) still has a row for each sequence."""
    return value if value.shape == shape else value.expand(shape)
