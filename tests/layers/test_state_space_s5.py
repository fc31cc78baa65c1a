"""S5, causal and in both directions, against its equations, step by step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memseq.layers import S4D, S5, BidirectionalS5
from memseq.layers.state_space import hippo
from tests.layers.harness import (
    FEATURES,
    IDS,
    check_dtypes,
    check_transcription,
    count,
    gated_linear_unit,
    init,
    inputs,
    random_params,
    run64,
)


def states(params, x, interval=None):
    """h = exp(dt A) h + (exp(dt A) - 1) / A (B x), complex [time, modes], and exp(dt A)."""
    modes = params["modes"]
    a = -np.exp(modes["decay"]) + 1j * modes["phase"]
    real, imag = np.split(modes["write"]["kernel"], 2, axis=1)
    h, found, decays = np.zeros(len(a), complex), [], []
    for t, u in enumerate(x):
        dt = np.exp(modes["dt_log"]) * (1 if interval is None else interval[t])
        kept = np.exp(dt * a)
        h = kept * h + (kept - 1) / a * (u @ (real + 1j * imag))
        found.append(h)
        decays.append(abs(kept))
    return np.array(found), np.array(decays)


def read(params, h, x):
    """Real and imaginary parts side by side, read; then skip and gated linear unit."""
    y = h @ params["read"]["kernel"] + params["D"] * x
    return gated_linear_unit(params, y)


def parts(h):
    return np.concatenate([h.real, h.imag], axis=-1)


def s5(layer, params, x):
    h, decays = states(params, x)
    return read(params, parts(h), x), parts(h[-1]), {"mean_decay": decays}


@pytest.mark.parametrize("ids", [None, IDS], ids=["one segment", "packed"])
@pytest.mark.parametrize("options", [{}, {"state_dim": 6, "blocks": 1, "glu": False}])
def test_s5(options, ids):
    check_transcription(S5(FEATURES, **options), s5, ids)


def test_irregular_times():
    layer = S5(FEATURES, state_dim=8, blocks=2)
    params, x = random_params(layer), inputs()
    interval = np.random.default_rng(2).exponential(size=x.shape[:2])
    with jax.enable_x64(True):
        y, state = jax.jit(layer.apply)({"params": params}, x, interval=interval)
    for row in range(2):
        h, _ = states(params, x[row], interval[row])
        np.testing.assert_allclose(y[row], read(params, parts(h), x[row]), rtol=0, atol=1e-9)
        np.testing.assert_allclose(state.memory[row], parts(h[-1]), rtol=0, atol=1e-9)


def test_a_held_input_may_be_one_long_step():
    """Three steps with one input are one step of three times the length."""
    layer = S5(FEATURES, state_dim=8, blocks=2)
    params, x = random_params(layer), inputs(batch=1)
    with jax.enable_x64(True):
        _, once = layer.apply({"params": params}, x, interval=np.full((1, 21), 3.0))
        _, held = layer.apply({"params": params}, np.repeat(x, 3, axis=1))
    np.testing.assert_allclose(once.memory, held.memory, rtol=0, atol=1e-9)


@pytest.mark.parametrize("masked", [False, True])
def test_both_directions(masked):
    layer = BidirectionalS5(FEATURES, state_dim=8, blocks=2)
    x = inputs()
    params = random_params(layer)
    mask = np.random.default_rng(3).random(x.shape[:2]) < (0.7 if masked else 2)
    with jax.enable_x64(True):
        y = jax.jit(layer.apply)({"params": params}, x, mask if masked else None)
    own = params["s5"]
    for row in range(2):
        taken = x[row, mask[row]]
        ahead, back = states(own, taken)[0], states(own, taken[::-1])[0][::-1]
        both = np.concatenate([parts(ahead), parts(back)], axis=1)
        want = read(own, both, taken)
        np.testing.assert_allclose(y[row, mask[row]], want, rtol=0, atol=1e-9)
        np.testing.assert_array_equal(y[row, ~mask[row]], 0)


def test_one_channel_a_block_is_s4d():
    """B and C that keep channels apart: S4D with C B as its C."""
    layer = S5(FEATURES, state_dim=4 * FEATURES, blocks=FEATURES, glu=False)
    other = S4D(FEATURES, state_dim=4, glu=False)
    params, x, rng = random_params(layer), inputs(), np.random.default_rng(4)
    rate, turn = rng.normal(size=(2, FEATURES, 2))
    step = rng.normal(size=(FEATURES, 1))
    b, c = rng.normal(size=(2, FEATURES, 2)) + 1j * rng.normal(size=(2, FEATURES, 2))
    params["modes"]["decay"], params["modes"]["phase"] = rate.ravel(), turn.ravel()
    params["modes"]["dt_log"] = np.repeat(step, 2, axis=1).ravel()
    apart = np.kron(np.eye(FEATURES), np.ones((1, 2)))  # [features, modes]
    write = apart * b.ravel()
    params["modes"]["write"]["kernel"] = parts(write)
    out = (apart * c.ravel()).T
    params["read"]["kernel"] = np.concatenate([2 * out.real, -2 * out.imag])
    own = {"decay": rate, "phase": turn, "dt_log": step, "C": parts(b * c), "D": params["D"]}
    y, _, _ = run64(layer, params, x)
    np.testing.assert_allclose(y, run64(other, own, x)[0], rtol=0, atol=1e-9)


def test_starts():
    """HiPPO's modes in every block; what a mode reads and writes is real in HiPPO's coordinates."""
    params = init(S5(64, state_dim=32, blocks=2))
    values, vectors = hippo.diagonalize("legs", 16)
    np.testing.assert_allclose(params["modes"]["phase"], np.tile(values.imag[8:], 2), rtol=1e-5)
    np.testing.assert_allclose(np.exp(params["modes"]["decay"]), 0.5, rtol=1e-6)
    dt = np.exp(np.asarray(params["modes"]["dt_log"]))
    assert 1e-3 <= dt.min() and dt.max() <= 0.1001
    real, imag = np.split(np.asarray(params["modes"]["write"]["kernel"], np.float64), 2, axis=1)
    upper = (real + 1j * imag)[:, :8]
    b = 2 * (upper @ vectors[:, 8:].T).real  # both halves of the spectrum together
    np.testing.assert_allclose(b @ vectors[:, 8:].conj(), upper, atol=1e-5)
    np.testing.assert_allclose(b.var(), 1 / 64, rtol=0.15)
    assert params["read"]["kernel"].shape == (32, 64)


def test_defaults():
    assert S5(32).init_state(3).memory.shape == (3, 64)
    sizes = 3 * 32 + 2 * 32 * 64 + 32 + 2 * (32 * 32 + 32)
    assert count(S5(32), 32) == sizes
    assert count(BidirectionalS5(32), 32) == sizes + 64 * 32


def test_dtypes():
    assert check_dtypes(S5(32)).memory.dtype == jnp.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"state_dim": 12}, r"state_dim: expected a multiple of 2 \* blocks = 8, got 12"),
        ({"blocks": 0}, "blocks: .* got 0"),
        ({"rate": "relu"}, "rate: .* got 'relu'"),
        ({"dt_min": 1.0}, "dt_min: .* got 1.0 and 0.1"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        count(S5(FEATURES, **options))


def test_bad_arguments():
    x = jnp.zeros((2, 5, FEATURES))
    with pytest.raises(ValueError, match=r"interval: expected \[batch, time\]"):
        jax.eval_shape(lambda: S5(FEATURES).init(jax.random.key(0), x, interval=jnp.ones((2, 4))))
    with pytest.raises(ValueError, match=r"mask: expected bool \[batch, n\] = \[2, 5\]"):
        mask = jnp.ones((2, 4), bool)
        jax.eval_shape(lambda: BidirectionalS5(FEATURES).init(jax.random.key(0), x, mask))
