"""The TPU kernels of `causal_conv`, run by the interpreter, against the reference form."""

from unittest import mock

import jax
import numpy as np
import pytest

from memseq.pallas_kernels.causal_conv import causal_conv, mosaic_tpu
from tests.pallas_kernels.harness import (
    assert_same,
    check_kernel,
    check_kernel_16_bit,
    cotangents_like,
    interpreted,
    packed_ids,
    with_gradients,
)

# sizes at which a short call already has several parts, chunks and grid steps
SMALL = {"WORK": 2**14, "BLOCK_SIZE": 2**13}


def build(time, width, activation, longest=None, bias=True, batch=2, channels=5):
    rng = np.random.default_rng(0)
    inputs = {
        "x": rng.normal(size=(batch, time, channels)),
        "kernel": rng.normal(size=(width, channels)),
        "initial_state": rng.normal(size=(batch, width - 1, channels)),
    }
    if bias:
        inputs["bias"] = rng.normal(size=channels)
    options = {"activation": activation}
    if longest is not None:
        options["segment_ids"] = packed_ids(rng, batch, time, longest)
    return inputs, options, rng


@pytest.fixture(autouse=True)
def small():
    with mock.patch.multiple(mosaic_tpu, **SMALL):
        yield


CASES = {
    "one tap, no bias": build(16, 1, None, bias=False),
    "two taps, packed": build(97, 2, "gelu", 6, bias=False, batch=3),
    "four taps, parts of the channels": build(97, 4, "silu", channels=300),
    "four taps, long, packed": build(300, 4, "relu", 80, batch=3, channels=130),
    "more taps than sublanes": build(33, 11, None, 5),
    "more taps than steps": build(3, 20, "silu"),
}


@pytest.mark.parametrize("name", CASES)
def test_tpu_kernels(name):
    check_kernel(causal_conv, *CASES[name])


@pytest.mark.slow
@pytest.mark.parametrize("time", [16, 97, 300])
@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("longest", [None, 3, 40])
@pytest.mark.parametrize("activation", [None, "silu", "gelu", "relu"])
@pytest.mark.parametrize("bias", [True, False])
def test_tpu_kernels_everywhere(time, width, longest, activation, bias):
    case = build(time, width, activation, longest, bias, batch=3, channels=130)
    check_kernel(causal_conv, *case)


def test_tpu_kernels_with_16_bit_inputs():
    """The state is of the inputs' dtype too."""
    case = build(97, 4, "silu", 40, batch=3)
    check_kernel_16_bit(causal_conv, *case, 64, wide=())


def test_the_future_and_other_rows_change_nothing():
    inputs, options, rng = build(97, 4, "silu", 30)
    inputs = {k: x.astype(np.float32) for k, x in inputs.items()}
    shapes = jax.eval_shape(lambda x: causal_conv(**x, **options), inputs)
    cotangents = cotangents_like(rng, shapes)
    cotangents = (np.where(np.arange(97)[:, None] < 50, cotangents[0], 0), 0 * cotangents[1])
    changed = inputs | {"x": inputs["x"].copy()}
    changed["x"][:, 50:] *= -3
    changed["x"][1:, :50] += 1
    call = with_gradients(lambda x: causal_conv(**x, **options, implementation="mosaic_tpu"))
    with interpreted():
        run = jax.jit(call)
        (y, _), gradients = run(inputs, cotangents)
        (other, _), others = run(changed, cotangents)
    assert (np.asarray(y)[:, 50:] != np.asarray(other)[:, 50:]).any()
    assert_same(other[0, :50], y[0, :50])
    assert_same(others["x"][0, :50], gradients["x"][0, :50])
    assert_same(gradients["x"][:, 50:], np.zeros_like(gradients["x"][:, 50:]))


def test_what_the_kernels_do_not_take():
    inputs, _, _ = build(16, 65, None)
    with pytest.raises(ValueError, match="the kernel is 65 wide, the TPU kernels take up to 64"):
        causal_conv(**inputs, implementation="mosaic_tpu")
    inputs, _, _ = build(16, 4, None)
    with jax.enable_x64(True):
        wide = inputs | {"bias": np.zeros(5)}
        with pytest.raises(ValueError, match="compute in float32, got an input of float64"):
            causal_conv(**wide, implementation="mosaic_tpu")
