"""entmax, sparsemax, softmax_n and k_subsets against sorting, bisection and finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memseq.pallas_kernels import entmax, k_subsets, softmax_n, sparsemax
from memseq.pallas_kernels.entmax import (
    entmax_conjugate,
    k_subsets_conjugate,
    softmax_with_sink,
)
from tests.pallas_kernels.harness import assert_close, assert_same


def by_sorting(x, alpha):
    """Exact entmax of one row for alpha 1.5 and 2: the support is a prefix of the sorted logits."""
    z = np.sort((alpha - 1) * x)[::-1]
    for size in range(len(z), 0, -1):
        head = z[:size]
        if alpha == 2:
            threshold = (head.sum() - 1) / size
        else:
            spread = 1 - ((head - head.mean()) ** 2).sum()
            if spread < 0:
                continue
            threshold = head.mean() - np.sqrt(spread / size)
        if threshold < head[-1]:
            return np.maximum((alpha - 1) * x - threshold, 0) ** (1 / (alpha - 1))
    raise AssertionError("no support fits")


def by_bisection(x, alpha):
    """entmax of one row for any alpha in (1, 2]."""
    z = (alpha - 1) * x
    low, high = z.max() - 1, z.max()
    for _ in range(200):
        middle = (low + high) / 2
        total = (np.maximum(z - middle, 0) ** (1 / (alpha - 1))).sum()
        low, high = (middle, high) if total >= 1 else (low, middle)
    p = np.maximum(z - low, 0) ** (1 / (alpha - 1))
    return p / p.sum()


rows = st.integers(0, 2**32 - 1).map(np.random.default_rng)
scales = st.sampled_from([0.1, 1.0, 10.0, 1e3])
both = jax.jit(entmax)
subsets = jax.jit(k_subsets, static_argnums=1)
conjugate_gradient = jax.jit(
    jax.grad(lambda x, k: k_subsets_conjugate(x, k).sum()), static_argnums=1
)


@settings(max_examples=60)
@given(rng=rows, scale=scales, alpha=st.sampled_from([1.5, 2.0]))
def test_newton_finds_what_sorting_does(rng, scale, alpha):
    x = rng.normal(size=(6, 40)) * scale
    with jax.enable_x64(True):
        p = np.asarray(both(x, alpha))
    exact = np.stack([by_sorting(row, alpha) for row in x])
    np.testing.assert_allclose(p, exact, rtol=0, atol=1e-9)
    np.testing.assert_array_equal((p > 1e-12).sum(-1), (exact > 1e-12).sum(-1))
    narrow = np.asarray(both(x.astype(np.float32), alpha))
    exact = np.stack([by_sorting(row, alpha) for row in x.astype(np.float32).astype(np.float64)])
    assert narrow.dtype == np.float32
    np.testing.assert_allclose(narrow, exact, rtol=0, atol=2e-6 * max(scale, 1))
    np.testing.assert_allclose(narrow.sum(-1), 1, atol=1e-6)


@settings(max_examples=30)
@given(rng=rows, scale=scales, alpha=st.floats(1.01, 2))
def test_newton_finds_what_bisection_does(rng, scale, alpha):
    x = rng.normal(size=(6, 40)) * scale
    with jax.enable_x64(True):
        p = np.asarray(both(x, alpha))
    exact = np.stack([by_bisection(row, alpha) for row in x])
    np.testing.assert_allclose(p, exact, rtol=0, atol=1e-8)


def test_alpha_of_one_is_softmax_and_its_neighbours_go_over_into_it():
    x = np.random.default_rng(0).normal(size=(4, 30)) * 3
    softmax = np.asarray(jax.nn.softmax(jnp.asarray(x, jnp.float32)))
    for alpha, tolerance in ((1.0, 1e-6), (1 + 1e-6, 1e-5), (1.001, 3e-3), (1.01, 3e-2)):
        for dtype in (np.float32, np.float64):
            with jax.enable_x64(dtype == np.float64):
                p = np.asarray(entmax(jnp.asarray(x, dtype), alpha))
            np.testing.assert_allclose(p, softmax, rtol=0, atol=tolerance)
    np.testing.assert_allclose(
        entmax_conjugate(jnp.asarray(x, jnp.float32), 1.0),
        jax.nn.logsumexp(jnp.asarray(x, jnp.float32), -1),
        rtol=1e-5,
    )
    assert_same(sparsemax(x.astype(np.float32)), entmax(x.astype(np.float32), 2.0))


@pytest.mark.parametrize("n", [2, 50, 70_000])
def test_long_rows_converge(n):
    x = np.random.default_rng(n).normal(size=(3, n)).astype(np.float32)
    p = np.asarray(jax.jit(entmax)(x, jnp.array([1.0, 1.3, 2.0])))
    np.testing.assert_allclose(p.sum(-1), 1, atol=1e-5)
    np.testing.assert_allclose(p[0], jax.nn.softmax(x[0]), rtol=0, atol=1e-6)


@settings(max_examples=40)
@given(rng=rows, alpha=st.sampled_from([1.5, 2.0]), lead=st.sampled_from([0.99, 1.01]))
def test_one_hot_exactly_from_the_margin_on(rng, alpha, lead):
    """Peters et al. 2019, definition 3: entmax has the margin 1 / (alpha - 1)."""
    x = rng.normal(size=20) - 10
    x[3] = np.delete(x, 3).max() + lead / (alpha - 1)
    with jax.enable_x64(True):
        p = np.asarray(both(x, alpha))
    assert np.array_equal(p, np.eye(20)[3]) == (lead > 1)


@pytest.mark.parametrize("alpha", [1.0, 1.02, 1.5, 1.8, 2.0])
def test_gradients(alpha):
    """In x and alpha, both modes, second order; by differences from one side where alpha ends."""
    rng = np.random.default_rng(1)
    x, dx, weight = rng.normal(size=(3, 5, 12))
    step = 1e-6

    def loss(x, alpha):
        return (entmax(x, alpha) * jnp.asarray(weight, x.dtype)).sum()

    with jax.enable_x64(True):
        value_and_grads = jax.jit(jax.value_and_grad(loss, (0, 1)))
        _, (by_x, by_alpha) = value_and_grads(x, alpha)
        at = [value_and_grads(x + s * step * dx, alpha) for s in (-1, 1)]
        np.testing.assert_allclose((by_x * dx).sum(), (at[1][0] - at[0][0]) / 2 / step, atol=1e-8)
        high, low = min(alpha + step, 2.0), max(alpha - step, 1.0)
        difference = (value_and_grads(x, high)[0] - value_and_grads(x, low)[0]) / (high - low)
        np.testing.assert_allclose(by_alpha, difference, atol=3e-5)
        forward = jax.jit(lambda x, a: jax.jvp(loss, (x, a), (dx, 0.7))[1])(x, alpha)
        np.testing.assert_allclose(forward, (by_x * dx).sum() + 0.7 * by_alpha, rtol=1e-10)
        second = jax.jit(lambda x: jax.jvp(lambda x: jax.grad(loss)(x, alpha), (x,), (dx,))[1])(x)
        difference = (at[1][1][0] - at[0][1][0]) / 2 / step
        np.testing.assert_allclose(second, difference, atol=1e-6)
        gradients = jax.grad(lambda x, a: entmax_conjugate(x, a).sum(), (0, 1))(x, alpha)
        assert_close(gradients[0], entmax(x, alpha), 1e-12)
        values = [entmax_conjugate(x, a).sum() for a in (low, high)]
        np.testing.assert_allclose(gradients[1], (values[1] - values[0]) / (high - low), rtol=1e-4)
    narrow = jax.jit(jax.grad(loss, (0, 1)))(x.astype(np.float32), jnp.float32(alpha))
    assert_close(narrow, (by_x, by_alpha), 1e-4)


def test_hidden_logits_and_empty_rows():
    """Whatever hidden logits hold, and exactly none of weight and gradient in an empty row."""
    rng = np.random.default_rng(2)
    x = rng.normal(size=(3, 8)).astype(np.float32)
    where = np.array([[True] * 8, [True, False] * 4, [False] * 8])
    calls = (
        lambda x: entmax(x, 1.5, where=where),
        lambda x: sparsemax(x, where=where),
        lambda x: softmax_n(x, 1.0, where=where),
        lambda x: k_subsets(x, 2, where=where),
        lambda x: entmax_conjugate(x, 1.3, where=where)[..., None],
        lambda x: k_subsets_conjugate(x, 2, where=where)[..., None],
        lambda x: softmax_with_sink(x, None, where)[0],
        lambda x: softmax_with_sink(x, None, where)[1][..., None],
    )

    @jax.jit
    def run(x):
        values, pull = jax.vjp(lambda x: [call(x) for call in calls], x)
        return values, [
            pull([jnp.cos(p) if i == j else jnp.zeros_like(p) for j, p in enumerate(values)])[0]
            for i in range(len(values))
        ]

    clean, gradients = run(x)
    for p, gradient in zip(clean, gradients, strict=True):
        assert_same(np.asarray(p)[2], np.zeros_like(p[2]))
        assert not np.asarray(gradient)[~where].any() and np.isfinite(gradient).all()
    for dirt in (np.nan, np.inf, 1e30, -np.inf):
        assert_same(run(np.where(where, x, dirt).astype(np.float32)), (clean, gradients))
    seen = entmax(x[1, ::2], 1.5)
    np.testing.assert_allclose(entmax(x, 1.5, where=where)[1, ::2], seen, rtol=1e-6)
    assert_same(entmax(np.full((2, 3), -np.inf, np.float32)), np.zeros((2, 3)))


def test_rows_are_alone():
    """Bitwise: an easy row does not feel the further iterations of a hard one."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=(2, 60)).astype(np.float32)
    other = np.stack([x[0], np.linspace(-1e-3, 1e-3, 60, dtype=np.float32)])
    for alpha in (1.0, 1.5, 2.0):
        assert_same(both(other, alpha)[0], both(x, alpha)[0])


def test_softmax_n():
    x = np.array([[-3.0, 0.5, 2.0], [4.0, 1.0, -2.0]])
    with jax.enable_x64(True):
        for n in (0.0, 0.3, 1.0, 7.0):
            want = np.exp(x) / (n + np.exp(x).sum(-1, keepdims=True))
            np.testing.assert_allclose(softmax_n(x, n), want, rtol=1e-14)
            jacobian = jax.jacfwd(lambda n: softmax_n(x, n))(n)
            want = -want / (n + np.exp(x).sum(-1, keepdims=True))
            np.testing.assert_allclose(jacobian, want, rtol=1e-13)
        padded = jax.nn.softmax(jnp.pad(x, ((0, 0), (0, 1))))[:, :-1]
        np.testing.assert_allclose(softmax_n(x), padded, rtol=1e-14)
        np.testing.assert_allclose(softmax_n(x, 0.0), jax.nn.softmax(x), rtol=1e-14)
        by_row = softmax_n(x, jnp.array([0.0, 2.0]))
        np.testing.assert_allclose(by_row[1], softmax_n(x[1], 2.0), rtol=1e-14)
        weights, total = softmax_with_sink(jnp.asarray(x), jnp.log(7.0)[None, None], True)
        np.testing.assert_allclose(weights, softmax_n(x, 7.0), rtol=1e-14)
        np.testing.assert_allclose(total, np.log(7 + np.exp(x).sum(-1)), rtol=1e-14)
    assert np.abs(softmax_n(x + 1) - softmax_n(x)).max() > 0.01  # the zero logit is a fixed level


@pytest.mark.parametrize("level", [-1e30, -1e4, -90.0, 0.0, 90.0, 1e4, 1e30])
@pytest.mark.parametrize("n", [0.0, 1e-30, 1.0, 1e30])
def test_softmax_n_at_any_logits(level, n):
    x = jnp.array([level, level, -jnp.inf], jnp.float32)
    p = softmax_n(x, n)
    by_x, by_n = jax.jacrev(softmax_n, (0, 1))(x, n)
    assert all(np.isfinite(a).all() for a in (p, by_x))
    # with no sink and logits that underflow, one unit of n is more than all weights together
    assert np.isfinite(by_n).all()
    with np.errstate(over="ignore"):
        expected = 1 / (2 + n * np.exp(np.minimum(-np.float64(level), 700)))
    np.testing.assert_allclose(p, [expected, expected, 0], rtol=1e-4, atol=1e-30)


@settings(max_examples=30)
@given(rng=rows, scale=scales, k=st.sampled_from([1, 3, 8]))
def test_k_subsets(rng, scale, k):
    """The conditions of the projection: one threshold, weights in [0, 1], sum k."""
    x = rng.normal(size=(5, 9)) * scale
    with jax.enable_x64(True):
        p = np.asarray(subsets(x, k))
        gradient = conjugate_gradient(x, k)
    np.testing.assert_allclose(gradient, p, atol=1e-9)
    assert (p >= 0).all() and (p <= 1).all()
    np.testing.assert_allclose(p.sum(-1), k, rtol=1e-9)
    for row, weights in zip(x, p, strict=True):
        free = (weights > 0) & (weights < 1)
        threshold = (row - weights)[free]
        np.testing.assert_allclose(threshold, threshold.mean() if free.any() else 0, atol=1e-9)
        if (weights == 1).any() and (weights == 0).any():
            assert row[weights == 1].min() >= row[weights == 0].max()
    if k == 1:
        np.testing.assert_allclose(p, [by_sorting(row, 2) for row in x], atol=1e-9)


def test_k_subsets_derivatives_and_small_rows():
    x, dx = np.random.default_rng(4).normal(size=(2, 4, 9))
    with jax.enable_x64(True):
        call = jax.jit(lambda x: k_subsets(x, 3))
        tangent = jax.jvp(call, (x,), (dx,))[1]
        difference = (call(x + 1e-6 * dx) - call(x - 1e-6 * dx)) / 2e-6
        np.testing.assert_allclose(tangent, difference, atol=1e-8)
    few = k_subsets(x.astype(np.float32), 5, where=np.arange(9) < 4)
    assert_same(few, np.tile(np.arange(9) < 4, (4, 1)).astype(np.float32))


def test_16_bit():
    x = jnp.asarray(np.random.default_rng(5).normal(size=(4, 9)), jnp.bfloat16)
    for call in (entmax, sparsemax, softmax_n, lambda x: k_subsets(x, 2)):
        p = call(x)
        assert p.dtype == jnp.bfloat16
        assert_same(p, call(x.astype(jnp.float32)).astype(jnp.bfloat16))


def test_bad_input():
    x = np.zeros((2, 3), np.float32)
    for message, call in (
        ("alpha: expected a number in [1, 2], got 2.5", lambda: entmax(x, 2.5)),
        ("alpha: expected a shape that broadcasts", lambda: entmax(x, jnp.ones(3))),
        ("n: expected a shape that broadcasts", lambda: softmax_n(x, jnp.ones((2, 3)))),
        ("x: expected a floating-point array, got dtype int32", lambda: entmax(jnp.arange(3))),
        ("x: expected an array [..., n], got a number", lambda: sparsemax(jnp.float32(1))),
        ("where: expected bool, got float32", lambda: entmax(x, where=x)),
        ("where: expected a shape that", lambda: softmax_n(x, where=np.ones((3, 3), bool))),
        ("k: expected an integer of at least 1, got 0", lambda: k_subsets(x, 0)),
    ):
        with pytest.raises(ValueError) as error:
            call()
        assert str(error.value).startswith(message)
