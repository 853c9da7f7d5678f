"""What PyTorch's features are tried on, and how an outcome is put in words: see `features.py`.

A row of the table is a function that takes a `Case`, uses one feature on its module and compares numbers and gradients
with the module's plain run.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

import throughtime as tt
from throughtime.engine.targets import TARGETS, reference, target

T, B, I, H = 6, 3, 4, 5
"""Steps, sequences, features and units of the plain run."""


@tt.cell(states="h")
def Own(x, h, W, U, b):
    """A cell of one's own, with a product of a value of the same step."""
    f = tt.sigmoid(W.f @ x + b.f + U.f @ h)
    n = tt.tanh(W.n @ x + b.n + U.n @ (f * h))
    return (1 - f) * h + f * n


class Kind(NamedTuple):
    """One of the modules that features are tried on, and the one of torch's own that stands beside it."""

    group: str
    make: Callable[[], torch.nn.Module]
    peer: Callable[[], torch.nn.Module]


def _kind(group: str, name: str) -> Kind:
    ours, torchs = getattr(tt.nn, name), getattr(torch.nn, name)
    return Kind(group, lambda: ours(I, H), lambda: torchs(I, H))


KINDS = {
    "Recurrent(GRU)": Kind("Recurrent", lambda: tt.nn.Recurrent(tt.GRU, I, H), lambda: torch.nn.GRU(I, H)),
    "Recurrent(own cell)": Kind("Recurrent", lambda: tt.nn.Recurrent(Own, I, H), lambda: torch.nn.GRU(I, H)),
    **{name: _kind("drop-ins", name) for name in ("GRU", "LSTM", "RNN")},
    **{name: _kind("cells", name) for name in ("GRUCell", "LSTMCell", "RNNCell")},
}


class Ran(NamedTuple):
    """What a run returned, and by name the gradients of a fixed sum of it: of x and of the parameters."""

    outputs: list[Tensor]
    gradients: dict[str, Tensor]


def loss_of(outputs: Any) -> Tensor:
    """A sum in which every number of the outputs has a weight of its own."""
    total = torch.zeros(())
    for place, output in enumerate(tree_leaves(outputs)):
        weights = torch.cos(torch.arange(output.numel(), dtype=torch.float64) + place).reshape(output.shape)
        total = total + (output * weights.to(output.dtype)).sum()
    return total


def ran(
    call: Callable[[Any], Any],
    x: Tensor,
    wanted: Mapping[str, Tensor],
    *,
    gradients: bool = True,
    read: Callable[[Any], Tensor] = lambda tensor: tensor,
) -> Ran:
    """A run and its backward pass; `read` says what stands in a tensor of another kind than usual."""
    if not gradients:
        return Ran([read(output).detach() for output in tree_leaves(call(x))], {})
    x = x.detach().clone().requires_grad_()
    leaves = {"x": x, **wanted}
    for tensor in leaves.values():
        tensor.grad = None
    outputs = tree_leaves(call(x))
    loss_of(outputs).backward()
    found = {name: read(leaf.grad) for name, leaf in leaves.items() if leaf.grad is not None}
    return Ran([read(output).detach() for output in outputs], found)


def compared(found: Ran, expected: Ran, tolerance: float = 1e-5) -> str:
    """How two runs compare: "same bits", "same to rounding", or what is wrong."""
    if len(found.outputs) != len(expected.outputs) or found.gradients.keys() != expected.gradients.keys():
        return f"WRONG: gives {_names(found)} where the plain run gives {_names(expected)}"
    pairs = [*zip(found.outputs, expected.outputs, strict=True)]
    pairs += [(found.gradients[name], value) for name, value in expected.gradients.items()]
    if any(one.shape != other.shape for one, other in pairs):
        return "WRONG: other shapes than the plain run's"
    if all(one.dtype == other.dtype and torch.equal(one, other) for one, other in pairs):
        return "same bits"
    worst = max((apart(one, other) for one, other in pairs), default=0.0)
    return "same to rounding" if worst <= tolerance else f"WRONG: apart by {worst:.0e} of the largest number"


def apart(one: Tensor, other: Tensor) -> float:
    """The largest difference, as a share of the other's largest entry; infinite where one is not a number."""
    scale = other.double().abs().max().clamp(min=1e-30)
    found = ((one.double() - other.double()).abs().max() / scale).item()
    return math.inf if math.isnan(found) else found


def _names(run: Ran) -> str:
    return f"{len(run.outputs)} outputs and gradients of {', '.join(run.gradients) or 'nothing'}"


@contextmanager
def heard() -> Iterator[set[str]]:
    """Inside, the names of the engine's targets that compute anything, here or in a backward pass, are collected."""
    names: set[str] = set()

    def listening(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            names.add(name)
            return method(*arguments, **options)

        return call

    places: list[tuple[Any, str, str]] = [(reference, "forward", "reference")]
    places += [(target(name), method, name) for name in TARGETS for method in ("forward", "backward")]
    before = [(place, method, getattr(place, method), method in vars(place)) for place, method, _ in places]
    for place, method, name in places:
        setattr(place, method, listening(name, getattr(place, method)))
    try:
        yield names
    finally:
        for place, method, original, own in before:
            if own:
                setattr(place, method, original)
            else:
                delattr(place, method)


def noted(words: str, targets: set[str]) -> str:
    """The words, and what computed if it was not the kernels of the `cpu` target."""
    others = [name for name in TARGETS if name in targets and name != "cpu"]
    if not targets:
        return f"{words} (torch's operations)"
    return f"{words} ({', '.join(others)})" if others else words


class Case:
    """A module with fixed weights and a fixed input, and its plain run, which a row compares with."""

    def __init__(self, name: str, *, torchs: bool = False, dtype: torch.dtype = torch.float32) -> None:
        self.name, self.torchs = name, torchs
        kind = KINDS[name]
        self._make = kind.peer if torchs else kind.make
        self.is_cell = kind.group == "cells"
        torch.manual_seed(0)
        self.module = self._make().to(dtype)
        self.x = self.input(dtype=dtype)

    def input(self, steps: int = T, rows: int = B, dtype: torch.dtype = torch.float32) -> Tensor:
        """Numbers for x: [T, B, I], for a cell [B, I]."""
        shape = (rows, I) if self.is_cell else (steps, rows, I)
        return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(steps + rows))

    def double(self) -> Case:
        """The same in float64."""
        return Case(self.name, torchs=self.torchs, dtype=torch.float64)

    def another(self, seed: int = 1) -> torch.nn.Module:
        """A module of the same kind with other weights."""
        torch.manual_seed(seed)
        return self._make().to(self.x.dtype)

    def copy(self) -> Any:
        """A copy of the module, to be changed."""
        return copy.deepcopy(self.module)

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The module's parameters by name."""
        return dict(self.module.named_parameters())

    @cached_property
    def plain(self) -> Ran:
        """The run that all others are compared with."""
        return ran(self.module, self.x, self.parameters)

    def same(
        self,
        call: Any,
        *,
        wanted: Mapping[str, Tensor] | None = None,
        expected: Ran | None = None,
        tolerance: float = 1e-5,
        gradients: bool = True,
        x: Tensor | None = None,
    ) -> str:
        """How a run of `call` on x compares with the plain one, or with `expected`, in words.

        The gradients compared are those of x and of `wanted`: the parameters of `call`, or of the case's module.
        """
        plain = expected or self.plain
        if wanted is None:
            wanted = dict(call.named_parameters()) if isinstance(call, torch.nn.Module) else self.parameters
        with heard() as targets:
            found = ran(call, self.x if x is None else x, wanted, gradients=gradients)
        if not gradients:
            plain = Ran(plain.outputs, {})
        return noted(compared(found, plain, tolerance), targets)

    def elsewhere(self, steps: int = T + 3, rows: int = B - 1) -> tuple[Tensor, Ran]:
        """An input of other sizes than the plain run's, and the plain run on it."""
        x = self.input(steps, rows, self.x.dtype)
        return x, ran(self.module, x, self.parameters)


def worst_of(said: Sequence[str]) -> str:
    """Several outcomes of one row in one: the first that is wrong, else the one that promises least."""
    for words in said:
        if words.startswith("WRONG"):
            return words
    return next((words for words in said if not words.startswith("same bits")), said[0])


Try = Callable[[Case], str]


class Row(NamedTuple):
    """A feature of PyTorch and what tries it."""

    feature: str
    run: Try
    slow: bool
    """Left out of a quick run."""
    only: str | None
    """The group that the feature is for, "layers" for all but cells; None for every group."""


class Rows(list[Row]):
    """The rows of one part of the table."""

    def __init__(self, title: str) -> None:
        super().__init__()
        self.title = title

    def row(self, feature: str, *, slow: bool = False, only: str | None = None) -> Callable[[Try], Try]:
        """Add the decorated function as the row of a feature."""

        def add(run: Try) -> Try:
            self.append(Row(feature, run, slow, only))
            return run

        return add
