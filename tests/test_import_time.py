"""Importing the library costs little beyond importing torch, and loads nothing that only some of it needs."""

from __future__ import annotations

import subprocess
import sys

ALLOWED_SECONDS = 0.3
TIMED = """
import time
start = time.perf_counter()
import torch
middle = time.perf_counter()
import throughtime
print(time.perf_counter() - middle)
"""


def output_of(program: str) -> str:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout


def test_import_adds_little_to_torchs() -> None:
    assert min(float(output_of(TIMED)) for _ in range(3)) <= ALLOWED_SECONDS


def test_import_loads_nothing_heavy() -> None:
    heavy = "numba llvmlite pandas pyarrow sklearn matplotlib jinja2 typer rich scipy onnx onnxruntime onnxscript"
    program = f"import sys, torch, throughtime; print(*(set('{heavy}'.split()) & set(sys.modules)))"
    assert output_of(program).split() == []
