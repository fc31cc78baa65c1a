"""What the TPU compiler says of a program: memory, loops, and the cycles of its schedule.

Two things are read. The optimised HLO text of a compiled program has one `tpu_custom_call` a Pallas
kernel, with the shapes it reads and writes and the vector memory (VMEM) it was given. And with the
flags of `dump_flags` libtpu leaves two files for each kernel:

    *-KERNEL-*-pre-delay_hlo-static-per-bundle-utilization.txt
        One line a cycle of the program as it is written: how many slots of each unit the cycle
        uses, also by what began earlier, such as a matrix product that is still streaming. Cycles
        in which everything waits are lines too; in the bundles as they are shipped they have become
        delay fields, so that counting those bundles gives too few.
    *-KERNEL-*-post-delay-converter.txt
        The same program by instruction, with its loops and their bounds, but without the cycles.

Instructions do not cross the borders of a loop, so the cycles of a loop are found by counting: the
stores, pops and scalar instructions before a border are as many in both files. A file that does
not add up is an error, never a guess.
"""

import bisect
import dataclasses
import itertools
import math
import re
from collections.abc import Iterator
from pathlib import Path

CYCLES = "pre-delay_hlo-static-per-bundle-utilization"
PROGRAM = "post-delay-converter"
# Instructions that take no slot of their own: joins of values, and checks that are left out.
UNCOUNTED = ("sphi", "shalt", "spop")
COMPARED = r"= scmp\.(?:ge|lt)\.s32\.totalorder (?:\(.*?\), )?%\w+, (\d+)"
UNKNOWN = 2**63 - 1  # the compiler's estimate of what it does not estimate
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2}
BYTES |= {"f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8, "u64": 8}


def dump_flags(folder: str) -> str:
    """Flags for LIBTPU_INIT_ARGS: writes into `folder` what `read_kernel` reads.

    The categories keep compilation at its usual speed; the bundles themselves (category "codegen")
    make it about eight times slower.
    """
    return (
        f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true "
        "--xla_jf_dump_category_filter=basic,utilization --xla_jf_dump_llo_pass_label_regex=delay"
    )


@dataclasses.dataclass(frozen=True)
class Call:
    """A kernel in a compiled program: its name, bytes of VMEM, and bytes it reads and writes."""

    name: str
    vmem: int
    bytes: int


@dataclasses.dataclass
class Loop:
    """A loop of a kernel.

    Attributes:
        trips: times it runs each time it is entered; None if that is not known ahead of time. A
            loop over the grid counts the grid's steps, without the two that fill and drain.
        cycles: of one trip, without the loops inside it.
        used: slots used in one trip by each unit, without the loops inside it.
        inner: the loops inside it.
    """

    trips: int | None
    cycles: int
    used: dict[str, int]
    inner: list["Loop"]

    def total(self) -> int:
        """Cycles of one trip, with the loops inside it; unknown trips count once."""
        return self.cycles + sum((x.trips or 1) * x.total() for x in self.inner)

    def walk(self, times: int = 1) -> Iterator[tuple["Loop", int]]:
        """This loop and all inside it, each with the times that it runs altogether."""
        times *= self.trips or 1
        yield self, times
        for loop in self.inner:
            yield from loop.walk(times)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """The schedule of a kernel on one core: `whole` is the program as a loop of one trip."""

    whole: Loop
    slots: dict[str, int]

    @property
    def cycles(self) -> int:
        """Cycles of the kernel: every branch taken, no wait for memory."""
        return self.whole.total()

    def main_loop(self) -> tuple[Loop, int]:
        """The innermost loop with the most cycles, and the times it runs altogether."""
        leaves = [(x, times) for x, times in self.whole.walk() if not x.inner]
        return max(leaves, key=lambda leaf: leaf[0].cycles * leaf[1])

    def shares(self, loop: Loop) -> dict[str, float]:
        """The share of each unit's slots that a trip of the loop uses."""
        return {unit: loop.used[unit] / (n * max(loop.cycles, 1)) for unit, n in self.slots.items()}

    def overhead(self) -> float | None:
        """The share of the cycles outside of innermost loops; None if the grid loop is innermost.

        What a step of the grid costs beside its work: addresses, transfers, first and last steps.
        """
        inside = sum(
            loop.cycles * times
            for outer in self.whole.inner
            for loop, times in outer.walk()
            if not loop.inner and loop is not outer
        )
        return 1 - inside / self.cycles if inside else None


def calls(hlo: str) -> list[Call]:
    """The Pallas kernels of an optimised HLO text."""
    found = []
    for line in hlo.splitlines():
        if 'custom_call_target="tpu_custom_call"' not in line:
            continue
        name, result = re.match(r"\s*(?:ROOT )?%([\w.\-]+) = (.*?) custom-call\(", line).groups()
        operands = re.search(r"operand_layout_constraints=\{((?:[^{}]|\{[^{}]*\})*)\}", line)
        vmem = re.search(
            r'"used_scoped_memory_configs":\[\{"memory_space":"1","offset":"\d+","size":"(\d+)"',
            line,
        )
        size = _bytes(result) + _bytes(operands[1] if operands else "")
        found.append(Call(name, int(vmem[1]) if vmem else 0, size))
    return found


def cycles_outside(hlo: str) -> int:
    """XLA's own estimates of what is beside the kernels, where it has any; loop bodies once."""
    estimates = map(int, re.findall(r'"estimated_cycles":"(\d+)"', hlo))
    return sum(x for x in estimates if x != UNKNOWN)


def _bytes(shapes: str) -> int:
    return sum(
        math.prod(map(int, filter(None, dims.split(",")))) * BYTES[dtype]
        for dtype, dims in re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", shapes)
        if dtype in BYTES
    )


def read_kernel(folder: str | Path, name: str) -> Kernel:
    """Reads what libtpu left of a kernel.

    Raises:
        ValueError: if a file is missing or the two do not agree.
    """
    return parse(_file(folder, name, PROGRAM), _file(folder, name, CYCLES))


def _file(folder: str | Path, name: str, kind: str) -> str:
    files = [
        file
        for file in Path(folder).iterdir()
        if re.fullmatch(rf"\d+-{re.escape(name)}-\d+-{kind}\.txt", file.name)
    ]
    if len(files) != 1:
        raise ValueError(
            f"dump of {name}: expected one file {kind}, found {len(files)}; does this libtpu write "
            "its schedule otherwise?"
        )
    return files[0].read_text()


def parse(program: str, cycles: str) -> Kernel:
    """The loops of a kernel with their cycles, from the texts of its two files.

    Raises:
        ValueError: if the texts are not what is expected, or do not agree.
    """
    slots, rows = _rows(cycles)
    whole = _borders(program)
    # A unit is taken to find borders by if the two files count it alike from end to end, to one in
    # fifty: one file has an instruction or two more, for two cores (v5p) or long loops.
    sums = {unit: [0, *itertools.accumulate(row[unit] for row in rows)] for unit in slots}
    units = [
        unit
        for unit in COUNTED
        if unit in sums and abs(sums[unit][-1] - whole.end[unit]) <= whole.end[unit] / 50
    ]
    if "SALU" not in units and "VSTORE" not in units:
        raise ValueError(
            "schedule: its two files do not agree on the instructions: "
            + ", ".join(f"{sums.get(u, [0])[-1]} and {whole.end[u]} {u}" for u in COUNTED)
        )
    return Kernel(_measured(whole, range(len(rows)), units, sums, rows), slots)


@dataclasses.dataclass
class _Border:
    """A loop as the instructions show it: counts of instructions before it and up to its end."""

    trips: int | None
    start: dict[str, int]
    end: dict[str, int]
    inner: list["_Border"]
    compared: set[int]  # numbers that something in its own body is compared with


COUNTED = {
    "VSTORE": lambda op: op.startswith("vst"),
    "VPOP": lambda op: op.startswith("vpop"),
    "SALU": lambda op: op.startswith(("s", "p", "dma")) and not op.startswith(UNCOUNTED),
}


def _rows(text: str) -> tuple[dict[str, int], list[dict[str, int]]]:
    """Slots a cycle of each unit, and the slots that each cycle uses."""
    match text.splitlines():
        case [_, units, capacity, title, *lines] if "UTILIZATION" in title:
            names = [unit.strip() for unit in units.split(",")]
            names = ["MATMUL" if unit == "MXU" else unit for unit in names]  # libtpu 0.0.50
            slots = dict(zip(names, map(int, capacity.split()), strict=True))
            rows = [dict(zip(names, map(int, line.split()), strict=True)) for line in lines if line]
            return slots, rows
    raise ValueError(f"schedule: expected units, their slots and a line a cycle, got {text[:80]!r}")


def _borders(program: str) -> _Border:
    counts = dict.fromkeys(COUNTED, 0)
    stack = [_Border(1, dict(counts), {}, [], set())]
    trips = None
    for line in program.splitlines():
        if bounds := re.match(r"\s*loop: start=(-?\d+), step=(\d+), limit=(-?\d+)", line):
            start, step, limit = map(int, bounds.groups())
            trips = -(-(limit - start) // step)
        elif line.endswith("// loop_body"):
            stack.append(_Border(trips, dict(counts), {}, [], set()))
            trips = None
        elif line.endswith("// loop_exit"):
            loop = stack.pop()
            loop.end = dict(counts)
            if loop.trips and len(stack) == 1 and loop.trips - 2 in loop.compared:
                loop.trips -= 2  # Pallas's loop over the grid: two more to fill and to drain
            stack[-1].inner.append(loop)
        elif instruction := re.match(r"\s*%\w+ = ([\w.]+)", line):
            for unit, is_one in COUNTED.items():
                counts[unit] += is_one(instruction[1])
            if number := re.search(COMPARED, line):
                stack[-1].compared.add(int(number[1]))
    if len(stack) != 1:
        raise ValueError("schedule: a loop has no end")
    stack[0].end = counts
    return stack[0]


def _measured(border: _Border, span: range, units, sums, rows) -> Loop:
    """The loop whose rows are `span`; those of a loop begin once all before it has been issued."""

    def row(counts):
        found = max(bisect.bisect_left(sums[unit], counts[unit]) for unit in units)
        return min(max(found, span.start), span.stop)

    spans = [range(row(x.start), row(x.end)) for x in border.inner]
    inner = [_measured(x, y, units, sums, rows) for x, y in zip(border.inner, spans, strict=True)]
    own = [rows[i] for i in span if not any(i in x for x in spans)]
    return Loop(border.trips, len(own), {u: sum(r[u] for r in own) for u in sums}, inner)
