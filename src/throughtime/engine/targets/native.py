"""Torch's own fused operators, for devices that have no kernels of ours: cuDNN's and its like, lengths by packing.

They know torch's equations alone: tanh and relu Elman, GRU, LSTM and LSTM with a projection, with both biases, one or
none. A cell is one of these if its mathematics is, whoever wrote it down: names, the order of gates, sums and products
may differ, and its weights are then put in torch's order for each run. On a CPU the target can be asked for by name, so
that it can be tested. It keeps no promise that only the `cpu` target makes: which bits a row gets may depend on its
company. Derivatives of derivatives are torch's own too, where its operator has them (cuDNN's has none, and says so).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache

import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from throughtime.engine.problem import Problem, Result
from throughtime.engine.targets.target import Target
from throughtime.equations import catalogue, expr
from throughtime.equations.cell import Cell
from throughtime.equations.standard import renamed

FORMATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
"""What torch's operators compute in."""


class Native(Target):
    """Torch's fused recurrences. In a graph of autograd they are one node of it; compiled programs recompute them."""

    name = "native"
    by_autograd = True

    def refusal(self, problem: Problem) -> str | None:
        """Why the problem cannot run here, or None."""
        if _operator(problem.cell) is None:
            return f"torch has no fused operator for the equations of {problem.cell.name}"
        if problem.reset is not None:
            return "torch's fused operators know no resets"
        x = problem.x
        if x.dtype not in FORMATS:
            return f"torch's fused operators take float32, float64, bfloat16 and float16, not {x.dtype}"
        if any(t.dtype != x.dtype or t.device != x.device for t in problem.tensors):
            return "its tensors differ in dtype or device"
        if problem.steps == 0 or problem.rows == 0 or 0 in problem.sizes or problem.x.shape[2] == 0:
            return "there is nothing to compute"
        return None

    def forward(self, problem: Problem, save: bool = False) -> Result:
        """Run torch's operator; autograd sees it if a gradient is wanted."""
        if problem.lengths is None:
            steps, states = _time_runs_forward(problem, _dense)
            return Result(steps, states)
        running = sum(length > 0 for length in problem.lengths)
        if running == problem.rows:
            return Result(*_time_runs_forward(problem, _packed))
        return _with_empty_rows(problem, running)

    def backward(
        self,
        problem: Problem,
        result: Result,
        d_output: Tensor | None,
        d_states: Sequence[Tensor | None],
        needs: Sequence[bool],
    ) -> tuple[Tensor | None, ...]:
        """For compiled programs, whose forward part is no graph: run again under autograd, then differentiate."""
        with torch.enable_grad():
            own = [tensor.detach().requires_grad_(need) for tensor, need in zip(problem.tensors, needs, strict=True)]
            again = self.forward(problem.with_tensors(own))
        pairs = zip((again.output, *again.states), (d_output, *d_states), strict=True)
        given = [(shown, d) for shown, d in pairs if d is not None and shown.requires_grad]
        wanted = [tensor for tensor in own if tensor.requires_grad]
        found = iter(torch.autograd.grad([s for s, _ in given], wanted, [d for _, d in given], materialize_grads=True))
        return tuple(next(found) if need else None for need in needs)


TARGET = Native()


@dataclass(frozen=True)
class _Operator:
    """One of torch's operators, and how a cell's tensors are laid out for it.

    `states` holds the places of torch's h, and c, among the cell's states; `weights` torch's parameters in its order,
    each with the cell's own names of the gates that it stacks.
    """

    name: str
    states: tuple[int, ...]
    weights: tuple[tuple[str, tuple[str, ...]], ...]


@cache
def _templates() -> tuple[tuple[str, Cell], ...]:
    """The equations of torch's operators."""
    return (
        ("rnn_tanh", catalogue.Elman),
        ("rnn_relu", catalogue.Elman(activation=expr.relu)),
        ("gru", catalogue.GRU),
        ("lstm", catalogue.LSTM),
        ("lstm", catalogue.ProjectedLSTM),
    )


@lru_cache(maxsize=256)
def _operator(cell: Cell) -> _Operator | None:
    """Torch's operator for these equations, None if it has none."""
    for name, template in _templates():
        gates = renamed(cell, template)
        if gates is None:
            continue
        biased = any(parameter.name.startswith("bias") for parameter in cell.parameters)
        weights = tuple(
            (parameter.name, tuple(gates[gate] for gate in parameter.gates))
            for parameter in template.parameters
            if biased or not parameter.name.startswith("bias")
        )
        others = tuple(place for place in range(len(cell.states)) if place != cell.output)
        return _Operator(name, (cell.output, *others), weights)
    return None


def _weights(problem: Problem, operator: _Operator) -> list[Tensor]:
    """The parameters as torch stacks them; a bias that the cell does not have is zero."""
    own = {p.name: (p.gates, t) for p, t in zip(problem.cell.parameters, problem.parameters, strict=True)}
    found = []
    for name, wanted in operator.weights:
        gates, tensor = own.get(name, ((), None))
        if tensor is not None and gates == wanted:
            found.append(tensor)
            continue
        blocks = {} if tensor is None else dict(zip(gates, tensor.chunk(len(gates)), strict=True))
        nothing = problem.x.new_zeros(problem.hidden_size)
        found.append(torch.cat([blocks.get(gate, nothing) for gate in wanted]))
    return found


def _call(problem: Problem, data: Tensor, batch_sizes: Tensor | None) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Torch's operator for one layer and direction on a dense [T, B, I] or packed input."""
    operator = _operator(problem.cell)
    assert operator is not None
    states = [problem.states[place].unsqueeze(0).contiguous() for place in operator.states]
    weights = _weights(problem, operator)
    biased = any(name == "bias_ih" for name, _ in operator.weights)
    how = (biased, 1, 0.0, torch.is_grad_enabled(), False)
    hx = states if len(states) > 1 else states[0]
    run = getattr(torch._VF, operator.name)
    if batch_sizes is None:
        output, *last = run(data, hx, weights, *how, False)
    else:
        output, *last = run(data, batch_sizes, hx, weights, *how)
    after = {place: state.squeeze(0) for place, state in zip(operator.states, last, strict=True)}
    return output, tuple(after[place] for place in range(len(after)))


def _dense(problem: Problem) -> tuple[Tensor, tuple[Tensor, ...]]:
    return _call(problem, problem.x, None)


def _packed(problem: Problem) -> tuple[Tensor, tuple[Tensor, ...]]:
    packed = pack_padded_sequence(problem.x, torch.tensor(problem.lengths))  # rows fall in length already
    output, states = _call(problem, packed.data, packed.batch_sizes)
    whole, _ = pad_packed_sequence(packed._replace(data=output), total_length=problem.steps)
    return whole, states


def _time_runs_forward(
    problem: Problem, run: Callable[[Problem], tuple[Tensor, tuple[Tensor, ...]]]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Torch's operators run backwards only beside a forward run, so a backward run is a forward one on turned rows."""
    if not problem.reverse:
        return run(problem)
    turned = problem.with_tensors([_turned(problem, problem.x), *problem.tensors[1:]])
    output, states = run(turned)
    return _turned(problem, output), states


def _turned(problem: Problem, tensor: Tensor) -> Tensor:
    """Each row [T, ...] of a tensor [T, B, width] from its last step to its first; what lies past its end stays."""
    if problem.lengths is None:
        return tensor.flip(0)
    ends = torch.tensor(problem.lengths, device=tensor.device)
    time = torch.arange(problem.steps, device=tensor.device)[:, None]
    places = torch.where(time < ends, ends - 1 - time, time)
    return tensor.gather(0, places[..., None].expand_as(tensor))


def _with_empty_rows(problem: Problem, running: int) -> Result:
    """Rows without a step, the last ones, hand their state through; torch packs none such."""
    if running == 0:
        # a zero that is part of autograd's graph, as results are on every target; no number is read for it
        zero = torch.cat([tensor.flatten()[:0] for tensor in (problem.x, *problem.parameters)]).sum()
        output = zero.expand(problem.steps, problem.rows, problem.sizes[problem.cell.output]).clone()
        return Result(output, tuple(state - zero for state in problem.states))  # minus, for -0.0 stays -0.0 then
    assert problem.lengths is not None
    first = problem.with_tensors(
        [problem.x[:, :running], *(state[:running] for state in problem.states), *problem.parameters]
    )
    output, states = _time_runs_forward(replace(first, lengths=problem.lengths[:running]), _packed)
    output = torch.nn.functional.pad(output, (0, 0, 0, problem.rows - running))
    return Result(output, tuple(torch.cat([a, b[running:]]) for a, b in zip(states, problem.states, strict=True)))
