"""torch.nn's recurrent modules made throughtime's in a model that exists, and back: `upgrade` and `restore`."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch.nn.utils import parametrize

from throughtime.errors import ThroughtimeError
from throughtime.nn.cells import GRUCell, LSTMCell, RNNCell, StepModule
from throughtime.nn.drop_in import GRU, LSTM, RNN
from throughtime.nn.recurrent import Layer
from throughtime.nn.scripting import forget

Class = type[torch.nn.Module]

_OURS: dict[Class, Class] = {
    torch.nn.RNN: RNN,
    torch.nn.LSTM: LSTM,
    torch.nn.GRU: GRU,
    torch.nn.RNNCell: RNNCell,
    torch.nn.LSTMCell: LSTMCell,
    torch.nn.GRUCell: GRUCell,
}
_TORCHS: dict[Class, Class] = {ours: torchs for torchs, ours in _OURS.items()}
_NAMES = {torchs.__name__ for torchs in _OURS}

_MARK = "_upgraded"
"""Set in a module that `upgrade` changed, so that `restore` knows it from one that was made as throughtime's."""

_ADDED = (_MARK, "target", "_segments")
"""What a module's own attributes may hold more once it is throughtime's."""


class Replaced(NamedTuple):
    """A module that has another class now: its name in the model ("" for the model itself), the classes' names."""

    name: str
    before: str
    after: str


class Left(NamedTuple):
    """A recurrent module that is as it was: its name in the model, its class's name, and why."""

    name: str
    kind: str
    reason: str


@dataclass(frozen=True)
class Upgrade:
    """What `upgrade`, or `restore`, did to a model; printed, a table.

    A module that stands in several places of the model is listed once, at the first of them.
    """

    model: torch.nn.Module = field(repr=False)
    replaced: tuple[Replaced, ...]
    left: tuple[Left, ...]

    def __str__(self) -> str:
        if not self.replaced and not self.left:
            return "nothing to replace"
        width = max(len(name or _ITSELF) for name, *_ in (*self.replaced, *self.left))
        lines = [f"replaced: {len(self.replaced)}"]
        lines += [f"  {row.name or _ITSELF:<{width}}  {row.before} -> {row.after}" for row in self.replaced]
        if self.left:
            lines.append(f"left as it is: {len(self.left)}")
            lines += [f"  {row.name or _ITSELF:<{width}}  {row.kind}: {row.reason}" for row in self.left]
        return "\n".join(lines)


_ITSELF = "(the model)"


def upgrade(model: torch.nn.Module, *, verbose: bool = False) -> Upgrade:
    """Make every torch.nn.RNN, LSTM, GRU, RNNCell, LSTMCell and GRUCell in a model throughtime's, in place.

    Each module stays the same object and so do its parameters: hooks, parametrizations, tied weights, optimisers,
    devices, dtypes, the training flag, and what `torch.compile` or DistributedDataParallel wrapped stay as they are.

    Returns what was replaced, and what was left and why, and prints it if `verbose`. What is left may compute something
    else than torch's classes: a subclass, a module whose forward was replaced, a scripted or a quantized one. Each is
    also named in a warning. `restore` undoes it. Raises ThroughtimeError for what is no module.
    """
    _check(model, "upgrade")
    replaced, left = [], []
    for name, module in model.named_modules():
        base = _unparametrized(type(module))
        if reason := _reason_to_leave(module):
            left.append(Left(name, _title(module), reason))
        elif base in _OURS:
            before = _title(module)
            vars(module)[_MARK] = True
            module.__class__ = _with_base(type(module), _OURS[base])
            replaced.append(Replaced(name, before, _title(module)))
    report = Upgrade(model, tuple(replaced), tuple(left))
    for row in report.left:
        warnings.warn(f"{row.name or 'the model'} is left as it is: {row.kind}: {row.reason}", stacklevel=2)
    if verbose:
        print(report)
    return report


def restore(model: torch.nn.Module, *, verbose: bool = False) -> Upgrade:
    """Undo `upgrade`: every module that it changed has torch's class again, and none of throughtime's attributes.

    Parameters, and all that is named in `upgrade`, stay as they are. What `segments` or `target` were set to is gone.
    Layers that were made as throughtime's, by no `upgrade`, are left and listed. Returns what was done, and prints it
    if `verbose`. Raises ThroughtimeError for what is no module.
    """
    _check(model, "restore")
    replaced, left = [], []
    for name, module in model.named_modules():
        base = _unparametrized(type(module))
        if base in _TORCHS and vars(module).get(_MARK):
            before = _title(module)
            forget(vars(module))
            for attribute in _ADDED:
                vars(module).pop(attribute, None)
            module.__class__ = _with_base(type(module), _TORCHS[base])
            replaced.append(Replaced(name, before, _title(module)))
        elif isinstance(module, Layer | StepModule):
            left.append(Left(name, _title(module), "it was made as throughtime's, and upgrade changed nothing in it"))
    report = Upgrade(model, tuple(replaced), tuple(left))
    if verbose:
        print(report)
    return report


def _check(model: object, caller: str) -> None:
    if not isinstance(model, torch.nn.Module):
        raise ThroughtimeError(f"{caller} takes a model, a torch.nn.Module, not {type(model).__name__}")


def _reason_to_leave(module: torch.nn.Module) -> str | None:
    """Why a module that may be recurrent stays torch's, or whoever's; None for what is to be replaced or is neither."""
    kind = type(module)
    if isinstance(module, torch.jit.ScriptModule):
        scripted = getattr(module, "original_name", None) in _NAMES
        return "it is scripted, a program that cannot change" if scripted else None
    if kind.__module__.startswith("torch.ao.") and kind.__name__ in _NAMES:
        return "it is quantized, and its weights are not the tensors that throughtime reads"
    recurrent = isinstance(module, torch.nn.RNNBase | torch.nn.RNNCellBase)
    if not recurrent or isinstance(module, Layer | StepModule):
        return None
    if _unparametrized(kind) not in _OURS:
        base = next((base for base in kind.__mro__ if base in _OURS), None)
        return (
            f"a subclass of {_name(base or torch.nn.RNNBase)} may compute something else; if it does not, let it "
            f"inherit from {_name(_OURS[base]) if base else 'one of throughtime.nn'} instead"
        )
    if "forward" in vars(module):
        return "its forward was replaced on the module itself, and may compute something else"
    if taken := sorted(vars(module).keys() & {*_ADDED, "segments", "cell", "stream"}):
        return f"it has an attribute {taken[0]} of its own, which means something else in throughtime's"
    return None


def _unparametrized(kind: Class) -> Class:
    """The class below the one that torch.nn.utils.parametrize makes for a module whose tensors are parametrized."""
    base: Class = kind.__bases__[0]
    made = kind.__module__ == parametrize.__name__ and kind.__name__ == f"Parametrized{base.__name__}"
    return base if made else kind


def _with_base(kind: Class, base: Class) -> Class:
    """`base`, under the same parametrizations as in `kind`.

    Such a class is made anew, not changed: copies of a module share it.
    """
    if _unparametrized(kind) is kind:
        return base
    body = {name: value for name, value in vars(kind).items() if name != "_before"}
    before = vars(kind).get("_before")
    if before is not None and before.__base__ is base and _properties(before) == _properties(kind):
        return before
    return type(f"Parametrized{base.__name__}", (base,), {**body, "_before": kind})


def _properties(kind: Class) -> set[str]:
    return {name for name, value in vars(kind).items() if isinstance(value, property)}


def _title(module: torch.nn.Module) -> str:
    if isinstance(module, torch.jit.ScriptModule):
        return f"{getattr(module, 'original_name', type(module).__name__)}, scripted"
    base = _unparametrized(type(module))
    return _name(base) if base is type(module) else f"{_name(base)}, parametrized"


def _name(kind: Class) -> str:
    """How a user spells a class: `torch.nn.GRU`, `throughtime.nn.GRU`, or the name of a class of one's own."""
    if kind in _OURS or kind is torch.nn.RNNBase:
        return f"torch.nn.{kind.__name__}"
    if kind in _TORCHS:
        return f"throughtime.nn.{kind.__name__}"
    return f"{kind.__module__}.{kind.__qualname__}" if kind.__module__.startswith("torch.") else kind.__qualname__
