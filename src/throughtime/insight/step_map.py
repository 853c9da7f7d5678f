"""One step of a cell as a map of its states, with the Jacobian that is derived from its equations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache

import torch
from torch import Tensor

from throughtime.engine.codegen import Tape, leaves, staged, torch_spelling
from throughtime.engine.problem import Problem, leaf_value
from throughtime.engine.targets import reference
from throughtime.equations import calculus, expr
from throughtime.equations.cell import Cell
from throughtime.equations.expr import Node


class StepMap:
    """One step of a problem's cell: the next state and the step Jacobian, at any number n of states at once.

    States are joined, [n, N] in the order of `cell.states`; x is [n, I] and outside inputs [n, 1 or H] each. Tensors
    are those of the problem, whose parameters are used and nothing else.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.sizes = problem.sizes

    @property
    def size(self) -> int:
        """N, the numbers in all states together."""
        return sum(self.sizes)

    def next(self, x: Tensor, state: Tensor, outside: Sequence[Tensor] = ()) -> Tensor:
        """The state after the step, [n, N]."""
        return torch.cat(reference.step(self.problem, x, state.split(self.sizes, -1), outside), -1)

    def jacobian(self, x: Tensor, state: Tensor, outside: Sequence[Tensor] = ()) -> Tensor:
        """dh_t/dh_{t-1} [n, N, N], by the chains of diagonals and matrices that `calculus.jacobian` derives."""
        values = self._slopes(x, state, outside)
        count, cell = len(state), self.problem.cell
        blocks = []
        for after, height in zip(cell.states, self.sizes, strict=True):
            row = []
            for before, width in zip(cell.states, self.sizes, strict=True):
                block = state.new_zeros(count, height, width)
                for chain in calculus.jacobian(cell).get((after, before), ()):
                    block = block + self._chain(chain, values, height)
                row.append(block)
            blocks.append(torch.cat(row, -1))
        return torch.cat(blocks, -2)

    def _chain(self, chain: calculus.Chain, values: Mapping[Node, Tensor], height: int) -> Tensor:
        """diag(d_0) M_1 diag(d_1) ... diag(d_k), as [n or 1, height, width]."""
        first = values[chain.diagonals[0]]
        if not chain.matrices:
            return torch.diag_embed(first.expand(*first.shape[:-1], height) if first.dim() else first.expand(height))
        product = self._matrix(chain.matrices[0])
        product = first[..., :, None] * product if first.dim() else first * product
        for place, slope in enumerate(chain.diagonals[1:], start=1):
            slope_value = values[slope]
            product = product * (slope_value[..., None, :] if slope_value.dim() else slope_value)
            if place < len(chain.matrices):
                product = product @ self._matrix(chain.matrices[place])
        return product

    def _matrix(self, block: tuple[str, str]) -> Tensor:
        return self.problem.block(expr.make("parameter", (), block))

    def _slopes(self, x: Tensor, state: Tensor, outside: Sequence[Tensor]) -> dict[Node, Tensor]:
        """The value of every diagonal of the Jacobian, [n or 1, width] or a number."""
        problem, states = self.problem, state.split(self.sizes, -1)
        values = {leaf: leaf_value(problem, leaf, x, states, outside) for leaf in leaves(problem.cell)}
        for tape, products in _slope_plan(problem.cell):
            values = tape.run(values, lambda number: torch.tensor(number, dtype=x.dtype))
            for product in products:
                values[product] = values[product.args[0]] @ problem.block(product).T
        return values


@cache
def _slope_plan(cell: Cell) -> list[tuple[Tape, tuple[Node, ...]]]:
    chains = [chain for several in calculus.jacobian(cell).values() for chain in several]
    slopes = dict.fromkeys(slope for chain in chains for slope in chain.diagonals)
    return staged(tuple(slopes), leaves(cell), torch_spelling)
