"""Every test has the same seed, one thread unless it says otherwise, and NaN in memory that nobody has written."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

settings.register_profile("house", derandomize=True, deadline=None)
settings.load_profile("house")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _same_every_time() -> Iterator[None]:
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)  # with it torch fills what torch.empty gives with NaN
    yield
    torch.use_deterministic_algorithms(False)
