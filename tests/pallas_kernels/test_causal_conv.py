"""`causal_conv`: its forms against the equations, packed, padded and continued."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memseq.pallas_kernels import causal_conv
from memseq.pallas_kernels.causal_conv.shapes import SHAPES, example
from tests.pallas_kernels import oracles
from tests.pallas_kernels.harness import check_16_bit, check_agreement, packed_ids


def build(time, width, longest=None, batch=3, channels=5, **options):
    rng = np.random.default_rng(0)
    inputs = {
        "x": rng.normal(size=(batch, time, channels)),
        "kernel": rng.normal(size=(width, channels)),
        "bias": rng.normal(size=channels),
        "initial_state": rng.normal(size=(batch, width - 1, channels)),
    }
    if longest is not None:
        options["segment_ids"] = packed_ids(rng, batch, time, longest)
    return inputs, options, rng


CASES = {
    "one step": build(1, 4, activation="silu"),
    "one tap": build(5, 1, 3),
    "more taps than steps": build(2, 7, activation="relu"),
    "segments shorter than the kernel": build(65, 5, 3, activation="silu"),
    "segments and padding": build(97, 4, 20, activation="gelu"),
    "long": build(500, 4, batch=1),
}


@pytest.mark.parametrize("name", CASES)
def test_forms_agree(name):
    inputs, options, rng = CASES[name]
    check_agreement(causal_conv, oracles.causal_conv, inputs, options, rng)


@pytest.mark.slow
@pytest.mark.parametrize("time", [1, 2, 63, 64, 65, 97, 500])
@pytest.mark.parametrize("width", [1, 2, 4, 9])
@pytest.mark.parametrize("longest", [None, 3, 40])
@pytest.mark.parametrize("activation", [None, "silu", "gelu", "relu"])
def test_forms_agree_everywhere(time, width, longest, activation):
    inputs, options, rng = build(time, width, longest, activation=activation)
    check_agreement(causal_conv, oracles.causal_conv, inputs, options, rng)


def test_16_bit_inputs():
    inputs, options, rng = build(97, 4, 20, activation="silu")
    check_16_bit(causal_conv, inputs, options, rng)


def test_state_is_in_the_dtype_of_x():
    inputs, options, _ = build(9, 4, 3)
    inputs["x"] = jnp.asarray(inputs["x"], jnp.bfloat16)
    for form in ("reference", "chunked"):
        y, state = jax.eval_shape(
            lambda x, f=form: causal_conv(**x, **options, implementation=f), inputs
        )
        assert y.dtype == state.dtype == jnp.bfloat16
        assert state.shape == inputs["initial_state"].shape


def test_state_holds_the_last_valid_inputs():
    x = np.arange(1.0, 8.0, dtype=np.float32).reshape(1, 7, 1)
    ids = np.array([[0, 0, 1, 1, -1, 1, -1]], np.int32)
    for form in ("reference", "chunked"):
        _, state = causal_conv(x, np.ones((5, 1)), segment_ids=ids, implementation=form)
        np.testing.assert_array_equal(state[0, :, 0], [0, 3, 4, 6])
        _, state = causal_conv(x, np.ones((3, 1)), segment_ids=ids, implementation=form)
        np.testing.assert_array_equal(state[0, :, 0], [4, 6])


def test_only_padding_leaves_the_state():
    inputs, options, _ = build(6, 4)
    inputs = {k: v.astype(np.float32) for k, v in inputs.items()}
    ids = np.full((3, 6), -1, np.int32)
    for form in ("reference", "chunked"):
        y, state = causal_conv(**inputs, segment_ids=ids, implementation=form)
        np.testing.assert_array_equal(y, np.zeros_like(y))
        np.testing.assert_array_equal(state, inputs["initial_state"])


BAD = {
    "x: expected [batch, time, channels] = [any, any, any], got shape [2, 5]": {
        "x": np.zeros((2, 5), np.float32)
    },
    "x: expected a floating-point array, got dtype int32": {"x": np.zeros((2, 5, 3), np.int32)},
    "kernel: expected [width, channels] = [any, 3], got shape [4, 2]": {"kernel": np.ones((4, 2))},
    "kernel: expected at least one tap, got width 0": {"kernel": np.ones((0, 3), np.float32)},
    "bias: expected [channels] = [3], got shape [1]": {"bias": np.ones(1, np.float32)},
    "activation: expected one of None, 'silu', 'gelu', 'relu', got 'silo'; did you mean 'silu'?": {
        "activation": "silo"
    },
    "initial_state: expected [batch, width - 1, channels] = [2, 3, 3], got shape [2, 4, 3]": {
        "initial_state": np.zeros((2, 4, 3), np.float32)
    },
    "segment_ids: expected [batch, time] = [2, 5], got shape [2, 4]": {
        "segment_ids": np.zeros((2, 4), np.int32)
    },
    "implementation: causal_conv has no form 'mosaic_gpu' yet; it has reference, chunked": {
        "implementation": "mosaic_gpu"
    },
}


@pytest.mark.parametrize("message", BAD, ids=[m.partition(":")[0] for m in BAD])
def test_bad_input(message):
    good = {"x": np.zeros((2, 5, 3), np.float32), "kernel": np.ones((4, 3), np.float32)}
    with pytest.raises(ValueError) as error:
        causal_conv(**good | BAD[message])
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("name", SHAPES)
def test_named_shapes(name):
    shape = SHAPES[name]
    arrays = jax.eval_shape(lambda: example(shape, jax.random.key(0), jnp.bfloat16))
    y, state = jax.eval_shape(lambda arrays: causal_conv(**arrays), arrays)
    assert y.shape == (shape.batch, shape.time, shape.channels)
    assert state.shape == (shape.batch, shape.width - 1, shape.channels)
    assert y.dtype == state.dtype == jnp.bfloat16
