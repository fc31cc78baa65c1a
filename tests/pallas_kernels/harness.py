"""What the tests of the operations share: hard inputs, comparisons, values with their gradients."""

import jax
import jax.numpy as jnp
import numpy as np


def assert_close(actual, expected, tolerance, what=""):
    """Both trees finite, and each leaf within tolerance x its largest expected magnitude."""
    actual, expected = (jax.tree.leaves_with_path(tree) for tree in (actual, expected))
    assert len(actual) == len(expected), what
    for (path, a), (_, e) in zip(actual, expected, strict=True):
        a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
        label = f"{what} {jax.tree_util.keystr(path)}"
        assert np.isfinite(a).all() and np.isfinite(e).all(), f"{label} is not finite"
        largest = np.abs(e).max(initial=0)
        np.testing.assert_allclose(a, e, rtol=0, atol=tolerance * (largest or 1), err_msg=label)


def assert_same(actual, expected, what=""):
    """Equal to the last bit, and finite."""
    jax.tree.map(lambda a: np.testing.assert_(np.isfinite(a).all(), what), actual)
    jax.tree.map(lambda a, e: np.testing.assert_array_equal(a, e, err_msg=what), actual, expected)


def correlated_keys(rng, batch, time, heads, dim, cosine):
    """Unit vectors that have this cosine with one another, on average, in each row and head."""
    shared = _unit(rng.normal(size=(batch, 1, heads, dim)))
    own = rng.normal(size=(batch, time, heads, dim))
    own = _unit(own - (own * shared).sum(-1, keepdims=True) * shared)
    return np.sqrt(cosine) * shared + np.sqrt(1 - cosine) * own


def _unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def hard_decay(rng, shape):
    """Log decays: a third of them -20 (forgets all), a third 0 (keeps all), the rest between."""
    kind = rng.integers(3, size=shape)
    return np.choose(kind, [np.full(shape, -20.0), np.zeros(shape), -rng.exponential(0.3, shape)])


def packed_ids(rng, batch, time, longest, padding=True):
    """Segments of 1 to `longest` positions whose ids come back; padding anywhere, also inside one.

    With padding, the first row starts with some, the second ends with some and the third is all
    padding.
    """
    rows = np.empty((batch, time), np.int32)
    for row in rows:
        t = 0
        while t < time:
            length = rng.integers(1, longest + 1)
            row[t : t + length] = rng.integers(3)
            t += length
    if padding:
        rows[rng.random(rows.shape) < 0.2] = -1
        rows[:1, :2] = -1
        rows[1:2, -2:] = -1
        rows[2:3] = -1
    return rows


def float32_values(inputs):
    """The same inputs rounded to float32, still stored in float64."""
    return jax.tree.map(lambda x: x.astype(np.float32).astype(np.float64), inputs)


def with_gradients(function):
    """function(inputs) -> outputs becomes (inputs, cotangents) -> (outputs, gradients)."""

    def run(inputs, cotangents):
        outputs, backward = jax.vjp(function, inputs)
        cotangents = jax.tree.map(lambda c, o: c.astype(o.dtype), cotangents, outputs)
        return outputs, backward(cotangents)[0]

    return run


def cotangents_like(rng, outputs):
    return jax.tree.map(lambda x: rng.normal(size=x.shape), outputs)


def check_agreement(operation, oracle, inputs, options, rng):
    """`reference` against the oracle, `chunked` against `reference`, and `chunked` in float32.

    inputs: NumPy arrays by argument name, all of them differentiated; options: all the rest.
    """
    inputs = float32_values(inputs)
    outputs = oracle(**inputs, **{k: v for k, v in options.items() if k != "chunk_size"})
    cotangents = cotangents_like(rng, outputs)

    def call(form):
        return with_gradients(lambda x: operation(**x, **options, implementation=form))

    with jax.enable_x64(True):
        reference, chunked = jax.jit(lambda *xs: (call("reference")(*xs), call("chunked")(*xs)))(
            inputs, cotangents
        )
    assert_close(reference[0], outputs, 1e-11, "reference, oracle")
    assert_close(chunked, reference, 1e-9, "chunked, reference")
    values, gradients = jax.jit(call("chunked"))(inputs, cotangents)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves((values, gradients)))
    assert_close(values, reference[0], 2e-5, "float32 values")
    assert_close(gradients, reference[1], 1e-4, "float32 gradients")


def check_16_bit(operation, inputs, options, rng):
    """bfloat16 inputs: nothing is lost but the rounding of what is returned.

    The measure is float64 on the same rounded inputs.
    """
    narrow = {k: jnp.asarray(x, jnp.bfloat16) for k, x in inputs.items()}
    wide = {k: np.asarray(x, np.float64) for k, x in narrow.items()}

    def call(form):
        return with_gradients(lambda x: operation(**x, **options, implementation=form))

    with jax.enable_x64(True):
        shapes = jax.eval_shape(lambda x: operation(**x, **options), wide)
        cotangents = cotangents_like(rng, shapes)
        cotangents = jax.tree.map(
            lambda c: np.asarray(c.astype(jnp.bfloat16), np.float64), cotangents
        )
        exact = jax.jit(call("reference"))(wide, cotangents)
    values, gradients = jax.jit(call("chunked"))(narrow, cotangents)
    out = jax.tree.leaves(values)[0]
    assert out.dtype == jnp.bfloat16
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(gradients))
    assert_close(values, exact[0], 2**-8, "values")
    assert_close(gradients, exact[1], 2**-8, "gradients")
