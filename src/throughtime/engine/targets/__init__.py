"""The targets: the ways in which a recurrence can run, a row each, the one to prefer first."""

from __future__ import annotations

import functools
import importlib

from throughtime.engine.targets.target import Target

TARGETS = {
    "cpu": "throughtime.engine.targets.cpu.target",
    "native": "throughtime.engine.targets.native",
    "stepwise": "throughtime.engine.targets.stepwise",
    "reference": "throughtime.engine.targets.reference",
}
"""By name, the module that holds `TARGET`. The last one, the definition of right, can run everything."""


@functools.cache
def target(name: str) -> Target:
    """The target of this name; its module is imported when it is first asked for."""
    found: Target = importlib.import_module(TARGETS[name]).TARGET
    return found
