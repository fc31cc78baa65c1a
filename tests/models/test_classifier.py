"""The sequence classifier: padding, pooling, and that it learns."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from memseq.models import SequenceClassifier
from tests.models.harness import TWO, random_params, tokens

TIME = 10


def classifier(**options):
    options = {"vocab_size": 13, "pattern": tuple(TWO), "mixers": TWO, **options}
    return SequenceClassifier(classes=3, features=16, **options)


@functools.partial(jax.jit, static_argnums=0)
def run(model, params, inputs, segment_ids=None):
    return model.apply(params, inputs, segment_ids)


@pytest.mark.parametrize("pool", ["mean", "last"])
def test_padding_changes_nothing(pool):
    """Before, between and behind the sequence, with whatever tokens and whichever id."""
    model = classifier(pool=pool)
    params = random_params(model, jax.ShapeDtypeStruct((1, 4), jnp.int32))
    text = tokens(4)
    places = [[0, 1, 2, 3], [6, 7, 8, 9], [1, 3, 4, 8], [0, 4, 5, 9]]
    padded, ids = tokens(4, TIME, seed=2), np.full((4, TIME), -1, np.int32)
    for row, place in enumerate(places):
        padded[row, place], ids[row, place] = text, row
    got = run(model, params, padded, ids)
    want = run(model, params, text[None])
    assert got.shape == (4, 3) and got.dtype == jnp.float32
    np.testing.assert_allclose(got, np.broadcast_to(want, (4, 3)), rtol=0, atol=2e-5)
    other = run(model, params, np.where(ids < 0, (padded + 1) % 13, padded), ids)
    np.testing.assert_array_equal(got, other)
    assert np.abs(got - run(model, params, padded, np.zeros_like(ids))).max() > 1e-3


def test_pooling():
    """The head reads the normed activations' mean, or those of the last valid position."""
    model = classifier(pattern=("linear_attention",), mixers={})
    params = random_params(model, jax.ShapeDtypeStruct((1, 4), jnp.int32))
    ids = np.array([[0] * TIME, [0] * 6 + [-1] * 4], np.int32)
    inputs = tokens(2, TIME)
    capture = functools.partial(
        model.apply, capture_intermediates=lambda module, _: module.name == "norm"
    )
    logits, captured = jax.jit(capture)(params, inputs, ids)
    hidden = np.asarray(captured["intermediates"]["norm"]["__call__"][0], np.float64)
    head = params["params"]["head"]
    for pool, pooled in (
        ("mean", [hidden[0].mean(0), hidden[1, :6].mean(0)]),
        ("last", [hidden[0, -1], hidden[1, 5]]),
    ):
        logits = run(model.clone(pool=pool), params, inputs, ids)
        want = np.array(pooled) @ head["kernel"] + head["bias"]
        np.testing.assert_allclose(logits, want, rtol=0, atol=1e-5)


def test_rows_without_tokens_are_finite():
    model = classifier(pattern=("linear_attention",), mixers={})
    params = random_params(model, jax.ShapeDtypeStruct((1, 4), jnp.int32))
    for pool in ("mean", "last"):
        logits = run(model.clone(pool=pool), params, tokens(2, 5), np.full((2, 5), -1, np.int32))
        assert np.isfinite(logits).all()


def test_learns():
    """The class is the one token below 3, somewhere among others, read from the last position."""
    model = classifier(vocab_size=6, pattern=("delta_net",), mixers={}, pool="last")
    rng = np.random.default_rng(0)
    params = random_params(model, jax.ShapeDtypeStruct((1, 4), jnp.int32))
    optimizer = optax.adam(1e-2)

    def loss(params, inputs):
        logits = model.apply(params, inputs)
        labels = jnp.min(inputs, axis=1)
        right = jnp.argmax(logits, -1) == labels
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean(), right.mean()

    @jax.jit
    def train(params, batches):
        def step(carry, inputs):
            params, state = carry
            (_, right), gradients = jax.value_and_grad(loss, has_aux=True)(params, inputs)
            updates, state = optimizer.update(gradients, state)
            return (optax.apply_updates(params, updates), state), right

        return jax.lax.scan(step, (params, optimizer.init(params)), batches)[1]

    batches = rng.integers(3, 6, (100, 32, TIME), np.int32)
    place = rng.integers(0, TIME, (100, 32, 1))
    np.put_along_axis(batches, place, rng.integers(0, 3, place.shape, np.int32), axis=2)
    right = np.asarray(train(params, batches))
    assert right[:5].mean() < 0.6 and right[-10:].mean() > 0.95


def test_real_inputs():
    """Floating [batch, time, channels]; no vocabulary needed."""
    model = classifier(vocab_size=None, pattern=("mamba2",), mixers={}, channel=None)
    example = jax.ShapeDtypeStruct((2, 5, 7), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), example)
    assert shapes["params"]["input"]["kernel"].shape == (7, 16)
    assert "embed" not in shapes["params"]
    assert jax.eval_shape(model.apply, shapes, example).shape == (2, 3)
    with pytest.raises(ValueError, match="inputs: integer inputs need vocab_size"):
        jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((2, 5), jnp.int32))
    narrow = model.clone(dtype=jnp.bfloat16)
    assert jax.eval_shape(narrow.apply, shapes, example).dtype == jnp.float32


@pytest.mark.parametrize(
    ("options", "example", "message"),
    [
        ({"pool": "max"}, ((2, 4), jnp.int32), "pool: expected one of 'mean', 'last', got 'max'"),
        ({}, ((2, 4, 1), jnp.int32), r"inputs: .* \[batch, time\], got .* \[2, 4, 1\]"),
        ({}, ((2, 4), jnp.float32), r"inputs: expected \[batch, time, channels\], got"),
        ({"pattern": ("mamab2",)}, ((2, 4), jnp.int32), "pattern: .* did you mean 'mamba2'"),
        ({"pattern": "mamba2"}, ((2, 4), jnp.int32), "pattern: .* got 'mamba2'"),
    ],
)
def test_bad_options(options, example, message):
    with pytest.raises(ValueError, match=message):
        model = classifier(**{"mixers": {}, **options})
        jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct(*example))
