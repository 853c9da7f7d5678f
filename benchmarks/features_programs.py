"""Rows of `features.py`: compilers, tracers and exporters."""

from __future__ import annotations

import io
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from feature_cases import Case, Ran, Rows, compared, worst_of
from torch import Tensor
from torch.utils._pytree import tree_leaves

PROGRAMS = Rows("Compilers, tracers, exporters")


def _sizes(case: Case) -> Any:
    """Time and batch free."""
    rows = torch.export.Dim("rows", min=1, max=64)
    if case.is_cell:
        return ({0: rows},)
    return ({0: torch.export.Dim("steps", min=1, max=64), 1: rows},)


def _compiled(case: Case, **options: Any) -> str:
    module = case.copy()
    return case.same(torch.compile(module, **options), wanted=dict(module.named_parameters()))


@PROGRAMS.row('`torch.compile(backend="aot_eager")`')
def compiled(case: Case) -> str:
    return _compiled(case, backend="aot_eager")


@PROGRAMS.row('`torch.compile(backend="aot_eager", fullgraph=True)`')
def fullgraph(case: Case) -> str:
    return _compiled(case, backend="aot_eager", fullgraph=True)


@PROGRAMS.row("the same with `torch._dynamo.config.allow_rnn = True`")
def allowed(case: Case) -> str:
    with torch._dynamo.config.patch(allow_rnn=True):
        return _compiled(case, backend="aot_eager", fullgraph=True)


@PROGRAMS.row("`torch.compile(dynamic=True)`, other lengths and batches")
def dynamic(case: Case) -> str:
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    other, expected = case.elsewhere()
    with torch._dynamo.config.patch(allow_rnn=True):
        module = case.copy()
        program: Any = torch.compile(module, backend=counter, dynamic=True)
        wanted = dict(module.named_parameters())
        said = [case.same(program, wanted=wanted), case.same(program, wanted=wanted, x=other, expected=expected)]
    return f"{worst_of(said)}, compiled {'once' if counter.frame_count == 1 else f'{counter.frame_count} times'}"


@PROGRAMS.row("`torch.compile` (inductor, `fullgraph=True`, `allow_rnn = True`)", slow=True)
def inductor(case: Case) -> str:
    with torch._dynamo.config.patch(allow_rnn=True):
        return _compiled(case, fullgraph=True)


@PROGRAMS.row("AOTAutograd (`functorch.compile.aot_module`)")
def aot_module(case: Case) -> str:
    from functorch.compile import aot_module, nop  # type: ignore[import-untyped]

    module = case.copy()
    return case.same(aot_module(module, fw_compiler=nop), wanted=dict(module.named_parameters()))


@PROGRAMS.row("`make_fx`")
def make_fx(case: Case) -> str:
    from torch.fx.experimental.proxy_tensor import make_fx

    found = []
    for mode in ("real", "fake", "symbolic"):
        program = make_fx(lambda x: tree_leaves(case.module(x)), tracing_mode=mode)(case.x)
        found.append(case.same(program, gradients=False))
    return worst_of(found)


class _Around(torch.nn.Module):
    """A model that holds a recurrent module."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.recurrent = module

    def forward(self, x: Tensor) -> Any:
        return self.recurrent(x)


@PROGRAMS.row("`torch.fx.symbolic_trace` of a model that holds it")
def symbolic_trace(case: Case) -> str:
    module = case.copy()
    return case.same(torch.fx.symbolic_trace(_Around(module)), wanted=dict(module.named_parameters()))


@PROGRAMS.row("`torch.export`, `save` and `load`; other lengths and batches")
def exported(case: Case) -> str:
    program = torch.export.export(case.module, (case.x,), dynamic_shapes=_sizes(case))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    module = torch.export.load(file).module()
    other, expected = case.elsewhere()
    return worst_of([case.same(module), case.same(module, x=other, expected=expected)])


@PROGRAMS.row("`torch.export(strict=True)`; `run_decompositions`")
def decomposed(case: Case) -> str:
    program = torch.export.export(case.module, (case.x,), strict=True).run_decompositions()
    return case.same(program.module(), gradients=False)


@PROGRAMS.row("`torch.jit.trace`; other lengths and batches")
def traced(case: Case) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates TorchScript, and warns of what it takes for constant
        program = torch.jit.trace(case.module, (case.x,))
        other, expected = case.elsewhere()
        return worst_of([case.same(program), case.same(program, x=other, expected=expected)])


@PROGRAMS.row("`torch.jit.script`; other lengths and batches")
def scripted(case: Case) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.jit.script(case.module)
        other, expected = case.elsewhere()
        return worst_of([case.same(program), case.same(program, x=other, expected=expected)])


def _in_onnx_runtime(path: Path, x: Tensor) -> list[Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path)
    found: Any = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    return [torch.from_numpy(output) for output in found]


@PROGRAMS.row("`torch.onnx.export(dynamo=True)`, run in ONNX Runtime; other lengths and batches", slow=True)
def onnx(case: Case) -> str:
    other, expected = case.elsewhere()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        path = Path(folder) / "model.onnx"
        torch.onnx.export(case.copy().eval(), (case.x,), path, dynamo=True, dynamic_shapes=_sizes(case), verbose=False)
        runs = [(_in_onnx_runtime(path, case.x), case.plain), (_in_onnx_runtime(path, other), expected)]
    return worst_of([compared(Ran(found, {}), Ran(plain.outputs, {})) for found, plain in runs])


@PROGRAMS.row("`torch.onnx.export(dynamo=False)`, by TorchScript", slow=True)
def old_onnx(case: Case) -> str:
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = Path(folder) / "model.onnx"
        torch.onnx.export(case.copy().eval(), (case.x,), path, dynamo=False, input_names=["x"])
        found = _in_onnx_runtime(path, case.x)
    return compared(Ran(found, {}), Ran(case.plain.outputs, {}))
