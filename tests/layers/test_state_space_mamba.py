"""Mamba against its equations, step by step."""

import jax.numpy as jnp
import numpy as np
import pytest

from memseq.layers import Mamba
from tests.layers.harness import (
    FEATURES,
    IDS,
    check_dtypes,
    check_transcription,
    count,
    init,
    inputs,
    random_params,
    run64,
    short_conv,
    silu,
    softplus,
)


def mamba(layer, params, x):
    """h = exp(dt A) h + dt u B, y = C . h + D u, out = y * silu(z), A = -exp(A_log)."""
    u = x @ params["input"]["kernel"]
    if "conv" in params:
        u = short_conv(u, params["conv"]["kernel"], params["conv"]["bias"])
    else:
        u = silu(u)
    step = u @ params["step_in"]["kernel"] @ params["step_size"]["kernel"] + params["dt_bias"]
    dt, rate = softplus(step), -np.exp(params["A_log"])
    memory, y = np.zeros(rate.shape), []
    for t in range(len(x)):
        b, c = (u[t] @ params[name]["kernel"] for name in ("key", "query"))
        for channel in range(len(rate)):
            kept = np.exp(dt[t, channel] * rate[channel])
            memory[channel] = kept * memory[channel] + dt[t, channel] * u[t, channel] * b
        gated = (memory @ c + params["D"] * u[t]) * silu(x[t] @ params["gate"]["kernel"])
        y.append(gated @ params["output"]["kernel"])
    return np.array(y), memory, {"mean_dt": dt}


CASES = {
    "default": {},
    "small": {"expand": 1, "state_dim": 3, "dt_rank": 5, "conv_width": 0},
}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_mamba(options):
    check_transcription(Mamba(FEATURES, **options), mamba)


def test_mamba_packed():
    check_transcription(Mamba(FEATURES, state_dim=4), mamba, IDS)


def test_discretisation_is_of_first_order():
    """Constant input, halving dt: the error against the exact solution halves (Euler's B)."""
    errors = []
    for steps in (64, 128, 256):
        layer = Mamba(FEATURES, expand=1, state_dim=2, conv_width=0, implementation="reference")
        params = random_params(layer)
        dt = 1.0 / steps
        params["step_size"]["kernel"] *= 0
        params["dt_bias"] = np.full(FEATURES, np.log(np.expm1(dt)))
        x = np.repeat(inputs(time=1, batch=1), steps, axis=1)
        _, state, _ = run64(layer, params, x)
        u = silu(x[0, 0] @ params["input"]["kernel"])
        b, rate = u @ params["key"]["kernel"], -np.exp(params["A_log"])
        exact = np.expm1(rate) / rate * u[:, None] * b
        errors.append(np.abs(state.memory[0] - exact).max())
    slopes = np.log2(np.divide(errors[:-1], errors[1:]))
    np.testing.assert_allclose(slopes, 1.0, atol=0.05)


def test_starts():
    """A = -1 to -N, dt log-uniform in [0.001, 0.1], D one, the step size's map in its bounds."""
    params = init(Mamba(128))
    np.testing.assert_allclose(
        np.exp(params["A_log"]), np.tile(np.arange(1, 17.0), (256, 1)), rtol=1e-6
    )
    step = softplus(np.asarray(params["dt_bias"], np.float64))
    assert 0.0009 < step.min() < 0.002 and 0.05 < step.max() < 0.101
    np.testing.assert_allclose(np.median(np.log(step)), np.log(0.01), atol=0.4)
    np.testing.assert_array_equal(params["D"], 1)
    kernel = np.asarray(params["step_size"]["kernel"])
    assert kernel.shape == (8, 256) and 0.34 < np.abs(kernel).max() <= 8**-0.5


def test_defaults():
    layer = Mamba(32)
    assert layer.init_state(3).memory.shape == (3, 64, 16)
    assert layer.init_state(3).conv.shape == (3, 3, 64)
    sizes = 2 * 32 * 64 + 5 * 64 + 64 * 2 + 2 * 64 + 2 * 64 * 16 + 64 * 16 + 2 * 64 + 64 * 32
    assert count(layer, 32) == sizes


def test_dtypes():
    assert check_dtypes(Mamba(32)).memory.dtype == jnp.float32


@pytest.mark.parametrize("name", ["expand", "state_dim", "dt_rank"])
def test_bad_options(name):
    with pytest.raises(ValueError, match=f"{name}: .* got 0"):
        count(Mamba(FEATURES, **{name: 0}))
