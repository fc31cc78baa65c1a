"""B'MOJO and MemMamba against their equations, step by step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memseq.layers import BMojo, LayeredMemMamba, Mamba, MemMamba
from tests.layers.harness import (
    FEATURES,
    IDS,
    check_transcription,
    count,
    inputs,
    random_params,
    run64,
    segments_of,
    sigmoid,
)
from tests.layers.test_state_space_mamba import mamba


def softmax(x):
    weight = np.exp(x - x.max())
    return weight / weight.sum()


def bmojo(layer, params, x):
    """(y, innovations, the positions kept at the end)."""
    inner = Mamba(layer.features, state_dim=layer.state_dim)
    faded, _, _ = mamba(inner, params["fading"], x)
    names = ("query", "key", "value")
    query, key, value = ((x @ params[n]["kernel"]).reshape(len(x), layer.heads, -1) for n in names)
    more_key, more_value = (
        (faded @ params[f"fading_{n}"]["kernel"]).reshape(key.shape) for n in names[1:]
    )
    expected = np.concatenate([np.zeros_like(x[:1]), (faded @ params["expect"]["kernel"])[:-1]])
    surprise = np.mean((x - expected) ** 2, axis=1)
    kept, y = {}, []  # position -> innovation
    for t in range(len(x)):
        leaving = t - layer.window
        if leaving >= 0:
            if len(kept) < layer.kept:
                kept[leaving] = surprise[leaving]
            elif surprise[leaving] > min(kept.values()):
                del kept[min(kept, key=kept.get)]
                kept[leaving] = surprise[leaving]
        seen = [*kept, *range(max(leaving + 1, 0), t + 1)]
        out = []
        for h in range(layer.heads):
            keys = np.concatenate([key[seen, h], more_key[t : t + 1, h]])
            values = np.concatenate([value[seen, h], more_value[t : t + 1, h]])
            out.append(softmax(keys @ query[t, h] / np.sqrt(key.shape[-1])) @ values)
        y.append(np.concatenate(out) @ params["output"]["kernel"])
    return np.array(y), surprise, kept


LAYERS = {
    "small": BMojo(FEATURES, window=3, kept=2, state_dim=2),
    "no token is dropped": BMojo(FEATURES, heads=2, window=2, kept=30, state_dim=2),
    "default": BMojo(FEATURES),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("ids", [None, IDS], ids=["one segment", "packed"])
def test_bmojo(name, ids):
    layer, x = LAYERS[name], inputs()
    params = random_params(layer)
    y, state, _ = run64(layer, params, x, segment_ids=ids)
    rows = np.zeros(x.shape[:2], np.int32) if ids is None else ids
    for row, row_ids in enumerate(rows):
        for positions in segments_of(row_ids):
            want, surprise, kept = bmojo(layer, params, x[row, positions])
            np.testing.assert_allclose(y[row, positions], want, rtol=0, atol=1e-9)
        score = np.sort(np.asarray(state.memory_score)[row])[::-1]
        want = np.sort([surprise[t] for t in kept])[::-1]
        np.testing.assert_allclose(score[: len(kept)], want, rtol=0, atol=1e-9)
        np.testing.assert_array_equal(score[len(kept) :], -1)


def test_streaming_evicts_as_one_call():
    layer, x = LAYERS["small"], inputs()
    params = random_params(layer)
    want, want_state, _ = run64(layer, params, x)
    first, state, _ = run64(layer, params, x[:, :9])
    rest, state, _ = run64(layer, params, x[:, 9:], state)
    np.testing.assert_allclose(np.concatenate([first, rest], 1), want, rtol=0, atol=1e-12)
    for got, leaf in zip(jax.tree.leaves(state), jax.tree.leaves(want_state), strict=True):
        np.testing.assert_allclose(got, leaf, rtol=0, atol=1e-12)


def test_the_innovation_is_a_loss_of_its_own():
    """Sown as a loss whose gradient reaches the predictor and nothing else."""
    layer, x = LAYERS["small"], inputs()
    params = random_params(layer)

    def loss(params, ids):
        _, sown = layer.apply({"params": params}, x, None, ids, mutable="losses")
        return sown["losses"]["innovation"][0]

    with jax.enable_x64(True):
        value, grads = jax.jit(jax.value_and_grad(loss))(params, None)
        packed = float(jax.jit(loss)(params, IDS))
    want = np.mean([bmojo(layer, params, u)[1] for u in x])
    np.testing.assert_allclose(float(value), want, rtol=1e-9)
    for name, part in grads.items():
        reached = any(np.any(np.asarray(leaf) != 0) for leaf in jax.tree.leaves(part))
        assert reached == (name == "expect")
    alone = [
        bmojo(layer, params, x[row, positions])[1]
        for row in range(2)
        for positions in segments_of(IDS[row])
    ]
    np.testing.assert_allclose(packed, np.mean(np.concatenate(alone)), rtol=1e-9)


def noted(layer, params, x):
    """(Mamba's read-out, what the notes gave, worths, needs), step by step.

    A first-in-first-out pool of the tokens worth a note, read by the steps that need one.
    """
    inner = Mamba(layer.features, state_dim=layer.state_dim)
    faded, _, _ = mamba(inner, params["fading"], x)
    names = (("query", faded), ("key", x), ("value", x))
    query, key, value = (
        (u @ params[n]["kernel"]).reshape(len(x), layer.heads, -1) for n, u in names
    )
    worth = sigmoid(x @ params["worth"]["kernel"] + params["worth"]["bias"])[:, 0]
    need = sigmoid(faded @ params["need"]["kernel"] + params["need"]["bias"])[:, 0]
    notes, read = [], []
    for t in range(len(x)):
        if worth[t] > layer.note_above:
            notes = [*notes, t][-layer.notes :]
        recalled = np.zeros_like(query[t])
        for h in range(layer.heads):
            if notes and need[t] > layer.recall_above:
                weight = softmax(key[notes, h] @ query[t, h] / np.sqrt(key.shape[-1]))
                recalled[h] = need[t] * weight @ (worth[notes, None] * value[notes, h])
        read.append(recalled.reshape(-1))
    return faded, np.array(read), worth, need


def mem_mamba(layer, params, x):
    faded, read, worth, need = noted(layer, params, x)
    y = faded + read @ params["output"]["kernel"]
    return y, None, {"mean_worth": worth, "mean_need": need}


@pytest.mark.parametrize("ids", [None, IDS], ids=["one segment", "packed"])
@pytest.mark.parametrize(
    "options", [{"notes": 3, "state_dim": 2}, {"heads": 2, "note_above": 0.9, "recall_above": 0.2}]
)
def test_mem_mamba(options, ids):
    check_transcription(MemMamba(FEATURES, **options), mem_mamba, ids)


def layers_of_notes(layers, params, x):
    """Layers one on another, each of which adds to its input; the last reads all of them."""
    summaries = []
    for layer, own in zip(layers, params, strict=True):
        faded, read, _, _ = noted(layer, own, x)
        summaries.append(faded + read)
        y = faded + read @ own["output"]["kernel"]
        if "across_query" in own:
            query, key, value = (
                (u @ own[f"across_{n}"]["kernel"]).reshape(*np.shape(u)[:-1], layer.heads, -1)
                for n, u in (("query", faded), ("key", summaries), ("value", summaries))
            )
            across = np.zeros(query.shape)
            for t, h in np.ndindex(*query.shape[:2]):
                weight = softmax(key[:, t, h] @ query[t, h] / np.sqrt(key.shape[-1]))
                across[t, h] = weight @ value[:, t, h]
            y = y + across.reshape(len(x), -1) @ own["across_output"]["kernel"]
        x = x + y
    return x


def test_layers_read_those_below_them():
    """Two layers, of which the second reads across; whole, and in two calls."""
    options = {"num_layers": 2, "notes": 3, "state_dim": 2, "recall_above": 0.2}
    layers = [LayeredMemMamba(FEATURES, layer_index=i, **options) for i in range(2)]
    params, x = [random_params(layer, seed) for seed, layer in enumerate(layers)], 0.3 * inputs()
    params[0]["output"]["kernel"] *= 0.3
    assert [("across_key" in own) for own in params] == [False, True]

    def run(x, states):
        shared, after = {}, []
        for layer, own, state in zip(layers, params, states, strict=True):
            y, state = layer.apply({"params": own}, x, state, None, shared)
            x, after = x + y, [*after, state]
        return x, after

    with jax.enable_x64(True):
        y, _ = jax.jit(run)(x, [None] * 2)
        first, half = jax.jit(run)(x[:, :9], [None] * 2)
        rest, _ = jax.jit(run)(x[:, 9:], half)
    for row in range(2):
        want = layers_of_notes(layers, params, x[row])
        np.testing.assert_allclose(y[row], want, rtol=0, atol=1e-9)
    both = np.concatenate([first, rest], 1)
    np.testing.assert_allclose(both, y, rtol=1e-11, atol=1e-11)


def test_without_recall_it_is_mamba():
    layer = MemMamba(FEATURES, recall_above=0.999)
    params, x = random_params(layer), inputs()
    params["need"]["bias"] = np.full(1, -100.0)
    want, _, _ = run64(Mamba(FEATURES), params["fading"], x)
    np.testing.assert_array_equal(run64(layer, params, x)[0], want)


def test_defaults_and_dtypes():
    layer = BMojo(32)
    assert layer.init_state(3).memory.shape == (3, 16, 2, 4, 8)
    assert count(layer, 32) == count(Mamba(32), 32) + 7 * 32 * 32
    narrow = layer.clone(dtype=jnp.bfloat16)
    x = jax.ShapeDtypeStruct((2, 5, 32), jnp.float32)
    (y, state), params = jax.eval_shape(narrow.init_with_output, jax.random.key(0), x)
    assert y.dtype == jnp.bfloat16 and state.memory.dtype == jnp.float32
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "window: .* got 0"),
        ({"kept": 0}, "kept: .* got 0"),
        ({"heads": 3}, "heads: .* got heads 3"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        count(BMojo(FEATURES, **options))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"notes": 0}, "notes: .* got 0"), ({"recall_above": 1.0}, "recall_above: .* got 1.0")],
)
def test_bad_notes(options, message):
    with pytest.raises(ValueError, match=message):
        count(MemMamba(FEATURES, **options))


def test_bad_layers():
    with pytest.raises(ValueError, match="every: .* got 0"):
        count(LayeredMemMamba(FEATURES, every=0))
    with pytest.raises(ValueError, match="layer_index: .* got 1"):
        count(LayeredMemMamba(FEATURES, layer_index=1))
