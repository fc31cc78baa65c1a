"""The TPU kernels compile ahead of time, for TPUs that are not here: one program a target.

Sizes, dtypes and options vary from call to call, so that few programs cover many kernels.
"""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from memseq.layers import LinearAttention
from memseq.pallas_kernels import (
    causal_conv,
    delta_rule,
    diagonal_plus_low_rank,
    linear_attention,
    linear_scan,
    selective_scan,
)
from memseq.pallas_kernels.aot import TARGETS, compile_for, mesh_for
from memseq.pallas_kernels.compile_jobs import Job, program
from memseq.pallas_kernels.compile_table import jobs
from memseq.pallas_kernels.neural_memory import Loss, Retention
from memseq.pallas_kernels.static_report import calls
from memseq.partitioning import split_over
from tests.pallas_kernels.test_neural_memory_tpu import floating as neural_memory

pytestmark = pytest.mark.usefixtures("needs_libtpu")


def matrix_memory(time, heads, key_dim, value_dim, dtype=jnp.bfloat16, decay=None, **more):
    """Arguments as shapes: `more` names further ones by their layout."""
    lead = (1, time, heads)
    shapes = {
        "query": ((*lead, key_dim), dtype),
        "key": ((*lead, key_dim), dtype),
        "value": ((*lead, value_dim), dtype),
        "initial_state": ((1, heads, key_dim, value_dim), jnp.float32),
    }
    if decay is not None:
        shapes["log_decay"] = ((*lead, key_dim) if decay == "channel" else lead, jnp.float32)
    layouts = {
        "beta": (lead, dtype),
        "value_log_decay": ((*lead, value_dim), jnp.float32),
        "a": ((*lead, key_dim), dtype),
        "b": ((*lead, key_dim), dtype),
        "bonus": ((heads, key_dim), jnp.float32),
        "erase_key": ((*lead, key_dim), dtype),
        "segment_ids": ((1, time), jnp.int32),
    }
    shapes |= {name: layouts[name] for name, wanted in more.items() if wanted}
    return {name: jax.ShapeDtypeStruct(*x) for name, x in shapes.items()}


def arrays(dtype=jnp.float32, **shapes):
    """Arguments as shapes; segment ids are integers."""
    return {
        name: jax.ShapeDtypeStruct(shape, jnp.int32 if name == "segment_ids" else dtype)
        for name, shape in shapes.items()
    }


def memory_network(dim, hidden=None, dtype=jnp.bfloat16, **more):
    """Arguments of a matrix or of two layers; `more` names further ones by step."""
    time, heads = 40, 2
    lead = (1, time, heads)
    sizes = [dim] + [hidden] * (hidden is not None) + [dim]
    names = ["step", "log_keep"] + [n for n in more if n != "segment_ids"]
    return (
        arrays(dtype, **dict.fromkeys(("query", "key", "value"), (*lead, dim)))
        | arrays(**dict.fromkeys(names, lead))
        | arrays(**{f"weight_{i}": (heads, *sizes[i : i + 2]) for i in range(len(sizes) - 1)})
        | (arrays(segment_ids=(1, time)) if "segment_ids" in more else {})
    )


CALLS = {
    "linear_attention": [
        (linear_attention, matrix_memory(300, 4, 128, 128), {}),
        (linear_attention, matrix_memory(70, 3, 64, 32, jnp.float16), {}),
        (linear_attention, matrix_memory(256, 2, 64, 128, decay="step", segment_ids=True), {}),
        (linear_attention, matrix_memory(256, 2, 256, 256, jnp.float32, "step", bonus=True), {}),
        (
            linear_attention,
            matrix_memory(40, 3, 16, 24, decay="channel", bonus=True, value_log_decay=True),
            {},
        ),
    ],
    "delta_rule": [
        (delta_rule, matrix_memory(300, 4, 128, 128, beta=True), {}),
        (
            delta_rule,
            matrix_memory(256, 2, 256, 256, decay="step", beta=True, segment_ids=True),
            {},
        ),
        (
            delta_rule,
            matrix_memory(100, 3, 16, 24, jnp.float32, "channel", beta=True, erase_key=True),
            {"erase": "undecayed"},
        ),
    ],
    "diagonal_plus_low_rank": [
        (
            diagonal_plus_low_rank,
            matrix_memory(300, 2, 64, 64, decay="channel", a=True, b=True, segment_ids=True),
            {},
        ),
        (
            diagonal_plus_low_rank,
            matrix_memory(40, 3, 16, 24, jnp.float32, "step", a=True, b=True),
            {},
        ),
    ],
    "causal_conv": [
        (
            causal_conv,
            arrays(
                jnp.bfloat16, x=(2, 300, 320), kernel=(4, 320), bias=(320,), segment_ids=(2, 300)
            ),
            {"activation": "silu"},
        ),
        (causal_conv, arrays(x=(2, 100, 24), kernel=(3, 24)), {"activation": "gelu"}),
        (causal_conv, arrays(jnp.float16, x=(2, 50, 24), kernel=(2, 24)), {}),
    ],
    "linear_scan": [
        (
            linear_scan,
            arrays(jnp.bfloat16, x=(2, 300, 320), log_decay=(2, 300, 320), segment_ids=(2, 300)),
            {},
        ),
        (linear_scan, arrays(x=(2, 100, 24), log_decay=(24,), phase=(24,)), {}),
    ],
    "selective_scan": [
        (
            selective_scan,
            arrays(
                x=(2, 300, 320),
                dt=(2, 300, 320),
                A=(320, 16),
                B=(2, 300, 16),
                C=(2, 300, 16),
                D=(320,),
                segment_ids=(2, 300),
            ),
            {},
        ),
    ],
    "neural_memory": [
        (
            neural_memory,
            memory_network(64, 256, momentum=True, segment_ids=True),
            {"depth": 2, "update_chunk": 16, "max_segments": 2, "outer_grad": ("truncate", 1)},
        ),
        (
            neural_memory,
            memory_network(24, dtype=jnp.float32, threshold=True),
            {
                "depth": 1,
                "update_chunk": 20,
                "loss": Loss("huber"),
                "retention": Retention("lq", 4.0),
            },
        ),
    ],
}


def both(function, arguments, **options):
    """Outputs and all gradients of a call whose arguments come as a dictionary."""
    fixed = {k: x for k, x in arguments.items() if jnp.issubdtype(x.dtype, jnp.integer)}
    free = {k: x for k, x in arguments.items() if k not in fixed}
    call = functools.partial(function, implementation="mosaic_tpu", **options)
    out, pull = jax.vjp(lambda free: call(**free, **fixed), free)
    return out, pull(out)


def job(name, target):
    # a network's kernels take seven seconds each
    slow = name == "neural_memory" and target != "v5e"
    return pytest.param(name, target, marks=pytest.mark.slow if slow else (), id=f"{name}-{target}")


@pytest.mark.parametrize(("name", "target"), [job(n, t) for n in CALLS for t in TARGETS])
def test_kernels_compile(name, target):
    calls = CALLS[name]

    def program(*arguments):
        return [both(f, x, **o) for (f, _, o), x in zip(calls, arguments, strict=True)]

    compiled = compile_for(target, program, *(shapes for _, shapes, _ in calls))
    assert kernels(compiled) == 3 * len(calls)


def kernels(compiled):
    """How many there are. A gradient takes three: forward, the chunks' first states, backward."""
    return compiled.as_text().count('custom_call_target="tpu_custom_call"')


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_row_of_the_table_holds_its_kernels(direction):
    """Of an operation whose outputs are complex, which are no floating-point arrays."""
    row = Job("linear_scan", "odd", None, "bfloat16", direction, "v5e")
    function, specs = program(row)
    assert kernels(compile_for("v5e", function, *specs)) == (1 if direction == "forward" else 2)


# Named shapes that the kernels do not take.
LIMITED = {("neural_memory", "odd"): "the memory has 3 layers, the kernels take up to 2"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "row",
    jobs("all", "all", "named", "bfloat16") + jobs("all", "all", "named", "float32"),
    ids=lambda row: row.label,
)
def test_named_shapes_compile(row):
    """The sizes at which models call the operations, each direction for each target."""
    if reason := LIMITED.get((row.operation, row.shape)):
        with pytest.raises(ValueError, match=f"cannot run: {reason}"):
            program(row)
        return
    function, specs = program(row)
    assert kernels(compile_for(row.target, function, *specs)) > 0


def test_time_is_bounded_by_hbm_not_by_vmem():
    arguments = matrix_memory(131_072, 1, 128, 128, decay="step", beta=True)
    assert kernels(compile_for("v5e", functools.partial(both, delta_rule), arguments)) == 3


def test_more_elements_than_a_32_bit_offset_reaches():
    arguments = matrix_memory(2**21, 9, 128, 128)
    assert arguments["query"].size > 2**31
    call = functools.partial(linear_attention, implementation="mosaic_tpu")
    assert kernels(compile_for("v5p", lambda x: call(**x), arguments)) == 1


def test_auto_takes_the_kernels_under_a_mesh_of_a_tpu():
    """Lowered on a CPU, for four devices that split batch and heads."""
    mesh = mesh_for("v5e", data=2, tensor=2)
    arguments = matrix_memory(256, 4, 128, 128, decay="step")
    arguments = {
        name: jax.ShapeDtypeStruct(
            (2, *x.shape[1:]), x.dtype, sharding=NamedSharding(mesh, PartitionSpec("data"))
        )
        for name, x in arguments.items()
    }

    def call(arguments):
        out, pull = jax.vjp(lambda x: linear_attention(**x), arguments)
        return pull(out)

    compiled = compile_for("v5e", call, arguments)
    assert kernels(compiled) == 3


def test_a_layers_kernels_under_a_mesh_with_axes_of_other_names():
    """Each of four devices takes a quarter, going backward too, which is traced outside."""
    mesh = mesh_for("v5e", rows=2, columns=2)
    layer = LinearAttention(features=256, heads=2, implementation="mosaic_tpu")
    x = jax.ShapeDtypeStruct((2, 128, 256), jnp.bfloat16)
    params = jax.eval_shape(lambda: layer.init(jax.random.key(0), jnp.zeros(x.shape)))
    x = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, PartitionSpec("rows")))

    def bytes_of_kernels(batch, heads):
        def loss(params, x):
            with split_over(batch, heads):
                y, _ = layer.apply(params, x)
            return jnp.sum(y**2)

        compiled = compile_for("v5e", jax.grad(loss), params, x)
        return [call.bytes for call in calls(compiled.as_text())]

    parts, whole = bytes_of_kernels("rows", "columns"), bytes_of_kernels((), ())
    assert len(parts) == 3 and [4 * n for n in parts] == whole


@pytest.mark.parametrize("name", CALLS)
def test_kernels_are_exported_from_a_machine_without_a_tpu(name):
    """No chip is named: a kernel that asks which one it is for cannot be written."""
    calls = CALLS[name]

    def program(*arguments):
        return [both(f, x, **o) for (f, _, o), x in zip(calls, arguments, strict=True)]

    exported = jax.export.export(jax.jit(program), platforms=["tpu"])(*(x for _, x, _ in calls))
    assert exported.mlir_module().count("@tpu_custom_call") == 3 * len(calls)


def test_kernels_compile_under_vmap():
    """(The interpreter does not know vmap.)"""
    arguments = {
        name: jax.ShapeDtypeStruct((3, *x.shape), x.dtype)
        for name, x in matrix_memory(256, 2, 128, 128, decay="step").items()
    }
    compiled = compile_for("v5e", jax.vmap(functools.partial(both, linear_attention)), arguments)
    assert kernels(compiled) == 3
