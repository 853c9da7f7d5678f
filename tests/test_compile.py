"""Compiled and exported models: one operator call for each layer and direction, any T, and eager's own numbers."""

from __future__ import annotations

import copy
import io
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend

import throughtime as tt
from throughtime.engine import recurrence
from throughtime.engine.problem import Problem

I, H, B = 3, 5, 4

# torch's own modules still use what torch deprecates
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")


@tt.cell(states="h")
def Leaky(x, h, W, U, b):
    """A user's cell, with a product of a computed value."""
    n = tt.tanh(W.n @ x + U.n @ (0.5 * h) + b.n)
    return 0.9 * h + 0.1 * n


MODELS: dict[str, tuple[tt.Cell, dict[str, Any]]] = {
    "gru": (tt.GRU, {}),
    "lstm-deep-both-ways": (tt.LSTM, {"num_layers": 2, "bidirectional": True}),
    "lstm-projected-batch-first": (tt.ProjectedLSTM, {"proj_size": 2, "batch_first": True}),
    "user-learnt-start": (Leaky, {"learn_initial": True}),
}


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


def model_of(name: str) -> tt.nn.Recurrent:
    cell, options = MODELS[name]
    return tt.nn.Recurrent(cell, I, H, dtype=torch.float64, **options)


def input_of(model: tt.nn.Recurrent, steps: int, rows: int = B) -> Tensor:
    shape = (rows, steps, I) if model.batch_first else (steps, rows, I)
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def results_of(call: Any, model: torch.nn.Module, x: Tensor, **arguments: Any) -> list[Tensor]:
    """Output, states and the gradient of everything."""
    output, state = call(x, **arguments)
    results = [output, *(state if isinstance(state, tuple) else (state,))]
    loss = torch.stack([(result * result.cos()).sum() for result in results]).sum()
    return [*results, *torch.autograd.grad(loss, [x, *model.parameters()])]


def calls_in(graph: torch.fx.Graph) -> list[Any]:
    return [node.target for node in graph.nodes if node.op == "call_function" and "throughtime" in str(node.target)]


@pytest.mark.parametrize("name", MODELS)
def test_compiled_is_eager_at_every_length_with_one_recompilation(name: str) -> None:
    model = model_of(name)
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for steps in (5, 7, 9, 12):
        x = input_of(model, steps)
        torch.testing.assert_close(results_of(compiled, model, x), results_of(model, model, x))
    assert backend.frame_count <= 2
    layers = model.num_layers * (2 if model.bidirectional else 1)
    assert [len(calls_in(graph.graph)) for graph in backend.graphs] == [layers] * backend.frame_count
    assert all(len(graph.graph.nodes) < 60 * layers for graph in backend.graphs)


def test_length_and_batch_marked_dynamic_compile_once() -> None:
    model = model_of("gru")
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for steps, rows in ((5, 4), (9, 3), (6, 7)):
        x = input_of(model, steps, rows)
        torch._dynamo.mark_dynamic(x, 0)
        torch._dynamo.mark_dynamic(x, 1)
        torch.testing.assert_close(results_of(compiled, model, x), results_of(model, model, x))
    assert backend.frame_count == 1


@pytest.mark.parametrize("kind", ["tensor", "list"])
def test_compiled_takes_lengths(kind: str) -> None:
    model = model_of("lstm-deep-both-ways")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = input_of(model, 7)
    counts = [3, 7, 0, 5]
    lengths = torch.tensor(counts) if kind == "tensor" else counts
    expected = results_of(model, model, x, lengths=counts)
    torch.testing.assert_close(results_of(compiled, model, x, lengths=lengths), expected)


def test_other_lengths_in_a_tensor_compile_nothing_anew() -> None:
    model = model_of("gru")
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    x = input_of(model, 6)
    for counts in ([6, 2, 3, 1], [1, 6, 6, 4], [6, 6, 6, 6]):
        expected = results_of(model, model, x, lengths=counts)
        torch.testing.assert_close(results_of(compiled, model, x, lengths=torch.tensor(counts)), expected)
    assert backend.frame_count == 1


def test_compiled_refuses_lengths_beyond_the_input() -> None:
    model = model_of("gru")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with pytest.raises(tt.ShapeError, match="lengths= holds 9, but the input has 6 steps"):
        compiled(input_of(model, 6), lengths=torch.tensor([6, 9, 1, 2]))


@pytest.mark.parametrize("name", ["gru", "lstm-deep-both-ways"])
def test_compiled_takes_resets_and_lengths_together(name: str) -> None:
    model = model_of(name)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x, reset, counts = input_of(model, 6), torch.rand(6, B) < 0.3, [6, 2, 5, 3]
    expected = results_of(model, model, x, lengths=counts, reset=reset)
    torch.testing.assert_close(results_of(compiled, model, x, lengths=torch.tensor(counts), reset=reset), expected)


def test_no_gradient_saves_nothing() -> None:
    """Without gradients, the inference operator is all that runs."""
    model = model_of("gru")
    seen: list[Any] = []

    def look(graph: torch.fx.GraphModule, _: Any) -> Any:
        seen.extend(calls_in(graph.graph))
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, backend=aot_autograd(fw_compiler=look))
    x = input_of(model, 6)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))
    assert seen == [torch.ops.throughtime.recurrence.default]


@pytest.mark.parametrize("make", [tt.nn.GRU, tt.nn.LSTM])
def test_drop_ins_compile_where_dynamo_is_allowed_to_look(make: Any) -> None:
    model = make(I, H, num_layers=2, bidirectional=True, dtype=torch.float64)
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with torch._dynamo.config.patch(allow_rnn=True):
        for steps in (5, 7, 9):
            x = torch.randn(steps, B, I, dtype=torch.float64, requires_grad=True)
            torch.testing.assert_close(results_of(compiled, model, x), results_of(model, model, x))
    assert backend.frame_count <= 2
    assert [len(calls_in(graph.graph)) for graph in backend.graphs] == [4] * backend.frame_count


def test_drop_ins_export_without_leave() -> None:
    model = tt.nn.LSTM(I, H, dtype=torch.float64)
    program = torch.export.export(
        model, (torch.randn(6, B, I, dtype=torch.float64),), dynamic_shapes=({0: torch.export.Dim("steps", min=2)},)
    )
    assert calls_in(program.graph) == [torch.ops.throughtime.recurrence.default]
    x = torch.randn(9, B, I, dtype=torch.float64)
    torch.testing.assert_close(program.module()(x), model(x))


def test_a_copy_of_a_layer_compiles() -> None:
    model = copy.deepcopy(model_of("user-learnt-start"))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = input_of(model, 6)
    torch.testing.assert_close(results_of(compiled, model, x), results_of(model, model, x))


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch's own backend wants a C++ compiler")
def test_inductor_agrees() -> None:
    model = model_of("gru")
    quick_to_build: dict[str, Any] = {"cpp_cache_precompile_headers": False, "cpp.simdlen": 1}
    compiled = torch.compile(model, fullgraph=True, options=quick_to_build)
    x = input_of(model, 6)
    torch.testing.assert_close(results_of(compiled, model, x), results_of(model, model, x))


def exported(model: tt.nn.Recurrent) -> torch.export.ExportedProgram:
    steps, rows = torch.export.Dim("steps", min=2), torch.export.Dim("rows", min=2)
    return torch.export.export(model, (input_of(model, 6).detach(),), dynamic_shapes=({0: steps, 1: rows},))


@pytest.mark.parametrize("name", ["gru", "lstm-deep-both-ways", "user-learnt-start"])
def test_exported_program_runs_any_length_after_a_round_trip(name: str) -> None:
    model = model_of(name)
    program = exported(model)
    layers = model.num_layers * (2 if model.bidirectional else 1)
    assert calls_in(program.graph) == [torch.ops.throughtime.recurrence.default] * layers
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for steps, rows in ((6, 4), (11, 3)):
        x = input_of(model, steps, rows).detach()
        torch.testing.assert_close(loaded(x), model(x))


def test_exported_program_learns() -> None:
    model = model_of("gru")
    module = exported(model).module()
    x = input_of(model, 8)
    torch.testing.assert_close(results_of(module, module, x), results_of(model, model, x))


def test_exported_program_runs_in_a_process_that_has_not_met_the_cell(tmp_path: Any) -> None:
    model = model_of("user-learnt-start")
    torch.export.save(exported(model), tmp_path / "model.pt2")
    x = input_of(model, 7).detach()
    torch.save(x, tmp_path / "x.pt")
    program = (
        "import sys, torch, throughtime; folder = sys.argv[1]; x = torch.load(folder + '/x.pt')\n"
        "output, state = torch.export.load(folder + '/model.pt2').module()(x)\n"
        "torch.save(output.detach(), folder + '/output.pt')"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True)
    assert torch.equal(torch.load(tmp_path / "output.pt"), model(x)[0].detach())


def problem_of(name: str, batch_first: bool = False) -> Problem:
    cell, options = MODELS[name]
    width = cell.sizes(H, options.get("proj_size", 0))
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64, requires_grad=True)  # noqa: E731
    x = draw(B, 6, I).detach().transpose(0, 1).requires_grad_() if batch_first else draw(6, B, I)
    shapes = [cell.shape(parameter, I, H, options.get("proj_size", 0)) for parameter in cell.parameters]
    return Problem(cell, x, tuple(draw(B, size) for size in width), tuple(draw(*shape) for shape in shapes))


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("target", [name for name in recurrence.TARGETS if name != "reference"])
@pytest.mark.parametrize("name", ["gru", "lstm-projected-batch-first"])
def test_operators_keep_what_they_announce(name: str, target: str, batch_first: bool) -> None:
    problem = problem_of(name, batch_first)
    arguments = (list(problem.tensors), problem.cell.json, torch.tensor([6, 4, 4, 1]), None, False, None, target)
    torch.library.opcheck(torch.ops.throughtime.recurrence.default, arguments)
    plain = ([tensor.detach() for tensor in problem.tensors], *arguments[1:])
    static = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.throughtime.recurrence_training.default, plain, test_utils=static)
    results = torch.ops.throughtime.recurrence_training(*plain)
    d_results = [torch.randn_like(results[0]), *([None] * len(problem.states))]
    needs = [True] * len(problem.tensors)
    torch.library.opcheck(
        torch.ops.throughtime.recurrence_backward.default, (*plain, results, d_results, needs), test_utils=static
    )


def test_forward_mode_through_the_operator_has_right_tangents() -> None:
    problem = problem_of("gru")
    x, *rest = (tensor.detach() for tensor in problem.tensors)
    tangent = torch.randn_like(x)
    operator = torch.ops.throughtime.recurrence
    found = torch.func.jvp(
        lambda x: operator([x, *rest], problem.cell.json, None, None, False, None, "")[0], (x,), (tangent,)
    )
    expected = torch.func.jvp(lambda x: recurrence.run(problem.with_tensors([x, *rest]))[0], (x,), (tangent,))
    assert found[1].abs().max() > 0
    torch.testing.assert_close(found, expected)


def test_compiled_gradients_can_be_had_of_gradients_in_the_operator() -> None:
    problem = problem_of("gru")
    x, *rest = problem.tensors

    def penalty(call: Any) -> Tensor:
        (slope,) = torch.autograd.grad(call(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(slope.square().sum(), problem.parameters[0])[0]

    operator = torch.ops.throughtime.recurrence
    lengths = torch.tensor([6, 5, 2, 1])
    through = penalty(lambda x: operator([x, *rest], problem.cell.json, lengths, None, False, None, "")[0])
    eager = replace(problem, lengths=(6, 5, 2, 1))
    torch.testing.assert_close(through, penalty(lambda x: recurrence.run(eager.with_tensors([x, *rest]))[0]))


def test_a_compiled_model_says_that_it_cannot_record() -> None:
    model = model_of("gru")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = input_of(model, 6)
    compiled(x)
    with recurrence.recording(), pytest.raises(tt.ThroughtimeError, match="run the model itself"):
        compiled(x)
