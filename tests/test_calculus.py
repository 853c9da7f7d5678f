"""Derivatives of a cell: adjoints, what to save, the step Jacobian; each against autograd or by brute force."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from blackboards import ALL, random_cells, random_problem
from hypothesis import assume, given, settings
from torch import Tensor

from throughtime.engine.codegen import torch_spelling
from throughtime.engine.problem import Problem, at_step, leaf_value
from throughtime.engine.targets import reference
from throughtime.equations import calculus, expr
from throughtime.equations.catalogue import CELLS, GRU, LSTM, Elman, GRUResetBefore, ProjectedLSTM
from throughtime.equations.cell import Cell
from throughtime.equations.expr import OPS, Node, identity, make, relu


def evaluated(roots: list[Node], values: dict[Node, Tensor], problem: Problem) -> dict[Node, Tensor]:
    """Every node under the roots as a tensor: products by their matrices, operations by the table."""
    known = dict(values)
    for node in expr.postorder(roots, stop=lambda n: n in known):
        if node in known:
            continue
        args = [known[arg] for arg in node.args]
        if node.op == "const":
            known[node] = torch.tensor(node.data[0], dtype=torch.float64)
        elif node.op in ("product", "transposed"):
            matrix = problem.block(node)
            known[node] = args[0] @ (matrix.T if node.op == "product" else matrix)
        else:
            known[node] = torch_spelling(node.op)(*args)
    return known


def leaf_values(problem: Problem) -> dict[Node, Tensor]:
    """What the cell's leaves stand for at the problem's first step."""
    leaves = [n for n in problem.cell.nodes if n.op in ("input", "state", "parameter", "outside")]
    outside = at_step(problem, 0)
    return {leaf: leaf_value(problem, leaf, problem.x[0], problem.states, outside) for leaf in leaves}


def check_adjoint(cell: Cell, seed: int) -> None:
    """One step back, by the adjoint equations and by autograd."""
    problem = random_problem(cell, steps=1, rows=3, seed=seed)
    after = reference.step(problem, problem.x[0], problem.states, at_step(problem, 0))
    seeds = [torch.randn(value.shape, dtype=torch.float64) for value in after]
    loss = sum((value * s).sum() for value, s in zip(after, seeds, strict=True))
    assert isinstance(loss, Tensor)
    if not loss.requires_grad:
        return
    found = torch.autograd.grad(loss, problem.tensors, allow_unused=True)
    expected = problem.with_tensors(
        [torch.zeros_like(t) if g is None else g for t, g in zip(problem.tensors, found, strict=True)]
    )
    with torch.no_grad():
        arriving = {make("adjoint", (), (s,)): v for s, v in zip(cell.states, seeds, strict=True)}
        adjoint = calculus.adjoint(cell)
        values = evaluated([*cell.next, *adjoint.roots], leaf_values(problem) | arriving, problem)

    def agrees(actual: Tensor | float, wanted: Tensor, what: object) -> None:
        torch.testing.assert_close(
            torch.as_tensor(actual).expand_as(wanted), wanted, rtol=1e-9, atol=1e-11, msg=str(what)
        )

    for state, wanted in zip(cell.states, expected.states, strict=True):
        agrees(values[adjoint.state[state]] if state in adjoint.state else 0.0 * wanted, wanted, state)
    d_x = 0 if adjoint.input is None else values[adjoint.input]
    for product, delta in adjoint.delta.items():
        if product.args[0].op == "input":
            d_x = d_x + values[delta] @ problem.block(product)
    agrees(torch.as_tensor(d_x, dtype=torch.float64), expected.x[0], "x")
    for parameter in cell.parameters:
        for gate in parameter.gates:
            block = (parameter.namespace, gate)
            leaf = make("parameter", (), block)
            total = torch.zeros_like(expected.block(leaf))
            for product, delta in adjoint.delta.items():
                if product.data == block:
                    total += values[delta].T @ values[product.args[0]]
            if leaf in adjoint.parameter:
                total += values[adjoint.parameter[leaf]].expand(3, -1).sum(0)
            agrees(total, expected.block(leaf), block)
    for name, wanted in zip(cell.outside, expected.outside, strict=True):
        wanted = wanted[0] if name in cell.per_step else wanted
        total = values[adjoint.outside[name]] if name in adjoint.outside else 0.0 * wanted
        agrees(total.sum(-1, keepdim=True), wanted, name)


@pytest.mark.parametrize("name", ALL)
def test_the_adjoint_step_is_autograds(name: str):
    check_adjoint(ALL[name], seed=1)


@given(random_cells())
@settings(max_examples=100)
def test_the_adjoint_step_of_any_cell_is_autograds(cell: Cell):
    check_adjoint(cell, seed=2)


def test_one_adjoint_serves_every_product_that_meets_in_a_sum():
    delta = calculus.adjoint(LSTM).delta
    by_gate = {gate: {g for product, g in delta.items() if product.data[1] == gate} for gate in "ifgo"}
    assert all(len(shared) == 1 for shared in by_gate.values())
    assert len(calculus.adjoint(LSTM).over_time) == 4
    assert len(calculus.adjoint(GRU).over_time) == 4, "r, z, and n on each side of the reset"


def test_states_that_become_one_node_add_their_adjoints():
    twins = ALL["Twins"]
    total = calculus.adjoint(twins).value[twins.next[0]]
    assert total is make("adjoint", (), ("h",)) + make("adjoint", (), ("g",))


# -- what to save -----------------------------------------------------------------------------------------------------


FREE = ("const", "input", "state", "parameter", "outside")


def suffices(cell: Cell, kept: set[Node]) -> bool:
    """Whether a backward step can be computed from these values, the leaves, the next states, and cheap operations."""
    given = {n for n in cell.nodes if n.op in FREE} | set(cell.next) | kept
    forward = set(cell.nodes)
    operands = [product.args[0] for product in cell.products if product.args[0].op != "input"]
    for node in expr.postorder([*calculus.adjoint(cell).roots, *operands], stop=lambda n: n in given):
        if node in forward and node not in given and (node.op not in OPS or not OPS[node.op].cheap):
            return False
    return True


@pytest.mark.parametrize(
    ("cell", "number"),
    [
        (GRU, 4),
        (LSTM, 5),
        (Elman, 0),
        (Elman(activation=relu), 0),
        (Elman(activation=identity), 0),
        (GRUResetBefore, 3),
        (ProjectedLSTM, 5),
        (ALL["MinimalGated"], 2),
    ],
    ids=lambda value: value.name if isinstance(value, Cell) else str(value),
)
def test_how_many_values_a_cell_keeps(cell: Cell, number: int):
    assert len(calculus.saved(cell)) == number


@pytest.mark.parametrize("name", ALL)
def test_what_is_saved_suffices_and_none_of_it_can_be_left_out(name: str):
    kept = set(calculus.saved(ALL[name]))
    assert suffices(ALL[name], kept)
    assert not any(suffices(ALL[name], kept - {value}) for value in kept)


@given(random_cells())
@settings(max_examples=60)
def test_no_smaller_choice_would_suffice(cell: Cell):
    kept = calculus.saved(cell)
    assert suffices(cell, set(kept))
    assert not any(value.is_condition for value in kept), "a truth does not fit among the numbers"
    candidates = [n for n in cell.nodes if n.op not in FREE and not n.is_condition]
    assume(math.comb(len(candidates), max(0, len(kept) - 1)) < 3000)
    if kept:
        smaller = itertools.combinations(candidates, len(kept) - 1)
        assert not any(suffices(cell, set(choice)) for choice in smaller)


# -- the step Jacobian ------------------------------------------------------------------------------------------------


def check_jacobian(cell: Cell, seed: int) -> None:
    """The sum of chains as a matrix, against autograd through the reference step."""
    problem = random_problem(cell, steps=1, rows=1, seed=seed)
    sizes = problem.sizes

    def step(*states: Tensor) -> tuple[Tensor, ...]:
        return reference.step(problem, problem.x[0], states, at_step(problem, 0))

    expected = torch.autograd.functional.jacobian(step, tuple(state.detach() for state in problem.states))
    found = calculus.jacobian(cell)
    slopes = [d for chains in found.values() for chain in chains for d in chain.diagonals]
    with torch.no_grad():
        values = evaluated(slopes, leaf_values(problem), problem)
        for i, after in enumerate(cell.states):
            for j, before in enumerate(cell.states):
                total = torch.zeros(sizes[i], sizes[j], dtype=torch.float64)
                for chain in found.get((after, before), ()):
                    total += _matrix(chain, values, problem, sizes[i], sizes[j])
                wanted = expected[i][j].reshape(sizes[i], sizes[j])
                torch.testing.assert_close(total, wanted, rtol=1e-9, atol=1e-11, msg=f"d{after}/d{before}")


def _matrix(chain: calculus.Chain, values: dict[Node, Tensor], problem: Problem, rows: int, columns: int) -> Tensor:
    """diag(d_0) M_1 diag(d_1) ... diag(d_k)."""
    result = torch.eye(rows, dtype=torch.float64)
    for place, slope in enumerate(chain.diagonals):
        result = result * values[slope].expand(1, result.shape[1])
        if place < len(chain.matrices):
            result = result @ problem.block(make("product", (make("state", (), ("h",)),), chain.matrices[place]))
    assert result.shape == (rows, columns)
    return result


@pytest.mark.parametrize("name", ALL)
def test_the_step_jacobian_is_autograds(name: str):
    check_jacobian(ALL[name], seed=3)


@given(random_cells())
@settings(max_examples=60)
def test_the_step_jacobian_of_any_cell_is_autograds(cell: Cell):
    check_jacobian(cell, seed=4)


def test_the_jacobian_of_a_linear_network_is_its_matrix():
    (chain,) = calculus.jacobian(Elman(activation=identity))["h", "h"]
    assert chain.matrices == (("U", ""),)
    assert all(expr.is_constant(slope, 1.0) for slope in chain.diagonals)


# -- stages -----------------------------------------------------------------------------------------------------------


def test_a_product_of_something_computed_begins_a_second_stage():
    def stages(cell: Cell) -> list[list[tuple[str, str]]]:
        return [[product.data for product in stage if product.data[0] != "W"] for stage in calculus.stages(cell.next)]

    assert stages(GRU) == [[("U", gate) for gate in "znr"]] or len(stages(GRU)) == 1
    first, second = stages(GRUResetBefore)
    assert set(first) == {("U", "r"), ("U", "z")}
    assert second == [("U", "n")]
    assert stages(ProjectedLSTM)[-1] == [("P", "")]
    assert len(calculus.stages(calculus.adjoint(ProjectedLSTM).roots)) == 2
    assert {name: len(calculus.stages(cell.next)) for name, cell in CELLS.items()} == {
        "elman": 1,
        "gru": 1,
        "gru-reset-before": 2,
        "lstm": 1,
        "lstm-projected": 2,
    }
