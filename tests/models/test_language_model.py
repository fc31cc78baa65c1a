"""The language model: scanned blocks, remat, streaming and packing over the whole stack."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memseq.layers import REGISTRY, LinearAttention
from memseq.models import LanguageModel
from memseq.models.blocks import depends_on_depth
from tests.models.harness import (
    FEATURES,
    TWO,
    VOCAB,
    layout,
    random_params,
    small,
    tokens,
    with_params,
)


@functools.partial(jax.jit, static_argnums=0)
def run(model, params, ids, state=None, segment_ids=None):
    return model.apply(params, ids, state, segment_ids)


def close(got, want, tolerance=2e-5):
    assert np.isfinite(want).all()
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance)


def rms_norm(params, x):
    return x / ((x**2).mean(axis=-1, keepdims=True) + 1e-5) ** 0.5 * params["scale"]


def swiglu(params, x):
    gate = x @ params["gate"]["kernel"]
    gate /= 1 + np.exp(-gate)
    return gate * (x @ params["up"]["kernel"]) @ params["down"]["kernel"]


@pytest.mark.parametrize("tied", [False, True])
def test_scan_is_a_loop(tied):
    """Embedding, then each block in turn on its slice of the stacked parameters, norm, logits."""
    options = {} if not tied else {"channel": None, "pattern": ("gated_delta_net",)}
    model, params = with_params(small(repeats=2, tie_embeddings=tied, **options))
    ids = tokens(2, 9)
    segment_ids = np.array([[0] * 4 + [1] * 5, [-1] * 2 + [0] * 7], np.int32)
    with jax.enable_x64(True):
        wide = jax.tree.map(np.float64, params)
        logits, state = run(model, wide, ids, None, segment_ids)
        p = wide["params"]
        x, states = p["embed"]["embedding"][ids], []
        for repeat in range(2):
            for i, name in enumerate(model.pattern):
                block = jax.tree.map(lambda a, r=repeat: a[r], p["stack"]["layers"][f"block_{i}"])
                layer = REGISTRY[name](FEATURES, **TWO[name])
                normed = rms_norm(block["mixer_norm"], x)
                y, after = run(layer, {"params": block["layer"]}, normed, None, segment_ids)
                states.append(after)
                x = x + np.asarray(y)
                if not tied:
                    x = x + swiglu(block["channel_layer"], rms_norm(block["channel_norm"], x))
    assert ("channel_layer" in block) == (not tied)
    matrix = p["embed"]["embedding"].T if tied else p["head"]["kernel"]
    valid = segment_ids >= 0
    close(logits[valid], (rms_norm(p["norm"], x) @ matrix)[valid], 1e-9)
    for i in range(len(model.pattern)):
        for repeat in range(2):
            jax.tree.map(
                lambda a, b, r=repeat: close(np.asarray(a)[r], np.asarray(b), 1e-6),
                state[i],
                states[repeat * len(model.pattern) + i],
            )


REMAT = {
    remat: small(("gated_delta_net",), repeats=3, channel=None, remat=remat)
    for remat in ("none", "dots", "full")
}


def remat_loss(remat):
    return lambda params: jnp.sum(jnp.sin(REMAT[remat].apply(params, tokens(2, 4))[0]))


def test_remat_gives_the_same_gradients():
    """And there is a gradient for every parameter."""
    _, params = with_params(REMAT["none"])
    losses = {remat: jax.value_and_grad(remat_loss(remat)) for remat in REMAT}
    got = jax.jit(lambda p: {remat: loss(p) for remat, loss in losses.items()})(params)
    for remat in ("dots", "full"):
        jax.tree.map(lambda a, b: close(a, b, 1e-4), got[remat], got["none"])
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(got["none"][1]))


def test_remat_keeps_less():
    """Bytes that the forward pass keeps for the backward one: inputs, products, everything."""
    _, params = with_params(REMAT["none"])

    def kept(remat):
        backward = jax.eval_shape(lambda p: jax.vjp(remat_loss(remat), p)[1], params)
        activations = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(backward))
        return activations - sum(a.nbytes for a in jax.tree.leaves(params))

    none, dots, full = kept("none"), kept("dots"), kept("full")
    assert full < 0.5 * dots and dots < 0.8 * none
    # a block's input for each repeat and what surrounds the stack
    assert full < 12 * 2 * 4 * FEATURES * 4


def whole(model, params, ids, segment_ids=None):
    """One call over [3, 12] tokens from an empty state."""
    segment_ids = np.zeros_like(ids) if segment_ids is None else segment_ids
    return run(model, params, ids, model.init_state(3, context=12), segment_ids)


def test_prefill_and_decode():
    """A prompt in one call, then token by token, equals one call; so do the states."""
    model, params = with_params(small())
    ids = tokens(3, 12)
    want, want_state = whole(model, params, ids)
    first = np.zeros((3, 7), np.int32)
    logits, state = run(model, params, ids[:, :7], model.init_state(3, context=12), first)
    outs = [logits]
    for t in range(7, 12):
        logits, state = run(model, params, ids[:, t : t + 1], state)
        outs.append(logits)
    close(np.concatenate(outs, axis=1), want)
    assert layout(state) == layout(model.init_state(3, context=12))
    jax.tree.map(close, state, want_state)


def test_packed_is_separate():
    """Documents of one row, apart; padding before, between and behind them."""
    model, params = with_params(small())
    documents = [tokens(n, seed=n) for n in (5, 1, 3)]
    packed, ids = np.full((3, 12), 3, np.int32), np.full((3, 12), -1, np.int32)
    alone, alone_ids = np.full((3, 12), 5, np.int32), np.full((3, 12), -1, np.int32)
    for i, (start, document) in enumerate(zip((1, 6, 8), documents, strict=True)):
        place = slice(start, start + len(document))
        packed[0, place], ids[0, place] = document, i
        alone[i, : len(document)], alone_ids[i, : len(document)] = document, 0
    got, _ = whole(model, params, packed, ids)
    want, _ = whole(model, params, alone, alone_ids)
    for i, document in enumerate(documents):
        close(got[0, ids[0] == i], want[i, : len(document)])


def test_causality():
    model, params = with_params(small())
    ids = tokens(3, 12)
    changed = ids.copy()
    changed[:, 8:] = (changed[:, 8:] + 1) % VOCAB
    want, _ = whole(model, params, ids)
    got, _ = whole(model, params, changed)
    np.testing.assert_array_equal(got[:, :8], want[:, :8])
    assert np.abs(got[:, 8:] - want[:, 8:]).max() > 1e-3


@pytest.mark.parametrize("name", REGISTRY)
def test_state_shapes(name):
    """Leaves [repeats, batch, ...], bytes counted from them, and the model keeps to them."""
    model = small((name,), repeats=2, mixers={})
    example = jax.ShapeDtypeStruct((3, 4), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), example)
    state = model.init_state(3, context=9)
    _, after = jax.eval_shape(model.apply, params, example, state)
    assert layout(after) == layout(state)
    repeats = 1 if depends_on_depth(name) else 2
    assert all(a.shape[:2] == (repeats, 3) for a in jax.tree.leaves(state))
    assert len(state) == 2 // repeats
    assert model.state_bytes(3, context=9) == sum(a.nbytes for a in jax.tree.leaves(state))
    assert model.state_bytes(3, context=9) == 2 * REGISTRY[name](FEATURES).state_bytes(3, 9)


class Echo(LinearAttention):
    """Adds the mean of what the Echos below it were given to its own value."""

    layer_index: int = 0
    num_layers: int = 1

    SHARES = True

    def mix(self, inputs, state, segment_ids, shared):
        mixed, *gates = inputs
        heard = shared.setdefault("echo", [])
        out, state = super().mix((mixed + sum(heard), *gates), state, segment_ids)
        heard.append(mixed * (self.layer_index + 1) / self.num_layers)
        return out, state


@pytest.mark.parametrize("remat", ["none", "full"])
def test_layers_know_their_depth_and_share(monkeypatch, remat):
    """Such layers are written out: each has its index, and hears the ones below in one call."""
    monkeypatch.setitem(REGISTRY, "echo", Echo)
    model = small(("echo", "gated_delta_net"), repeats=2, channel=None, remat=remat)
    model, params = with_params(model)
    ids = tokens(2, 5)

    def loss(params):
        return jnp.sum(jnp.sin(run(model, params, ids)[0]))

    p = params["params"]

    def by_hand(p):
        x, shared = p["embed"]["embedding"][ids], {}
        for i, name in enumerate(model.pattern * 2):
            block = jax.tree.map(lambda a: a[0], p["stack"]["layers"][f"block_{i}"])
            depth = {"layer_index": i, "num_layers": 4} if name == "echo" else TWO[name]
            normed = rms_norm(block["mixer_norm"], x)
            layer = REGISTRY[name](FEATURES, **depth)
            x = x + layer.apply({"params": block["layer"]}, normed, None, None, shared)[0]
        assert len(shared["echo"]) == 2
        return jnp.sum(jnp.sin(rms_norm(p["norm"], x) @ p["head"]["kernel"]))

    got, got_grads = jax.value_and_grad(loss)(params)
    want, want_grads = jax.jit(jax.value_and_grad(by_hand))(p)
    close(got, want, 1e-4)
    jax.tree.map(lambda a, b: close(a, b, 1e-4), got_grads["params"], want_grads)


def test_dtypes():
    """bfloat16 activations with float32 parameters and logits; bfloat16 parameters if asked for."""
    example = jax.ShapeDtypeStruct((2, 4), jnp.int32)
    for param_dtype in (jnp.float32, jnp.bfloat16):
        model = small(dtype=jnp.bfloat16, param_dtype=param_dtype)
        params = jax.eval_shape(model.init, jax.random.key(0), example)
        kernels = [a.dtype for a in jax.tree.leaves(params) if a.ndim > 2]
        assert set(kernels) == {jnp.dtype(param_dtype)}
        hidden, _ = jax.eval_shape(functools.partial(model.apply, method="hidden"), params, example)
        logits, state = jax.eval_shape(model.apply, params, example)
        assert (hidden.dtype, logits.dtype) == (jnp.bfloat16, jnp.float32)
        assert (state[0].memory.dtype, state[1].key.dtype) == (jnp.float32, jnp.bfloat16)


def test_sown():
    """What layers sow arrives with one value a repeat."""
    model, params = with_params(small(("gated_delta_net",), repeats=2))
    apply = functools.partial(model.apply, mutable=["intermediates", "losses"])
    _, sown = jax.jit(apply)(params, tokens(2, 3))
    values = sown["intermediates"]["stack"]["layers"]["block_0"]["layer"]
    assert set(values) == {"mean_beta", "mean_decay", "memory_norm"}
    for value in jax.tree.leaves(values):
        assert value.shape == (2,) and np.isfinite(value).all()
        assert (value > 0).all() and value[0] != value[1]


def test_sizes():
    """The channel layer's hidden size is 2/3 hidden_ratio features, up to a multiple of 16."""
    example = jax.ShapeDtypeStruct((1, 2), jnp.int32)

    def shapes(**options):
        params = jax.eval_shape(small(**options).init, jax.random.key(0), example)["params"]
        return params, params["stack"]["layers"]["block_0"]

    params, block = shapes(repeats=3)
    assert block["channel_layer"]["up"]["kernel"].shape == (3, 16, 48)
    assert params["embed"]["embedding"].shape == (VOCAB, FEATURES)
    assert params["head"]["kernel"].shape == (FEATURES, VOCAB)
    assert set(params["stack"]["layers"]) == {"block_0", "block_1"}
    params, block = shapes(hidden_ratio=3.0, tie_embeddings=True)
    assert block["channel_layer"]["up"]["kernel"].shape == (1, 16, 32)
    assert set(params) == {"embed", "norm", "stack"}
    assert set(shapes(channel=None)[1]) == {"layer", "mixer_norm"}


def test_starts():
    """Fresh parameters give every token about the same probability; repeats differ."""
    model = small(("linear_attention",), repeats=2)
    ids = tokens(4, 8)
    params = jax.jit(model.init)(jax.random.key(0), ids)
    logits, _ = run(model, params, ids)
    excess = -jax.nn.log_softmax(logits).mean() - np.log(VOCAB)
    assert 0 < excess < 0.8  # logits of variance 1 give 0.5
    for leaf in jax.tree.leaves(params["params"]["stack"]["layers"]):
        if leaf.ndim == 3:
            assert np.abs(leaf[0] - leaf[1]).max() > 0.01


def test_models_are_hashable():
    """Options given as plain dicts: equal models are equal, so that jit compiles once."""
    one, same = small(), small()
    other = small(mixers={"softmax_attention": {"heads": 4}})
    assert hash(one) == hash(same) and one == same and one != other
    assert one.clone(repeats=2).mixers == one.mixers


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pattern": ("delta_nett",)}, "pattern: .* got 'delta_nett'; did you mean 'delta_net'"),
        ({"pattern": ()}, "pattern, repeats: expected at least one block"),
        ({"pattern": "delta_net"}, "pattern: expected names of layers .* got 'delta_net'"),
        ({"repeats": 0}, "pattern, repeats: expected at least one block"),
        ({"mixers": {"mamba2": {}}}, "mixers: expected one of .* got 'mamba2'"),
        (
            {"mixers": {"softmax_attention": {"windw": 3}}},
            "mixers.softmax_attention: .* got 'windw'; did you mean 'window'",
        ),
        ({"mixers": {"softmax_attention": {"PAPER": "x"}}}, "mixers.softmax_attention: .*'PAPER'"),
        (
            {"mixers": {"softmax_attention": {"features": 4}}},
            "mixers.softmax_attention: .*features",
        ),
        ({"mixers": {"gated_delta_net": {"max_beta": 3}}}, "max_beta: .* got 3"),
        ({"channel": "swigle"}, "channel: .* got 'swigle'; did you mean 'swiglu'"),
        ({"remat": "some"}, "remat: expected one of 'none', 'full', 'dots', got 'some'"),
        ({"implementation": "chunk"}, "implementation: .* did you mean 'chunked'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        model = small(**options)
        jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 2), jnp.int32))


def test_bad_inputs():
    model = small()
    example = jax.ShapeDtypeStruct((2, 4), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), example)
    for bad in (((2, 4), jnp.float32), ((4,), jnp.int32)):
        with pytest.raises(ValueError, match=r"tokens: expected integers \[batch, time\], got"):
            jax.eval_shape(model.apply, params, jax.ShapeDtypeStruct(*bad))
    with pytest.raises(ValueError, match=r"state\.memory: expected shape \[2, 2, 4, 8\], got \[3,"):
        jax.eval_shape(model.apply, params, example, model.init_state(3, context=4))
    with pytest.raises(
        ValueError, match="state: expected GatedDeltaNetState, got SoftmaxAttention"
    ):
        jax.eval_shape(model.apply, params, example, model.init_state(2, context=4)[::-1])


def test_a_model_of_one_token():
    """Time 1, one feature group, no state given."""
    model = LanguageModel(vocab_size=2, features=16, pattern=("linear_attention",))
    params = random_params(model, jax.ShapeDtypeStruct((1, 1), jnp.int32))
    logits, _ = run(model, params, np.ones((1, 1), np.int32))
    assert logits.shape == (1, 1, 2) and np.isfinite(logits).all()
