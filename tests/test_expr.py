"""Nodes are shared and refuse what they cannot mean; every row of the table of operations is right in all columns."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from blackboards import evaluate
from hypothesis import given
from hypothesis import strategies as st

import throughtime
from throughtime.engine.codegen import torch_spelling
from throughtime.equations import expr
from throughtime.equations.cell import Namespace
from throughtime.equations.expr import OPS, Node, apply, constant, make, where
from throughtime.errors import CellError

X, H = make("input"), make("state", (), ("h",))
POINTS = (-2.3, -0.7, 0.3, 1.9)
AWKWARD = (*POINTS, 0.0, -0.0, math.inf, -math.inf, math.nan, 800.0, -800.0)
SMOOTH = [op for op, row in OPS.items() if not row.truth]


# -- interning --------------------------------------------------------------------------------------------------------


def test_equal_expressions_are_one_object():
    assert X * 2 + H is X * 2 + H
    assert expr.tanh(H) is expr.tanh(H)
    assert X - H is not H - X


def test_constants_are_known_by_their_bits():
    assert constant(0.1) is constant(0.1)
    assert constant(0.0) is not constant(-0.0)
    assert constant(math.nan) is constant(math.nan)
    assert constant(1) is constant(1.0)


def test_threads_get_the_same_object():
    def build(_: int) -> Node:
        node = H
        for i in range(50):
            node = expr.tanh(node * (i + 0.123))
        return node

    with ThreadPoolExecutor(8) as threads:
        nodes = list(threads.map(build, range(32)))
    assert all(node is nodes[0] for node in nodes)


def test_copies_and_pickles_lead_back_to_the_object():
    node = expr.sigmoid(X * 3 - H) / 7
    assert copy.copy(node) is node
    assert copy.deepcopy([node])[0] is node
    assert pickle.loads(pickle.dumps(node)) is node


def test_nodes_that_nobody_holds_are_forgotten():
    before = len(expr._nodes)
    made = [H + 1000.5 + i for i in range(100)]
    assert len(expr._nodes) >= before + 100
    del made
    assert len(expr._nodes) <= before + 1


@given(st.sampled_from([op for op in SMOOTH if op != "where"]), st.lists(st.floats(), min_size=2, max_size=2))
def test_folded_constants_are_what_the_operation_gives(op: str, numbers: list[float]):
    numbers = numbers[: OPS[op].arity]
    try:
        expected = constant(OPS[op].value(*numbers))
    except (ArithmeticError, ValueError):
        return
    leaves = [make("state", (), (f"s{i}",)) for i in range(len(numbers))]
    assert apply(op, *numbers) is expected
    assert constant(evaluate(make(op, tuple(leaves)), dict(zip(leaves, numbers, strict=True)))) is expected


def test_neutral_elements_vanish_and_nothing_else_is_rearranged():
    assert 1 * X is X
    assert X * 1.0 is X
    assert 0 + X is X
    assert X - 0 is X
    assert X / 1 is X
    minus = -X
    assert -minus is X
    assert X * 0 is not constant(0.0), "0 * NaN is NaN"
    assert X - X is not constant(0.0), "inf - inf is NaN"
    assert (X + H) + 1 is not X + (H + 1), "rounding order is part of the contract"


# -- refusals ---------------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "==": (lambda a: a == 1, "where"),
    "!=": (lambda a: a != a, "where"),
    "if": (lambda a: 1 if a else 2, "where"),
    "and": (lambda a: a and a, "where"),
    "not": (lambda a: not a, "where"),
    "max": (lambda a: max(a, 0), "maximum"),
    "a < b < c": (lambda a: 0 < a < 1, "where"),
    "&": (lambda a: (a < 1) & (a > 0), "where"),
    "float": (lambda a: float(a), "throughtime"),
    "int": (lambda a: int(a), "throughtime"),
    "math": (lambda a: math.tanh(a), "throughtime"),
    "index": (lambda a: [1, 2, 3][a], "throughtime"),
    "range": (lambda a: range(a), "throughtime"),
    "iterate": (lambda a: list(a), "all units"),
    "unpack": (lambda a: (lambda b, c: b)(*a), "all units"),
    "subscript": (lambda a: a[0], "unit by unit"),
    "method": (lambda a: (a + 1).sum(), "unit by unit"),
    "matrix product": (lambda a: a @ a, "matrix on its left"),
    "power": (lambda a: a**-1, "exp(k * log(a))"),
    "power of a node": (lambda a: a**a, "exp(k * log(a))"),
    "number to a power": (lambda a: 2**a, "exp(a * k)"),
    "remainder": (lambda a: a % 2, "minimum"),
    "whole division": (lambda a: a // 2, "minimum"),
    "number over comparison": (lambda a: 1 + (a < 1), "where"),
    "where without comparison": (lambda a: where(a, 1, 2), "comparison"),
    "string": (lambda a: a + "1", "numbers"),
    "bool": (lambda a: a + True, "numbers"),
    "complex": (lambda a: a * 1j, "numbers"),
    "None": (lambda a: apply("add", a, None), "numbers"),
    "numpy array, left": (lambda a: np.ones(3) * a, "throughtime"),
    "numpy array, right": (lambda a: a * np.ones(3), "numbers"),
    "numpy number, left": (lambda a: np.float32(2) * a, "float(a)"),
    "numpy number, right": (lambda a: a * np.float32(2), "float(a)"),
    "numpy function": (lambda a: np.tanh(a), "throughtime"),
    "numpy array of nodes": (lambda a: np.array([a, a]), "throughtime"),
    "numpy stack": (lambda a: np.stack([a, a]), "throughtime"),
    "numpy matrix product": (lambda a: np.ones((2, 2)) @ a, "throughtime"),
    "torch tensor, left": (lambda a: torch.ones(3) * a, "throughtime"),
    "torch tensor, right": (lambda a: a * torch.ones(3), "numbers"),
    "torch function": (lambda a: torch.tanh(a), "throughtime"),
    "torch stack": (lambda a: torch.stack([a, a]), "throughtime"),
}


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.parametrize("value", [H, Namespace("b")], ids=["node", "namespace"])
def test_what_an_expression_cannot_mean_is_refused_with_a_way_out(what: str, value: Any):
    attempt, way_out = REFUSED[what]
    if what == "matrix product" and isinstance(value, Namespace):
        way_out = "one value per unit"
    with pytest.raises(AttributeError if what == "method" else CellError) as refusal:
        attempt(value)
    assert way_out in str(refusal.value)


def test_nodes_are_not_made_by_hand():
    with pytest.raises(CellError, match="under @cell"):
        Node()
    with pytest.raises(CellError, match="takes 2 arguments"):
        apply("add", X)


def test_numpy_numbers_that_are_python_floats_are_constants():
    assert H * np.float64(2) is H * 2.0


# -- the table --------------------------------------------------------------------------------------------------------


def _arguments(op: str) -> tuple[list[Node], list[Node]]:
    """The leaves of an operation and its arguments; a condition takes two leaves of its own."""
    leaves = [make("state", (), (f"s{i}",)) for i in range(OPS[op].arity + (op == "where"))]
    return leaves, [leaves[0] < leaves[1], *leaves[2:]] if op == "where" else leaves


def _defined(op: str, points: tuple[float, ...]) -> list[tuple[float, ...]]:
    """The points where Python can compute the operation, away from ties."""
    leaves, args = _arguments(op)
    found = []
    for numbers in itertools.permutations(points, len(leaves)):
        try:
            evaluate(make(op, tuple(args)), dict(zip(leaves, numbers, strict=True)))
        except (ArithmeticError, ValueError):
            continue
        found.append(numbers)
    return found


@pytest.mark.parametrize("op", SMOOTH)
def test_the_derivative_is_the_slope_of_the_value(op: str):
    leaves, args = _arguments(op)
    y, g = make(op, tuple(args)), make("adjoint", (), ("y",))
    terms = dict(zip(args, OPS[op].derivative(y, g), strict=True))
    points = _defined(op, POINTS)
    assert len(points) >= 2
    for numbers in points:
        values = dict(zip(leaves, numbers, strict=True))
        for leaf in leaves:
            step = 1e-6
            ahead, behind = (evaluate(y, values | {leaf: values[leaf] + s}) for s in (step, -step))
            term = terms.get(leaf)
            slope = 0.0 if term is None else evaluate(term, values | {g: 1.5, y: evaluate(y, values)})
            assert slope == pytest.approx(1.5 * (ahead - behind) / (2 * step), rel=1e-7, abs=1e-8), (op, numbers)


@pytest.mark.parametrize("op", [op for op, row in OPS.items() if row.truth])
def test_a_comparison_has_no_derivative(op: str):
    y = make(op, (X, H))
    assert OPS[op].derivative(y, make("adjoint", (), ("y",))) == (None, None)
    assert y.is_condition


@pytest.mark.parametrize("op", OPS)
def test_torch_agrees_with_the_value_and_launders_nothing(op: str):
    """Also at NaN, infinities and signed zeros; where Python raises (a pole, an overflow), torch is not finite."""
    row = OPS[op]
    first = (True, False) if op == "where" else AWKWARD
    for numbers in itertools.product(first, *[AWKWARD] * (row.arity - 1)):
        operands = [torch.tensor(n, dtype=torch.bool if isinstance(n, bool) else torch.float64) for n in numbers]
        spelled = torch_spelling(op)(*operands).item()
        try:
            expected = row.value(*numbers)
        except (ArithmeticError, ValueError):
            assert not math.isfinite(spelled), (op, numbers)
            continue
        assert spelled == pytest.approx(expected, rel=1e-14, abs=1e-300, nan_ok=True), (op, numbers)
        if not row.truth and op != "where" and any(n != n for n in numbers):
            assert math.isnan(spelled), (op, numbers)


@pytest.mark.parametrize("op", OPS)
def test_a_row_is_complete(op: str):
    row = OPS[op]
    assert callable(getattr(torch, row.torch))
    arguments = [str(i) for i in range(row.arity)]
    for written in (row.text, row.latex):
        assert all(argument in written.format(*arguments) for argument in arguments)
    assert row.precedence in range(5)
    assert row.llvm


def test_every_row_can_be_written_from_the_package():
    """Each operation has an operator or a public function."""
    a, b = X, H
    written = {
        *(a + b, a - b, a * b, a / b, -a, abs(a), a < b, a <= b, a**0.5),
        *(getattr(throughtime, name)(a) for name in ("exp", "log", "log1p", "sqrt", "sign", "tanh", "sigmoid", "relu")),
        *(throughtime.maximum(a, b), throughtime.minimum(a, b), throughtime.where(a < b, a, b)),
    }
    assert {node.op for node in written} == set(OPS)


@given(st.floats(-700, 700))
def test_softplus_is_exact_at_both_ends(a: float):
    found = evaluate(expr.softplus(H), {H: a})
    assert found == pytest.approx(math.log1p(math.exp(a)) if a < 30 else a + math.exp(-a), rel=1e-14)


def test_comparisons_know_both_directions():
    assert (X > H) is (H < X)
    assert (X >= H) is (H <= X)


# -- walks ------------------------------------------------------------------------------------------------------------


def test_a_walk_meets_arguments_first_and_each_node_once():
    a = expr.tanh(X + H)
    order = expr.postorder([a * a, a])
    assert len(order) == len(set(order))
    place = {node: i for i, node in enumerate(order)}
    assert all(place[arg] < place[node] for node in order for arg in node.args)


def test_a_walk_stops_where_told_and_survives_depth():
    a = expr.tanh(X)
    order = expr.postorder([a + H], stop=lambda n: n is a)
    assert [id(node) for node in order] == [id(a), id(H), id(a + H)]
    deep = X
    for _ in range(20_000):
        deep = expr.tanh(deep)
    assert len(expr.postorder([deep])) == 20_001


def test_substitution_rewrites_and_folds():
    assert expr.substitute(expr.tanh(X * H), {H: constant(1.0)}) is expr.tanh(X)
