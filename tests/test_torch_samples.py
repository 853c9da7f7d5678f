"""Torch's own tests of its six recurrent modules, with ours in their place: its samples, its errors, gradient checks.

The samples are those of `module_db` in torch.testing, and most of what is asserted about each is what torch's own
test_modules.py asserts: the reference that comes with it, factory arguments, pickles, copies, strides.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from agreement import assert_agree, tensors_in
from torch import Tensor

import throughtime as tt

OURS: dict[str, Any] = {name: getattr(tt.nn, name) for name in ("RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell")}
KIND = {"device": "cpu", "dtype": torch.float64}

pytestmark = pytest.mark.filterwarnings(
    "ignore:LSTM with projections is not supported with oneDNN", "ignore::DeprecationWarning:torch"
)


@cache
def infos() -> dict[str, Any]:
    """torch's records of the six, by the name of the class."""
    script: Any = torch._C.ScriptFunction
    method: Any = torch._C.ScriptMethod
    calls = (script.__call__, method.__call__)
    from torch.testing._internal.common_modules import module_db

    # What importing torch's tests changes in the process is undone, for other tests run in it too.
    script.__call__, method.__call__ = calls
    vars(torch.backends)["__allow_nonbracketed_mutation_flag"] = True
    wanted = {getattr(torch.nn, name): name for name in OURS}
    return {wanted[info.module_cls]: info for info in module_db if info.module_cls in wanted}


def samples(name: str, training: bool, **options: Any) -> list[Any]:
    """Torch's samples of a module."""
    info = infos()[name]
    found: list[Any] = list(info.module_inputs_func(info, requires_grad=True, training=training, **KIND, **options))
    assert len(found) >= 2, "torch has samples of every one"
    return found


def made(kind: Any, sample: Any, training: bool) -> Any:
    """A module as the sample wants it, with the same values whatever its class."""
    torch.manual_seed(5)
    given = sample.constructor_input
    return kind(*given.args, **{**KIND, **given.kwargs}).train(training)


def packed(name: str, training: bool) -> Iterator[Any]:
    """The packed samples, which torch makes only when asked."""
    if name in ("RNN", "GRU"):
        yield from samples(name, training, with_packed_sequence=True)
    else:
        yield from samples(name, training)


BOTH_MODES = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
ALL = pytest.mark.parametrize("name", OURS)


@ALL
@BOTH_MODES
def test_forward_is_torchs_and_the_samples_own_reference_agrees(name: str, training: bool) -> None:
    for sample in packed(name, training):
        theirs, ours = made(getattr(torch.nn, name), sample, training), made(OURS[name], sample, training)
        given = sample.forward_input
        output = ours(*given.args, **given.kwargs)
        assert_agree(output, theirs(*given.args, **given.kwargs), sample.desc)
        if sample.reference_fn is not None and not isinstance(given.args[0], torch.nn.utils.rnn.PackedSequence):
            reference = sample.reference_fn(ours, *given.args, **given.kwargs)
            assert_agree(output, reference, sample.desc)
        assert repr(ours) == repr(theirs)


@ALL
@BOTH_MODES
def test_factory_arguments_repr_pickles_and_copies(name: str, training: bool) -> None:
    for sample in samples(name, training):
        module = made(OURS[name], sample, training)
        assert {parameter.dtype for parameter in module.parameters()} == {torch.float64}
        given = sample.forward_input
        output = module(*given.args, **given.kwargs)
        stored = io.BytesIO()
        torch.save(module, stored)
        stored.seek(0)
        for again in (torch.load(stored, weights_only=False), copy.deepcopy(module)):
            assert type(again) is OURS[name]
            assert again.training is training
            assert_agree(again(*given.args, **given.kwargs), output)


@ALL
def test_on_the_meta_device_parameters_have_their_shapes_alone(name: str) -> None:
    for sample in samples(name, True):
        given = sample.constructor_input
        module = OURS[name](*given.args, **{**given.kwargs, "device": "meta"})
        assert all(parameter.is_meta for parameter in module.parameters())


@ALL
@BOTH_MODES
def test_inputs_of_any_strides_give_the_same(name: str, training: bool) -> None:
    for sample in samples(name, training):
        module = made(OURS[name], sample, training)
        given = sample.forward_input
        apart = spread(given.args)
        expected = module(*given.args, **given.kwargs)
        found = module(*apart, **given.kwargs)
        assert_agree(found, expected)
        assert_agree(
            torch.autograd.grad([o.square().sum() for o in tensors_in(found)], tensors_in(apart)),
            torch.autograd.grad([o.square().sum() for o in tensors_in(expected)], tensors_in(given.args)),
        )


def spread(value: Any) -> Any:
    """The same numbers, not one beside the other."""
    if isinstance(value, Tensor):
        wide = torch.zeros(*value.shape, 2, dtype=value.dtype)
        wide[..., 0] = value.detach()
        return wide[..., 0].requires_grad_()
    return tuple(spread(part) for part in value)


def function(module: Any, given: Any) -> tuple[Any, Tensor]:
    """The module as a function from all its tensors, in one row, to all its outputs, in one row; and the tensors.

    The checks project at random anyway, and one projection of everything costs a tenth of one for each tensor.
    """
    names = [name for name, _ in module.named_parameters()]
    tensors = [*tensors_in(given.args), *module.parameters()]

    def f(row: Tensor) -> Tensor:
        parts = row.split([tensor.numel() for tensor in tensors])
        rest = iter([part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)])
        arguments = rebuilt(given.args, rest)
        named = dict(zip(names, rest, strict=True))
        outputs = torch.func.functional_call(module, named, arguments, given.kwargs)
        return torch.cat([output.flatten() for output in tensors_in(outputs)])

    return f, torch.cat([tensor.detach().flatten() for tensor in tensors]).requires_grad_()


def rebuilt(value: Any, tensors: Iterator[Tensor]) -> Any:
    """The same structure on other tensors."""
    return next(tensors) if isinstance(value, Tensor) else tuple(rebuilt(part, tensors) for part in value)


@ALL
@BOTH_MODES
def test_gradcheck_and_gradgradcheck(name: str, training: bool) -> None:
    for sample in samples(name, training):
        f, row = function(made(OURS[name], sample, training), sample.forward_input)
        assert torch.autograd.gradcheck(f, row, fast_mode=True)
        assert torch.autograd.gradgradcheck(f, row, fast_mode=True)


@ALL
@BOTH_MODES
def test_every_error_sample_is_refused_in_torchs_words(name: str, training: bool) -> None:
    from torch.testing._internal.common_modules import ModuleErrorEnum

    info = infos()[name]
    found = list(info.module_error_inputs_func(info, requires_grad=False, training=training, **KIND))
    assert len(found) >= 4
    for error in found:
        given = error.module_error_input
        if error.error_on == ModuleErrorEnum.CONSTRUCTION_ERROR:
            with pytest.raises(error.error_type, match=error.error_regex):
                OURS[name](*given.constructor_input.args, **{**KIND, **given.constructor_input.kwargs})
            continue
        module = made(OURS[name], given, training)
        with pytest.raises(error.error_type, match=error.error_regex):
            module(*given.forward_input.args, **given.forward_input.kwargs)
