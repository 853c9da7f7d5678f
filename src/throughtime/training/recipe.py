"""How to train."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from throughtime.errors import ThroughtimeError

QUANTILE, SEEN, ENOUGH = 0.9, 200, 20
"""clip="auto" is this quantile of the last SEEN gradient norms, reckoned after every ENOUGH updates."""

HOW = f"above {QUANTILE:.0%} of the last {SEEN} norms (reckoned after every {ENOUGH} updates)"
"""The same in words, for those who read a run."""


@dataclass(frozen=True)
class Recipe:
    """How to train. Raises ThroughtimeError for nonsense.

    `batch_size` sequences make a batch; with `accumulate`, the gradients of so many batches make one update, divided by
    the terms of the loss, sequences or steps, of all of them together. The optimiser is AdamW (Loshchilov and Hutter
    2019), its weight decay on matrices only. The learning rate rises in a straight line over the first `warmup` of the
    training, then falls to zero, as half a cosine or in a straight line. `clip` bounds the norm of all gradients
    together; "auto" is what `nn.clipping.suggest_clip` says of the last 200 norms, anew after every 20 updates, and
    clips nothing before the first 20. `patience` is how many epochs may pass without a lower loss on the validation
    part, where there is one; then, and at the end, the weights of the lowest come back. `truncate` cuts
    back-propagation into windows of so many steps, each of which counts as a batch: the state goes on into the next
    window, the gradient does not go back.
    """

    epochs: int = 60
    batch_size: int = 32
    learning_rate: float = 2e-3
    clip: float | Literal["auto"] | None = "auto"
    weight_decay: float = 0.01
    warmup: float = 0.05
    decay: Literal["cosine", "linear", "none"] = "cosine"
    accumulate: int = 1
    patience: int | None = 15
    truncate: int | None = None

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "learning_rate", "clip", "accumulate", "patience", "truncate"):
            value = getattr(self, name)
            if value not in (None, "auto") and (isinstance(value, str) or not 0 < value < math.inf):
                raise ThroughtimeError(f"the {name.replace('_', ' ')} is {value}; give a number above 0")
        if not 0 <= self.weight_decay < math.inf:
            raise ThroughtimeError(f"the weight decay is {self.weight_decay}; give a number from 0")
        if not 0 <= self.warmup < 1:
            raise ThroughtimeError(f"the warmup is {self.warmup}; give a share of the training, from 0 and below 1")

    def learning_rate_at(self, progress: float) -> float:
        """The learning rate when this share of the training (0 to 1) is done."""
        if progress < self.warmup:
            return self.learning_rate * progress / self.warmup
        left = (1 - progress) / (1 - self.warmup)
        shares = {"cosine": 0.5 * (1 - math.cos(math.pi * left)), "linear": left, "none": 1.0}
        return self.learning_rate * shares[self.decay]
