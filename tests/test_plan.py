"""The plan of a cell: its stages, its buffers, and that nothing is read before it is written."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from blackboards import ALL, random_cells
from hypothesis import given, settings

from throughtime.engine import plan as plans
from throughtime.engine.plan import Plan, Stage
from throughtime.equations import calculus, expr
from throughtime.equations.cell import Cell
from throughtime.equations.expr import Node

# stages as (width, accumulators), then slots, forward and backward
PLANS: dict[str, tuple[list[tuple[str, int]], dict[str, int], list[tuple[str, int]], dict[str, int]]] = {
    "elman": ([("hidden", 1)], {"drive:hidden": 1}, [("hidden", 1)], {"ring:hidden": 1}),
    "gru": (
        [("hidden", 3)], {"saved:hidden": 4, "drive:hidden": 3},
        [("hidden", 1)], {"carry:hidden": 1, "ring:hidden": 4},
    ),
    "gru-reset-before": (
        [("hidden", 2), ("hidden", 1)], {"saved:hidden": 3, "drive:hidden": 3, "scratch:hidden": 1},
        [("hidden", 1), ("hidden", 1)], {"carry:hidden": 1, "ring:hidden": 3, "scratch:hidden": 1},
    ),
    "lstm": (
        [("hidden", 4)], {"saved:hidden": 5, "drive:hidden": 4},
        [("hidden", 1)], {"carry:hidden": 1, "ring:hidden": 4},
    ),
    "lstm-projected": (
        [("hidden", 4), ("projected", 1)], {"saved:hidden": 5, "drive:hidden": 4},
        [("hidden", 0), ("projected", 1), ("hidden", 1)],
        {"carry:hidden": 1, "ring:hidden": 4, "ring:projected": 1},
    ),
    "MinimalGated": (
        [("hidden", 1), ("hidden", 1)], {"saved:hidden": 2, "drive:hidden": 2, "scratch:hidden": 1},
        [("hidden", 1), ("hidden", 1)], {"carry:hidden": 1, "ring:hidden": 2, "scratch:hidden": 1},
    ),
    "Peephole": (
        [("hidden", 4)], {"saved:hidden": 5, "drive:hidden": 4},
        [("hidden", 1)], {"carry:hidden": 1, "ring:hidden": 7},
    ),
    "Delay": ([("hidden", 1)], {"drive:hidden": 1}, [("hidden", 2)], {"carry:hidden": 1, "ring:hidden": 1}),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANS)
def test_stages_and_buffers_are_as_few_as_the_equations_allow(name: str):
    forward, backward = plans.forward(ALL[name]), plans.backward(ALL[name])
    stages, slots, back_stages, back_slots = PLANS[name]
    assert [(s.width, len(s.accumulators)) for s in forward.stages] == stages
    assert forward.slots == slots
    assert [(s.width, len(s.accumulators)) for s in backward.stages] == back_stages
    assert backward.slots == back_slots


def leaves(nodes: Iterable[Node]) -> set[Node]:
    return {node for node in expr.postorder(nodes) if node.op == "memory"}


def read_by(stage: Stage) -> set[Node]:
    """The memory leaves that a stage reads: unit by unit, as starts, and as operands of its products."""
    starts = {a.start for a in stage.accumulators if a.start is not None}
    return leaves(value for value, _ in stage.stores) | starts | {group.operand for group in stage.groups}


GIVEN = {
    "x", "before", "after", "outside", "vectors", "drive", "saved", "d_output",
    "carry", "ring_next",
}  # fmt: skip
"""Written before the step: by the caller, the drive, the forward run, or the step after."""


def check_reads(plan: Plan) -> None:
    written: set[Node] = set()
    for stage in plan.stages:
        places = [place for _, place in stage.stores]
        rings = {place.data[0] for place in written if place.data[0].startswith("ring:")}
        for leaf in read_by(stage):
            buffer = leaf.data[0]
            known = leaf in written or buffer.split(":")[0] in GIVEN or buffer in rings
            assert known, f"{stage.name} reads {leaf.data} before it is written"
        assert len(set(places)) == len(places), f"{stage.name} writes one place twice"
        assert not written & set(places), f"{stage.name} writes what another stage has written"
        accumulators = {n for v, _ in stage.stores for n in expr.postorder([v]) if n.op == "accumulator"}
        assert accumulators <= {a.leaf for a in stage.accumulators}, f"{stage.name} uses another stage's sums"
        strange = {n.op for v, _ in stage.stores for n in expr.postorder([v])} - {
            *expr.OPS,
            "const",
            "memory",
            "accumulator",
        }
        assert not strange, f"{stage.name} is left with {strange}"
        written |= set(places)


def check_whole(cell: Cell) -> None:
    """Every result has a place, and every slot that is counted is written."""
    forward, backward = plans.forward(cell), plans.backward(cell)
    stored = {place for stage in forward.stages for _, place in stage.stores}
    assert {plans.memory(f"next:{state}") for state in cell.states} <= stored
    saved = sum(count for buffer, count in forward.slots.items() if buffer.startswith("saved:"))
    assert saved == len(calculus.saved(cell))
    back = {place for stage in backward.stages for _, place in stage.stores}
    for plan, places in ((forward, stored), (backward, back)):
        for buffer, count in plan.slots.items():
            if not buffer.startswith("drive:"):
                assert {plans.memory(buffer, i) for i in range(count)} <= places, f"{buffer} of {cell.name}"
    assert set(backward.delta_slot.values()) <= back


def check_carries(cell: Cell) -> None:
    """A carry is overwritten only in or after the last stage that reads the old one."""
    plan = plans.backward(cell)
    for carry in plan.direct.values():
        writer = next(i for i, s in enumerate(plan.stages) for _, place in s.stores if place is carry)
        readers = [i for i, stage in enumerate(plan.stages) if carry in read_by(stage)]
        assert all(reader <= writer for reader in readers), f"{cell.name} loses {carry.data}"


@pytest.mark.parametrize("name", ALL)
def test_nothing_is_read_before_it_is_written(name: str):
    for plan in (plans.forward(ALL[name]), plans.backward(ALL[name])):
        check_reads(plan)
    check_whole(ALL[name])
    check_carries(ALL[name])


@given(random_cells())
@settings(max_examples=100)
def test_any_cell_has_a_sound_plan(cell: Cell):
    for plan in (plans.forward(cell), plans.backward(cell)):
        check_reads(plan)
    check_whole(cell)
    check_carries(cell)


def test_a_product_is_computed_in_the_loop_only_if_it_depends_on_it():
    for cell in ALL.values():
        plan = plans.forward(cell)
        inside = [p for stage in plan.stages for a in stage.accumulators for p in a.products]
        assert all(p.args[0].op != "input" for p in inside), cell.name
        of_input = [p for p in cell.products if p.args[0].op == "input"]
        assert {p for p, _ in plan.drive} == set(of_input), cell.name
        assert set(inside) == set(cell.products) - set(of_input), cell.name
        assert len(inside) == len(set(inside)), f"{cell.name} computes a product twice"
