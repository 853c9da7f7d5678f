"""Float32 errors of the fused CPU target beside torch.nn's own, on the same problems, against torch.nn in float64.

Run `python benchmarks/accuracy.py` to write results/accuracy.json and results/accuracy.md; a few minutes on one core.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

import throughtime.nn as ours

RESULTS = Path(__file__).parent / "results"
PAIRS: dict[str, tuple[Callable[[int, int], torch.nn.RNNBase], Callable[[int, int], torch.nn.RNNBase]]] = {
    "elman": (ours.RNN, torch.nn.RNN),
    "gru": (ours.GRU, torch.nn.GRU),
    "lstm": (ours.LSTM, torch.nn.LSTM),
}
RMS_BAR, LARGEST_BAR = 1.5, 3.0
FLOOR = 2.0**-26
"""Errors of less than a quarter of a unit in the last place of the quantity's own size count as that much."""

Size = tuple[int, int, int, int]


@dataclass(frozen=True)
class Measured:
    """One quantity of all problems of one size: the errors of both, and how ours stand to torch's."""

    cell: str
    size: Size
    problems: int
    quantity: str
    rms: float
    largest: float
    torch_rms: float
    torch_largest: float

    @property
    def rms_ratio(self) -> float:
        """Our root mean square error over torch's."""
        return self.rms / self.torch_rms

    @property
    def largest_ratio(self) -> float:
        """Our largest error over torch's."""
        return self.largest / self.torch_largest


def measure(cell: str, size: Size, seeds: Sequence[int]) -> Iterator[Measured]:
    """The errors of every output and gradient over random problems of one size (T, B, I, H).

    Problems are pooled: the error of a handful of numbers is chance.
    """
    drawn = [errors(cell, size, seed) for seed in seeds]
    for name in drawn[0]:
        exact, mine, torchs = (torch.cat([found[name][i] for found in drawn]) for i in range(3))
        typical, most = root_mean_square(exact), exact.abs().max().item()
        yield Measured(
            cell, size, len(seeds), name,
            root_mean_square(mine), mine.abs().max().item(),
            max(root_mean_square(torchs), FLOOR * typical), max(torchs.abs().max().item(), FLOOR * most),
        )  # fmt: skip


def root_mean_square(values: Tensor) -> float:
    return values.square().mean().sqrt().item()


def errors(cell: str, size: Size, seed: int) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """By quantity: the exact values, our errors, torch's errors, each flat."""
    steps, rows, inputs, units = size
    mine, theirs = PAIRS[cell]
    torch.manual_seed(seed)
    peer = theirs(inputs, units)
    layer = mine(inputs, units)
    layer.load_state_dict(peer.state_dict())
    x, d = torch.randn(steps, rows, inputs), torch.randn(steps, rows, units)
    truth = quantities(copy.deepcopy(peer).double(), x.double(), d.double())
    peers, found = quantities(peer, x, d), quantities(layer, x, d)
    return {
        name: (exact.flatten(), (found[name] - exact).flatten(), (peers[name] - exact).flatten())
        for name, exact in truth.items()
    }


def quantities(layer: torch.nn.RNNBase, x: Tensor, d: Tensor) -> dict[str, Tensor]:
    """Outputs, last states, and the gradients of x, the first states and the weights."""
    x = x.clone().requires_grad_()
    shape = (1, x.shape[1], layer.hidden_size)
    generator = torch.Generator().manual_seed(3)
    count = 2 if isinstance(layer, torch.nn.LSTM) else 1
    first = [torch.randn(shape, generator=generator).to(x.dtype).requires_grad_() for _ in range(count)]
    output, last = layer(x, tuple(first) if count == 2 else first[0])
    last = last if count == 2 else (last,)
    loss = (output * d).sum() + sum(state.sum() for state in last)
    weights = dict(layer.named_parameters())
    names = ["dx", *(f"d{state}_0" for state in "hc"[:count]), *(f"d {name.removesuffix('_l0')}" for name in weights)]
    gradients = torch.autograd.grad(loss, [x, *first, *weights.values()])
    ends = {f"{state}_n": value.detach() for state, value in zip("hc", last, strict=False)}
    return {"output": output.detach(), **ends, **dict(zip(names, gradients, strict=True))}


SEEDS = range(8)
SIZES: list[Size] = [
    (2, 8, 3, 16), (5, 8, 1, 33), (5, 8, 40, 64), (20, 1, 3, 64), (20, 8, 3, 33), (20, 8, 40, 16), (50, 1, 1, 16),
    (50, 8, 3, 64), (50, 8, 40, 33), (100, 1, 40, 64), (1000, 1, 3, 33), (1000, 8, 3, 16), (500, 8, 40, 64),
]  # fmt: skip


def study() -> Iterator[Measured]:
    """Every cell at every size, eight problems each, up to a thousand steps."""
    for size in SIZES:
        for cell in PAIRS:
            yield from measure(cell, size, SEEDS)


def table(every: list[Measured]) -> str:
    """The worst and the typical ratios per cell and quantity."""
    lines = [
        "# Float32 errors beside torch.nn's, against float64",
        "",
        f"`python benchmarks/accuracy.py`; {len(SIZES) * len(PAIRS) * len(SEEDS)} problems. Bars: "
        f"{RMS_BAR} for the RMS error, {LARGEST_BAR} for the largest; each ratio is of all problems of one size.",
        "",
        "| cell | quantity | RMS ratio, median | worst | largest-error ratio, median | worst | sizes over a bar |",
        "|---|---|---|---|---|---|---|",
    ]
    for cell, quantity in dict.fromkeys((m.cell, m.quantity) for m in every):
        of = [m for m in every if (m.cell, m.quantity) == (cell, quantity)]
        rms, largest = sorted(m.rms_ratio for m in of), sorted(m.largest_ratio for m in of)
        over = sum(m.rms_ratio > RMS_BAR or m.largest_ratio > LARGEST_BAR for m in of)
        middle = len(of) // 2
        lines.append(
            f"| {cell} | {quantity} | {rms[middle]:.2f} | {rms[-1]:.2f} | {largest[middle]:.2f} | {largest[-1]:.2f} "
            f"| {over} of {len(of)} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS)
    folder = parser.parse_args().results
    torch.set_num_threads(1)
    every = list(study())
    folder.mkdir(parents=True, exist_ok=True)
    content = [{**asdict(m), "rms_ratio": m.rms_ratio, "largest_ratio": m.largest_ratio} for m in every]
    (folder / "accuracy.json").write_text(json.dumps(content, indent=1) + "\n")
    (folder / "accuracy.md").write_text(table(every))
    print(table(every))


if __name__ == "__main__":
    main()
