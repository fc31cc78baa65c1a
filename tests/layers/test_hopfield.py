"""Hopfield layers: the equations again in NumPy, retrieval without training, the peer's defects."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memseq.layers import (
    CROSS_LAYERS,
    Hopfield,
    HopfieldDecoderBlock,
    HopfieldEncoderBlock,
    HopfieldLookup,
    HopfieldPooling,
)

FEATURES = 8


def draw(layer, *inputs, seed=0, **kwargs):
    """Random parameters of the layer's shapes, NumPy float64."""
    init = functools.partial(layer.init, **kwargs)
    shapes = jax.eval_shape(init, jax.random.key(0), *inputs).get("params", {})
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda a: 0.5 * rng.normal(size=a.shape), shapes)


def run(layer, params, *inputs, **kwargs):
    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, layer.apply({"params": params}, *inputs, **kwargs))


def norm(p, x):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]


def dense(p, x):
    return x @ p["kernel"] + p["bias"]


def softmax(z):
    z = np.exp(z - z.max(-1, keepdims=True))
    return z / z.sum(-1, keepdims=True)


def associate(p, x, stored, heads, beta, steps, values=None):
    """One set: x [n, features], stored [patterns, features]; beta a number for each head."""
    query = dense(p["query"], norm(p["query_norm"], x))
    key = dense(p["key"], norm(p["stored_norm"], stored))
    value = dense(p["value"], norm(p["value_norm"], stored if values is None else values))
    outs = []
    for q, k, v, b in zip(
        *(np.split(a, heads, axis=-1) for a in (query, key, value)), beta, strict=True
    ):
        for _ in range(steps - 1):
            q = softmax(b * q @ k.T) @ k
        outs.append(softmax(b * q @ k.T) @ v)
    return dense(p["output"], np.concatenate(outs, axis=-1))


rng = np.random.default_rng(7)
X = rng.normal(size=(2, 5, FEATURES))
Y = rng.normal(size=(2, 7, FEATURES))
V = rng.normal(size=(2, 7, FEATURES))


def test_transcription():
    layer = Hopfield(FEATURES, heads=2, steps=3, learned_beta="per_head")
    params = draw(layer, X)
    beta = np.exp(params["log_beta"])
    y = run(layer, params, X)
    stored = run(layer, params, X, stored=Y, values=V)
    for b in range(2):
        np.testing.assert_allclose(y[b], associate(params, X[b], X[b], 2, beta, 3), atol=1e-9)
        want = associate(params, X[b], Y[b], 2, beta, 3, V[b])
        np.testing.assert_allclose(stored[b], want, atol=1e-9)


def test_transcription_of_pooling_and_lookup():
    pooling = HopfieldPooling(FEATURES, heads=2, steps=2, patterns=3)
    params = draw(pooling, X)
    y = run(pooling, params, X)
    beta = np.full(2, 4**-0.5)
    for b in range(2):
        want = associate(params, params["state_patterns"], X[b], 2, beta, 2)
        np.testing.assert_allclose(y[b], want, atol=1e-9)
    lookup = HopfieldLookup(FEATURES, heads=2, steps=2, patterns=6, separate_values=True, beta=2)
    params = draw(lookup, X)
    y = run(lookup, params, X)
    tables = (params["stored_patterns"], params["value_patterns"])
    for b in range(2):
        want = associate(params, X[b], tables[0], 2, [2, 2], 2, tables[1])
        np.testing.assert_allclose(y[b], want, atol=1e-9)


def gelu(x):
    return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def channel(p, x):
    return x + dense(p["down"], gelu(dense(p["up"], norm(p["norm"], x))))


def test_transcription_of_the_blocks():
    beta = np.full(2, 4**-0.5)
    encoder = HopfieldEncoderBlock(FEATURES, heads=2, options=(("steps", 2),))
    params = draw(encoder, X)
    y = run(encoder, params, X)
    for b in range(2):
        want = X[b] + associate(params["association"], X[b], X[b], 2, beta, 2)
        np.testing.assert_allclose(y[b], channel(params["channel"], want), atol=1e-9)
    decoder = HopfieldDecoderBlock(FEATURES, heads=2)
    params = draw(decoder, X, Y)
    y, state = run(decoder, params, X, Y)
    again, _ = run(decoder, params, X, None, jax.tree.map(np.asarray, state))
    np.testing.assert_allclose(again, y, atol=1e-12)
    for b in range(2):
        want = X[b] + associate(params["association"], X[b], X[b], 2, beta, 1)
        want = want + associate(params["recall"], want, Y[b], 2, beta, 1)
        np.testing.assert_allclose(y[b], channel(params["channel"], want), atol=1e-9)


@pytest.mark.parametrize("name", [name for name in CROSS_LAYERS if name.startswith("hopfield")])
def test_cross_layers(name):
    """y, state = layer(x, memory, state): batch first, masks, bf16, and nothing to read is said."""
    layer = CROSS_LAYERS[name](FEATURES, heads=2)
    params = draw(layer, X, Y)
    mask = np.array([[True] * 4 + [False] * 3, [False] * 7])
    y, state = run(layer, params, X, Y, memory_mask=mask)
    assert all(a.shape[0] == 2 for a in jax.tree.leaves(state))
    short, _ = run(layer, params, X[:1], Y[:1, :4])
    np.testing.assert_allclose(y[:1], short, atol=1e-12)
    dirty = np.where(mask[..., None], Y, np.nan)
    np.testing.assert_array_equal(run(layer, params, X, dirty, memory_mask=mask)[0], y)
    narrow, _ = layer.clone(dtype=jnp.bfloat16).apply({"params": params}, X, Y)
    assert narrow.dtype == jnp.bfloat16
    with pytest.raises(ValueError, match="memory: expected patterns or a state"):
        layer.apply({"params": params}, X)


@pytest.mark.parametrize("separation", ["softmax", "softmax_n", "entmax", "sparsemax"])
def test_retrieval_needs_no_training(separation):
    """H7: half of each of 40 patterns of +-1 is hidden; one step brings all of it back."""
    patterns = np.sign(np.random.default_rng(0).normal(size=(1, 40, 64))).astype(np.float32)
    half = patterns.copy()
    half[..., 32:] = 0
    layer = Hopfield.retrieval_only(64, beta=1.0, steps=3, separation=separation)
    assert not layer.init(jax.random.key(0), half, stored=patterns)
    found = layer.apply({}, half, stored=patterns)
    np.testing.assert_allclose(found, patterns, atol=1e-3)
    states = layer.apply({}, half, patterns, 3, method="retrieve")
    np.testing.assert_allclose(states[:, :, 0], patterns, atol=1e-3)
    associations = layer.apply({}, half, patterns, method="associations")
    np.testing.assert_allclose(associations[0, 0], np.eye(40), atol=1e-3)
    energies = layer.apply({}, half, patterns, method="energy")
    assert energies.shape == (1, 40, 1, 3)
    assert (np.diff(np.asarray(energies)) <= 1e-4).all()
    named = layer.apply({}, half, stored=patterns, values=np.eye(64, dtype=np.float32)[None, :40])
    np.testing.assert_array_equal(np.argmax(named[0], -1), np.arange(40))


def test_every_head_has_its_own_beta():
    """Peer defect 1: the temperatures of two heads, exchanged, exchange what the heads do."""
    layer = Hopfield(FEATURES, heads=2, learned_beta="per_head", beta=1)
    params = draw(layer, X)
    weights = {}
    for name, beta in (("ab", [0.1, 5.0]), ("aa", [0.1, 0.1]), ("bb", [5.0, 5.0])):
        params["log_beta"] = np.log(beta)
        weights[name] = run(layer, params, X, method="associations")
    np.testing.assert_allclose(weights["ab"][:, 0], weights["aa"][:, 0], atol=1e-12)
    np.testing.assert_allclose(weights["ab"][:, 1], weights["bb"][:, 1], atol=1e-12)
    assert np.abs(weights["aa"] - weights["bb"]).max() > 0.1


OPTIONS = {
    "bias_pattern": {"bias_pattern": True},
    "learned_beta": {"learned_beta": "shared"},
    "learned_alpha": {"separation": "entmax", "learned_alpha": True},
    "learned_sink": {"separation": "softmax_n", "learned_sink": True},
    "steps": {"steps": 2},
    "separation": {"separation": "sparsemax"},
    "budget": {"separation": "budget", "budget": 2},
    "state_norm": {"steps": 2, "state_norm": "l2"},
    "no norms": {"normalize": (False, True, False)},
    "head_dim": {"head_dim": 6, "value_dim": 3},
    "static query": {"project": (False, True, True, True)},
    "static key": {"project": (True, False, True, True)},
    "static value": {"project": (True, True, False, True)},
    "shared_map": {"shared_map": True},
    "no bias": {"use_bias": False},
    "beta": {"beta": 3},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_changes_the_output_and_is_learned(name):
    """Peer defects 2 and 6: no option is silent, and every parameter has a gradient."""
    plain, layer = (Hopfield(FEATURES, heads=2, **options) for options in ({}, OPTIONS[name]))
    params, other = draw(plain, X), draw(layer, X)
    if jax.tree.map(np.shape, params) == jax.tree.map(np.shape, other):
        assert np.abs(run(plain, other, X) - run(layer, other, X)).max() > 1e-3
    with jax.enable_x64(True):
        gradients = jax.jit(jax.grad(lambda p: jnp.sum(jnp.cos(layer.apply({"params": p}, X)))))(
            other
        )
    for path, g in jax.tree.leaves_with_path(gradients):
        where = jax.tree_util.keystr(path)
        assert np.isfinite(g).all(), where
        # of all keys together: a shift of the scores of one query changes nothing
        if where != "['key']['bias']" and where != "['stored_norm']['bias']":
            assert np.abs(g).max() > 1e-9, where


def test_bias_patterns_take_part():
    """Peer defect 2: one more column, with weight."""
    layer = Hopfield(FEATURES, heads=2, bias_pattern=True)
    weights = run(layer, draw(layer, X), X, method="associations")
    assert weights.shape == (2, 2, 5, 6)
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-12)
    assert weights[..., -1].min() > 1e-4


@pytest.mark.parametrize("project", [(False, True, True, True), (True, False, True, True)])
def test_static_patterns_do_not_mix_the_batch(project):
    """Peer defect 3: with heads and unprojected patterns, a set still sees itself only."""
    layer = Hopfield(FEATURES, heads=2, project=project, steps=2)
    params = draw(layer, X)
    other = X.copy()
    other[1] += 1
    np.testing.assert_array_equal(run(layer, params, other)[0], run(layer, params, X)[0])


def test_whole_number_scale_and_affine_norms_without_sizes():
    """Peer defects 5 and 6."""
    layer = Hopfield(FEATURES, beta=1)
    params = draw(layer, X)
    same = run(layer.clone(beta=1.0), params, X)
    np.testing.assert_array_equal(run(layer, params, X), same)
    assert {"scale", "bias"} == set(params["query_norm"])


def test_equal_values_take_no_other_path():
    """Peer defect 7: whether stored is x itself or equal to it changes nothing, also under jit."""
    layer = Hopfield(FEATURES, heads=2)
    params = draw(layer, X)
    np.testing.assert_allclose(run(layer, params, X), run(layer, params, X, stored=X), atol=1e-12)
    traced = jax.jit(lambda x, y: layer.apply({"params": params}, x, stored=y))
    assert np.isfinite(traced(X, X.copy())).all()


def test_dropout_hides_patterns_in_training_only():
    layer = Hopfield.retrieval_only(FEATURES, 1.0, dropout=0.5)
    patterns = np.random.default_rng(0).normal(size=(1, 200, FEATURES)).astype(np.float32)
    patterns /= np.linalg.norm(patterns, axis=-1, keepdims=True)
    layer = layer.clone(separation="sparsemax", beta=1000.0)
    full = layer.apply({}, patterns, stored=patterns)
    np.testing.assert_array_equal(full, patterns)
    keys = {"dropout": jax.random.key(0)}
    found = layer.apply({}, patterns, stored=patterns, deterministic=False, rngs=keys)
    kept = (np.asarray(found) == patterns).all(-1).mean()
    assert 0.35 < kept < 0.65


def test_a_query_may_ask_for_nothing():
    """S4: a sink learns to answer queries that mean nothing with nothing; softmax cannot."""
    rng = np.random.default_rng(0)
    stored = 2 * rng.normal(size=(1, 12, 16)).astype(np.float32)
    known = stored + 0.2 * rng.normal(size=stored.shape).astype(np.float32)
    noise = rng.normal(size=(1, 12, 16)).astype(np.float32)
    query = np.concatenate([known, noise], axis=1)
    target = np.concatenate([stored, np.zeros_like(noise)], axis=1)
    norms = {}
    for separation in ("softmax", "softmax_n"):
        layer = Hopfield.retrieval_only(
            16,
            0.1,
            separation=separation,
            learned_beta="shared",
            learned_sink=separation == "softmax_n",
        )
        params = layer.init(jax.random.key(0), query, stored=stored)

        def loss(params, layer=layer):
            return jnp.mean(jnp.square(layer.apply(params, query, stored=stored) - target))

        @jax.jit
        def train(params, loss=loss):
            def step(params, _):
                return jax.tree.map(lambda p, g: p - g, params, jax.grad(loss)(params)), None

            return jax.lax.scan(step, params, None, length=1500)[0]

        out = np.asarray(layer.apply(train(params), query, stored=stored))
        norms[separation] = np.linalg.norm(out[0, 12:], axis=-1).mean()
        error = np.linalg.norm(out[0, :12] - stored[0], axis=-1).mean()
        assert separation == "softmax" or error < 0.3
    assert norms["softmax_n"] < 0.3 and norms["softmax"] > 2


def test_bad_input():
    for message, options in (
        ("heads: features 8 must be a multiple", {"heads": 3}),
        ("head_dim: expected features 8 where", {"project": (False,) * 4, "head_dim": 2}),
        ("learned_beta: expected one of None, 'shared'", {"learned_beta": "all"}),
        ("dropout: expected a share", {"dropout": 1.0}),
        ("shared_map: expected query and key", {"shared_map": True, "project": (False,) * 4}),
        ("steps: expected an integer of at least 1, got 0", {"steps": 0}),
        ("separation: expected one of", {"separation": "hard"}),
    ):
        with pytest.raises(ValueError) as error:
            Hopfield(FEATURES, **options).init(jax.random.key(0), X)
        assert str(error.value).startswith(message)
    layer = Hopfield.retrieval_only(FEATURES, 1.0)
    with pytest.raises(ValueError, match=r"stored: expected \[batch, patterns, features\]"):
        layer.apply({}, X, stored=X[..., :3])
    with pytest.raises(ValueError, match=r"values: expected \[batch, patterns, features\]"):
        layer.apply({}, X, stored=X, values=X[:, :2])
    with pytest.raises(ValueError, match="patterns: expected an integer"):
        HopfieldLookup(FEATURES, patterns=0).init(jax.random.key(0), X)
