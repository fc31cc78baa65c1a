"""Mamba against its equations, step by step."""

import jax.numpy as jnp
import numpy as np
import pytest

from memseq.layers import Mamba, PolarizedMamba
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
        taps = params["conv"]["kernel"].copy()
        taps[-1] += layer.mimetic
        u = short_conv(u, taps, params["conv"]["bias"])
    else:
        u = silu(u)
    step = u @ params["step_in"]["kernel"] @ params["step_size"]["kernel"] + params["dt_bias"]
    dt, rate = softplus(step), -np.exp(params["A_log"])
    memory, y = np.zeros(rate.shape), []
    total, weight = np.zeros(len(rate)), np.zeros(len(rate))
    for t in range(len(x)):
        b, c = (u[t] @ params[name]["kernel"] for name in ("key", "query"))
        kept = 0.0
        if isinstance(layer, PolarizedMamba):  # what is kept for good, as a mean; what passes
            (b, b1, b0), (c, c1, c0) = ((a[:-2], a[-2], a[-1]) for a in (b, c))
            total, weight = total + dt[t] * u[t] * b1, weight + dt[t]
            kept = c1 * total / weight + c0 * b0 * dt[t] * u[t]
        for channel in range(len(rate)):
            decay = np.exp(dt[t, channel] * rate[channel])
            memory[channel] = decay * memory[channel] + dt[t, channel] * u[t, channel] * b
        gated = (memory @ c + kept + params["D"] * u[t]) * silu(x[t] @ params["gate"]["kernel"])
        y.append(gated @ params["output"]["kernel"])
    return np.array(y), memory, {"mean_dt": dt}


CASES = {
    "default": {},
    "small": {"expand": 1, "state_dim": 3, "dt_rank": 5, "conv_width": 0},
    "mimetic": {"state_dim": 2, "mimetic": True},
}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_mamba(options):
    check_transcription(Mamba(FEATURES, **options), mamba)


def test_mamba_packed():
    check_transcription(Mamba(FEATURES, state_dim=4), mamba, IDS)


@pytest.mark.parametrize("ids", [None, IDS], ids=["one segment", "packed"])
def test_polarized_mamba(ids):
    check_transcription(PolarizedMamba(FEATURES, state_dim=3), mamba, ids)


def test_the_channel_that_keeps_all_is_bounded():
    """White noise for 2,000 steps: a mean shrinks, where a plain sum would grow."""
    layer = PolarizedMamba(16, expand=1, state_dim=2, conv_width=0, implementation="chunked")
    x = np.random.default_rng(0).normal(size=(1, 2000, 16))
    params = random_params(layer)
    states = [run64(layer, params, x[:, :steps])[1].kept[0] for steps in (100, 2000)]
    early, late = (np.abs(np.asarray(s)[:, 0] / np.asarray(s)[:, 1]) for s in states)
    assert np.isfinite(late).all() and late.max() < 3 and late.mean() < early.mean() + 1


def test_mimetic_start():
    """Next to no decay, and C's projection correlated with B's."""
    params = init(Mamba(64, mimetic=True))
    step = softplus(np.asarray(params["dt_bias"], np.float64))
    np.testing.assert_allclose(step, 1, rtol=1e-5)
    np.testing.assert_allclose(np.exp(-step[:, None] * np.exp(params["A_log"])), 0.999, rtol=1e-4)
    b, c = (np.asarray(params[name]["kernel"]).ravel() for name in ("key", "query"))
    np.testing.assert_allclose(np.corrcoef(b, c)[0, 1], 0.5**0.5, atol=0.05)
    b, c = (np.asarray(init(Mamba(64))[name]["kernel"]).ravel() for name in ("key", "query"))
    assert abs(np.corrcoef(b, c)[0, 1]) < 0.1


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
        errors.append(np.abs(np.asarray(state.memory)[0] - exact).max())
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
