"""Torch's own fused operators, for devices that have no kernels of ours: cuDNN's and its like, lengths by packing.

They know torch's equations alone: tanh and relu Elman, GRU, LSTM and LSTM with a projection, with biases or without. A
cell is one of these if its graph is, whoever wrote it down. On a CPU the target can be asked for by name, so that it
can be tested. It keeps no promise that only the `cpu` target makes: which bits a row gets may depend on its company.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from throughtime.engine.problem import Problem, Result
from throughtime.engine.targets.target import Target
from throughtime.equations import catalogue, expr


class Native(Target):
    """Torch's fused recurrences. In a graph of autograd they are one node of it; compiled programs recompute them."""

    name = "native"
    by_autograd = True

    def refusal(self, problem: Problem) -> str | None:
        """Why the problem cannot run here, or None."""
        if problem.cell.hash not in _operators():
            return f"torch has no fused operator for the equations of {problem.cell.name}"
        if problem.reset is not None:
            return "torch's fused operators know no resets"
        if not problem.x.dtype.is_floating_point:
            return f"torch's fused operators take floating point, not {problem.x.dtype}"
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


@cache
def _operators() -> dict[str, str]:
    """The names of torch's operators by the hash of the equations that they compute."""
    found = {
        catalogue.Elman: "rnn_tanh",
        catalogue.Elman(activation=expr.relu): "rnn_relu",
        catalogue.GRU: "gru",
        catalogue.LSTM: "lstm",
        catalogue.ProjectedLSTM: "lstm",
    }
    return {each.hash: name for cell, name in found.items() for each in (cell, catalogue.without_biases(cell))}


def _weights(problem: Problem) -> list[Tensor]:
    """The parameters in torch's order, which is the cell's, with its projection last."""
    order = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
    named = {p.name: t for p, t in zip(problem.cell.parameters, problem.parameters, strict=True)}
    return [named[name] for name in order if name in named]


def _call(problem: Problem, data: Tensor, batch_sizes: Tensor | None) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Torch's operator for one layer and direction on a dense [T, B, I] or packed input."""
    name = _operators()[problem.cell.hash]
    states = [state.unsqueeze(0).contiguous() for state in problem.states]
    weights = _weights(problem)
    biased = any(parameter.name == "bias_ih" for parameter in problem.cell.parameters)
    how = (biased, 1, 0.0, torch.is_grad_enabled(), False)
    hx = states if name == "lstm" else states[0]
    operator = getattr(torch._VF, name)
    if batch_sizes is None:
        output, *last = operator(data, hx, weights, *how, False)
    else:
        output, *last = operator(data, batch_sizes, hx, weights, *how)
    return output, tuple(state.squeeze(0) for state in last)


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
        output = problem.x.new_zeros(problem.steps, problem.rows, problem.sizes[problem.cell.output])
        return Result(output, tuple(state.clone() for state in problem.states))
    assert problem.lengths is not None
    first = problem.with_tensors(
        [problem.x[:, :running], *(state[:running] for state in problem.states), *problem.parameters]
    )
    output, states = _time_runs_forward(replace(first, lengths=problem.lengths[:running]), _packed)
    output = torch.nn.functional.pad(output, (0, 0, 0, problem.rows - running))
    return Result(output, tuple(torch.cat([a, b[running:]]) for a, b in zip(states, problem.states, strict=True)))
