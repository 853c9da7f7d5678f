"""Beginnings that carry further: orthogonal and identity recurrent weights, forget biases, chrono initialisation.

Each changes a layer in place, in every layer and direction, and returns it. What a gate's bias has to be is read off
the cell's equations (`equations.keeping`), so cells of one's own are served as the built-in ones are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TypeVar

import torch
from torch import Tensor

from throughtime.equations.cell import Cell
from throughtime.equations.keeping import Gate, Keeper, keepers
from throughtime.errors import CellError, ShapeError, ThroughtimeError
from throughtime.nn.recurrent import Layer

AnyLayer = TypeVar("AnyLayer", bound=Layer)


@torch.no_grad()
def orthogonal_(layer: AnyLayer, *, gain: float = 1.0, generator: torch.Generator | None = None) -> AnyLayer:
    """Make every gate's block of the recurrent weights `gain` times a random orthogonal matrix; the rest stays.

    Saxe, McClelland & Ganguli 2014 (arXiv:1312.6120): every singular value is `gain`, so a linear network's gradient
    keeps its norm at 1. A block that is not square (a projected state) gets orthonormal rows or columns.

    Raises CellError for a cell without recurrent weights, ThroughtimeError for a gain that is no number above 0.
    """
    _check_positive("gain", gain)
    for block in _recurrent_blocks(layer):
        torch.nn.init.orthogonal_(block, gain, generator=generator)
    return layer


@torch.no_grad()
def identity_(layer: AnyLayer, *, scale: float = 1.0) -> AnyLayer:
    """Make every gate's block of the recurrent weights `scale` times the identity; the rest stays.

    Le, Jaitly & Hinton 2015 (arXiv:1504.00941), who use it with relu and biases of zero.

    Raises CellError for a cell without recurrent weights, ShapeError where a block is not square, ThroughtimeError for
    a scale that is no number above 0.
    """
    _check_positive("scale", scale)
    blocks = list(_recurrent_blocks(layer))
    for block in blocks:
        if block.shape[0] != block.shape[1]:
            raise ShapeError(
                f"the recurrent weights of {layer.cell.name} are {block.shape[0]} by {block.shape[1]} per gate, and "
                "only square ones can be the identity; use orthogonal_, or leave out the projection"
            )
    for block in blocks:
        torch.nn.init.eye_(block).mul_(scale)
    return layer


@torch.no_grad()
def forget_bias_(layer: AnyLayer, value: float = 1.0) -> AnyLayer:
    """Let every gate that keeps a state begin by keeping: sigmoid(value) of the old state while its input is zero.

    Gers, Schmidhuber & Cummins 2000; Jozefowicz, Zaremba & Sutskever 2015 recommend 1. The sign is the cell's: -value
    where an open gate writes the new state (Chung et al. 2014, the minimal gated unit). A gate's biases together make
    the value: the first takes it whole, the others become zero.

    Raises CellError for a cell in which no gate keeps a state, or whose keeping gate has no bias.
    """
    if not math.isfinite(value):
        raise ThroughtimeError(f"the forget bias is {value!r}; give a finite number, such as 1.0")
    for keeper in _keepers(layer.cell):
        for parameters in _directions(layer):
            size = _bias_blocks(layer.cell, parameters, keeper.gate)[0][0].shape[0]
            _set_bias(layer.cell, parameters, keeper.gate, torch.full((size,), keeper.sign * value))
    return layer


@torch.no_grad()
def chrono_(layer: AnyLayer, longest: int, *, generator: torch.Generator | None = None) -> AnyLayer:
    """Spread the memories of the units over all spans up to `longest` steps.

    Tallec & Ollivier 2018 (arXiv:1804.11188): the pre-activation of the gate that keeps the state begins at ln u, with
    u uniform in [1, longest - 1], for each unit on its own: it forgets over about u + 1 steps. Where a gate of its own
    lets the new value in (an LSTM's i), that one begins at -ln u. Signs are the cell's, and a gate's biases together
    make the value, as in `forget_bias_`.

    Raises CellError for a cell in which no gate keeps a state, or whose gates have no bias; ThroughtimeError for
    `longest` below 2.
    """
    if isinstance(longest, bool) or not isinstance(longest, int) or longest < 2:
        raise ThroughtimeError(f"longest is {longest!r}; give the number of steps to remember, a whole number from 2")
    for keeper in _keepers(layer.cell):
        for parameters in _directions(layer):
            size = _bias_blocks(layer.cell, parameters, keeper.gate)[0][0].shape[0]
            spans = 1 + (longest - 2) * torch.rand(size, generator=generator, dtype=torch.float64)
            _set_bias(layer.cell, parameters, keeper.gate, keeper.sign * spans.log())
            if keeper.writer is not None:
                _set_bias(layer.cell, parameters, keeper.writer, -keeper.writer_sign * spans.log())
    return layer


def _keepers(cell: Cell) -> tuple[Keeper, ...]:
    """The cell's keeping gates; refuses a cell without one, or with one that has no bias."""
    found = keepers(cell)
    if not found:
        raise CellError(
            f"{cell.name} has no gate, a sigmoid, that keeps all of a state's old value at one end and none at the "
            "other, so no bias says how long it remembers; use orthogonal_ or identity_, or a gated cell such as LSTM"
        )
    signs = {keeper.gate.node: keeper.sign for keeper in found}
    for keeper in found:
        if signs[keeper.gate.node] != keeper.sign:
            raise CellError(
                f"the gate {keeper.gate.name} of {cell.name} keeps one state where it overwrites another, so no bias "
                "lets both remember; give each state a gate of its own"
            )
        for gate in (keeper.gate, keeper.writer):
            if gate is not None and not gate.biases:
                raise CellError(
                    f"the gate {gate.name} of {cell.name} has no bias to set; make the layer with biases, or write "
                    f"b.{gate.name} into the cell"
                )
    return found


def _directions(layer: Layer) -> Iterator[tuple[Tensor, ...]]:
    """The parameters of every layer and direction, in the order of `cell.parameters`."""
    for depth in range(layer.num_layers):
        for suffix in ("", "_reverse") if layer.bidirectional else ("",):
            yield layer._parameters_of(depth, suffix)


def _recurrent_blocks(layer: Layer) -> Iterator[Tensor]:
    """Each gate's rows of the weights that multiply a state, in every layer and direction."""
    if not any(parameter.namespace == "U" for parameter in layer.cell.parameters):
        raise CellError(f"{layer.cell.name} has no recurrent weights (U @ a state), so there is nothing to initialise")
    for parameters in _directions(layer):
        for parameter, tensor in zip(layer.cell.parameters, parameters, strict=True):
            if parameter.namespace == "U":
                yield from tensor.chunk(len(parameter.gates))


def _bias_blocks(cell: Cell, parameters: tuple[Tensor, ...], gate: Gate) -> list[tuple[Tensor, float]]:
    """A gate's rows of each of its biases, with the factor at which each enters the gate."""
    blocks = []
    for parameter, tensor in zip(cell.parameters, parameters, strict=True):
        for name, part in zip(parameter.gates, tensor.chunk(len(parameter.gates)), strict=True):
            if (parameter.namespace, name) in gate.biases:
                blocks.append((part, gate.biases[parameter.namespace, name]))
    return blocks


def _set_bias(cell: Cell, parameters: tuple[Tensor, ...], gate: Gate, value: Tensor) -> None:
    """Make a gate's pre-activation `value` [units] where its inputs are zero."""
    (first, factor), *others = _bias_blocks(cell, parameters, gate)
    first.copy_(value / factor)
    for block, _ in others:
        block.zero_()


def _check_positive(name: str, number: float) -> None:
    if not 0 < number < math.inf:
        raise ThroughtimeError(f"the {name} is {number!r}; give a number above 0")
