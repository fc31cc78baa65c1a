"""The chunked cross-entropy against the plain one, and what it holds in memory."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memseq.models import LanguageModel
from memseq.models.loss import token_cross_entropy
from tests.models.harness import random_params

VOCAB, FEATURES, BATCH, TIME = 50, 8, 2, 13


def case(tied=False, time=TIME):
    model = LanguageModel(VOCAB, FEATURES, ("linear_attention",), channel=None, tie_embeddings=tied)
    params = random_params(model, jax.ShapeDtypeStruct((1, 2), jnp.int32))
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(BATCH, time, FEATURES)).astype(np.float32)
    targets = rng.integers(0, VOCAB, (BATCH, time), np.int32)
    weights = rng.integers(0, 3, (BATCH, time)).astype(np.float32)
    return model, params, hidden, targets, weights


def plain(model, params, hidden, targets, weights):
    """-log softmax at the targets, from all logits at once."""
    logits = model.apply(params, hidden, method="logits")
    losses = jax.nn.logsumexp(logits, axis=-1)
    losses -= jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jnp.sum(losses * weights), jnp.sum(weights)


def value_and_grad(loss, model, **options):
    """(params, hidden, targets, weights) -> sum, count, gradients in params and hidden."""

    def both(params, hidden, targets, weights):
        total, count = loss(model, params, hidden, targets, weights, **options)
        return total, count

    return jax.value_and_grad(both, argnums=(0, 1), has_aux=True)


@functools.cache
def plain_result(tied):
    model, *arguments = case(tied)
    return jax.jit(value_and_grad(plain, model))(*arguments)


@pytest.mark.parametrize(("chunk", "tied"), [(4, False), (5, True), (13, False), (100, False)])
def test_equals_the_plain_loss(chunk, tied):
    """Also where the chunk does not divide the time, or is longer."""
    model, *arguments = case(tied)
    got = jax.jit(value_and_grad(token_cross_entropy, model, chunk=chunk))(*arguments)
    want = plain_result(tied)
    assert float(want[0][0]) > 10
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        size = max(np.abs(b).max(), 1e-6)
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * size)


def test_float64():
    model, *arguments = case()
    with jax.enable_x64(True):
        arguments = jax.tree.map(lambda a: np.float64(a) if a.dtype.kind == "f" else a, arguments)
        loss = functools.partial(token_cross_entropy, model, chunk=4)
        total, count = jax.jit(loss)(*arguments)
        want, want_count = jax.jit(functools.partial(plain, model))(*arguments)
    assert total.dtype == np.float64
    np.testing.assert_allclose(total, want, rtol=1e-12)
    np.testing.assert_allclose(count, want_count, rtol=1e-12)


def test_weight_zero_hides_the_target():
    """Targets outside the vocabulary change neither value nor gradient where the weight is 0."""
    model, params, hidden, targets, weights = case()
    loss = jax.jit(value_and_grad(token_cross_entropy, model, chunk=4))
    want = loss(params, hidden, targets, weights)
    for garbage in (-1, VOCAB, 2**31 - 1, -(2**31)):
        hidden_targets = np.where(weights > 0, targets, garbage).astype(np.int32)
        got = loss(params, hidden, hidden_targets, weights)
        jax.tree.map(np.testing.assert_array_equal, got, want)
    (_, _), (_, gradient) = want
    np.testing.assert_array_equal(np.asarray(gradient)[weights == 0], 0)
    assert (np.abs(gradient).max(-1)[weights > 0] > 0).all()
    (total, count), gradients = loss(params, hidden, targets, np.zeros_like(weights))
    assert total == count == 0
    jax.tree.map(lambda g: np.testing.assert_array_equal(g, 0), gradients)


def _is_jaxpr(x):
    return hasattr(x, "eqns")


def largest_logits(function, *arguments):
    """The most elements of any array with a vocabulary axis, anywhere in the program."""
    sizes = [0]

    def visit(jaxpr):
        for equation in jaxpr.eqns:
            for variable in (*equation.invars, *equation.outvars):
                shape = getattr(variable.aval, "shape", ())
                if VOCAB in shape or math.prod(shape) % VOCAB == 0:
                    sizes.append(math.prod(shape))
            for inner in jax.tree.leaves(equation.params, is_leaf=_is_jaxpr):
                if _is_jaxpr(inner):
                    visit(inner)

    visit(jax.make_jaxpr(function)(*arguments))
    return max(sizes)


@pytest.mark.parametrize("tied", [False, True])
def test_never_holds_all_logits(tied):
    """No array of [batch, time, vocab] forward or backward; [batch, chunk, vocab] is the most."""
    time, chunk = 64, 16
    model, *arguments = case(tied, time)
    everything = BATCH * time * VOCAB
    assert largest_logits(value_and_grad(plain, model), *arguments) == everything
    chunked = value_and_grad(token_cross_entropy, model, chunk=chunk)
    assert largest_logits(chunked, *arguments) == BATCH * chunk * VOCAB


def test_bfloat16_is_summed_in_float32():
    model, params, hidden, targets, weights = case()
    model = model.clone(dtype=jnp.bfloat16)
    hidden = jnp.asarray(hidden, jnp.bfloat16)
    loss = functools.partial(token_cross_entropy, model, chunk=4)
    total, _ = jax.jit(loss)(params, hidden, targets, weights)
    assert total.dtype == jnp.float32
    want, _ = jax.jit(functools.partial(plain, model))(params, hidden, targets, weights)
    np.testing.assert_allclose(total, want, rtol=1e-5)


def test_bad_chunk():
    with pytest.raises(ValueError, match="chunk: expected an integer of at least 1, got 0"):
        token_cross_entropy(*case(), chunk=0)
