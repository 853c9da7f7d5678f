"""The comparison: what it counts, whom it calls level, what it makes equal, and what it says of the lecture's claim."""

import math
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from as_typed import CLASSIFY, classes_of, encode
from numpy.typing import NDArray
from scipy import stats

from throughtime.cli import main
from throughtime.data.sequences import PER_STEP, Columns, Sequences
from throughtime.equations.catalogue import CELLS
from throughtime.errors import ThroughtimeError
from throughtime.runs import findings
from throughtime.runs.compare import CellResult, Comparison, Interval, SeedResult, compare, matched, parameters
from throughtime.tasks.classes import ClassScore
from throughtime.tasks.encoding import Encoded
from throughtime.tasks.model import Architecture
from throughtime.tasks.task import Baseline
from throughtime.training.recipe import Recipe

PARTS = ("train",) * 30 + ("test",) * 17


def to_classify() -> Encoded:
    """Ragged sequences of three classes, told apart by the mean of their one feature."""
    drawn = np.random.default_rng(0)
    classes = [place % 3 for place, part in enumerate(PARTS[:30])] + [place % 3 for place in range(17)]
    steps = [drawn.normal(size=(4 + place % 3, 1)) / 4 + kind - 1 for place, kind in enumerate(classes)]
    columns = Columns("sequence", "kind", features=("a",), part="part")
    ids = tuple(f"{place:02}" for place in range(47))
    labels = tuple("xyz"[kind] for kind in classes)
    return encode(Sequences("small", "small.csv", columns, ("a",), ids, tuple(steps), labels, parts=PARTS))


def to_tag() -> Encoded:
    """Symbols a and b; what is asked at a step is the symbol of the step before, `none` at the first."""
    drawn = np.random.default_rng(1)
    texts = ["".join(drawn.choice(["a", "b"], size=3 + place % 4)) for place in range(47)]
    columns = Columns("sequence", "before", part="part", symbols=("letter",))
    return encode(
        Sequences(
            "letters",
            "letters.csv",
            columns,
            (),
            tuple(f"{place:02}" for place in range(47)),
            tuple(np.zeros((len(text), 0)) for text in texts),
            tuple(("none", *text[:-1]) for text in texts),
            parts=PARTS,
            role=PER_STEP,
            symbols=tuple(tuple((letter,) for letter in text) for text in texts),
            symbol_columns=("letter",),
        )
    )


SMALL, LETTERS = to_classify(), to_tag()


@pytest.fixture(scope="module")
def small() -> Comparison:
    recipe = Recipe(epochs=15, batch_size=6, learning_rate=0.02)
    return compare(SMALL, cells=["elman", "lstm"], hidden_size=6, recipe=recipe, seeds=2)


@pytest.fixture(scope="module")
def tagged() -> Comparison:
    recipe = Recipe(epochs=30, batch_size=6, learning_rate=0.03)
    return compare(LETTERS, cells=["gru", "lstm"], hidden_size=6, recipe=recipe, seeds=2)


class MadeUp(ClassScore):
    """A score with this share of 17 right."""

    headline = 0.0


def scored(share: float) -> ClassScore:
    found = MadeUp(CLASSIFY, None, [torch.zeros(17, dtype=torch.long)], [torch.zeros(17, dtype=torch.long)])  # type: ignore[arg-type]
    found.headline = share
    return found


def confusion_of(cell: CellResult) -> NDArray[np.int64]:
    assert isinstance(cell.tested, ClassScore)
    return cell.tested.confusion


def made_up(**scores: list[float]) -> Comparison:
    """A comparison of cells with these scores by seed; each is slower, larger and reaches farther than the last."""
    cells = []
    for place, (name, values) in enumerate(scores.items()):
        norms = (0.5 + 0.2 * place) ** np.arange(6.0)[:, None]
        fall = tuple((0.5 - 0.2 * place) ** epoch for epoch in range(5))
        runs = [
            SeedResult(fall, (9.0, *(0.1 * (1 + place) * (1 + seed / 100),) * 4), 50, scored(value), norms, norms)
            for seed, value in enumerate(values)
        ]
        cells.append(CellResult(name, 6, 100 * (place + 1), tuple(runs)))
    baselines = (Baseline("always 'x'", 6 / 17), Baseline("1-NN on means", 0.3))
    return Comparison(SMALL, 6, "hidden", Recipe(epochs=5), tuple(cells), baselines)


def test_parameters_are_those_of_the_cells_formula_and_the_read_out(small: Comparison) -> None:
    for result, name in zip(small.cells, ["elman", "lstm"], strict=True):
        assert result.parameters == CELLS[name].parameter_count(1, 6) + 6 * 3 + 3


def test_it_learns_and_its_counts_agree_with_its_scores(small: Comparison) -> None:
    for cell in small.cells:
        confusion = confusion_of(cell)
        assert confusion.sum(axis=1).tolist() == [2 * 6, 2 * 6, 2 * 5]
        assert np.trace(confusion) / confusion.sum() == pytest.approx(cell.score.estimate)
        assert cell.score.estimate > 0.8
        assert cell.losses[-1] < cell.losses[0] / 2
        assert cell.losses.shape == (15,)
        assert cell.seconds_per_epoch > 0


def test_tags_are_counted_step_by_step(tagged: Comparison) -> None:
    steps = int(LETTERS.test.lengths.sum())
    assert tagged.counted == steps
    for cell in tagged.cells:
        confusion = confusion_of(cell)
        assert confusion.sum() == 2 * steps
        assert confusion[classes_of(LETTERS).index("none")].sum() == 2 * 17
        assert np.trace(confusion) / confusion.sum() == pytest.approx(cell.score.estimate)
        assert cell.score.estimate > 0.85, "nothing but a state knows the symbol before"
    assert tagged.learnt
    assert tagged.baseline.score < 0.8


def test_reach_covers_every_lag_of_every_training_sequence_and_seed(small: Comparison, tagged: Comparison) -> None:
    for comparison, rows in ((small, [60, 60, 60, 60, 40, 20]), (tagged, [60, 60, 60, 44, 28, 14])):
        for cell in comparison.cells:
            for reach in (cell.reach_before, cell.reach_after):
                assert reach.rows.tolist() == rows
                assert reach.share[0] == 1
    assert small.lags == (4, 5)


def test_the_same_call_gives_the_same_numbers() -> None:
    def numbers() -> list[object]:
        cell = compare(SMALL, cells=["gru"], hidden_size=4, recipe=Recipe(epochs=2), seeds=2).cells[0]
        return [cell.scores, cell.losses.tolist(), cell.reach_after.share.tolist()]

    assert numbers() == numbers()


def test_progress_is_told_once_for_every_epoch_and_cells_take_turns() -> None:
    told: list[tuple[str, int]] = []
    recipe = Recipe(epochs=2)
    compare(SMALL, cells=["gru", "elman"], hidden_size=3, recipe=recipe, seeds=2, on_epoch=lambda *at: told.append(at))
    assert told == [(cell, seed) for seed in (0, 1) for cell in ("GRU", "GRU", "Elman", "Elman")]


def test_every_cell_has_the_same_budget_and_patience_ends_none() -> None:
    recipe = Recipe(epochs=3, batch_size=10, patience=1)
    comparison = compare(SMALL, cells=["gru", "elman"], hidden_size=3, recipe=recipe, seeds=1)
    assert [run.updates for cell in comparison.cells for run in cell.runs] == [3 * 3, 3 * 3]
    assert comparison.recipe.patience is None
    assert "no early stopping; the same for every cell: 9 updates" in findings.facts(comparison, "")["training"]


@pytest.mark.parametrize("vocabularies", [(), (30, 5)])
@pytest.mark.parametrize("hidden_size", [1, 7, 100])
def test_matched_parameters_are_as_close_as_units_allow(vocabularies: tuple[int, ...], hidden_size: int) -> None:
    shape = Architecture(CLASSIFY, 3, vocabularies, 4, hidden_size)
    cells = [CELLS[name] for name in ("elman", "gru", "lstm")]
    found = matched(cells, shape, "params")
    wanted = parameters(CELLS["lstm"], shape)
    assert found[2] == shape
    for cell, own in zip(cells, found, strict=True):
        off = abs(parameters(cell, own) - wanted)
        for other in (own.hidden_size - 1, own.hidden_size + 1):
            if other >= 1:
                assert off <= abs(parameters(cell, replace(own, hidden_size=other)) - wanted)
    assert found[0].hidden_size > found[1].hidden_size >= found[2].hidden_size
    assert matched(cells, shape, "hidden") == [shape] * 3


def test_matched_parameters_are_told_with_their_units() -> None:
    recipe = Recipe(epochs=2)
    comparison = compare(SMALL, cells=["gru", "lstm"], hidden_size=10, match="params", recipe=recipe, seeds=2)
    gru, lstm = comparison.cells
    assert lstm.hidden_size == 10 < gru.hidden_size
    assert [row[1:3] for row in findings.table(comparison).rows[:2]] == [
        (str(cell.hidden_size), str(cell.parameters)) for cell in (gru, lstm)
    ]
    assert f"{gru.hidden_size} (GRU, {gru.parameters})" in findings.facts(comparison, "")["networks"]
    assert f"fewer parameters, not asked ({gru.parameters} against {lstm.parameters}, made alike" in findings.claim(
        comparison
    )
    with pytest.raises(ThroughtimeError, match="match is 'depth'; it is 'hidden' or 'params'"):
        compare(SMALL, match="depth")  # type: ignore[arg-type]


def test_the_first_epoch_of_a_run_is_not_timed() -> None:
    assert made_up(A=[0.5]).cells[0].seconds_per_epoch == pytest.approx(0.1)
    only = compare(SMALL, cells=["elman", "gru"], hidden_size=3, recipe=Recipe(epochs=1), seeds=2)
    assert math.isnan(only.cells[0].seconds_per_epoch)
    assert findings.table(only).rows[0][3] == "–"
    assert "what an epoch costs is not known" in " ".join(findings.findings(only))


def test_intervals_are_students() -> None:
    first, second = [0.91, 0.94, 0.92, 0.97], [0.90, 0.90, 0.96]
    interval = Interval.of(first)
    assert (interval.low, interval.high) == pytest.approx(
        stats.t.interval(0.95, 3, loc=np.mean(first), scale=stats.sem(first))
    )
    expected = stats.ttest_ind(first, second, equal_var=False).confidence_interval(0.95)
    lead = Interval.between(first, second)
    assert (lead.low, lead.high) == pytest.approx((expected.low, expected.high))
    assert (interval.n, lead.n) == (4, 3)
    assert Interval.between([0.5, 0.5], [0.4, 0.4]).half == 0


def test_one_run_has_no_interval_and_excludes_nothing() -> None:
    assert math.isnan(Interval.of([0.5]).half)
    assert not Interval.between([0.9], [0.1]).excludes(0)


def test_a_difference_within_its_interval_is_none() -> None:
    close = made_up(A=[0.90, 0.94], B=[0.92, 0.96])
    assert [cell.name for cell in close.level] == ["A", "B"]
    assert findings.headline(close) == (
        "A and B cannot be told apart on small over 2 seeds: 92.0% to 94.0% right; B in the fewest epochs"
    )
    alike = made_up(A=[0.950, 0.951, 0.950], B=[0.951, 0.950, 0.951])
    assert findings.headline(alike).startswith("A and B learn small almost equally well: 95.0% to 95.1% right")
    clear = made_up(A=[0.80, 0.81], B=[0.95, 0.96])
    assert [cell.name for cell in clear.level] == ["B"]
    assert findings.headline(clear) == "B learns small best: 95.5% right"


def test_a_cell_is_level_with_whatever_is_level_and_worse() -> None:
    scores = {"wide": [0.85, 0.93], "narrow": [0.90, 0.90], "best": [0.92, 0.92], "worst": [0.80, 0.80]}
    assert [cell.name for cell in made_up(**scores).level] == ["wide", "narrow", "best"]


def test_nothing_is_called_learnt_that_a_constant_answer_would_get() -> None:
    comparison = made_up(A=[0.35, 0.4], B=[0.5, 0.55])
    assert findings.headline(comparison) == "No cell learns small better than a constant answer: B comes to 52.5% right"
    assert "Reach goes with it" not in " ".join(findings.findings(comparison))


def test_a_baseline_that_is_as_good_is_told() -> None:
    comparison = made_up(A=[0.94, 0.96], B=[0.95, 0.97])
    words = "On 17 test sequences no cell is clearly better than the best of these, by two standard errors."
    assert words not in " ".join(findings.findings(comparison))
    matched = replace(comparison, baselines=(*comparison.baselines, Baseline("1-NN on means", 0.9)))
    assert words in " ".join(findings.findings(matched))
    assert "1-NN on means gets 90.0%" in " ".join(findings.findings(matched))
    assert findings.headline(matched) == findings.headline(comparison)


def test_one_seed_tells_nothing_and_that_is_said() -> None:
    assert "one seed cannot tell" in findings.headline(made_up(A=[0.1], B=[0.9]))
    assert "faster, cannot be told" in findings.claim(made_up(GRU=[0.9], LSTM=[0.9]))


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


def test_the_table_has_a_row_for_each_cell_and_each_baseline(small: Comparison, tagged: Comparison) -> None:
    table = findings.table(small)
    assert [row[0] for row in table.rows] == ["Elman", "LSTM", *(base.name for base in small.baselines)]
    assert table.rows[0][2] == "75"
    assert len(small.baselines) == len(tagged.baselines) == 2
    assert "over n = 2 seeds" in table.note
    assert all(len(row) == len(table.header) for row in (*table.rows, *findings.table(tagged).rows))
    assert "test steps right" in findings.table(tagged).note


def claimed(gru: list[float], lstm: list[float]) -> str:
    return findings.claim(made_up(GRU=gru, LSTM=lstm))


def test_the_last_sentence_answers_the_lectures_claim() -> None:
    comparison = made_up(GRU=[0.962, 0.964, 0.963], LSTM=[0.964, 0.966, 0.965])
    assert findings.findings(comparison)[-1] == (
        "The lecture's claim about the GRU beside the LSTM, put to small, holds: fewer parameters, yes (100 against"
        " 200); faster, yes (0.101 s an epoch against 0.202 s, 0.50 times as long, 95% interval 0.49 to 0.51); almost"
        " the same quality, yes (96.3% right against 96.5%, -0.2 points, 95% interval -0.4 to +0.0 over n = 3 seeds"
        " each; up to 1 point below counts as almost)."
    )


@pytest.mark.parametrize(
    ("gru", "lstm", "verdict", "part"),
    [
        ([0.90, 0.91, 0.90], [0.95, 0.95, 0.96], "fails", "almost the same quality, no"),
        ([0.90, 0.99, 0.93], [0.95, 0.91, 0.96], "stays open", "almost the same quality, cannot be told"),
        ([0.97, 0.97, 0.98], [0.90, 0.90, 0.91], "holds", "almost the same quality, yes"),
        ([0.30, 0.31, 0.30], [0.30, 0.30, 0.31], "stays open", "but no cell beats a constant answer here"),
    ],
)
def test_the_claim_follows_the_numbers(gru: list[float], lstm: list[float], verdict: str, part: str) -> None:
    assert f"put to small, {verdict}: " in claimed(gru, lstm)
    assert part in claimed(gru, lstm)


def test_a_slower_or_larger_gru_fails_the_claim() -> None:
    said = findings.claim(made_up(LSTM=[0.95, 0.95, 0.96], GRU=[0.95, 0.95, 0.96]))
    assert "fails: fewer parameters, no (200 against 100); faster, no (0.202 s an epoch against 0.101 s" in said


def test_the_claim_wants_both_cells() -> None:
    assert "wants both of them compared" in findings.claim(made_up(GRU=[0.9, 0.9], Elman=[0.9, 0.9]))


def test_unknown_cells_are_refused_with_the_known_ones() -> None:
    with pytest.raises(ThroughtimeError, match="no cell is called 'lstmm'; the cells are elman, gru"):
        compare(SMALL, cells=["gru", "lstmm"])


OWN = """
from throughtime import cell, tanh

@cell(states="h")
def Leaky(x, h, W, U, b):
    return 0.5 * h + 0.5 * tanh(W @ x + b + U @ h)

@cell(states="h")
def GRU(x, h, W, U, b):
    return tanh(W @ x + b + U @ h)

@cell(states="h")
def Projected(x, h, W, U, P, b):
    return P @ tanh(W @ x + b + U @ h)
"""


def test_cells_of_ones_own_are_compared_unless_they_cannot_be_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cells_to_compare.py").write_text(OWN, encoding="utf-8")
    monkeypatch.chdir(tmp_path)

    def compared(*cells: str) -> list[str]:
        found = compare(SMALL, cells=cells, hidden_size=3, recipe=Recipe(epochs=2), seeds=1)
        return [cell.name for cell in found.cells]

    assert compared("cells_to_compare:Leaky", "gru") == ["Leaky", "GRU"]
    with pytest.raises(ThroughtimeError, match="two of the cells are called GRU; rename one"):
        compared("gru", "cells_to_compare:GRU")
    with pytest.raises(ThroughtimeError, match="'cells_to_compare:Projected' projects its state"):
        compared("cells_to_compare:Projected")


def test_sequences_of_one_step_are_compared_too() -> None:
    ones = replace(SMALL.train, steps=tuple(steps[:1] for steps in SMALL.train.steps))
    comparison = compare(
        replace(SMALL, train=ones, test=ones), cells=["elman", "gru"], hidden_size=3, recipe=Recipe(epochs=1)
    )
    assert comparison.lags == (0, 0)
    assert findings.table(comparison).rows[0][5] == "–"
    assert findings.findings(comparison)


@pytest.mark.parametrize("name", ["small", "tagged"])
def test_the_page_is_whole(name: str, request: pytest.FixtureRequest) -> None:
    comparison = request.getfixturevalue(name)
    page = findings.page(comparison, "throughtime compare")
    assert page.findings[-1].startswith("The lecture's claim")
    assert [len(chapter.pictures) for chapter in page.chapters if chapter.pictures] == [4]


def typed(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["throughtime", "compare", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    return int(end.value.code or 0)


def test_the_command_tags_with_equal_parameters_and_ends_with_the_claim(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [
        f"{word},{step},{symbol},{before}"
        for word, text in enumerate(["abab", "ba", "bbaa", "aab", "ab", "baba", "abba", "bb"])
        for step, (symbol, before) in enumerate(zip(text, ["none", *text], strict=False))
    ]
    monkeypatch.chdir(tmp_path)
    Path("tags.csv").write_text("\n".join(["word,step,letter,before", *lines]), encoding="utf-8")
    columns = ["--sequence-id", "word", "--time", "step", "--target", "before", "--symbols", "letter"]
    budget = ["--hidden", "3", "--epochs", "3", "--seeds", "2", "--clip", "none"]
    assert typed(monkeypatch, "tags.csv", "--task", "tag", *columns, *budget, "--match", "params") == 0
    said = " ".join(capsys.readouterr().out.split())
    last, _, report = said.partition(" Report: ")
    assert re.search(r"The lecture's claim about the GRU [^.]*made alike .* counts as almost[^.]*\.$", last)
    html = Path(report).read_text(encoding="utf-8")
    assert "no clipping" in html
    assert "read out at every step" in html


def test_a_clip_that_is_none_of_its_kinds_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert typed(monkeypatch, "vowels", "--clip", "some") == 2
    assert capsys.readouterr().err == "throughtime: --clip is 'some'; give a number, auto or none\n"
