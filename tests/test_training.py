"""The training loop: it is the textbook's, decided by its seed, exact in its sums, and can go on from anywhere."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from as_typed import CLASSIFY, TAG, predict, targets_of
from torch import Tensor, nn
from torch.nn import functional

from throughtime.data.batches import Batch, Part
from throughtime.equations.catalogue import CELLS
from throughtime.errors import ThroughtimeError
from throughtime.insight.watch import Watch
from throughtime.nn.clipping import suggest_clip
from throughtime.tasks.model import Architecture, SequenceModel, build
from throughtime.training.evaluation import evaluate
from throughtime.training.loop import (
    Chunk,
    Epoch,
    Progress,
    Snapshot,
    Training,
    chunks,
    on_threads,
    train,
)
from throughtime.training.recipe import ENOUGH, QUANTILE, Recipe

TORCH = {"elman": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}
PLAIN = {"warmup": 0.0, "decay": "none", "weight_decay": 0.0, "clip": None}
"""A recipe's options that leave Adam and nothing else."""


def first_sign(count: int = 24, seed: int = 3) -> Part:
    """Sequences of 1 to 6 steps whose class is the sign of the first step's first feature."""
    generator = torch.Generator().manual_seed(seed)
    steps = [torch.randn(i % 6 + 1, 2, generator=generator) for i in range(count)]
    return Part(tuple(steps), torch.tensor([int(sequence[0, 0] > 0) for sequence in steps]))


def signs_before(count: int = 12) -> Part:
    """Sequences of 3 to 13 steps to tag: the sign of the step before, of nothing at the first."""
    generator = torch.Generator().manual_seed(4)
    steps = [torch.randn(3 + (5 * i) % 11, 2, generator=generator) for i in range(count)]
    before = [torch.cat([torch.zeros(1), sequence[:-1, 0]]) for sequence in steps]
    return Part(tuple(steps), tuple((values > 0).long() for values in before))


def model_for(part: Part, *, cell: str = "gru", seed: int = 0, units: int = 8, **shape: Any) -> SequenceModel:
    task = TAG if isinstance(part.targets, tuple) else CLASSIFY
    return build(CELLS[cell], Architecture(task, 2, (), 2, units, **shape), seed=seed)


def trained(part: Part, recipe: Recipe, *, seed: int = 0, **options: Any) -> tuple[SequenceModel, list[Epoch]]:
    shape = {name: options.pop(name) for name in ("dropout", "num_layers", "cell") if name in options}
    model = model_for(part, seed=seed, **shape)
    return model, list(train(model, part, recipe, seed=seed, **options))


def told(epochs: Sequence[Epoch]) -> list[dict[str, Any]]:
    """The epochs without what a clock says."""
    timed = ("seconds", "steps_per_second")
    return [{name: value for name, value in asdict(epoch).items() if name not in timed} for epoch in epochs]


def weights(model: SequenceModel) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not():
    recipe = Recipe(epochs=3, batch_size=5)
    first, epochs = trained(first_sign(), recipe, dropout=0.3)
    torch.rand(7)
    again, same = trained(first_sign(), recipe, dropout=0.3)
    assert told(same) == told(epochs)
    assert same_bits(weights(again), weights(first))
    assert told(trained(first_sign(), recipe, dropout=0.3, seed=1)[1]) != told(epochs)


def test_dropout_does_not_depend_on_company_or_on_windows():
    """One sequence's output in training is the same in a batch, alone and cut in two: its masks are its own."""
    model, part = model_for(signs_before(), dropout=0.5, num_layers=2).train(), signs_before()
    rows = part.lengths.argsort(descending=True)[:3]
    training = Training(model, part, Recipe(batch_size=3), seed=4)
    longest = int(part.lengths[rows[0]])
    whole = model(part.batch(rows), training._masks(Chunk(rows, 0, longest)))
    assert not torch.equal(whole, model(part.batch(rows), training._masks(Chunk(rows.flip(0), 0, longest))))
    alone = model(part.batch(rows[:1]), training._masks(Chunk(rows[:1], 0, longest)))
    torch.testing.assert_close(whole[:, :1], alone)
    first, second = cut_in_two(part.batch(rows[:1]), 2)
    early, states = model.run(first, None, training._masks(Chunk(rows[:1], 0, 2)))
    late, _ = model.run(second, states, training._masks(Chunk(rows[:1], 2, longest)))
    torch.testing.assert_close(torch.cat([early, late]), alone)


def cut_in_two(batch: Batch, at: int) -> tuple[Batch, Batch]:
    parts = ((slice(None, at), torch.tensor([at])), (slice(at, None), batch.lengths - at))
    first, second = (Batch(batch.x[s], batch.symbols[s], lengths, batch.targets[s]) for s, lengths in parts)
    return first, second


def test_a_checkpoint_whose_masks_came_from_a_generator_is_refused():
    model, part = model_for(first_sign(), dropout=0.5), first_sign()
    taken = Training(model, part, Recipe(), seed=0).snapshot()
    earlier = Snapshot({**taken.tensors, "random.cpu": torch.get_rng_state()}, taken.record)
    with pytest.raises(ThroughtimeError, match="whose dropout masks cannot be gone on with"):
        Training(model, part, Recipe(), seed=0).restore(earlier)


def test_training_leaves_the_callers_random_numbers_alone_and_does_not_listen_to_them():
    model, part = model_for(first_sign(), dropout=0.5), first_sign()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    epochs = train(model, part, Recipe(epochs=3, batch_size=5), seed=0)
    first = next(epochs)
    assert torch.equal(torch.rand(3), expected)
    assert told([first, *epochs]) == told(trained(part, Recipe(epochs=3, batch_size=5), dropout=0.5)[1])


@pytest.mark.parametrize("cell", ["elman", "gru", "lstm"])
def test_it_learns_what_only_the_first_step_tells(cell: str):
    part = first_sign()
    model, epochs = trained(part, Recipe(epochs=60, batch_size=8, learning_rate=2e-2), cell=cell)
    assert epochs[-1].loss < 0.1
    assert torch.equal(torch.stack(predict(model, part)), targets_of(part))
    assert evaluate(model, part).headline == 1.0


@pytest.mark.parametrize("cell", ["elman", "gru", "lstm"])
def test_it_trains_as_a_plain_loop_over_packed_torch_layers_does(cell: str):
    """The loop written out: another layer, another loss, AdamW in two groups, clipping, a rate that rises and falls."""
    part = first_sign()
    recipe = Recipe(epochs=4, batch_size=5, learning_rate=1e-2, clip=0.5, weight_decay=0.1, warmup=0.25)
    model = model_for(part, cell=cell)
    peer, readout = TORCH[cell](2, 8), nn.Linear(8, 2)
    peer.load_state_dict(model.recurrent.state_dict())
    readout.load_state_dict(model.readout.linear.state_dict())
    named = [*peer.named_parameters(), *readout.named_parameters()]
    optimiser = torch.optim.AdamW(
        [
            {"params": [tensor for name, tensor in named if "weight" in name], "weight_decay": 0.1},
            {"params": [tensor for name, tensor in named if "bias" in name], "weight_decay": 0.0},
        ]
    )
    generator = torch.Generator().manual_seed(0)
    expected, updates = [], 5 * recipe.epochs
    for epoch in range(recipe.epochs):
        total = 0.0
        for number, (rows, _, _) in enumerate(chunks(part.lengths, recipe, generator)):
            done = (5 * epoch + number + 0.5) / updates
            rate = 4 * done if done < 0.25 else 0.5 * (1 + math.cos(math.pi * (done - 0.25) / 0.75))
            for group in optimiser.param_groups:
                group["lr"] = 1e-2 * rate
            packed = nn.utils.rnn.pack_sequence([part.steps[i] for i in rows], enforce_sorted=False)
            _, state = peer(packed)
            last = state[0] if isinstance(state, tuple) else state
            loss = functional.cross_entropy(readout(last[0]), targets_of(part)[rows])
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_([tensor for _, tensor in named], 0.5)
            optimiser.step()
            total += loss.item() * len(rows)
        expected.append(total / len(part))
    found = [epoch.loss for epoch in train(model, part, recipe, seed=0)]
    assert found == pytest.approx(expected, rel=1e-4)
    torch.testing.assert_close(model.recurrent.state_dict(), peer.state_dict(), rtol=1e-3, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Batches


def test_every_sequence_is_seen_once_an_epoch_in_batches_of_one_size_and_like_length():
    lengths = torch.randint(1, 200, (203,), generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(0)
    first, second = (chunks(lengths, Recipe(batch_size=16), generator) for _ in range(2))
    assert sorted(torch.cat([chunk.rows for chunk in first]).tolist()) == list(range(203))
    assert {len(chunk.rows) for chunk in first} == {15, 16}
    assert [chunk.rows.tolist() for chunk in first] != [chunk.rows.tolist() for chunk in second]
    padded = sum(chunk.stop * len(chunk.rows) for chunk in first)
    assert padded < 1.25 * int(lengths.sum()), "in random batches it would be 1.9 times"
    assert [chunk.stop for chunk in first] != sorted(chunk.stop for chunk in first)
    alike = chunks(torch.full((12,), 7), Recipe(batch_size=4), generator)
    assert sorted(torch.cat([chunk.rows for chunk in alike]).tolist()) == list(range(12))
    assert [chunk.rows.tolist() for chunk in alike] != [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]


def test_a_truncated_batch_is_cut_into_windows_the_last_of_them_short():
    cut = chunks(torch.tensor([10, 9, 8]), Recipe(batch_size=3, truncate=4), torch.Generator().manual_seed(0))
    assert [(chunk.start, chunk.stop) for chunk in cut] == [(0, 4), (4, 8), (8, 10)]
    assert all(chunk.rows is cut[0].rows for chunk in cut)


# ---------------------------------------------------------------------------------------------------------------------
# Sums


@pytest.mark.parametrize("part", [first_sign(), signs_before()], ids=["classify", "tag"])
def test_accumulating_batches_is_one_update_on_them_all_together(part: Part):
    """Divided by the count of all: batches of unlike sizes and lengths would else count unlike."""
    whole = torch.tensor([0, 1, 2, 3, 4, 5, 6])
    longest = int(part.lengths.max())
    windows = {
        "joint": (Chunk(whole, 0, longest),),
        "split": (Chunk(whole[:2], 0, longest), Chunk(whole[2:], 0, longest)),
    }
    found = {}
    for name, window in windows.items():
        training = Training(model_for(part), part, Recipe(learning_rate=0.1, warmup=0.0), seed=0)
        training._planned = list(window)
        training.update(window)
        found[name] = {**weights(training.model), "loss": torch.tensor(training.tally.loss / training.tally.count)}
    torch.testing.assert_close(found["split"], found["joint"], rtol=1e-4, atol=1e-6)
    apart = Training(model_for(part), part, Recipe(learning_rate=0.1, warmup=0.0), seed=0)
    apart._planned = list(windows["split"])
    for chunk in windows["split"]:
        apart.update((chunk,))
    assert (weights(apart.model)["readout.linear.bias"] - found["joint"]["readout.linear.bias"]).abs().max() > 1e-3


def test_an_epochs_loss_is_the_mean_over_all_sequences_or_steps():
    for part in (first_sign(23), signs_before(11)):
        nothing = Recipe(epochs=1, batch_size=4, learning_rate=1e-30, accumulate=3)
        _, (epoch,) = trained(part, nothing)
        assert epoch.loss == pytest.approx(evaluate(model_for(part), part).loss, rel=1e-6)
        assert epoch.updates == {6: 2, 3: 1}[len(chunks(part.lengths, nothing, torch.Generator()))]


# ---------------------------------------------------------------------------------------------------------------------
# Truncation


def test_a_window_longer_than_every_sequence_is_no_truncation():
    part = signs_before()
    exact, epochs = trained(part, Recipe(epochs=3, batch_size=5))
    cut, same = trained(part, Recipe(epochs=3, batch_size=5, truncate=13))
    assert told(same) == told(epochs)
    assert same_bits(weights(cut), weights(exact))


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_truncation_carries_the_state_and_not_the_gradient(cell: str):
    """Against a loop in torch over one window after another, an update each, the state handed on detached."""
    part = signs_before(4)
    recipe = Recipe(epochs=1, batch_size=4, truncate=4, learning_rate=1e-2, **PLAIN)  # type: ignore[arg-type]
    model = model_for(part, cell=cell)
    peer, readout = TORCH[cell](2, 8), nn.Linear(8, 2)
    peer.load_state_dict(model.recurrent.state_dict())
    readout.load_state_dict(model.readout.linear.state_dict())
    optimiser = torch.optim.Adam([*peer.parameters(), *readout.parameters()], lr=1e-2)
    plan = chunks(part.lengths, recipe, torch.Generator().manual_seed(0))
    assert len(plan) == 4
    total = 0.0
    carried: dict[int, Any] = {}
    for rows, start, stop in plan:
        losses = []
        for i in [int(row) for row in rows if part.lengths[row] > start]:
            output, state = peer(part.steps[i][start:stop, None], carried.get(i))
            carried[i] = tuple(each.detach() for each in state) if cell == "lstm" else state.detach()
            targets = part.targets[i][start:stop]
            losses.append(functional.cross_entropy(readout(output[:, 0]), targets, reduction="none"))
        joined = torch.cat(losses)
        optimiser.zero_grad()
        joined.mean().backward()
        optimiser.step()
        total += joined.sum().item()
    (epoch,) = train(model, part, recipe, seed=0)
    assert epoch.loss == pytest.approx(total / int(part.lengths.sum()), rel=1e-5)
    assert epoch.updates == 4
    torch.testing.assert_close(model.recurrent.state_dict(), peer.state_dict(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("part", "shape", "reason"),
    [
        (first_sign(), {}, r"truncate is for tasks that answer at every step \(tag\)"),
        (signs_before(), {"bidirectional": True}, "truncate and bidirectional exclude each other"),
    ],
    ids=["classify", "bidirectional"],
)
def test_truncation_that_means_nothing_is_refused(part: Part, shape: dict[str, Any], reason: str):
    with pytest.raises(ThroughtimeError, match=reason):
        next(train(model_for(part, **shape), part, Recipe(truncate=4), seed=0))


# ---------------------------------------------------------------------------------------------------------------------
# The learning rate, clipping, what is not finite


@pytest.mark.parametrize("decay", ["cosine", "linear", "none"])
def test_the_learning_rate_rises_then_falls_to_nothing(decay: Any):
    recipe = Recipe(learning_rate=2.0, warmup=0.2, decay=decay)
    rates = [recipe.learning_rate_at(place / 100) for place in range(101)]
    assert rates[:21] == pytest.approx(np.linspace(0, 2, 21))
    assert all(later <= earlier for earlier, later in pairwise(rates[20:]))
    assert rates[60] == pytest.approx({"cosine": 1.0, "linear": 1.0, "none": 2.0}[decay])
    assert rates[-1] == pytest.approx(2.0 if decay == "none" else 0.0)


def test_clipping_bounds_what_the_optimiser_sees():
    part, recipe = first_sign(), Recipe(epochs=1, clip=1e-14, weight_decay=0.0)  # far below Adam's epsilon of 1e-8
    model = model_for(part)
    before = copy.deepcopy(model.state_dict())
    (epoch,) = train(model, part, recipe, seed=0)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=1e-7)
    assert epoch.clip_rate == 1.0
    assert epoch.threshold == 1e-14
    assert trained(part, Recipe(epochs=1, clip=None))[1][0].threshold is None


def test_the_threshold_comes_from_the_norms_seen_and_then_holds_an_explosion_back():
    part = first_sign()
    training = Training(model_for(part), part, Recipe(batch_size=24, learning_rate=1e-3, epochs=10**6), seed=0)
    norms = []
    for number in range(ENOUGH):
        assert training.threshold is None, number
        for window in training.windows():
            training.update(window)
        norms += training.tally.norms
        training.end_epoch()
    assert training.threshold == suggest_clip(norms, QUANTILE)
    assert min(norms) <= training.threshold <= max(norms)
    with torch.no_grad():
        training.model.readout.linear.weight.mul_(1e3)
    (window,) = training.windows()
    training.update(window)
    seen = nn.utils.get_total_norm([p.grad for p in training.model.parameters() if p.grad is not None])
    assert training.tally.norms[0] > 10 * training.threshold
    assert float(seen) == pytest.approx(training.threshold, rel=1e-4)
    assert training.tally.clipped == 1


def test_a_loss_that_is_not_finite_stops_the_training_before_it_touches_a_weight():
    part = first_sign()
    part.steps[4][0] = math.inf
    model = model_for(part)
    before = weights(model)
    with pytest.raises(
        ThroughtimeError,
        match=r"the loss is nan, not finite in epoch 1, update 1; train with a lower learning rate than 0\.002$",
    ):
        next(train(model, part, Recipe(batch_size=24), seed=0))
    assert same_bits(weights(model), before)


def test_a_learning_rate_that_explodes_is_named_with_a_way_out():
    with pytest.raises(
        ThroughtimeError, match=r"finite in epoch \d+, .* a lower learning rate than 1e\+37, or clip the"
    ):
        trained(first_sign(), Recipe(epochs=9, learning_rate=1e37, clip=None))


@pytest.mark.parametrize(
    ("nonsense", "reason"),
    [
        ({"learning_rate": 0.0}, "the learning rate is 0.0; give a number above 0"),
        ({"epochs": 0}, "above 0"),
        ({"clip": -1.0}, "above 0"),
        ({"learning_rate": math.nan}, "above 0"),
        ({"truncate": 0}, "above 0"),
        ({"patience": 0}, "above 0"),
        ({"weight_decay": -0.1}, "the weight decay is -0.1; give a number from 0"),
        ({"warmup": 1.0}, "the warmup is 1.0; give a share"),
    ],
)
def test_a_recipe_of_nonsense_is_refused(nonsense: dict[str, Any], reason: str):
    with pytest.raises(ThroughtimeError, match=reason):
        Recipe(**nonsense)


# ---------------------------------------------------------------------------------------------------------------------
# Early stopping


def test_training_stops_when_the_validation_part_gets_no_better_and_gives_the_best_weights_back():
    part = first_sign()
    contrary = Part(part.steps, 1 - targets_of(part))  # the more is learnt, the worse it gets
    model, epochs = trained(part, Recipe(epochs=40, learning_rate=2e-2, patience=3), validation=contrary)
    losses = [epoch.validation_loss or 0.0 for epoch in epochs]
    best = losses.index(min(losses))
    assert len(epochs) == best + 1 + 3 < 40
    assert [epoch.best for epoch in epochs][best:] == [True, False, False, False]
    left = evaluate(model, contrary)
    assert (left.headline, left.loss) == (epochs[best].score, epochs[best].validation_loss)


def test_without_patience_the_validation_part_is_only_watched():
    part = first_sign()
    watched, epochs = trained(part, Recipe(epochs=4, patience=None), validation=first_sign(9, seed=8))
    plain, same = trained(part, Recipe(epochs=4))
    assert same_bits(weights(watched), weights(plain))
    assert [epoch.loss for epoch in epochs] == [epoch.loss for epoch in same]
    assert all(epoch.score is not None and not epoch.best for epoch in epochs)


# ---------------------------------------------------------------------------------------------------------------------
# Going on


@pytest.mark.parametrize(
    ("part", "recipe"),
    [
        (first_sign(), Recipe(epochs=5, batch_size=3, accumulate=3, learning_rate=0.02, patience=2)),
        (signs_before(), Recipe(epochs=3, batch_size=5, truncate=3, accumulate=2)),
    ],
    ids=["classify", "tag"],
)
def test_from_any_snapshot_it_goes_on_to_the_same_bits(part: Part, recipe: Recipe):
    options: dict[str, Any] = {"dropout": 0.4, "num_layers": 2, "validation": part.subset(range(5))}
    taken: list[Snapshot] = []
    model, epochs = trained(part, recipe, **options, checkpoint=lambda snapshot: taken.append(snapshot()))
    assert len(taken) == sum(epoch.updates + 1 for epoch in epochs)
    assert any("carried.0" in snapshot.tensors for snapshot in taken) == (recipe.truncate is not None)
    for snapshot in [*taken[::3], taken[-1]]:
        other, rest = trained(part, recipe, **options, resume_from=snapshot)
        assert told(rest) == told(epochs[len(epochs) - len(rest) :])
        assert same_bits(weights(other), weights(model))


@pytest.mark.parametrize(
    ("part", "recipe"),
    [(first_sign(), Recipe(epochs=3, batch_size=4)), (signs_before(), Recipe(epochs=3, batch_size=4, truncate=3))],
)
def test_a_watch_changes_no_bit_and_stands_in_the_epochs(part: Part, recipe: Recipe):
    plain, _ = trained(part, recipe)
    model = model_for(part)
    watched = list(train(model, part, recipe, seed=0, watch=Watch(model, per_step=model.by_step, every=2)))
    assert same_bits(weights(plain), weights(model))
    records = [record for epoch in watched for record in epoch.watched]
    assert [record["update"] for record in records] == list(range(1, sum(e.updates for e in watched) + 1, 2))
    assert all(record["reach"] for record in records)


def test_a_snapshot_of_another_model_is_refused():
    taken: list[Snapshot] = []
    trained(first_sign(), Recipe(epochs=1), checkpoint=lambda snapshot: taken.append(snapshot()))
    with pytest.raises(ThroughtimeError, match="the checkpoint is not one of this model and recipe"):
        trained(first_sign(), Recipe(epochs=1), cell="lstm", resume_from=taken[0])


def test_progress_is_told_after_every_update():
    told: list[Progress] = []
    part = signs_before(10)
    trained(part, Recipe(epochs=2, batch_size=5, accumulate=2), on_update=told.append)
    assert [progress.done for progress in told] == [0.5, 1.0]
    trained(part, Recipe(epochs=2, batch_size=5), on_update=told.append)
    assert [progress.done for progress in told[2:]] == [0.25, 0.5, 0.75, 1.0]
    assert all(progress.steps_per_second > 0 and progress.loss > 0 for progress in told)


def test_the_number_of_threads_is_the_callers_again_afterwards():
    with on_threads(2):
        assert torch.get_num_threads() == 2
    assert torch.get_num_threads() == 1
