"""The linear recurrent unit against its equations, step by step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memseq.layers import LRU
from tests.layers.harness import (
    FEATURES,
    IDS,
    check_dtypes,
    check_transcription,
    count,
    gated_linear_unit,
    init,
    run64,
)


def lru(layer, params, x):
    """h = lambda h + gain B x, y = Re(C h) + D x; B and C complex by halves."""
    modulus = np.exp(-np.exp(params["decay_log"]))
    turn = modulus * np.exp(1j * np.exp(params["phase_log"]))
    write, read = params["write"]["kernel"], params["read"]["kernel"]
    size = len(turn)
    b = (write[:, :size] + 1j * write[:, size:]).T
    c = (read[:size] - 1j * read[size:]).T
    h, y = np.zeros(size, complex), []
    for u in x:
        h = turn * h + np.exp(params["gain_log"]) * (b @ u)
        y.append((c @ h).real + params["D"] * u)
    memory = np.stack([h.real, h.imag], axis=-1)
    return gated_linear_unit(params, np.array(y)), memory, {"mean_decay": modulus}


@pytest.mark.parametrize("ids", [None, IDS], ids=["one segment", "packed"])
@pytest.mark.parametrize("options", [{}, {"state_dim": 5, "glu": False}])
def test_lru(options, ids):
    check_transcription(LRU(FEATURES, **options), lru, ids)


def test_eigenvalues_start_uniform_on_the_ring():
    """|lambda|^2 uniform (Kolmogorov-Smirnov), phases uniform, gain keeps white noise's size."""
    layer = LRU(16, state_dim=4096, r_min=0.5, r_max=0.9, max_phase=3.0)
    params = jax.tree.map(lambda a: np.asarray(a, np.float64), init(layer))
    modulus = np.exp(-np.exp(params["decay_log"]))
    for values, low, high in (
        (modulus**2, 0.25, 0.81),
        (np.exp(params["phase_log"]), 0.0, 3.0),
    ):
        share = (np.sort(values) - low) / (high - low)
        assert np.abs(share - (np.arange(4096) + 0.5) / 4096).max() < 0.02
    np.testing.assert_allclose(np.exp(2 * params["gain_log"]), 1 - modulus**2, rtol=1e-4)


def test_white_noise_keeps_its_size():
    layer = LRU(16, state_dim=64, r_min=0.4, r_max=0.95, implementation="chunked")
    params = init(layer)
    x = np.random.default_rng(0).normal(size=(32, 300, 16))
    _, state, _ = run64(layer, params, x)
    power = np.sum(np.square(state.memory), axis=-1) / np.sum(
        np.square(np.asarray(params["write"]["kernel"])).reshape(16, 2, 64), axis=(0, 1)
    )
    np.testing.assert_allclose(power.mean(), 1.0, atol=0.05)


@pytest.mark.parametrize("value", [-60.0, 0.0, 3.0])
def test_it_is_stable_for_all_parameters(value):
    layer = LRU(16, implementation="chunked")
    params = init(layer) | {"decay_log": jnp.full(16, value)}
    y, state = jax.jit(layer.apply)({"params": params}, jnp.ones((1, 200, 16)))
    assert np.isfinite(y).all() and np.isfinite(state.memory).all()
    assert np.abs(np.asarray(state.memory)).max() < 400


def test_defaults():
    assert LRU(32).init_state(3).memory.shape == (3, 32, 2)
    assert count(LRU(32), 32) == 3 * 32 + 2 * 32 * 64 + 32 + 2 * (32 * 32 + 32)


def test_dtypes():
    assert check_dtypes(LRU(32)).memory.dtype == jnp.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r_min": 0.9, "r_max": 0.5}, "r_min: .* got 0.9 and 0.5"),
        ({"r_max": 1.5}, "r_min: .* got 0.0 and 1.5"),
        ({"max_phase": 0.0}, "max_phase: .* got 0.0"),
        ({"state_dim": 0}, "state_dim: .* got 0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        count(LRU(FEATURES, **options))
