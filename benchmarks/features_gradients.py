"""Rows of `features.py`: derivatives of every kind, and what autograd can be asked for."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from feature_cases import Case, Ran, Rows, compared, heard, loss_of, noted, ran, worst_of
from torch import Tensor
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

DERIVATIVES = Rows("Derivatives")
AUTOGRAD = Rows("Autograd's other ways")


def pure(case: Case) -> tuple[Callable[..., tuple[Tensor, ...]], tuple[Tensor, ...]]:
    """The module as a function of x and its weights, and these."""
    names = list(case.parameters)

    def call(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(names, weights, strict=True))
        return tuple(tree_leaves(torch.func.functional_call(case.module, given, (x,))))

    tensors = (case.x, *case.parameters.values())
    return call, tuple(tensor.detach().clone().requires_grad_() for tensor in tensors)


def _passes(check: Callable[..., bool], case: Case, **options: Any) -> str:
    call, tensors = pure(case.double())
    with heard() as targets:
        check(call, tensors, **options)
    return noted("passes", targets)


@DERIVATIVES.row("`gradcheck`")
def gradcheck(case: Case) -> str:
    return _passes(torch.autograd.gradcheck, case)


@DERIVATIVES.row("double backward (`create_graph=True`): `gradgradcheck`")
def gradgradcheck(case: Case) -> str:
    return _passes(torch.autograd.gradgradcheck, case, fast_mode=True)


@DERIVATIVES.row("forward mode (`forward_ad`): `gradcheck(check_forward_ad=True)`")
def forward_mode(case: Case) -> str:
    return _passes(torch.autograd.gradcheck, case, check_forward_ad=True, check_backward_ad=False, fast_mode=True)


@DERIVATIVES.row("gradients in batches (`is_grads_batched=True`, `jacobian(vectorize=True)`)")
def batched_gradients(case: Case) -> str:
    call, tensors = pure(case.double())

    def first(x: Tensor) -> Tensor:
        return call(x, *tensors[1:])[0]

    expected = torch.autograd.functional.jacobian(first, tensors[0])
    with heard() as targets:
        found = torch.autograd.functional.jacobian(first, tensors[0], vectorize=True)
    return noted(compared(Ran([found], {}), Ran([expected], {}), 1e-10), targets)


@DERIVATIVES.row("`torch.func.grad`, `vjp`")
def func_grad(case: Case) -> str:
    call, tensors = pure(case)
    places = tuple(range(len(tensors)))
    with heard() as targets:
        found = torch.func.grad(lambda *given: loss_of(call(*given)), argnums=places)(*tensors)
        pulled: Any = torch.func.vjp(lambda *given: loss_of(call(*given)), *tensors)
        again = pulled[1](torch.ones_like(pulled[0]))
    names = list(case.plain.gradients)
    expected = Ran([], case.plain.gradients)
    runs = [Ran([], {n: t.detach() for n, t in zip(names, some, strict=True)}) for some in (found, again)]
    return noted(worst_of([compared(run, expected) for run in runs]), targets)


@DERIVATIVES.row("`torch.func.jvp`, against the products that its transpose gives")
def func_jvp(case: Case) -> str:
    call, tensors = pure(case.double())
    tangents = tuple(torch.cos(torch.arange(t.numel()).double()).reshape(t.shape) for t in tensors)
    with heard() as targets:
        pushed: Any = torch.func.jvp(lambda *given: loss_of(call(*given)), tensors, tangents)
    found = pushed[1]
    gradients = torch.autograd.grad(loss_of(call(*tensors)), tensors)
    expected = sum((g * t).sum() for g, t in zip(gradients, tangents, strict=True))
    assert isinstance(expected, Tensor)
    return noted(compared(Ran([found.detach()], {}), Ran([expected], {}), 1e-10), targets)


@DERIVATIVES.row("`torch.func.jacrev`, `jacfwd`")
def jacobians(case: Case) -> str:
    call, tensors = pure(case.double())

    def first(x: Tensor) -> Tensor:
        return call(x, *tensors[1:])[0]

    expected = torch.autograd.functional.jacobian(first, tensors[0])
    with heard() as targets:
        found = [make(first)(tensors[0].detach()).detach() for make in (torch.func.jacrev, torch.func.jacfwd)]
    return noted(worst_of([compared(Ran([one], {}), Ran([expected], {}), 1e-10) for one in found]), targets)


@DERIVATIVES.row("`torch.func.hessian`, against differences of gradients")
def hessian(case: Case) -> str:
    call, tensors = pure(case.double())
    x, others, step = tensors[0].detach(), tensors[1:], 1e-5

    def loss(x: Tensor) -> Tensor:
        return loss_of(call(x, *others))

    def gradient(x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        return torch.autograd.grad(loss(x), x)[0]

    with heard() as targets:
        found = torch.func.hessian(loss)(x).detach().reshape(x.numel(), x.numel())
    basis = step * torch.eye(x.numel(), dtype=x.dtype).reshape(-1, *x.shape)
    expected = torch.stack([(gradient(x + d) - gradient(x - d)).flatten() / (2 * step) for d in basis])
    return noted(compared(Ran([found], {}), Ran([expected], {}), 1e-7), targets)


@DERIVATIVES.row("`vmap` over inputs; a gradient for each sample (`vmap` of `grad`)")
def per_sample(case: Case) -> str:
    call, tensors = pure(case)
    xs = torch.stack([case.x, case.x.flip(-1), 2 * case.x])
    places = tuple(range(1, len(tensors)))
    with heard() as targets:
        outputs = torch.vmap(lambda x: call(x, *tensors[1:]))(xs)
        gradient = torch.func.grad(lambda *given: loss_of(call(*given)), argnums=places)
        found = torch.vmap(gradient, in_dims=(0, *(None for _ in places)))(xs, *tensors[1:])
    runs = [ran(case.module, x, case.parameters) for x in xs]
    expected = [torch.stack(some) for some in zip(*(run.outputs for run in runs), strict=True)]
    gradients = {name: torch.stack([run.gradients[name] for run in runs]) for name in case.parameters}
    named = {name: g.detach() for name, g in zip(case.parameters, found, strict=True)}
    return noted(compared(Ran([o.detach() for o in outputs], named), Ran(expected, gradients)), targets)


@DERIVATIVES.row("`linearize`; `vmap` with `chunk_size`")
def linearised(case: Case) -> str:
    call, tensors = pure(case.double())

    def first(x: Tensor) -> Tensor:
        return call(x, *tensors[1:])[0]

    x = tensors[0].detach()
    with heard() as targets:
        _, push = torch.func.linearize(first, x)
        found = push(torch.ones_like(x)).detach()
        jacobian = torch.func.jacrev(first, chunk_size=7)(x).detach()
    expected = torch.autograd.functional.jacobian(first, x)
    product = expected.reshape(found.numel(), -1).sum(1).reshape(found.shape)
    return noted(compared(Ran([found, jacobian], {}), Ran([product, expected], {}), 1e-10), targets)


# ---------------------------------------------------------------------------------------------------------------------
# autograd


def _flat(module: Any) -> Callable[[Tensor], tuple[Tensor, ...]]:
    return lambda x: tuple(tree_leaves(module(x)))


@AUTOGRAD.row("`torch.utils.checkpoint`, reentrant or not")
def checkpointed(case: Case) -> str:
    said = [
        case.same(lambda x, reentrant=reentrant: checkpoint(_flat(case.module), x, use_reentrant=reentrant))
        for reentrant in (True, False)
    ]
    return worst_of(said)


@AUTOGRAD.row("selective checkpointing (`create_selective_checkpoint_contexts`)")
def selective(case: Case) -> str:
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    def contexts() -> Any:
        return create_selective_checkpoint_contexts(lambda *_, **__: CheckpointPolicy.PREFER_RECOMPUTE)

    return case.same(lambda x: checkpoint(_flat(case.module), x, use_reentrant=False, context_fn=contexts))


@AUTOGRAD.row("`saved_tensors_hooks`; `save_on_cpu`")
def saved_tensors(case: Case) -> str:
    def call(x: Tensor) -> Any:
        with saved_tensors_hooks(lambda tensor: tensor.numpy(force=True).copy(), torch.from_numpy):
            return case.module(x)

    def offloaded(x: Tensor) -> Any:
        with save_on_cpu():
            return case.module(x)

    return worst_of([case.same(call), case.same(offloaded)])


@AUTOGRAD.row("`saved_tensors_hooks` that keep float16")
def lossy(case: Case) -> str:
    def call(x: Tensor) -> Any:
        with saved_tensors_hooks(lambda tensor: (tensor.dtype, tensor.half()), lambda kept: kept[1].to(kept[0])):
            return case.module(x)

    words = case.same(call, tolerance=2e-3)
    return words.replace("to rounding", "to float16's rounding")


@AUTOGRAD.row("backward twice (`retain_graph=True`); gradients accumulated over two runs")
def twice(case: Case) -> str:
    module = case.copy()

    def both(x: Tensor) -> Ran:
        for tensor in (x, *module.parameters()):
            tensor.grad = None
        outputs = tree_leaves(module(x))
        loss_of(outputs).backward(retain_graph=True)
        loss_of(outputs).backward()
        named = {"x": x, **dict(module.named_parameters())}
        return Ran([o.detach() for o in outputs], {name: t.grad / 2 for name, t in named.items() if t.grad is not None})

    expected = case.plain
    with heard() as targets:
        found = both(case.x.clone().requires_grad_())
    return noted(compared(found, expected), targets)


@AUTOGRAD.row("a weight changed in place between forward and backward")
def changed_between(case: Case) -> str:
    module = case.copy()
    outputs = tree_leaves(module(case.x))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(2)
    loss_of(outputs).backward()
    return "WRONG: gradients of a mixture"


@AUTOGRAD.row("an output changed in place before backward (`output.mul_(2)`)")
def changed_output(case: Case) -> str:
    outputs = tree_leaves(case.copy()(case.x))
    outputs[0].mul_(2)
    loss_of(outputs).backward()
    return "WRONG: gradients of a mixture"


@AUTOGRAD.row("`detect_anomaly`")
def anomaly(case: Case) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that it is slow
        with torch.autograd.detect_anomaly():
            return case.same(case.module)


@AUTOGRAD.row("`no_grad`")
def no_grad(case: Case) -> str:
    with torch.no_grad():
        return case.same(case.module, gradients=False)


@AUTOGRAD.row("`inference_mode`; weights and inputs made inside it")
def inference_mode(case: Case) -> str:
    with torch.inference_mode():
        said = [case.same(case.module, gradients=False), case.same(case.copy(), gradients=False, x=case.x.clone())]
    return worst_of(said)


@AUTOGRAD.row("an inference tensor in training")
def inference_tensor(case: Case) -> str:
    with torch.inference_mode():
        x = case.x.clone()
    loss_of(case.module(x)).backward()
    return "WRONG: trained on an inference tensor"


@AUTOGRAD.row("compiled autograd")
def compiled_autograd(case: Case) -> str:
    expected = case.plain
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
        return case.same(case.module, expected=expected)
