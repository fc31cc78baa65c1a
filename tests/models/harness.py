"""What the tests of the models share: small models with random parameters."""

import jax
import jax.numpy as jnp
import numpy as np

from memseq.models import LanguageModel

VOCAB, FEATURES = 13, 16
TWO = {"gated_delta_net": {"heads": 2, "key_dim": 4}, "softmax_attention": {"heads": 2}}


def small(pattern=tuple(TWO), **options):
    """A language model of 13 tokens, 16 features and, in the mixers of `TWO`, 2 heads."""
    options = {"mixers": {name: TWO[name] for name in pattern if name in TWO}, **options}
    return LanguageModel(vocab_size=VOCAB, features=FEATURES, pattern=pattern, **options)


def random_params(model, example, seed=0):
    """{"params": ...} of the model's shapes in float32, no scale at 1 and no bias at 0."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        values = rng.normal(size=leaf.shape)
        if path[-1].key == "kernel":
            values /= np.sqrt(leaf.shape[-2])
        elif path[-1].key == "scale":
            values = 1 + 0.3 * values
        return values.astype(leaf.dtype)

    shapes = jax.eval_shape(model.init, jax.random.key(0), example)
    return jax.tree_util.tree_map_with_path(draw, shapes)


def with_params(model, seed=0):
    return model, random_params(model, jax.ShapeDtypeStruct((1, 4), jnp.int32), seed)


def tokens(*shape, seed=1):
    return np.random.default_rng(seed).integers(0, VOCAB, shape, np.int32)


def layout(tree):
    return jax.tree.map(lambda a: (a.shape, a.dtype), tree)
