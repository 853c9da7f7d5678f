"""Rows of `features.py`: kinds of tensors, modes, devices and threads."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from feature_cases import B, Case, I, Ran, Rows, T, compared, heard, noted, ran, worst_of
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

TENSORS = Rows("Kinds of input")
MODES = Rows("Modes, devices and threads")


@TENSORS.row("strides: transposed, sliced, expanded; weights too")
def strided(case: Case) -> str:
    def apart(tensor: Tensor) -> Tensor:
        """The same numbers, each next to something else in memory."""
        return torch.stack([tensor, tensor + 1], -1)[..., 0]

    def turned(tensor: Tensor) -> Tensor:
        return tensor.mT.contiguous().mT if tensor.dim() > 1 else tensor

    def call(change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Any]:
        def run(x: Tensor) -> Any:
            weights = {name: change(parameter) for name, parameter in case.parameters.items()}
            return torch.func.functional_call(case.module, weights, (change(x),))

        return run

    row = case.x[..., :1, :].expand_as(case.x)
    expanded = compared(ran(case.module, row, {}, gradients=False), ran(case.module, row.clone(), {}, gradients=False))
    return worst_of([expanded, case.same(call(apart)), case.same(call(turned))])


@TENSORS.row("lazy negations and conjugates (`torch._neg_view`, `.conj().imag`)")
def lazy(case: Case) -> str:
    ways: list[Callable[[Tensor], Tensor]] = [
        lambda x: torch._neg_view(-x),
        lambda x: torch.complex(x, -x).conj().imag,
    ]
    return worst_of([case.same(lambda x, way=way: case.module(way(x))) for way in ways])


@TENSORS.row("`PackedSequence`", only="layers")
def packed(case: Case) -> str:
    from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

    lengths = torch.tensor([3, T, 1])

    def call(x: Tensor) -> Any:
        output, h_n = case.module(pack_padded_sequence(x, lengths, enforce_sorted=False))
        return pad_packed_sequence(output)[0], h_n

    if case.torchs:
        return case.same(call)
    expected = ran(lambda x: case.module(x, lengths=lengths), case.x, case.parameters)
    return f"{case.same(call, expected=expected)} as with `lengths=`"


@TENSORS.row("one sequence without a batch dimension; no sequences at all")
def unbatched(case: Case) -> str:
    x = case.x[..., 0, :]
    together = ran(case.module, x.unsqueeze(-2), case.parameters)
    outputs = [o.squeeze(-2) for o in together.outputs]
    expected = Ran(outputs, {**together.gradients, "x": together.gradients["x"].squeeze(-2)})
    words = case.same(case.module, x=x, expected=expected)
    none = tree_leaves(case.module(case.input(rows=0)))
    shapes = [tuple(o.shape) for o in none] == [(*o.shape[:-2], 0, o.shape[-1]) for o in case.plain.outputs]
    return words if shapes else "WRONG: other shapes without sequences"


class _Marked(Tensor):
    """A subclass that only has another name."""


@TENSORS.row("a subclass of `Tensor`")
def subclass(case: Case) -> str:
    def call(x: Tensor) -> Any:
        outputs = tree_leaves(case.module(x.as_subclass(_Marked)))
        kinds = {type(o) for o in outputs}
        if kinds != {_Marked}:
            seen.append("plain")
        return [o.as_subclass(Tensor) for o in outputs]

    seen: list[str] = []
    words = case.same(call)
    return f"{words}; gives {'plain tensors' if seen else 'the subclass'}"


@TENSORS.row("a wrapper subclass by `__torch_dispatch__` (`TwoTensor`)")
def wrapper(case: Case) -> str:
    from torch.testing._internal.two_tensor import TwoTensor

    plain = case.plain
    module = case.copy()
    x = TwoTensor(case.x.clone(), 2 * case.x).requires_grad_()
    with heard() as targets:
        outputs = tree_leaves(module(x))
        sum((o * o).sum() for o in outputs).backward()
    firsts = [o.a.detach() if isinstance(o, TwoTensor) else o.detach() for o in outputs]
    if not all(isinstance(o, TwoTensor) for o in outputs):
        return "WRONG: gives plain tensors"
    seconds = ran(case.module, 2 * case.x, {}, gradients=False).outputs
    found = Ran([*firsts, *(o.b.detach() for o in outputs)], {})
    return noted(compared(found, Ran([*plain.outputs, *seconds], {})), targets)


def _refused(case: Case, x: Any) -> str:
    outputs = tree_leaves(case.module(x))
    kinds = sorted({str(getattr(o, "layout", type(o).__name__)) for o in outputs})
    return f"gives {', '.join(kinds)}"


@TENSORS.row("a nested tensor (`torch.jagged`)")
def nested(case: Case) -> str:
    rows = [torch.randn(steps, I) for steps in (3, T, 1)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that nested tensors are a prototype
        return _refused(case, torch.nested.nested_tensor(rows, layout=torch.jagged))


@TENSORS.row("a sparse tensor")
def sparse(case: Case) -> str:
    return _refused(case, case.x.to_sparse())


@TENSORS.row("an MKL-DNN tensor")
def mkldnn(case: Case) -> str:
    if not torch.backends.mkldnn.is_available():
        return "not tried: torch has no MKL-DNN here"
    return _refused(case, case.x.to_mkldnn())


@TENSORS.row("a quantized tensor")
def quantized(case: Case) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        x = torch.quantize_per_tensor(case.x, 0.1, 0, torch.qint8)
    return _refused(case, x)


@TENSORS.row("another dtype than the weights': float64")
def other_dtype(case: Case) -> str:
    case.module(case.x.double())
    return "WRONG: computed something"


@TENSORS.row("integers")
def integers(case: Case) -> str:
    case.module(torch.ones_like(case.x, dtype=torch.long))
    return "WRONG: computed something"


@TENSORS.row("a complex module and input")
def complexes(case: Case) -> str:
    module = case.copy().to(torch.complex64)
    found = tree_leaves(module(case.x.to(torch.complex64)))
    return compared(Ran([o.real for o in found], {}), Ran(case.plain.outputs, {}))


@TENSORS.row("NaN and infinity in one sequence")
def not_a_number(case: Case) -> str:
    bad = case.x.clone()
    bad[..., 1, 0] = torch.nan
    found = tree_leaves(case.module(bad))
    others = [o[..., [0, 2], :].detach() for o in found]
    if not all(o[..., 1, :].isnan().all() for o in found):
        return "WRONG: NaN is lost"
    words = compared(Ran(others, {}), Ran([o[..., [0, 2], :] for o in case.plain.outputs], {}))
    return f"NaN in its outputs; the others: {words}"


# ---------------------------------------------------------------------------------------------------------------------
# modes


def _shapes(outputs: Any) -> list[tuple[int, ...]]:
    return [tuple(o.shape) for o in tree_leaves(outputs)]


@MODES.row("the meta device")
def meta(case: Case) -> str:
    found = case.copy().to("meta")(case.x.to("meta"))
    right = all(o.is_meta for o in tree_leaves(found)) and _shapes(found) == _shapes(case.plain.outputs)
    return "right shapes" if right else "WRONG: other shapes"


@MODES.row("`FakeTensorMode`")
def fake(case: Case) -> str:
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    with FakeTensorMode():
        module = case.another()
        x = torch.randn(case.x.shape, requires_grad=True)
        found = tree_leaves(module(x))
        sum(o.sum() for o in found).backward()
    kinds = all(isinstance(o, FakeTensor) for o in (*found, x.grad))
    right = kinds and _shapes(found) == _shapes(case.plain.outputs)
    return "right shapes" if right else "WRONG: other shapes"


class _Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        self.operations.append(str(function))
        return function(*arguments, **(options or {}))


@MODES.row("`TorchDispatchMode`")
def dispatch_mode(case: Case) -> str:
    def call(x: Tensor) -> Any:
        with seen:
            return case.module(x)

    seen = _Seen()
    words = case.same(call)
    ours = any(name.startswith("throughtime") for name in seen.operations)
    return f"{words}; sees {'one operation' if ours else 'torch operations' if seen.operations else 'nothing'}"


class _Called(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        self.count += 1
        return function(*arguments, **(options or {}))


@MODES.row("`TorchFunctionMode`; `torch.device` and `set_default_dtype` as a context")
def function_mode(case: Case) -> str:
    def watched(x: Tensor) -> Any:
        with _Called():
            return case.module(x)

    def placed(x: Tensor) -> Any:
        with torch.device("cpu"):
            return case.module(x)

    def typed(x: Tensor) -> Any:
        torch.set_default_dtype(torch.float64)
        try:
            return case.module(x)
        finally:
            torch.set_default_dtype(torch.float32)

    return worst_of([case.same(call) for call in (watched, placed, typed)])


@MODES.row("`torch.func.functionalize`")
def functionalize(case: Case) -> str:
    return case.same(lambda x: torch.func.functionalize(case.module)(x), gradients=False)


@MODES.row("`use_deterministic_algorithms(True)`")
def deterministic(case: Case) -> str:
    torch.use_deterministic_algorithms(True)
    return case.same(case.module)


@MODES.row("`torch.profiler`")
def profiler(case: Case) -> str:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        return case.same(case.module)


@MODES.row("`FlopCounterMode`")
def flops(case: Case) -> str:
    from torch.utils.flop_counter import FlopCounterMode

    weights = sum(p.numel() for name, p in case.parameters.items() if name.startswith("weight"))
    rows = B if case.is_cell else T * B
    with FlopCounterMode(display=False) as counter:
        case.module(case.x)
    counted = counter.get_total_flops()
    return f"counts {'the products' if counted == 2 * weights * rows else counted}"


@MODES.row("`set_num_threads`; several Python threads at once")
def threads(case: Case) -> str:
    plain = Ran(case.plain.outputs, {})
    before = torch.get_num_threads()
    said = []
    for count in (1, 2):
        torch.set_num_threads(count)
        said.append(case.same(case.module))
    torch.set_num_threads(before)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: ran(case.module, case.x, {}, gradients=False), range(16)))
    return worst_of([*said, *(compared(one, plain) for one in found)])


@MODES.row("a graph that is differentiated in another thread")
def other_thread(case: Case) -> str:
    from feature_cases import loss_of

    module = case.copy()
    x = case.x.clone().requires_grad_()
    outputs = tree_leaves(module(x))
    with ThreadPoolExecutor(1) as pool:
        pool.submit(loss_of(outputs).backward).result()
    gradients = {"x": x.grad, **{name: p.grad for name, p in module.named_parameters()}}
    found = Ran([o.detach() for o in outputs], {name: g for name, g in gradients.items() if g is not None})
    return compared(found, case.plain)


NOT_HERE = "not tried: no such device here"


def _on(case: Case, device: str) -> str:
    found = ran(case.copy().to(device), case.x.to(device), {}, gradients=False)
    outputs = tree_map_only(Tensor, lambda tensor: tensor.cpu(), found.outputs)
    return compared(Ran(outputs, {}), Ran(case.plain.outputs, {}), tolerance=1e-3)


@MODES.row("CUDA")
def cuda(case: Case) -> str:
    return _on(case, "cuda") if torch.cuda.is_available() else NOT_HERE


@MODES.row("CUDA graphs (`make_graphed_callables`)")
def cuda_graphs(case: Case) -> str:
    if not torch.cuda.is_available():
        return NOT_HERE
    module = case.copy().cuda()
    graphed = torch.cuda.make_graphed_callables(module, (case.x.cuda(),))
    found = [o.detach().cpu() for o in tree_leaves(graphed(case.x.cuda()))]
    return compared(Ran(found, {}), Ran(case.plain.outputs, {}), tolerance=1e-3)


@MODES.row("MPS, XPU")
def others(case: Case) -> str:
    for device in ("mps", "xpu"):
        if getattr(torch, device).is_available():
            return f"{device}: {_on(case, device)}"
    return NOT_HERE
