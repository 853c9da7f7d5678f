"""Rows of `features.py`: copies and files, what hangs on a module, training in several processes."""

from __future__ import annotations

import copy
import io
import os
import pickle
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from feature_cases import Case, Ran, Rows, compared, heard, noted, ran, worst_of
from torch import Tensor
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils._pytree import tree_leaves

COPIES = Rows("Copies, files and conversions")
AROUND = Rows("Hooks, parametrizations and other weights")
SPREAD = Rows("Precision, processes and shards")


def processes() -> Any:
    """How children are started: forked from a clean process where the system can."""
    kinds = torch.multiprocessing.get_all_start_methods()
    return torch.multiprocessing.get_context("forkserver" if "forkserver" in kinds else "spawn")


def told_by(function: Callable[..., Any], *arguments: Any, count: int = 1) -> list[Any]:
    """What `function(pipe, rank, ...)` sends back from each of `count` processes."""
    children, ends = [], []
    for rank in range(count):
        here, there = processes().Pipe(duplex=False)
        child = processes().Process(target=function, args=(there, rank, *arguments))
        child.start()
        there.close()
        children.append(child)
        ends.append(here)
    try:
        return [end.recv() for end in ends]
    finally:
        for child in children:
            child.join()


# ---------------------------------------------------------------------------------------------------------------------
# copies


@COPIES.row("`state_dict`, `load_state_dict`, to and from torch's own where it has the equations")
def state_dict(case: Case) -> str:
    twins = [case.another()]
    twins[0].load_state_dict(case.module.state_dict())
    if not case.torchs and case.name != "Recurrent(own cell)":
        torchs = Case(case.name, torchs=True).another()
        torchs.load_state_dict(case.module.state_dict())
        twins.append(case.another())
        twins[1].load_state_dict(torchs.state_dict())
        theirs = compared(ran(torchs, case.x, dict(torchs.named_parameters())), case.plain)
        if theirs.startswith("WRONG"):
            return theirs
    return worst_of([case.same(twin) for twin in twins])


@COPIES.row("`copy.deepcopy`")
def deepcopy(case: Case) -> str:
    return case.same(copy.deepcopy(case.module))


@COPIES.row("`pickle`; `torch.save` and `torch.load` of a module")
def pickled(case: Case) -> str:
    file = io.BytesIO()
    torch.save(case.module, file)
    file.seek(0)
    twins = [pickle.loads(pickle.dumps(case.module)), torch.load(file, weights_only=False)]
    return worst_of([case.same(twin) for twin in twins])


@COPIES.row("`torch.save` of a `state_dict`, `torch.load(weights_only=True)`")
def weights_only(case: Case) -> str:
    file = io.BytesIO()
    torch.save(case.module.state_dict(), file)
    file.seek(0)
    twin = case.another()
    twin.load_state_dict(torch.load(file, weights_only=True))
    return case.same(twin)


@COPIES.row("`load_state_dict(assign=True)`; `to_empty` from the meta device, then `load_state_dict`")
def assigned(case: Case) -> str:
    said = []
    for empty in (False, True):
        twin = case.copy().to("meta")
        if empty:
            twin.to_empty(device="cpu")
        twin.load_state_dict(copy.deepcopy(case.module.state_dict()), assign=not empty)
        said.append(case.same(twin))
    return worst_of(said)


@COPIES.row("`.to(torch.float64)`")
def doubled(case: Case) -> str:
    return case.same(case.copy().double(), x=case.x.double())


def _rounded(case: Case, dtype: torch.dtype) -> str:
    low = case.copy().to(dtype)
    x = case.x.to(dtype)
    single = copy.deepcopy(low).float()
    expected = ran(single, x.float(), dict(single.named_parameters()))
    with heard() as targets:
        found = ran(low, x, dict(low.named_parameters()))
    once = Ran([o.to(dtype) for o in expected.outputs], {n: g.to(dtype) for n, g in expected.gradients.items()})
    words = compared(found, once, tolerance=8 * torch.finfo(dtype).eps)
    words = {
        "same bits": "float32's numbers, rounded once",
        "same to rounding": f"same to {str(dtype)[6:]}'s rounding",
    }.get(words, words)
    return noted(words, targets)


@COPIES.row("`.to(torch.bfloat16)`")
def bfloat16(case: Case) -> str:
    return _rounded(case, torch.bfloat16)


@COPIES.row("`.to(torch.float16)`")
def float16(case: Case) -> str:
    return _rounded(case, torch.float16)


@COPIES.row("conversion by swapping tensors (`torch.__future__.set_swap_module_params_on_conversion`)")
def swapped(case: Case) -> str:
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        return case.same(case.copy().double().float())
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def _answer(pipe: Any, rank: int, module: torch.nn.Module, x: Tensor) -> None:
    found = ran(module, x, dict(module.named_parameters()))
    pipe.send(([o.numpy() for o in found.outputs], {name: g.numpy() for name, g in found.gradients.items()}))


@COPIES.row("`share_memory`, `torch.multiprocessing`")
def shared(case: Case) -> str:
    module = case.copy().share_memory()
    ((outputs, gradients),) = told_by(_answer, module, case.x)
    found = Ran([torch.tensor(o) for o in outputs], {name: torch.tensor(g) for name, g in gradients.items()})
    return compared(found, case.plain)


@COPIES.row("a child of `os.fork` after use, as in a `DataLoader`'s workers")
def forked(case: Case) -> str:
    if not hasattr(os, "fork"):
        return "not tried: no fork on this system"
    expected = case.plain
    child = os.fork()
    if child == 0:
        found = compared(ran(case.module, case.x, {}, gradients=False), Ran(expected.outputs, {}))
        os._exit(0 if found == "same bits" else 1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return "same bits" if status == 0 else f"WRONG: the child ended with {status}"


# ---------------------------------------------------------------------------------------------------------------------
# around


@AROUND.row("forward and forward-pre hooks, on a module and global")
def forward_hooks(case: Case) -> str:
    module = case.copy()
    seen: list[str] = []

    def doubled(module: Any, given: tuple[Tensor, ...]) -> tuple[Tensor]:
        seen.append("pre")
        return (given[0] * 2,)

    module.register_forward_pre_hook(doubled)
    module.register_forward_hook(lambda m, given, output: seen.append("after"))
    handle = torch.nn.modules.module.register_module_forward_hook(lambda m, given, output: seen.append("global"))
    try:
        words = case.same(lambda x: module(x / 2), wanted=dict(module.named_parameters()))
    finally:
        handle.remove()
    return words if sorted(set(seen)) == ["after", "global", "pre"] else f"WRONG: only {seen} ran"


@AROUND.row("full backward hooks and backward-pre hooks")
def backward_hooks(case: Case) -> str:
    module = case.copy()
    seen: dict[str, Any] = {}
    module.register_full_backward_hook(lambda m, inputs, outputs: seen.update(inputs=inputs))
    module.register_full_backward_pre_hook(lambda m, outputs: seen.update(outputs=outputs))
    words = case.same(module)
    if seen.keys() != {"inputs", "outputs"}:
        return f"WRONG: only the hooks for {sorted(seen)} ran"
    right = torch.equal(seen["inputs"][0], case.plain.gradients["x"])
    return words if right else "WRONG: the hook saw another gradient of x"


@AROUND.row("hooks on parameters, `register_post_accumulate_grad_hook` among them")
def tensor_hooks(case: Case) -> str:
    module = case.copy()
    seen: list[str] = []
    for name, parameter in module.named_parameters():
        parameter.register_hook(lambda gradient, name=name: seen.append(name))
        parameter.register_post_accumulate_grad_hook(lambda p, name=name: seen.append(name))
    words = case.same(module)
    return words if len(seen) == 2 * len(case.parameters) else f"WRONG: {len(seen)} hooks ran"


@AROUND.row("weights tied to another module's; some of them frozen (`requires_grad_(False)`)")
def tied(case: Case) -> str:
    first, second = case.copy(), case.another()
    for name in case.parameters:
        setattr(second, name, getattr(first, name))
    words = case.same(second, wanted=dict(first.named_parameters()))
    frozen = case.copy()
    name = next(iter(case.parameters))
    getattr(frozen, name).requires_grad_(False)
    rest = {key: value for key, value in case.plain.gradients.items() if key != name}
    wanted = {key: value for key, value in frozen.named_parameters() if key != name}
    return worst_of([words, case.same(frozen, wanted=wanted, expected=Ran(case.plain.outputs, rest))])


@AROUND.row("a parameter's `.data` and `torch.nn.init` in place; `setattr` of a new `Parameter`")
def changed_in_place(case: Case) -> str:
    one, other = case.another(), case.another()
    case.module(case.x)
    for name, parameter in case.parameters.items():
        getattr(one, name).data.copy_(parameter.data)
        setattr(other, name, torch.nn.Parameter(parameter.detach().clone()))
    return worst_of([case.same(one), case.same(other)])


def _weights(module: torch.nn.Module, names: list[str]) -> dict[str, Tensor]:
    return {name: getattr(module, name) for name in names}


def _with_weights(case: Case, change: Callable[[Any, str], Any], name: str) -> str:
    """A module whose weight is computed, against the plain module run on the weight that comes out."""
    module = case.copy().eval()
    change(module, name)
    wanted = dict(module.named_parameters())
    weights = _weights(module, list(case.parameters))
    expected = ran(lambda x: torch.func.functional_call(case.module, weights, (x,)), case.x, wanted)
    return case.same(module, wanted=wanted, expected=expected)


def _recurrent_weight(case: Case) -> str:
    return next(name for name in case.parameters if name.startswith("weight_hh"))


class _Twice(torch.nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


@AROUND.row("`parametrize`: `weight_norm`, `spectral_norm`, `orthogonal`, one's own")
def parametrized(case: Case) -> str:
    name = _recurrent_weight(case)
    changes: list[Callable[[Any, str], Any]] = [
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        parametrizations.orthogonal,
        lambda module, name: parametrize.register_parametrization(module, name, _Twice()),
    ]
    return worst_of([_with_weights(case, change, name) for change in changes])


@AROUND.row("`torch.nn.utils.weight_norm` and `spectral_norm` (by hooks), `prune`")
def hooked_weights(case: Case) -> str:
    name = _recurrent_weight(case)
    changes: list[Callable[[Any, str], Any]] = [
        torch.nn.utils.weight_norm,
        torch.nn.utils.spectral_norm,
        lambda module, name: prune.l1_unstructured(module, name, amount=0.5),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch deprecates them; people have them
        return worst_of([_with_weights(case, change, name) for change in changes])


@AROUND.row("`torch.func.functional_call`")
def functional_call(case: Case) -> str:
    weights = {name: p.detach().clone().requires_grad_() for name, p in case.parameters.items()}
    return case.same(lambda x: torch.func.functional_call(case.another(), weights, (x,)), wanted=weights)


@AROUND.row("`functional_call` with weights of wrong shapes")
def wrong_weights(case: Case) -> str:
    name = _recurrent_weight(case)
    torch.func.functional_call(case.module, {name: torch.zeros(H_WRONG, H_WRONG)}, (case.x,))
    return "WRONG: computed something"


H_WRONG = 5


@AROUND.row("an ensemble: `stack_module_state`, `functional_call` under `vmap`")
def ensemble(case: Case) -> str:
    modules = [case.module, case.another()]
    stacked, buffers = torch.func.stack_module_state(modules)
    base = case.copy().to("meta")

    def call(weights: Any, buffers: Any, x: Tensor) -> Any:
        return torch.func.functional_call(base, (weights, buffers), (x,))

    runs = [ran(module, case.x, dict(module.named_parameters())) for module in modules]
    expected = [torch.stack(pair) for pair in zip(*(run.outputs for run in runs), strict=True)]
    with heard() as targets:
        found = tree_leaves(torch.vmap(call, in_dims=(0, 0, None))(stacked, buffers, case.x))
    return noted(compared(Ran([o.detach() for o in found], {}), Ran(expected, {})), targets)


# ---------------------------------------------------------------------------------------------------------------------
# precision, processes and shards


@SPREAD.row("`torch.autocast`, bfloat16")
def autocast(case: Case) -> str:
    def call(x: Tensor) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return case.module(x)

    words = case.same(call)
    return f"computes in its own dtype: {words}" if words.startswith("same") else words


@SPREAD.row("`torch.amp.GradScaler`")
def scaler(case: Case) -> str:
    module = case.copy()
    optimiser = torch.optim.SGD(module.parameters(), lr=1.0)
    scale = torch.amp.GradScaler("cpu", init_scale=1024.0)

    def call(x: Tensor) -> Any:
        return module(x)

    x = case.x.clone().requires_grad_()
    with heard() as targets:
        outputs = tree_leaves(call(x))
        from feature_cases import loss_of

        scale.scale(loss_of(outputs)).backward()
        scale.unscale_(optimiser)
    gradients = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    assert x.grad is not None
    found = Ran([o.detach() for o in outputs], {"x": x.grad / 1024, **gradients})
    return noted(compared(found, case.plain), targets)


@SPREAD.row("optimisers: SGD, fused AdamW, LBFGS")
def optimisers(case: Case) -> str:
    from feature_cases import loss_of

    for make in (
        lambda p: torch.optim.SGD(p, lr=0.01),
        lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
        lambda p: torch.optim.LBFGS(p, lr=0.1),
    ):
        module = case.copy()
        optimiser = make(module.parameters())

        def closure(module: Any = module, optimiser: Any = optimiser) -> Tensor:
            optimiser.zero_grad()
            loss = sum(output.square().sum() for output in tree_leaves(module(case.x)))
            loss.backward()
            return loss

        losses = [float(optimiser.step(closure)) for _ in range(5)]
        if not losses[-1] < losses[0]:
            return f"WRONG: the loss goes from {losses[0]:.3g} to {losses[-1]:.3g}"
    assert loss_of is not None
    return "they learn"


@SPREAD.row("`torch.ao.quantization.quantize_dynamic`")
def quantize_dynamic(case: Case) -> str:
    model = torch.nn.ModuleDict({"recurrent": case.copy()})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        kinds = {torch.nn.GRU, torch.nn.LSTM, torch.nn.GRUCell, torch.nn.LSTMCell, torch.nn.RNNCell}
        model = torch.ao.quantization.quantize_dynamic(model, kinds, dtype=torch.qint8)
    module: Any = model["recurrent"]
    if type(module) is type(case.module):
        return f"left in float: {case.same(module)}"
    return f"becomes {type(module).__module__}.{type(module).__name__}"


@SPREAD.row("the replicas that `DataParallel` makes")
def replicas(case: Case) -> str:
    module: Any = case.module
    replica = module._replicate_for_data_parallel()
    for name, parameter in case.parameters.items():
        setattr(replica, name, parameter.clone())
    return worst_of([case.same(lambda x: replica(x)), case.same(torch.nn.DataParallel(case.copy()).module)])


def _trained(pipe: Any, rank: int, name: str, torchs: bool, folder: str) -> None:
    from torch import distributed
    from torch.nn.parallel import DistributedDataParallel

    case = Case(name, torchs=torchs)
    store = distributed.FileStore(str(Path(folder) / "store"), 2)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    try:
        module = DistributedDataParallel(case.module)
        found = ran(module, case.x * (1 + rank), dict(case.module.named_parameters()))
        pipe.send({name: g.numpy() for name, g in found.gradients.items() if name != "x"})
    finally:
        distributed.destroy_process_group()


@SPREAD.row("`DistributedDataParallel` on two processes (gloo)", slow=True)
def data_parallel(case: Case) -> str:
    with tempfile.TemporaryDirectory() as folder:
        first, second = told_by(_trained, case.name, case.torchs, folder, count=2)
    runs = [case.plain, ran(case.module, case.x * 2, case.parameters)]
    mean = {name: (runs[0].gradients[name] + runs[1].gradients[name]) / 2 for name in case.parameters}
    found = [Ran([], {name: torch.tensor(g) for name, g in one.items()}) for one in (first, second)]
    return worst_of([compared(one, Ran([], mean)) for one in found])


def _sharded(pipe: Any, rank: int, name: str, torchs: bool, folder: str) -> None:
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    case = Case(name, torchs=torchs)
    store = distributed.FileStore(str(Path(folder) / "store"), 2)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    try:
        module: Any = fully_shard(case.module, mesh=init_device_mesh("cpu", (2,)))
        found = ran(module, case.x, dict(module.named_parameters()))
        gradients = {name: g.full_tensor().numpy() for name, g in found.gradients.items() if name != "x"}  # type: ignore[attr-defined]
        pipe.send(([o.numpy() for o in found.outputs], gradients))
    except Exception as error:
        pipe.send(error)
    finally:
        distributed.destroy_process_group()


@SPREAD.row("`fully_shard` (FSDP2) on two processes (gloo)", slow=True)
def fully_sharded(case: Case) -> str:
    with tempfile.TemporaryDirectory() as folder:
        first, second = told_by(_sharded, case.name, case.torchs, folder, count=2)
    said = []
    for one in (first, second):
        if isinstance(one, Exception):
            raise one
        found = Ran([torch.tensor(o) for o in one[0]], {name: torch.tensor(g) for name, g in one[1].items()})
        rest = {name: case.plain.gradients[name] for name in case.parameters}
        said.append(compared(found, Ran(case.plain.outputs, rest)))
    return worst_of(said)


@SPREAD.row("a weight whose storage was resized to nothing, as a sharded one's between runs")
def resized(case: Case) -> str:
    module = case.copy()
    getattr(module, _recurrent_weight(case)).untyped_storage().resize_(0)
    module(case.x)
    return "WRONG: computed something"
