"""Pairs of times: the loss at step i against the state at step k, and which step's use of a weight carried what.

The terms of the double sum of back-propagation through time (Werbos 1990, Proc. IEEE 78; Pascanu, Mikolov & Bengio
2013, arXiv:1211.5063, equations 4 and 5).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from throughtime.engine.recurrence import Record
from throughtime.equations.expr import Node
from throughtime.errors import ThroughtimeError
from throughtime.insight.reach import checked_losses
from throughtime.insight.rehearsal import Place, Progress, gradients, in_step_order, lengths_of, rehearse, said_rows
from throughtime.nn.layout import within

if TYPE_CHECKING:
    from numpy.typing import NDArray

TERMS, FEWEST_TERMS, MOST_PASSED = 128, 16, 20_000
"""Into how many terms a loss over time is taken apart unless something else is asked for: 128 at most, or in long
sequences fewer, so that the ways back, each of a sequence's length, come to no more than 20000 steps."""


@dataclass(frozen=True, eq=False)
class Pairs:
    """The double sum of one direction of one layer, term by term. Made by `pairs`.

    `losses` [I] are the first steps i of the loss's terms, `width` steps each (1 unless there were too many to take
    singly); a loss that is one number has the single term `losses` = [T - 1], and `scalar` is true. Columns are the
    steps k = 0 ... T - 1 of the layer's input.

    `norms` [I, T] is |dL_i/dh_k|, over all rows and units (of all states) together: 0 where there is no way from h_k to
    L_i, as to every earlier loss in a network that runs forward. `shares` holds, by weight matrix (`weight_ih`,
    `weight_hh`, `weight_hr`), the signed shares [I, T] of its gradient: the term of loss i through the use of the
    matrix at step k is a matrix G_ik, and its share is <G_ik, G> / <G, G> where G is their sum, dL/dW; all shares add
    up to one. `gradients` holds each G, added up from the terms; L is the sum over all steps and rows. A matrix whose
    gradient is exactly zero has shares of zero. `measured` says in words what was measured.
    """

    place: Place
    cell: str
    losses: NDArray[np.int64]
    width: int
    scalar: bool
    norms: NDArray[np.float64]
    shares: Mapping[str, NDArray[np.float64]]
    gradients: Mapping[str, NDArray[np.float64]]
    measured: str

    @property
    def by_use(self) -> dict[str, NDArray[np.float64]]:
        """By weight matrix, the share of its gradient [T] that its use at each step carried, over all losses."""
        return {name: shares.sum(axis=0) for name, shares in self.shares.items()}


def pairs(
    model: nn.Module,
    batch: Any,
    loss: Callable[[Any], Tensor],
    *,
    terms: int | None = None,
    dtype: torch.dtype | None = torch.float64,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Pairs]:
    """The double sum of back-propagation through time, term by term, in every recurrent layer and direction.

    `batch` and `loss` are as for `reach`: with the losses of each step [T, B] the terms are those of the loss at step i
    through step k, where losses past a row's end are not used; with one number, or the losses of each row [B], there
    is one term for each k. A loss of more than `terms` steps (by default 128, in long sequences fewer) has its terms in
    groups of neighbouring steps, which `Pairs.width` and `Pairs.measured` tell. The model runs on a copy, in `dtype`.

    Raises ThroughtimeError as `reach` does.
    """
    if terms is not None and terms < 1:
        raise ThroughtimeError(f"terms is {terms}; give a whole number from 1")
    run = rehearse(model, batch, loss, dtype=dtype, values=True)
    losses = checked_losses(run)
    scalar = losses.dim() < 2
    width = 1 if scalar else -(-len(losses) // (terms or _affordable(len(losses))))
    parts = [losses.sum()] if scalar else _parts(losses, lengths_of(run.records[0]), width)
    passes = Progress(len(parts) + 1, on_progress)
    whole = _adjoints(run.records, torch.stack(parts).sum())
    sums = [_Terms(record, adjoints) for record, adjoints in zip(run.records, whole, strict=True)]
    passes.advance()
    for part in parts:
        for one, adjoints in zip(sums, _adjoints(run.records, part), strict=True):
            one.add(adjoints)
        passes.advance()
    return [
        Pairs(
            place=place,
            cell=one.record.cell.name,
            losses=np.array([one.record.problem.steps - 1]) if scalar else np.arange(0, len(losses), width),
            width=width,
            scalar=scalar,
            norms=np.stack(one.norms),
            shares=one.shares(),
            gradients=one.gradients(),
            measured=_said(one.record, scalar, width),
        )
        for place, one in zip(run.places, sums, strict=True)
    ]


def _affordable(steps: int) -> int:
    return min(TERMS, max(FEWEST_TERMS, MOST_PASSED // steps))


def _parts(losses: Tensor, lengths: Tensor, width: int) -> list[Tensor]:
    """The sums of the losses [T, B] over real steps, `width` steps at a time."""
    real = torch.where(within(lengths, len(losses), losses.device), losses, 0.0)
    return [group.sum() for group in real.split(width)]


@dataclass(frozen=True)
class _Adjoints:
    """The gradient of one loss by the states, [T, B, widths], and by each product of the cell, [T, B, units]."""

    states: Tensor
    products: Mapping[Node, Tensor]


def _adjoints(records: Sequence[Record], loss: Tensor) -> list[_Adjoints]:
    tensors = [tensor for record in records for step in _steps(record) for tensor in step]
    found = iter(gradients(loss, tensors))
    result = []
    for record in records:
        by_step = [[next(found) for _ in step] for step in _steps(record)]
        count = len(record.cell.states)
        states = torch.stack(in_step_order(record, [torch.cat(step[:count], dim=1) for step in by_step]))
        products = {
            product: torch.stack(in_step_order(record, [step[count + place] for step in by_step]))
            for place, product in enumerate(record.cell.products)
        }
        result.append(_Adjoints(states, products))
    return result


def _steps(record: Record) -> list[list[Tensor]]:
    """The states and the products of each computed step."""
    products = record.cell.products
    return [
        [*states, *(values[product] for product in products)]
        for states, values in zip(record.states, record.values or [], strict=True)
    ]


def _scaled(tensor: Tensor) -> Tensor:
    """The tensor over its largest entry; one of zeros, or with an infinity in it, as it is."""
    largest = tensor.abs().amax() if tensor.numel() else tensor.new_zeros(())
    return tensor / largest if 0 < float(largest) < math.inf else tensor


class _Terms:
    """What the terms of one recurrence add up to, as they come in."""

    def __init__(self, record: Record, whole: _Adjoints) -> None:
        self.record = record
        self.norms: list[NDArray[np.float64]] = []
        self.projections: dict[str, list[Tensor]] = {p.name: [] for p in record.cell.parameters if p.is_matrix}
        self.operands = {product: self._over_time(product.args[0]) for product in record.cell.products}
        self.total = self._by_matrix(whole.products)
        self.summed = {product: torch.zeros_like(delta) for product, delta in whole.products.items()}
        # <delta v^T, G> = <delta, G v>: so no term's matrix has to be written out.
        # G is scaled by its largest entry, so that a gradient whose squares underflow has its shares too.
        self.scaled = {name: _scaled(matrix.double()) for name, matrix in self.total.items()}
        self.directions = {
            product: self.operands[product].double() @ self._block(self.scaled, product).T
            for product in record.cell.products
        }

    def _over_time(self, node: Node) -> Tensor:
        values = [step[node].detach() for step in self.record.values or []]
        return torch.stack(in_step_order(self.record, values))

    def _by_matrix(self, deltas: Mapping[Node, Tensor]) -> dict[str, Tensor]:
        """dL/dM of each matrix M, as the sum over time and rows of delta v^T."""
        found = {}
        for parameter, tensor in zip(self.record.cell.parameters, self.record.problem.parameters, strict=True):
            if parameter.is_matrix:
                found[parameter.name] = torch.zeros_like(tensor)
        for product, delta in deltas.items():
            self._block(found, product).add_(torch.einsum("tbu,tbk->uk", delta, self.operands[product]))
        return found

    def _block(self, matrices: Mapping[str, Tensor], product: Node) -> Tensor:
        """The rows of a matrix that belong to a product's gate."""
        namespace, gate = product.data
        parameter = next(p for p in self.record.cell.parameters if p.namespace == namespace)
        return matrices[parameter.name].chunk(len(parameter.gates))[parameter.gates.index(gate)]

    def _name(self, product: Node) -> str:
        return next(p.name for p in self.record.cell.parameters if p.namespace == product.data[0])

    def add(self, term: _Adjoints) -> None:
        """One loss's term: its norms by step, and its projections on each matrix's whole gradient."""
        scaled, largest = _scaled(term.states.double()), float(term.states.abs().amax())
        self.norms.append((scaled.norm(dim=(1, 2)) * largest).cpu().numpy())
        for projections in self.projections.values():
            projections.append(torch.zeros(len(term.states), dtype=torch.float64))
        for product, delta in term.products.items():
            self.summed[product] += delta
            projected = (delta.double() * self.directions[product]).sum(dim=(1, 2))
            self.projections[self._name(product)][-1] += projected.cpu()

    def shares(self) -> dict[str, NDArray[np.float64]]:
        """The projections [I, T] as shares of <G, G>, by matrix."""
        found = {}
        for name, projections in self.projections.items():
            square = float((self.total[name].double() * self.scaled[name]).sum())
            found[name] = torch.stack(projections).numpy() / (square or 1.0)
        return found

    def gradients(self) -> dict[str, NDArray[np.float64]]:
        """The sum of all terms, by matrix."""
        return {name: matrix.double().cpu().numpy() for name, matrix in self._by_matrix(self.summed).items()}


def _said(record: Record, scalar: bool, width: int) -> str:
    if scalar:
        return f"{said_rows(record)}; the loss as one"
    each = "of each step" if width == 1 else f"of {width} steps at a time, for they are too many to take singly"
    return f"{said_rows(record)}; the losses {each}"
