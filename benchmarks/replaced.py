"""Models written in plain torch.nn, before `throughtime.upgrade` and after: the same numbers, and a step's seconds.

    python benchmarks/replaced.py                          # all four, on two threads
    python benchmarks/replaced.py --only agent --quick     # to see that it works

The models are in `replaced_models.py`. First the outputs and the gradients of the upgraded model are held against those
of the model as it was, in float32 and float64. Then training steps (forward, backward, an update) of the two are timed,
round after round, the one that begins changing with every round; medians over all rounds. Writes JSON and a Markdown
table.
"""

from __future__ import annotations

import argparse
import copy
import os
import platform
import statistics
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from record import processor, save
from replaced_models import CASES, Batch, Case
from torch import Tensor

import throughtime as tt

RESULTS = Path(__file__).parent / "results"
ROUNDS, STEPS = 15, 3


class Ran(NamedTuple):
    """What a model returned and the gradient of its loss by each parameter, by name."""

    outputs: list[Tensor]
    gradients: dict[str, Tensor]


def ran(model: Any, batch: Batch) -> Ran:
    """One run in training, with the same dropout whenever it is made."""
    torch.manual_seed(1)
    outputs = model(*batch.inputs)
    loss = model.loss(outputs, *batch.targets)
    named = dict(model.named_parameters())
    found = torch.autograd.grad(loss, list(named.values()))
    together = outputs if isinstance(outputs, tuple) else (outputs,)
    return Ran(
        [output.detach() for output in together if output.is_floating_point()], dict(zip(named, found, strict=True))
    )


def apart(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """The largest difference between tensors, each as a share of the other's largest entry."""
    return max(
        ((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-30)).item()
        for a, b in zip(one, other, strict=True)
    )


def prepared(case: Case, dtype: torch.dtype, small: bool = False) -> tuple[Any, Batch]:
    """A model in training and its batch, the same numbers in every dtype."""
    torch.manual_seed(0)
    model, batch = case.model(small).to(dtype), case.data(small)
    inputs, targets = ([t.to(dtype) if t.is_floating_point() else t for t in part] for part in batch)
    return model, Batch(tuple(inputs), tuple(targets))


def differences(case: Case, small: bool = False) -> dict[str, Any]:
    """How far outputs and gradients are apart after the upgrade, and torch's own float32 from its float64."""
    found: dict[str, Any] = {}
    runs: dict[torch.dtype, Ran] = {}
    for dtype, name in ((torch.float32, "float32"), (torch.float64, "float64")):
        model, batch = prepared(case, dtype, small)
        ours = copy.deepcopy(model)
        found["replaced"] = [f"{row.name}: {row.after}" for row in tt.upgrade(ours).replaced]
        before, after = ran(model, batch), ran(ours, batch)
        runs[dtype] = before
        found[f"outputs, {name}"] = apart(after.outputs, before.outputs)
        found[f"gradients, {name}"] = apart(list(after.gradients.values()), list(before.gradients.values()))
    single, double = runs[torch.float32], runs[torch.float64]
    found["rounding of outputs"] = apart(single.outputs, double.outputs)
    found["rounding of gradients"] = apart(list(single.gradients.values()), list(double.gradients.values()))
    return found


def timed(case: Case, rounds: int, steps: int, small: bool = False) -> dict[str, list[float]]:
    """Seconds of a training step in every round, before the upgrade and after."""
    model, batch = prepared(case, torch.float32, small)
    ours = copy.deepcopy(model)
    tt.upgrade(ours)
    models = {"before": model, "after": ours}
    optimisers = {name: torch.optim.SGD(one.parameters(), lr=1e-4) for name, one in models.items()}

    def train(name: str) -> float:
        started = time.perf_counter()
        for _ in range(steps):
            optimisers[name].zero_grad()
            model = models[name]
            model.loss(model(*batch.inputs), *batch.targets).backward()
            optimisers[name].step()
        return (time.perf_counter() - started) / steps

    seconds: dict[str, list[float]] = {name: [] for name in models}
    for name in models:
        train(name)
    for number in range(rounds):
        for name in sorted(models, reverse=bool(number % 2)):
            seconds[name].append(train(name))
    return seconds


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The record that is written."""
    torch.set_num_threads(options.threads)
    begun = datetime.now(UTC)
    cases = []
    for name in options.only:
        print(f"{name} ...", flush=True)
        case = CASES[name]
        found = differences(case, options.quick)
        seconds = timed(case, options.rounds, 1 if options.quick else STEPS, options.quick)
        cases.append({"name": name, "title": case.title, **found, "seconds": seconds})
    setting = {
        "date": begun.isoformat(timespec="seconds"),
        "minutes": round((datetime.now(UTC) - begun).total_seconds() / 60, 1),
        "threads": options.threads,
        "rounds": options.rounds,
        "quick": options.quick,
        "processor": processor(),
        "cores": os.cpu_count(),
        "system": platform.system(),
        "versions": {"python": platform.python_version(), **{p: version(p) for p in ("torch", "throughtime")}},
    }
    return {"setting": setting, "cases": cases}


def as_markdown(record: dict[str, Any]) -> str:
    """The record as tables."""
    setting = record["setting"]
    versions = ", ".join(f"{name} {number}" for name, number in setting["versions"].items())
    lines = [
        "# Models in plain torch.nn, before and after `throughtime.upgrade`",
        "",
        f"{setting['processor']}, {setting['cores']} cores, {setting['threads']} thread(s), {setting['system']}; "
        f"{versions}; {setting['date']}, {setting['rounds']} rounds. `python benchmarks/replaced.py`",
        "",
    ]
    if setting["quick"]:
        lines += ["A quick run on small sizes, to see that it works: its seconds say nothing.", ""]
    lines += [
        "## A training step",
        "",
        "Forward, backward and an update; the median of all rounds.",
        "",
        "| model | before | after | times as fast |",
        "|---|---|---|---|",
    ]
    for case in record["cases"]:
        before, after = (statistics.median(case["seconds"][name]) for name in ("before", "after"))
        lines.append(f"| {case['title']} | {1e3 * before:.4g} ms | {1e3 * after:.4g} ms | {before / after:.2f} |")
    lines += [
        "",
        "## The same numbers",
        "",
        "The largest difference between the model before and after, of an output and of a parameter's gradient, as a "
        "share of that tensor's largest entry. The last column is how far torch's own float32 is from its float64.",
        "",
        "| model | outputs, float32 | gradients, float32 | outputs, float64 | gradients, float64 | torch's rounding: "
        "outputs, gradients |",
        "|---|---|---|---|---|---|",
    ]
    for case in record["cases"]:
        shown = [case[f"{what}, {kind}"] for kind in ("float32", "float64") for what in ("outputs", "gradients")]
        rounding = f"{case['rounding of outputs']:.1e}, {case['rounding of gradients']:.1e}"
        lines.append(f"| {case['title']} | {' | '.join(f'{value:.1e}' for value in shown)} | {rounding} |")
    lines += ["", "## What was replaced", ""]
    lines += [f"- {case['title']}: {', '.join(f'`{row}`' for row in case['replaced'])}" for case in record["cases"]]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=tuple(CASES), default=list(CASES), metavar="MODEL")
    parser.add_argument("--threads", type=int, choices=(1, 2), default=2)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--quick", action="store_true", help="two rounds on small sizes, to see that it works")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder to write to")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    options.only = [name for name in CASES if name in options.only]
    options.rounds = 2 if options.quick else options.rounds
    record = measure(options)
    print(as_markdown(record))
    save(options.out / "replaced", record, as_markdown(record))


if __name__ == "__main__":
    main()
