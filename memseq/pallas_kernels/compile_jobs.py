"""Compiles TPU kernels of the operations ahead of time, in a process beside the caller's.

libtpu reads its flags once, and a compiler that fails its own checks ends its process: so one
process compiles row after row, and after one that ended it the next row gets a new one.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from memseq.pallas_kernels import aot, static_report
from memseq.pallas_kernels.operations import OPERATIONS, Operation

# float32
GATES = ("log_decay", "value_log_decay", "beta", "dt", "A", "D", "step", "log_keep", "momentum")
GATES += ("initial",)
LAB = argparse.Namespace(decay="step", batch=1, time=2048, heads=16, dim=128)
CHUNK = 64  # of the products that are counted; kernels choose their own


@dataclasses.dataclass(frozen=True)
class Chip:
    """One JAX device: bfloat16 FLOP/s and HBM bytes/s of all its cores, and Hz."""

    flops: float
    bandwidth: float
    clock: float


CHIPS = {
    "v5e": Chip(197e12, 0.82e12, 1.50e9),
    "v5p": Chip(459e12, 2.46e12, 1.75e9),
    "v6e": Chip(918e12, 1.64e12, 1.75e9),
    "tpu7x": Chip(1154e12, 3.7e12, 2.2e9),
}


@dataclasses.dataclass(frozen=True)
class Job:
    """What one row compiles."""

    operation: str
    shape: str
    decay: str | None
    dtype: str
    direction: str
    target: str

    @property
    def label(self) -> str:
        return " ".join(filter(None, dataclasses.astuple(self)))


def sized(operation: Operation, size: str, decay: str | None):
    """The named shape, or the standard one with this decay."""
    if size != "lab":
        return operation.shapes.SHAPES[size]
    shape = operation.shape(LAB)
    return shape._replace(decay=decay) if hasattr(shape, "decay") else shape


def arguments(operation: Operation, shape, dtype: str) -> tuple[dict, dict[str, Any]]:
    """The operation's arguments as shapes, gates in float32 and the rest in dtype; its options."""
    options = {}

    def arrays():
        example = operation.shapes.example(shape, jax.random.key(0))
        found = {k: x for k, x in example.items() if jax.tree.all(jax.tree.map(_is_array, x))}
        options.update({k: x for k, x in example.items() if k not in found})
        return found

    def spec(name, x):
        return jax.ShapeDtypeStruct(x.shape, jnp.float32 if name in GATES else dtype)

    specs = {
        name: jax.tree.map(lambda x, name=name: spec(name, x), tree)
        for name, tree in jax.eval_shape(arrays).items()
    }
    return specs, options


def _is_array(x) -> bool:
    return isinstance(x, jax.Array)


def program(job: Job) -> tuple[Callable, tuple]:
    """What a row compiles: a function that calls the kernels, and its arguments as shapes.

    Raises:
        ValueError: the kernels cannot run at these sizes.
    """
    operation = OPERATIONS[job.operation]
    shape = sized(operation, job.shape, job.decay)
    specs, options = arguments(operation, shape, job.dtype)

    def forward(arrays):
        outputs = operation.function(**arrays, **options, implementation="mosaic_tpu")
        return [x for x in jax.tree.leaves(outputs) if jnp.issubdtype(x.dtype, jnp.inexact)]

    def backward(arrays, cotangents):
        return jax.vjp(forward, arrays)[1](cotangents)  # of the forward pass nothing is left

    outputs = jax.eval_shape(forward, specs)
    return (forward, (specs,)) if job.direction == "forward" else (backward, (specs, outputs))


def compile_job(job: Job, folder: str) -> dict[str, Any]:
    """Compiles one row in this process; libtpu writes its schedule into `folder`."""
    operation = OPERATIONS[job.operation]
    shape = sized(operation, job.shape, job.decay)
    row = {"job": dataclasses.asdict(job), "shape": str(shape), "compiles": False, "limit": False}
    try:
        function, specs = program(job)
        compiled = aot.compile_for(job.target, function, *specs)
    except Exception as error:  # whatever the compiler says, it is the answer
        text = f"{type(error).__name__}: {str(error).strip()}"
        return row | {"error": text.splitlines()[0], "limit": " cannot run: " in text}
    products = 0
    if operation.products:
        products = operation.shapes.forward_products(shape, CHUNK)
    flops = 2 * products * (1 if job.direction == "forward" else 2)
    row["compiles"] = True
    try:
        return row | report(compiled.as_text(), folder, flops, CHIPS[job.target])
    except ValueError as error:
        return row | {"error": f"compiled, but its schedule was not read: {error}"}


def report(hlo: str, folder: str, flops: int, chip: Chip) -> dict[str, Any]:
    """The numbers of a compiled program."""
    calls = static_report.calls(hlo)
    if not calls:
        raise ValueError("the compiled program has no Pallas kernel")
    kernels = {call.name: static_report.read_kernel(folder, call.name) for call in calls}
    cycles = sum(kernel.cycles for kernel in kernels.values())
    moved = sum(call.bytes for call in calls)
    seconds = {
        "matrix unit": flops / chip.flops,
        "HBM": moved / chip.bandwidth,
        "schedule": cycles / chip.clock,
    }
    main = max(kernels, key=lambda name: _work(*kernels[name].main_loop()))
    loop, times = kernels[main].main_loop()
    shares = kernels[main].shares(loop)
    inside = [kernel.overhead() for kernel in kernels.values()]
    return {
        "vmem_bytes": max(call.vmem for call in calls),
        "cycles_per_core": cycles,
        "cycles_of_xla": static_report.cycles_outside(hlo),
        "kernels": {name: kernel.cycles for name, kernel in kernels.items()},
        "loop": {"kernel": main, "cycles": loop.cycles, "trips": times, "shares": shares},
        "trips_unknown": any(
            loop.trips is None for kernel in kernels.values() for loop, _ in kernel.whole.walk()
        ),
        "overhead": None
        if None in inside
        else sum(x * k.cycles for x, k in zip(inside, kernels.values(), strict=True)) / cycles,
        "flops": flops,
        "hbm_bytes": moved,
        "microseconds": {name: 1e6 * x for name, x in seconds.items()},
        "bound": max(seconds, key=seconds.get),
    }


def _work(loop: static_report.Loop, times: int) -> int:
    return loop.cycles * times


def compiled(wanted: Iterable[Job]) -> Iterator[dict[str, Any]]:
    """The row of each job, from a process beside this one; a process that dies is a failed row."""
    process = None
    with tempfile.TemporaryDirectory(prefix="memseq-kernels-") as folder:
        try:
            for job in wanted:
                process = process or _start(folder)
                with contextlib.suppress(BrokenPipeError):  # it has died: there is no answer
                    process.stdin.write(json.dumps(dataclasses.asdict(job)) + "\n")
                    process.stdin.flush()
                if answer := process.stdout.readline():
                    yield json.loads(answer)
                    continue
                row = {"job": dataclasses.asdict(job), "compiles": False, "limit": False}
                yield row | {"error": f"the compiler's process {_end(process, folder)}"}
                process = None
        finally:
            if process is not None:
                with process:
                    process.stdin.close()


def _end(process: subprocess.Popen, folder: str) -> str:
    """How a process ended, and the line that says why."""
    with contextlib.suppress(BrokenPipeError), process:
        pass
    status = process.wait()
    how = f"status {status}" if status >= 0 else signal.Signals(-status).name
    lines = Path(folder, "errors").read_text(errors="replace").strip().splitlines()
    fatal = [x for x in lines if re.match(r"F\d{4} |\w*Error\b", x)]
    return f"ended with {how}: {(fatal or lines or ['it said nothing'])[0]}"


def _start(folder: str) -> subprocess.Popen:
    flags = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {static_report.dump_flags(folder)}"
    with Path(folder, "errors").open("w") as errors:
        return subprocess.Popen(
            [sys.executable, "-m", "memseq.pallas_kernels.compile_jobs", folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=os.environ | {"JAX_PLATFORMS": "cpu", "LIBTPU_INIT_ARGS": flags.strip()},
        )


def serve(folder: str) -> None:
    """Reads jobs from standard input, a JSON line each, and answers each with its row."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    for line in sys.stdin:
        row = compile_job(Job(**json.loads(line)), folder)
        for file in Path(folder).glob("*.*"):  # or the next kernel of this name is not found
            file.unlink()
        print(json.dumps(row), file=answers, flush=True)


if __name__ == "__main__":
    serve(sys.argv[1])
