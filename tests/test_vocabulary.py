"""The words that kernels are written in, one by one, against numbers of higher precision."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from throughtime.engine.targets.cpu import llvm
from throughtime.equations.expr import OPS

FLOATS = {4: np.float32, 8: np.float64}
NAN, INF = float("nan"), float("inf")
LANES = 16  # a multiple of every machine's vectors
WORDS = sorted({row.llvm for row in OPS.values()} - {"less", "less_equal", "where"})
Array = np.ndarray

pytestmark = pytest.mark.skipif(
    np.finfo(np.longdouble).nmant < 60, reason="numpy has no numbers here that are finer than float64"
)


@functools.cache
def _word(word: str, itemsize: int) -> int:
    """A function (a, b, c, to, count) that applies one word to arrays."""
    code = llvm.Code("each", ["a", "b", "c", "to", "count"], itemsize)
    with code.loop(code["count"], step=code.lanes) as i:
        a, b, c = (code.load(code[name] + i * itemsize) for name in "abc")
        if word in ("less", "less_equal"):
            value = getattr(a, word)(b).where(c, 7.0)
        elif word == "fma":
            value = a.fma(b, c)
        elif word == "clamp":
            value = a.clamp(-2.0, 3.0)
        else:
            value = getattr(a, word)(*(a, b)[1 : next(r.arity for r in OPS.values() if r.llvm == word)])
        code.store(value, code["to"] + i * itemsize)
    return llvm.load(llvm.compiled(code.text()), "each")


def apply(word: str, itemsize: int, *arguments: Sequence[float] | Array) -> Array:
    kind = FLOATS[itemsize]
    count = len(arguments[0])
    padded = []
    for argument in (*arguments, *[np.zeros(count)] * (3 - len(arguments))):
        array = np.zeros(-(-count // LANES) * LANES, dtype=kind)
        array[:count] = argument
        padded.append(array)
    result = np.full_like(padded[0], 99)
    call = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 5)(_word(word, itemsize))
    call(*(array.ctypes.data for array in (*padded, result)), len(result))
    return result[:count]


def spread(itemsize: int, low: float, high: float, count: int = 20_000, both: bool = True) -> Array:
    """Numbers of every magnitude from low to high, of both signs."""
    generator = np.random.default_rng(5)
    numbers = np.exp(generator.uniform(np.log(low), np.log(high), count))
    if both:
        numbers *= generator.choice([-1.0, 1.0], count)
    return numbers.astype(FLOATS[itemsize])


def ulps(actual: Array, expected: Array) -> float:
    """The largest error in units in the last place of the format."""
    kind = actual.dtype.type
    unit = np.spacing(np.abs(expected).astype(kind)).astype(np.longdouble)
    return float(np.max(np.abs(actual.astype(np.longdouble) - expected) / unit))


def wide(x: Array) -> Array:
    return x.astype(np.longdouble)


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-wide(x)))


RANGES: dict[int, dict[str, float]] = {
    4: {"tiny": 1e-45, "least": 1.2e-38, "huge": 3e38, "exp": 88.7, "deep": 87.0},
    8: {"tiny": 5e-324, "least": 2.3e-308, "huge": 1.7e308, "exp": 709.7, "deep": 708.0},
}


@pytest.mark.parametrize("itemsize", FLOATS)
def test_elementary_functions_keep_nearly_every_digit(itemsize: int):
    at = RANGES[itemsize]
    x = spread(itemsize, at["least"], at["deep"])
    assert ulps(apply("exp", itemsize, x), np.exp(wide(x))) < 1.3
    positive = np.concatenate([spread(itemsize, at["least"], at["huge"], both=False), 1 + spread(itemsize, 1e-7, 0.3)])
    positive = positive.astype(FLOATS[itemsize])
    positive = positive[positive != 1]
    assert ulps(apply("log", itemsize, positive), np.log(wide(positive))) < 1.0
    above = spread(itemsize, at["least"], at["huge"], both=False)
    above = np.concatenate([above, -spread(itemsize, at["least"], 0.999, both=False)])
    assert ulps(apply("log1p", itemsize, above), np.log1p(wide(above))) < 2.5
    x = spread(itemsize, at["least"] * 4, 30.0)
    assert ulps(apply("tanh", itemsize, x), np.tanh(wide(x))) < 2.6
    near = spread(itemsize, 1e-3, 3.0)
    assert ulps(apply("tanh", itemsize, near), np.tanh(wide(near))) < 2.6


@pytest.mark.parametrize("itemsize", FLOATS)
def test_sigmoid_is_right_to_the_last_digit_of_one(itemsize: int):
    x = np.concatenate([spread(itemsize, RANGES[itemsize]["least"], 800.0), spread(itemsize, 0.1, 20)])
    bound = {4: 1.2e-7, 8: 2e-16}[itemsize]
    assert float(np.max(np.abs(wide(apply("sigmoid", itemsize, x)) - sigmoid(x)))) < bound


@pytest.mark.parametrize("itemsize", FLOATS)
def test_underflow_is_gradual_and_overflow_is_infinite(itemsize: int):
    at = RANGES[itemsize]
    x = np.linspace(-at["deep"] - 20, -at["deep"], 4001).astype(FLOATS[itemsize])
    assert ulps(apply("exp", itemsize, x), np.exp(wide(x))) < 1.3
    x = np.linspace(at["exp"] - 1, at["exp"], 1001).astype(FLOATS[itemsize])
    assert ulps(apply("exp", itemsize, x), np.exp(wide(x))) < 1.3
    assert list(apply("exp", itemsize, [INF, -INF, at["exp"] + 1, 1e6, -1e6])) == [INF, 0, INF, INF, 0]
    subnormal = spread(itemsize, at["tiny"] * 4, at["least"], both=False)
    assert ulps(apply("log", itemsize, subnormal), np.log(wide(subnormal))) < 1.0
    assert np.array_equal(apply("log1p", itemsize, subnormal), subnormal)


@pytest.mark.parametrize("itemsize", FLOATS)
def test_arithmetic_is_the_processors(itemsize: int):
    kind = FLOATS[itemsize]
    a, b = spread(itemsize, 1e-10, 1e10), spread(itemsize, 1e-10, 1e10)[::-1]
    pairs: dict[str, Callable[[Array, Array], Array]] = {
        "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide,
        "maximum": np.maximum, "minimum": np.minimum,
    }  # fmt: skip
    for word, numpys in pairs.items():
        assert np.array_equal(apply(word, itemsize, a, b), numpys(a, b)), word
    assert np.array_equal(apply("neg", itemsize, a), -a)
    assert np.array_equal(apply("abs", itemsize, a), np.abs(a))
    assert np.array_equal(apply("sign", itemsize, a), np.sign(a))
    assert np.array_equal(apply("relu", itemsize, a), np.maximum(a, 0))
    assert np.array_equal(apply("sqrt", itemsize, np.abs(a)), np.sqrt(np.abs(a)))
    assert np.array_equal(apply("less", itemsize, a, b, a), np.where(a < b, a, np.full_like(a, 7)))
    assert np.array_equal(apply("less_equal", itemsize, a, a, b), b)
    x = 1 + kind(2.0) ** -np.arange(10, 20, dtype=kind)
    product = apply("mul", itemsize, x, x)
    rest = apply("fma", itemsize, x, x, -product)
    assert np.array_equal(wide(rest) + wide(product), wide(x) * wide(x)), "rounded once"


@pytest.mark.parametrize("itemsize", FLOATS)
@pytest.mark.parametrize("word", [*WORDS, "clamp", "fma"])
def test_nan_stays_nan_wherever_it_stands(word: str, itemsize: int):
    arity = {"clamp": 1, "fma": 3}.get(word) or next(row.arity for row in OPS.values() if row.llvm == word)
    for place in range(arity):
        arguments = [[0.5, 0.5, -0.5, 0.5]] * arity
        arguments[place] = [NAN, -NAN, NAN, NAN]
        assert np.isnan(apply(word, itemsize, *arguments)).all(), f"argument {place}"


@pytest.mark.parametrize("itemsize", FLOATS)
def test_a_comparison_with_nan_is_false_and_chooses_the_second(itemsize: int):
    for word in ("less", "less_equal"):
        assert list(apply(word, itemsize, [NAN, 1, NAN], [1, NAN, NAN], [5, 5, 5])) == [7, 7, 7]
    assert np.isnan(apply("less", itemsize, [1.0], [2.0], [NAN])).all(), "a chosen NaN is handed on"
    assert list(apply("less", itemsize, [2.0], [1.0], [NAN])) == [7], "one that was not chosen is not"


@pytest.mark.parametrize("itemsize", FLOATS)
def test_infinities_and_domains(itemsize: int):
    assert list(apply("tanh", itemsize, [INF, -INF, 1e30, -1e30])) == [1, -1, 1, -1]
    assert list(apply("sigmoid", itemsize, [INF, 0.0])) == [1, 0.5]
    assert list(apply("sigmoid", itemsize, [-INF, -1e30, -800.0])) == [0, 0, 0], (
        "so that 0 * inf is NaN, as it is in torch"
    )
    assert list(apply("log", itemsize, [INF, 0.0, -0.0, 1.0])) == [INF, -INF, -INF, 0]
    assert np.isnan(apply("log", itemsize, [-1.0, -INF])).all()
    assert list(apply("log1p", itemsize, [INF, -1.0, 0.0])) == [INF, -INF, 0]
    assert np.isnan(apply("log1p", itemsize, [-1.5, -INF])).all()
    assert np.isnan(apply("sqrt", itemsize, [-1.0, -INF])).all()
    assert list(apply("sqrt", itemsize, [INF])) == [INF]
    assert list(apply("clamp", itemsize, [INF, -INF, 0.5])) == [3, -2, 0.5]
    assert list(apply("sign", itemsize, [INF, -INF, 0.0])) == [1, -1, 0]
    assert list(apply("relu", itemsize, [INF, -INF, -0.0])) == [INF, 0, 0]
    assert list(apply("maximum", itemsize, [INF, -INF], [1, 1])) == [INF, 1]


@pytest.mark.parametrize("itemsize", FLOATS)
def test_zero_stays_zero(itemsize: int):
    for word in ("log1p", "sqrt", "neg"):
        flipped = word == "neg"
        assert list(np.signbit(apply(word, itemsize, [-0.0, 0.0]))) == [not flipped, flipped], word
    assert list(apply("tanh", itemsize, [-0.0, 0.0])) == [0, 0]
