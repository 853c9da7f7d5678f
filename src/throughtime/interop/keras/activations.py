"""Keras's activation functions as equations, by the names that its configurations use.

Each follows Keras's torch back end, at the points without a derivative too. Those that look at several units at once,
or whose operations the equations lack, are in `BEYOND` with the reason.
"""

from __future__ import annotations

from collections.abc import Callable

from throughtime.equations.expr import Node, exp, identity, relu, sigmoid, softplus, sqrt, tanh, where

Activation = Callable[[Node], Node]


def elu(a: Node) -> Node:
    """a above 0, exp(a) - 1 below (Clevert et al. 2016, arXiv:1511.07289)."""
    return where(a < 0.0, exp(where(a < 0.0, a, 0.0)) - 1.0, a)


def selu(a: Node) -> Node:
    """The scaled ELU, with the two constants of Klambauer et al. 2017, arXiv:1706.02515."""
    scale, alpha = 1.0507009873554805, 1.6732632423543772
    return scale * where(a <= 0.0, alpha * (exp(where(a <= 0.0, a, 0.0)) - 1.0), a)


def softsign(a: Node) -> Node:
    """a / (1 + |a|)."""
    return a / (1.0 + abs(a))


def hard_sigmoid(a: Node) -> Node:
    """a / 6 + 1/2 between -3 and 3, then 0 and 1: Keras 3's."""
    return where(a <= -3.0, 0.0, where(a >= 3.0, 1.0, (a + 3.0) / 6.0))


def hard_sigmoid_of_keras_2(a: Node) -> Node:
    """a / 5 + 1/2 between -2.5 and 2.5, then 0 and 1: what the name meant before Keras 3."""
    return where(a <= -2.5, 0.0, where(a >= 2.5, 1.0, 0.2 * a + 0.5))


def hard_tanh(a: Node) -> Node:
    """a between -1 and 1."""
    return where(a <= -1.0, -1.0, where(a >= 1.0, 1.0, a))


def relu6(a: Node) -> Node:
    """a between 0 and 6."""
    return where(a <= 0.0, 0.0, where(a >= 6.0, 6.0, a))


def leaky_relu(a: Node) -> Node:
    """a above 0, a / 5 below."""
    return where(a > 0.0, a, 0.2 * a)


def silu(a: Node) -> Node:
    """a times sigmoid(a)."""
    return a * sigmoid(a)


def hard_silu(a: Node) -> Node:
    """a times hard_sigmoid(a)."""
    return a * hard_sigmoid(a)


def mish(a: Node) -> Node:
    """a times tanh(softplus(a)) (Misra 2019, arXiv:1908.08681)."""
    return a * tanh(softplus(a))


def log_sigmoid(a: Node) -> Node:
    """log(sigmoid(a))."""
    return -softplus(-a)


def squareplus(a: Node) -> Node:
    """(a + sqrt(a^2 + 4)) / 2 (Barron 2021, arXiv:2112.11687)."""
    return (a + sqrt(a * a + 4.0)) / 2.0


ACTIVATIONS: dict[str, Activation] = {
    "tanh": tanh,
    "sigmoid": sigmoid,
    "relu": relu,
    "linear": identity,
    "hard_sigmoid": hard_sigmoid,
    "softsign": softsign,
    "elu": elu,
    "selu": selu,
    "softplus": softplus,
    "silu": silu,
    "exponential": exp,
    "relu6": relu6,
    "leaky_relu": leaky_relu,
    "hard_tanh": hard_tanh,
    "hard_silu": hard_silu,
    "mish": mish,
    "log_sigmoid": log_sigmoid,
    "squareplus": squareplus,
}

ALIASES = {"swish": "silu", "hard_swish": "hard_silu"}

BEYOND = {
    **dict.fromkeys(
        ("softmax", "log_softmax", "sparsemax", "glu"), "looks at several units at once, and a cell works unit by unit"
    ),
    "gelu": "needs erf, which is not among the equations' operations",
}
