"""`memseq kernels`: which forms each operation has, and how fast they are on this machine.

What a TPU's compiler says of the TPU kernels is the work of `compile_table`.

A time alone says little, so each is shown beside two others from the same run: that of the
`reference` form, and a floor. For operations made of matrix products that is three times the
products of a forward pass (one for the forward, two for the backward pass) at the speed of one
large matrix product; for elementwise ones, what must be read and written (inputs and outputs
forward; inputs, cotangents and gradients backward) at the speed of one pass from a large array to a
new one. The rounds of all programs are interleaved, and of each the median counts.
"""

import argparse
import dataclasses
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib

from memseq.pallas_kernels.common.checks import check_choice
from memseq.pallas_kernels.common.chunks import CHUNK
from memseq.pallas_kernels.operations import DECAYS, OPERATIONS, Operation

MATMUL = 2048  # rows and columns of the product that the floor is measured with
PASS = 2**25  # numbers that the pass reads, and writes to a new array, as operations do
TARGETS = """\
Wanted of the chunked forms on a CPU at the default sizes: linear_attention within 5x of the floor,
delta_rule within 6x, each at least 4x faster than its reference; with --decay=channel within 10x
and 15x, diagonal_plus_low_rank within 15x; neural_memory within 3x with one head of 128;
mlstm within 6x; linear_scan within 4x at time 16384 with 4 heads of 64."""
KERNELS = {"tpu": "mosaic_tpu", "gpu": "mosaic_gpu"}


def main(args: argparse.Namespace) -> int:
    """Runs `memseq kernels` with the options that `memseq.cli` parsed; returns the exit status."""
    action = getattr(args, "action", None)
    if action == "compile":
        from memseq.pallas_kernels import compile_table  # it needs this module

        return compile_table.main(args)
    if action == "bench":
        bench(args)
    else:
        print(forms_table())
    return 0


def forms_table() -> str:
    """One line an operation: its forms, and the first line of what it says of itself."""
    rows = [("operation", "forms", "what it computes")]
    rows += [
        (name, ", ".join(op.forms.available), op.function.__doc__.partition("\n")[0])
        for name, op in OPERATIONS.items()
    ]
    return text_table(rows, left=3)


def bench(args: argparse.Namespace) -> None:
    """Times the operations that `args.operation` names ("all" for every one) and prints tables.

    Raises:
        ValueError: for an operation that does not exist, or a shape that none of them has.
    """
    check_choice("operation", args.operation, ["all", *OPERATIONS])
    check_choice("decay", args.decay, DECAYS)
    chosen = OPERATIONS if args.operation == "all" else {args.operation: OPERATIONS[args.operation]}
    if args.shape is not None:
        known = dict.fromkeys(name for op in chosen.values() for name in op.shapes.SHAPES)
        check_choice("shape", args.shape, known)
        chosen = {name: op for name, op in chosen.items() if args.shape in op.shapes.SHAPES}
    print(_machine())
    programs = {
        (name, form): Program.compiled(operation, form, args)
        for name, operation in chosen.items()
        for form in ("reference", "chunked", KERNELS.get(jax.default_backend()))
        if form in operation.forms.available
    }
    matmul = jax.jit(lambda a: jnp.matmul(a, a, precision=jax.lax.Precision.HIGHEST))
    matrix = jax.random.normal(jax.random.key(0), (MATMUL, MATMUL))
    one_pass, array = jax.jit(lambda a: a + 1), jnp.zeros(PASS)
    matmul_times, pass_times = [], []
    for _ in range(args.repeats):
        matmul_times.append(_seconds(matmul, matrix))
        pass_times.append(_seconds(one_pass, array))
        for program in programs.values():
            program.round()
    rate = MATMUL**3 / statistics.median(matmul_times)
    bandwidth = 2 * array.nbytes / statistics.median(pass_times)
    print(f"one {MATMUL} x {MATMUL} float32 matrix product: {2 * rate / 1e9:.0f} GFLOP/s")
    print(
        f"one pass from {PASS:,} float32 numbers to as many new ones: {bandwidth / 1e9:.1f} GB/s\n"
    )
    print(_times(chosen, programs, rate, bandwidth, args))
    if args.shape is None:
        print(f"{TARGETS}\n\n{_growth(chosen, args)}")


@dataclasses.dataclass
class Program:
    """One form compiled forward and forward + backward, its inputs and the seconds it took."""

    forward: Callable[..., Any]
    both: Callable[..., Any]
    inputs: dict[str, jax.Array]
    forward_times: list[float] = dataclasses.field(default_factory=list)
    both_times: list[float] = dataclasses.field(default_factory=list)

    @classmethod
    def compiled(cls, operation: Operation, form: str, args: argparse.Namespace) -> "Program":
        inputs, forward, both = _functions(operation, form, args)
        program = cls(jax.jit(forward), jax.jit(both), inputs)
        _seconds(program.forward, inputs)
        _seconds(program.both, inputs)
        return program

    def round(self) -> None:
        self.forward_times.append(_seconds(self.forward, self.inputs))
        self.both_times.append(_seconds(self.both, self.inputs))


def _functions(operation: Operation, form: str, args: argparse.Namespace):
    """Example inputs, the operation, and the gradients of a loss on all it returns."""
    example = operation.shapes.example(operation.sized(args), jax.random.key(0))
    inputs = {
        name: x
        for name, x in example.items()
        if any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(x))
    }
    options = {name: x for name, x in example.items() if name not in inputs}
    options |= operation.options(args)

    def forward(inputs):
        return operation.function(**inputs, **options, implementation=form)

    def loss(inputs):
        return sum((x * x).sum() for x in jax.tree.leaves(forward(inputs)))

    return inputs, forward, jax.value_and_grad(loss)


def _seconds(function, *arguments) -> float:
    """Seconds of a call right after another, which has its memory at hand."""
    jax.block_until_ready(function(*arguments))
    start = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    return time.perf_counter() - start


def _machine() -> str:
    device = jax.devices()[0]
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    lines = [
        f"jax {jax.__version__}, jaxlib {jaxlib.__version__}, backend {jax.default_backend()} "
        f"({device.device_kind}), {threads} CPU threads"
    ]
    if hasattr(os, "getloadavg") and (load := os.getloadavg()[0]) > threads / 2:
        lines.append(f"Other programs are running (load {load:.1f}): times vary, ratios less so.")
    return "\n".join(lines)


def _times(chosen, programs, rate, bandwidth, args) -> str:
    chunk = args.chunk_size or CHUNK
    header = ("operation", "form", "forward ms", "with backward ms", "of the floor", "of reference")
    rows = [header]
    for (name, form), program in programs.items():
        operation = chosen[name]
        forward, both = map(statistics.median, (program.forward_times, program.both_times))
        reference = statistics.median(programs[name, "reference"].both_times)
        if operation.products:
            products = operation.shapes.forward_products(operation.sized(args), chunk)
            floor = 3 * products / rate
        else:
            outputs = jax.eval_shape(program.forward, program.inputs)
            floor = (3 * _bytes(program.inputs) + 2 * _bytes(outputs)) / bandwidth
        faster = f"{reference / both:.1f}x faster"
        numbers = (f"{forward * 1e3:.1f}", f"{both * 1e3:.1f}", f"{both / floor:.1f}x", faster)
        rows.append((name, form, *numbers))
    sizes = (
        f"batch {args.batch}, time {args.time}, {args.heads} heads of {args.dim}, chunks of "
        f"{chunk}, decay {args.decay}"
    )
    title = (
        f"float32, {args.shape or sizes}; medians of {args.repeats}.\n"
        "Ratios are of forward with backward; the floor is three times the forward products, or,\n"
        "for elementwise operations, what must be read and written, at the speeds above."
    )
    return f"{title}\n\n{text_table(rows, left=2)}"


def _bytes(tree) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _growth(chosen, args) -> str:
    """Compilation and memory of the chunked forms at this time and at twice it."""
    rows = [("operation", "time", "compile CPU s", "temporary MiB", "arguments MiB")]
    for name, operation in chosen.items():
        for steps in (args.time, 2 * args.time):
            longer = argparse.Namespace(**vars(args) | {"time": steps})
            inputs, _, both = _functions(operation, "chunked", longer)
            start = time.process_time()
            compiled = jax.jit(both).lower(inputs).compile()
            spent = time.process_time() - start
            memory = compiled.memory_analysis()
            sizes = (memory.temp_size_in_bytes, memory.argument_size_in_bytes)
            mib = (f"{size / 2**20:.1f}" for size in sizes)
            rows.append((name, str(steps), f"{spent:.1f}", *mib))
    return f"The chunked form with its backward pass, as time grows:\n\n{text_table(rows, left=1)}"


def text_table(rows: list[tuple[str, ...]], left: int) -> str:
    """Columns of text; the first `left` are aligned left, the others right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = (
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
