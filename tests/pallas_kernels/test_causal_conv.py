"""`causal_conv`: its forms against the equations, packed, padded and continued."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memseq.pallas_kernels import causal_conv
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
