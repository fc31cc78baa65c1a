"""The TPU kernels of `hopfield_retrieve`, run by the interpreter, against the reference form."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from memseq.pallas_kernels import hopfield_retrieve
from memseq.pallas_kernels.aot import TARGETS, compile_for
from memseq.pallas_kernels.hopfield_retrieve import mosaic_tpu
from memseq.partitioning import make_mesh
from tests.pallas_kernels.harness import (
    assert_close,
    assert_same,
    check_kernel,
    check_kernel_16_bit,
    cotangents_like,
    interpreted,
    with_gradients,
)
from tests.pallas_kernels.test_hopfield_retrieve import build


@pytest.fixture(autouse=True)
def small():
    """Sizes at which a short call already has several tiles of queries and blocks of patterns."""
    with mock.patch.multiple(mosaic_tpu, TILE=64, BLOCK=128):
        yield


CASES = {
    "tiles and blocks": build(70, 150, steps=2, heads=1, stored_heads=1, batch=1),
    "no values, mask, energies": build(9, 140, values=False, steps=2, mask=2, return_energy=True),
    "shared by grouped heads, mask": build(5, 300, batch=3, rows=1, heads=4, mask=2, steps=2),
    "sink, mask of queries, energies": build(
        70, 130, separation="softmax_n", mask=3, steps=3, return_energy=True
    ),
    "causal": build(150, 150, causal=True, steps=2),
    "causal, shared": build(40, 40, rows=1, causal=True, steps=2),
    "one step": build(70, 40),
    "norm": build(40, 40, values=False, steps=3, state_norm="layer", return_energy=True),
    "last": build(40, 40, steps=3, gradient="last", return_energy=True),
    "last, no values": build(40, 40, steps=3, gradient="last", values=False),
    "implicit": build(40, 40, steps=3, gradient="implicit", state_norm="tanh", return_energy=True),
    "implicit, no values": build(40, 40, steps=3, gradient="implicit", values=False),
}
QUICK = ("tiles and blocks", "no values, mask, energies")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in CASES]
)
def test_tpu_kernels(name):
    check_kernel(hopfield_retrieve, *CASES[name])


NARROW = {
    "values": build(70, 150, steps=2),
    "no values": build(70, 150, values=False, steps=3),
    "sink, mask": build(70, 130, separation="softmax_n", mask=2, steps=3),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NARROW)
def test_tpu_kernels_with_16_bit_inputs(name):
    check_kernel_16_bit(hopfield_retrieve, *NARROW[name], 64)


def test_the_future_other_rows_and_hidden_patterns_change_nothing():
    """And a query that sees nothing gets 0, with gradients 0."""
    inputs, _, rng = build(130, 130, batch=2, heads=1, stored_heads=1)
    inputs = {k: x.astype(np.float32) for k, x in inputs.items()}
    cotangent = rng.normal(size=(2, 130, 1, 3))
    cotangent[:, 50:] = 0
    mask = np.ones((2, 130), bool)
    mask[0, 7], mask[1, :9] = False, False

    def call(x, c):
        options = {"mask": mask, "causal": True, "steps": 2, "implementation": "mosaic_tpu"}
        return with_gradients(lambda x: hopfield_retrieve(**x, **options))(x, c)

    other = {k: x.copy() for k, x in inputs.items()}
    for name in ("query", "stored", "values"):
        other[name][:, 50:] *= -3
        other[name][1, :50] += 1
    for name in ("stored", "values"):
        other[name][0, 7] = 9
    with interpreted():
        run = jax.jit(call)
        out, gradients = run(inputs, cotangent)
        changed, others = run(other, cotangent)
    assert (np.asarray(out)[:, 50:] != np.asarray(changed)[:, 50:]).any()
    assert_same(changed[0, :50], out[0, :50])
    assert not np.asarray(out)[1, :9].any()
    assert not np.asarray(gradients["query"])[1, :9].any()
    for name in ("query", "stored", "values"):
        assert_same(others[name][0, :50], gradients[name][0, :50], name)
        assert not np.asarray(gradients[name])[:, 50:].any()
        assert np.isfinite(gradients[name]).all() and np.asarray(gradients[name])[1, :50].any()
    for name in ("stored", "values"):
        assert not np.asarray(gradients[name])[0, 7].any()


@pytest.mark.slow
@pytest.mark.parametrize(
    "inputs, options, spec",
    [
        (*build(20, 30, batch=4, mask=3, steps=2)[:2], PartitionSpec("data", None, "tensor")),
        # patterns that all rows share: devices split the queries, and gradients are summed
        (
            *build(20, 30, batch=4, rows=1, mask=2, steps=2, separation="softmax_n")[:2],
            PartitionSpec("data", None, "tensor"),
        ),
        (
            *build(20, 20, batch=4, rows=1, causal=True, steps=2)[:2],
            PartitionSpec("data", None, "tensor"),
        ),
    ],
    ids=["rows", "shared rows", "causal, shared rows"],
)
def test_kernels_under_a_mesh_run_on_each_device(inputs, options, spec):
    inputs = {k: x.astype(np.float32) for k, x in inputs.items()}

    def loss(form):
        return jax.jit(
            jax.value_and_grad(
                lambda x: (hopfield_retrieve(**x, **options, implementation=form) ** 2).sum()
            )
        )

    expected = loss("chunked")(inputs)
    with jax.set_mesh(make_mesh("data=4,tensor=2")), interpreted():
        found = loss("mosaic_tpu")(inputs)
    assert_close(found, expected, 2e-5)
    assert found[1]["query"].sharding.spec == spec


@pytest.mark.slow
def test_kernels_inside_a_shard_map_of_the_user():
    inputs, options, rng = build(20, 30, steps=2, return_energy=True)
    inputs = {k: x.astype(np.float32) for k, x in inputs.items()}
    mesh = jax.make_mesh((2,), ("rows",), (AxisType.Auto,), devices=jax.devices()[:2])
    rows, shared = PartitionSpec("rows"), PartitionSpec()
    specs = {k: shared if k == "beta" else rows for k in inputs}
    shapes = jax.eval_shape(lambda x: hopfield_retrieve(**x, **options), inputs)
    cotangents = cotangents_like(rng, shapes)

    def call(form):
        return lambda x: hopfield_retrieve(**x, **options, implementation=form)

    expected = jax.jit(with_gradients(call("chunked")))(inputs, cotangents)
    sharded = jax.shard_map(call("mosaic_tpu"), mesh=mesh, in_specs=(specs,), out_specs=rows)
    with interpreted():
        found = jax.jit(with_gradients(sharded))(inputs, cotangents)
    assert_close(found, expected, 2e-5)


def test_what_the_kernels_do_not_take():
    inputs, _, _ = build(16, 20)
    for options, message in (
        ({"separation": "sparsemax"}, "separation 'sparsemax' needs a row's scores together"),
        ({"tolerance": 1e-3}, "take all steps of all queries"),
        ({"values": np.zeros((2, 20, 2, 2049))}, "value_dim is 2049, the kernels take up to 2048"),
    ):
        with pytest.raises(ValueError, match=message):
            hopfield_retrieve(**inputs | options, implementation="mosaic_tpu")
    with jax.enable_x64(True):
        with pytest.raises(ValueError, match="compute in float32, got an input of float64"):
            hopfield_retrieve(**inputs, implementation="mosaic_tpu")


def specs(dtype=jnp.float32, **shapes):
    """Arguments as shapes."""
    return {
        name: jax.ShapeDtypeStruct(shape, jnp.bool_ if name == "mask" else dtype)
        for name, shape in shapes.items()
    }


COMPILED = {
    "values": (
        specs(
            query=(2, 200, 2, 24),
            stored=(2, 300, 2, 24),
            values=(2, 300, 2, 40),
            mask=(2, 200, 300),
        ),
        {"steps": 2},
        6,
    ),
    "no values": (
        specs(
            jnp.bfloat16,
            query=(3, 50, 4, 64),
            stored=(1, 50, 2, 64),
            beta=(4,),
            sink=(4,),
            mask=(3, 50),
        ),
        {
            "steps": 3,
            "separation": "softmax_n",
            "causal": True,
            "state_norm": "layer",
            "return_energy": True,
        },
        4,
    ),
}


def program(*arguments):
    """Outputs and all gradients of the calls of COMPILED."""

    def both(mask, options, **free):
        def call(free):
            return hopfield_retrieve(**free, mask=mask, **options, implementation="mosaic_tpu")

        out, pull = jax.vjp(call, free)
        return out, pull(out)

    calls = zip(arguments, COMPILED.values(), strict=True)
    return [both(options=options, **x) for x, (_, options, _) in calls]


@pytest.mark.usefixtures("needs_libtpu")
@pytest.mark.parametrize("target", TARGETS)
def test_kernels_compile(target):
    """A gradient takes four: forward, the same with what each step found, the gradients of the
    state and of what is stored. These two once more where values are read.
    """
    compiled = compile_for(target, program, *(x for x, _, _ in COMPILED.values()))
    expected = sum(count for _, _, count in COMPILED.values())
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == expected


@pytest.mark.usefixtures("needs_libtpu")
def test_kernels_are_exported_from_a_machine_without_a_tpu():
    """No chip is named: a kernel that asks which one it is for cannot be written."""
    arguments = (x for x, _, _ in COMPILED.values())
    exported = jax.export.export(jax.jit(program), platforms=["tpu"])(*arguments)
    expected = sum(count for _, _, count in COMPILED.values())
    assert exported.mlir_module().count("@tpu_custom_call") == expected


@pytest.mark.slow
@pytest.mark.usefixtures("needs_libtpu")
@pytest.mark.parametrize("target", TARGETS)
def test_memory_of_a_large_retrieval(target):
    """3 steps, 4,096 queries, 65,536 patterns: peak below twice inputs and outputs."""
    with mock.patch.multiple(mosaic_tpu, TILE=512, BLOCK=512):
        query = jax.ShapeDtypeStruct((1, 4096, 1, 64), jnp.float32)
        stored = jax.ShapeDtypeStruct((1, 65536, 1, 64), jnp.float32)

        def both(cotangent, *arrays):
            call = with_gradients(
                lambda xs: hopfield_retrieve(*xs, steps=3, implementation="mosaic_tpu")
            )
            return call(arrays, cotangent)

        for arrays in ((query, stored), (query, stored, stored)):
            analysis = compile_for(target, both, query, *arrays).memory_analysis()
            held = analysis.argument_size_in_bytes + analysis.output_size_in_bytes
            assert held + analysis.temp_size_in_bytes < 2 * held
