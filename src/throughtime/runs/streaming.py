"""A model that is asked step by step: many sequences at once, a line of JSON in and a line of JSON out."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, BinaryIO, Literal, NamedTuple, TypeGuard

from throughtime.errors import DataError, ThroughtimeError
from throughtime.nn.layout import State
from throughtime.tasks.encoding import Encoder
from throughtime.tasks.model import SequenceModel

LONGEST_LINE = 2**20
"""Bytes of one line; a longer one is refused without being kept."""


class Streams:
    """Many sequences at once, each a step at a time: a state for every id, and a line of JSON for every line of JSON.

    A line is `{"id": "a", "x": [0.5, 1.2]}` or, with the names of the columns, `{"id": "a", "x": {"pitch": 0.5, "gain":
    1.2}}`; its answer is `{"id": "a", "step": 1, "label": ..., "probabilities": {...}}`, what the sequence would get if
    it ended there. `{"id": "a", "end": true}` forgets an id. A line that cannot be answered gets `{"line": 3,
    "id": "a", "error": ...}` and leaves every state as it was. A step costs the same however many went before it.

    States are kept until they end, or, with `most`, for so many ids: beyond that, a new id is refused, or with
    `when_full="forget"` takes the place of the one that was silent for longest, which its answer names. Raises
    ThroughtimeError for a model that reads both ways.
    """

    def __init__(
        self,
        model: SequenceModel,
        encoder: Encoder,
        *,
        most: int | None = None,
        when_full: Literal["refuse", "forget"] = "refuse",
    ) -> None:
        if model.architecture.bidirectional:
            raise ThroughtimeError(
                "this model is bidirectional: it reads a sequence from its end too, so it cannot answer before the end;"
                " use predict, or train without --bidirectional"
            )
        self.encoder, self.most, self.when_full = encoder, most, when_full
        self._model = model.stream()  # one for all: it takes up the state of whoever is next
        self._beginning = _Sequence(self._model.state, 0)
        self._open: OrderedDict[str | int, _Sequence] = OrderedDict()  # the one silent for longest comes first
        self._line = 0

    def __len__(self) -> int:
        return len(self._open)

    @property
    def state_bytes(self) -> int:
        """Bytes of one sequence's state, what Python adds to them aside."""
        return sum(tensor.nbytes for tensor in self._model.state_dict().values())

    def answer(self, line: bytes) -> bytes | None:
        """The answer to a line, as a line; None to a blank one."""
        self._line += 1
        asked: dict[str, Any] = {}
        try:
            if not line.strip():
                return None
            asked = _object(line)
            said = self._answer(asked)
        except ThroughtimeError as error:
            said = {"line": self._line, **_id_of(asked), "error": str(error)}
        return json.dumps(said, ensure_ascii=False, allow_nan=False).encode() + b"\n"

    def refuse(self, problem: str) -> bytes:
        """The answer to a line that is not even looked at."""
        self._line += 1
        return json.dumps({"line": self._line, "error": problem}).encode() + b"\n"

    def _answer(self, asked: dict[str, Any]) -> dict[str, Any]:
        name = asked.get("id")
        if not _is_id(name):
            raise DataError('a line needs an "id", a text or a whole number')
        strange = next((key for key in asked if key not in ("id", "x", "end")), None)
        if strange is not None:
            raise DataError(f'{strange!r} is not an entry of a line, which are "id", "x" and "end"; remove it')
        if "end" in asked:
            return self._end(name, asked)
        if not isinstance(asked.get("x"), list | dict):
            raise DataError('a line needs an "x", the list of a step\'s values or an object with their names')
        return self._step(name, asked["x"])

    def _end(self, name: str | int, asked: dict[str, Any]) -> dict[str, Any]:
        if asked["end"] is not True or "x" in asked:
            raise DataError('"end" is true, in a line without "x"')
        if name not in self._open:
            raise DataError(f"there is no sequence {name!r} to end")
        return {"id": name, "step": self._open.pop(name).steps, "end": True}

    def _step(self, name: str | int, x: Any) -> dict[str, Any]:
        is_new = name not in self._open
        if is_new and len(self._open) == self.most and self.when_full == "refuse":
            raise DataError(f"{self.most} sequences are open, as many as were allowed; end one of them first")
        numbers, symbols = self.encoder.step(x)
        before = self._open.get(name, self._beginning)
        self._model.state = before.state
        answer = self.encoder.task.answer(self._model.step(numbers, symbols), self.encoder.codec)
        if not answer.is_finite:
            raise DataError(
                "the answer is not a number; see whether the values are far from those of the training data"
            )
        forgotten = {}
        if is_new and len(self._open) == self.most:
            forgotten = {"forgotten": self._open.popitem(last=False)[0]}
        self._open[name] = _Sequence(self._model.state, before.steps + 1)
        self._open.move_to_end(name)
        unknown = [
            column for column, number in zip(self.encoder.symbol_columns, symbols.tolist(), strict=True) if not number
        ]
        return {
            "id": name,
            "step": before.steps + 1,
            **answer.record(),
            **({"unknown": unknown} if unknown else {}),
            **forgotten,
        }


class _Sequence(NamedTuple):
    """An open sequence: its state, and how many steps it has read."""

    state: State
    steps: int


def serve(streams: Streams, incoming: BinaryIO, outgoing: BinaryIO) -> None:
    """Answer line by line until the input ends; each answer is sent before the next line is read."""
    while line := incoming.readline(LONGEST_LINE + 1):
        if len(line) > LONGEST_LINE:
            while line and not line.endswith(b"\n"):
                line = incoming.readline(LONGEST_LINE)
            answer: bytes | None = streams.refuse(
                f"the line is longer than {LONGEST_LINE:,} bytes; give one step a line"
            )
        else:
            answer = streams.answer(line)
        if answer is not None:
            outgoing.write(answer)
            outgoing.flush()


def _object(line: bytes) -> dict[str, Any]:
    """The JSON object of a line. Raises DataError for anything else, for NaN and for an entry given twice."""
    try:
        asked = json.loads(line.decode(), parse_constant=_no_constant, object_pairs_hook=_each_once)
    except UnicodeDecodeError as error:
        raise DataError("the line is not UTF-8 text") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"the line is not JSON ({error})") from error
    if not isinstance(asked, dict):
        raise DataError('the line is not a JSON object such as {"id": "a", "x": [0.5, 1.2]}')
    return asked


def _no_constant(name: str) -> float:
    raise DataError(f"{name} is not a finite number")


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        raise DataError("an entry is given twice")
    return entries


def _id_of(asked: Mapping[str, Any]) -> dict[str, Any]:
    return {"id": asked["id"]} if _is_id(asked.get("id")) else {}


def _is_id(name: object) -> TypeGuard[str | int]:
    """Text that can be written again (JSON can spell half a character), or a whole number; 1 and "1" are two ids."""
    if isinstance(name, str):
        return not any("\ud800" <= letter <= "\udfff" for letter in name)
    return type(name) is int
