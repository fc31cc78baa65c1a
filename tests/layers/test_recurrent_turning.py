"""Memories that turn: FFM and bilinear RNNs against their equations, step by step."""

import jax.numpy as jnp
import numpy as np
import pytest

from memseq.layers import FFM, BilinearRNN, FactoredBilinearRNN
from tests.layers.harness import (
    FEATURES,
    IDS,
    check_dtypes,
    check_transcription,
    count,
    init,
    random_params,
    run64,
    sigmoid,
)


def dense(params, x):
    return x @ params["kernel"] + params.get("bias", 0.0)


def ffm(layer, params, x):
    """S = gamma S + u 1^T; y = LayerNorm(W [Re S, Im S]) g + skip (1 - g)."""
    gamma = np.exp(-np.abs(params["decay"])[:, None] + 1j * params["phase"])
    memory, y = np.zeros(gamma.shape, complex), []
    for u in x:
        write = dense(params["input"], u) * sigmoid(dense(params["input_gate"], u))
        memory = gamma * memory + write[:, None]
        z = dense(params["read"], np.concatenate([memory.real.ravel(), memory.imag.ravel()]))
        z = (z - z.mean()) / np.sqrt(z.var() + 1e-6)
        gate = sigmoid(dense(params["gate"], u))
        y.append(z * gate + dense(params["skip"], u) * (1 - gate))
    decay = np.exp(-np.abs(params["decay"]))
    return np.array(y), np.stack([memory.real, memory.imag], -1), {"mean_decay": decay}


def bilinear(layer, params, x):
    """h = R(theta) h, from (1, 0) in each plane."""
    h, y = None, []
    for u in x:
        theta = dense(params["angle"], u)
        if h is None:
            h = np.stack([np.ones_like(theta), np.zeros_like(theta)])
        turn = np.array([[np.cos(theta), -np.sin(theta)], [np.sin(theta), np.cos(theta)]])
        h = np.einsum("ijp,jp->ip", turn, h)
        y.append(h.reshape(-1) @ params["output"]["kernel"])
    return np.array(y), h.T, {}


def factored(layer, params, x):
    """h = M h / |M h| with M written out."""
    size = layer.units()
    into, back = (
        params[name]["kernel"] if name in params else np.eye(size) for name in ("into", "back")
    )
    h, y = np.full(size, size**-0.5), []
    for u in x:
        matrix = back.T @ np.diag(dense(params["input"], u)) @ into.T
        h = matrix @ h / np.linalg.norm(matrix @ h)
        y.append(h @ params["output"]["kernel"])
    return np.array(y), h, {}


LAYERS = {
    "FFM": (FFM(FEATURES), ffm),
    "FFM, small": (FFM(FEATURES, trace_dim=5, context_dim=2), ffm),
    "bilinear RNN": (BilinearRNN(FEATURES), bilinear),
    "factored": (FactoredBilinearRNN(FEATURES, rank=5, hidden_dim=7), factored),
    "diagonal": (FactoredBilinearRNN(FEATURES, form="diagonal"), factored),
    "bilinear RNN, planes": (BilinearRNN(FEATURES, planes=3), bilinear),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("ids", [None, IDS], ids=["one segment", "packed"])
def test_transcription(name, ids):
    check_transcription(*LAYERS[name], ids)


def test_a_turn_by_pi_counts_parity():
    """x = 0 or 1, an angle of pi x: exact over 4096 steps, packed or not."""
    layer = BilinearRNN(16, planes=1, implementation="chunked")
    params = random_params(layer)
    params["angle"] = {"kernel": np.zeros((16, 1)), "bias": np.zeros(1)}
    params["angle"]["kernel"][0] = np.pi
    params["output"]["kernel"] = np.eye(2, 16)
    bits = np.random.default_rng(0).integers(0, 2, size=(1, 4096))
    x = np.zeros((1, 4096, 16))
    x[..., 0] = bits
    y, _, _ = run64(layer, params, x)
    np.testing.assert_allclose(y[..., 0], 1 - 2 * (np.cumsum(bits, 1) % 2), atol=1e-9)


def test_an_untrained_diagonal_holds_parity():
    """Random factors -2 and 2 for the bit 1: the sign of each unit counts, and sizes stay."""
    layer = FactoredBilinearRNN(16, form="diagonal", hidden_dim=4)
    params = random_params(layer)
    sign = np.array([-2.0, 2.0, -3.0, 0.5])
    params["input"] = {"kernel": np.zeros((16, 4)), "bias": np.ones(4)}
    params["input"]["kernel"][0] = sign - 1
    params["output"]["kernel"] = np.eye(4, 16)
    bits = np.random.default_rng(0).integers(0, 2, size=(1, 2000))
    x = np.zeros((1, 2000, 16))
    x[..., 0] = bits
    y, state, _ = run64(layer, params, x)
    odd = np.cumsum(bits, 1) % 2
    np.testing.assert_array_equal(y[..., 2] > 0, odd == 0)
    np.testing.assert_allclose(np.linalg.norm(y[..., :4], axis=-1), 1, rtol=1e-12)
    first, half, _ = run64(layer, params, x[:, :777])
    rest, last, _ = run64(layer, params, x[:, 777:], half)
    np.testing.assert_allclose(np.concatenate([first, rest], 1), y, rtol=0, atol=1e-12)


def test_starts():
    params = init(FFM(16))
    np.testing.assert_allclose(params["decay"][jnp.array([0, -1])], [np.e, 1e-6], rtol=1e-5)
    np.testing.assert_allclose(
        2 * np.pi / np.asarray(params["phase"]), [1, 342, 683, 1024], rtol=1e-5
    )


def test_defaults():
    assert FFM(32).init_state(3).memory.shape == (3, 32, 4, 2)
    dense_sizes = 2 * (32 * 32 + 32) + (256 * 32 + 32) + 2 * (32 * 32 + 32)
    assert count(FFM(32), 32) == 32 + 4 + dense_sizes
    assert count(BilinearRNN(32), 32) == 32 * 16 + 16 + 32 * 32
    assert count(FactoredBilinearRNN(32), 32) == 4 * 32 * 32 + 32
    assert count(FactoredBilinearRNN(32, form="diagonal"), 32) == 2 * 32 * 32 + 32
    np.testing.assert_array_equal(BilinearRNN(32).init_state(1).memory[0, 0], [1, 0])


@pytest.mark.parametrize("layer", [FFM(32), BilinearRNN(32), FactoredBilinearRNN(32)])
def test_dtypes(layer):
    assert check_dtypes(layer).memory.dtype == jnp.float32


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (FFM(16, trace_dim=0), "trace_dim: .* got 0"),
        (FFM(16, context_dim=0), "context_dim: .* got 0"),
        (BilinearRNN(16, planes=0), "planes: .* got 0"),
        (FactoredBilinearRNN(16, form="tucker"), "form: .* got 'tucker'"),
        (FactoredBilinearRNN(16, rank=0), "rank: .* got 0"),
    ],
)
def test_bad_options(layer, message):
    with pytest.raises(ValueError, match=message):
        count(layer)
