"""Odd cells, each legal and each without something that most have; for what must take any cell."""

# Cells are written as equations, without annotations.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import throughtime as tt
from throughtime.equations.cell import Cell


@tt.cell(states="h")
def IgnoresX(x, h, U, b):
    return tt.tanh(U.n @ h + b.n)


@tt.cell(states="h")
def IgnoresState(x, h, W, b):
    return tt.tanh(W.n @ x + b.n)


@tt.cell(states="h")
def IgnoresAll(x, h, b):
    return tt.tanh(b.n)


@tt.cell(states="h")
def Constant(x, h):
    return h * 0.0 + 0.25


@tt.cell(states="h")
def OneNumber(x, h):
    return tt.exp(tt.minimum(0.5, 0.25)) * 1.0


@tt.cell(states="h")
def Frozen(x, h):
    return h


@tt.cell(states="h")
def Nothing(x, h):
    return 0.9 * h + 0.1 * x


@tt.cell(states="h")
def Sum(x, h):
    return h + x


@tt.cell(states="h")
def Decay(x, h, p):
    return p.a * h + x


@tt.cell(states="h")
def OnlyVector(x, h, p):
    return p.a * 1.0


@tt.cell(states="h")
def FixedGate(x, h, p):
    f = tt.sigmoid(p.f)
    return f * h + (1 - f) * x


@tt.cell(states="h", per_step="m")
def OutsideOnly(x, h, m):
    return tt.tanh(m) * 0.5


@tt.cell(states="h", per_step="m", per_sequence="q")
def OutsideTwice(x, h, m, q, U):
    return tt.sigmoid(q) * tt.tanh(U.n @ h + m) + 0.1 * h


@tt.cell(states="h")
def Stages(x, h, W, U, b):
    v = tt.tanh(W.n @ x + U.n @ h + b.n)
    v = tt.tanh(U.k @ v)
    return tt.tanh(U.j @ (v * h) + v)


@tt.cell(states="h c", output="c")
def SecondShown(x, h, c, W, U, b):
    return tt.tanh(W.n @ x + b.n + U.n @ c), 0.5 * h + 0.5 * c


@tt.cell(states="h c")
def TwoWidths(x, h, c, W, U, P, b):
    c_next = tt.sigmoid(b.f) * c + tt.tanh(W.n @ x + U.n @ h)
    return P @ tt.tanh(c_next), c_next


@tt.cell(states="h c")
def Swap(x, h, c):
    return c, h


@tt.cell(states="h")
def Kinks(x, h, W, U):
    v = W.n @ x + U.n @ h
    return tt.where(v < 0.0, tt.relu(h), tt.minimum(tt.maximum(v, -1.0), 1.0)) * tt.sign(v)


@tt.cell(states="h")
def Doubling(x, h, W, U, b):
    v = tt.tanh(W.n @ x + U.n @ h + b.n)
    for _ in range(40):
        v = v * v * 0.5 + 0.25
    return tt.sigmoid(v) * h + v


ZOO: dict[str, Cell] = {
    one.name: one
    for one in (
        IgnoresX, IgnoresState, IgnoresAll, Constant, OneNumber, Frozen, Nothing, Sum, Decay, OnlyVector, FixedGate,
        OutsideOnly, OutsideTwice, Stages, SecondShown, TwoWidths, Swap, Kinks, Doubling,
    )
}  # fmt: skip
