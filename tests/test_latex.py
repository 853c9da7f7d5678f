"""The blackboard page: it reads as a lecturer would write it, and computed as it stands it gives autograd's numbers."""

from __future__ import annotations

import importlib
import itertools
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from blackboards import ALL, random_cells, random_problem
from hypothesis import given, settings
from torch import Tensor

from throughtime.cli import main
from throughtime.engine.problem import Problem, at_step
from throughtime.engine.targets import reference
from throughtime.equations import catalogue, latex
from throughtime.equations.catalogue import CELLS, GRU, LSTM, Elman
from throughtime.equations.cell import Cell, cell
from throughtime.equations.expr import constant, make, tanh, where
from throughtime.equations.latex import LATEX, TERMINAL, Page, blackboard, written
from throughtime.equations.lookup import find
from throughtime.errors import CellError

# -- reading a page back ----------------------------------------------------------------------------------------------

RAISED = "⁰¹²³⁴⁵⁶⁷⁸⁹"
LETTER = rf"[^\W\d{RAISED}ᵀ]"
TOKEN = re.compile(
    rf"{LETTER}(?:{LETTER}|[\d\u0300-\u036f^']|\{{t-1\}})*|\d+(?:\.\d+)?(?:e-?\d+)?|[-+⊙/·()|,<≤ᵀ∞]|[{RAISED}]+"
)
FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "tanh": torch.tanh,
    "σ": torch.sigmoid,
    "exp": torch.exp,
    "log": torch.log,
    "sqrt": torch.sqrt,
    "relu": torch.relu,
    "sign": torch.sign,
    "max": torch.maximum,
    "min": torch.minimum,
    "where": torch.where,
    "diag": torch.diag,
}


@dataclass
class Row:
    """A vector that was transposed: on the right of a vector it makes a matrix."""

    vector: Tensor


class Reader:
    """Computes what an equation says, by the rules that a reader of mathematics applies and no knowledge of cells."""

    def __init__(self, text: str, values: Mapping[str, Tensor]) -> None:
        self.tokens, self.values, self.bars = TOKEN.findall(text), values, 0
        assert "".join(self.tokens) == re.sub(r"\s", "", text), text

    @property
    def next(self) -> str:
        return self.tokens[0] if self.tokens else ""

    def take(self, expected: str = "") -> str:
        assert not expected or self.next == expected, (expected, self.tokens)
        return self.tokens.pop(0)

    def read(self) -> Tensor:
        total = self.sum()
        assert not self.tokens, self.tokens
        return total

    def sum(self) -> Tensor:
        total = -self.product() if self.next == "-" and self.take() else self.product()
        while self.next in ("+", "-"):
            sign = self.take()
            total = total + self.product() if sign == "+" else total - self.product()
        return total

    def product(self) -> Tensor:
        result = self.beside()
        while self.next in ("⊙", "/", "·"):
            sign = self.take()
            result = result / self.beside() if sign == "/" else result * self.beside()
        return result

    def beside(self) -> Tensor:
        """Things side by side, multiplied from the right: a matrix and a vector, a number and anything."""
        parts = [self.atom()]
        while self.next and (self.next[0].isalnum() or self.next == "(" or (self.next == "|" and not self.bars)):
            parts.append(self.atom())
        result = parts.pop()
        while parts:
            result = _beside(parts.pop(), result)
        assert isinstance(result, Tensor)
        return result

    def atom(self) -> Tensor | Row:
        token = self.take()
        value: Tensor | Row
        if token[0].isdigit() or token == "∞":
            value = torch.tensor(float(token.replace("∞", "inf")), dtype=torch.float64)
        elif token == "(":
            value = self.sum()
            self.take(")")
        elif token == "|":
            self.bars += 1
            value = abs(self.sum())
            self.take("|")
            self.bars -= 1
        elif self.next == "(" and token in FUNCTIONS:
            value = FUNCTIONS[token](*self.arguments())
        else:
            value = self.values[token]
        if self.next and self.next[0] in RAISED:
            value = value ** int(self.take().translate(str.maketrans(RAISED, "0123456789")))
        if self.next == "ᵀ":
            self.take()
            value = value.T if value.dim() == 2 else Row(value)
        return value

    def arguments(self) -> list[Tensor]:
        self.take("(")
        found = [self.comparison()]
        while self.next == ",":
            self.take()
            found.append(self.comparison())
        self.take(")")
        return found

    def comparison(self) -> Tensor:
        left = self.sum()
        if self.next in ("<", "≤"):
            return left < self.sum() if self.take() == "<" else left <= self.sum()
        return left


def _beside(left: Any, right: Any) -> Any:
    if isinstance(right, Row):
        return left[:, None] * right.vector
    return left @ right if left.dim() == 2 else left * right


def section(page: Page, title: str) -> list[latex.Equation]:
    return list(next(section for section in page.sections if section.title == title).equations)


def assign(equations: list[latex.Equation], values: dict[str, Tensor]) -> None:
    """Carry the equations out, one after the other; one step stands for the sum over time."""
    for equation in equations:
        assert (equation.sign == "←") == (equation.left in values), f"{equation.left} has two meanings"
        values[equation.left] = Reader(equation.right.replace("Σ_t ", ""), values).read()


def named_values(cell: Cell, problem: Problem) -> dict[str, Tensor]:
    """What stands on the right of the first equations, by the names that the page gives it."""
    symbol = TERMINAL.symbol
    values = {"x_t": problem.x[0, 0]}
    for state, value in zip(cell.states, problem.states, strict=True):
        values[symbol(state, time="t-1")] = value[0]
    for name, value in zip(cell.outside, problem.outside, strict=True):
        per_step = name in cell.per_step
        projected = cell.width_of.get(make("outside", (), (name,))) == "projected"
        width = problem.proj_size if projected else problem.hidden_size
        values[symbol(name, time="t" if per_step else "")] = (value[0, 0] if per_step else value[0]).expand(width)
    for block in (make("parameter", (), (p.namespace, gate)) for p in cell.parameters for gate in p.gates):
        values[symbol(*block.data)] = problem.block(block)
    return {name: value.detach() for name, value in values.items()}


def check_page(cell: Cell, seed: int) -> None:
    """Every number that the page promises, computed from the page's own text, against autograd."""
    page, symbol = blackboard(cell), TERMINAL.symbol
    problem = random_problem(cell, steps=1, rows=1, seed=seed)
    values = named_values(cell, problem)

    def close(name: str, wanted: Tensor) -> None:
        actual = values.get(name, torch.zeros((), dtype=torch.float64))
        actual = actual.sum(-1, keepdim=True) if wanted.shape == (1,) else actual
        torch.testing.assert_close(actual.expand_as(wanted), wanted, rtol=1e-8, atol=1e-10, msg=f"{cell.name}: {name}")

    def step(*states: Tensor) -> tuple[Tensor, ...]:
        return reference.step(problem, problem.x[0], states, at_step(problem, 0))

    after = step(*problem.states)
    assign(section(page, "The step"), values)
    for state, value in zip(cell.states, after, strict=True):
        close(symbol(state, time="t"), value[0].detach())

    seeds = [torch.randn(state.shape, dtype=torch.float64) for state in after]
    scores = [(state * s).sum() for state, s in zip(after, seeds, strict=True) if state.requires_grad]
    found = torch.autograd.grad(scores, problem.tensors, allow_unused=True) if scores else [None] * len(problem.tensors)
    pairs = zip(problem.tensors, found, strict=True)
    expected = problem.with_tensors([torch.zeros_like(t) if g is None else g for t, g in pairs])
    for state, s in zip(cell.states, seeds, strict=True):
        values[symbol(state, time="t", bar=True)] = s[0]
    assign(section(page, "One step back through time"), values)
    close(symbol("x", time="t", bar=True), expected.x[0, 0])
    for state, wanted in zip(cell.states, expected.states, strict=True):
        close(symbol(state, time="t-1", bar=True), wanted[0])
    for name, wanted in zip(cell.outside, expected.outside, strict=True):
        per_step = name in cell.per_step
        close(symbol(name, time="t" if per_step else "", bar=True), wanted[0, 0] if per_step else wanted[0])

    blocks = {symbol(p.namespace, gate): (p.namespace, gate) for p in cell.parameters for gate in p.gates}
    for equation in section(page, "Gradients of the parameters"):
        right, _, which = equation.right.partition("   (")
        index, _, gates = which.rstrip(")").partition(" = ")
        for gate in gates.split(", "):
            one = right.replace(f"δ^{index}_t", f"δ^{gate}_t") if gate else right
            for left in equation.left.split(" = "):
                name = left.removeprefix("∂L/∂")
                name = name.removesuffix(index) + gate if gate else name
                assign([latex.Equation(f"∂L/∂{name}", one)], values)
                close(f"∂L/∂{name}", expected.block(make("parameter", (), blocks.pop(name))))
    assert not blocks, "every parameter has its gradient on the page"

    jacobian = torch.autograd.functional.jacobian(step, tuple(state.detach() for state in problem.states))
    equations = {equation.left: equation for equation in section(page, "The step Jacobian")}
    for (i, after_i), (j, before) in itertools.product(enumerate(cell.states), repeat=2):
        name = f"∂{symbol(after_i, time='t')}/∂{symbol(before, time='t-1')}"
        values["I"] = torch.eye(problem.sizes[i], dtype=torch.float64)
        assign([*(equations.pop(left) for left in list(equations) if left[0] != "∂"), equations.pop(name)], values)
        close(name, jacobian[i][j].reshape(problem.sizes[i], problem.sizes[j]))
    assert not equations


@pytest.mark.parametrize("name", ALL)
def test_the_page_computed_as_it_stands_is_right(name: str):
    check_page(ALL[name], seed=6)


@given(random_cells())
@settings(max_examples=80)
def test_the_page_of_any_cell_is_right(cell: Cell):
    check_page(cell, seed=7)


# -- how it reads -----------------------------------------------------------------------------------------------------


def lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines()]


def test_the_gru_as_a_lecturer_writes_it():
    found = lines(written(GRU, input_size=12, hidden_size=100))
    for line in (
        "r_t = σ(W_r x_t + b_r + U_r h_{t-1} + c_r)",
        "z_t = σ(W_z x_t + b_z + U_z h_{t-1} + c_z)",
        "n_t = tanh(W_n x_t + b_n + r_t ⊙ (U_n h_{t-1} + c_n))",
        "h_t = (1 - z_t) ⊙ n_t + z_t ⊙ h_{t-1}",
        "n̄_t = h̄_t ⊙ (1 - z_t)",
        "δ^n_t = n̄_t ⊙ (1 - n_t²)",
        "r̄_t = δ^n_t ⊙ (U_n h_{t-1} + c_n)",
        "δ^r_t = r̄_t ⊙ r_t ⊙ (1 - r_t)",
        "z̄_t = h̄_t ⊙ h_{t-1} - h̄_t ⊙ n_t",
        "δ^z_t = z̄_t ⊙ z_t ⊙ (1 - z_t)",
        "δ^Un_t = δ^n_t ⊙ r_t",
        "h̄_{t-1} = h̄_t ⊙ z_t + U_rᵀ δ^r_t + U_zᵀ δ^z_t + U_nᵀ δ^Un_t",
        "x̄_t = W_rᵀ δ^r_t + W_zᵀ δ^z_t + W_nᵀ δ^n_t",
        "∂L/∂W_k = Σ_t δ^k_t x_tᵀ   (k = r, z, n)",
        "∂L/∂U_n = Σ_t δ^Un_t h_{t-1}ᵀ",
        "∂h_t/∂h_{t-1} = diag(z_t)",
        "+ diag((h_{t-1} - n_t) ⊙ z_t ⊙ (1 - z_t)) U_z",
        "r_t,  z_t,  n_t,  U_n h_{t-1} + c_n",
        "in all = 3 (H I + H² + 2 H) = 34,200   (I = 12, H = 100)",
    ):
        assert line in found, line


def test_what_reaches_a_state_within_its_own_step_is_added_by_an_arrow():
    found = lines(written(LSTM))
    assert "c̄_t ← c̄_t + h̄_t ⊙ o_t ⊙ (1 - tanh(c_t)²)" in found
    assert "∂L/∂b_k = ∂L/∂d_k = Σ_t δ^k_t   (k = i, f, g, o)" in found
    assert "∂h_t/∂c_{t-1} = diag(o_t ⊙ (1 - tanh(c_t)²) ⊙ f_t)" in found


def test_gates_without_names_need_no_marks():
    found = lines(written(Elman))
    assert "δ_t = h̄_t ⊙ (1 - h_t²)" in found
    assert "∂h_t/∂h_{t-1} = diag(1 - h_t²) U" in found
    assert "∂L/∂b = ∂L/∂c = Σ_t δ_t" in found


def test_names_numbers_and_signs_are_written_neatly():
    @cell(states="h")
    def Neat(x, h, W, U, b, p, *, rate=0.25):
        n_tilde = tanh(W.n @ x + b.n - U.n @ h)
        alpha = p.n * p.n * p.n
        z2 = where(h < 1e-5, -2.0 * n_tilde, alpha / (1 + h**2))
        return -(1 - rate) * h + rate * (z2 - (h - 1.0))

    text = lines(written(Neat))
    assert "ñ_t = tanh(W_n x_t + b_n - U_n h_{t-1})" in text
    assert "α = p_n³" in text
    assert "a_t = α / (1 + h_{t-1}²)" in text, "used twice by the derivative"
    assert "z2_t = where(h_{t-1} < 1e-05, -2 ñ_t, a_t)" in text
    assert "h_t = 0.25 (z2_t - (h_{t-1} - 1)) - 0.75 h_{t-1}" in text
    in_latex = written(Neat, latex=True)
    assert r"\tilde{n}_t &= \tanh(W_n x_t + b_n - U_n h_{t-1})" in in_latex
    assert r"\alpha &= p_n^3" in in_latex
    assert r"a_t &= \frac{\alpha}{1 + h_{t-1}^2}" in in_latex
    assert r"z_{2,t} &= \operatorname{where}(h_{t-1} < 10^{-5}, -2 \tilde{n}_t, a_t)" in in_latex


def test_equations_stay_short_however_much_is_shared():
    """Values used more than once get a letter, where writing them out would double the page at each step."""

    @cell(states="h")
    def Doubling(x, h, W, U):
        a = W @ x + U @ h
        for _ in range(30):
            a = a * tanh(a) + a / (1 + a * a)
        return a

    assert len(written(Doubling)) < 20_000
    check_page(Doubling, seed=8)


def test_columns_are_counted_as_a_terminal_shows_them():
    equals = [line.index(" = ") - sum(c in "\u0304\u0303" for c in line[: line.index(" = ")]) for line in WRITTEN_BACK]
    assert len(set(equals)) == 1


WRITTEN_BACK = written(GRU).split("One step back")[1].split("Gradients")[0].splitlines()[4:-1]


# -- parameters -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_the_formula_counts_the_parameters(name: str):
    one = ALL[name]
    sizes = {"I": 7, "H": 7, "P": 3} if one.projects else {"I": 7, "H": 7}
    equation = section(blackboard(one, TERMINAL, *sizes.values()), "Parameters")[-1]
    formula, value, _ = re.split(r" = |   \(", equation.right, maxsplit=2)
    letters = {letter: torch.tensor(float(size), dtype=torch.float64) for letter, size in sizes.items()}
    count = one.parameter_count(*sizes.values())
    assert Reader(formula, letters).read() == count
    assert int(value.replace(",", "")) == count


def test_sizes_that_do_not_fit_are_said():
    with pytest.raises(CellError, match="LSTM has no projection"):
        written(LSTM, input_size=3, hidden_size=4, proj_size=2)
    text = written(ALL["Unitwise"], input_size=3, hidden_size=4)
    assert "so I = H, which 3 and 4 are not." in text
    assert "in all = H I + H² + H\n" in text
    assert "in all = 4 (H I + H P + 2 H) + P H\n" in written(CELLS["lstm-projected"], input_size=3, hidden_size=4)


# -- LaTeX ------------------------------------------------------------------------------------------------------------


def check_latex(cell: Cell) -> None:
    """Each side of each equation parses, by another project's reader of LaTeX mathematics."""
    from matplotlib.mathtext import MathTextParser

    parser: Any = MathTextParser("path")
    page = blackboard(cell, LATEX, 12, 12, 5 if cell.projects else 0)
    for part in page.sections[:-1]:
        for inline in re.findall(r"\$[^$]+\$", part.note):
            parser.parse(inline)
        for equation in part.equations:
            for side in (equation.left, *equation.right.split("\n")):
                if side:
                    parser.parse(f"${side}$")
    text = latex.as_latex(page)
    assert text.count("{") == text.count("}")
    assert text.isascii() or not cell.about.isascii()


@pytest.mark.parametrize("name", ALL)
def test_the_latex_of_a_page_parses(name: str):
    check_latex(ALL[name])


@given(random_cells())
@settings(max_examples=20)
def test_the_latex_of_any_cell_parses(cell: Cell):
    check_latex(cell)


def test_words_of_the_author_are_escaped():
    @cell(states="h")
    def Snake_Case(x, h, W, U):
        """100% of {this} & that_too, #1."""
        return tanh(W @ x + U @ h)

    text = written(Snake_Case, latex=True)
    assert r"\section*{Snake\_Case}" in text
    assert r"100\% of \{this\} \& that\_too, \#1." in text


def test_both_scripts_write_every_kind_of_number():
    for value in (0.0, -0.0, 1.0, -3.0, 0.1, 1e-7, 1e300, float("inf"), float("-inf"), float("nan")):
        for script in (TERMINAL, LATEX):
            text = latex.Writer(script)(constant(value)).text
            assert text.startswith("-") == str(value).startswith("-")
            assert "e" not in text or script is TERMINAL


# -- as typed ---------------------------------------------------------------------------------------------------------

OWN = """
import throughtime as tt

@tt.cell(states="h")
def Leaky(x, h, W, U, b, *, leak=0.1):
    return (1 - leak) * h + leak * tt.tanh(W @ x + U @ h + b)

def plain(x):
    return x
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a module of one's own, as the current one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(tmp_path))])
    for name, text in {
        "own_cells": OWN,
        "broken_cells": "import not_installed_anywhere",
        "wrong_cells": "1 +",
        "bad_cells": "import throughtime as tt\n@tt.cell(states='h')\ndef Bad(x, h, W):\n    return W @ h",
    }.items():
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.delitem(sys.modules, name, raising=False)
    importlib.invalidate_caches()
    return tmp_path


def show(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["throughtime", "show", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    return int(end.value.code or 0)


def test_show_prints_the_page(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    assert show(monkeypatch, "gru") == 0
    assert capsys.readouterr().out == written(GRU, input_size=12, hidden_size=100)
    assert show(monkeypatch, "lstm-projected", "--latex", "--input", "3", "--hidden", "5", "--proj", "2") == 0
    sizes = {"input_size": 3, "hidden_size": 5, "proj_size": 2}
    assert capsys.readouterr().out == written(CELLS["lstm-projected"], latex=True, **sizes)
    path = list(sys.path)
    assert show(monkeypatch, "own_cells:Leaky") == 0
    assert "h_t = 0.9 h_{t-1} + 0.1 a_t" in capsys.readouterr().out
    assert sys.path == path


REFUSED = {
    "gruu": "there is no cell 'gruu' (did you mean 'gru'?); the cells are elman, gru,",
    "GRU": "(did you mean 'gru'?)",
    "transformer": "there is no cell 'transformer'; the cells are",
    "own_cells:leaky": "module 'own_cells' has no 'leaky' (did you mean 'Leaky'?); its cells are Leaky",
    "own_cells:": "has no ''",
    "own_cells:plain": "'plain' of module 'own_cells' is a plain function, not a cell; its cells are Leaky",
    "own_cells:tt": "is a value of type module, not a cell",
    "own_cell:Leaky": "there is no module 'own_cell' in",
    "own_cells.py:Leaky": "write the module, 'own_cells:Leaky'",
    "./own_cells:Leaky": "'./own_cells' is not the name of a module",
    "broken_cells:X": "module 'broken_cells' cannot be imported: No module named 'not_installed_anywhere'",
    "wrong_cells:X": "module 'wrong_cells' cannot be imported: SyntaxError",
    "bad_cells:Bad": "bad_cells.py:4: `return W @ h`: W multiplies the input x and nothing else",
    "math:sqrt": "it defines no cell; put @cell(...) above a function",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_cell_is_refused_in_one_line(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    assert show(monkeypatch, name) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("throughtime: ")
    assert REFUSED[name] in err


def test_every_cell_of_the_catalogue_can_be_found():
    assert all(find(name) is one for name, one in catalogue.CELLS.items())
    assert find("throughtime.equations.catalogue:LSTM") is LSTM
