"""How tests compare tensors, and what a layer's run and its gradients are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

SHARE = {torch.float32: 1e-5, torch.float64: 1e-10}
"""How far two results may lie apart, as a share of the tensor's largest entry."""


def assert_agree(actual: Any, expected: Any, what: str = "the result") -> None:
    """The same structure and shapes, and every entry within `SHARE` of the expected tensor's largest."""
    if isinstance(expected, PackedSequence):
        assert isinstance(actual, PackedSequence), what
        actual, expected = tuple(actual), tuple(expected)
    if isinstance(expected, Mapping):
        assert list(actual) == list(expected), what
        for key in expected:
            assert_agree(actual[key], expected[key], f"{what}, {key}")
    elif isinstance(expected, Tensor):
        assert isinstance(actual, Tensor), f"{what} is {type(actual).__name__}"
        assert actual.shape == expected.shape, f"{what}: {list(actual.shape)}, not {list(expected.shape)}"
        assert actual.dtype == expected.dtype, f"{what}: {actual.dtype}, not {expected.dtype}"
        if expected.numel():
            scale = expected.abs().max().item() or 1.0
            apart = (actual.double() - expected.double()).abs().max().item() / scale
            assert apart <= SHARE.get(expected.dtype, 0.0), f"{what}: {apart:.1e} of the largest entry apart"
    elif isinstance(expected, Sequence):
        assert len(actual) == len(expected), what
        for place, pair in enumerate(zip(actual, expected, strict=True)):
            assert_agree(*pair, f"{what}[{place}]")
    else:
        assert actual is None, what
        assert expected is None, what


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors of an output or a state, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, PackedSequence):
        return [value.data]
    return [tensor for part in value for tensor in tensors_in(part)]


def run_with_gradients(
    layer: torch.nn.Module, *inputs: Any, call: Callable[..., Any] | None = None
) -> tuple[Any, dict[str, Tensor | None]]:
    """What the layer returns, and the gradients, by name, of a fixed weighting of all of it."""
    result = (layer if call is None else call)(*inputs)
    outputs = tensors_in(result)
    generator = torch.Generator().manual_seed(7)
    loss = sum((o * torch.randn(o.shape, generator=generator, dtype=o.dtype)).sum() for o in outputs)
    named: dict[str, Tensor] = dict(layer.named_parameters())
    for i, value in enumerate(inputs):
        leaves = [t for t in tensors_in(value if value is not None else []) if t.requires_grad]
        named |= {f"input {i}.{j}": leaf for j, leaf in enumerate(leaves)}
    assert isinstance(loss, Tensor)
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return result, dict(zip(named, found, strict=True))


_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def same_bits(actual: Tensor, expected: Tensor, what: str = "") -> None:
    """Bit for bit, the sign of zeros included."""
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype), what
    kind = _INTEGERS[actual.element_size()]
    assert torch.equal(actual.contiguous().view(kind), expected.contiguous().view(kind)), what
