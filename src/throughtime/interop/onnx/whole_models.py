"""A whole PyTorch model through torch's own exporter, and what it answers to inputs of other sizes."""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from throughtime.errors import InteropError
from throughtime.interop.onnx.check import SIZES, Case


def export_whole(
    model: nn.Module,
    path: Path,
    args: tuple[Any, ...] | None,
    dynamic_shapes: Any,
    others: Sequence[tuple[Any, ...]] | None,
    metadata: Mapping[str, str],
) -> Iterator[Case]:
    """Write the file with torch.onnx.export, and give inputs of other sizes with the model's answers to them.

    An example of three sequences becomes one of five by beginning again with the first, and one of one by leaving out
    the others, so that what stands in it stays valid; dimensions of one name, or without one, get sizes of their own.
    Raises InteropError where torch cannot export the model.
    """
    if args is None or dynamic_shapes is None:
        raise InteropError(
            "a model is exported by an example: give args=(x, ...) and dynamic_shapes=({0: 'steps', 1: 'batch'}, ...), "
            "which says for each of them what dimensions may have other sizes"
        )
    try:
        with quiet():
            program = torch.onnx.export(model, args, dynamo=True, dynamic_shapes=dynamic_shapes, verbose=False)
    except torch.onnx.errors.OnnxExporterError as error:
        lines = [line.strip() for line in str(error).splitlines() if "Error" in line]
        reason = lines[0] if lines else str(error).splitlines()[0]
        raise InteropError(f"torch.onnx.export cannot export {type(model).__name__}: {reason}") from error
    assert program is not None, "with dynamo=True there is a program"
    program.model.metadata_props.update(metadata)
    program.save(path, external_data=False)
    names = [str(value.name) for value in program.model.graph.inputs]
    answers = [str(value.name) for value in program.model.graph.outputs]
    found = _resized(model, args, dynamic_shapes) if others is None else _as_given(others)
    return (_case(model, where, given, names, answers) for where, given in found)


def _as_given(others: Sequence[tuple[Any, ...]]) -> Iterator[tuple[str, tuple[Any, ...]]]:
    for number, given in enumerate(others):
        sizes = [list(value.shape) for value in pytree.tree_leaves(given) if isinstance(value, Tensor)]
        yield f"others[{number}], of sizes {sizes}", given


def _case(model: nn.Module, where: str, args: tuple[Any, ...], names: list[str], answers: list[str]) -> Case:
    try:
        found = model(*args)
    except Exception as error:
        raise InteropError(
            f"the model itself fails at {where}, which was to be compared with: {error}; give dimensions that must "
            "agree one name, or inputs of other sizes as others="
        ) from error
    given, shown = (
        [value.detach().cpu().numpy() for value in pytree.tree_leaves(part) if isinstance(value, Tensor)]
        for part in (args, found)
    )
    return Case(where, dict(zip(names, given, strict=True)), dict(zip(answers, shown, strict=True)))


def _resized(model: nn.Module, args: Any, dynamic_shapes: Any) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """The example at three other sizes, and in words which."""
    free = _free(model, args, dynamic_shapes)
    kinds = list(dict.fromkeys(name for dims in free.values() for name in dims.values()))
    flat, form = pytree.tree_flatten(args)
    for number in range(3):
        resized, said = [], []
        for place, value in enumerate(flat):
            for axis, name in free.get(place, {}).items():
                size = _size(kinds.index(name), number, value.shape[axis])
                value = value.index_select(axis, torch.arange(size) % value.shape[axis])
                said.append(f"{name} {size}")
            resized.append(value)
        where = ", ".join(dict.fromkeys(said)) or "the example's own sizes"
        yield where, pytree.tree_unflatten(resized, form)


def _size(kind: int, number: int, example: int) -> int:
    """A size for a dimension: the first two kinds of dimensions take the pairs of `SIZES`, more take them in turn."""
    return [pair[kind % 2] for pair in SIZES if pair[kind % 2] != example][number]


def _free(model: nn.Module, args: Any, dynamic_shapes: Any) -> dict[int, dict[int, str]]:
    """For each tensor of the flattened example, its dimensions that may have other sizes, by name."""
    if isinstance(dynamic_shapes, Mapping):
        order = list(inspect.signature(model.forward).parameters)[: len(args)]
        dynamic_shapes = tuple(dynamic_shapes.get(name) for name in order)
    found: dict[int, dict[int, str]] = {}
    place = 0
    for number, (value, shape) in enumerate(zip(args, dynamic_shapes, strict=True)):
        for leaf, each in _pairs(value, shape):
            if isinstance(leaf, Tensor) and each:
                dims = dict(each) if isinstance(each, Mapping) else dict(enumerate(each))
                found[place] = {axis: _named(dim, number, axis) for axis, dim in dims.items() if _is_free(dim)}
            place += 1
    return found


def _pairs(value: Any, shape: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, tuple | list):
        for number, each in enumerate(value):
            yield from _pairs(each, None if shape is None else shape[number])
    elif isinstance(value, dict):
        for key, each in value.items():
            yield from _pairs(each, None if shape is None else shape[key])
    else:
        yield value, shape


def _is_free(dim: Any) -> bool:
    return dim is not None and not isinstance(dim, int) and dim is not torch.export.Dim.STATIC


def _named(dim: Any, number: int, axis: int) -> str:
    """A name that several dimensions share is one size; torch finds out by itself what else must agree."""
    if isinstance(dim, str):
        return dim
    name = getattr(dim, "__name__", "")
    return name or f"dimension {axis} of input {number}"


@contextmanager
def quiet() -> Iterator[None]:
    """Torch's exporter warns about itself, absent packages and what it does not fold; none of it is the caller's.

    Its errors come as exceptions.
    """
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
