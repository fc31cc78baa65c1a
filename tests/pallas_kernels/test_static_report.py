"""`memseq kernels compile`: how the compiler's files are read, and what becomes of failures."""

import argparse
import itertools
import json
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.sharding import NamedSharding, PartitionSpec

from memseq import cli
from memseq.pallas_kernels import aot, bench, compile_jobs, compile_table, static_report
from memseq.pallas_kernels.common.dispatch import Forms, KernelForm
from memseq.pallas_kernels.common.dispatch import run as dispatch

# A kernel of 2 x 2 grid steps with 3 chunks each, in the form of libtpu's post-delay-converter.
PROGRAM = """\
$region0: #{toy.1}
  #allocation3 [shape = 'f32[4,128,128]', space=vmem, size = 0x40000, tag = 'scratch operand']
  %s1_s0 = inlined_call_operand.vmem [shape: bf16[16,2048,128], index: 0, kind: input]
  %s2_s1 = smov.u32 0
  $region1: #{toy.1} parent=0
    loop: start=0, step=1, limit=6
    $region2: #{toy.1} parent=1 // loop_pre_header
      _
    $region3: #{toy.1} parent=1 // loop_body
      %s4_s9 = sphi %s2_s1, %s9_s9
      %p5_p0 = scmp.ge.s32.totalorder %s4_s9, 4
      $region4: #{toy.1} parent=3 // pred_region
        %v6_v0 = vld [vmem:[%s1_s0] sm:$0xff]
        %7 = vst [vmem:[#allocation3] sm:$0xff] /*vst_source=*/%v6_v0
      loop: start=0, step=1, limit=3
      $region5: #{toy.1} parent=3 // loop_pre_header
        %s8_s2 = smov.u32 0
      $region6: #{toy.1} parent=3 // loop_body
        %v9_v1 = vld [vmem:[#allocation3] sm:$0xff]
        %10 = vmatmul.bf16.gmra.mxu0 %v9_v1
        %v11_v2 = vpop.f32.mrf.mxu0
        %12 = vst [vmem:[#allocation3] sm:$0xff] /*vst_source=*/%v11_v2
      $region7: #{toy.1} parent=3 // loop_header
        %p13_p1 = scmp.ge.s32.totalorder %s8_s2, 3 /* loop exit test */
        %14 = sbr.rel (!%p13_p1) target = $region6
      $region8: #{toy.1} parent=3 // loop_exit
        _
    $region9: #{toy.1} parent=1 // loop_header
      %p15_p4 = scmp.ge.s32.totalorder %s4_s9, 6 /* loop exit test */
      %16 = sbr.rel (!%p15_p4) target = $region3
    $region10: #{toy.1} parent=1 // loop_exit
      _
"""
# The same, a line a cycle: matrix, pop, store and scalar slots. The matrix product holds its
# slot for four cycles, in two of which nothing is issued.
CYCLES = """\
== CAPACTIY:
MATMUL, VPOP, VSTORE, VSTORE:SPILL, SALU
    1     2     1     1     2
== UTILIZATION:
0 0 0 0 1
0 0 0 0 1
0 0 1 1 0
0 0 0 0 1
1 0 0 0 0
1 0 0 0 0
1 0 0 0 0
1 1 0 0 0
0 0 1 0 1
0 0 0 0 1
0 0 0 0 1
0 0 0 0 1
0 0 0 0 0
"""
HLO = """\
  %fusion.4 = f32[8]{0} fusion(%x), backend_config={"estimated_cycles":"2172"}
  %toy.1 = (bf16[16,256,128]{2,1,0:T(8,128)(2,1)}, f32[16,8]{1,0}) custom-call(%a, /*index=1*/%b), \
custom_call_target="tpu_custom_call", operand_layout_constraints={bf16[16,256,128]{2,1,0}, \
s32[]}, backend_config={"used_scoped_memory_configs":[{"memory_space":"1","offset":"0",\
"size":"524288"}],"other":1}
  ROOT %copy.2 = f32[8]{0} copy(%fusion.4), backend_config={"estimated_cycles":"28"}
"""


def options(**changes):
    defaults = {
        "action": "compile", "operation": "all", "target": "v5e", "shape": "lab",
        "dtype": "bfloat16", "json": None,
    }  # fmt: skip
    return argparse.Namespace(**defaults | changes)


def test_loops_and_their_cycles():
    kernel = static_report.parse(PROGRAM, CYCLES)
    found = [(loop.trips, loop.cycles, times) for loop, times in kernel.whole.walk()]
    assert found == [(1, 2, 1), (4, 5, 4), (3, 6, 12)]
    assert kernel.cycles == 2 + 4 * (5 + 3 * 6)
    loop, times = kernel.main_loop()
    assert (loop.cycles, times) == (6, 12)
    shares = {"MATMUL": 4 / 6, "VPOP": 1 / 12, "VSTORE": 1 / 6, "VSTORE:SPILL": 0, "SALU": 2 / 12}
    assert kernel.shares(loop) == pytest.approx(shares)
    assert kernel.overhead() == pytest.approx(1 - 72 / 94)


@pytest.mark.parametrize(
    "border", ["scmp.lt.s32.totalorder %s4_s9, 4", "scmp.ge.s32.totalorder (!%p3_p1), %s4_s9, 4"]
)
def test_other_ways_to_ask_whether_the_grid_has_ended(border):
    program = PROGRAM.replace("scmp.ge.s32.totalorder %s4_s9, 4", border)
    assert static_report.parse(program, CYCLES).cycles == 94


def test_a_grid_without_a_loop_inside_has_no_overhead_to_tell():
    flat = PROGRAM.replace("loop: start=0, step=1, limit=3", "").splitlines()
    flat = "\n".join(x for x in flat if not ("parent=3" in x and "loop_" in x))
    kernel = static_report.parse(flat, CYCLES)
    assert kernel.cycles == 2 + 4 * 11 and kernel.overhead() is None
    assert kernel.main_loop()[0].trips == 4


def test_trips_that_are_not_known_count_once():
    kernel = static_report.parse(PROGRAM.replace("limit=3", "limit=%s77"), CYCLES)
    assert [loop.trips for loop, _ in kernel.whole.walk()] == [1, 4, None]
    assert kernel.cycles == 2 + 4 * (5 + 6)


def test_only_the_loop_over_the_grid_has_trips_that_fill_and_drain():
    program = PROGRAM.replace(", 3 /* loop exit test */", ", 1 /* loop exit test */")
    kernel = static_report.parse(program, CYCLES)
    assert [loop.trips for loop, _ in kernel.whole.walk()] == [1, 4, 3]


def test_files_that_do_not_agree_are_an_error():
    more = CYCLES.replace("0 0 1 1 0\n", "0 0 1 1 1\n0 0 1 0 0\n")
    with pytest.raises(ValueError, match="not agree on the instructions: 3 and 2 VSTORE"):
        static_report.parse(PROGRAM, more)
    with pytest.raises(ValueError, match="expected units, their slots"):
        static_report.parse(PROGRAM, "nothing of this kind\n")
    with pytest.raises(ValueError, match="a loop has no end"):
        static_report.parse(PROGRAM.replace("// loop_exit", ""), CYCLES)


def test_one_unit_that_is_counted_otherwise_is_not_relied_on():
    odd = CYCLES.replace("0 0 0 0 0\n", "0 1 0 0 0\n")
    kernel = static_report.parse(PROGRAM, odd)
    assert kernel.cycles == static_report.parse(PROGRAM, CYCLES).cycles


def test_a_kernels_files_are_found_by_its_name(tmp_path):
    for name, text in ((static_report.PROGRAM, PROGRAM), (static_report.CYCLES, CYCLES)):
        (tmp_path / f"17-toy.1-00-{name}.txt").write_text(text)
        (tmp_path / f"18-other-toy.1-00-{name}.txt").write_text("not this one")
    assert static_report.read_kernel(tmp_path, "toy.1").cycles == 94
    with pytest.raises(ValueError, match="dump of toy.2: expected one file .* found 0"):
        static_report.read_kernel(tmp_path, "toy.2")


def test_kernels_of_a_program():
    (call,) = static_report.calls(HLO)
    assert (call.name, call.vmem) == ("toy.1", 524288)
    assert call.bytes == 2 * (2 * 16 * 256 * 128) + 4 * 16 * 8 + 4
    assert static_report.cycles_outside(HLO) == 2200
    assert static_report.cycles_outside(HLO.replace("2172", str(2**63 - 1))) == 28


def test_rows_that_are_asked_for():
    rows = compile_table.jobs("linear_attention", "all", "lab", "float32")
    assert len(rows) == 3 * 2 * 4 == len(set(rows))
    assert {row.decay for row in rows} == {None, "step", "channel"}
    rows = compile_table.jobs("all", "v6e", "odd", "bfloat16")
    kernels = [k for k, op in bench.OPERATIONS.items() if op.forms.mosaic_tpu is not None]
    assert list(dict.fromkeys(row.operation for row in rows)) == kernels
    assert {row.target for row in rows} == {"v6e"} and {row.dtype for row in rows} == {"bfloat16"}
    rows = compile_table.jobs("delta_rule", "v5e", "named", "float32")
    shapes = bench.OPERATIONS["delta_rule"].shapes.SHAPES
    assert [(row.shape, row.direction) for row in rows] == list(
        itertools.product(shapes, ("forward", "backward"))
    )


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"operation": "deltarule"}, "operation: .*mean 'delta_rule'"),
        ({"operation": "attention"}, "operation: "),
        ({"target": "v5"}, "target: "),
        ({"shape": "qwen"}, "shape: "),
        ({"dtype": "float16"}, "dtype: "),
    ],
)
def test_unknown_names(changed, said):
    with pytest.raises(ValueError, match=said):
        compile_table.main(options(**changed))


def test_gates_are_float32_and_options_stay_options():
    shapes = bench.OPERATIONS["delta_rule"].shapes
    shape = shapes.Shape(1, 8, 2, 2, 4, 4, "channel")
    specs, given = compile_jobs.arguments(bench.OPERATIONS["delta_rule"], shape, "bfloat16")
    assert {k: x.dtype for k, x in specs.items() if x.dtype == jnp.float32}.keys() == {
        "log_decay",
        "beta",
    }
    assert specs["query"].dtype == jnp.bfloat16 and not given
    operation = bench.OPERATIONS["attention"]
    specs, given = compile_jobs.arguments(operation, operation.shapes.SHAPES["odd"], "float32")
    assert given == {"window": 13} and specs.keys() == {"query", "key", "value"}


def test_without_libtpu(monkeypatch, capsys):
    monkeypatch.setattr(aot.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"libtpu.* pip install 'memseq\[tpu\]'$"):
        aot.compile_for("v5e", jnp.sin, jax.ShapeDtypeStruct((8, 128), jnp.float32))
    assert cli.main(["kernels", "compile"]) == 2
    assert "pip install 'memseq[tpu]'" in capsys.readouterr().err


def test_unknown_target_and_too_many_devices(needs_libtpu):
    with pytest.raises(ValueError, match="target: expected one of 'v5e'"):
        aot.mesh_for("v4", data=1)
    with pytest.raises(ValueError, match="devices: v5e has 1 to 4"):
        aot.mesh_for("v5e", data=3, tensor=2)
    sharding = NamedSharding(aot.mesh_for("v5e", tensor=2), PartitionSpec("tensor"))
    spec = jax.ShapeDtypeStruct((8, 128), jnp.float32, sharding=sharding)
    with pytest.raises(ValueError, match="shardings over one mesh"):
        aot.compile_for("v5e", jnp.sin, spec, devices=2)


def row(**changes):
    job = compile_table.jobs("delta_rule", "v5e", "odd", "bfloat16")[0]
    return {"job": compile_jobs.dataclasses.asdict(job), "compiles": True, "limit": False} | changes


def numbers(tmp_path):
    for name, text in ((static_report.PROGRAM, PROGRAM), (static_report.CYCLES, CYCLES)):
        (tmp_path / f"17-toy.1-00-{name}.txt").write_text(text)
    chip = compile_jobs.Chip(flops=1e12, bandwidth=1e12, clock=1e9)
    return compile_jobs.report(HLO, tmp_path, 5 * 10**6, chip)


def test_report_and_its_bound(tmp_path):
    found = numbers(tmp_path)
    us = {"matrix unit": 5.0, "HBM": 2.097668, "schedule": 0.094}
    assert found["microseconds"] == pytest.approx(us)
    assert found["bound"] == "matrix unit"
    assert found["overhead"] == pytest.approx(22 / 94)
    assert (found["loop"]["cycles"], found["loop"]["trips"]) == (6, 12)


@pytest.mark.parametrize(
    ("more", "status"),
    [
        ([], 0),
        ([{"compiles": False, "error": "INTERNAL: no such luck"}], 1),
        ([{"compiles": False, "limit": True, "error": "it cannot run: too wide"}], 0),
        ([{"error": "compiled, but its schedule was not read: odd"}], 1),
    ],
)
def test_table_and_exit_status(more, status, tmp_path, monkeypatch, capsys):
    rows = [row(**numbers(tmp_path)), *(row(**x) for x in more)]
    monkeypatch.setattr(compile_table, "compiled", lambda jobs: iter(rows))
    file = tmp_path / "rows.json"
    args = ["kernels", "compile", "--operation=delta_rule", "--target=v5e", f"--json={file}"]
    monkeypatch.setattr(aot, "require_libtpu", lambda: None)
    assert cli.main(args) == status
    out = capsys.readouterr().out
    assert "delta_rule  odd    step   forward    v5e     yes            0.5" in out
    assert " 6 x 12     67%  MATMUL 67%   23%" in out
    assert "Nothing was run." in out
    for x in more:
        assert x["error"] in out
    assert json.loads(file.read_text()) == rows


def toy(kernel, limit=lambda x: None):
    """An operation whose TPU kernel is `kernel`."""

    def call(x):
        return pl.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype), name="toy")(
            x
        )

    form = KernelForm(call, lambda xs, ct: (call(ct),), limit)
    forms = Forms("toy", jnp.sin, jnp.sin, form)
    shapes = SimpleNamespace(
        SHAPES={"small": SimpleNamespace(time=16)},
        example=lambda shape, key: {"x": jax.random.normal(key, (shape.time, 128))},
    )
    return bench.Operation(
        lambda x, implementation: dispatch(forms, implementation, 16, (x,)),
        forms,
        shapes,
        None,
        products=False,
    )


JOB = compile_jobs.Job("toy", "small", None, "float32", "forward", "v5e")


def sort(x_ref, out_ref):
    out_ref[...] = jnp.sort(x_ref[...])


def copy(x_ref, out_ref):
    out_ref[...] = x_ref[...]


def test_a_kernel_that_does_not_compile(needs_libtpu, tmp_path, monkeypatch):
    monkeypatch.setitem(bench.OPERATIONS, "toy", toy(sort))
    found = compile_jobs.compile_job(JOB, tmp_path)
    assert not found["compiles"] and not found["limit"]
    assert "sort" in found["error"] and "\n" not in found["error"]


def test_a_kernel_that_has_a_limit(needs_libtpu, tmp_path, monkeypatch):
    monkeypatch.setitem(bench.OPERATIONS, "toy", toy(copy, lambda x: "too long"))
    found = compile_jobs.compile_job(JOB, tmp_path)
    assert found["limit"] and found["error"].endswith("cannot run: too long")


def test_a_schedule_that_is_not_there(needs_libtpu, tmp_path, monkeypatch):
    monkeypatch.setitem(bench.OPERATIONS, "toy", toy(copy))
    found = compile_jobs.compile_job(JOB, tmp_path)
    assert found["compiles"]
    assert "its schedule was not read: dump of toy.1" in found["error"]


def test_a_compiler_that_ends_its_process(monkeypatch):
    code = """
import os, sys
for line in sys.stdin:
    if "odd" in line:
        sys.stderr.write("noise\\nF1120 14:09:44 llo.cc:283] Check failed: luck\\n")
        sys.stderr.flush()
        os.abort()
    print(line.strip(), flush=True)
"""

    def start(folder):
        with open(f"{folder}/errors", "w") as errors:
            return subprocess.Popen(
                [sys.executable, "-c", code],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )

    monkeypatch.setattr(compile_jobs, "_start", start)
    wanted = [JOB, compile_jobs.dataclasses.replace(JOB, shape="odd"), JOB]
    first, second, third = compile_jobs.compiled(wanted)
    assert first == third == compile_jobs.dataclasses.asdict(JOB)
    assert not second["compiles"] and second["job"]["shape"] == "odd"
    assert second["error"].endswith(
        "ended with SIGABRT: F1120 14:09:44 llo.cc:283] Check failed: luck"
    )


def test_a_kernel_compiled_for_v5e(needs_libtpu):
    job = compile_jobs.Job("linear_attention", "odd", "channel", "bfloat16", "forward", "v5e")
    (found,) = compile_jobs.compiled([job])
    assert found["compiles"] and "error" not in found, found
    assert found["job"] == compile_jobs.dataclasses.asdict(job)
    (name,) = found["kernels"]
    assert name.startswith("linear_attention_forward")
    loop = found["loop"]
    assert found["cycles_per_core"] == found["kernels"][name] > loop["cycles"] * loop["trips"] > 0
    assert 0 < loop["shares"]["MATMUL"] <= 1 and 0 < found["overhead"] < 1
    assert 0 < found["vmem_bytes"] < 16 * 2**20
    operands = 3 * 97 * 6 * (2 * 3 * 24 + 4 * 24)  # what is read at least: without values, padding
    assert operands < found["hbm_bytes"] < 100 * operands
    assert found["bound"] == max(found["microseconds"], key=found["microseconds"].get)
