"""A model with the interface of the language model that compiles in a blink, and batches for it."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

VOCABULARY = 11


class Tiny(nn.Module):
    """Embedding, a running sum over time within a segment, one dense layer, logits."""

    features: int = 8
    noise: float = 0.0
    vocabulary: int = VOCABULARY

    def setup(self):
        self.embed = nn.Embed(self.vocabulary, self.features)
        self.up = nn.Dense(self.features)
        self.head = nn.Dense(self.vocabulary, use_bias=False)
        self.dropout = nn.Dropout(self.noise, deterministic=self.noise == 0)

    def __call__(self, tokens, state=None, segment_ids=None):
        hidden, state = self.hidden(tokens, state, segment_ids)
        return self.logits(hidden), state

    def hidden(self, tokens, state=None, segment_ids=None):
        x = self.embed(tokens)
        if segment_ids is None:
            segment_ids = jnp.zeros(tokens.shape, jnp.int32)
        same = segment_ids[:, :, None] == segment_ids[:, None, :]
        past = jnp.tril(same * (segment_ids >= 0)[:, None, :]).astype(x.dtype)
        return self.dropout(nn.tanh(self.up(past @ x))), state

    def logits(self, hidden):
        return self.head(hidden)

    @nn.nowrap
    def state_bytes(self, batch=1, context=None):
        return 0


def batch(rows=4, time=6, seed=0, padding=0.3):
    """Random tokens with a share of weights 0, and ids of two segments a row."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, VOCABULARY, (rows, time), dtype=np.int32)
    return {
        "tokens": tokens,
        "targets": (3 * tokens + 1) % VOCABULARY,
        "segment_ids": np.repeat([[0, 1]], rows, 0).repeat(time // 2, 1).astype(np.int32),
        "weights": (rng.random((rows, time)) >= padding).astype(np.float32),
    }


def options(**changes):
    """The config section `optimizer`."""
    return {
        "name": "adamw",
        "learning_rate": 1e-2,
        "schedule": "constant",
        "warmup_steps": 0,
        "decay_fraction": 0.2,
        "final_fraction": 0.1,
        "b1": 0.9,
        "b2": 0.95,
        "eps": 1e-8,
        "momentum": 0.95,
        "weight_decay": 0.1,
        "clip_norm": 1.0,
    } | changes


def assert_trees(compare, a, b, **tolerances):
    """Compares two trees by leaf with a function of `numpy.testing`; PRNG keys by their data."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        assert x.dtype == y.dtype
        assert np.all(np.isfinite(x)) or compare is np.testing.assert_array_equal
        compare(np.asarray(x), np.asarray(y), **tolerances)
