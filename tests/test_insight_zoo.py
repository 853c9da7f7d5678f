"""Every diagnosis over every odd cell: finite numbers, or an error of the library's own."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from zoo import ZOO

from throughtime.equations.catalogue import CELLS
from throughtime.equations.cell import Cell
from throughtime.insight.diagnosis import Seen, look, try_remedies
from throughtime.insight.dynamics import Dynamics
from throughtime.insight.failure import first_failure
from throughtime.insight.gates import Gates, gates
from throughtime.insight.pairs import Pairs, pairs
from throughtime.insight.reach import LayerReach, Reach, reach
from throughtime.insight.watch import Watch
from throughtime.nn import Recurrent

STEPS, ROWS, UNITS = 4, 2, 3
LENGTHS = [4, 2]
EVERY = ZOO | CELLS
SETTINGS = [
    (1, False, torch.float32),
    (1, True, torch.float64),
    (2, False, torch.float64),
    (2, True, torch.float32),
]
"""Layers, both directions or one, and the dtype of the layer."""


def network(one: Cell, layers: int, bidirectional: bool, dtype: torch.dtype) -> Recurrent:
    torch.manual_seed(0)
    proj_size = UNITS if one.projects else 0
    return Recurrent(
        one, UNITS, UNITS, num_layers=layers, bidirectional=bidirectional, proj_size=proj_size, dtype=dtype
    )


def batch(one: Cell, dtype: torch.dtype) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=dtype) - 0.5

    outside = {name: draw(STEPS, ROWS, 1) if name in one.per_step else draw(ROWS, 1) for name in one.outside}
    return {"x": draw(STEPS, ROWS, UNITS), "lengths": LENGTHS, "outside": outside or None}


def by_step(result: Any) -> Tensor:
    loss: Tensor = result[0].square().sum(-1)
    return loss


def by_row(result: Any) -> Tensor:
    loss: Tensor = result[0].square().sum(-1).sum(0)
    return loss


# -- what may be in a result ------------------------------------------------------------------------------------------


def check_reach(one: Reach) -> None:
    """A share is a number wherever anything arrives, and 1 at lag 0."""
    assert (one.rows >= one.zeros).all()
    arrives = one.zeros < one.rows
    assert np.isfinite(one.share[arrives]).all()
    assert not arrives[0] or one.share[0] == pytest.approx(1.0)


def check(found: Any) -> None:
    """No number is missing, and none is infinite but where the result's own words say so."""
    if isinstance(found, LayerReach):
        check_reach(found.gradient)
        check_reach(found.inputs)
        assert found.verdict
    elif isinstance(found, Pairs):
        assert np.isfinite(found.norms).all()
        for name, shares in found.shares.items():
            assert np.isfinite(shares).all()
            largest = np.abs(found.gradients[name]).max()
            digits = 1e-2 if largest < torch.finfo(torch.float32).tiny else 1e-4  # subnormal in a float32 run
            assert shares.sum() == pytest.approx(1.0 if largest else 0.0, abs=digits), name
    elif isinstance(found, Gates):
        for gate in found.gates:
            assert all(np.isfinite(part).all() for part in (gate.high, gate.low, gate.mean)), gate.name
        assert not any(np.isnan(memory.log_kept).any() for memory in found.memories)
    elif isinstance(found, Dynamics):
        assert not np.isnan(found.exponents).any()
        assert not np.isnan(found.log_singular_values[:, 0]).any()
        for point in found.fixed_points:
            assert np.isfinite(point.state).all()
            assert np.isfinite(point.eigenvalues).all()
            assert np.isfinite(point.speed)
    elif isinstance(found, Seen):
        check([found.reach, found.gates, [one for _, one in found.dynamics], found.pairs])
    elif isinstance(found, list | tuple):
        for one in found:
            check(one)
    else:
        raise AssertionError(f"{type(found).__name__} is no result that this test knows")


def no_failure(layer: Recurrent, given: dict[str, Any]) -> None:
    assert first_failure(layer, given) is None
    assert first_failure(layer, given, by_step) is None


def watched(layer: Recurrent, given: dict[str, Any]) -> None:
    layer.target = "stepwise"
    given = given | {"x": given["x"].clone().requires_grad_()}
    with Watch(layer, every=1) as watch:
        loss = by_row(layer(**given)).sum()
        if loss.requires_grad:
            loss.backward()
        json.dumps(watch.observe(1.0, 1.0), allow_nan=False)


DIAGNOSES: dict[str, Callable[[Recurrent, dict[str, Any]], None]] = {
    "gates": lambda layer, given: check(gates(layer, given)),
    "reach": lambda layer, given: check(reach(layer, given, by_row, needs=2, dtype=None)),
    "pairs": lambda layer, given: check(pairs(layer, given, by_row, dtype=None)),
    "diagnosis": lambda layer, given: check(look(layer, given, by_step)),
    "failure": no_failure,
    "watch": watched,
}
"""`diagnosis` is reach and pairs by step, gates and dynamics (with its fixed points), all in float64."""


@pytest.mark.parametrize("name", EVERY)
def test_every_diagnosis_takes_every_cell(name: str) -> None:
    for layers, bidirectional, dtype in SETTINGS:
        if layers > 1 and bidirectional and EVERY[name].needs_equal_sizes:
            continue
        layer, given = network(EVERY[name], layers, bidirectional, dtype), batch(EVERY[name], dtype)
        for run in DIAGNOSES.values():
            run(layer, given)


@pytest.mark.parametrize("name", EVERY)
def test_remedies_are_tried_on_every_cell(name: str) -> None:
    layer = network(EVERY[name], 1, False, torch.float32)
    for trial in try_remedies(layer, batch(EVERY[name], torch.float32), by_row, needs=2):
        check(list(trial.reach))


def test_diagnoses_of_a_float32_layer_are_those_of_its_float64_twin() -> None:
    for one in EVERY.values():
        layer = network(one, 1, False, torch.float32)
        given = batch(one, torch.float32)
        double = {k: v.double() if isinstance(v, Tensor) else v for k, v in given.items()}
        if given["outside"]:
            double["outside"] = {k: v.double() for k, v in given["outside"].items()}
        (narrow,) = reach(layer, given, by_step)
        (wide,) = reach(layer.double(), double, by_step)
        np.testing.assert_array_equal(narrow.gradient.share, wide.gradient.share, err_msg=one.name)
        np.testing.assert_array_equal(narrow.inputs.share, wide.inputs.share, err_msg=one.name)


# -- the numbers themselves -------------------------------------------------------------------------------------------


def at_end(result: Any) -> Tensor:
    loss: Tensor = (result[0][-1] * torch.arange(1, UNITS + 1)).square().sum(-1)
    return loss


def joined(states: Any) -> Tensor:
    """All states of one layer side by side, [B, N]."""
    return torch.cat([s[0] for s in (states if isinstance(states, tuple) else (states,))], -1)


@pytest.mark.parametrize("name", EVERY)
def test_reach_is_autograds_through_a_run_that_is_cut_at_the_step(name: str) -> None:
    one = EVERY[name]
    layer, given = network(one, 1, False, torch.float64), batch(one, torch.float64)
    layer.target = "reference"
    given["lengths"] = None
    (found,) = reach(layer, given, at_end, times=1)
    x, around = given["x"].clone().requires_grad_(), given["outside"] or {}

    def run(first: int, last: int, h_0: Any) -> Any:
        outside = {n: v[first:last] if n in one.per_step else v for n, v in around.items()} or None
        return layer(x[first:last], h_0, outside=outside)

    norms, influence = np.zeros((STEPS, ROWS)), np.zeros((STEPS, ROWS))
    for lag in range(STEPS):
        _, state = run(0, STEPS - lag, None)
        several = tuple(s.detach().requires_grad_() for s in (state if isinstance(state, tuple) else (state,)))
        given_state = several if len(several) > 1 else several[0]
        rest = run(STEPS - lag, STEPS, given_state) if lag else (several[one.output], None)
        loss = at_end(rest).sum()
        found_by_state = (
            torch.autograd.grad(loss, several, materialize_grads=True, allow_unused=True)
            if loss.requires_grad
            else [torch.zeros_like(s) for s in several]
        )
        norms[lag] = joined(tuple(found_by_state)).norm(dim=-1).numpy()
    last = joined(run(0, STEPS, None)[1])
    for unit in range(last.shape[1]):
        if last.requires_grad:
            (by_x,) = torch.autograd.grad(
                last[:, unit].sum(), x, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            influence += by_x.flip(0).square().sum(-1).numpy()
    for part, wanted in ((found.gradient, norms), (found.inputs, np.sqrt(influence))):
        assert (part.zeros == ((wanted == 0) | (wanted[0] == 0)).sum(1)).all()
        there = part.zeros == 0
        shares = np.exp(np.log(wanted[there] / wanted[0]).mean(1))
        np.testing.assert_allclose(part.share[there], shares, rtol=1e-9)


@pytest.mark.parametrize("name", EVERY)
def test_pairs_add_up_to_the_gradient(name: str) -> None:
    layer, given = network(EVERY[name], 1, False, torch.float64), batch(EVERY[name], torch.float64)
    layer.target = "reference"
    inside = torch.arange(STEPS)[:, None] < torch.tensor(LENGTHS)
    (found,) = pairs(layer, given, by_step)
    loss = torch.where(inside, by_step(layer(**given)), 0.0).sum()
    for weight, gradient in found.gradients.items():
        (wanted,) = torch.autograd.grad(loss, [layer.get_parameter(f"{weight}_l0")], retain_graph=True)
        np.testing.assert_allclose(gradient, wanted.numpy(), rtol=1e-9, atol=1e-12)
