"""The comparison: what it counts, whom it calls level, and what it says."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from throughtime.equations.catalogue import CELLS
from throughtime.errors import ThroughtimeError
from throughtime.tasks import findings
from throughtime.tasks.compare import CellResult, Comparison, Run, compare
from throughtime.tasks.encoding import Encoded, Part
from throughtime.tasks.training import Recipe


def part(count: int, seed: int) -> Part:
    """Ragged sequences of three classes, told apart by the mean of their one feature."""
    generator = torch.Generator().manual_seed(seed)
    classes = torch.arange(count) % 3
    steps = [torch.randn(4 + i % 3, 1, generator=generator) / 4 + classes[i] - 1 for i in range(count)]
    return Part(tuple(steps), classes)


TASK = Encoded("small", "small.csv", "as given", ("a",), ("x", "y", "z"), part(30, 0), part(17, 1), ())


@pytest.fixture(scope="module")
def small() -> Comparison:
    return compare(
        TASK,
        cells=["elman", "lstm"],
        hidden_size=6,
        recipe=Recipe(epochs=15, batch_size=6, learning_rate=0.02),
        seeds=2,
    )


def made_up(**accuracies: list[float]) -> Comparison:
    """A comparison of cells with these accuracies by seed, equal in all else but their reach."""
    cells = []
    for place, (name, values) in enumerate(accuracies.items()):
        norms = (0.5 + 0.2 * place) ** np.arange(6.0)[:, None]
        fall = tuple((0.5 - 0.2 * place) ** epoch for epoch in range(5))
        runs = [
            Run(fall, (value,) * 5, (9.0, 0.1, 0.1, 0.1, 0.1), torch.zeros(17, dtype=torch.long), norms, norms)
            for value in values
        ]
        cells.append(CellResult(name, 100 * (place + 1), tuple(runs)))
    return Comparison(TASK, 6, Recipe(epochs=5), tuple(cells))


def test_parameters_are_those_of_the_cells_formula_and_the_read_out(small: Comparison) -> None:
    for result, name in zip(small.cells, ["elman", "lstm"], strict=True):
        assert result.parameters == CELLS[name].parameter_count(1, 6) + 6 * 3 + 3


def test_it_learns_and_its_counts_agree_with_its_accuracies(small: Comparison) -> None:
    for cell in small.cells:
        confusion = small.confusion(cell)
        assert confusion.sum(axis=1).tolist() == [2 * 6, 2 * 6, 2 * 5]
        assert np.trace(confusion) / confusion.sum() == pytest.approx(cell.accuracy)
        assert cell.accuracy > 0.8
        assert cell.losses[-1] < cell.losses[0] / 2
        assert cell.losses.shape == (15,)
        assert cell.seconds_per_epoch > 0


def test_reach_covers_every_lag_of_every_training_sequence_and_seed(small: Comparison) -> None:
    for cell in small.cells:
        for reach in (cell.reach_before, cell.reach_after):
            assert reach.rows.tolist() == [60, 60, 60, 60, 40, 20]
            assert reach.share[0] == 1
    assert small.lags == (4, 5)


def test_the_same_call_gives_the_same_numbers() -> None:
    def numbers() -> list[object]:
        cell = compare(TASK, cells=["gru"], hidden_size=4, recipe=Recipe(epochs=2), seeds=2).cells[0]
        return [cell.accuracies, cell.losses.tolist(), cell.reach_after.share.tolist()]

    assert numbers() == numbers()


def test_progress_is_told_once_for_every_epoch() -> None:
    told: list[tuple[str, int]] = []
    compare(
        TASK,
        cells=["gru", "elman"],
        hidden_size=3,
        recipe=Recipe(epochs=2),
        seeds=2,
        on_epoch=lambda cell, seed: told.append((cell, seed)),
    )
    assert told == [(cell, seed) for cell in ("GRU", "Elman") for seed in (0, 0, 1, 1)]


def test_the_baseline_is_the_best_constant_answer() -> None:
    assert made_up(A=[0.5]).baseline == ("x", 6 / 17)


def test_the_first_epoch_of_a_run_is_not_timed() -> None:
    assert made_up(A=[0.5, 0.6]).cells[0].seconds_per_epoch == pytest.approx(0.1)


def test_mean_and_spread_are_over_the_seeds() -> None:
    cell = made_up(A=[0.5, 0.6, 0.7]).cells[0]
    assert cell.accuracy == pytest.approx(0.6)
    assert cell.spread == pytest.approx(0.1)
    assert math.isnan(made_up(A=[0.5]).cells[0].spread)


def test_a_lead_within_two_standard_errors_is_none() -> None:
    close = made_up(A=[0.90, 0.94], B=[0.92, 0.96])
    assert [cell.name for cell in close.level] == ["A", "B"]
    assert findings.headline(close) == "A and B learn small equally well, 92.0% to 94.0% right; B in the fewest epochs"
    clear = made_up(A=[0.80, 0.81], B=[0.95, 0.96])
    assert [cell.name for cell in clear.level] == ["B"]
    assert findings.headline(clear) == "B learns small best: 95.5% right"


def test_nothing_is_called_learnt_that_a_constant_answer_would_get() -> None:
    comparison = made_up(A=[0.35, 0.4], B=[0.5, 0.55])
    assert findings.headline(comparison) == "No cell learns small better than a constant answer: B comes to 52.5% right"
    assert "Reach goes with it" not in " ".join(findings.findings(comparison))


def test_one_seed_tells_nothing_and_that_is_said() -> None:
    assert "one seed cannot tell" in findings.headline(made_up(A=[0.1], B=[0.9]))


def test_reach_is_named_as_the_reason_only_where_it_goes_with_the_result() -> None:
    agrees = " ".join(findings.findings(made_up(A=[0.8, 0.81], B=[0.95, 0.96])))
    assert "halves every 1.0 steps in A and 1.9 steps in B" in agrees
    assert "The training loss that A ends with after 5 epochs, B has after 4. Reach goes with it" in agrees
    assert "level" not in agrees
    comparison = made_up(A=[0.8, 0.81], B=[0.95, 0.96])
    first, second = comparison.cells
    swapped = replace(
        comparison,
        cells=(
            replace(first, runs=tuple(replace(run, norms_after=run.norms_after**0.1) for run in first.runs)),
            second,
        ),
    )
    assert "Reach does not explain that" in " ".join(findings.findings(swapped))


def test_the_table_has_a_row_for_each_cell_and_one_for_the_baseline(small: Comparison) -> None:
    table = findings.table(small)
    assert [row[0] for row in table.rows] == ["Elman", "LSTM", "always 'x'"]
    assert table.rows[0][1] == "75"
    assert table.rows[2][3] == "35.3%"
    assert all(len(row) == len(table.header) for row in table.rows)


def test_unknown_cells_are_refused_with_the_known_ones() -> None:
    with pytest.raises(ThroughtimeError, match="no cell is called 'lstmm'; the cells are elman, gru"):
        compare(TASK, cells=["gru", "lstmm"])


def test_sequences_of_one_step_are_compared_too() -> None:
    single = part(12, 2)
    ones = Part(tuple(steps[:1] for steps in single.steps), single.classes)
    comparison = compare(
        replace(TASK, train=ones, test=ones), cells=["elman", "gru"], hidden_size=3, recipe=Recipe(epochs=1)
    )
    assert comparison.lags == (0, 0)
    assert findings.table(comparison).rows[0][4] == "–"
    assert findings.findings(comparison)
