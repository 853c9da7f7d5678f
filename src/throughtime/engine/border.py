"""The border between torch and code that takes addresses.

A kernel believes an address and the sizes that it was made for. So nothing passes here but plain memory: a dense CPU
tensor, with no lazy bit that torch would still have to resolve, whose storage holds all that its sizes and strides say.
The shapes themselves are the problem's own business (`Problem.check`), on every target.

What does not pass may still be right elsewhere: torch's dispatcher knows how to resolve lazy negations and zeros, and
what fake tensors, subclasses and modes want to see. `recurrence.run` tries that; see `Unaddressable`.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from throughtime.errors import TargetError

_PLAIN = frozenset({Tensor, torch.nn.Parameter, torch.nn.Buffer})
"""The classes of tensors that are nothing more than their memory; subclasses may be anything."""


class Unaddressable(TargetError):
    """A tensor that is no plain memory: a kernel cannot read it, though torch itself might know what it stands for."""


def check(tensors: Iterable[Tensor | None], dtype: torch.dtype) -> None:
    """Let these tensors of one dtype pass, or raise Unaddressable; None passes.

    Raises TargetError for a tensor whose memory is gone or too small: reading that would be wrong on every target.
    """
    for tensor in tensors:
        if tensor is None:
            continue
        try:
            storage = tensor.untyped_storage()
            if (
                tensor.__class__ in _PLAIN
                and tensor.dtype is dtype
                and tensor.is_cpu
                and not tensor.is_neg()
                and tensor.is_contiguous()
                and tensor.data_ptr() + tensor.nbytes <= storage.data_ptr() + storage.nbytes()
                and storage.data_ptr()
            ):
                continue
        except (RuntimeError, NotImplementedError) as error:
            raise Unaddressable(f"a tensor has no memory that a kernel could read ({_first_line(error)})") from error
        _look_closely(tensor, storage, dtype)


def _look_closely(tensor: Tensor, storage: torch.UntypedStorage, dtype: torch.dtype) -> None:
    """The same for what is not contiguous, holds nothing or is odd: slower, and with a reason."""
    kind = f"{type(tensor).__name__} of shape {list(tensor.shape)}"
    if type(tensor) not in _PLAIN:
        raise Unaddressable(f"a {kind} is a subclass of torch's tensors, which may mean something else by its memory")
    if tensor.dtype != dtype or tensor.device.type != "cpu" or tensor.layout != torch.strided:
        raise Unaddressable(
            f"a {kind} is {tensor.dtype}, {tensor.layout}, on {tensor.device}; kernels run on {dtype}, strided, on cpu"
        )
    if tensor.is_neg() or tensor._is_zerotensor():
        raise Unaddressable(f"a {kind} is lazy: a negation or zeros that torch has not written down yet")
    if any(bit in str(torch._C._dispatch_keys(tensor)) for bit in _WRAPPED):
        raise Unaddressable(f"a {kind} is wrapped by a transform of torch's that is at work")
    if tensor.numel() == 0:
        return
    last = tensor.storage_offset() + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    if storage.data_ptr() == 0 or (last + 1) * tensor.element_size() > storage.nbytes():
        raise TargetError(
            f"a tensor of shape {list(tensor.shape)} needs {(last + 1) * tensor.element_size()} bytes, but its "
            f"storage has {storage.nbytes() if storage.data_ptr() else 0}: it was resized or freed; give a tensor "
            "that owns its memory (sharded models: gather the weights before the layer runs)"
        )


_WRAPPED = ("Functionalize", "FuncTorch", "Batched", "Python")


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__


def written_down(tensor: Tensor) -> Tensor:
    """What a lazy tensor stands for, as plain memory; any other tensor as it is."""
    lazy = tensor.__class__ in _PLAIN and (tensor.is_neg() or tensor.is_conj() or tensor._is_zerotensor())
    if not lazy:
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def modes_are_watching() -> bool:
    """Whether a `TorchDispatchMode` is active, which must be shown an operation and not the kernels beneath."""
    return bool(torch._C._len_torch_dispatch_stack())
