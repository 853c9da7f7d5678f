"""A cell on the blackboard: its equations, its adjoints, its step Jacobian, in Unicode for a terminal or in LaTeX.

`blackboard` collects the page as data, lists of equations; `as_text` and `as_latex` lay it out. Both scripts are one
walk over the same graphs with another column of the table of operations.
"""

from __future__ import annotations

import itertools
import textwrap
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce

from throughtime.equations import calculus, expr
from throughtime.equations.cell import Cell, Parameter
from throughtime.equations.expr import OPS, Node, make
from throughtime.errors import CellError

GREEK = {
    "alpha": "α", "beta": "β", "gamma": "γ", "delta": "δ", "epsilon": "ε", "zeta": "ζ", "eta": "η", "theta": "θ",
    "kappa": "κ", "lambda": "λ", "mu": "μ", "nu": "ν", "xi": "ξ", "rho": "ρ", "sigma": "σ", "tau": "τ", "phi": "φ",
    "chi": "χ", "psi": "ψ", "omega": "ω",
}  # fmt: skip
SPARE = ("a", "s", "u", "v", "q", "e", "y", "m")
"""Letters for values that the author left without a name but that would be written out at length more than once."""
SPARE_GREEK = ("epsilon", "eta", "kappa", "rho", "tau", "phi", "xi", "psi")
"""The same for adjoints."""
WIDE = 100
"""A sum longer than this many characters gets a line for each term."""
LONG, LONG_ADJOINT = 4, 12
"""How many nodes are written out at length more than once before they get a letter."""
LONGEST = 80
"""How many nodes are written out in one equation, used once or not; what is longer gets a letter for a part of it."""

PRIMES = 3
"""How many primes tell letters apart before a number does."""

RELATION, SUM, FACTOR, MATRIX, ATOM = range(5)
"""How strongly a piece of text binds: the strengths of the table of operations, and a matrix product's."""


@dataclass(frozen=True)
class Equation:
    """left = right; a line break in `right` is where a long sum may be broken."""

    left: str
    right: str
    sign: str = "="


@dataclass(frozen=True)
class Section:
    """A heading, what its letters mean, and its equations."""

    title: str
    note: str
    equations: tuple[Equation, ...]


@dataclass(frozen=True)
class Page:
    """Everything that is derived from one cell, ready to be laid out."""

    name: str
    about: str
    hash: str
    sections: tuple[Section, ...]


@dataclass(frozen=True)
class Piece:
    """Some written mathematics: a sum of terms, each with its sign (True is minus), and how strongly it binds.

    `power` is (base, exponent) of what was multiplied by itself, so that a * a * a is written as a cube.
    """

    terms: tuple[tuple[bool, str], ...]
    strength: int = ATOM
    power: tuple[str, int] = ("", 1)
    is_number: bool = False

    @property
    def text(self) -> str:
        """The sum as one reads it, from a positive term where there is one: b - a rather than -a + b."""
        (minus, first), *others = self.ordered
        return ("-" if minus else "") + first + "".join(f" {'-' if m else '+'} {term}" for m, term in others)

    @property
    def ordered(self) -> tuple[tuple[bool, str], ...]:
        """The terms, a positive one first and equal ones together."""
        times = Counter(self.terms)
        terms = [
            (minus, f"{many} {text}" if many > 1 and not text[0].isdigit() else text)
            for (minus, text), many in times.items()
            for _ in range(many if text[0].isdigit() else 1)
        ]
        place = next((i for i, (minus, _) in enumerate(terms) if not minus), 0)
        return terms[place], *terms[:place], *terms[place + 1 :]

    @property
    def minus(self) -> bool:
        """Whether it is one term with a minus before it."""
        return len(self.terms) == 1 and self.terms[0][0]

    @property
    def is_name(self) -> bool:
        """Whether it can carry an exponent or a transpose without brackets."""
        return len(self.terms) == 1 and not self.minus and self.strength == ATOM and "^" not in self.text

    @property
    def negative(self) -> Piece:
        """The same single term with the other sign."""
        ((minus, text),) = self.terms
        return replace(self, terms=((not minus, text),))


def _one(text: str, strength: int = ATOM) -> Piece:
    return Piece(((False, text),), strength)


# ---------------------------------------------------------------------------------------------------------------------
# Two scripts


class Script:
    """What differs between a terminal and LaTeX. The methods return text; names are split by `parts_of`."""

    transposed = "{}ᵀ"
    diagonal = "diag{}"
    over_time = "Σ_t {}"
    partial = "∂{}/∂{}"
    inline = "{}"
    times = "{} · {}"
    stack, stacked = "[{}]", "; "
    where_index = "   ({} = {})"
    by = "×"
    gap = "   "
    listed = ",  "
    thousands = ","
    wide = WIDE

    def spelling(self, op: str) -> str:
        """The format of an operation."""
        return OPS[op].text

    def symbol(self, name: str, gate: str = "", time: str = "", bar: bool = False) -> str:
        """A letter with its gate, its time and, for an adjoint, its bar."""
        letter, accent, below = parts_of(name)
        letter = GREEK.get(letter, letter)
        mark = {"tilde": "\u0303", "hat": "\u0302"}.get(accent, "")
        if bar and len(letter) > 1:
            letter = "".join(character + "\u0305" for character in letter)
        elif bar:
            mark += "\u0304"
        letter = unicodedata.normalize("NFC", letter + mark)
        letter += below if below.isdigit() else below and f"_{below}"
        when = f"_{{{time}}}" if len(time) > 1 else time and f"_{time}"
        return letter + (gate and f"_{gate}") + when

    def delta(self, namespace: str, gate: str, primes: int = 0) -> str:
        """The adjoint of a product, marked by its gate and, where that is not enough, its namespace and primes."""
        mark = namespace + gate + ("'" * primes if primes <= PRIMES else str(primes))
        return f"δ^{mark}_t" if mark else "δ_t"

    def power(self, base: str, exponent: int) -> str:
        """The base to a small whole number."""
        return base + "".join("⁰¹²³⁴⁵⁶⁷⁸⁹"[int(digit)] for digit in str(exponent))

    def fraction(self, above: Piece, below: Piece) -> str:
        """A quotient, unit by unit."""
        return self.spelling("div").format(self.factor(above), self.enclosed(below, ATOM))

    def number(self, value: float) -> str:
        """A constant that is not negative; whole numbers without a decimal point."""
        if value != value or value == float("inf"):
            return "NaN" if value != value else "∞"
        return str(int(value)) if value.is_integer() and value < 1e6 else repr(value)

    def upright(self, word: str) -> str:
        """A word among mathematics."""
        return word

    def bracket(self, inside: str) -> str:
        """Parentheses."""
        return f"({inside})"

    def enclosed(self, piece: Piece, strength: int) -> str:
        """A piece, in parentheses if it binds less than it must."""
        loose = len(piece.terms) > 1 or piece.minus or piece.strength < strength
        return self.bracket(piece.text) if loose else piece.text

    def factor(self, piece: Piece) -> str:
        """A piece ready to stand beside ⊙, where a matrix product would be misread."""
        return self.bracket(piece.text) if piece.strength == MATRIX else self.enclosed(piece, FACTOR)

    def raised(self, piece: Piece) -> str:
        """A piece ready to carry an exponent or a transpose."""
        return piece.text if piece.is_name and piece.power[1] == 1 else self.bracket(piece.text)


class Latex(Script):
    """LaTeX, for any document that loads amsmath."""

    transposed = r"{}^\top"
    over_time = r"\sum_t {}"
    partial = r"\partial {} / \partial {}"
    inline = "${}$"
    times = r"{} \cdot {}"
    stack, stacked = r"\begin{{bmatrix}} {} \end{{bmatrix}}", r" \\ "
    where_index = r" \quad ({} = {})"
    by = r"\times"
    gap = r" \quad "
    listed = r",\; "
    thousands = "{,}"
    wide = 2 * WIDE
    diagonal = r"\operatorname{{diag}}{}"

    def spelling(self, op: str) -> str:
        """The format of an operation, from the table's other column."""
        return OPS[op].latex

    def word(self, text: str) -> str:
        """A name of one letter in italics, a longer one upright, a Greek one in Greek."""
        if text in GREEK:
            return "\\" + text
        return text if len(text) < 2 or text.isdigit() else rf"\mathrm{{{text}}}".replace("_", r"\_")

    def symbol(self, name: str, gate: str = "", time: str = "", bar: bool = False) -> str:
        """A letter whose gate and time share one subscript."""
        letter, accent, below = parts_of(name)
        shown = self.word(letter)
        if accent:
            shown = rf"\{accent}{{{shown}}}"
        if bar:
            shown = rf"\bar{{{shown}}}" if len(letter) == 1 or letter in GREEK else rf"\overline{{{shown}}}"
        lower = ",".join(part for part in (self.word(below), self.word(gate), time) if part)
        return shown + (f"_{{{lower}}}" if len(lower) > 1 else lower and f"_{lower}")

    def delta(self, namespace: str, gate: str, primes: int = 0) -> str:
        """The adjoint of a product, its marks in the exponent."""
        mark = f"{namespace}_{{{self.word(gate)}}}" if namespace and gate else namespace + self.word(gate)
        mark += r"\prime" * primes if primes <= PRIMES else str(primes)
        return rf"\delta^{{{mark}}}_t" if mark else r"\delta_t"

    def power(self, base: str, exponent: int) -> str:
        """The base to a small whole number."""
        return f"{base}^{exponent}" if exponent < 10 else f"{base}^{{{exponent}}}"

    def fraction(self, above: Piece, below: Piece) -> str:
        """A quotient, one above the other, which needs no brackets."""
        return self.spelling("div").format(above.text, below.text)

    def number(self, value: float) -> str:
        """A constant that is not negative, with powers of ten written out."""
        plain = super().number(value)
        digits, e, exponent = plain.partition("e")
        if e:
            return (rf"{digits} \cdot " if digits != "1" else "") + rf"10^{{{int(exponent)}}}"
        return {"∞": r"\infty", "NaN": r"\mathrm{NaN}"}.get(plain, plain)

    def upright(self, word: str) -> str:
        """A word among mathematics, in roman type."""
        return rf"\mathrm{{{word}}}".replace("_", r"\_").replace(" ", r"\ ")

    def bracket(self, inside: str) -> str:
        """Parentheses, which grow around fractions."""
        return rf"\left({inside}\right)" if r"\frac" in inside else f"({inside})"


TERMINAL, LATEX = Script(), Latex()


def parts_of(name: str) -> tuple[str, str, str]:
    """A variable's name as letter, accent and subscript: `n_tilde` has an accent, `n_top` and `n2` have subscripts."""
    stem, _, rest = name.strip("_").partition("_")
    if rest in ("tilde", "hat"):
        return stem, rest, ""
    letter = stem.rstrip("0123456789")
    if letter and letter != stem and not rest:
        return letter, "", stem[len(letter) :]
    return stem or name, "", rest


class Writer:
    """Writes nodes in a script. A node in `names` is written by its name wherever it is used.

    With `longest`, what takes more characters stands as an ellipsis inside of what is larger: for single values of any
    cell, whose text may be exponentially long.
    """

    def __init__(self, script: Script, longest: int | None = None) -> None:
        self.script = script
        self.longest = longest
        self.names: dict[Node, Piece] = {}

    def __call__(self, node: Node) -> Piece:
        """The node as a part of something larger."""
        pieces: dict[Node, Piece] = {}
        for part in expr.postorder([node], stop=lambda n: n in self.names):
            known = self.names.get(part)
            pieces[part] = known or self._written(part, [pieces[arg] for arg in part.args])
        return pieces[node]

    def definition(self, node: Node) -> Piece:
        """What a node that may have a name stands for."""
        return self._written(node, [self(arg) for arg in node.args])

    def _written(self, node: Node, args: list[Piece]) -> Piece:
        if self.longest is not None:
            args = [_one("…") if sum(len(text) for _, text in arg.terms) > self.longest else arg for arg in args]
        return self._operation(node, args) if node.op in OPS else self._leaf(node, args)

    def _leaf(self, node: Node, args: list[Piece]) -> Piece:
        script = self.script
        if node.op == "const":
            value = node.data[0]
            return Piece(((str(value).startswith("-"), script.number(abs(value))),), is_number=True)
        if node.op in ("product", "transposed"):
            matrix = script.symbol(*node.data)
            matrix = matrix if node.op == "product" else script.transposed.format(matrix)
            return _one(f"{matrix} {script.enclosed(args[0], ATOM)}", MATRIX)
        if node.op == "parameter":
            return _one(script.symbol(*node.data))
        name = node.data[0] if node.data else "x"
        return _one(script.symbol(name, time="t-1" if node.op == "state" else "t", bar=node.op == "adjoint"))

    def _operation(self, node: Node, args: list[Piece]) -> Piece:
        match node.op:
            case "add":
                return self._sum(*args)
            case "sub":
                return self._sum(args[0], self._negative(args[1]))
            case "neg":
                return self._negative(args[0])
            case "mul":
                return self._signed(self._times, *args)
            case "div":
                return self._signed(self._over, *args)
            case "log1p":  # a lecturer writes it out
                return self._spelled("log", self._sum(_one("1"), args[0]))
        return self._spelled(node.op, *args)

    def _spelled(self, op: str, *args: Piece) -> Piece:
        strength = OPS[op].precedence
        delimited = strength in (RELATION, ATOM)
        inside = [arg.text if delimited else self.script.enclosed(arg, strength + 1) for arg in args]
        return _one(self.script.spelling(op).format(*inside), strength)

    def _sum(self, a: Piece, b: Piece) -> Piece:
        return Piece(a.terms + b.terms, SUM)

    def _negative(self, a: Piece) -> Piece:
        return Piece(((True, self.script.bracket(a.text)),)) if len(a.terms) > 1 else a.negative

    def _signed(self, combine: Callable[[Piece, Piece], Piece], a: Piece, b: Piece) -> Piece:
        """Signs of factors go to the front, which no rounding notices."""
        result = combine(a.negative if a.minus else a, b.negative if b.minus else b)
        return self._negative(result) if a.minus != b.minus else result

    def _times(self, a: Piece, b: Piece) -> Piece:
        script, (base, exponent) = self.script, a.power
        if a.is_number or b.is_number:
            number, other = (a, b) if a.is_number else (b, a)
            beside = script.enclosed(other, FACTOR)
            form = script.times if beside[0].isdigit() else "{} {}"
            return other if number.text == "1" else _one(form.format(number.text, beside), FACTOR)
        if b.text in (a.text, base):
            exponent = exponent + 1 if b.text == base else 2
            return Piece(((False, script.power(script.raised(b), exponent)),), ATOM, (b.text, exponent))
        right = script.factor(b)
        return _one(
            script.spelling("mul").format(script.factor(a), f"({right})" if right[0].isdigit() else right), FACTOR
        )

    def _over(self, a: Piece, b: Piece) -> Piece:
        return _one(self.script.fraction(a, b), FACTOR)


# ---------------------------------------------------------------------------------------------------------------------
# The page


def blackboard(
    cell: Cell, script: Script = TERMINAL, input_size: int = 0, hidden_size: int = 0, proj_size: int = 0
) -> Page:
    """All that follows from a cell's equations, as lists of equations; with sizes, also how many numbers it learns.

    Raises CellError for a proj_size where the cell has no projection. Sources: Werbos 1990 for the adjoints through
    time; Pascanu, Mikolov & Bengio 2013 for the step Jacobian.
    """
    if proj_size and not cell.projects:
        raise CellError(f"{cell.name} has no projection, so it has no size {proj_size}; a cell projects with P @ ...")
    board = _Board(cell, script)
    sections = (
        board.step(),
        board.adjoints(),
        board.gradients(),
        board.jacobian(),
        board.kept(),
        board.parameters(input_size, hidden_size, proj_size),
    )
    return Page(cell.name, cell.about, cell.hash, sections)


class _Board:
    """The names on one blackboard, and the sections that use them."""

    def __init__(self, cell: Cell, script: Script) -> None:
        self.cell, self.script, self.write = cell, script, Writer(script)
        self.adjoint = calculus.adjoint(cell)
        self.chains = calculus.chains_in(cell)
        self.jacobians = calculus.jacobian(cell) if self.chains <= calculus.MOST_CHAINS else {}
        self.forward = set(cell.nodes)
        self.variable: dict[Node, str] = {}
        self.given = {"x", *cell.states, *cell.outside, *(p.namespace for p in cell.parameters)}
        self.letters = self.given | set(cell.names)
        self.defined: set[Node] = set()
        self.spares: dict[tuple[str, ...], Iterator[str]] = {}
        self._name_values()
        self._name_adjoints()

    # -- names --------------------------------------------------------------------------------------------------------

    def _name_values(self) -> None:
        """The next states, the author's variables, and a letter for what else is long and used more than once."""
        cell, moving = self.cell, self._moving()

        def name(node: Node, name: str) -> None:
            if node not in self.variable and (node.op in OPS or node.op == "product"):
                self.variable[node] = name
                self.write.names[node] = _one(self.script.symbol(name, time="t" if node in moving else ""))

        moving |= set(cell.next)
        for sequence in cell.per_sequence:
            self.write.names[make("outside", (), (sequence,))] = _one(self.script.symbol(sequence))
        for state, node in zip(cell.states, cell.next, strict=True):
            name(node, state)
        for variable, node in cell.names.items():
            if variable not in self.given:
                name(node, variable)
        for node in self._unwieldy((*cell.next, *self.adjoint.roots), LONG, lambda node: node in self.forward):
            name(node, self._spare(SPARE))

    def _moving(self) -> set[Node]:
        """The values that change from step to step."""
        moving: set[Node] = set()
        for node in self.cell.nodes:
            per_step = node.op == "outside" and node.data[0] in self.cell.per_step
            if node.op in ("input", "state") or per_step or any(arg in moving for arg in node.args):
                moving.add(node)
        return moving

    def _name_adjoints(self) -> None:
        """A delta for each adjoint of a product, a bar for each adjoint of a named value, a letter for the rest."""
        names, script = self.write.names, self.script
        taken = {piece.text for piece in names.values()}
        alike: Counter[tuple[str, str]] = Counter()
        for product, g in self.adjoint.delta.items():
            if g in names or g.op == "adjoint":
                continue
            namespace, gate = product.data
            if namespace == "P" or script.delta("", gate) in taken:
                while (symbol := script.delta(namespace, gate, alike[product.data])) in taken:
                    alike[product.data] += 1
            else:
                symbol = script.delta("", gate)
            taken.add(symbol)
            names[g] = _one(symbol)
        for node, g in self.adjoint.value.items():
            if node in self.variable and g not in names and g.op != "adjoint":
                names[g] = _one(script.symbol(self.variable[node], time="t", bar=True))
        diagonals = [d for chains in self.jacobians.values() for chain in chains for d in chain.diagonals]
        roots = (*self.adjoint.roots, *diagonals)
        for node in self._unwieldy(roots, LONG_ADJOINT, lambda node: node not in self.forward):
            names[node] = _one(script.symbol(self._spare(SPARE_GREEK), time="t"))

    def _unwieldy(self, roots: Iterable[Node], long: int, fit: Callable[[Node], bool]) -> Iterator[Node]:
        """The nodes without a name that are written out at length more than once, or at too great a length."""
        order = expr.postorder(dict.fromkeys(roots))
        uses = Counter(arg for node in order for arg in set(node.args))
        length: dict[Node, int] = {}  # equal arguments counted once: twice the same is written as a square or a double
        whole: dict[Node, int] = {}
        for node in order:
            named = node in self.write.names
            length[node] = 1 if named else 1 + sum(length[arg] for arg in set(node.args))
            whole[node] = 1 if named else 1 + sum(whole[arg] for arg in node.args)
            repeated = length[node] > long and uses[node] > 1
            if (repeated or whole[node] > LONGEST) and not named and not node.is_condition and fit(node):
                length[node] = whole[node] = 1
                yield node

    def _spare(self, letters: tuple[str, ...]) -> str:
        if letters not in self.spares:
            self.spares[letters] = (f"{letter}{number or ''}" for number in itertools.count() for letter in letters)
        letter = next(name for name in self.spares[letters] if name not in self.letters)
        self.letters.add(letter)
        return letter

    # -- sections -----------------------------------------------------------------------------------------------------

    def step(self) -> Section:
        """The cell's own equations, in the author's order."""
        cell, script = self.cell, self.script
        states: dict[Node, list[str]] = {}
        for state, node in zip(cell.states, cell.next, strict=True):
            states.setdefault(node, []).append(state)
        equations = []
        for node in expr.postorder((*cell.names.values(), *cell.next)):
            if node not in states and node in self.variable:
                equations.append(self._definition(node))
            for state in states.get(node, ()):
                right = self.write(node) if node in self.defined else self.write.definition(node)
                equations.append(Equation(script.symbol(state, time="t"), self._broken(right)))
                self.defined.add(node)
        dot = self._inline(script.spelling("mul").format("", "").strip())
        words = [f"{dot} multiplies unit by unit"] if any(node.op == "mul" for node in cell.nodes) else []
        if given := [self._inline(self.write(node).text) for node in cell.nodes if node.op == "outside"]:
            words.append(f"{', '.join(given)} given from outside")
        return Section("The step", "; ".join(words), tuple(equations))

    def adjoints(self) -> Section:
        """Back-propagation through time: one step backwards."""
        cell, script, adjoint = self.cell, self.script, self.adjoint
        equations = self._definitions(adjoint.roots)
        for state in cell.states:
            left = script.symbol(state, time="t-1", bar=True)
            equations.append(Equation(left, self._total(adjoint.state.get(state))))
        to_input = [make("transposed", (g,), p.data) for p, g in adjoint.delta.items() if p.data[0] == "W"]
        if to_input or adjoint.input is not None:
            equations.append(Equation(script.symbol("x", time="t", bar=True), self._total(adjoint.input, *to_input)))
        for name, g in adjoint.outside.items():
            if name in cell.per_step:
                equations.append(Equation(script.symbol(name, time="t", bar=True), self._total(g)))
            else:
                equations.append(Equation(script.symbol(name, bar=True), self._over_time(self.write(g))))
        shown = cell.states[cell.output]
        meaning = (
            f"{script.symbol(shown, time='t', bar=True)} = {script.partial.format('L', script.symbol(shown, time='t'))}"
        )
        carried = [self._inline(script.symbol(state, time="t", bar=True)) for state in cell.states]
        verb = "arrives" if len(carried) == 1 else "arrive"
        note = (
            f"a bar is an adjoint, {self._inline(meaning)}; {', '.join(carried)} {verb} from the loss at step t and "
            "from step t+1"
        )
        if any(g.op != "adjoint" for g in adjoint.delta.values()):
            note += f"; {self._inline(script.symbol('delta'))} is the adjoint of a matrix product"
        if any(equation.sign == "←" for equation in equations):
            note += "; an arrow adds what reaches a state within its own step"
        return Section("One step back through time", note, tuple(equations))

    def gradients(self) -> Section:
        """The gradients of the parameters as sums over time, with gates of one form on one line."""
        script, gates = self.script, self.cell.gates
        index = next(letter for letter in (*"kjl", *(f"k{i}" for i in range(len(gates)))) if letter not in gates)
        blocks = [(p.namespace, gate) for p in self.cell.parameters for gate in p.gates]
        forms: dict[tuple[str, str], list[tuple[str, str]]] = {}
        for namespace, gate in blocks:
            right = self._gradient(namespace, gate)
            form = right.replace(script.delta("", gate), script.delta("", index)) if gate else right
            forms.setdefault((namespace, form), []).append((gate, right))
        lines: dict[tuple[str, tuple[str, ...]], list[str]] = {}
        for (namespace, form), alike in forms.items():
            right = form if len(alike) > 1 else alike[0][1]
            lines.setdefault((right, tuple(gate for gate, _ in alike)), []).append(namespace)
        equations = []
        for (right, alike_gates), namespaces in lines.items():
            several = len(alike_gates) > 1
            gate = index if several else alike_gates[0]
            left = " = ".join(script.partial.format("L", script.symbol(namespace, gate)) for namespace in namespaces)
            which = script.where_index.format(index, ", ".join(alike_gates)) if several else ""
            equations.append(Equation(left, right + which))
        return Section(
            "Gradients of the parameters", "the sums run over the sequences of a batch too", tuple(equations)
        )

    def _gradient(self, namespace: str, gate: str) -> str:
        adjoints = {**self.adjoint.delta, **self.adjoint.parameter}
        found = [(node, g) for node, g in adjoints.items() if node.data == (namespace, gate)]
        outer = [self._outer(g, node.args[0]) if node.args else self.write(g) for node, g in found]
        return " + ".join(map(self._over_time, outer)) or "0"

    def _outer(self, g: Node, operand: Node) -> Piece:
        row = self.script.transposed.format(self.script.raised(self.write(operand)))
        return _one(f"{self.script.enclosed(self.write(g), ATOM)} {row}", MATRIX)

    def jacobian(self) -> Section:
        """The derivative of each next state by each state."""
        script, states = self.script, self.cell.states
        found = self.jacobians
        diagonals = [d for chains in found.values() for chain in chains for d in chain.diagonals]
        equations = self._definitions(diagonals)
        for after, before in ((a, b) for a in states for b in states):
            left = script.partial.format(script.symbol(after, time="t"), script.symbol(before, time="t-1"))
            chains = sorted(found.get((after, before), ()), key=lambda chain: self._place(chain.matrices))
            terms = tuple(map(self._chain, chains))
            equations.append(Equation(left, self._broken(Piece(terms, SUM)) if terms else "0"))
        note = "its products from step to step are what makes gradients vanish or explode"
        if self.chains > calculus.MOST_CHAINS:
            note = (
                f"a sum of {self.chains:,} chains of diagonals and matrices, one for each way through the products, "
                "too many to write out"
            )
            equations = []
        return Section("The step Jacobian", note, tuple(equations))

    def _chain(self, chain: calculus.Chain) -> tuple[bool, str]:
        script, minus = self.script, False
        numbers: list[str] = []
        factors: list[str] = []
        for place, slope in enumerate(chain.diagonals):
            piece = self.write(slope)
            minus ^= piece.minus
            piece = piece.negative if piece.minus else piece
            if not piece.is_number:
                factors.append(script.diagonal.format(script.bracket(piece.text)))
            elif piece.text != "1":
                numbers.append(piece.text)
            if place < len(chain.matrices):
                factors.append(script.symbol(*chain.matrices[place]))
        scale = [reduce(script.times.format, numbers)] if numbers else []
        return minus, " ".join([*scale, *(factors or ["I"])])

    def kept(self) -> Section:
        """What the backward pass needs of each step; see `calculus.saved`."""
        values = calculus.saved(self.cell)
        authors = {node: place for place, node in enumerate(self.cell.names.values())}
        shown = [self.write(node).text for node in sorted(values, key=lambda n: authors.get(n, len(authors)))]
        number = {0: "nothing", 1: "one value a unit"}.get(len(values), f"{len(values)} values a unit")
        note = f"{number}, besides x and the states before and after the step"
        equation = Equation("", self.script.listed.join(shown), "")
        return Section("Kept from each step for the way back", note, (equation,) if shown else ())

    def parameters(self, input_size: int, hidden_size: int, proj_size: int) -> Section:
        """The layout of the parameter tensors, and how many numbers the cell learns."""
        cell, script = self.cell, self.script
        equations = []
        for parameter in cell.parameters:
            blocks = [script.symbol(parameter.namespace, gate) for gate in parameter.gates]
            rows, *columns = self._extents(parameter)
            stacked = len(blocks) > 1
            shape = f" {script.by} ".join([f"{len(blocks)} {rows}" if stacked else rows, *columns])
            layout = script.stack.format(script.stacked.join(blocks)) if stacked else blocks[0]
            equations.append(Equation(script.upright(parameter.name), f"{layout}{script.gap}({shape})"))
        formula = self._formula()
        sizes = {"I": input_size, "H": hidden_size} | ({"P": proj_size} if cell.projects else {})
        unequal = cell.needs_equal_sizes and input_size != hidden_size
        if all(sizes.values()) and not unequal:
            count = f"{cell.parameter_count(input_size, hidden_size, proj_size):,}".replace(",", script.thousands)
            formula += f" = {count}{script.gap}({', '.join(f'{letter} = {size}' for letter, size in sizes.items())})"
        equations.append(Equation(script.upright("in all"), formula))
        note = "I inputs, H units" + (", P projected units" if cell.projects else "")
        note += "; x is used unit by unit, so I = H" if cell.needs_equal_sizes else ""
        note += f", which {input_size} and {hidden_size} are not" if unequal else ""
        return Section("Parameters", note, tuple(equations))

    def _extents(self, parameter: Parameter) -> tuple[str, ...]:
        """The letters of a block's shape."""
        letters = {1: "I", 2: "H", 3: "P"}
        rows, *columns = self.cell.shape(parameter, *letters)
        return letters[rows // len(parameter.gates)], *(letters[extent] for extent in columns)

    def _formula(self) -> str:
        """The parameter count, with tensors of as many gates together: 3 (H I + H² + 2 H)."""
        groups: dict[int, Counter[str]] = {}
        for parameter in self.cell.parameters:
            first, *second = self._extents(parameter)
            size = self.script.power(first, 2) if second == [first] else " ".join([first, *second])
            groups.setdefault(len(parameter.gates), Counter())[size] += 1
        parts = []
        for gates, sizes in groups.items():
            terms = [f"{many} {size}" if many > 1 else size for size, many in sizes.items()]
            inside = " + ".join(terms)
            parts.append(inside if gates == 1 else f"{gates} ({inside})" if len(terms) > 1 else f"{gates} {inside}")
        return " + ".join(parts) or "0"

    # -- helpers ------------------------------------------------------------------------------------------------------

    def _definitions(self, roots: Iterable[Node]) -> list[Equation]:
        """The equations of the named derivatives under the roots that no section has given yet."""
        order = expr.postorder(dict.fromkeys(roots), stop=lambda node: node in self.forward)
        return [
            self._definition(node)
            for node in order
            if node in self.write.names and node not in self.forward and node not in self.defined
        ]

    def _definition(self, node: Node) -> Equation:
        """name = what it stands for; an arrow where a state's adjoint takes up what reaches it within the step."""
        self.defined.add(node)
        left = self.write.names[node].text
        arriving = {self.script.symbol(state, time="t", bar=True) for state in self.cell.states}
        return Equation(left, self._broken(self.write.definition(node)), "←" if left in arriving else "=")

    def _total(self, *nodes: Node | None) -> str:
        """A sum of adjoints: what arrives unit by unit, then through matrices in their order."""
        summands = [summand for node in nodes if node is not None for summand in self._summands(node)]
        summands.sort(key=lambda n: self._place([n.data] if n.op == "transposed" else []))
        terms = tuple(term for node in summands for term in self.write(node).terms)
        return self._broken(Piece(terms, SUM)) if terms else "0"

    def _summands(self, node: Node) -> list[Node]:
        if node.op != "add" or node in self.write.names:
            return [node]
        return [summand for arg in node.args for summand in self._summands(arg)]

    def _place(self, matrices: Sequence[tuple[str, str]]) -> tuple[int, list[int]]:
        """Where a chain of matrices belongs: diagonals first, then in the order of the gates."""
        return len(matrices), [self.cell.gates.index(gate) for _, gate in matrices]

    def _over_time(self, piece: Piece) -> str:
        return self.script.over_time.format(self.script.enclosed(piece, FACTOR))

    def _inline(self, mathematics: str) -> str:
        return self.script.inline.format(mathematics)

    def _broken(self, piece: Piece) -> str:
        """The sum on one line, or with a line for each term if it is long."""
        text = piece.text
        if len(text) <= self.script.wide or len(piece.terms) == 1:
            return text
        first, *others = piece.ordered
        return "\n".join([Piece((first,)).text, *(f"{'-' if minus else '+'} {term}" for minus, term in others)])


# ---------------------------------------------------------------------------------------------------------------------
# Layout


def written(cell: Cell, *, latex: bool = False, input_size: int = 0, hidden_size: int = 0, proj_size: int = 0) -> str:
    """The blackboard of a cell as text for a terminal, or as LaTeX; see `blackboard`."""
    page = blackboard(cell, LATEX if latex else TERMINAL, input_size, hidden_size, proj_size)
    return as_latex(page) if latex else as_text(page)


def as_text(page: Page) -> str:
    """The page for a terminal, equations aligned at their signs, in the width that they need."""
    blocks = [page.name, *textwrap.wrap(page.about.replace("\n", " "), WIDE), f"content hash {page.hash}"]
    for section in page.sections:
        blocks += ["", section.title, *textwrap.wrap(_sentence(section.note), WIDE)]
        blocks += [""] if section.equations else []
        margin = max((_columns(equation.left) for equation in section.equations), default=0) + 2
        for equation in section.equations:
            left = " " * (margin - _columns(equation.left)) + equation.left
            first, *others = equation.right.split("\n")
            blocks += [f"{left} {equation.sign} {first}" if equation.sign else f"  {first}"]
            blocks += [" " * (margin + 1) + other for other in others]
    return "\n".join(blocks) + "\n"


def as_latex(page: Page) -> str:
    """The page as a fragment for a document that loads amsmath; each sum breaks where the terminal breaks it."""
    lines = [rf"\section*{{{_escaped(page.name)}}}", _escaped(page.about), "", f"% content hash {page.hash}"]
    for section in page.sections:
        lines += ["", rf"\subsection*{{{section.title}}}", *filter(None, [_sentence(section.note)])]
        rows = []
        for equation in section.equations:
            sign = {"←": r"\leftarrow"}.get(equation.sign, equation.sign)
            rows.append(rf"  {equation.left} &{sign} " + equation.right.replace("\n", " \\\\\n  &\\quad "))
        if rows:
            lines += [r"\begin{align*}", " \\\\\n".join(rows), r"\end{align*}"]
    return "\n".join(lines) + "\n"


def _sentence(note: str) -> str:
    return f"{note[0].upper()}{note[1:]}." if note else ""


def _columns(text: str) -> int:
    """How many columns of a terminal the text takes: an accent takes none of its own."""
    return sum(not unicodedata.combining(character) for character in text)


def _escaped(text: str) -> str:
    """Plain words for LaTeX."""
    special = {c: rf"\{c}" for c in "&%$#_{}"} | {"\\": r"\textbackslash{}", "^": r"\^{}", "~": r"\~{}"}
    return "".join(special.get(character, character) for character in text)
