"""Watching a training: it changes no bit, sees what `reach` sees, and says in words what goes wrong."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import throughtime as tt
from throughtime.engine import recurrence
from throughtime.equations.catalogue import GRU, LSTM, Elman
from throughtime.equations.expr import identity
from throughtime.insight.reach import Reach, norms_from_ends, reach
from throughtime.insight.rehearsal import rehearse
from throughtime.insight.watch import Watch

STEPS, ROWS, INPUTS, UNITS = 12, 6, 3, 16
LENGTHS = [12, 7, 12, 3, 1, 12]


class Classifier(nn.Module):
    """Dropout, a recurrent layer and a read-out of the last step."""

    def __init__(self, recurrent: nn.Module, features: int = UNITS, bidirectional: bool = False) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.2)
        self.recurrent = recurrent
        self.readout = tt.nn.LastStep(features, 4, bidirectional=bidirectional)

    def forward(self, x: Tensor, lengths: Any = None) -> Tensor:
        outputs, _ = self.recurrent(self.dropout(x), lengths=lengths)
        logits: Tensor = self.readout(outputs, lengths)
        return logits


def classifier(one: tt.Cell = GRU, **options: Any) -> Classifier:
    torch.manual_seed(5)
    bidirectional = bool(options.get("bidirectional"))
    layer = tt.nn.Recurrent(one, INPUTS, UNITS, **options)
    return Classifier(layer, UNITS * (2 if bidirectional else 1), bidirectional)


def batches(count: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(6)
    for _ in range(count):
        yield torch.randn(STEPS, ROWS, INPUTS, generator=generator), torch.randint(4, (ROWS,), generator=generator)


def trained(model: Classifier, watch: Watch | None, updates: int = 7, lengths: Any = None) -> list[dict[str, Any]]:
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    events = []
    with watch or nullcontext():
        for x, classes in batches(updates):
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(x, lengths), classes, reduction="sum").backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            if watch is not None and (event := watch.observe(norm, threshold=1.0)):
                events.append(event)
    return events


@pytest.mark.parametrize("target", ["cpu", "stepwise", "reference"])
@pytest.mark.parametrize(
    "options", [{}, {"num_layers": 2, "bidirectional": True, "dropout": 0.3}, {"one": LSTM}], ids=str
)
def test_a_training_comes_out_the_same_to_the_bit_and_draws_the_same_numbers(
    options: dict[str, Any], target: str
) -> None:
    ends = []
    for watched in (False, True):
        model = classifier(target=target, **options)
        torch.manual_seed(7)
        watch = Watch(model, every=2) if watched else None
        events = trained(model, watch, lengths=LENGTHS)
        assert len(events) == (4 if watched else 0)
        ends.append((list(model.parameters()), torch.get_rng_state()))
    (plain, numbers), (watched_weights, watched_numbers) = ends
    assert torch.equal(numbers, watched_numbers)
    assert all(torch.equal(a, b) for a, b in zip(plain, watched_weights, strict=True))


def test_it_sees_the_gradient_that_reaches_the_inputs_step_by_step() -> None:
    model = classifier(Elman(activation=identity), dtype=torch.double).double()
    model.dropout.p = 0.0
    orthogonal = torch.linalg.qr(torch.randn(UNITS, UNITS, dtype=torch.double)).Q
    with torch.no_grad():
        model.recurrent.get_parameter("weight_hh_l0").copy_(0.5 * orthogonal)
        model.recurrent.get_parameter("weight_ih_l0").copy_(torch.eye(UNITS, INPUTS))
    x, classes = next(batches(1))
    with Watch(model) as watch:
        x = x.double().requires_grad_()
        loss = nn.functional.cross_entropy(model(x, LENGTHS), classes, reduction="sum")
        loss.backward()
        (sample,) = watch._samples.values()
    assert x.grad is not None
    norms = x.grad.norm(dim=2)
    share = [
        torch.stack([norms[length - 1 - lag, row] / norms[length - 1, row] for row, length in enumerate(LENGTHS)
                     if length > lag]).log().mean().exp().item()
        for lag in range(STEPS)
    ]  # fmt: skip
    assert sample.reach.share.tolist() == pytest.approx(share, rel=1e-9)
    assert sample.reach.rows.tolist() == [sum(length > lag for length in LENGTHS) for lag in range(STEPS)]
    assert sample.needs == 6  # three rows of 12 steps, and the row of 7 is the median


def test_in_every_layer_and_direction_it_is_the_gradient_by_the_layers_own_input() -> None:
    model = classifier(LSTM, num_layers=2, bidirectional=True)
    model.dropout.p = 0.0
    x, classes = next(batches(1))
    loss: Callable[[Tensor], Tensor] = lambda logits: nn.functional.cross_entropy(logits, classes)  # noqa: E731
    with Watch(model) as watch:
        loss(model(x, LENGTHS)).backward()
        samples = {str(sample.place): sample.reach for sample in watch._samples.values()}
        event = watch.observe()
    assert set(event["reach"]) == set(samples)
    assert len(samples) == 4
    run = rehearse(model, (x, LENGTHS), loss)
    assert run.loss is not None
    for place, record in zip(run.places, run.records, strict=True):
        (exact,) = torch.autograd.grad(run.loss, record.problem.x, retain_graph=True)
        expected = Reach.of(norms_from_ends(record, exact))
        assert samples[str(place)].share == pytest.approx(expected.share, rel=1e-3)
        assert samples[str(place)].rows.tolist() == expected.rows.tolist()


def test_only_one_update_in_so_many_is_looked_into_and_evaluation_is_none() -> None:
    model = classifier()
    looked: list[int] = []
    with Watch(model, every=3) as watch:
        for number, (x, classes) in enumerate(batches(8)):
            with torch.no_grad():
                model(x)
            model.eval()(x)
            model.train()
            assert not watch._runs
            nn.functional.cross_entropy(model(x), classes).backward()
            looked += [number] * bool(watch.observe())
    assert looked == [0, 3, 6]
    assert not model.recurrent._forward_hooks
    assert not model.recurrent._forward_pre_hooks


def test_records_are_json_with_the_clip_rate_since_the_last_one() -> None:
    model = classifier()
    events = trained(model, Watch(model, every=3), updates=7)
    assert [event["update"] for event in events] == [1, 4, 7]
    assert json.loads(json.dumps(events, allow_nan=False)) == events
    assert all(0 <= event["clip_rate"] <= 1 for event in events)
    watch = Watch(model, every=4)
    rates = [event["clip_rate"] for n in range(5) if (event := _told(watch, [1.0, 5.0, 5.0, 1.0, 5.0][n]))]
    assert rates == []  # nothing ran, so nothing was looked into


def _told(watch: Watch, norm: float) -> dict[str, Any]:
    return watch.observe(norm, threshold=2.0)


def with_recurrent_weights(scale: float) -> Classifier:
    model = classifier(Elman(activation=identity))
    with torch.no_grad():
        model.recurrent.get_parameter("weight_hh_l0").copy_(scale * torch.eye(UNITS))
    return model


@pytest.mark.parametrize(
    ("scale", "words"),
    [
        (0.1, "the gradient halves every 0.3 steps on its way back, and steps that lie 11 apart do not reach each"),
        (3.0, "the gradient doubles every 0.6 steps on its way back and is 1.8e+05 times as large at lag 11"),
    ],
)
def test_a_reach_that_falls_short_or_explodes_is_said_once(scale: float, words: str) -> None:
    model = with_recurrent_weights(scale)
    events = trained(model, Watch(model, every=2), updates=6)
    told = [warning for event in events for warning in event["warnings"] if words in warning]
    assert len(told) == 1
    assert told[0].startswith("recurrent: ")
    assert events[0]["warnings"]


def test_a_loss_at_every_step_is_no_fading_gradient() -> None:
    model = with_recurrent_weights(0.1)
    events = trained(model, Watch(model, per_step=True), updates=1)
    assert events[0]["warnings"] == []


def test_a_network_that_keeps_its_gradient_is_not_warned_of() -> None:
    model = with_recurrent_weights(1.0)
    assert trained(model, Watch(model), updates=1)[0]["warnings"] == []
    model = with_recurrent_weights(0.1)
    assert trained(model, Watch(model, needs=2), updates=1)[0]["warnings"] == []


def test_norms_that_explode_are_told_at_once_with_a_threshold_to_clip_at() -> None:
    watch = Watch(nn.Linear(1, 1))
    assert not any(watch.observe(1.0 + n / 30) for n in range(30))
    event = watch.observe(5000.0)
    (warning,) = event["warnings"]
    assert "its norm is 5e+03, and 1.3 is usual; clip it, at 1.9" in warning
    event = watch.observe(math.nan)
    assert event["norm"] is None
    assert "first_failure" in event["warnings"][0]
    assert watch.suggested_clip == pytest.approx(1.9, abs=0.1)


def test_a_watch_that_is_resumed_says_what_an_undisturbed_one_says() -> None:
    norms = [1.0 + n / 50 for n in range(45)]
    norms[30:33] = [500.0, math.inf, 700.0]

    def told(stop: int | None) -> list[dict[str, Any]]:
        watch, events = Watch(nn.Linear(1, 1)), []
        for number, norm in enumerate(norms):
            if number == stop:
                state = json.loads(json.dumps(watch.state(), allow_nan=False))
                watch = Watch(nn.Linear(1, 1))
                watch.restore(state)
            if event := watch.observe(norm, threshold=1.5):
                events.append(event)
        return events

    undisturbed = told(None)
    assert [event["update"] for event in undisturbed] == [31, 32]
    assert all(told(stop) == undisturbed for stop in (5, 20, 31, 32, 33))


def test_a_gradient_that_is_not_finite_stops_no_training() -> None:
    model = with_recurrent_weights(1e20)
    (event,) = trained(model, Watch(model), updates=1)
    assert json.loads(json.dumps(event, allow_nan=False)) == event
    assert "the gradient is not finite; first_failure(model, batch, loss) tells where from" in event["warnings"]


def test_a_model_in_which_nothing_can_be_seen_is_told() -> None:
    model = nn.GRU(INPUTS, UNITS)
    with Watch(model) as watch:
        model(torch.randn(STEPS, ROWS, INPUTS))[0].sum().backward()
        assert "throughtime.upgrade" in watch.observe()["warnings"][0]
    tt.upgrade(model)
    with Watch(model) as watch:
        model(torch.randn(STEPS, ROWS, INPUTS))[0].sum().backward()
        assert list(watch.observe()["reach"]) == ["the layer"]


def test_an_error_in_the_models_forward_leaves_nothing_behind() -> None:
    model = classifier()
    with Watch(model) as watch:
        with pytest.raises(tt.ShapeError):
            model(torch.randn(STEPS, ROWS, INPUTS + 1))
        x = torch.randn(STEPS, ROWS, INPUTS)
        assert recurrence._look.get() is None
        model(x).sum().backward()
        assert watch.observe()["reach"] == {}, "the first run of this update had failed"
    assert not any(module._forward_hooks for module in model.modules())
    model(x).sum().backward()
    assert watch.observe() == {}, "it is over"
    with pytest.raises(tt.ThroughtimeError, match="every is 0"):
        Watch(model, every=0)


def test_reach_on_a_watched_model_is_not_seen_by_the_watch() -> None:
    model = classifier()
    x, classes = next(batches(1))
    loss: Callable[[Tensor], Tensor] = lambda logits: nn.functional.cross_entropy(logits, classes)  # noqa: E731
    with Watch(model) as watch:
        reach(model, (x,), loss, times=2, probes=1)
        assert watch._runs == 0
        assert not watch._begun
