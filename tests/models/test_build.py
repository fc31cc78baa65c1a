"""Models from configs."""

import jax
import jax.numpy as jnp
import pytest
from ml_collections import ConfigDict

from memseq.models import LanguageModel
from memseq.models.build import language_model


def config(**changes):
    options = {
        "vocab_size": 13,
        "features": 16,
        "pattern": ("delta_net", "softmax_attention"),
        "repeats": 2,
        "mixers": ConfigDict({"softmax_attention": {"heads": 2, "window": 4}}),
        "channel": "swiglu",
        "hidden_ratio": 3.0,
        "tie_embeddings": True,
        "remat": "dots",
        "implementation": "reference",
        "dtype": "bfloat16",
        "param_dtype": "float32",
    }
    return ConfigDict(options | changes)


def test_every_key_arrives():
    want = LanguageModel(
        vocab_size=13,
        features=16,
        pattern=("delta_net", "softmax_attention"),
        repeats=2,
        mixers={"softmax_attention": {"heads": 2, "window": 4}},
        channel="swiglu",
        hidden_ratio=3.0,
        tie_embeddings=True,
        remat="dots",
        implementation="reference",
        dtype=jnp.dtype("bfloat16"),
        param_dtype=jnp.dtype("float32"),
    )
    model = language_model(config())
    assert model == want and hash(model) == hash(want)
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    assert params["stack"]["layers"]["block_1"]["layer"]["query"]["kernel"].shape == (2, 16, 16)
    assert model.init_state(1)[1].key.shape == (2, 1, 4, 2, 8)


def test_empty_values():
    model = language_model(config(dtype="", channel=""))
    assert model.dtype is None and model.channel is None
    model = language_model(config(dtype=None, channel=None))
    assert model.dtype is None and model.channel is None


def test_defaults():
    few = ConfigDict({"vocab_size": 13, "features": 16, "pattern": ["mamba2"]})
    assert language_model(few) == LanguageModel(13, 16, ("mamba2",))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"feature": 3}, "config.model: .* got 'feature'; did you mean 'features'"),
        ({"name": "x"}, "config.model: .* got 'name'"),
        (
            {"dtype": "bfloat61"},
            "dtype: expected the name of a floating-point dtype, got 'bfloat61'",
        ),
        ({"dtype": "int32"}, "dtype: .* got 'int32'"),
        ({"param_dtype": "double precision"}, "param_dtype: .* got 'double precision'"),
        ({"param_dtype": ""}, "param_dtype: .* got ''"),
        ({"param_dtype": None}, "param_dtype: .* got None"),
        ({"pattern": "delta_net"}, "pattern: .* got 'delta_net'"),
    ],
)
def test_bad_values(changes, message):
    with pytest.raises(ValueError, match=message):
        language_model(config(**changes))


@pytest.mark.parametrize("name", ["vocab_size", "features", "pattern"])
def test_missing_values(name):
    short = config()
    del short[name]
    with pytest.raises(ValueError, match=f"config.model.{name}: expected a value"):
        language_model(short)
