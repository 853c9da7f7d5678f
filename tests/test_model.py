"""The network of every task: what it reads, what it answers, and that neither padding nor company changes it."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from as_typed import CLASSIFY as CLASSIFIER
from as_typed import TAG as TAGGER
from as_typed import predict, probabilities
from torch import Tensor, nn
from torch.nn import functional

from throughtime.data.batches import Batch, Part
from throughtime.equations.catalogue import CELLS, ProjectedLSTM
from throughtime.equations.cell import cell
from throughtime.errors import CellError, DataError, ShapeError, ThroughtimeError
from throughtime.nn import ragged_loss
from throughtime.tasks import model as under_test
from throughtime.tasks.model import Architecture, SequenceModel, build

LENGTHS = [3, 1, 5, 2]
CLASSIFY = Architecture(CLASSIFIER, features=2, vocabularies=(4, 3), answers=3, hidden_size=6, embedding_size=5)
TAG = replace(CLASSIFY, task=TAGGER)
BOTH_WAYS = replace(CLASSIFY, num_layers=2, bidirectional=True)


def part(shape: Architecture = CLASSIFY, lengths: list[int] = LENGTHS) -> Part:
    """Random sequences with numbers and two columns of symbols, unknown ones among them."""
    generator = torch.Generator().manual_seed(1)
    steps = tuple(torch.randn(length, shape.features, generator=generator) for length in lengths)
    symbols = tuple(
        torch.stack([torch.randint(size, (length,), generator=generator) for size in shape.vocabularies], 1)
        for length in lengths
    )
    targets: Tensor | tuple[Tensor, ...] = torch.arange(len(lengths)) % shape.answers
    if shape.task.by_step:
        targets = tuple(torch.randint(shape.answers, (length,), generator=generator) for length in lengths)
    return Part(steps, targets, symbols)


def loss_sum(model: SequenceModel, batch: Batch) -> tuple[Tensor, int]:
    losses = model.task.losses(model(batch), batch)
    return losses.total(), len(losses)


def network(shape: Architecture = CLASSIFY, name: str = "gru", seed: int = 0) -> SequenceModel:
    return build(CELLS[name], shape, seed=seed)


def test_it_is_embeddings_beside_numbers_then_a_torch_layer_then_an_affine_map() -> None:
    for shape in (CLASSIFY, TAG):
        model, batch = network(shape), part(shape).batch()
        words, tags = (nn.Embedding.from_pretrained(embedding.weight) for embedding in model.embeddings)
        gru = nn.GRU(2 + 2 * 5, 6)
        gru.load_state_dict(model.recurrent.state_dict())
        x = torch.cat([batch.x, words(batch.symbols[..., 0]), tags(batch.symbols[..., 1])], -1)
        outputs, last = gru(nn.utils.rnn.pack_padded_sequence(x, batch.lengths, enforce_sorted=False))
        states = last[0] if not shape.task.by_step else nn.utils.rnn.pad_packed_sequence(outputs)[0]
        torch.testing.assert_close(model(batch), functional.linear(states, *model.readout.linear.parameters()))


@pytest.mark.parametrize("shape", [CLASSIFY, TAG, BOTH_WAYS, replace(BOTH_WAYS, task=TAGGER)])
@pytest.mark.parametrize("name", ["elman", "gru-reset-before", "lstm"])
def test_a_sequence_gets_the_same_answer_alone_and_in_company(shape: Architecture, name: str) -> None:
    model, all_of_it = network(shape, name), part(shape)
    together = probabilities(model, all_of_it)
    for i in range(len(LENGTHS)):
        (alone,) = probabilities(model, all_of_it.subset([i]))
        torch.testing.assert_close(together[i], alone)
    chosen = predict(model, all_of_it, batch_size=1)
    for answer, shares, length in zip(chosen, together, LENGTHS, strict=True):
        assert shares.shape == ((3,) if not shape.task.by_step else (length, 3))
        assert torch.equal(answer, shares.argmax(-1))
        torch.testing.assert_close(shares.sum(-1), torch.ones(shares.shape[:-1]))


@pytest.mark.parametrize("shape", [BOTH_WAYS, replace(BOTH_WAYS, task=TAGGER)])
def test_what_lies_past_an_end_changes_nothing(shape: Architecture) -> None:
    model, batch = network(shape), part(shape).batch()
    beyond = torch.arange(5)[:, None] >= batch.lengths
    dirty = replace(
        batch,
        x=torch.where(beyond[..., None], math.nan, batch.x),
        symbols=torch.where(beyond[..., None], 2, batch.symbols),
        targets=batch.targets if not shape.task.by_step else torch.where(beyond, 2, batch.targets),
    )
    assert torch.equal(loss_sum(model, dirty)[0], loss_sum(model, batch)[0])


def test_the_summed_loss_counts_sequences_to_classify_and_real_steps_to_tag() -> None:
    for shape, count in ((CLASSIFY, 4), (TAG, sum(LENGTHS))):
        model, whole = network(shape), part(shape)
        loss, found = loss_sum(model, whole.batch())
        assert found == count
        halves = [loss_sum(model, whole.batch(rows)) for rows in ([0, 2], [1, 3])]
        torch.testing.assert_close(sum(half for half, _ in halves), loss)
        assert sum(number for _, number in halves) == count
    logits, batch = model(whole.batch()), whole.batch()
    torch.testing.assert_close(loss, count * ragged_loss(logits, batch.targets, batch.lengths, normalise="steps"))


def test_a_batch_without_labels_has_no_loss() -> None:
    unlabelled = Part(part().steps, torch.zeros(0, dtype=torch.int64), part().symbols)
    assert not unlabelled.labelled
    assert len(predict(network(), unlabelled)) == 4
    with pytest.raises(DataError, match="the batch has no labels"):
        loss_sum(network(), unlabelled.batch())


def test_the_unknown_symbol_is_zero_and_is_never_trained() -> None:
    model = network()
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    assert any((symbols == 0).any() for symbols in part().symbols)
    for _ in range(3):
        optimiser.zero_grad()
        loss_sum(model, part().batch())[0].backward()
        optimiser.step()
    for embedding in model.embeddings:
        assert isinstance(embedding, nn.Embedding)
        assert not embedding.weight[0].any()
        assert embedding.weight[1:].all()


def test_weights_are_decided_by_the_seed_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = network(seed=1)
    assert torch.equal(torch.rand(3), expected)
    again, other = network(seed=1).state_dict(), network(seed=2).state_dict()
    for name, tensor in first.state_dict().items():
        assert torch.equal(again[name], tensor)
        assert not torch.equal(other[name], tensor)


def test_without_symbols_the_weights_are_those_of_a_plain_torch_model() -> None:
    model = network(replace(CLASSIFY, vocabularies=()))
    torch.manual_seed(0)
    plain = [*nn.GRU(2, 6).parameters(), *nn.Linear(6, 3).parameters()]
    for ours, theirs in zip(model.parameters(), plain, strict=True):
        assert torch.equal(ours, theirs)


def test_dropout_acts_in_training_alone_on_a_single_layer_too() -> None:
    model, batch = network(replace(CLASSIFY, dropout=0.5)), part().batch()
    torch.manual_seed(0)
    assert not torch.equal(model(batch), model(batch))
    expected = probabilities(model, part())
    assert model.training, "asking leaves a model in training in training"
    assert torch.equal(torch.stack(probabilities(model, part())), torch.stack(expected))
    model.eval()
    predict(model, part())
    assert not model.training


def test_memory_bounds_how_many_steps_are_asked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, whole = network(TAG), part(TAG)
    expected = predict(model, whole)
    seen: list[Batch] = []
    model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    monkeypatch.setattr(under_test, "PREDICT_STEPS", 6)
    for found, wanted in zip(predict(model, whole), expected, strict=True):
        assert torch.equal(found, wanted)
    assert [batch.x.shape[:2] for batch in seen] == [(5, 1), (3, 2), (1, 1)]


def test_symbols_alone_and_numbers_alone_are_read_too() -> None:
    for shape in (replace(TAG, features=0), replace(TAG, vocabularies=())):
        whole = part(TAG)
        only = replace(
            whole,
            steps=tuple(steps[:, : shape.features] for steps in whole.steps),
            symbols=whole.symbols if shape.vocabularies else (),
        )
        model = network(shape)
        loss, _ = loss_sum(model, only.batch())
        loss.backward()
        gradients = [parameter.grad for parameter in model.parameters()]
        assert all(gradient is not None and gradient.any() for gradient in gradients)


def test_a_cell_that_projects_takes_its_size() -> None:
    model = build(ProjectedLSTM, replace(BOTH_WAYS, proj_size=4), seed=0)
    assert model.readout.linear.in_features == 8
    assert torch.stack(probabilities(model, part())).shape == (4, 3)


def test_in_double_precision_the_gradients_are_right() -> None:
    model, batch = network(TAG).double(), part(TAG, [2, 1]).batch().to(dtype=torch.float64)
    weights = dict(model.named_parameters())

    def loss(weight: Tensor) -> Tensor:
        changed = {**weights, "embeddings.0.weight": weight}
        return functional.cross_entropy(
            torch.func.functional_call(model, changed, (batch,)).flatten(0, 1), batch.targets.flatten()
        )

    assert batch.x.dtype == torch.float64
    frozen = weights["embeddings.0.weight"].detach().clone().requires_grad_()
    loss(frozen).backward()
    assert frozen.grad is not None
    for row in (1, 2, 3):
        step = torch.zeros_like(frozen)
        step[row, 0] = 1e-6
        slope = (loss(frozen + step) - loss(frozen - step)) / 2e-6
        torch.testing.assert_close(frozen.grad[row, 0], slope, rtol=1e-5, atol=1e-9)


# Streams


@pytest.mark.parametrize("shape", [replace(CLASSIFY, num_layers=2), TAG])
@pytest.mark.parametrize("name", ["gru", "lstm"])
def test_a_stream_answers_as_the_model_does_for_the_sequence_so_far(shape: Architecture, name: str) -> None:
    model, whole = network(shape, name).eval(), part(shape)
    stream = model.stream()
    for t in range(5):
        answer = stream.step(whole.steps[2][t], whole.symbols[2][t])
        so_far = Part((whole.steps[2][: t + 1],), (), (whole.symbols[2][: t + 1],))
        logits = model(replace(so_far, targets=torch.zeros(0)).batch())
        torch.testing.assert_close(answer, logits[0] if not shape.task.by_step else logits[-1, 0])


def test_streams_side_by_side_are_each_its_own() -> None:
    model, whole = network().eval(), part()
    first, second = model.stream(), model.stream()
    first.step(whole.steps[0][0], whole.symbols[0][0])
    copied = first.copy()
    both = type(first).stack([first, second])
    answers = both.step(
        torch.stack([whole.steps[0][1], whole.steps[1][0]]), torch.stack([whole.symbols[0][1], whole.symbols[1][0]])
    )
    torch.testing.assert_close(copied.step(whole.steps[0][1], whole.symbols[0][1]), answers[0])
    torch.testing.assert_close(second.step(whole.steps[1][0], whole.symbols[1][0]), answers[1])
    torch.testing.assert_close(both.rows(0).state, copied.state)
    saved = model.stream()
    saved.load_state_dict(copied.state_dict())
    torch.testing.assert_close(saved.state, copied.state)
    saved.state = second.state
    torch.testing.assert_close(saved.state_dict(), second.state_dict())


def test_a_model_that_reads_both_ways_has_no_stream() -> None:
    with pytest.raises(ThroughtimeError, match="bidirectional"):
        network(BOTH_WAYS).stream()


# Sizes


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"features": -1}, "features is -1"),
        ({"features": True}, "features is True"),
        ({"vocabularies": (0,)}, "vocabularies is 0"),
        ({"features": 0, "vocabularies": ()}, "a network needs something to read"),
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"hidden_size": 2.0}, r"hidden_size is 2\.0"),
        ({"num_layers": None}, "num_layers is None"),
        ({"bidirectional": 1}, "bidirectional is 1"),
        ({"dropout": 1.0}, r"dropout is 1\.0"),
        ({"dropout": "0"}, "dropout is '0'"),
    ],
)
def test_sizes_that_make_no_network_are_refused(change: dict[str, Any], expected: str) -> None:
    with pytest.raises(ShapeError, match=expected):
        replace(CLASSIFY, **change)


def test_nonsense_is_refused_before_a_network_is_made() -> None:
    with pytest.raises(ShapeError, match=r"dropout is -0\.1"):
        replace(CLASSIFY, dropout=-0.1)

    @cell(states="h", per_step="gap")
    def Late(x, h, gap, W, U):
        return gap * (W @ x + U @ h)

    with pytest.raises(CellError, match="wants the outside input 'gap'"):
        build(Late, CLASSIFY, seed=0)
