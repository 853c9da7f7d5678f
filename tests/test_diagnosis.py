"""Diagnoses against theory and against runs: the words that the numbers ask for, and no others."""

import ast
import copy
import dataclasses
import importlib
import json
import math
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import throughtime.cli
from throughtime.equations.catalogue import GRU, LSTM, Elman
from throughtime.equations.expr import identity
from throughtime.errors import DataError, ThroughtimeError
from throughtime.insight.diagnosis import Diagnosis, History, Seen, look, try_remedies
from throughtime.insight.reach import LayerReach, Reach, reach
from throughtime.insight.rehearsal import Place
from throughtime.nn import Recurrent
from throughtime.report.diagnosis_page import page
from throughtime.report.page import Remedy, render
from throughtime.report.verdict import findings, headline, remedies, shares_by_lag
from throughtime.runs import folder as runs
from throughtime.runs.configuration import Config, Data, Network
from throughtime.runs.diagnose import diagnose
from throughtime.runs.fit import fit
from throughtime.tasks.classes import ClassCodec
from throughtime.training.recipe import Recipe

STEPS = 24


class Last(nn.Module):
    """The last output of a recurrent layer; steps come first."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.layer(x)[0][-1]
        return output


def inputs(size: int, rows: int = 4) -> Tensor:
    return torch.randn(STEPS, rows, size, generator=torch.Generator().manual_seed(0))


def loss(output: Tensor) -> Tensor:
    """One number for each row, steeper in some directions than in others."""
    return output @ torch.linspace(1, 2, output.shape[-1], dtype=output.dtype)


def linear(matrix: Tensor) -> Last:
    layer = Recurrent(Elman(activation=identity), len(matrix), len(matrix))
    with torch.no_grad():
        layer.get_parameter("weight_hh_l0").copy_(matrix)
    return Last(layer)


def scaled_orthogonal(scale: float, size: int = 6) -> Tensor:
    return scale * torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(1))).Q


def seen(model: nn.Module, size: int, needs: int | None = STEPS - 1) -> Seen:
    return look(model, inputs(size), loss, needs=needs)


def fading(rate: float, *, needs: int | None = STEPS - 1, place: Place | None = None) -> LayerReach:
    """What a network whose gradient is `rate` ** lag shows."""
    ideal = Reach.of(rate ** np.arange(float(STEPS))[:, None])
    return LayerReach(place or Place("recurrent"), "Elman", ideal, ideal, needs, 1e-3, "measured")


def diagnosed(before: float | None, after: float | None, needs: int | None = STEPS - 1) -> Diagnosis:
    early, late = (None if rate is None else Seen((fading(rate, needs=needs),)) for rate in (before, after))
    return Diagnosis("Elman", before=early, after=late)


# What theory says


def test_torchs_default_rnn_vanishes_before_it_has_seen_data() -> None:
    torch.manual_seed(0)
    model = Last(nn.RNN(8, 256))
    found = Diagnosis("nn.RNN", before=Seen(tuple(reach(model, inputs(8), loss, needs=STEPS - 1))))
    assert headline(found).startswith("nn.RNN vanishes before it has seen data: its gradient halves every 1.")


def test_transients_are_told_from_norms_over_k_steps_and_the_spectral_radius_promises_nothing() -> None:
    found = Diagnosis("Elman", after=seen(linear(torch.tensor([[0.9, 5.0], [0.0, 0.9]])), 2))
    shown = page(found, title="t", facts={})
    [dynamics] = [paragraph for paragraph in shown.findings if "Lyapunov" in paragraph]
    assert dynamics.startswith("Along these sequences, small changes of the state fade")
    assert re.search(r"they can first grow, 1\d(\.\d)? times over \d+ steps", dynamics)
    captions = [picture.caption for chapter in shown.chapters for picture in chapter.pictures]
    assert any("spectral radius of one step tells none of this" in caption for caption in captions)
    for sentence in re.findall(r"[^.]*spectral radius[^.]*", " ".join([shown.verdict, *shown.findings, *captions])):
        assert "tells none of this" in sentence


def test_a_gradient_that_keeps_its_norm_reaches_and_asks_for_nothing() -> None:
    found = Diagnosis("linear", after=seen(linear(scaled_orthogonal(1.0)), 6))
    assert headline(found) == "linear reaches: 100% of the gradient is left over the 23 steps that are needed"
    assert remedies(found) == []


def test_a_gradient_that_grows_explodes_and_is_to_be_clipped() -> None:
    found = Diagnosis("linear", before=seen(linear(scaled_orthogonal(1.5)), 6), norms=[3.0, 4.0], clip=3.5)
    assert headline(found) == (
        "linear explodes before it has seen data: its gradient doubles every 1.7 steps and is 10⁴ times what it was,"
        " 23 steps back"
    )
    [clip] = remedies(found)
    assert clip.name == "Clip the gradients at 3.5"
    assert clip.call == "throughtime fit DATA --clip 3.5"


def test_what_an_initialisation_would_change_is_measured_and_only_what_helps_is_named() -> None:
    torch.manual_seed(0)
    model = Last(Recurrent(Elman, 8, 64))
    before = seen(model, 8)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trials = try_remedies(model, inputs(8), loss, needs=STEPS - 1)
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    assert [trial.name for trial in trials] == ["orthogonal", "identity"]  # an Elman network has no gate to open
    found = remedies(Diagnosis("Elman", before=before, trials=trials))
    assert found
    assert found[0].call.endswith("_(model.layer)")
    assert "instead of" in found[0].why
    unknown = dataclasses.replace(before, reach=(dataclasses.replace(before.reach[0], needs=None),))
    assert remedies(Diagnosis("Elman", before=unknown, trials=trials)) == []  # nobody knows whether any is needed
    worse = dataclasses.replace(trials[0], reach=before.reach)
    assert remedies(Diagnosis("Elman", before=before, trials=[worse])) == []


@pytest.mark.parametrize("cell", [GRU, LSTM], ids=lambda cell: cell.name)
def test_chrono_initialisation_is_named_where_a_gated_cells_memory_is_short(cell: object) -> None:
    torch.manual_seed(0)
    model = Last(Recurrent(cell, 8, 32))  # type: ignore[arg-type]
    before = look(model, inputs(8), loss, needs=STEPS - 1)
    trials = try_remedies(model, inputs(8), loss, needs=STEPS - 1)
    found = remedies(Diagnosis("it", before=before, trials=trials))
    assert found[0].name == "Chrono initialisation for 24 steps"
    assert found[0].call.splitlines()[-1] == "chrono_(model.layer, longest=24)"


# Words


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        (0.5, 0.6, "Elman vanishes before it has seen data, and training has not mended it"),
        (0.5, 0.95, "Elman vanishes before it has seen data; trained, 31% of the gradient is left"),
        (0.9, 0.5, "Training has cost Elman its reach"),
        (0.9, 0.9, "Elman reaches: 8.9% of the gradient is left over the 23 steps that are needed"),
        (0.9, 1.5, "Elman explodes once trained"),
        (1.5, 1.5, "Elman explodes before it has seen data, and still does"),
        (None, 0.5, "Elman vanishes: its gradient halves every 1.0 steps, and 23 steps are needed"),
        (0.9, None, "Elman begins with reach"),
    ],
)
def test_the_headline_tells_what_was_before_training_and_what_is_now(
    before: float | None, after: float | None, words: str
) -> None:
    assert headline(diagnosed(before, after)).startswith(words)


def test_a_gradient_that_fades_vanishes_only_if_so_many_steps_are_needed() -> None:
    assert "vanishes" in headline(diagnosed(None, 0.5, needs=20))
    assert "reaches" in headline(diagnosed(None, 0.5, needs=5))
    unknown = (
        "its gradient halves every 1.0 steps and is under 0.1% after 10 steps; whether that is far enough, the task"
    )
    assert headline(diagnosed(None, 0.5, needs=None)) == f"Elman vanishes: {unknown} decides"


def test_what_the_sequences_are_too_short_for_is_not_told() -> None:
    words = "Whether Elman reaches back 50 steps cannot be told: no sequence here is so long"
    assert headline(diagnosed(0.9, 0.9, needs=50)) == words
    assert "vanishes" in headline(diagnosed(None, 0.5, needs=50))  # that it is lost sooner is seen in shorter ones


def test_the_layer_that_carries_farthest_decides() -> None:
    short, far = (fading(rate, place=Place("recurrent", depth, layers=2)) for depth, rate in enumerate((0.5, 0.99)))
    found = Diagnosis("Elman", after=Seen((short, far)))
    assert "reaches" in headline(found)
    assert findings(found)[0].startswith("Backward, farthest in layer 1, the loss's gradient halves every 69.0 steps")


def test_a_diagnosis_of_nothing_is_refused() -> None:
    with pytest.raises(ThroughtimeError, match="of nothing"):
        Diagnosis("Elman")


def history(**changes: object) -> History:
    none = np.full(3, math.nan)
    return dataclasses.replace(History(none, none, none, np.zeros(3)), **changes)  # type: ignore[arg-type]


def test_a_window_shorter_than_what_is_needed_is_named_and_a_longer_one_is_not() -> None:
    found = dataclasses.replace(diagnosed(0.9, 0.9), history=history(truncate=10))
    assert [remedy.call for remedy in remedies(found)] == ["throughtime fit DATA --truncate 24"]
    assert remedies(dataclasses.replace(found, history=history(truncate=24))) == []


def test_truncation_is_offered_only_where_nothing_lasts_and_a_loss_stands_at_every_step() -> None:
    found = dataclasses.replace(diagnosed(None, 0.2, needs=None), history=history(), by_step=True)
    [remedy] = remedies(found)
    assert remedy.call == "throughtime fit DATA --truncate 10"
    assert "does not make the network remember longer" in remedy.why
    assert remedies(dataclasses.replace(found, by_step=False)) == []
    assert remedies(dataclasses.replace(found, after=Seen((fading(0.9, needs=None),)))) == []


def test_clipping_is_not_advised_to_one_who_clips() -> None:
    loose = dataclasses.replace(diagnosed(0.9, 0.9), norms=[1.0, 1.0, 30.0], clip=2.0)
    [clip] = remedies(loose)
    assert "The largest norm seen is 30 times the median one" in clip.why
    clipped = history(thresholds=np.full(3, 2.0))
    assert remedies(dataclasses.replace(loose, history=clipped)) == []
    assert remedies(dataclasses.replace(loose, norms=[1.0, 1.0, 3.0])) == []


def test_the_shares_by_lag_add_up_to_one_and_lie_where_the_terms_lie() -> None:
    torch.manual_seed(0)
    layer = Recurrent(GRU, 3, 5)
    found = look(layer, inputs(3), lambda output: output[0].square().sum(-1), needs=None)
    for shares in shares_by_lag(found.pairs[0]).values():
        assert shares.sum() == pytest.approx(1, abs=1e-10)
        assert len(shares) == STEPS
    terms = found.pairs[0].shares["weight_hh"]
    assert shares_by_lag(found.pairs[0])["weight_hh"][2] == pytest.approx(np.trace(terms, -2))


# Looking changes nothing


def test_looking_changes_neither_the_model_nor_any_random_number() -> None:
    torch.manual_seed(0)
    model = Last(Recurrent(LSTM, 3, 5, num_layers=2, bidirectional=True, dropout=0.5))
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = torch.get_rng_state()
    found = seen(model, 3)
    try_remedies(model, inputs(3), loss, needs=STEPS - 1)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert len(found.reach) == len(found.gates) == len(found.pairs) == len(found.dynamics) == 4
    assert [place for place, _ in found.dynamics] == [one.place for one in found.reach]


# Runs


@pytest.fixture(scope="module")
def tagged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sequences of numbers to tag: whether the number before was above 0."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    lines = []
    for length in rng.integers(8, 14, size=24):
        x = rng.normal(size=length)
        labels = ["down", *np.where(x[:-1] > 0, "up", "down")]
        lines.append(json.dumps({"x": [[value] for value in x], "labels": [str(label) for label in labels]}))
    path = folder / "steps.jsonl"
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> runs.FinishedRun:
    path = tmp_path_factory.mktemp("runs") / "vowels-elman"
    return fit(Config(Data(file="vowels"), Network(cell="elman", hidden_size=8), Recipe(epochs=1), seed=3, run=path))


def test_a_run_is_looked_into_before_and_after_training(run: runs.FinishedRun) -> None:
    parts: list[str] = []
    before = torch.get_rng_state()
    found = diagnose(run, rows=6, on_part=parts.append)
    assert torch.equal(torch.get_rng_state(), before)
    assert parts[1] == "before training: reach"
    assert found.diagnosis.before is not None
    assert found.diagnosis.after is not None
    assert found.diagnosis.needs == round(found.diagnosis.needs or 0) > 5
    assert {trial.name for trial in found.diagnosis.trials} >= {"orthogonal", "GRU", "LSTM, chrono"}
    assert found.diagnosis.history is not None
    assert len(found.diagnosis.history.norms) == 1
    shown = found.page()
    html = render(shown)
    assert len(html) < 2_000_000
    assert "6 of 234 sequences" in html
    for remedy in shown.remedies:
        check_call(remedy)


def test_the_untrained_network_is_the_one_that_training_began_with(run: runs.FinishedRun) -> None:
    """Trained for no time at all, a network is as far as the run's own before training."""
    from throughtime.tasks.model import build

    drawn = build(run.model.recurrent.cell, run.model.architecture, seed=3)
    untrained = dataclasses.replace(run, model=drawn.eval())
    found = diagnose(untrained, rows=4).diagnosis
    assert found.before is not None
    assert found.after is not None
    np.testing.assert_array_equal(found.before.reach[0].gradient.share, found.after.reach[0].gradient.share)
    trained = diagnose(run, rows=4).diagnosis
    assert trained.after is not None
    assert (trained.after.reach[0].gradient.share[1:] != found.before.reach[0].gradient.share[1:]).all()


def test_the_read_out_asked_at_every_step_is_the_networks_own(run: runs.FinishedRun) -> None:
    from throughtime.runs.diagnose import _part, asked_at_every_step, losses_of

    part, _ = _part(run, None)
    batch = part.batch(range(5))
    asked = asked_at_every_step(run.model, batch)
    assert asked is not None
    model, by_step = asked
    with torch.no_grad():
        losses = by_step(model(batch))
        expected = losses_of(run.model.task, batch)(run.model(batch))
    torch.testing.assert_close(losses[batch.lengths - 1, torch.arange(5)], expected)


def test_a_run_that_tags_in_both_directions_is_looked_into(tagged: Path, tmp_path: Path) -> None:
    network = Network(cell="gru", hidden_size=4, num_layers=2, bidirectional=True)
    made = fit(Config(Data(file=str(tagged), task="tag"), network, Recipe(epochs=1), run=tmp_path / "run"))
    found = diagnose(made, str(tagged), rows=5)
    assert found.diagnosis.needs is None
    assert found.diagnosis.by_step
    shown = found.page()
    pictures = [picture for chapter in shown.chapters for picture in chapter.pictures]
    assert sum(picture.title.startswith("Loss against state") for picture in pictures) == 4
    assert all(picture.description and picture.caption for picture in pictures)
    assert "layer 1, backward" in render(shown)


def test_what_does_not_fit_is_refused(run: runs.FinishedRun, tagged: Path, tmp_path: Path) -> None:
    with pytest.raises(ThroughtimeError, match="needs is 0"):
        diagnose(run, needs=0)
    with pytest.raises(DataError):
        diagnose(run, str(tagged))
    assert isinstance(run.encoder.codec, ClassCodec)
    codec = dataclasses.replace(run.encoder.codec, classes=run.encoder.codec.classes[::-1])
    other = dataclasses.replace(run, encoder=dataclasses.replace(run.encoder, codec=codec))
    with pytest.raises(ThroughtimeError, match="is not what the run was trained on"):
        diagnose(other)


def test_a_network_whose_numbers_break_down_is_refused_with_the_place_where(run: runs.FinishedRun) -> None:
    broken = copy.deepcopy(run.model)
    with torch.no_grad():
        broken.recurrent.get_parameter("weight_hh_l0")[2, 3] = math.nan
    with pytest.raises(ThroughtimeError, match=r"is not finite: on the way forward, in recurrent, .*unit 2.*--data"):
        diagnose(dataclasses.replace(run, model=broken), rows=2)


def test_the_command_writes_one_page_and_prints_the_verdict(
    run: runs.FinishedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(throughtime.cli.app, ["diagnose", str(run.path), "--rows", "3", "--needs", "4"])
    assert done.exit_code == 0, done.output
    assert done.output.startswith("Elman ")
    assert "over the 4 steps that are needed" in " ".join(done.output.split())
    assert "Report: vowels-elman-diagnosis.html" in done.output
    assert [path.name for path in tmp_path.iterdir()] == ["vowels-elman-diagnosis.html"]
    runs.load(run.path)  # the run is as whole as before


def check_call(remedy: Remedy) -> None:
    """The code that a remedy names can be written like that: it parses, and what it names exists."""
    if remedy.call.startswith("throughtime "):
        words = shlex.split(remedy.call)
        command = next(one for one in throughtime.cli.app.registered_commands if one.callback.__name__ == words[1])  # type: ignore[union-attr]
        help_text = CliRunner().invoke(throughtime.cli.app, [command.callback.__name__, "--help"]).output  # type: ignore[union-attr]
        for option in [word for word in words if word.startswith("--")]:
            assert option in help_text
        return
    for node in ast.walk(ast.parse(remedy.call)):
        if isinstance(node, ast.ImportFrom):
            for name in node.names:
                assert hasattr(importlib.import_module(node.module or ""), name.name)


def test_every_remedy_names_code_that_exists() -> None:
    torch.manual_seed(0)
    for cell in (Elman, GRU, LSTM):
        model = Last(Recurrent(cell, 2, 3))
        for trial in try_remedies(model, inputs(2), loss, needs=5):
            check_call(Remedy(trial.title, "", trial.call))
    loose = dataclasses.replace(diagnosed(0.9, 0.9), norms=[1.0, 1.0, 30.0], clip=2.0)
    window = dataclasses.replace(diagnosed(0.9, 0.9), history=history(truncate=10))
    for remedy in (*remedies(loose), *remedies(window)):
        check_call(remedy)
