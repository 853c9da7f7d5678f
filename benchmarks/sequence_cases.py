"""One case of `sequences.py`, measured in a process of its own.

    python benchmarks/sequence_cases.py '{"section": "ragged", "cell": "gru", "way": "packed", ...}'

Prints, as JSON, the seconds of every run by name, and what else the case found: bytes, shares, and sums of outputs and
gradients by which the ways of computing the same thing are held against each other.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

import throughtime as tt

LAYERS = {"elman": "RNN", "gru": "GRU", "lstm": "LSTM"}
Seconds = dict[str, list[float]]


class Plan(NamedTuple):
    """How long to measure, and how large: in a quick run everything is small and done twice."""

    quick: bool
    runs: int
    seconds: float

    def steps(self, steps: int) -> int:
        """So many steps, or few in a quick run."""
        return min(steps, 60) if self.quick else steps


def interleaved(calls: dict[str, Callable[[], Any]], plan: Plan, warm: bool = True) -> Seconds:
    """Each call in turn, round after round: at least so many runs, and quick ones for so many seconds."""
    if warm:
        for call in calls.values():
            call()
    found: Seconds = {name: [] for name in calls}
    begun = time.perf_counter()
    while min(map(len, found.values())) < plan.runs or (
        time.perf_counter() - begun < plan.seconds * len(calls) and min(map(len, found.values())) < 200
    ):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            found[name].append(time.perf_counter() - start)
    return found


def uneven(rows: int, least: int, most: int, seed: int = 0) -> Tensor:
    """Lengths drawn uniformly; the first is the largest there can be, so that every way has as many steps."""
    lengths = torch.randint(least, most + 1, (rows,), generator=torch.Generator().manual_seed(seed))
    lengths[0] = most
    return lengths


def training(layer: Any, x: Tensor, d_output: Tensor, forward: Callable[[Any, Tensor], Tensor]) -> Callable[[], Tensor]:
    """A forward run, and the backward run to x and every weight."""

    def call() -> Tensor:
        x.grad = None
        layer.zero_grad()
        output = forward(layer, x)
        output.backward(d_output)
        return output

    return call


def check_of(output: Tensor, layer: Any, x: Tensor) -> dict[str, float]:
    """Sums by which ways of computing the same are compared."""
    assert x.grad is not None
    weights = [p.grad.double().abs().sum().item() for p in layer.parameters() if p.grad is not None]
    return {
        "output": output.detach().double().abs().sum().item(),
        "d_x": x.grad.double().abs().sum().item(),
        "d_weights": sum(weights),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Ragged


def ragged(spec: dict[str, Any], plan: Plan) -> dict[str, Any]:
    """T=1000, B=32, uniform lengths: our lengths=, torch's PackedSequence, torch's padded tensor with a mask."""
    steps, rows, inputs, units = plan.steps(1000), 32, 64, 128
    name, way = LAYERS[spec["cell"]], spec["way"]
    lengths = uneven(rows, 1, steps).sort(descending=True).values  # packing is not charged with sorting
    torch.manual_seed(0)
    layer = getattr(tt.nn if way == "throughtime" else torch.nn, name)(inputs, units)
    x = torch.randn(steps, rows, inputs).requires_grad_()
    inside = (torch.arange(steps)[:, None] < lengths).unsqueeze(-1)
    d_output = torch.randn(steps, rows, units) * inside
    packed_d = pack_padded_sequence(d_output, lengths).data
    ways: dict[str, tuple[Callable[[Any, Tensor], Tensor], Tensor]] = {
        "throughtime": (lambda layer, x: layer(x, lengths=lengths)[0], d_output),
        "packed": (lambda layer, x: layer(pack_padded_sequence(x, lengths))[0].data, packed_d),
        "padded": (lambda layer, x: layer(x)[0] * inside, d_output),
    }
    forward, d = ways[way]
    call = training(layer, x, d, forward)
    if way == "packed":  # up to ten seconds a run: the second is no quicker than the first
        plan = plan._replace(runs=1, seconds=0.0)
        seconds = interleaved({way: call}, plan, warm=False)
        output = forward(layer, x) if plan.quick else None
    else:
        seconds = interleaved({way: call}, plan)
        output = call()
    check = check_of(output, layer, x) if output is not None else {}
    share = lengths.sum().item() / (steps * rows)
    return {"seconds": seconds, "check": check, "share": share}


def shares(spec: dict[str, Any], plan: Plan) -> dict[str, Any]:
    """What a ragged batch costs beside a full one, and the share of steps that are real."""
    rows, units, inputs = spec["rows"], 128, 64
    steps = plan.steps(32_000 // rows)
    layer = getattr(tt.nn, LAYERS[spec["cell"]])(inputs, units)
    lengths = uneven(rows, 1, steps)
    x = torch.randn(steps, rows, inputs).requires_grad_()
    d_output = torch.randn(steps, rows, units)
    calls = {
        "full": training(layer, x, d_output, lambda layer, x: layer(x)[0]),
        "ragged": training(layer, x, d_output, lambda layer, x: layer(x, lengths=lengths)[0]),
    }
    return {"seconds": interleaved(calls, plan), "share": lengths.sum().item() / (steps * rows)}


# ---------------------------------------------------------------------------------------------------------------------
# Resets and episodes


def resets(spec: dict[str, Any], plan: Plan) -> dict[str, Any]:
    """A dense batch with a reset at one step in fifty, and without."""
    steps, rows, inputs, units = plan.steps(1000), 32, 64, 128
    layer = getattr(tt.nn, LAYERS[spec["cell"]])(inputs, units)
    reset = torch.rand(steps, rows, generator=torch.Generator().manual_seed(0)) < 0.02
    x = torch.randn(steps, rows, inputs).requires_grad_()
    d_output = torch.randn(steps, rows, units)
    calls = {
        "none": training(layer, x, d_output, lambda layer, x: layer(x)[0]),
        "resets": training(layer, x, d_output, lambda layer, x: layer(x, reset=reset)[0]),
    }
    return {"seconds": interleaved(calls, plan)}


class CellLoop(torch.nn.Module):
    """The loop of recurrent policies: a cell called at every step, the state multiplied by nought where one begins."""

    def __init__(self, inputs: int, units: int) -> None:
        super().__init__()
        self.cell = torch.nn.GRUCell(inputs, units)

    def forward(self, x: Tensor, starts: Tensor) -> Tensor:
        h = x.new_zeros(x.shape[1], self.cell.hidden_size)
        keep = (~starts).to(x.dtype).unsqueeze(-1)
        outputs = []
        for x_t, kept in zip(x.unbind(), keep.unbind(), strict=True):
            h = self.cell(x_t, h * kept)
            outputs.append(h)
        return torch.stack(outputs)


def episodes(spec: dict[str, Any], plan: Plan) -> dict[str, Any]:
    """64 episodes of uneven length, GRU-256: as 64 padded rows, or one after the other in a window of 8 rows."""
    inputs, units, count = 64, 256, 64
    torch.manual_seed(0)
    lengths = uneven(count, 4, plan.steps(128))
    if spec["layout"] == "rows":
        steps, rows = int(lengths.max()), count
        inside = torch.arange(steps)[:, None] < lengths
        starts = torch.zeros(steps, rows, dtype=torch.bool)
        starts[0] = True
    else:
        rows = 8
        steps = int(lengths.view(rows, -1).sum(1).max())
        inside, starts = torch.zeros(2, steps, rows, dtype=torch.bool)
        for row, own in enumerate(lengths.view(rows, -1).tolist()):
            ends = torch.tensor(own).cumsum(0)
            inside[: ends[-1], row] = True
            starts[[0, *ends[:-1].tolist()], row] = True
    ends_of_rows = inside.sum(0)
    layer, loop = tt.nn.GRU(inputs, units), CellLoop(inputs, units)
    loop.cell.load_state_dict({name.replace("_l0", ""): value for name, value in layer.state_dict().items()})
    x = torch.randn(steps, rows, inputs)
    d_output = torch.randn(steps, rows, units) * inside.unsqueeze(-1)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    calls = {
        "throughtime": training(
            layer, ours, d_output, lambda layer, x: layer(x, lengths=ends_of_rows, reset=starts)[0]
        ),
        "loop": training(loop, theirs, d_output, lambda loop, x: loop(x, starts) * inside.unsqueeze(-1)),
    }
    outputs = {name: call() for name, call in calls.items()}
    found = check_of(outputs["throughtime"], layer, ours)
    agree(found, check_of(outputs["loop"], loop, theirs), f"episodes as {spec['layout']}")
    return {"seconds": interleaved(calls, plan), "steps": int(inside.sum()), "window": [steps, rows]}


def agree(first: dict[str, float], second: dict[str, float], what: str) -> None:
    """Raises SystemExit where sums differ by more than rounding makes them."""
    for name, value in first.items():
        if not abs(value - second[name]) <= 1e-3 * abs(value):
            raise SystemExit(f"{what}: {name} differs, {value} against {second[name]}")


# ---------------------------------------------------------------------------------------------------------------------
# Endless


def length(spec: dict[str, Any], plan: Plan) -> dict[str, Any]:
    """A training run of many steps at B=32, with segments="auto" and, where memory allows, without."""
    steps, rows, inputs, units = spec["steps"], 32, 8, 64
    layer = getattr(tt.nn, LAYERS[spec["cell"]])(inputs, units)
    layer.segments = "auto"
    d_output = torch.randn(1, 1, units).expand(200, rows, units).contiguous()
    small = training(layer, torch.randn(200, rows, inputs).requires_grad_(), d_output, lambda layer, x: layer(x)[0])
    small()
    x = torch.randn(steps, rows, inputs).requires_grad_()
    d_output = torch.randn(1, 1, units).expand(steps, rows, units).contiguous()

    def run(segments: Any) -> Callable[[Any, Tensor], Tensor]:
        def forward(layer: Any, x: Tensor) -> Tensor:
            layer.segments = segments
            output: Tensor = layer(x)[0]
            return output

        return forward

    calls = {"auto": training(layer, x, d_output, run("auto"))}
    if steps <= 10_000:
        calls["none"] = training(layer, x, d_output, run(None))
    if steps >= 100_000:
        plan = plan._replace(runs=1, seconds=0.0)
    return {"seconds": interleaved(calls, plan)}


def memory(spec: dict[str, Any], plan: Plan) -> dict[str, Any]:
    """The most memory that a training run needs beyond its input, its output and their gradients: H=128, B=4."""
    steps, rows, inputs, units = spec["steps"], 4, 32, 128
    layer = getattr(tt.nn, LAYERS[spec["cell"]])(inputs, units)
    layer.segments = None if spec["segments"] == "none" else "auto"
    for warm in (16, 200):  # compiled code, and what torch imports at the first gradient it is given
        layer(torch.randn(warm, rows, inputs).requires_grad_())[0].backward(torch.randn(warm, rows, units))
    layer.zero_grad()
    x = torch.randn(steps, rows, inputs).requires_grad_()
    d_output = torch.randn(steps, rows, units)
    given = resident()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins here
    start = time.perf_counter()
    output = layer(x)[0]
    output.backward(d_output)
    seconds = time.perf_counter() - start
    assert x.grad is not None
    own = output.numel() * 4 + x.grad.numel() * 4
    return {"seconds": {"run": [seconds]}, "bytes": resident("VmHWM") - given - own}


def resident(field: str = "VmRSS") -> int:
    """The process's memory in bytes, now or (`VmHWM`) at most."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


# ---------------------------------------------------------------------------------------------------------------------
# Streams and dropout


def streams(spec: dict[str, Any], plan: Plan) -> dict[str, Any]:
    """A step of one row, H=64: our stream, the compiled part of it alone, torch's cell, and torch's layer at T=1."""
    units, times = 64, 50 if plan.quick else 2000
    kind = {"elman": torch.nn.RNNCell, "gru": torch.nn.GRUCell, "lstm": torch.nn.LSTMCell}[spec["cell"]]
    name = LAYERS[spec["cell"]]
    stream = getattr(tt.nn, name)(units, units).stream(1)
    cell, layer = kind(units, units), getattr(torch.nn, name)(units, units)
    x = torch.randn(1, units)
    zeros = torch.zeros(1, units)
    steps: Any = stream._steps

    def ours() -> None:
        for _ in range(times):
            stream.step(x)

    def kernel() -> None:
        call, address = steps.call.function, steps.addresses[steps.side][0]
        for _ in range(times):
            call(address)

    def theirs() -> None:
        with torch.inference_mode():
            state: Any = (zeros, zeros) if name == "LSTM" else zeros
            for _ in range(times):
                state = cell(x, state)

    def theirs_whole() -> None:
        with torch.inference_mode():
            state, x_t = None, x.unsqueeze(0)
            for _ in range(times):
                _, state = layer(x_t, state)

    calls = {"stream": ours, "kernel": kernel, "torch cell": theirs, "torch layer": theirs_whole}
    seconds = interleaved(calls, plan)
    return {"seconds": {name: [second / times for second in found] for name, found in seconds.items()}}


def dropout(spec: dict[str, Any], plan: Plan) -> dict[str, Any]:
    """Dropout between layers, T=100, B=32, H=256: our masks by counter, and torch's."""
    from throughtime.nn.dropout import drop, keys
    from throughtime.nn.layout import Layout

    x = torch.randn(plan.steps(100), 32, 256)
    layout = Layout(x.shape[0], 32)
    calls = {
        "throughtime": lambda: drop(x, 0.3, keys(None, layout, x.device), 1),
        "torch": lambda: torch.nn.functional.dropout(x, 0.3, training=True),
    }
    return {"seconds": interleaved(calls, plan), "numbers": x.numel()}


SECTIONS: dict[str, Callable[[dict[str, Any], Plan], dict[str, Any]]] = {
    "ragged": ragged,
    "shares": shares,
    "resets": resets,
    "episodes": episodes,
    "length": length,
    "memory": memory,
    "streams": streams,
    "dropout": dropout,
}


def main() -> None:
    """Measure the case that the argument names."""
    spec = json.loads(sys.argv[1])
    torch.set_num_threads(spec["threads"])
    plan = Plan(spec["quick"], 2 if spec["quick"] else spec["runs"], 0.0 if spec["quick"] else spec["seconds"])
    found = SECTIONS[spec["section"]](spec, plan)
    print(json.dumps({**found, "versions": {"torch": version("torch"), "throughtime": version("throughtime")}}))


if __name__ == "__main__":
    main()
