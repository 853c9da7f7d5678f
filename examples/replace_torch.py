"""An existing model, its recurrent layers replaced: the same weights, the same outputs, the same gradients.

python examples/replace_torch.py
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

import throughtime as tt


class Tagger(torch.nn.Module):
    """A class for each step, from both directions."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent = torch.nn.LSTM(12, 32, bidirectional=True)
        self.readout = torch.nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        """x [T, B, 12] to logits [T, B, 5]."""
        outputs, _ = self.recurrent(x)
        logits: Tensor = self.readout(outputs)
        return logits


def apart(seed: int = 0) -> tuple[float, float]:
    """The largest difference of an output and of a gradient between a model and its upgraded copy."""
    torch.manual_seed(seed)
    theirs = Tagger()
    ours = copy.deepcopy(theirs)
    tt.upgrade(ours)
    x = torch.randn(29, 8, 12)
    outputs = [model(x) for model in (theirs, ours)]
    for output in outputs:
        output.square().sum().backward()
    pairs = list(zip(theirs.parameters(), ours.parameters(), strict=True))
    gradients = [(a.grad, b.grad) for a, b in pairs if a.grad is not None and b.grad is not None]
    assert len(gradients) == len(pairs)
    return (
        (outputs[0] - outputs[1]).abs().max().item(),
        max(((a - b).abs().max() / a.abs().max()).item() for a, b in gradients),
    )


if __name__ == "__main__":
    output, gradient = apart()
    print(f"largest difference of an output: {output:.1e}, of a gradient, as a share of its largest: {gradient:.1e}")
