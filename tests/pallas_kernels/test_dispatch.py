"""Which form runs: by the platform a program is lowered for, by its length, by name."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from memseq.pallas_kernels import attention, causal_conv, delta_rule, linear_attention
from memseq.pallas_kernels.common import dispatch
from memseq.pallas_kernels.common.dispatch import Forms, KernelForm, run
from memseq.partitioning import make_mesh, split_over
from tests.pallas_kernels.harness import assert_close, interpreted, with_gradients

LONG = dispatch.SHORT


def double_in_reference(x, y, index, *, power):
    del index
    return x**power * 2 * (1 if y is None else y)


def double_in_chunks(x, y, index, *, power):
    return double_in_reference(x, y, index, power=power)


def kernel(marker, limit=None):
    """A kernel form that leaves `marker` in the program, another in its backward pass."""

    def forward(x, y, index, *, power):
        return double_in_reference(x, y, index, power=power) + 0 * jnp.float32(marker)

    def backward(arrays, cotangent, *, power):
        x, y, _ = arrays
        scaled = 2 * power * x ** (power - 1) * cotangent + 0 * jnp.float32(marker + 1)
        return scaled * y, (2 * x**power * cotangent).sum(), None

    return KernelForm(forward, backward, lambda x, y, index, *, power: limit)


FORMS = Forms(
    "double",
    double_in_reference,
    double_in_chunks,
    mosaic_tpu=kernel(1111),
    mosaic_gpu=kernel(3333),
)
X, Y, INDEX = np.arange(1, 4, dtype=np.float32), np.float32(3), np.zeros(3, np.int32)


def call(x, y, forms=FORMS, implementation="auto", time=LONG):
    return run(forms, implementation, time, (x, y, INDEX), power=2)


def lowered(function, platform):
    return jax.jit(function).trace(X, Y).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("platform, marker", [("tpu", 1111), ("cuda", 3333), ("cpu", None)])
def test_auto_follows_the_platform_lowered_for(platform, marker):
    """Not the one that lowers: this is a machine without accelerators."""
    forward = lowered(call, platform)
    both = lowered(jax.grad(lambda x, y: call(x, y).sum(), argnums=(0, 1)), platform)
    for value in (1111, 3333):
        assert (f"{value:.6e}".replace("e+0", "e+0") in forward) == (value == marker)
        assert (f"{value + 1:.6e}" in both) == (value == marker)
        assert f"{value + 1:.6e}" not in forward


def test_values_and_gradients_through_auto():
    for implementation in ("auto", "reference", "chunked", "mosaic_tpu", "mosaic_gpu"):
        out, gradients = jax.value_and_grad(
            lambda x, y, i=implementation: call(x, y, implementation=i).sum(), argnums=(0, 1)
        )(X, Y)
        np.testing.assert_allclose(out, 2 * 14 * 3)
        np.testing.assert_allclose(gradients[0], 4 * X * 3)
        np.testing.assert_allclose(gradients[1], 2 * 14)


def test_short_calls_take_the_recurrent_form():
    taken = []

    def form(name):
        return lambda x, y, index, *, power: taken.append(name) or x

    forms = Forms("double", form("reference"), form("chunked"))
    call(X, Y, forms, time=LONG - 1)
    call(X, Y, forms, time=LONG)
    assert taken == ["reference", "chunked"]


def test_none_is_no_argument():
    def loss(x):
        return run(FORMS, "auto", 1, (x, None, INDEX), power=2).sum()

    np.testing.assert_allclose(jax.grad(loss)(X), 4 * X)


def test_a_form_that_is_missing_or_cannot_run_says_so():
    forms = Forms("double", double_in_reference, double_in_chunks, mosaic_tpu=kernel(1, "too odd"))
    assert forms.available == ("reference", "chunked", "mosaic_tpu")
    with pytest.raises(ValueError, match="double has no form 'mosaic_gpu' yet; it has reference"):
        call(X, Y, forms, "mosaic_gpu")
    with pytest.raises(ValueError, match="'mosaic_tpu' of double cannot run: too odd"):
        call(X, Y, forms, "mosaic_tpu")
    with pytest.raises(ValueError, match="expected one of .*, got 'Auto'; did you mean 'auto'"):
        call(X, Y, forms, "Auto")
    # auto goes on without it
    assert "1.000000e+00" not in lowered(lambda x, y: call(x, y, forms), "tpu")


def test_auto_warns_once_where_an_accelerator_has_no_kernel(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    dispatch._warn_once.cache_clear()
    forms = Forms("double", double_in_reference, double_in_chunks, mosaic_gpu=kernel(1, "too odd"))
    with pytest.warns(UserWarning, match=r"double has no mosaic_gpu kernel .*\(too odd\)"):
        call(X, Y, forms)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(X, Y, forms)  # said before
        call(X, Y, FORMS)  # has a kernel
        call(X, Y, forms, time=LONG - 1)  # needs none
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    dispatch._warn_once.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(X, Y, forms)


def test_arguments_that_devices_share_get_the_sum_of_their_gradients():
    """A kernel's backward rule knows nothing of devices."""
    mesh = jax.make_mesh((2,), ("rows",), (AxisType.Auto,), devices=jax.devices()[:2])
    rows, shared = PartitionSpec("rows"), PartitionSpec()
    x = jnp.arange(1.0, 7)
    for implementation in ("auto", "chunked", "mosaic_tpu"):

        def loss(x, y, implementation=implementation):
            def each(x, y):
                return call(x, y, implementation=implementation)

            return jax.shard_map(each, mesh=mesh, in_specs=(rows, shared), out_specs=rows)(
                x, y
            ).sum()

        gradients = jax.jit(jax.grad(loss, argnums=(0, 1)))(x, Y)
        np.testing.assert_allclose(gradients[0], 4 * x * 3)
        np.testing.assert_allclose(gradients[1], 2 * (x**2).sum())


def real_operations():
    rng = np.random.default_rng(0)
    q, k, v = rng.normal(size=(3, 1, 20, 2, 4)).astype(np.float32)
    gate = -rng.exponential(size=(1, 20, 2)).astype(np.float32)
    ids = np.repeat([[0, 1]], 10, axis=1).astype(np.int32)
    yield (
        linear_attention,
        {"query": q, "key": k, "value": v, "log_decay": gate},
        "segment_ids",
        ids,
    )
    delta = {"query": q, "key": k / 2, "value": v, "beta": -gate.clip(-1), "log_decay": gate}
    yield delta_rule, delta, "segment_ids", ids
    conv = {"x": v[:, :, 0], "kernel": np.ones((4, 4), np.float32)}
    yield causal_conv, conv, "segment_ids", ids
    forgetting = {"query": q, "key": k, "value": v, "log_forget": gate}
    yield attention, forgetting, "query_segments", ids


@pytest.mark.parametrize("case", list(real_operations()), ids=lambda case: case[0].__name__)
def test_auto_is_the_chunked_form_of_every_operation(case):
    """Through the custom rule, with integer arguments and outputs that nobody differentiates."""
    function, inputs, name, ids = case

    def form(implementation):
        def first(x):
            return jax.tree.leaves(function(**x, **{name: ids}, implementation=implementation))[0]

        return first, with_gradients(first)

    cotangent = np.ones(jax.eval_shape(form("auto")[0], inputs).shape)
    auto, chunked = jax.jit(
        lambda x: (form("auto")[1](x, cotangent), form("chunked")[1](x, cotangent))
    )(inputs)
    assert_close(auto, chunked, 1e-6)


def memory(batch=4, heads=2, time=20):
    rng = np.random.default_rng(0)
    lead = (batch, time, heads)
    arrays = {
        "query": rng.normal(size=(*lead, 4)),
        "key": rng.normal(size=(*lead, 4)),
        "value": rng.normal(size=(*lead, 3)),
        "log_decay": -rng.exponential(size=lead),
        "bonus": rng.normal(size=(heads, 4)),
    }
    ids = np.repeat([[0, 1]], time // 2, axis=1).repeat(batch, axis=0).astype(np.int32)
    return {k: x.astype(np.float32) for k, x in arrays.items()}, ids


def gradients_of(form, ids):
    def loss(x):
        out, state = linear_attention(**x, segment_ids=ids, implementation=form)
        return (out**2).sum() + (state**2).sum()

    return jax.jit(jax.value_and_grad(loss))


@pytest.mark.parametrize(
    "mesh, heads, spec",
    [
        ("data=2,fsdp=2,tensor=2", 2, PartitionSpec(("data", "fsdp"), None, "tensor")),
        # three heads on two devices: every device takes all
        ("data=2,context=2,tensor=2", 3, PartitionSpec("data")),
        # four rows on eight devices: the first axis that divides them
        ("data=2,fsdp=4", 2, PartitionSpec("data")),
    ],
)
def test_kernels_under_a_mesh_run_on_each_device(mesh, heads, spec):
    x, ids = memory(heads=heads)
    expected = gradients_of("chunked", ids)(x)
    with jax.set_mesh(make_mesh(mesh)), interpreted():
        found = gradients_of("mosaic_tpu", ids)(x)
    assert_close(found, expected, 2e-5)
    assert found[1]["query"].sharding.spec == spec


@pytest.mark.slow
def test_a_mesh_with_axes_of_other_names():
    """Named around the call; the backward pass is traced outside."""
    x, ids = memory()
    expected = gradients_of("chunked", ids)(x)
    kinds = (AxisType.Auto,) * 2
    mesh = jax.make_mesh((4, 2), ("rows", "columns"), kinds, devices=jax.devices())

    def loss(x):
        with split_over("rows", ("columns",)):
            out, state = linear_attention(**x, segment_ids=ids, implementation="mosaic_tpu")
        return (out**2).sum() + (state**2).sum()

    with jax.set_mesh(mesh), interpreted():
        found = jax.jit(jax.value_and_grad(loss))(x)
    assert_close(found, expected, 2e-5)
    assert found[1]["query"].sharding.spec == PartitionSpec("rows", None, "columns")


def test_an_axis_that_the_mesh_does_not_have():
    x, ids = memory()
    call = functools.partial(linear_attention, segment_ids=ids, implementation="mosaic_tpu")
    with (
        jax.set_mesh(make_mesh("data=-1")),
        split_over(heads="columns"),
        pytest.raises(
            ValueError, match=r"^heads of split_over: expected axes of the mesh, \['data'"
        ),
    ):
        jax.eval_shape(lambda x: call(**x), x)


def test_kernels_inside_a_shard_map_of_the_user():
    x, ids = memory()
    expected = gradients_of("chunked", ids)(x)
    mesh = jax.make_mesh((2,), ("rows",), (AxisType.Auto,), devices=jax.devices()[:2])
    rows, shared = PartitionSpec("rows"), PartitionSpec()
    specs = {k: shared if k == "bonus" else rows for k in x}

    def call(x, ids):
        return linear_attention(**x, segment_ids=ids, implementation="mosaic_tpu")

    def loss(x):
        sharded = jax.shard_map(call, mesh=mesh, in_specs=(specs, rows), out_specs=rows)
        return sum((y**2).sum() for y in sharded(x, ids))

    with interpreted():
        assert_close(jax.jit(jax.value_and_grad(loss))(x), expected, 2e-5)
