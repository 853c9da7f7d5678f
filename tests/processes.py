"""Scripts in processes of their own, for what must not happen in the process of the tests."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent
SECONDS = 60


def python(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a script, with the tests' modules at hand; warnings are shown, not raised."""
    path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True, text=True, timeout=SECONDS,
    )  # fmt: skip
