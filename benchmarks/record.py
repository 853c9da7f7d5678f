"""What the benchmarks share when they have measured: the machine's name, and files that are whole or not there."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def processor() -> str:
    """The model's name where the system tells, else the architecture."""
    told = Path("/proc/cpuinfo")
    lines = told.read_text(encoding="utf-8").splitlines() if told.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def save(stem: Path, record: Mapping[str, Any], markdown: str, figure: Figure | None = None, *, dpi: int = 120) -> None:
    """The record as JSON, its tables as Markdown, its figure, if it has one, as PNG and SVG: `stem` with suffixes."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    _whole(stem, ".json", lambda part: part.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8"))
    _whole(stem, ".md", lambda part: part.write_text(markdown, encoding="utf-8"))
    if figure is None:
        return
    _whole(stem, ".png", lambda part: figure.savefig(part, format="png", dpi=dpi))
    _whole(stem, ".svg", lambda part: figure.savefig(part, format="svg", dpi=dpi, metadata={"Date": None}))


def _whole(stem: Path, suffix: str, put: Callable[[Path], Any]) -> None:
    part = stem.with_name(f"{stem.name}{suffix}.part")
    put(part)
    part.replace(stem.with_name(stem.name + suffix))
