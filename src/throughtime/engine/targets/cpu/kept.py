"""What a forward run left for the backward run: everything, or states at edges from which the rest is computed."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from throughtime.engine import memory
from throughtime.engine.problem import Problem, Result
from throughtime.engine.targets.cpu import segments
from throughtime.engine.targets.cpu.forward_setting import ForwardSetting
from throughtime.engine.targets.cpu.setting import Crew


@dataclass(frozen=True)
class Values:
    """What a forward run left of some steps: each state from `before` steps ahead of `first` on, what it saved."""

    histories: tuple[Tensor, ...]
    saved: tuple[Tensor, ...]
    first: int = 0
    before: int = 0


class Kept:
    """Every step's values, as the forward run kept them."""

    def __init__(self, problem: Problem, result: Result) -> None:
        self.result, self.output = result, problem.cell.output
        self.ranges = [(0, problem.steps)]

    def values(self, first: int, last: int) -> Values:
        """All of them."""
        others = len(self.result.states) - 1
        histories = list(self.result.workspace[:others])
        histories.insert(self.output, self.result.output)
        return Values(tuple(histories), self.result.workspace[others:])


class Again:
    """A segment's values, computed anew from the states before it."""

    def __init__(self, setting: ForwardSetting, problem: Problem, result: Result, crew: Crew) -> None:
        self.setting, self.result, self.crew = setting, result, crew
        self.output, self.reverse, self.steps = problem.cell.output, problem.reverse, problem.steps
        self.ranges = segments.ranges(problem.steps, setting.segment)[::-1]
        rows, dtype = problem.rows, problem.x.dtype
        widths = [setting.tiles[width] * setting.lanes for width in setting.cell.widths]
        self.histories = [memory.tensor((setting.segment + 1, rows, width), dtype) for width in widths]
        self.saved = [memory.tensor((setting.segment, rows, width), dtype) for width in setting.saved_widths()]
        setting.open(problem, crew)

    def values(self, first: int, last: int) -> Values:
        """The values of these phases. The state before them lies beside them: one step earlier in the run's time."""
        edge = last - first if self.reverse else 0
        number = first // self.setting.segment - 1
        if number >= 0:
            time = self.steps - first if self.reverse else first - 1
            edges = list(self.result.workspace)
            edges.insert(self.output, self.result.output)
            for i, (history, kept) in enumerate(zip(self.histories, edges, strict=True)):
                before = kept[time if i == self.output else number]
                history[edge, :, : before.shape[1]] = before
        start, before_start = (self.steps - last, 0) if self.reverse else (first, 1)
        self.setting.point(start, self.histories, self.saved, before_start)
        self.setting.walk(self.crew, first, last)
        return Values(tuple(self.histories), tuple(self.saved), start, before_start)
