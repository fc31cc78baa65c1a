"""The building blocks: triangular inverse, decays between positions, chunks, segments, checks."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memseq.pallas_kernels.common import checks, chunks, decay, precision, products, segments
from memseq.pallas_kernels.common.triangular import unit_lower_inverse
from tests.pallas_kernels.harness import assert_close, correlated_keys, hard_decay

HIGHEST = jax.lax.Precision.HIGHEST


@pytest.mark.parametrize("cosine", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("beta", [0.5, 1.0, 2.0])
def test_inverse_is_as_exact_as_float32(cosine, beta):
    """Relative Frobenius error; Neumann squaring is off by 4e18 in the hardest of these."""
    keys = correlated_keys(np.random.default_rng(0), 2, 64, 3, 128, cosine)
    keys = np.moveaxis(keys, 2, 1).astype(np.float32).astype(np.float64)
    system = np.tril(beta * keys @ np.swapaxes(keys, -1, -2), -1)
    expected = np.linalg.inv(np.eye(64) + system)
    # what lies on and above the diagonal is not read
    found = jax.jit(unit_lower_inverse)((system + np.triu(np.ones((64, 64)))).astype(np.float32))
    assert np.isfinite(found).all()
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    np.testing.assert_array_less(error, 3e-6)


@pytest.mark.parametrize("size", [1, 2, 8])
def test_derivatives_of_the_inverse(size):
    """The rule, forward, backward and twice, beside automatic ones through a general inverse."""
    rng = np.random.default_rng(0)
    a, da, weights = rng.normal(size=(3, 2, size, size))

    def general(a):
        return jnp.linalg.inv(jnp.eye(size) + jnp.tril(a, -1))

    def derivatives(inverse):
        def loss(a):
            return (jnp.sin(inverse(a)) * weights).sum()

        return jax.jit(
            lambda a, da: (
                jax.jvp(inverse, (a,), (da,)),
                jax.grad(loss)(a),
                jax.jvp(jax.grad(loss), (a,), (da,))[1],
            )
        )

    with jax.enable_x64(True):
        found = derivatives(unit_lower_inverse)(a, da)
        assert_close(found, derivatives(general)(a, da), 1e-9)
        np.testing.assert_array_equal(np.triu(found[1]), 0)


PRODUCTS = [
    (products.scores, "...id,...jd->...ij", (5, 3), (4, 3)),
    (products.weighted, "...ij,...jd->...id", (5, 4), (4, 3)),
    (products.outer_sum, "...id,...ie->...de", (5, 3), (5, 4)),
]


@pytest.mark.parametrize("product, equation, left, right", PRODUCTS)
def test_products_and_their_derivatives(product, equation, left, right):
    """Forward, backward and twice, beside those of einsum."""
    rng = np.random.default_rng(0)
    pairs = [(rng.normal(size=(2, 6, *left)), rng.normal(size=(2, 6, *right))) for _ in range(2)]

    def derivatives(product):
        def loss(pair):
            return jnp.sin(product(*pair)).sum()

        return jax.jit(
            lambda pair, tangents: (
                jax.jvp(product, pair, tangents),
                jax.grad(loss)(pair),
                jax.jvp(jax.grad(loss), (pair,), (tangents,))[1],
                jax.vmap(product)(*pair),
            )
        )(*pairs)

    with jax.enable_x64(True):
        found = derivatives(lambda a, b: product(a, b, HIGHEST))
        expected = derivatives(lambda a, b: jnp.einsum(equation, a, b, precision=HIGHEST))
        assert_close(found, expected, 1e-12)


@pytest.mark.parametrize("product, equation, left, right", PRODUCTS)
def test_products_contract_the_last_axis_of_the_left_matrix(product, equation, left, right):
    """As a CPU likes it, in the backward pass too: there alone a stack uses all of its cores."""
    shapes = [jax.ShapeDtypeStruct((32, 8, 8), jnp.float32)] * 2
    gradients = jax.grad(lambda a, b: jnp.sin(product(a, b, HIGHEST)).sum(), argnums=(0, 1))
    lowered = jax.jit(gradients).lower(*shapes)
    left_axes = re.findall(r"contracting_dims = \[(\d)\] x", lowered.as_text())
    assert left_axes == ["2"] * 3


def test_inverse_wants_a_power_of_two():
    with pytest.raises(ValueError, match="power of two as size, got 6"):
        unit_lower_inverse(jnp.ones((6, 6)))


def sum_between(g, i, j, exclusive):
    """The sum of g over (j, i], or (j, i) if exclusive, in float64."""
    return g[j + 1 : i + (not exclusive)].astype(np.float64).sum(axis=0)


@pytest.mark.parametrize("exclusive", [False, True])
def test_pair_sums(exclusive):
    """Relative to each sum, so nothing is lost of a small one after many large ones."""
    g = hard_decay(np.random.default_rng(0), (2, 16)).astype(np.float32)
    sums = np.asarray(decay.pair_sums(jnp.asarray(g), exclusive))
    for b, i, j in np.ndindex(sums.shape):
        expected = sum_between(g[b], i, j, exclusive) if j < i else 0
        np.testing.assert_allclose(sums[b, i, j], expected, rtol=1e-6, atol=0)


def test_small_differences_of_large_sums():
    """After sixty steps of -20 a small log decay counts as much as after none."""
    small = -np.logspace(-6, 0, 4, dtype=np.float32)
    g = np.concatenate([np.full(60, -20, np.float32), small])
    sums = np.asarray(decay.pair_sums(jnp.asarray(g)))[60:, 60:]
    np.testing.assert_array_equal(sums, np.asarray(decay.pair_sums(jnp.asarray(small))))


@pytest.mark.parametrize("exclusive", [False, True])
def test_derivatives_of_pair_sums(exclusive):
    """Of a step count the pairs that straddle it: exactly nothing where those have no gradient."""
    rng = np.random.default_rng(0)
    g, tangent = hard_decay(rng, (2, 16)).astype(np.float32), rng.normal(size=(2, 16))
    moved = [
        [sum_between(t, i, j, exclusive) if j < i else 0 for i in range(16) for j in range(16)]
        for t in tangent
    ]
    moved = np.reshape(moved, (2, 16, 16))
    cotangents = np.where(np.arange(16) < 7, rng.normal(size=(2, 16, 16)), 0)
    cotangents[:, 9:] = 0  # pairs from before 7 to before 9

    def derivatives(g, tangent, cotangents):
        forward = jax.jvp(lambda g: decay.pair_sums(g, exclusive), (g,), (tangent,))[1]
        return forward, jax.vjp(lambda g: decay.pair_sums(g, exclusive), g)[1](cotangents)[0]

    with jax.enable_x64(True):
        found = jax.jit(derivatives)(g.astype(np.float64), tangent, cotangents)
    forward, backward = map(np.asarray, found)
    np.testing.assert_allclose(forward, moved, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose((backward * tangent).sum(), (cotangents * moved).sum(), rtol=1e-10)
    np.testing.assert_array_equal(backward[:, 9:], 0)


def test_sums_from_start_and_to_end():
    g = hard_decay(np.random.default_rng(0), (3, 8, 2))
    before = np.pad(g.cumsum(1), ((0, 0), (1, 0), (0, 0)))
    with jax.enable_x64(True):
        np.testing.assert_allclose(decay.sums_from_start(g, 1), before[:, 1:])
        np.testing.assert_allclose(decay.sums_from_start(g, 1, exclusive=True), before[:, :-1])
        np.testing.assert_allclose(
            decay.sums_to_end(g, -2), g.sum(1, keepdims=True) - before[:, 1:]
        )


@pytest.mark.parametrize("exclusive", [False, True])
@pytest.mark.parametrize("size", [1, 2, 16])
def test_sums_and_products_with_decay_of_channels(size, exclusive):
    rng = np.random.default_rng(0)
    rows, columns = rng.normal(size=(2, 2, size, 3))
    values = rng.normal(size=(2, size, 4))
    g, value_g = hard_decay(rng, (2, size, 3)), hard_decay(rng, (2, size, 4))
    weights = np.tril(rng.normal(size=(2, size, size)))
    products, total = np.zeros((2, size, size)), np.zeros((2, size, 4))
    for b, i, j in np.ndindex(2, size, size):
        if j > i:
            continue
        kept = np.exp(sum_between(g[b], i, j, exclusive)) if j < i else 1
        products[b, i, j] = (rows[b, i] * columns[b, j] * kept).sum()
        kept = np.exp(sum_between(value_g[b], i, j, exclusive)) if j < i else 1
        total[b, i] += weights[b, i, j] * values[b, j] * kept
    options = {"exclusive": exclusive, "precision": HIGHEST}

    @jax.jit
    def run(rows, columns, g, weights, values, value_g):
        return (
            decay.decayed_products(rows, columns, g, diagonal=True, **options),
            decay.decayed_products(rows, columns, g, diagonal=False, **options),
            decay.decayed_sum(weights, values, value_g, **options),
        )

    with jax.enable_x64(True):
        found = run(rows, columns, g, weights, values, value_g)
    assert_close(found, (products, np.tril(products, -1), total), 1e-12)


def test_exponents_are_never_positive():
    """So no gate overflows, whatever its size."""
    g = np.full((32, 2), -1e4, np.float32)
    for exclusive in (False, True):
        for _, later, earlier in jax.jit(lambda g, e=exclusive: list(decay.halves(g, e)))(g):
            np.testing.assert_array_less(np.concatenate([later, earlier]), 1e-30)
        sums = jax.jit(decay.pair_sums, static_argnums=1)(g.T, exclusive)
        np.testing.assert_array_less(sums, 1e-30)
        assert np.isfinite(sums).all()


def test_a_masked_exponent_has_no_gradient():
    x = jnp.array([1.0, 1e5, -2.0])
    mask = jnp.array([True, False, True])
    value, gradient = jax.value_and_grad(lambda x: decay.masked_exp(x, mask).sum())(x)
    np.testing.assert_allclose(value, np.exp(1) + np.exp(-2), rtol=1e-6)
    np.testing.assert_allclose(gradient, [np.exp(1), 0, np.exp(-2)], rtol=1e-6)


@pytest.mark.parametrize(
    "chunk_size, time, length",
    [(None, 1, 1), (None, 3, 4), (None, 500, 64), (16, 500, 16), (48, 500, 64), (1, 9, 1)],
)
def test_chunk_length(chunk_size, time, length):
    assert chunks.chunk_length(chunk_size, time) == length


def test_chunks_there_and_back():
    x = np.random.default_rng(0).normal(size=(2, 7, 3, 5)).astype(np.float32)
    cut = chunks.to_chunks(jnp.asarray(x), 4)
    assert cut.shape == (2, 3, 2, 4, 5)
    np.testing.assert_array_equal(cut[:, :, 1, :3], np.moveaxis(x[:, 4:], 1, 2))
    np.testing.assert_array_equal(cut[:, :, 1, 3], 0)
    np.testing.assert_array_equal(chunks.from_chunks(cut, 7), x)


ids_of_rows = st.lists(st.integers(-2, 2), min_size=11, max_size=11)


@jax.jit
def read_segments(ids):
    found = segments.segments(ids)
    nine = jnp.array([9], jnp.int32)
    return (
        found,
        segments.restarts(found.index),
        segments.segment_positions(found),
        segments.first_segment(ids, nine)[0],
        segments.last_segment(ids, nine)[0],
    )


@given(ids_of_rows)
def test_segments_and_positions(ids):
    """Beside a walk over the row."""
    index, positions, restarts, count, segment, last = [], [], [], 0, 0, None
    for now in ids:
        restart = now >= 0 and last is not None and now != last
        if restart:
            segment, count = segment + 1, 0
        index.append(segment)
        restarts.append(restart)
        positions.append(count if now >= 0 else max(count - 1, 0))
        if now >= 0:
            count, last = count + 1, now
    found, restarted, counted, first, final = read_segments(np.array([ids], np.int32))
    np.testing.assert_array_equal(found.valid[0], np.array(ids) >= 0)
    np.testing.assert_array_equal(found.index[0], index)
    np.testing.assert_array_equal(restarted[0], restarts)
    np.testing.assert_array_equal(counted[0], positions)
    valid = [now for now in ids if now >= 0] or [9]
    assert (first, final) == (valid[0], valid[-1])


masks_of_ids = jax.jit(
    lambda ids, chunk: chunks.chunk_masks(segments.segments(ids).index, ids.shape[1], chunk),
    static_argnums=1,
)


@given(ids_of_rows, st.sampled_from([1, 4, 8]))
def test_chunk_masks(ids, chunk):
    ids = np.array([ids], np.int32)
    index = np.asarray(read_segments(ids)[0].index)
    masks = jax.tree.map(np.asarray, masks_of_ids(ids, chunk))
    index = np.pad(index[0], (0, -ids.shape[1] % chunk), mode="edge").reshape(-1, chunk)
    start = 0
    for n, own in enumerate(index):
        pairs = np.tril(own[:, None] == own[None])
        np.testing.assert_array_equal(masks.pairs[0, 0, n], pairs)
        np.testing.assert_array_equal(masks.from_start[0, 0, n], own == start)
        np.testing.assert_array_equal(masks.to_end[0, 0, n], own == own[-1])
        assert masks.carried[0, 0, n] == (start == own[-1])
        start = own[-1]


def test_hide_padding():
    x = jnp.full((1, 3, 2), jnp.nan).at[:, 1].set(2)
    hidden = segments.hide_padding(x, jnp.array([[False, True, False]]))
    np.testing.assert_array_equal(hidden[0], [[0, 0], [2, 2], [0, 0]])
    assert segments.hide_padding(None, None) is None


def test_dtypes():
    half, single = jnp.ones(1, jnp.bfloat16), jnp.ones(1)
    assert checks.state_dtype(half, None, half) == jnp.float32
    assert checks.state_dtype(np.ones(1), single) == jnp.float32  # as JAX takes it without x64
    assert precision.products_precision(half, half) == jax.lax.Precision.DEFAULT
    assert precision.products_precision(half, single) == HIGHEST
    with jax.enable_x64(True):
        assert checks.state_dtype(half, np.ones(1)) == jnp.float64
