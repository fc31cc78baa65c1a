"""Parts that layers share: norms, short convolution, gates, rotary positions, entering a state."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memseq.layers import HGRN2, DeltaNet, GatedLinearAttention
from memseq.layers.common.base import check_like, enter, leave
from memseq.layers.common.parts import (
    MambaGate,
    RMSNorm,
    ShortConv,
    conv_tail,
    l2_normalize,
    merge_heads,
    rotate,
    split_heads,
)
from tests.layers.harness import rms_norm, short_conv, silu, softplus, unit

RNG = np.random.default_rng(0)


def apply(module, params, *args):
    return jax.jit(module.apply)({"params": params}, *args)


def test_rms_norm():
    x, scale = (
        RNG.normal(size=(3, 5, 8)) * 10.0 ** RNG.integers(-4, 4, (3, 5, 1)),
        RNG.normal(size=8),
    )
    with jax.enable_x64(True):
        y = apply(RMSNorm(), {"scale": scale}, x)
    want = np.apply_along_axis(lambda v: rms_norm(v, scale), -1, x)
    np.testing.assert_allclose(y, want, rtol=1e-12)
    y = apply(RMSNorm(), {"scale": np.float32(scale)}, jnp.asarray(x, jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(y, np.float64), want, rtol=2**-6, atol=1e-3)


def test_norms_of_zero():
    """Zero gives zero, with a finite gradient."""
    zero = jnp.zeros((2, 8))
    params = {"params": {"scale": jnp.ones(8)}}
    for norm in (l2_normalize, lambda x: RMSNorm().apply(params, x)):
        y, backward = jax.vjp(norm, zero)
        np.testing.assert_array_equal(y, zero)
        assert np.isfinite(backward(jnp.ones_like(y))[0]).all()


def test_norms_of_extremes():
    """float16 keys whose squares overflow in float16."""
    x = jnp.full((1, 8), 6e4, jnp.float16)
    np.testing.assert_allclose(l2_normalize(x), np.full((1, 8), 8**-0.5), rtol=1e-3)
    y = apply(RMSNorm(), {"scale": np.ones(8, np.float32)}, x)
    np.testing.assert_allclose(y, np.ones((1, 8)), rtol=1e-3)


def test_l2_normalize():
    x = RNG.normal(size=(2, 3, 4)) * 10.0 ** RNG.integers(-4, 4, (2, 3, 1))
    with jax.enable_x64(True):
        y = l2_normalize(jnp.asarray(x))
    np.testing.assert_allclose(y, np.apply_along_axis(unit, -1, x), rtol=1e-12)
    assert l2_normalize(jnp.ones(3, jnp.bfloat16)).dtype == jnp.bfloat16


@pytest.mark.parametrize(("width", "use_bias"), [(1, False), (4, True)])
def test_short_conv(width, use_bias):
    """The convolution with its bias, in two calls that hand the tail on."""
    params = {"kernel": RNG.normal(size=(width, 6)), "bias": RNG.normal(size=6)}
    bias = params["bias"] if use_bias else 0.0
    params = params if use_bias else {"kernel": params["kernel"]}
    x = RNG.normal(size=(1, 9, 6))
    module = ShortConv(width, 6, use_bias=use_bias)
    with jax.enable_x64(True):
        first, tail = apply(module, params, x[:, :2], conv_tail(1, width, 6, jnp.float64), None)
        second, tail = apply(module, params, x[:, 2:], tail, None)
    got = np.concatenate([first[0], second[0]])
    np.testing.assert_allclose(got, short_conv(x[0], params["kernel"], bias), rtol=0, atol=1e-12)
    np.testing.assert_array_equal(tail[0], x[0, 9 - (width - 1) :])


def test_short_conv_with_a_residual():
    """x + conv(x), activated."""
    x, kernel = RNG.normal(size=(1, 5, 6)), RNG.normal(size=(3, 6))
    with jax.enable_x64(True):
        module, tail = ShortConv(3, 6, residual=True), conv_tail(1, 3, 6, jnp.float64)
        got, _ = apply(module, {"kernel": kernel}, x, tail, None)
    want = silu(x[0] + short_conv(x[0], kernel, activation=None))
    np.testing.assert_allclose(got[0], want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("layer", [DeltaNet, GatedLinearAttention, HGRN2])
def test_a_residual_convolution_of_nothing_is_none(layer):
    """conv_residual with a kernel of zeros is the layer without a convolution."""
    x = RNG.normal(size=(2, 7, 16)).astype(np.float32)
    plain = layer(16, conv_width=0)
    params = plain.init(jax.random.key(0), x)["params"]
    channels = plain.clone(conv_width=4).init_state(1).conv.shape[-1]
    conv = {"conv": {"kernel": np.zeros((4, channels), np.float32)}}
    y, _ = apply(plain.clone(conv_width=4, conv_residual=True), params | conv, x)
    np.testing.assert_allclose(y, apply(plain, params, x)[0], rtol=0, atol=1e-6)


def test_short_conv_of_width_zero():
    """No convolution, no parameters, the activation and the tail as they were."""
    x, tail = RNG.normal(size=(1, 5, 6)).astype(np.float32), conv_tail(1, 0, 6, jnp.float32)
    assert tail.shape == (1, 0, 6)
    module = ShortConv(0, 6, use_bias=True)
    assert not module.init(jax.random.key(0), x, tail, None)
    y, after = module.apply({}, x, tail, None)
    np.testing.assert_allclose(y, silu(x), rtol=1e-5)
    assert after is tail
    y, _ = ShortConv(0, 6, activation=None).apply({}, x, tail, None)
    np.testing.assert_array_equal(y, x)


def test_short_conv_starts():
    module = ShortConv(4, 200, use_bias=True)
    x = jnp.zeros((1, 1, 200))
    make = functools.partial(module.init, segment_ids=None)
    params = jax.jit(make)(jax.random.key(0), x, conv_tail(1, 4, 200, jnp.float32))["params"]
    for leaf in jax.tree.leaves(params):
        assert 0.48 < leaf.max() <= 0.5 and -0.5 <= leaf.min() < -0.48
        np.testing.assert_allclose(np.std(leaf), 0.5 / 3**0.5, rtol=0.1)
    with pytest.raises(ValueError, match="conv_width: .* got -1"):
        conv_tail(1, -1, 2, jnp.float32)


def test_mamba_gate():
    params = {"A_log": RNG.normal(size=3), "dt_bias": RNG.normal(size=3)}
    x = 3 * RNG.normal(size=(2, 5, 3))
    dt = softplus(x + params["dt_bias"])
    with jax.enable_x64(True):
        got, log_decay = apply(MambaGate(3), params, x)
        clipped, slower = apply(MambaGate(3), params, x, (0.5, 2.0))
    np.testing.assert_allclose(got, dt, rtol=1e-12)
    np.testing.assert_allclose(log_decay, -np.exp(params["A_log"]) * dt, rtol=1e-12)
    np.testing.assert_allclose(clipped, np.minimum(np.maximum(dt, 0.5), 2.0), rtol=1e-12)
    np.testing.assert_allclose(slower, -np.exp(params["A_log"]) * np.asarray(clipped), rtol=1e-12)


def test_mamba_gate_is_float32():
    """bfloat16 projections lose no more than they have lost, at steps of a thousandth too."""
    params = {"A_log": np.zeros(1, np.float32), "dt_bias": np.full(1, -6.9, np.float32)}
    dt, log_decay = apply(MambaGate(1), params, jnp.zeros((1, 1, 1), jnp.bfloat16))
    assert dt.dtype == log_decay.dtype == jnp.float32
    np.testing.assert_allclose(dt, [[[softplus(-6.9)]]], rtol=1e-5)


@pytest.mark.parametrize(("low", "high"), [(0.0, 16.0), (1.0, 16.0)])
def test_mamba_gate_starts(low, high):
    """A uniform, dt log-uniform in [0.001, 0.1], never below 0.0001, and the bias gives dt back."""
    make = jax.jit(MambaGate(4096, a_min=low, a_max=high).init)
    params = make(jax.random.key(0), jnp.zeros((1, 1, 4096)))["params"]
    rate = np.exp(np.asarray(params["A_log"], np.float64))
    dt = np.log10(softplus(np.asarray(params["dt_bias"], np.float64)))
    for values, least, most in ((rate, low, high), (dt, -3.0, -1.0)):
        quarters = np.quantile(values, [0, 0.25, 0.5, 0.75, 1])
        want = np.linspace(least, most, 5)
        np.testing.assert_allclose(quarters, want, rtol=0, atol=0.03 * (most - least))


def test_heads():
    x = np.arange(24.0).reshape(1, 2, 12)
    parts = split_heads(x, 3)
    np.testing.assert_array_equal(parts[0, 1, 2], [20, 21, 22, 23])
    np.testing.assert_array_equal(merge_heads(parts), x)


def test_rotary_products_depend_on_distance():
    query, key = RNG.normal(size=(2, 1, 1, 1, 8))
    with jax.enable_x64(True):
        turned = [
            [
                float(
                    jnp.vdot(
                        rotate(query, np.array([[i]]), 50.0), rotate(key, np.array([[j]]), 50.0)
                    )
                )
                for i, j in pairs
            ]
            for pairs in (((0, 0), (5, 5)), ((3, 1), (40, 38)), ((9, 2), (1007, 1000)))
        ]
    for first, second in turned:
        np.testing.assert_allclose(first, second, rtol=1e-9)
    np.testing.assert_allclose(turned[0][0], np.vdot(query, key), rtol=1e-12)
    assert abs(turned[1][0] - turned[0][0]) > 1e-3


def test_rotary_angles_are_float32_in_bfloat16():
    """At position 4,097 an angle rounded to bfloat16 would be off by whole radians."""
    x = jnp.ones((1, 1, 1, 2), jnp.bfloat16)
    y = rotate(x, jnp.array([[4097]]), 10_000.0)
    assert y.dtype == jnp.bfloat16
    want = [np.cos(4097) - np.sin(4097), np.sin(4097) + np.cos(4097)]
    np.testing.assert_allclose(np.asarray(y, np.float64)[0, 0, 0], want, rtol=2**-7)


def some_state(layer, segment):
    empty = layer.init_state(len(segment))
    state = jax.tree.map(lambda a: jnp.ones_like(a), empty)
    return state.replace(segment=jnp.array(segment, jnp.int32)), empty


@pytest.mark.parametrize(
    ("ids", "restarts"),
    [
        (None, [0, 0, 0, 0]),
        ([[3, 4], [3, 3], [3, 3], [-1, -1]], [0, 1, 0, 0]),
        ([[-1, 3], [-1, 7], [-1, 9], [7, 7]], [0, 0, 0, 0]),
        ([[5, 3], [-1, 3], [0, 0], [0, 7]], [1, 1, 0, 1]),
    ],
)
def test_enter(ids, restarts):
    """Rows whose first valid id is not the state's start afresh; a state without an id goes on."""
    layer = DeltaNet(16, heads=2)
    state, empty = some_state(layer, [3, 7, -1, 7])
    ids = None if ids is None else jnp.array(ids, jnp.int32)
    entered = enter(state, empty, ids)
    for row, restart in enumerate(restarts):
        want = empty if restart else state
        jax.tree.map(lambda a, b, i=row: np.testing.assert_array_equal(a[i], b[i]), entered, want)
    assert enter(None, empty, ids) is empty


def test_leave():
    state, _ = some_state(DeltaNet(16, heads=2), [3, 7, -1])
    ids = jnp.array([[3, 4], [-1, -1], [2, -1]], jnp.int32)
    np.testing.assert_array_equal(leave(state, ids), [4, 7, 2])
    np.testing.assert_array_equal(leave(state, None), [3, 7, -1])


def test_check_like():
    layer = DeltaNet(16, heads=2)
    with pytest.raises(ValueError, match=r"state\.memory: expected shape \[3, 2, 8, 8\], got \[2,"):
        check_like(layer.init_state(2), layer.init_state(3))
    with pytest.raises(ValueError, match="state: expected DeltaNetState, got tuple"):
        check_like((1, 2), layer.init_state(3))


def test_bad_inputs():
    layer = DeltaNet(16, heads=2)
    x = jnp.zeros((2, 3, 16))
    params = jax.eval_shape(layer.init, jax.random.key(0), x)
    for bad, message in (
        (jnp.zeros((2, 3, 15)), r"x: expected \[batch, time, features\] = \[any, any, 16\]"),
        (jnp.zeros((3, 16)), r"x: .* got shape \[3, 16\]"),
        (jnp.zeros((2, 3, 16), jnp.int32), "x: expected a floating-point array, got dtype int32"),
    ):
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(layer.apply, params, bad)
    for ids, message in (
        (jnp.zeros((2, 4), jnp.int32), r"segment_ids: expected \[batch, time\] = \[2, 3\]"),
        (jnp.zeros((2, 3)), r"segment_ids: expected int32 \[batch, time\], got float32"),
    ):
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(functools.partial(layer.apply, segment_ids=ids), params, x)
