"""A cell of one's own: define it, read what follows from it, check its gradient, train it.

    python examples/own_cell.py

The task: ten numbers come one after the other, and the network is asked for the first.
"""

from __future__ import annotations

import torch

import throughtime as tt
from throughtime.equations.latex import written


@tt.cell(states="h")
def MinimalGated(x, h, W, U, b):
    """Zhou et al. 2016, arXiv:1603.09420: one gate forgets and resets."""
    f = tt.sigmoid(W.f @ x + b.f + U.f @ h)
    n = tt.tanh(W.n @ x + b.n + U.n @ (f * h))
    return (1 - f) * h + f * n


def check() -> bool:
    """Whether the derived gradient is the slope of the output, in float64."""
    layer = tt.nn.Recurrent(MinimalGated, 2, 3, dtype=torch.float64)
    x = torch.randn(4, 2, 2, dtype=torch.float64, requires_grad=True)
    return torch.autograd.gradcheck(lambda x, *_: layer(x)[0], (x, *layer.parameters()))


def train(steps: int = 300) -> float:
    """The mean squared error after training; answering 1/2 always would have 1/12."""
    layer, readout = tt.nn.Recurrent(MinimalGated, 1, 32), tt.nn.LastStep(32, 1)
    adam = torch.optim.Adam([*layer.parameters(), *readout.parameters()], lr=0.01)
    loss = torch.zeros(())
    for _ in range(steps):
        x = torch.rand(10, 64, 1)  # [T, B, I]
        outputs, _ = layer(x)  # [T, B, H]
        loss = torch.nn.functional.mse_loss(readout(outputs), x[0])
        adam.zero_grad()
        loss.backward()
        adam.step()
    return loss.item()


if __name__ == "__main__":
    torch.manual_seed(0)
    print(written(MinimalGated, input_size=1, hidden_size=32))
    print(f"gradcheck: {check()}")
    print(f"mean squared error after training: {train():.4f} (untrained guess: {1 / 12:.4f})")
