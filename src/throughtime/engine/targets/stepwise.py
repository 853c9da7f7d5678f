"""The derived equations, step by step, in PyTorch: any cell, any dtype, any device, no autograd graph.

What a fused target does in one kernel is spelled out here in tensors: input products for the whole sequence, the loop
forward that saves what `calculus.saved` names, the loop backward through the adjoint equations, and the products'
weight gradients at the end, over all steps together.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from throughtime.engine.codegen import Tape, leaves, staged, torch_spelling
from throughtime.engine.problem import Problem, Result, at_step, leaf_value, step_mask
from throughtime.engine.targets.target import Spec, Target
from throughtime.equations import calculus
from throughtime.equations.cell import Cell
from throughtime.equations.expr import Node


class Stepwise(Target):
    """The derived equations in plain tensors."""

    name = "stepwise"

    def refusal(self, problem: Problem) -> str | None:
        """Why the problem cannot run here: never."""
        return None

    def forward(self, problem: Problem, save: bool = False) -> Result:
        """Run the recurrence; with `save`, the workspace is each step's states, before and after, and saved values."""
        cell, x = problem.cell, problem.x
        steps, rows = problem.steps, problem.rows
        active = problem.active()
        current = [state.clone() for state in problem.states]
        after = [x.new_zeros(steps, rows, size) for size in problem.sizes]
        before = [torch.zeros_like(history) for history in after] if save else []
        kept_nodes = calculus.saved(cell) if save else ()
        kept = [x.new_zeros(steps, rows, _width(problem, node)) for node in kept_nodes]
        driven = {product: x @ problem.block(product).T for product in _of_input(cell)}
        for t in problem.order():
            n = active[t]
            states = _restarted(problem, current, t, n)
            values = _leaf_values(problem, t, n, states)
            values |= {product: whole[t, :n] for product, whole in driven.items()}
            values = _run(_forward_plan(cell), values, problem, transposed=False)
            for i, node in enumerate(cell.next):
                after[i][t, :n] = values[node]
                current[i][:n] = after[i][t, :n]
            if save:
                for history, state in zip(before, states, strict=True):
                    history[t, :n] = state
                for store, node in zip(kept, kept_nodes, strict=True):
                    store[t, :n] = values[node]
        workspace = (*before, *(h for i, h in enumerate(after) if i != cell.output), *kept) if save else ()
        return Result(after[cell.output], tuple(current), workspace)

    def workspace(self, problem: Problem) -> list[Spec]:
        """The states before and after each step, and the saved values."""
        after = [size for i, size in enumerate(problem.sizes) if i != problem.cell.output]
        widths = [*problem.sizes, *after, *(_width(problem, node) for node in calculus.saved(problem.cell))]
        return [Spec((problem.steps, problem.rows, width), problem.x.dtype) for width in widths]

    def backward(
        self,
        problem: Problem,
        result: Result,
        d_output: Tensor | None,
        d_states: Sequence[Tensor | None],
        needs: Sequence[bool],
    ) -> tuple[Tensor | None, ...]:
        """The gradients of `problem.tensors`, None where not needed, from those of the outputs and the last states.

        An incoming gradient that is None is zero.
        """
        cell, x = problem.cell, problem.x
        steps, rows = problem.steps, problem.rows
        adjoint = calculus.adjoint(cell)
        active = problem.active()
        before, after, kept = _unpacked(problem, result)
        a = [torch.zeros_like(s) if d is None else d.clone() for s, d in zip(problem.states, d_states, strict=True)]
        collected = {node: x.new_zeros(steps, rows, _width(problem, node)) for node in adjoint.over_time}
        d_initial = [torch.zeros_like(state) for state in problem.states]
        operands = {p.args[0]: x.new_zeros(steps, rows, _width(problem, p.args[0])) for p in _of_values(cell)}
        for t in reversed(problem.order()):
            n = active[t]
            if d_output is not None:
                a[cell.output][:n] += d_output[t, :n]
            states = [history[t, :n] for history in before]
            values = _leaf_values(problem, t, n, states)
            values |= {node: history[t, :n] for node, history in kept.items()}
            values |= {node: after[i][t, :n] for i, node in enumerate(cell.next)}
            values |= {_adjoint_leaf(state): a[i][:n].clone() for i, state in enumerate(cell.states)}
            values = _run(_backward_plan(cell), values, problem, transposed=True)
            for i, state in enumerate(cell.states):
                a[i][:n] = values[adjoint.state[state]] if state in adjoint.state else 0.0
            if problem.reset is not None:
                restart = step_mask(problem.reset[t, :n])
                for i, d in enumerate(d_initial):
                    d[:n] += torch.where(restart, a[i][:n], 0.0)
                    a[i][:n] = torch.where(restart, 0.0, a[i][:n])
            for node, store in collected.items():
                store[t, :n] = values[node]
            for node, store in operands.items():
                store[t, :n] = values[node]
        return _gathered(problem, adjoint, collected, operands, a, d_initial, needs)


TARGET = Stepwise()


def _gathered(
    problem: Problem,
    adjoint: calculus.Adjoint,
    collected: dict[Node, Tensor],
    operands: dict[Node, Tensor],
    a: list[Tensor],
    d_initial: list[Tensor],
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """The sums over steps and rows, once the loop has written every adjoint [T, B, width]."""
    cell, x = problem.cell, problem.x
    wanted = iter(needs)
    gradients: list[Tensor | None] = []
    d_x = None
    if next(wanted):
        d_x = torch.zeros_like(x) if adjoint.input is None else collected[adjoint.input].clone()
        for product in _of_input(cell):
            if product in adjoint.delta:
                d_x += collected[adjoint.delta[product]] @ problem.block(product)
    gradients.append(d_x)
    for d_state in a:
        gradients.append(d_state if next(wanted) else None)
    for parameter, tensor in zip(cell.parameters, problem.parameters, strict=True):
        if not next(wanted):
            gradients.append(None)
            continue
        total = torch.zeros_like(tensor)
        rows = tensor.shape[0] // len(parameter.gates)
        for product in cell.products:
            if product.data[0] == parameter.namespace and product in adjoint.delta:
                place = parameter.gates.index(product.data[1]) * rows
                operand = _clean(problem) if product.args[0].op == "input" else operands[product.args[0]]
                total[place : place + rows] += collected[adjoint.delta[product]].flatten(0, 1).T @ operand.flatten(0, 1)
        for node, g in adjoint.parameter.items():
            if node.data[0] == parameter.namespace:
                place = parameter.gates.index(node.data[1]) * rows
                total[place : place + rows] += collected[g].sum((0, 1))
        gradients.append(total)
    for name, value in zip(cell.outside, problem.outside, strict=True):
        if not next(wanted):
            gradients.append(None)
            continue
        d = collected[adjoint.outside[name]] if name in adjoint.outside else torch.zeros_like(value)
        if name in adjoint.outside and name in cell.per_sequence:
            d = d.sum(0)
        gradients.append(d.sum(-1, keepdim=True) if value.shape[-1] == 1 and d.shape[-1] != 1 else d)
    for d in d_initial[: len(problem.initial)]:
        gradients.append(d if next(wanted) else None)
    return tuple(gradients)


def _clean(problem: Problem) -> Tensor:
    """x with zeros past each row's end, where it may hold anything."""
    if problem.lengths is None:
        return problem.x
    lengths = torch.tensor(problem.lengths, device=problem.x.device)
    running = torch.arange(problem.steps, device=problem.x.device)[:, None] < lengths
    return torch.where(running[..., None], problem.x, 0.0)


def _run(
    plan: list[tuple[Tape, tuple[Node, ...]]], values: dict[Node, Tensor], problem: Problem, transposed: bool
) -> dict[Node, Tensor]:
    x = problem.x
    for tape, products in plan:
        values = tape.run(values, lambda number: torch.tensor(number, dtype=x.dtype, device=x.device))
        for product in products:
            matrix = problem.block(product)
            values[product] = values[product.args[0]] @ (matrix if transposed else matrix.T)
    return values


@cache
def _forward_plan(cell: Cell) -> list[tuple[Tape, tuple[Node, ...]]]:
    roots = tuple(dict.fromkeys((*cell.next, *calculus.saved(cell))))
    return staged(roots, (*leaves(cell), *_of_input(cell)), torch_spelling)


@cache
def _backward_plan(cell: Cell) -> list[tuple[Tape, tuple[Node, ...]]]:
    given = (*leaves(cell), *calculus.saved(cell), *cell.next, *map(_adjoint_leaf, cell.states))
    adjoint = calculus.adjoint(cell)
    operands = [product.args[0] for product in _of_values(cell)]
    return staged(tuple(dict.fromkeys((*adjoint.roots, *operands))), given, torch_spelling)


def _adjoint_leaf(state: str) -> Node:
    return calculus.make("adjoint", (), (state,))


def _of_input(cell: Cell) -> tuple[Node, ...]:
    return tuple(product for product in cell.products if product.args[0].op == "input")


def _of_values(cell: Cell) -> tuple[Node, ...]:
    return tuple(product for product in cell.products if product.args[0].op != "input")


def _unpacked(problem: Problem, result: Result) -> tuple[list[Tensor], list[Tensor], dict[Node, Tensor]]:
    cell, count = problem.cell, len(problem.cell.states)
    before = list(result.workspace[:count])
    after = list(result.workspace[count : 2 * count - 1])
    after.insert(cell.output, result.output)
    kept = dict(zip(calculus.saved(cell), result.workspace[2 * count - 1 :], strict=True))
    return before, after, kept


def _restarted(problem: Problem, current: list[Tensor], t: int, n: int) -> list[Tensor]:
    if problem.reset is None:
        return [state[:n].clone() for state in current]
    restart = step_mask(problem.reset[t, :n])
    return [torch.where(restart, i[:n], s[:n]) for i, s in zip(problem.initial, current, strict=True)]


def _leaf_values(problem: Problem, t: int, n: int, states: Sequence[Tensor]) -> dict[Node, Tensor]:
    """What the leaves of the cell are worth at step t, in the first n rows."""
    around, x_t = at_step(problem, t), problem.x[t]
    return {leaf: _rows(leaf_value(problem, leaf, x_t, states, around), leaf, n) for leaf in leaves(problem.cell)}


def _rows(value: Tensor, leaf: Node, n: int) -> Tensor:
    return value if leaf.op == "parameter" else value[:n]


def _width(problem: Problem, node: Node) -> int:
    """The units of a value; an adjoint is as wide as what it is the adjoint of."""
    cell = problem.cell
    if node in cell.width_of:
        projected = cell.width_of[node] == "projected"
    else:
        owners = [v for v, g in calculus.adjoint(cell).value.items() if g is node]
        projected = any(cell.width_of.get(owner) == "projected" for owner in owners)
    return problem.proj_size if projected else problem.hidden_size
