"""Tracing a cell: what comes out, what is refused and how, and the cell as data."""

from __future__ import annotations

import copy
import cProfile
import json
import pickle
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from blackboards import ALL, MinimalGated, random_cells
from hypothesis import given, settings
from hypothesis import strategies as st

from throughtime.equations import expr
from throughtime.equations.catalogue import CELLS, GRU, LSTM, Elman
from throughtime.equations.cell import FORMAT, Cell, cell
from throughtime.equations.expr import identity, relu, sigmoid, tanh, where
from throughtime.errors import CellError

# -- what comes out ---------------------------------------------------------------------------------------------------

TORCH = {
    "elman": torch.nn.RNN(4, 7),
    "gru": torch.nn.GRU(4, 7),
    "lstm": torch.nn.LSTM(4, 7),
    "lstm-projected": torch.nn.LSTM(4, 7, proj_size=3),
}


@pytest.mark.parametrize("name", TORCH)
def test_parameters_are_torchs_in_name_order_and_shape(name: str):
    theirs = [(n, tuple(p.shape)) for n, p in TORCH[name].named_parameters()]
    proj_size = 3 if CELLS[name].projects else 0
    ours = [(f"{p.name}_l0", CELLS[name].shape(p, 4, 7, proj_size)) for p in CELLS[name].parameters]
    assert ours == theirs
    assert CELLS[name].parameter_count(4, 7, proj_size) == sum(p.numel() for p in TORCH[name].parameters())


def test_gates_are_stored_in_the_order_of_first_use():
    assert GRU.gates == ("r", "z", "n")
    assert LSTM.gates == ("i", "f", "g", "o")
    assert [p.gates for p in ALL["Peephole"].parameters if p.namespace == "p"] == [("i", "f", "o")]


def test_the_authors_variables_are_kept_by_name():
    assert list(GRU.names) == ["r", "z", "n"]
    assert LSTM.names["c_next"] is LSTM.next[1]
    assert list(MinimalGated.names) == ["f", "n"]


def test_constants_respecialise_a_cell():
    linear = Elman(activation=identity)
    assert linear.hash != Elman.hash
    assert Elman(activation=tanh) == Elman
    assert linear.products == Elman.products
    with pytest.raises(CellError, match="leak is no constant"):
        Elman(leak=0.1)


def test_widths_follow_a_projection_to_whatever_it_meets():
    scaled = ALL["ScaledProjection"]
    m = next(node for node in scaled.nodes if node.op == "outside")
    assert scaled.widths == ("projected", "hidden")
    assert scaled.width_of[m] == scaled.width_of[expr.exp(-m * m)] == "projected"
    assert ALL["LowRank"].widths == ("hidden",)
    assert ALL["LowRank"].projects
    assert not GRU.projects


def test_a_cell_can_be_written_under_a_profiler():
    """Python 3.11's profiler cannot share the interpreter's profile hook."""
    with cProfile.Profile():
        traced = Elman(activation=relu)
    assert traced.next[0].op == "relu"


def test_helpers_outside_the_function_may_build_equations():
    def gate(W: Any, U: Any, x: Any, h: Any) -> Any:
        return sigmoid(W @ x + U @ h)

    @cell(states="h")
    def Split(x, h, W, U, b):
        z = gate(W.z, U.z, x, h)
        return z * h + (1 - z) * tanh(W.n @ x + b.n)

    assert Split.gates == ("z", "n")
    assert list(Split.names) == ["z"]


# -- refusals ---------------------------------------------------------------------------------------------------------


def bad(states: str = "h", **options: Any) -> Callable[[Callable[..., Any]], tuple[Callable[[], Any], str]]:
    """A cell that must be refused, defined only when called."""

    def mark(function: Callable[..., Any]) -> tuple[Callable[[], Any], str]:
        return lambda: cell(function, states=states, **options), function.__doc__ or ""

    return mark


# The docstring of each holds what the refusal must say: the reason and the way out, as a pattern.
# The line that must be named carries the mark `!`.


@bad()
def if_on_a_value(x, h, W, U):
    """`if`.*write where\\("""
    a = tanh(W @ x + U @ h)
    return a if a > 0 else h  # !


@bad()
def chained_comparison(x, h, W, U):
    """a < b < c.*write where"""
    return where(0 < U @ h < 1, h, W @ x)  # !


@bad()
def equality(x, h, W, U):
    """== between nodes.*where"""
    return where(W @ x == 0, h, U @ h)  # !


@bad()
def python_max(x, h, W, U):
    """write where.*maximum"""
    return max(W @ x, U @ h)  # !


@bad()
def math_function(x, h, W, U):
    """math.*use throughtime"""
    import math

    return math.tanh(W @ x + U @ h)  # !


@bad()
def torch_function(x, h, W, U):
    """torch's tanh cannot take a node; use throughtime"""
    a = W @ x + U @ h
    return torch.tanh(a)  # !


@bad()
def torch_constant(x, h, W, U):
    """torch.Tensor cannot stand in an equation.*float\\(a\\)"""
    return h * torch.ones(3) + W @ x  # !


@bad()
def numpy_function(x, h, W, U):
    """numpy.tanh cannot take a node; use throughtime"""
    return np.tanh(W @ x + U @ h)  # !


@bad()
def numpy_array(x, h, W, U):
    """numpy.*cannot take a node"""
    return np.ones(4) * (W @ x) + U @ h  # !


@bad()
def index(x, h, W, U):
    """units cannot be picked by index"""
    return tanh(W @ x) + h[0]  # !


@bad()
def method(x, h, W, U):
    """a node has no .mean.*unit by unit"""
    return tanh(W @ x) + U @ (h - h.mean())  # !


@bad()
def loop_over_units(x, h, W, U):
    """all units at once"""
    return sum(unit for unit in h)  # !


@bad()
def input_without_matrix_namespace(x, h, U):
    """for the input x write W"""
    return tanh(U @ x + U @ h)  # !


@bad()
def w_times_state(x, h, W):
    """W.n multiplies the input x and nothing else; write U"""
    return tanh(W.n @ x + W.n @ h)  # !


@bad()
def w_times_scaled_input(x, h, W, U):
    """scale or mask x before the layer"""
    return tanh(W @ (0.5 * x) + U @ h)  # !


@bad()
def product_of_a_constant(x, h, W, U, b):
    """bias in disguise; write b"""
    return tanh(W.n @ x + U.n @ b.n)  # !


@bad(per_step="m")
def product_of_an_outside_input(x, h, m, W, U):
    """neither x nor a state: put an outside input among the features of x"""
    return tanh(W.n @ x + U.n @ (2 * m))  # !


@bad()
def product_of_a_comparison(x, h, W, U):
    """write U.n @ where\\("""
    return tanh(W.n @ x + U.n @ (h < 0))  # !


@bad()
def matrix_alone(x, h, W, U):
    """W.n is a matrix.*with @"""
    return tanh(W.n + U.n @ h)  # !


@bad()
def matrix_namespace_alone(x, h, W, U):
    """U is a matrix.*with @"""
    return tanh(W @ x + U * h)  # !


@bad()
def vector_times_matrix_sign(x, h, W, p):
    """p holds one value per unit.*by \\*"""
    return tanh(W @ x + p @ h)  # !


@bad()
def node_times_matrix_sign(x, h, W, U):
    """@ needs a matrix on its left"""
    return tanh(W @ x + h @ U)  # !


@bad()
def half_named_gates(x, h, W, U, b):
    """name the gate everywhere"""
    return tanh(W.n @ x + U @ h + b.n)


@bad()
def private_gate(x, h, W, U):
    """begins with a letter"""
    return tanh(W._n @ x + U._n @ h)  # !


@bad()
def returns_nothing(x, h, W, U):
    """NoneType, not an expression; return a value"""
    tanh(W @ x + U @ h)


@bad()
def returns_a_number(x, h, W, U):
    """float, not an expression"""
    return 0.5


@bad()
def returns_a_comparison(x, h, W, U):
    """comparison; write where\\(a < b, 1.0, 0.0\\)"""
    return W @ x < U @ h


@bad("h c")
def returns_too_few(x, h, c, W, U):
    """2 states \\(h, c\\) but returns 1"""
    return tanh(W @ x + U @ h)


@bad()
def unknown_argument(x, h, W, U, leak):
    """'leak' is neither a state.*keyword-only"""
    return tanh(W @ x + U @ h) * leak


@bad()
def arguments_out_of_order(h, x, W, U):
    """must begin with x, h"""
    return tanh(W @ x + U @ h)


@bad()
def starred_arguments(x, h, *matrices):
    """name the arguments"""
    return h


@bad("h h")
def state_twice(x, h, W, U):
    """name each state once"""
    return h


@bad("")
def no_state(x, W):
    """name each state once"""
    return W @ x


@bad(per_step="m")
def outside_not_an_argument(x, h, W, U):
    """outside input m is not among the function's arguments"""
    return tanh(W @ x + U @ h)


@bad(per_step="m", per_sequence="m")
def outside_twice(x, h, m, W, U):
    """name each outside input once"""
    return tanh(W @ x + U @ h + m)


@bad("h c", output="y")
def unknown_output(x, h, c, W, U):
    """output='y' is no state; the states are h, c"""
    return tanh(W @ x + U @ h), c


@bad()
def both_recurrent_biases(x, h, W, U, c, d):
    """two names of one bias"""
    return tanh(W.n @ x + U.n @ h + c.n + d.n)


@bad("h c")
def widths_that_differ(x, h, c, W, U, P):
    """projected value.*meets one of the hidden size"""
    c_next = tanh(W.n @ x + U.n @ h)
    return P @ c_next + c_next, c_next  # !


@bad("h c")
def matrix_of_two_widths(x, h, c, W, U, P):
    """U multiplies values of two widths; use another namespace"""
    c_next = tanh(W.n @ x + U.n @ h + U.m @ c)  # !
    return P @ c_next, c_next


@bad("h c", per_step="m")
def outside_of_two_widths(x, h, c, m, W, U, P):
    """under two names"""
    c_next = m * tanh(W.n @ x + U.n @ h)
    return m * (P @ c_next), c_next


@bad()
def remainder(x, h, W, U):
    """bound values with minimum and maximum"""
    return tanh(W @ x + U @ h) % 1  # !


@bad()
def negative_power(x, h, W, U):
    """a power of -1 is not offered; write"""
    return (W @ x + U @ h) ** -1  # !


@bad()
def its_own_mistake(x, h, W, U):
    """ZeroDivisionError: division by zero"""
    return tanh(W @ x + U @ h) * (1 / 0)  # !


BAD = {name: value for name, value in list(globals().items()) if isinstance(value, tuple) and callable(value[0])}


@pytest.mark.parametrize("name", BAD)
def test_what_a_cell_cannot_say_is_refused_with_line_reason_and_way_out(name: str):
    define, pattern = BAD[name]
    with pytest.raises(CellError) as refusal:
        define()
    text = str(refusal.value)
    assert re.search(pattern, text), text
    assert "\n" not in text
    assert f"{__file__}:" in text
    with open(__file__) as source:
        lines = source.readlines()
    (line,) = re.findall(rf"{re.escape(__file__)}:(\d+)", text)
    own = next((i for i, text in enumerate(lines) if f"def {name}(" in text), None)
    marked = next((i + 1 for i in range(own, own + 8) if "# !" in lines[i]), None) if own is not None else None
    assert marked is None or int(line) == marked, text


def test_only_functions_become_cells():
    for thing in (torch.nn.GRU, print, lambda: None):
        with pytest.raises(CellError):
            cell(thing, states="h")


def test_a_refused_cell_leaves_nothing_behind():
    """The observer is put back, so that a later cell traces as if nothing had happened."""
    with pytest.raises(CellError):
        BAD["torch_function"][0]()
    assert expr.observer.get() is None
    assert Elman(activation=tanh) == Elman


# -- the cell as data -------------------------------------------------------------------------------------------------


def _same(a: Cell, b: Cell) -> bool:
    return a == b and a.hash == b.hash and all(m is n for m, n in zip(a.next, b.next, strict=True))


@pytest.mark.parametrize("name", ALL)
def test_a_cell_survives_json_pickle_and_copies(name: str):
    original = ALL[name]
    for read in (Cell.from_json(original.to_json()), pickle.loads(pickle.dumps(original)), copy.deepcopy(original)):
        assert _same(read, original)
        assert (read.states, read.output, read.parameters) == (original.states, original.output, original.parameters)
        assert list(read.names) == list(original.names)
        assert all(read.names[name] is node for name, node in original.names.items())
        assert (read.name, read.about) == (original.name, original.about)
        with pytest.raises(CellError, match="loaded as data"):
            read(activation=relu)


@given(random_cells())
@settings(max_examples=60)
def test_any_cell_survives_json(random: Cell):
    read = Cell.from_json(random.to_json())
    assert _same(read, random)
    assert read.to_json() == random.to_json()


def test_the_hash_is_of_the_mathematics_not_of_the_names():
    @cell(states="h", name="Another")
    def Renamed(x, h, W, U, b, c):
        """Other words."""
        reset = sigmoid(W.r @ x + b.r + U.r @ h + c.r)
        update = sigmoid(W.z @ x + b.z + U.z @ h + c.z)
        return (1 - update) * tanh(W.n @ x + b.n + reset * (U.n @ h + c.n)) + update * h

    @cell(states="h")
    def Reordered(x, h, W, U, b, c):
        r = sigmoid(W.r @ x + b.r + U.r @ h + c.r)
        z = sigmoid(W.z @ x + b.z + U.z @ h + c.z)
        n = tanh(W.n @ x + b.n + r * (U.n @ h + c.n))
        return z * h + (1 - z) * n

    @cell(states="h")
    def Restored(x, h, W, U, b, c):
        z = sigmoid(W.z @ x + b.z + U.z @ h + c.z)
        r = sigmoid(W.r @ x + b.r + U.r @ h + c.r)
        n = tanh(W.n @ x + b.n + r * (U.n @ h + c.n))
        return (1 - z) * n + z * h

    assert Renamed == GRU
    assert hash(Renamed) == hash(GRU)
    assert Reordered != GRU, "the order of operands is the order of rounding"
    assert Restored != GRU, "the order of gates is the layout of the weights"
    assert len({c.hash for c in ALL.values()}) == len(ALL)


def test_the_hash_does_not_change_between_versions():
    """Run folders and caches know cells by these; a change here needs a new FORMAT."""
    assert {name: CELLS[name].hash[:12] for name in CELLS} == {
        "elman": "d3b19c81fec7",
        "gru": "5295dfff7391",
        "gru-reset-before": "89f2db1a21e0",
        "lstm": "9a40e79b3f79",
        "lstm-projected": "9c98685fdbde",
    }
    assert FORMAT == "throughtime-cell-1"


def _tampered(change: Callable[[dict[str, Any]], Any]) -> str:
    record = json.loads(GRU.to_json())
    change(record)
    return json.dumps(record)


def _node(record: dict[str, Any], op: str) -> list[Any]:
    return next(node for node in record["nodes"] if node[0] == op)


TAMPERING: dict[str, Callable[[dict[str, Any]], Any]] = {
    "forward reference": lambda r: _node(r, "mul")[1].__setitem__(0, len(r["nodes"]) - 1),
    "negative reference": lambda r: _node(r, "mul")[1].__setitem__(0, -1),
    "reference that is a boolean": lambda r: _node(r, "mul")[1].__setitem__(0, True),
    "reference that is text": lambda r: _node(r, "mul")[1].__setitem__(0, "0"),
    "unknown operation": lambda r: _node(r, "tanh").__setitem__(0, "system"),
    "operation that is a list": lambda r: _node(r, "tanh").__setitem__(0, ["tanh"]),
    "dunder operation": lambda r: _node(r, "tanh").__setitem__(0, "__import__"),
    "leaf of a derivative": lambda r: _node(r, "state").__setitem__(0, "adjoint"),
    "too many arguments": lambda r: _node(r, "tanh")[1].append(0),
    "too few arguments": lambda r: _node(r, "mul")[1].pop(),
    "data on an operation": lambda r: _node(r, "tanh")[2].append("os"),
    "constant that is code": lambda r: _node(r, "const")[2].__setitem__(0, "__import__('os')"),
    "constant too large": lambda r: _node(r, "const")[2].__setitem__(0, "0x1p+99999"),
    "constant that is a number": lambda r: _node(r, "const")[2].__setitem__(0, 1.0),
    "unknown state": lambda r: _node(r, "state")[2].__setitem__(0, "c"),
    "unknown gate": lambda r: _node(r, "product")[2].__setitem__(1, "q"),
    "unknown namespace": lambda r: _node(r, "product")[2].__setitem__(0, "os"),
    "U of x": lambda r: _node(r, "product")[2].__setitem__(0, "U"),
    "W of a state": lambda r: _node(r, "product")[1].__setitem__(0, [n[0] for n in r["nodes"]].index("state")),
    "gate that is not used": lambda r: r["gates"].append("q"),
    "gate twice": lambda r: r["gates"].append("r"),
    "states that are text": lambda r: r.__setitem__("states", "h"),
    "states that are numbers": lambda r: r.__setitem__("states", [1]),
    "next out of range": lambda r: r.__setitem__("next", [10**9]),
    "next negative": lambda r: r.__setitem__("next", [-1]),
    "next missing": lambda r: r.__setitem__("next", []),
    "output out of range": lambda r: r.__setitem__("output", 1),
    "output that is a fraction": lambda r: r.__setitem__("output", 0.5),
    "output that is a boolean": lambda r: r.__setitem__("output", False),
    "names out of range": lambda r: r["names"].__setitem__("r", -1),
    "another format": lambda r: r.__setitem__("format", "throughtime-cell-0"),
    "no format": lambda r: r.pop("format"),
    "no nodes": lambda r: r.pop("nodes"),
    "nodes that are a number": lambda r: r.__setitem__("nodes", 3),
    "node that is a number": lambda r: r["nodes"].__setitem__(0, 3),
    "node of four parts": lambda r: r["nodes"][0].append(1),
}


@pytest.mark.parametrize("what", TAMPERING)
def test_tampered_json_is_refused(what: str):
    assert Cell.from_json(_tampered(lambda record: None)) == GRU
    with pytest.raises(CellError):
        Cell.from_json(_tampered(TAMPERING[what]))


@pytest.mark.parametrize(
    "text",
    ["", "{", "null", "3", '"gru"', "[]", "{}", "[" * 100_000, "\x00", "1" * 5000, '{"format": "throughtime-cell-1"}'],
    ids=lambda text: text[:10] or "empty",
)
def test_what_is_not_a_cells_json_is_refused(text: str):
    with pytest.raises(CellError):
        Cell.from_json(text)


@given(st.data())
@settings(max_examples=150)
def test_json_with_anything_anywhere_is_a_cell_or_refused(data: st.DataObject):
    """Whatever one value is replaced by, the result is a CellError or a sound cell, never another exception."""
    record = json.loads(GRU.to_json())
    junk = st.one_of(
        st.none(), st.booleans(), st.integers(-3, 99), st.floats(), st.text(max_size=3), st.just([]), st.just({})
    )
    place: Any = record
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = data.draw(st.sampled_from(keys))
        if isinstance(place[key], dict | list) and place[key] and data.draw(st.booleans()):
            place = place[key]
            continue
        place[key] = data.draw(junk)
        break
    try:
        read = Cell.from_json(json.dumps(record))
    except CellError:
        return
    assert Cell.from_json(read.to_json()) == read
    assert read.parameter_count(3, 4) >= 0


def test_a_cell_is_shown_in_a_line():
    @cell(states="h")
    def Doubling(x, h, W, U):
        a = W @ x + U @ h
        for _ in range(200):
            a = a * tanh(a)
        return a

    assert repr(GRU) == "Cell(GRU, states=h, gates=r z n, 5295dfff7391)"
    assert len(repr(Doubling)) < 100
    assert len(repr(Doubling.next[0])) < 1000


def test_a_very_deep_cell_is_still_data():
    @cell(states="h")
    def Deep(x, h, W, U):
        a = W @ x + U @ h
        for _ in range(3000):
            a = tanh(a)
        return a

    assert _same(Cell.from_json(Deep.to_json()), Deep)
