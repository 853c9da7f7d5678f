"""The peers at their best settings, and the process that measures one of them on one shape.

    python benchmarks/peers.py '{"peer": "torch", "shape": "100,32,64,128", ...}'

`speed.py` starts it. Every peer computes the same numbers: throughtime's are kept for a shape, and what another peer
computes is held against them before it is timed.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from problems import READ_OUT, Array, Numbers, Shape, numbers

OUTPUT_TOLERANCE = 1e-4
"""The largest difference of an output that counts as the same result."""

GRADIENT_TOLERANCE = 1e-3
"""The same for a gradient, relative to its largest number: it sums over all steps and rows."""

MOST_RUNS = 200
Values = dict[str, Array]


class Job(NamedTuple):
    """Something to time, and the numbers in what it returned; none for a whole step, whose weights move."""

    call: Callable[[], Any]
    values: Callable[[Any], Values]


# ---------------------------------------------------------------------------------------------------------------------
# torch.nn and throughtime.nn: modules, timed by the same code


def torch_jobs(cell: str, shape: Shape, threads: int, library: str = "torch") -> dict[str, Job]:
    """torch.nn's layer; for the reset-before GRU, which it lacks, a loop over its operations."""
    import torch

    torch.set_num_threads(threads)
    given = numbers(cell, shape)
    layer = _layer(cell, shape, library)
    with torch.no_grad():
        for name, value in given.weights.items():
            getattr(layer, name).copy_(torch.from_numpy(value))
    x = torch.from_numpy(given.x)
    return {
        "inference": _torch_inference(layer, x),
        "training": _torch_training(layer, x, torch.from_numpy(given.d_output)),
        "step": _torch_step(layer, x),
    }


def throughtime_jobs(cell: str, shape: Shape, threads: int) -> dict[str, Job]:
    """throughtime's public layers."""
    return torch_jobs(cell, shape, threads, "throughtime")


def _layer(cell: str, shape: Shape, library: str) -> Any:
    import torch

    names = {"elman": "RNN", "gru": "GRU", "lstm": "LSTM"}
    if library == "torch":
        return getattr(torch.nn, names[cell])(shape.I, shape.H) if cell in names else _reset_before_loop(shape)
    import throughtime as tt

    if cell in names:
        return getattr(tt.nn, names[cell])(shape.I, shape.H)
    return tt.nn.Recurrent(tt.GRUResetBefore, shape.I, shape.H)


def _reset_before_loop(shape: Shape) -> Any:
    """A module: the input product of all steps at once, then as few torch operations per step as there can be."""
    import torch
    from torch import Tensor
    from torch.nn import Parameter, functional

    class ResetBefore(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight_ih_l0 = Parameter(torch.empty(3 * shape.H, shape.I))
            self.weight_hh_l0 = Parameter(torch.empty(3 * shape.H, shape.H))
            self.bias_ih_l0 = Parameter(torch.empty(3 * shape.H))
            self.bias_hh_l0 = Parameter(torch.empty(3 * shape.H))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            inputs = functional.linear(x, self.weight_ih_l0, self.bias_ih_l0 + self.bias_hh_l0)
            gates, candidates = inputs.split([2 * shape.H, shape.H], -1)
            U_gates, U_candidate = (part.t() for part in self.weight_hh_l0.split([2 * shape.H, shape.H]))
            h = x.new_zeros(x.shape[1], shape.H)
            outputs = []
            for gate, candidate in zip(gates.unbind(), candidates.unbind(), strict=True):
                r, z = torch.addmm(gate, h, U_gates).sigmoid().chunk(2, -1)
                n = torch.addmm(candidate, r * h, U_candidate).tanh()
                h = torch.lerp(n, h, z)
                outputs.append(h)
            return torch.stack(outputs), h

    return ResetBefore()


def _torch_inference(layer: Any, x: Any) -> Job:
    import torch

    def call() -> Any:
        with torch.inference_mode():
            return layer(x)[0]

    return Job(call, lambda output: {"output": output.numpy()})


def _torch_training(layer: Any, x: Any, d_output: Any) -> Job:
    x = x.clone().requires_grad_()

    def call() -> Any:
        x.grad = None
        layer.zero_grad()
        output = layer(x)[0]
        output.backward(d_output)
        return output

    def values(output: Any) -> Values:
        gradients = {name: weight.grad.numpy().copy() for name, weight in layer.named_parameters()}
        return {"output": output.detach().numpy(), "x": x.grad.numpy(), **gradients}

    return Job(call, values)


def _torch_step(layer: Any, x: Any) -> Job:
    import copy

    import torch
    from torch.nn import functional

    torch.manual_seed(0)
    layer = copy.deepcopy(layer)  # the weights move, and the other jobs need theirs
    read_out = torch.nn.Linear(layer.weight_hh_l0.shape[1], READ_OUT)
    target = torch.randn(*x.shape[:2], READ_OUT)
    optimizer = torch.optim.Adam([*layer.parameters(), *read_out.parameters()], fused=True)

    def call() -> None:
        optimizer.zero_grad()
        functional.mse_loss(read_out(layer(x)[0]), target).backward()
        optimizer.step()

    return Job(call, lambda _: {})


# ---------------------------------------------------------------------------------------------------------------------
# ONNX Runtime


class Operator(NamedTuple):
    """ONNX's name of a cell, torch's gates in ONNX's order, and its attributes."""

    name: str
    gates: tuple[int, ...]
    attributes: Mapping[str, Any]


OPERATORS = {
    "elman": Operator("RNN", (0,), {}),
    "gru": Operator("GRU", (1, 0, 2), {"linear_before_reset": 1}),
    "gru-reset-before": Operator("GRU", (1, 0, 2), {"linear_before_reset": 0}),
    "lstm": Operator("LSTM", (0, 3, 1, 2), {}),
}


def onnxruntime_jobs(cell: str, shape: Shape, threads: int) -> dict[str, Job]:
    """ONNX Runtime's own recurrent operators, all graph optimisations on."""
    import onnxruntime

    given = numbers(cell, shape)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    model = _onnx_model(OPERATORS[cell], given, shape)
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return {"inference": Job(lambda: session.run(None, {"x": given.x})[0], lambda y: {"output": y[:, 0]})}


def _onnx_model(operator: Operator, given: Numbers, shape: Shape) -> bytes:
    from onnx import TensorProto, helper, numpy_helper

    def reordered(name: str) -> Array:
        gates = given.weights[name].reshape(len(operator.gates), shape.H, -1)
        return gates[list(operator.gates)].reshape(1, len(operator.gates) * shape.H, -1)

    biases = [reordered(name)[..., 0] for name in ("bias_ih_l0", "bias_hh_l0")]
    constants = {
        "W": reordered("weight_ih_l0"),
        "R": reordered("weight_hh_l0"),
        "B": np.concatenate(biases, axis=1),
    }
    node = helper.make_node(operator.name, ["x", "W", "R", "B"], ["y"], hidden_size=shape.H, **operator.attributes)
    graph = helper.make_graph(
        [node],
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [shape.T, shape.B, shape.I])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [shape.T, 1, shape.B, shape.H])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    serialised: bytes = model.SerializeToString()
    return serialised


# ---------------------------------------------------------------------------------------------------------------------
# JAX


def jax_jobs(cell: str, shape: Shape, threads: int) -> dict[str, Job]:
    """`lax.scan` under jit, the input product of all steps before it. Its threads are the cores that it may use.

    Unrolling the scan, or transposing the weights before it, gained nothing.
    """
    import jax
    import jax.numpy as jnp

    given = numbers(cell, shape)
    names = list(given.weights)
    weights = tuple(jnp.asarray(given.weights[name]) for name in names)
    x, d_output = jnp.asarray(given.x), jnp.asarray(given.d_output)
    layer = _jax_layer(cell, shape)

    def gradients(x: Any, weights: Any, d_output: Any) -> Any:
        output, backward = jax.vjp(layer, x, weights)
        return output, backward(d_output)

    infer, train = jax.jit(layer), jax.jit(gradients)

    def values(result: Any) -> Values:
        output, (d_x, d_weights) = result
        found = {"output": output, "x": d_x, **dict(zip(names, d_weights, strict=True))}
        return {name: np.asarray(value) for name, value in found.items()}

    return {
        "inference": Job(
            lambda: jax.block_until_ready(infer(x, weights)), lambda output: {"output": np.asarray(output)}
        ),
        "training": Job(lambda: jax.block_until_ready(train(x, weights, d_output)), values),
    }


def _jax_layer(cell: str, shape: Shape) -> Callable[[Any, Any], Any]:
    """(x [T, B, I], weights) to the outputs [T, B, H]."""
    import jax
    import jax.numpy as jnp
    from jax.nn import sigmoid

    H = shape.H

    def elman(U: Any, c: Any, h: Any, g: Any) -> Any:
        h = jnp.tanh(g + h @ U.T + c)
        return h, h

    def gru(U: Any, c: Any, h: Any, g: Any) -> Any:
        s = h @ U.T + c
        r, z = jnp.split(sigmoid(g[:, : 2 * H] + s[:, : 2 * H]), 2, axis=1)
        n = jnp.tanh(g[:, 2 * H :] + r * s[:, 2 * H :])
        h = n + z * (h - n)
        return h, h

    def gru_reset_before(U: Any, c: Any, h: Any, g: Any) -> Any:
        g = g + c
        r, z = jnp.split(sigmoid(g[:, : 2 * H] + h @ U[: 2 * H].T), 2, axis=1)
        n = jnp.tanh(g[:, 2 * H :] + (r * h) @ U[2 * H :].T)
        h = n + z * (h - n)
        return h, h

    def lstm(U: Any, d: Any, state: Any, v: Any) -> Any:
        h, c = state
        i, f, g, o = jnp.split(v + h @ U.T + d, 4, axis=1)
        c = sigmoid(f) * c + sigmoid(i) * jnp.tanh(g)
        h = sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    step = {"elman": elman, "gru": gru, "gru-reset-before": gru_reset_before, "lstm": lstm}[cell]

    def layer(x: Any, weights: Any) -> Any:
        W, U, b, c = weights
        zeros = jnp.zeros((shape.B, H))
        start = (zeros, zeros) if cell == "lstm" else zeros
        return jax.lax.scan(lambda state, g: step(U, c, state, g), start, x @ W.T + b)[1]

    return layer


# ---------------------------------------------------------------------------------------------------------------------
# One peer on one shape

PEERS: dict[str, Callable[[str, Shape, int], dict[str, Job]]] = {
    "throughtime": throughtime_jobs,
    "torch": torch_jobs,
    "onnxruntime": onnxruntime_jobs,
    "jax": jax_jobs,
}
PACKAGES = {"throughtime": ("throughtime", "torch", "llvmlite"), "jax": ("jax", "jaxlib")}


def measure(spec: Mapping[str, Any]) -> dict[str, Any]:
    """The seconds of every run, by cell and mode, and the versions of what ran."""
    peer, shape = spec["peer"], Shape.parse(spec["shape"])
    stay_on(spec["threads"])
    seconds: dict[str, dict[str, list[float]]] = {}
    for cell in spec["cells"]:
        jobs = PEERS[peer](cell, shape, spec["threads"])
        kept = Path(spec["folder"]) / f"{cell}-{shape}.npz"
        for mode, job in jobs.items():
            found = job.values(job.call())
            if peer == "throughtime" and mode == "training" and not kept.exists():
                np.savez(kept, **found)  # type: ignore[arg-type]  # its other keyword is a bool
            elif peer != "throughtime":
                compare(found, kept, f"{peer}, {cell}, {shape}, {mode}")
            seconds.setdefault(cell, {})[mode] = timed(job.call, spec["runs"], spec["seconds"])
    return {"seconds": seconds, "versions": {name: version(name) for name in PACKAGES.get(peer, (peer,))}}


def stay_on(threads: int) -> None:
    """Keep the process to as many cores as it may have threads: not every peer can be told in another way."""
    if hasattr(os, "sched_setaffinity"):
        allowed = sorted(os.sched_getaffinity(0))
        if len(allowed) < threads:
            raise SystemExit(f"{threads} threads are asked for, and the process may use {len(allowed)} cores")
        os.sched_setaffinity(0, allowed[:threads])


def compare(found: Values, kept: Path, what: str) -> None:
    """Raise SystemExit unless the numbers are throughtime's: what computes something else is no peer."""
    with np.load(kept, allow_pickle=False) as ours:
        for name, value in found.items():
            scale = 1.0 if name == "output" else float(np.abs(ours[name]).max())
            limit = scale * (OUTPUT_TOLERANCE if name == "output" else GRADIENT_TOLERANCE)
            difference = float(np.abs(value - ours[name]).max())
            if not difference <= limit:
                raise SystemExit(
                    f"{what}: {name} differs from throughtime's by {difference:.2e}, more than {limit:.2e}"
                )


def timed(call: Callable[[], Any], runs: int, seconds: float) -> list[float]:
    """The seconds of at least `runs` calls, and of more until they have taken `seconds` together."""
    call()
    gc.collect()
    gc.disable()
    found: list[float] = []
    while len(found) < runs or (sum(found) < seconds and len(found) < MOST_RUNS):
        begin = time.perf_counter()
        call()
        found.append(time.perf_counter() - begin)
    gc.enable()
    return found


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1]))))
