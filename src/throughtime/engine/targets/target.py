"""What a target is: one way to run a recurrence, forward and back, over whole sequences and step by step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from throughtime.engine.problem import Problem, Result
from throughtime.equations.cell import Cell
from throughtime.errors import TargetError


class Spec(NamedTuple):
    """The shape and dtype of a tensor that is still to be made."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Stepper(Protocol):
    """A stack of layers with its states, for a fixed number of rows: what streams run on."""

    def step(self, x: Tensor) -> Tensor:
        """One step on plain rows x [B, I]; the output [B, width] (no B without a batch), a tensor of its own."""

    def step_with(self, x: Tensor, outside: Sequence[Tensor], reset: Tensor | None) -> Tensor:
        """A step with outside inputs [B, 1 or H], and rows [B] that return to their initial states before it."""

    def read(self) -> tuple[Tensor, ...]:
        """The states, [layers, B, width] each, copied, in the precision in which they are carried."""

    def write(self, states: Sequence[Tensor]) -> None:
        """Take over states of these shapes."""

    def beside(self, layers: Sequence[Problem], batched: bool) -> Stepper:
        """A stepper of the same layers and weights for another number of rows."""


class Target(ABC):
    """One way to run a recurrence.

    Its gradients come from `backward`, unless `by_autograd` says that autograd differentiates what `forward` does.
    """

    name: ClassVar[str]
    by_autograd: ClassVar[bool] = False
    obeys_segments: ClassVar[bool] = False
    """Whether `Problem.segments` bounds what is kept for the backward run; a target that keeps every step says so."""

    @abstractmethod
    def refusal(self, problem: Problem) -> str | None:
        """Why this target cannot run the problem, in words that fit after "because", or None."""

    @abstractmethod
    def forward(self, problem: Problem, save: bool = False) -> Result:
        """Run the recurrence; with `save`, the result's workspace is whatever `backward` wants to see again."""

    def workspace(self, problem: Problem) -> list[Spec]:
        """What the workspace that `forward` leaves with `save` will be, known before it runs."""
        return []

    def backward(
        self,
        problem: Problem,
        result: Result,
        d_output: Tensor | None,
        d_states: Sequence[Tensor | None],
        needs: Sequence[bool],
    ) -> tuple[Tensor | None, ...]:
        """The gradients of `problem.tensors`, None where `needs` says so; an incoming gradient of None is zero."""
        raise NotImplementedError(f"autograd differentiates the target {self.name}")

    def note(self, problem: Problem) -> str | None:
        """What a caller should know of a run here that differs from what was asked, or None."""
        return None

    def stepper(self, layers: Sequence[Problem], batched: bool) -> Stepper | None:
        """What takes single steps of these layers, prepared ahead; None where each step is a run of its own."""
        return None

    def listing(self, cell: Cell, assembly: bool = False) -> str:
        """The code that is generated for a step of a cell. Raises TargetError where none is."""
        raise TargetError(f"{self.name!r} generates no kernels to print; the target that does is cpu")
