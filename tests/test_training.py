"""The training loop: it is the textbook's, decided by its seed, and blind to padding."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from throughtime.equations.catalogue import CELLS
from throughtime.errors import ThroughtimeError
from throughtime.tasks.encoding import Part
from throughtime.tasks.training import Recipe, SequenceClassifier, build, pad, predict, train

TORCH = {"elman": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}


def first_sign(count: int = 24) -> Part:
    """Sequences of 1 to 6 steps whose class is the sign of the first step's first feature."""
    generator = torch.Generator().manual_seed(3)
    steps = [torch.randn(i % 6 + 1, 2, generator=generator) for i in range(count)]
    return Part(tuple(steps), torch.tensor([int(sequence[0, 0] > 0) for sequence in steps]))


def losses(part: Part, recipe: Recipe, *, cell: str = "gru", seed: int = 0, units: int = 8) -> list[float]:
    model = build(CELLS[cell], part, units, 2, seed=seed)
    return [epoch.loss for epoch in train(model, part, recipe, seed=seed)]


def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not() -> None:
    recipe = Recipe(epochs=3, batch_size=5)
    first = losses(first_sign(), recipe)
    torch.rand(7)
    assert losses(first_sign(), recipe) == first
    assert losses(first_sign(), recipe, seed=1) != first


def test_building_a_model_leaves_the_callers_random_numbers_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    build(CELLS["lstm"], first_sign(), 4, 2, seed=1)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("cell", ["elman", "gru", "lstm"])
def test_it_learns_what_only_the_first_step_tells(cell: str) -> None:
    part = first_sign()
    model = build(CELLS[cell], part, 16, 2, seed=0)
    *_, last = train(model, part, Recipe(epochs=60, batch_size=8, learning_rate=1e-2), seed=0)
    assert last.loss < 0.1
    assert torch.equal(predict(model, part), part.classes)


@pytest.mark.parametrize("cell", ["elman", "gru", "lstm"])
def test_it_trains_as_a_plain_loop_over_packed_torch_layers_does(cell: str) -> None:
    part, recipe = first_sign(), Recipe(epochs=4, batch_size=5, learning_rate=1e-2, clip=0.5)
    model = build(CELLS[cell], part, 8, 2, seed=0)
    peer = TORCH[cell](2, 8)
    peer.load_state_dict(model.recurrent.state_dict())
    readout = nn.Linear(8, 2)
    readout.load_state_dict(model.readout.linear.state_dict())

    parameters = [*peer.parameters(), *readout.parameters()]
    optimiser = torch.optim.Adam(parameters, lr=1e-2)
    shuffle = torch.Generator().manual_seed(0)
    expected = []
    for _ in range(recipe.epochs):
        total = 0.0
        for batch in torch.randperm(len(part), generator=shuffle).split(5):
            packed = nn.utils.rnn.pack_sequence([part.steps[i] for i in batch], enforce_sorted=False)
            _, state = peer(packed)
            last = state[0] if isinstance(state, tuple) else state
            loss = functional.cross_entropy(readout(last[0]), part.classes[batch])
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 0.5)
            optimiser.step()
            total += loss.item() * len(batch)
        expected.append(total / len(part))
    found = [epoch.loss for epoch in train(model, part, recipe, seed=0)]
    assert found == pytest.approx(expected, rel=1e-4)


def test_a_sequence_is_classified_alike_alone_and_in_company() -> None:
    part = first_sign()
    model = build(CELLS["lstm"], part, 8, 2, seed=0)

    def scores(count: int) -> Tensor:
        return torch.cat([model(*pad(part.steps[i : i + count])) for i in range(0, len(part), count)])

    torch.testing.assert_close(scores(1), scores(len(part)))
    assert torch.equal(predict(model, part, batch_size=1), predict(model, part))


def test_clipping_bounds_what_the_optimiser_sees() -> None:
    part = first_sign()
    model = build(CELLS["gru"], part, 8, 2, seed=0)
    before = copy.deepcopy(model.state_dict())
    list(train(model, part, Recipe(epochs=1, clip=1e-14), seed=0))  # far below Adam's epsilon of 1e-8
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=1e-7)


def test_a_loss_that_is_not_finite_stops_the_training_with_a_way_out() -> None:
    with pytest.raises(
        ThroughtimeError, match=r"not finite in epoch \d+; train with a lower learning rate than 1e\+37"
    ):
        losses(first_sign(), Recipe(epochs=5, learning_rate=1e37))


@pytest.mark.parametrize(
    "nonsense", [{"learning_rate": 0.0}, {"epochs": 0}, {"clip": -1.0}, {"learning_rate": float("nan")}]
)
def test_a_recipe_of_nonsense_is_refused(nonsense: dict[str, float]) -> None:
    with pytest.raises(ThroughtimeError, match="give a number above 0"):
        Recipe(**nonsense)  # type: ignore[arg-type]


def test_the_classifier_reads_the_state_at_each_sequences_own_end() -> None:
    model = SequenceClassifier(CELLS["gru"], 2, 4, 3)
    x = torch.randn(5, 2, 2)
    scores = model(x, torch.tensor([2, 5]))
    scores[0].sum().backward()
    beyond = x.clone()
    beyond[2:, 0] = float("nan")
    torch.testing.assert_close(model(beyond, torch.tensor([2, 5])), scores)
