"""`memseq kernels compile`: what the TPU compiler says of every kernel, a row each.

A row is one operation, shape, direction and target; `compile_jobs` compiles it.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from memseq.pallas_kernels import aot
from memseq.pallas_kernels.bench import text_table
from memseq.pallas_kernels.common.checks import check_choice
from memseq.pallas_kernels.compile_jobs import LAB, Job, arguments, compiled, sized
from memseq.pallas_kernels.operations import OPERATIONS, Operation

DECAYS = (None, "step", "channel")
DIRECTIONS = ("forward", "backward")
LEGEND = """\
Nothing was run. Cycles are the compiler's schedule of one core: a lower bound but for branches,
which all count as taken; waits for memory come on top. XLA kcycles: the compiler's estimate of
what is beside the kernels (layouts, sums of gates), not part of the other numbers.
loop     innermost loop with most cycles: cycles of a trip x trips of all grid steps of a core;
         matrix: share of them in which the matrix units stream; busiest: the unit with the largest
         share of its issue slots used
grid     share of the cycles that is not in such loops: what the steps of the grid cost
MiB      VMEM: of the kernel that needs most; HBM: arguments and results of the kernels
GFLOP    useful products, counted with chunks of 64 (backward: twice the forward ones)
us       at the chip's bfloat16 peak, at its HBM's speed, and of the schedule; bound: the largest"""


def main(args: argparse.Namespace) -> int:
    """Compiles what the options ask for and prints the table; 1 if something does not compile.

    Raises:
        ValueError: for an unknown name, or if libtpu is missing.
    """
    wanted = jobs(args.operation, args.target, args.shape, args.dtype)
    aot.require_libtpu()
    rows = []
    save = Path(args.json).write_text if args.json else lambda text: None
    save("[]\n")  # a file that cannot be written is better known now than after minutes
    for row in compiled(wanted):
        rows.append(row)
        save(json.dumps(rows, indent=1) + "\n")
        state = row.get("error", "compiled")
        label = f"{len(rows)}/{len(wanted)} {Job(**row['job']).label}"
        print(f"{label}: {state}", file=sys.stderr, flush=True)
    print(table(rows))
    return int(any("error" in row and not row["limit"] for row in rows))


def jobs(operation: str, target: str, shape: str, dtype: str) -> list[Job]:
    """The rows that the options name; "all" stands for every one, "named" for all but "lab"."""
    kernels = [name for name, op in OPERATIONS.items() if op.forms.mosaic_tpu is not None]
    check_choice("operation", operation, ["all", *kernels])
    check_choice("target", target, ["all", *aot.TARGETS])
    check_choice("dtype", dtype, ("bfloat16", "float32"))
    chosen = kernels if operation == "all" else [operation]
    known = ["lab", *dict.fromkeys(s for name in chosen for s in OPERATIONS[name].shapes.SHAPES)]
    check_choice("shape", shape, ["all", "named", *known])
    sizes = {"all": known, "named": known[1:]}.get(shape, [shape])
    return [
        Job(name, size, decay, dtype, direction, chip)
        for name in chosen
        for size in sizes
        if size == "lab" or size in OPERATIONS[name].shapes.SHAPES
        for decay in _decays(OPERATIONS[name], size)
        for direction in DIRECTIONS
        for chip in (aot.TARGETS if target == "all" else [target])
    ]


def _decays(operation: Operation, size: str) -> list[str | None]:
    """The kinds of decay that make a difference at the standard shape, or the shape's own."""
    shape = operation.shape(LAB) if size == "lab" else operation.shapes.SHAPES[size]
    if not hasattr(shape, "decay"):
        return [None]
    if size != "lab":
        return [shape.decay]
    found = {}
    for decay in DECAYS:
        specs, _ = arguments(operation, sized(operation, size, decay), "float32")
        found.setdefault(str(specs), decay)
    return list(found.values()) if len(found) > 1 else [shape.decay]


def table(rows: list[dict[str, Any]]) -> str:
    """The rows, below them what was said of those without numbers, and the legend."""
    header = ("operation", "shape", "decay", "direction", "target", "compiles", "VMEM MiB")
    header += ("kcycles", "XLA kcycles", "loop", "matrix", "busiest", "grid", "GFLOP", "HBM MiB")
    header += ("matrix us", "HBM us", "schedule us", "bound")
    lines = [header]
    failed = []
    for row in rows:
        job = row["job"]
        name = (job["operation"], job["shape"], job["decay"] or "-", job["direction"])
        name += (job["target"],)
        if "error" in row:
            compiles = "yes" if row["compiles"] else "limit" if row["limit"] else "NO"
            lines.append((*name, compiles, *["?"] * 13))
            failed.append(f"{' '.join(name)}: {row['error']}")
            continue
        loop, us = row["loop"], row["microseconds"]
        units = {k: v for k, v in loop["shares"].items() if ":" not in k}
        busiest = max(units, key=units.get)
        trips = f"{loop['trips']}{'?' if row['trips_unknown'] else ''}"
        lines.append(
            name
            + ("yes", _number(row["vmem_bytes"] / 2**20), _number(row["cycles_per_core"] / 1e3))
            + (_number(row["cycles_of_xla"] / 1e3), f"{loop['cycles']} x {trips}")
            + (f"{units['MATMUL']:.0%}", f"{busiest} {units[busiest]:.0%}")
            + ("-" if row["overhead"] is None else f"{row['overhead']:.0%}",)
            + (_number(row["flops"] / 1e9) if row["flops"] else "-",)
            + (_number(row["hbm_bytes"] / 2**20),)
            + tuple(_number(us[x]) if us[x] else "-" for x in ("matrix unit", "HBM", "schedule"))
            + (row["bound"],)
        )
    parts = [text_table(lines, left=6)]
    if failed:
        parts.append("\n".join(failed))
    return "\n\n".join([*parts, LEGEND])


def _number(x: float) -> str:
    return f"{x:.1f}" if x < 100 else f"{x:.0f}"
