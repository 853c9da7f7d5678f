"""The machine that code is generated for: this one, or a lesser one by name, and never one that this one cannot be.

LLVM ends the process on a name that it has no 64-bit code for, and believes any other, so a name reaches it only when
it is known: this machine's, a level of the x86-64 ABI, or one that a process of its own has tried.
"""

from __future__ import annotations

import difflib
import functools
import json
import os
import platform
import re
import subprocess
import sys
from dataclasses import dataclass

import llvmlite.binding as binding

from throughtime.errors import TargetError

LEVELS = {"x86-64": 16, "x86-64-v2": 16, "x86-64-v3": 32, "x86-64-v4": 64}
"""The levels of the x86-64 ABI, and the bytes of a vector at each."""

SECONDS = 60
"""Patience with the process that tries a name; it takes a fraction of one."""


@dataclass(frozen=True)
class Machine:
    """What code is generated for: a CPU by name with its features, the bytes of a vector, how many registers it has."""

    cpu: str
    features: str
    vector_bytes: int
    registers: int

    def lanes(self, itemsize: int) -> int:
        """How many numbers of this size a vector holds."""
        return self.vector_bytes // itemsize


@functools.cache
def machine() -> Machine:
    """This machine, or the lesser one that THROUGHTIME_CPU names (an LLVM CPU name such as x86-64-v3).

    Raises TargetError for a name that LLVM does not know, or whose vectors are wider than this machine's.
    """
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    asked, here = os.environ.get("THROUGHTIME_CPU"), _this_machine()
    return here if not asked or asked == here.cpu else _lesser(asked, here)


def _this_machine() -> Machine:
    cpu, features = binding.get_host_cpu_name(), binding.get_host_cpu_features()
    if not _is_x86():
        return Machine(cpu, features.flatten(), 16, 32 if platform.machine() in ("arm64", "aarch64") else 16)
    vector_bytes = 64 if features.get("avx512f") else 32 if features.get("avx2") else 16
    return _x86(cpu, features.flatten(), vector_bytes)


def _lesser(asked: str, here: Machine) -> Machine:
    """The machine of this name, less every feature that the machine at hand lacks, so that it can run the code."""
    if not _is_x86():
        if asked != "generic":  # which features another name has, and this machine lacks, cannot be told here
            raise TargetError(f"THROUGHTIME_CPU is {asked!r}; on this machine use {here.cpu} or generic")
        return Machine(asked, "", here.vector_bytes, here.registers)
    found = LEVELS.get(asked) or _tried(asked)
    if isinstance(found, int) and found <= here.vector_bytes:
        lacking = sorted(name for name, there in binding.get_host_cpu_features().items() if not there)
        return _x86(asked, ",".join(f"-{name}" for name in lacking), found)
    why = f"whose vectors of {found} bytes are wider than this machine's" if isinstance(found, int) else found
    levels = [level for level, vector_bytes in LEVELS.items() if vector_bytes <= here.vector_bytes]
    raise TargetError(
        f"THROUGHTIME_CPU is {asked!r}, {why}; use {', '.join(levels)}, {here.cpu} (this machine), "
        "or a lesser CPU by LLVM's name for it"
    )


def _x86(cpu: str, features: str, vector_bytes: int) -> Machine:
    return Machine(cpu, features, vector_bytes, 32 if vector_bytes == 64 else 16)


def _is_x86() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64")


# ---------------------------------------------------------------------------------------------------------------------
# Other names, in a process that LLVM may end

_TRIAL = """
import json, sys
sys.path[:] = json.loads(sys.argv[2])
import llvmlite.binding as binding
binding.initialize_native_target()
binding.initialize_native_asmprinter()
target = binding.Target.from_triple(binding.get_process_triple())
machine = target.create_target_machine(cpu=sys.argv[1], codemodel="jitdefault", reloc="pic", jit=True)
code = "define <16 x i32> @f(<16 x i32> %a, <16 x i32> %b) { %c = add <16 x i32> %a, %b ret <16 x i32> %c }"
print(machine.emit_assembly(binding.parse_assembly(code)))
"""
"""Adds sixteen integers, for which AVX2 and AVX-512 take their widest registers, and AVX alone does not."""


@functools.cache
def _tried(name: str) -> int | str:
    """The bytes of a vector of the CPU of this name, or why it will not do."""
    if not re.fullmatch(r"\w[\w.-]*", name, re.ASCII) or name == "help":
        return "which is no name of a CPU"
    trial = _run(name)
    if trial is None:
        return "which could not be tried in a process of its own"
    if "is not a recognized processor" in trial.stderr:
        return f"a CPU that LLVM does not know{_meant(name)}"
    if trial.returncode != 0:
        return "for which LLVM generates no code on this machine"
    added = [line for line in trial.stdout.splitlines() if "padd" in line]
    return 64 if any("zmm" in line for line in added) else 32 if any("ymm" in line for line in added) else 16


def _meant(name: str) -> str:
    """The names in LLVM's list that are spelt much like this one, in words."""
    listed = _run("help")
    known = re.findall(r"^ +(\S+) +- Select the \S+ processor", listed.stderr if listed else "", re.MULTILINE)
    close = difflib.get_close_matches(name, known)
    return f" (it knows {', '.join(close)})" if close else ""


def _run(name: str) -> subprocess.CompletedProcess[str] | None:
    """Let a process of its own generate code for a CPU; None where there can be no such process."""
    if not sys.executable or getattr(sys, "frozen", False):
        return None
    try:
        return subprocess.run(
            [sys.executable, "-c", _TRIAL, name, json.dumps(sys.path)],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=SECONDS,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
