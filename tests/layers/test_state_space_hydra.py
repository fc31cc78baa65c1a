"""Hydra against the matrix that it is."""

import jax
import numpy as np
import pytest

from memseq.layers.state_space.hydra import Hydra
from memseq.layers.state_space.s5 import BidirectionalS5
from tests.layers.harness import (
    FEATURES,
    TIME,
    count,
    init,
    inputs,
    random_params,
    rms_norm,
    silu,
    softplus,
)

# members that take no part in front, inside and behind
MASK = np.array([[False] + [True] * 9 + [False] * 3 + [True] * 7 + [False], [True] * TIME])


def centred_conv(x, kernel, bias):
    half, y = len(kernel) // 2, np.zeros_like(x)
    for t in range(len(x)):
        for w, tap in enumerate(kernel):
            if 0 <= t + w - half < len(x):
                y[t] += tap * x[t + w - half]
    return silu(y + bias)


def hydra(layer, params, x):
    """y = M u for each head, with M written entry by entry."""
    heads = len(params["D"])
    size, per_group = layer.groups * layer.state_dim, heads // layer.groups
    mixed = centred_conv(x @ params["input"]["kernel"], **params["conv"])
    inner = layer.expand * FEATURES
    u = mixed[:, :inner].reshape(len(x), heads, -1)
    names = ("B", "C", "B'", "C'")
    parts = {
        name: mixed[:, inner + i * size : inner + (i + 1) * size].reshape(len(x), layer.groups, -1)
        for i, name in enumerate(names)
    }
    raw = (x @ params["step_size"]["kernel"]).reshape(len(x), 2, heads)
    dt = softplus(raw + params["decay_gate"]["dt_bias"])
    decay = np.exp(-np.exp(params["decay_gate"]["A_log"]) * dt)
    own = mixed[:, :inner] @ params["skip"]["kernel"] + params["D"]
    out = np.zeros_like(u)
    for h in range(heads):
        matrix, g = np.diag(own[:, h]), h // per_group
        for i in range(len(x)):
            for j in range(i):  # what is earlier reaches i through i - 1
                kept = np.prod(decay[j + 1 : i, 0, h])
                matrix[i, j] = parts["C"][i - 1, g] @ parts["B"][j, g] * kept * dt[j, 0, h]
            for j in range(i + 1, len(x)):
                kept = np.prod(decay[i + 1 : j, 1, h])
                matrix[i, j] = parts["C'"][i + 1, g] @ parts["B'"][j, g] * kept * dt[j, 1, h]
        out[:, h] = matrix @ u[:, h]
    out = np.array([rms_norm(o, params["norm"]["scale"]) for o in out.reshape(len(x), -1)])
    return out * silu(x @ params["gate"]["kernel"]) @ params["output"]["kernel"]


@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "some"])
@pytest.mark.parametrize(
    "options",
    [{"state_dim": 3}, {"state_dim": 4, "heads": 4, "groups": 2, "conv_width": 1, "expand": 1}],
)
def test_hydra(options, mask):
    layer = Hydra(FEATURES, **options)
    params, x = random_params(layer), inputs()
    with jax.enable_x64(True):
        y = np.asarray(jax.jit(layer.apply)({"params": params}, x, mask))
    assert y.dtype == np.float64
    for row, taken in enumerate(np.ones((2, TIME), bool) if mask is None else mask):
        want = hydra(layer, params, x[row, taken])
        np.testing.assert_allclose(y[row, taken], want, rtol=0, atol=1e-9)
        np.testing.assert_array_equal(y[row, ~taken], 0)


def test_starts_and_defaults():
    params = init(Hydra(32))
    np.testing.assert_allclose(np.exp(params["decay_gate"]["A_log"]), 1, rtol=1e-6)
    np.testing.assert_array_equal(params["D"], 1)
    mixed = 64 + 4 * 64
    want = 32 * (mixed + 2 + 64) + 8 * mixed + 2 + 64 + 1 + 64 + 64 * 32
    assert count(Hydra(32), 32) == want


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"conv_width": 4}, "conv_width: expected an odd number, got 4"),
        ({"heads": 3}, "heads: .* got 3"),
        ({"groups": 3}, "groups: .* got groups 3"),
        ({"state_dim": 0}, "state_dim: .* got 0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        count(Hydra(FEATURES, **options))


@pytest.mark.parametrize("kind", [Hydra, BidirectionalS5])
def test_one_mask_for_all_rows(kind):
    layer = kind(FEATURES)
    x = inputs()
    params = jax.jit(layer.init)(jax.random.key(0), x)
    run = jax.jit(lambda mask: layer.apply(params, x, mask))
    np.testing.assert_array_equal(run(MASK[:1]), run(np.repeat(MASK[:1], len(x), axis=0)))
