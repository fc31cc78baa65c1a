"""What every set layer obeys: `y = layer(x, mask)`, x [batch, n, features], True takes part.

Adding a layer to `memseq.layers.SET_LAYERS` is enough to have it tested. One compiled call with
its gradient a layer answers most questions.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memseq.layers import SET_LAYERS

FEATURES, MEMBERS = 32, 9
ORDERED = ("bidirectional_s5",)  # their members stand in a sequence
MASK = np.array([[True] * 9, [True] * 5 + [False] * 4, [False] * 9])


class Case:
    """A layer with parameters, inputs and its compiled call."""

    def __init__(self, name):
        self.layer = SET_LAYERS[name](FEATURES, implementation="chunked", chunk_size=8)
        self.x = np.asarray(jax.random.normal(jax.random.key(1), (3, MEMBERS, FEATURES)))
        shapes = jax.eval_shape(self.layer.init, jax.random.key(2), self.x)
        leaves, tree = jax.tree.flatten(shapes)
        draw = np.random.default_rng(3).normal
        self.params = jax.tree.unflatten(
            tree, [jnp.asarray(0.2 * draw(size=a.shape), a.dtype) for a in leaves]
        )

    @functools.cached_property
    def call(self):
        """(params, x, mask) -> y and the gradients of sum(cos(y) y) in params and x."""

        def loss(params, x, mask):
            y = self.layer.apply(params, x, mask)
            return jnp.sum(jnp.cos(y) * y), y

        def both(params, x, mask):
            (_, y), gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)(params, x, mask)
            return y, gradients

        return jax.jit(both)

    @functools.cached_property
    def whole(self):
        return self.call(self.params, self.x, MASK)


@functools.cache
def case(name):
    return Case(name)


@pytest.fixture(params=list(SET_LAYERS), scope="module")
def subject(request):
    return case(request.param)


def close(got, want, tolerance=2e-5):
    got, want = np.asarray(got), np.asarray(want)
    assert np.isfinite(got).all() and np.isfinite(want).all()
    size = np.abs(want).max(initial=0)
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance * size)


def test_an_empty_set_gives_zero(subject):
    """Zeros out, zero gradients in, and nothing in the parameters but what the others leave."""
    y, (params, x) = subject.whole
    assert np.isfinite(y).all() and np.abs(y[:2]).max() > 1e-3
    np.testing.assert_array_equal(y[2], 0)
    np.testing.assert_array_equal(x[2], 0)
    _, (empty, _) = subject.call(subject.params, subject.x, np.zeros_like(MASK))
    for leaf in jax.tree.leaves(empty):
        np.testing.assert_array_equal(leaf, 0)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))


def test_masked_members_may_hold_anything(subject):
    y, gradients = subject.whole
    np.testing.assert_array_equal(np.asarray(gradients[1])[~MASK], 0)
    dirty = np.where(MASK[..., None], subject.x, np.nan)
    other, others = subject.call(subject.params, dirty, MASK)
    np.testing.assert_array_equal(other, y)
    jax.tree.map(np.testing.assert_array_equal, others, gradients)
    if y.shape[1] == MEMBERS:
        np.testing.assert_array_equal(np.asarray(y)[~MASK], 0)


def test_a_mask_is_a_shorter_set(subject):
    y, _ = subject.whole
    short = jax.jit(subject.layer.apply)(subject.params, subject.x[1:2, :5])
    close(y[1:2, : short.shape[1]], short)
    # without a mask all take part
    close(y[:1], jax.jit(subject.layer.apply)(subject.params, subject.x)[:1])


def test_sets_are_alone(subject):
    """Bitwise: what other sets of the batch hold, and how many members they have."""
    y, (_, x) = subject.whole
    other = subject.x.copy()
    other[1:] = 2 - 3 * other[1:]
    mask = MASK.copy()
    mask[1:] = ~mask[1:]
    got, (_, got_x) = subject.call(subject.params, other, mask)
    np.testing.assert_array_equal(got[0], y[0])
    np.testing.assert_array_equal(got_x[0], x[0])
    assert (np.asarray(got[1]) != np.asarray(y[1])).any()


def test_order_means_nothing(subject):
    if isinstance(subject.layer, tuple(SET_LAYERS[name] for name in ORDERED)):
        pytest.skip("its members stand in a sequence")
    if getattr(subject.layer, "ORDERED", False):
        pytest.skip("a layer of sequences: the order of its members means something")
    order = np.random.default_rng(0).permutation(MEMBERS)
    y, (_, x) = subject.whole
    got, (_, got_x) = subject.call(subject.params, subject.x[:, order], MASK[:, order])
    close(got, y[:, order] if y.shape[1] == MEMBERS else y)
    close(got_x, x[:, order], 1e-4)


def test_form(subject):
    reference = subject.layer.clone(implementation="reference")

    def loss(params, x):
        y = reference.apply(params, x, MASK)
        return jnp.sum(jnp.cos(y) * y), y

    (_, y), gradients = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(
        subject.params, subject.x
    )
    close(subject.whole[0], y)
    # by the largest of all: a key's bias, which shifts all scores alike, has only rounding
    flat = [
        np.concatenate([np.ravel(a) for a in jax.tree.leaves(g)])
        for g in (subject.whole[1], gradients)
    ]
    close(*flat, 1e-4)


def test_transforms(subject):
    """vmap over sets, and an artifact for each platform."""
    apply = subject.layer.apply
    one = jax.jit(jax.vmap(lambda x, m: apply(subject.params, x[None], m[None])[0]))
    close(one(subject.x, MASK), subject.whole[0])
    arguments = (subject.params, subject.x, MASK)
    for platform in ("cpu", "tpu", "cuda"):
        exported = jax.export.export(jax.jit(apply), platforms=[platform])(*arguments)
        if platform == "cpu":
            restored = jax.export.deserialize(exported.serialize())
            close(restored.call(*arguments), subject.whole[0])


def test_bfloat16_activations(subject):
    y = jax.jit(subject.layer.clone(dtype=jnp.bfloat16).apply)(subject.params, subject.x, MASK)
    assert y.dtype == jnp.bfloat16
    want = np.asarray(subject.whole[0])
    error = np.linalg.norm(np.asarray(y, np.float32) - want) / np.linalg.norm(want)
    assert np.isfinite(np.asarray(y, np.float32)).all() and error < 0.05


def test_start_and_bad_input(subject):
    """The layer's own start values give finite outputs; errors name what came."""
    params = jax.jit(subject.layer.init)(jax.random.key(0), subject.x)
    y, _ = subject.call(params, subject.x, MASK)
    assert np.isfinite(y).all() and y.shape == subject.whole[0].shape
    with pytest.raises(ValueError, match=r"x: expected \[batch, n, features\]"):
        subject.layer.apply(params, subject.x[..., :-1])
    with pytest.raises(ValueError, match=r"mask: expected bool \[batch, .*\], got"):
        subject.layer.apply(params, subject.x, MASK[:, :-1])
    with pytest.raises(ValueError, match=r"mask: expected bool \[batch, .*\], got"):
        subject.layer.apply(params, subject.x, MASK.astype(np.float32))
