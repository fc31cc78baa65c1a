"""Sparse Hopfield layers, STanHop, U-Hop and the Energy Transformer, against their equations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memseq.layers import (
    EnergyTransformerBlock,
    GeneralizedSparseHopfield,
    Hopfield,
    SparseHopfield,
    STanHopBlock,
    UHopfield,
)
from memseq.layers.hopfield.feature_map import separation_loss
from tests.layers.test_hopfield import channel, dense, draw, norm, run
from tests.pallas_kernels.test_entmax import by_bisection

FEATURES = 8
rng = np.random.default_rng(7)
X = rng.normal(size=(2, 5, FEATURES))
MASK = np.array([[True] * 5, [True] * 3 + [False] * 2])


def associate(p, x, stored, heads):
    """Entmax association of x [n, features] with stored [patterns, features], alpha learned."""
    alpha = 1 + 1 / (1 + np.exp(-p["alpha_logit"]))
    query = dense(p["query"], norm(p["query_norm"], x))
    key = dense(p["key"], norm(p["stored_norm"], stored))
    value = dense(p["value"], norm(p["value_norm"], stored))
    outs = []
    for q, k, v in zip(*(np.split(a, heads, axis=-1) for a in (query, key, value)), strict=True):
        scores = q @ k.T / np.sqrt(q.shape[-1])
        outs.append(np.stack([by_bisection(row, alpha) for row in scores]) @ v)
    return dense(p["output"], np.concatenate(outs, axis=-1))


def test_sparse_layers_are_presets():
    params = draw(SparseHopfield(FEATURES, heads=2), X)
    same = Hopfield(FEATURES, heads=2, separation="sparsemax")
    np.testing.assert_array_equal(
        run(SparseHopfield(FEATURES, heads=2), params, X), run(same, params, X)
    )
    layer = GeneralizedSparseHopfield(FEATURES, heads=2)
    params = draw(layer, X)
    y = run(layer, params, X)
    for b in range(2):
        np.testing.assert_allclose(y[b], associate(params, X[b], X[b], 2), atol=1e-9)
    start = layer.init(jax.random.key(0), X)["params"]["alpha_logit"]
    np.testing.assert_allclose(start, 0, atol=1e-6)  # alpha = 1.5


def test_stanhop_block():
    """Along time, then across series through the pooled patterns; masked times are 0."""
    layer = STanHopBlock(FEATURES, heads=2, patterns=2)
    x = rng.normal(size=(2, 3, 4, FEATURES))  # batch, series, time
    mask = rng.random((2, 3, 4)) < 0.8
    mask[:, 0] = True
    params = draw(layer, x)
    y = run(layer, params, x, mask)
    for b in range(2):
        rows = np.zeros((3, 4, FEATURES))
        for s in range(3):
            seen = mask[b, s]
            part = x[b, s, seen]
            rows[s, seen] = channel(
                params["time_channel"], part + associate(params["time"], part, part, 2)
            )
        want = np.zeros_like(rows)
        for t in range(4):
            seen = mask[b, :, t]
            part = rows[seen, t]
            pooled = associate(params["pool"], params["pool"]["state_patterns"], part, 2)
            want[seen, t] = channel(
                params["series_channel"], part + associate(params["series"], part, pooled, 2)
            )
        np.testing.assert_allclose(y[b], want, atol=1e-8)
    with pytest.raises(ValueError, match=r"mask: expected bool \[batch, series, time\]"):
        layer.apply({"params": params}, x, mask[:, :, :2])


def mapped_energy(layer, params, x, stored):
    """x A x / 2 - log-sum-exp(beta Y A x) / beta for A = W W^T, [n]."""
    w = params["key"]["kernel"]
    scores = layer.beta * (stored @ w) @ (x @ w).T
    total = np.log(np.exp(scores).sum(0)) / layer.beta
    return ((x @ w) ** 2).sum(-1) / 2 - total


def test_u_hop_lowers_the_energy_in_the_norm_of_its_map():
    """H1 for U-Hop: by half the square of the unmapped step in the norm of A."""
    layer = UHopfield(FEATURES, beta=0.7, head_dim=6)
    params = draw(layer, X, stored=X)
    stored, w = X[:1], params["key"]["kernel"]
    x = rng.normal(size=(1, 40, FEATURES))
    for _ in range(5):
        new = run(layer, params, x, stored=stored)
        before, after = (mapped_energy(layer, params, a[0], stored[0]) for a in (x, new))
        moved = (((new - x)[0] @ w) ** 2).sum(-1) / 2
        assert (after <= before - moved + 1e-10).all()
        x = new


def test_separation_loss_pulls_patterns_apart():
    """The loss is its definition; training the map on it raises the least separation and recall."""
    u = X / np.linalg.norm(X, axis=-1, keepdims=True)
    for b in range(2):
        seen = u[b, MASK[b]]
        distances = ((seen[:, None] - seen[None]) ** 2).sum(-1)[~np.eye(len(seen), dtype=bool)]
        want = np.log(np.exp(-2 * distances).mean())
        with jax.enable_x64(True):
            found = separation_loss(jnp.asarray(X), MASK)[b]
        np.testing.assert_allclose(found, want, atol=1e-9)
    nothing = separation_loss(jnp.asarray(X, jnp.float32), np.zeros((2, 5), bool))
    np.testing.assert_array_equal(nothing, 0)

    correlated = (np.full(16, 3.0) + rng.normal(size=(1, 30, 16))).astype(np.float32)
    layer = UHopfield(16, beta=1.0)
    params = layer.init(jax.random.key(0), correlated, stored=correlated)
    loss = jax.jit(
        jax.value_and_grad(lambda p: layer.apply(p, correlated, method="separation_loss").sum())
    )

    def least(params):
        mapped = np.asarray(correlated[0] @ params["params"]["key"]["kernel"], np.float64)
        mapped /= np.linalg.norm(mapped, axis=-1, keepdims=True)
        products = mapped @ mapped.T
        return 1 - (products - 2 * np.eye(30)).max()

    first, before = loss(params)[0], least(params)
    for _ in range(200):
        _, gradient = loss(params)
        params = jax.tree.map(lambda p, g: p - 0.3 * g, params, gradient)
    assert loss(params)[0] < first - 1 and least(params) > 3 * before


def test_energy_transformer():
    """E1: the descent is the hand-written two-term update, and the energy falls at every step."""
    layer = EnergyTransformerBlock(FEATURES, heads=2, memories=6, steps=3, step_size=0.07)
    params = draw(layer, X)
    beta = 4**-0.5
    y, energies, tokens = run(layer, params, X, MASK, method="descend")
    np.testing.assert_array_equal(tokens[:, -1][MASK], y[MASK])
    for b in range(2):
        x = X[b, MASK[b]]
        n = len(x)
        for step in range(4):
            centred = x - x.mean(-1, keepdims=True)
            g = params["scale"] * centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
            g = g + params["bias"]
            slope, energy = np.zeros_like(g), 0.0
            for head in range(2):
                columns = slice(4 * head, 4 * head + 4)
                w_q, w_k = (params[name]["kernel"][:, columns] for name in ("query", "key"))
                scores = beta * (g @ w_q) @ (g @ w_k).T
                scores[np.eye(n, dtype=bool)] = -np.inf
                p = np.exp(scores - scores.max(-1, keepdims=True))
                energy -= np.log(np.exp(scores).sum(-1)).sum() / beta
                p /= p.sum(-1, keepdims=True)
                slope -= p @ (g @ w_k) @ w_q.T + p.T @ (g @ w_q) @ w_k.T
            hidden = np.maximum(g @ params["memory"]["kernel"], 0)
            energy -= (hidden**2).sum() / 2
            slope -= hidden @ params["memory"]["kernel"].T
            np.testing.assert_allclose(tokens[b, step, MASK[b]], x, atol=1e-9)
            np.testing.assert_allclose(energies[b, step], energy, rtol=1e-9)
            x = x - 0.07 * slope


@pytest.mark.parametrize("scale", [1.0, 0.3, 0.02])
def test_energy_transformer_descends(scale):
    """E1 over 30 steps, from several sizes of the weights and of the steps."""
    x = rng.normal(size=(2, 7, 16))
    for step_size in (0.1, 0.01):
        layer = EnergyTransformerBlock(16, heads=2, steps=30, step_size=step_size)
        params = draw(layer, x)
        params = {k: scale / 2 * v["kernel"] for k, v in params.items() if isinstance(v, dict)}
        params = {k: {"kernel": v} for k, v in params.items()}
        params |= {"scale": np.ones(()), "bias": np.zeros(16)}
        _, energies, _ = run(layer, params, x, method="descend")
        assert np.isfinite(energies).all() and (np.diff(energies) < 0).all()


def test_energy_transformer_details():
    layer = EnergyTransformerBlock(FEATURES, heads=2, steps=2)
    params = draw(layer, X)
    alone = run(layer, params, X[:, :1])  # a token alone has nobody to attend to
    assert np.isfinite(alone).all()
    other = run(layer.clone(exclude_self=False), params, X)
    assert np.abs(other - run(layer, params, X)).max() > 1e-3
    with pytest.raises(ValueError, match="heads: features 8 must be a multiple"):
        EnergyTransformerBlock(FEATURES, heads=3).init(jax.random.key(0), X)
