"""Four models in plain torch.nn, rebuilt from their published descriptions, for `replaced.py` to upgrade.

Nothing in here knows throughtime. Where a description leaves something out, or names what has no bearing on recurrence
(a conditional random field over the tags, a post-net), the docstring says what was done instead.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence


class Batch(NamedTuple):
    """What a model's forward takes, and what its loss takes beside the outputs."""

    inputs: tuple[Any, ...]
    targets: tuple[Any, ...]


class CharacterTagger(nn.Module):
    """Ma & Hovy 2016, End-to-end sequence labeling via bi-directional LSTM-CNNs-CRF, arXiv:1603.01354.

    Characters are embedded, convolved and pooled to features of their word, which a bidirectional LSTM reads beside the
    word's embedding. Tags are scored one by one, without the random field on top.
    """

    def __init__(self, words: int, characters: int, tags: int, embedded: int, filters: int, units: int) -> None:
        super().__init__()
        self.words = nn.Embedding(words, embedded)
        self.characters = nn.Embedding(characters, filters)
        self.convolution = nn.Conv1d(filters, filters, kernel_size=3, padding=1)
        self.dropout = nn.Dropout(0.5)
        self.recurrent = nn.LSTM(embedded + filters, units, batch_first=True, bidirectional=True)
        self.readout = nn.Linear(2 * units, tags)

    def forward(self, words: Tensor, characters: Tensor, lengths: Tensor) -> Tensor:
        """words [B, T] and characters [B, T, C] to scores [B, T, tags]."""
        rows, steps, _ = characters.shape
        spelled = self.dropout(self.characters(characters.flatten(0, 1))).transpose(1, 2)  # [B T, filters, C]
        spelled = self.convolution(spelled).amax(-1).view(rows, steps, -1)  # [B, T, filters]
        x = self.dropout(torch.cat([self.words(words), spelled], -1))
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        outputs, _ = pad_packed_sequence(self.recurrent(packed)[0], batch_first=True)
        scores: Tensor = self.readout(self.dropout(outputs))
        return scores

    def loss(self, scores: Tensor, tags: Tensor) -> Tensor:
        """Cross-entropy over the words that are there; tags [B, T], -1 elsewhere."""
        return functional.cross_entropy(scores.flatten(0, 1), tags.flatten(), ignore_index=-1)


class SpeechRecogniser(nn.Module):
    """Amodei et al. 2016, Deep Speech 2: end-to-end speech recognition in English and Mandarin, arXiv:1512.02595.

    Two convolutions over time and frequency, bidirectional GRU layers whose directions are added, each input normalised
    over all steps of the batch, and connectionist temporal classification. Fewer units and layers than published.
    """

    def __init__(self, bands: int, channels: int, units: int, layers: int, symbols: int) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(1, channels, (41, 11), stride=(2, 2), padding=(20, 5), bias=False),
            nn.BatchNorm2d(channels),
            nn.Hardtanh(0.0, 20.0),
            nn.Conv2d(channels, channels, (21, 11), stride=(2, 1), padding=(10, 5), bias=False),
            nn.BatchNorm2d(channels),
            nn.Hardtanh(0.0, 20.0),
        )
        bands = ((bands + 1) // 2 + 1) // 2
        widths = [channels * bands, *[units] * (layers - 1)]
        self.norms = nn.ModuleList([nn.BatchNorm1d(width) for width in widths[1:]])
        self.recurrent = nn.ModuleList([nn.GRU(width, units, bidirectional=True) for width in widths])
        self.readout = nn.Linear(units, symbols)

    def forward(self, spectra: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """spectra [B, 1, F, T] to log-probabilities [T', B, symbols] and the lengths [B] in steps of these."""
        x = self.convolutions(spectra)  # [B, channels, F', T']
        x = x.flatten(1, 2).permute(2, 0, 1)  # [T', B, features]
        lengths = (lengths + 1) // 2
        packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
        for depth, layer in enumerate(self.recurrent):
            if depth:
                packed = _with_data(packed, self.norms[depth - 1](packed.data))
            packed = layer(packed)[0]
            forward, backward = packed.data.chunk(2, -1)
            packed = _with_data(packed, forward + backward)
        outputs, _ = pad_packed_sequence(packed)
        return self.readout(outputs).log_softmax(-1), lengths

    def loss(self, outputs: tuple[Tensor, Tensor], texts: Tensor, counts: Tensor) -> Tensor:
        """Connectionist temporal classification of texts [B, S] with `counts` symbols each; 0 is the blank."""
        return functional.ctc_loss(outputs[0], texts, outputs[1], counts, zero_infinity=True)


def _with_data(packed: PackedSequence, data: Tensor) -> PackedSequence:
    return PackedSequence(data, packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices)


class ActorCritic(nn.Module):
    """Mnih et al. 2016, Asynchronous methods for deep reinforcement learning, arXiv:1602.01783: the LSTM agent.

    A step at a time, as the agent meets them; where an episode ended, the state is set to zero. Observations are
    vectors here, read by one layer, and the workers' updates are one batch.
    """

    def __init__(self, observed: int, actions: int, units: int) -> None:
        super().__init__()
        self.encoder = nn.Linear(observed, units)
        self.recurrent = nn.LSTMCell(units, units)
        self.actor = nn.Linear(units, actions)
        self.critic = nn.Linear(units, 1)

    def forward(self, observations: Tensor, begins: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """observations [T, B, O] to logits [T, B, A] and values [T, B]; begins [T, B] is 1 where an episode begins."""
        encoded = self.encoder(observations).relu()
        outputs = []
        for x_t, begins_t in zip(encoded, begins, strict=True):
            goes_on = (1 - begins_t).unsqueeze(-1)
            h, c = self.recurrent(x_t, (h * goes_on, c * goes_on))
            outputs.append(h)
        together = torch.stack(outputs)
        return self.actor(together), self.critic(together).squeeze(-1)

    def loss(self, outputs: tuple[Tensor, Tensor], actions: Tensor, returns: Tensor) -> Tensor:
        """The policy's gradient with its advantage, the value's error, less the entropy; [T, B] each."""
        logits, values = outputs
        policy = logits.log_softmax(-1)
        taken = policy.gather(-1, actions.unsqueeze(-1)).squeeze(-1)
        advantages = returns - values
        entropy = -(policy.exp() * policy).sum(-1)
        return (0.5 * advantages.square() - taken * advantages.detach() - 0.01 * entropy).mean()


class SpeechDecoder(nn.Module):
    """Shen et al. 2018, Natural TTS synthesis by conditioning WaveNet on mel spectrogram predictions, arXiv:1712.05884.

    Its decoder, after Wang et al. 2017, Tacotron, arXiv:1703.10135: a pre-net whose dropout is always on, attention
    that knows where it has been, two LSTM cells, a frame and whether to stop at every step. It is trained on the true
    frames before; encoder and post-net are left out, and zoneout too.
    """

    def __init__(self, bands: int, encoded: int, narrow: int, units: int, attention: int) -> None:
        super().__init__()
        self.prenet = nn.ModuleList([nn.Linear(bands, narrow), nn.Linear(narrow, narrow)])
        self.attention_cell = nn.LSTMCell(narrow + encoded, units)
        self.query = nn.Linear(units, attention, bias=False)
        self.memory = nn.Linear(encoded, attention, bias=False)
        self.location = nn.Conv1d(2, 32, kernel_size=31, padding=15, bias=False)
        self.located = nn.Linear(32, attention, bias=False)
        self.score = nn.Linear(attention, 1, bias=False)
        self.decoder_cell = nn.LSTMCell(units + encoded, units)
        self.frame = nn.Linear(units + encoded, bands)
        self.stop = nn.Linear(units + encoded, 1)

    def forward(self, memory: Tensor, present: Tensor, frames: Tensor) -> tuple[Tensor, Tensor]:
        """memory [B, N, E], present [B, N] booleans, frames [T, B, M] to frames [T, B, M] and stops [T, B]."""
        rows, count, encoded = memory.shape
        units = self.attention_cell.hidden_size
        h = c = g = d = memory.new_zeros(rows, units)
        context = memory.new_zeros(rows, encoded)
        weights = total = memory.new_zeros(rows, count)
        keys = self.memory(memory)  # [B, N, attention]
        x = torch.cat([torch.zeros_like(frames[:1]), frames[:-1]])
        for layer in self.prenet:
            x = functional.dropout(layer(x).relu(), 0.5, training=True)
        made, stops = [], []
        for x_t in x:
            h, c = self.attention_cell(torch.cat([x_t, context], -1), (h, c))
            places = self.location(torch.stack([weights, total], 1)).transpose(1, 2)  # [B, N, 32]
            energies = self.score((self.query(h).unsqueeze(1) + keys + self.located(places)).tanh()).squeeze(-1)
            weights = energies.masked_fill(~present, -torch.inf).softmax(-1)
            total = total + weights
            context = (weights.unsqueeze(1) @ memory).squeeze(1)
            g, d = self.decoder_cell(torch.cat([h, context], -1), (g, d))
            shown = torch.cat([g, context], -1)
            made.append(self.frame(shown))
            stops.append(self.stop(shown).squeeze(-1))
        return torch.stack(made), torch.stack(stops)

    def loss(self, outputs: tuple[Tensor, Tensor], frames: Tensor, stops: Tensor) -> Tensor:
        """The frames' squared error and the stops' cross-entropy."""
        made, stopping = outputs
        return functional.mse_loss(made, frames) + functional.binary_cross_entropy_with_logits(stopping, stops)


# ---------------------------------------------------------------------------------------------------------------------
# With sizes and batches


@dataclass(frozen=True)
class Case:
    """A model at two sizes, that of the benchmark and a small one for tests, with batches of numbers at random.

    `batch` gets the sizes of the batch, `make` those of the model; floating-point numbers are float32.
    """

    title: str
    make: Callable[..., Any]
    batch: Callable[..., Batch]
    full: tuple[dict[str, int], dict[str, int]]
    small: tuple[dict[str, int], dict[str, int]]

    def model(self, small: bool = False) -> Any:
        """The model, its initial values drawn from torch's generator."""
        return self.make(**(self.small if small else self.full)[0])

    def data(self, small: bool = False) -> Batch:
        """A batch for it."""
        model, batch = self.small if small else self.full
        return self.batch(**model, **batch)


def _lengths(rows: int, steps: int) -> Tensor:
    """Between a third of the steps and all; some row has all."""
    lengths = torch.randint(steps // 3, steps + 1, (rows,))
    lengths[0] = steps
    return lengths


def _sentences(rows: int, steps: int, letters: int, words: int, characters: int, tags: int, **_: int) -> Batch:
    lengths = _lengths(rows, steps)
    wanted = torch.randint(tags, (rows, steps)).masked_fill(torch.arange(steps) >= lengths[:, None], -1)
    return Batch(
        (torch.randint(words, (rows, steps)), torch.randint(characters, (rows, steps, letters)), lengths), (wanted,)
    )


def _utterances(rows: int, steps: int, bands: int, symbols: int, **_: int) -> Batch:
    lengths = _lengths(rows, steps)
    counts = lengths // 16 + 1
    texts = torch.randint(1, symbols, (rows, int(counts.max())))
    return Batch((torch.randn(rows, 1, bands, steps), lengths), (texts, counts))


def _rollout(rows: int, steps: int, observed: int, actions: int, units: int, **_: int) -> Batch:
    begins = (torch.rand(steps, rows) < 0.1).float()
    inputs = (torch.randn(steps, rows, observed), begins, torch.randn(rows, units), torch.randn(rows, units))
    return Batch(inputs, (torch.randint(actions, (steps, rows)), torch.randn(steps, rows)))


def _speech(rows: int, steps: int, symbols: int, bands: int, encoded: int, **_: int) -> Batch:
    present = torch.arange(symbols) < _lengths(rows, symbols)[:, None]
    frames = torch.randn(steps, rows, bands)
    stops = (torch.arange(steps)[:, None] >= _lengths(rows, steps) - 1).float()
    return Batch((torch.randn(rows, symbols, encoded), present, frames), (frames, stops))


CASES: dict[str, Case] = {
    "tagger": Case(
        "character-CNN and BiLSTM tagger (Ma & Hovy 2016)",
        CharacterTagger,
        _sentences,
        (
            {"words": 5000, "characters": 80, "tags": 45, "embedded": 100, "filters": 30, "units": 200},
            {"rows": 16, "steps": 60, "letters": 12},
        ),
        (
            {"words": 20, "characters": 9, "tags": 4, "embedded": 5, "filters": 4, "units": 6},
            {"rows": 5, "steps": 9, "letters": 6},
        ),
    ),
    "recogniser": Case(
        "speech recogniser: convolutions, packed bidirectional GRU layers (Amodei et al. 2016)",
        SpeechRecogniser,
        _utterances,
        (
            {"bands": 161, "channels": 32, "units": 256, "layers": 3, "symbols": 29},
            {"rows": 8, "steps": 300},
        ),
        (
            {"bands": 11, "channels": 2, "units": 5, "layers": 3, "symbols": 6},
            {"rows": 3, "steps": 40},
        ),
    ),
    "agent": Case(
        "recurrent actor-critic with resets, LSTMCell in a loop (Mnih et al. 2016)",
        ActorCritic,
        _rollout,
        ({"observed": 64, "actions": 6, "units": 256}, {"rows": 16, "steps": 20}),
        ({"observed": 3, "actions": 4, "units": 7}, {"rows": 4, "steps": 12}),
    ),
    "decoder": Case(
        "speech decoder: pre-net, attention, two LSTM cells (Wang et al. 2017, Shen et al. 2018)",
        SpeechDecoder,
        _speech,
        (
            {"bands": 80, "encoded": 512, "narrow": 256, "units": 1024, "attention": 128},
            {"rows": 8, "steps": 40, "symbols": 60},
        ),
        (
            {"bands": 4, "encoded": 5, "narrow": 3, "units": 6, "attention": 4},
            {"rows": 3, "steps": 7, "symbols": 9},
        ),
    ),
}
