"""Truncated back-propagation through time: long streams in windows, the state carried from window to window.

What it computes is not the gradient of the whole: nothing reaches back over the edge of a window (Williams & Peng 1990,
Neural Computation 2). Where the gradient must be exact and memory is short, use a layer's `segments` instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from throughtime.errors import ShapeError, ThroughtimeError
from throughtime.nn.dropout import Masks
from throughtime.nn.layout import Lengths, State, listed


@dataclass(frozen=True)
class Window:
    """One window of a batch of streams: steps `first_step` and after of the streams numbered `rows`.

    rows [b] int64; first_step: the same for all of them; lengths: how many steps of each row the window holds, each
    from 1 to the windows' `steps`; state: the state to begin in, detached, or None where the streams begin.
    """

    rows: Tensor
    first_step: int
    lengths: tuple[int, ...]
    state: State | None

    def cut(self, values: Tensor | Sequence[Tensor]) -> Tensor:
        """The window's part of what the streams hold: [k, b, ...], zero past the end of a stream.

        `values` is a tensor [T, streams, ...] or one tensor [length, ...] for each stream. Raises ShapeError where it
        holds fewer steps than the streams were said to have.
        """
        parts = []
        for row, length in zip(self.rows.tolist(), self.lengths, strict=True):
            stream = values[:, row] if isinstance(values, Tensor) else values[row]
            if len(stream) < self.first_step + length:
                raise ShapeError(
                    f"stream {row} holds {len(stream)} steps, and this window reaches to step "
                    f"{self.first_step + length}; give the lengths that the streams have"
                )
            parts.append(stream[self.first_step : self.first_step + length])
        return torch.nn.utils.rnn.pad_sequence(parts)

    def masks(self, seed: int) -> Masks:
        """Dropout masks by stream and absolute step: those of the whole streams, however they are cut and shuffled."""
        return Masks(seed, self.first_step, self.rows)


class Windows:
    """Streams of given lengths, cut into windows of `steps` steps, `batch_size` streams at a time.

    Iterating goes through the windows of one epoch: first every stream's first window, then every second, and so on;
    the last window of a stream is as short as it comes. With `shuffle` the streams fall into other batches for each
    window: a state belongs to its stream, not to a place in a batch. A window is run from its `state`, and the state
    that it ends in is handed to `carry`:

        for window in windows:
            output, state = layer(window.cut(x), window.state, lengths=window.lengths)
            ...
            windows.carry(window, state)

    `state_dict` says where it stands, with every stream's state, in plain tensors; after `load_state_dict` iterating
    goes on from there. When the last window is carried the epoch is over: the states are forgotten, and the next
    iteration begins a new one. `seed` and the epoch decide the order.

    Raises ShapeError for lengths or a seed that are no whole numbers from 0, or steps or a batch size that are none
    from 1.
    """

    def __init__(
        self, lengths: Lengths, steps: int, *, batch_size: int | None = None, shuffle: bool = False, seed: int = 0
    ) -> None:
        numbers = {"steps": (steps, 1), "batch_size": (1 if batch_size is None else batch_size, 1), "seed": (seed, 0)}
        for name, (number, least) in numbers.items():
            if isinstance(number, bool) or not isinstance(number, int) or number < least:
                raise ShapeError(f"{name} is {number!r}; it must be a whole number from {least}")
        self.lengths = _read_lengths(lengths)
        self.steps = steps
        self.batch_size = batch_size or len(self.lengths)
        self.shuffle, self.seed = shuffle, seed
        self.epoch = 0
        self._done = 0
        self._open: Window | None = None
        self._states: list[Tensor] = []
        self._is_one = True

    def __len__(self) -> int:
        """How many windows an epoch has."""
        return len(self._batches())

    def _batches(self) -> list[tuple[int, list[int]]]:
        """Every window of this epoch: its number in its streams, and the streams."""
        batches = []
        for number in range(-(-max(self.lengths) // self.steps)):
            streams = [row for row, length in enumerate(self.lengths) if length > number * self.steps]
            if self.shuffle:
                order = np.random.default_rng([self.seed, self.epoch, number]).permutation(len(streams))
                streams = [streams[place] for place in order]
            for first in range(0, len(streams), self.batch_size):
                batches.append((number, streams[first : first + self.batch_size]))
        return batches

    def __iter__(self) -> Iterator[Window]:
        """The windows of this epoch that are still to be done."""
        batches, epoch = self._batches(), self.epoch
        while self.epoch == epoch and self._done < len(batches):
            self._open = window = self._window(*batches[self._done])
            yield window
            if self._open is window:
                raise ThroughtimeError(
                    "the last window was not carried on, and the next would begin in a stale state; call "
                    "windows.carry(window, state) with the state that the layer returned"
                )

    def _window(self, number: int, streams: list[int]) -> Window:
        rows, first = torch.tensor(streams), number * self.steps
        lengths = tuple(min(self.steps, self.lengths[row] - first) for row in streams)
        if number == 0:
            return Window(rows, first, lengths, None)
        states = tuple(state.index_select(1, rows.to(state.device)) for state in self._states)
        return Window(rows, first, lengths, states[0] if self._is_one else states)

    def carry(self, window: Window, state: State) -> None:
        """Keep the state that a window ended in, detached, for its streams' next windows; the window is then done.

        `state` is a tensor [layers, b, width] or a tuple of such, as a layer returns it. Raises ShapeError for another
        number of rows, and ThroughtimeError for a window that is not the one in hand.
        """
        if window is not self._open:
            raise ThroughtimeError(
                "this window is not the one in hand; carry each window once, before the next one is taken"
            )
        states = (state,) if isinstance(state, Tensor) else tuple(state)
        for one in states:
            if not isinstance(one, Tensor) or one.dim() < 2 or one.shape[1] != len(window.rows):
                found = f"of shape {list(one.shape)}" if isinstance(one, Tensor) else type(one).__name__
                raise ShapeError(
                    f"the state to carry is {found}, and the window has {len(window.rows)} rows; give h_n as the layer "
                    "returned it, [layers, b, width]"
                )
        self._is_one = isinstance(state, Tensor)
        with torch.no_grad():
            if not self._states:
                count = len(self.lengths)
                self._states = [one.new_zeros(one.shape[0], count, *one.shape[2:]) for one in states]
            for kept, one in zip(self._states, states, strict=True):
                kept.index_copy_(1, window.rows.to(kept.device), one.detach())
        self._open = None
        self._done += 1
        if self._done == len(self):
            self.epoch, self._done, self._states = self.epoch + 1, 0, []

    # saving

    def state_dict(self) -> dict[str, Tensor]:
        """Where it stands, and every stream's state: plain tensors. Windows that were not carried count as not done."""
        numbers = {"epoch": self.epoch, "done": self._done, "is_one": int(self._is_one), **self._settings()}
        found = {name: torch.tensor(value) for name, value in numbers.items()}
        return found | {f"state.{place}": state.clone() for place, state in enumerate(self._states)}

    def _settings(self) -> dict[str, int | list[int]]:
        """What decides the windows, by name."""
        return {
            "lengths": list(self.lengths),
            "steps": self.steps,
            "batch_size": self.batch_size,
            "shuffle": int(self.shuffle),
            "seed": self.seed,
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from where `state_dict` was taken.

        Raises ThroughtimeError, and changes nothing, for what other windows gave: other streams, sizes or order.
        """
        places = [f"state.{place}" for place in range(sum(name.startswith("state.") for name in state))]
        names = {"epoch", "done", "is_one", *self._settings(), *places}
        if set(state) != names:
            wrong = ", ".join(sorted(names ^ set(state)))
            raise ThroughtimeError(f"this is not what Windows.state_dict gave: {wrong}; load the file that holds it")
        for name, value in self._settings().items():
            if (saved := state[name].tolist()) != value:
                raise ThroughtimeError(
                    f"the saved windows have {name} {_short(saved)}, and these {_short(value)}; make them alike, or "
                    "begin anew"
                )
        self.epoch, self._done = int(state["epoch"]), int(state["done"])
        self._is_one = bool(state["is_one"])
        self._states = [state[name].clone() for name in places]
        self._open = None


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _read_lengths(lengths: Lengths) -> tuple[int, ...]:
    """The steps of each stream as plain numbers."""
    numbers = listed(lengths)
    if not numbers:
        raise ShapeError("lengths= is empty; give one length for each stream")
    for row, number in enumerate(numbers):
        if isinstance(number, bool) or not isinstance(number, int | np.integer) or number < 0:
            raise ShapeError(f"lengths[{row}] is {number!r}; a length is a whole number of steps from 0")
    return tuple(int(number) for number in numbers)
