"""Layers whose only memory is a short convolution, step by step."""

import jax
import numpy as np
import pytest

from memseq.layers import GatedConvolution, RWKVChannelMix
from tests.layers.harness import (
    FEATURES,
    IDS,
    check_dtypes,
    check_transcription,
    count,
    init,
    inputs,
    short_conv,
)


def gated_convolution(layer, params, x):
    """W_o (silu(conv(W_u x)) * W_g x)."""
    u, g = (x @ params[name]["kernel"] + params[name]["bias"] for name in ("input", "gate"))
    mixed = short_conv(u, params["conv"]["kernel"], params["conv"]["bias"])
    return (mixed * g) @ params["output"]["kernel"] + params["output"]["bias"], None, {}


def channel_mix(layer, params, x):
    """W_v relu(W_k (x + share (x before - x)))^2."""
    y, before = np.zeros(x.shape), np.zeros(x.shape[1])
    for t, token in enumerate(x):
        mixed = token + params["shift_bias"][0] * (before - token)
        hidden = np.maximum(mixed @ params["key"]["kernel"], 0) ** 2
        y[t], before = hidden @ params["output"]["kernel"], token
    return y, None, {}


LAYERS = {
    "gated convolution": (GatedConvolution(FEATURES), gated_convolution),
    "gated convolution of two": (
        GatedConvolution(FEATURES, expand=1, conv_width=2),
        gated_convolution,
    ),
    "channel mix": (RWKVChannelMix(FEATURES), channel_mix),
}


@pytest.mark.parametrize("name", LAYERS)
def test_transcription(name):
    check_transcription(*LAYERS[name], IDS)


def test_starts():
    """The channel mixing starts at 0; later layers look at the token before less."""
    first, last = (init(RWKVChannelMix(32, layer_index=i, num_layers=4)) for i in (0, 3))
    np.testing.assert_array_equal(first["output"]["kernel"], 0)
    assert 0.4 * 32**-0.5 < np.abs(first["key"]["kernel"]).max() <= 0.5 * 32**-0.5
    np.testing.assert_allclose(first["shift_bias"][0], 1 - np.arange(32) / 32, rtol=1e-6)
    assert (last["shift_bias"] <= first["shift_bias"]).all() and last["shift_bias"][0, 1] < 0.1


def test_defaults():
    assert GatedConvolution(32).init_state(3).conv.shape == (3, 2, 64)
    assert count(GatedConvolution(32), 32) == 3 * 32 * 64 + 2 * 64 + 32 + 64 * 4
    assert RWKVChannelMix(32).init_state(3).conv.shape == (3, 1, 32)
    assert count(RWKVChannelMix(32), 32) == 8 * 32 * 32 + 32


@pytest.mark.parametrize("layer", [GatedConvolution(32), RWKVChannelMix(32)])
def test_dtypes(layer):
    check_dtypes(layer)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (GatedConvolution(16, expand=0), "expand: .* got 0"),
        (GatedConvolution(16, conv_width=-1), "conv_width: .* got -1"),
        (RWKVChannelMix(16, expand=0), "expand: .* got 0"),
        (RWKVChannelMix(16, layer_index=2, num_layers=2), "layer_index: .* got 2"),
    ],
)
def test_bad_options(layer, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(layer.init, jax.random.key(0), inputs())
