"""Mixtures of memories: the properties of arXiv:2502.13685, and the packing on its own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memseq.layers import REGISTRY, GatedDeltaNet, LinearAttention, MixtureOfMemories
from memseq.layers.mixture.routing import number_of_pages, pack
from tests.layers.harness import FEATURES, IDS, TIME, inputs, random_params, run64

LINEAR = {"base": "linear_attention", "heads": 2}


def close(got, want, tolerance=1e-10):
    assert np.isfinite(want).all()
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance)


def base_params(params, memory=None):
    """The base layer's parameters with the projections of one memory."""
    own = jax.tree.map(lambda a: a[memory], params.get("memories", {}))
    return {**params["memory"], **own}


@pytest.mark.parametrize("page_size", [4, 128])
@pytest.mark.parametrize("ids", [None, IDS], ids=["whole", "packed"])
def test_one_memory_is_its_base(page_size, ids):
    layer = MixtureOfMemories(
        FEATURES, memories=1, top_k=1, shared_memory=False, page_size=page_size
    )
    params, x = random_params(layer), inputs()
    y, state, _ = run64(layer, params, x, segment_ids=ids)
    want, alone, _ = run64(GatedDeltaNet(FEATURES), base_params(params, 0), x, segment_ids=ids)
    valid = np.ones((2, TIME), bool) if ids is None else ids >= 0
    close(y[valid], want[valid])
    close(state.memories.memory[:, 0], alone.memory)
    np.testing.assert_array_equal(state.segment, alone.segment)


def test_all_memories_alike_are_the_base():
    """Everyone's projections: every memory is the same, and the weights sum to 1."""
    layer = MixtureOfMemories(
        FEATURES, memories=3, top_k=3, shared_memory=False, own_projections=False, page_size=8
    )
    params, x = random_params(layer), inputs()
    assert "memories" not in params
    want, _, _ = run64(GatedDeltaNet(FEATURES), params["memory"], x)
    close(run64(layer, params, x)[0], want)


def test_all_memories_are_a_mean_of_bases():
    """A router of zeros weighs alike; the linear layer's read-out adds up."""
    layer = MixtureOfMemories(FEATURES, **LINEAR, memories=3, top_k=3, shared_memory=False)
    params, x = random_params(layer), inputs()
    params["router"]["kernel"][:] = 0
    base = LinearAttention(FEATURES, heads=2)
    each = [run64(base, base_params(params, m), x)[0] for m in range(3)]
    close(run64(layer, params, x)[0], np.mean(each, axis=0))


@pytest.mark.parametrize("dispatch", ["pages", "dense"])
def test_hard_routing(dispatch):
    """All to memory 2: it is the base; the others stay as they are, and start when they are hit."""
    layer = MixtureOfMemories(
        FEATURES, memories=4, top_k=1, shared_memory=False, page_size=4, dispatch=dispatch
    )
    params, x = random_params(layer), inputs()
    x[..., 0] = 1
    params["router"]["kernel"][:] = 0
    params["router"]["kernel"][0, 2] = 1e4  # the other probabilities are 0 exactly
    base = GatedDeltaNet(FEATURES)
    want, alone, _ = run64(base, base_params(params, 2), x)
    y, state, _ = run64(layer, params, x)
    close(y, want)
    close(state.memories.memory[:, 2], alone.memory)
    for other in (0, 1, 3):
        assert not np.any(state.memories.memory[:, other])
        assert not np.any(state.memories.conv[:, other])
    # another memory, first reached in a later call: as from the start, and 2 keeps what it has
    params["router"]["kernel"][0] = [0, 1e4, 0, 0]
    y, after, _ = run64(layer, params, x, state)
    close(y, run64(base, base_params(params, 1), x)[0])
    np.testing.assert_array_equal(after.memories.memory[:, 2], state.memories.memory[:, 2])


def mixture(layer, params, x):
    """Equations 5 to 11 for linear attention, unnormalised: states are mixed, then read."""
    heads, dim = layer.heads, layer.features // layer.heads
    common, own = params["memory"], params["memories"]
    logits = x @ params["router"]["kernel"]
    memory = np.zeros((layer.memories + 1, heads, dim, dim))
    out = np.zeros((len(x), heads, dim))
    for t in range(len(x)):
        p = np.exp(logits[t] - logits[t].max())
        p /= p.sum()
        chosen = np.argsort(-p, kind="stable")[: layer.top_k]

        def write(m, key, value, t=t):
            key, value = ((x[t] @ w).reshape(heads, dim) for w in (key, value))
            memory[m] += key[:, :, None] * value[:, None, :]

        for m in chosen:
            write(m, own["key"]["kernel"][m], own["value"]["kernel"][m])
        write(-1, common["key"]["kernel"], common["value"]["kernel"])
        mixed = memory[-1] + sum(p[m] / p[chosen].sum() * memory[m] for m in chosen)
        query = (x[t] @ common["query"]["kernel"]).reshape(heads, dim)
        out[t] = np.einsum("hk,hkv->hv", query, mixed) / np.sqrt(dim)
    return out.reshape(len(x), -1) @ common["output"]["kernel"], memory


def test_equations():
    options = {"feature_map": "identity", "normalize": False}
    layer = MixtureOfMemories(FEATURES, **LINEAR, options=options, memories=4, page_size=4)
    params, x = random_params(layer), inputs()
    y, state, _ = run64(layer, params, x)
    for row in range(2):
        want, memory = mixture(layer, params, x[row])
        close(y[row], want, 1e-9)
        close(state.memories.memory[row], memory[:-1], 1e-9)
        close(state.shared.memory[row], memory[-1], 1e-9)


BASES = {
    "mamba2": {},
    "delta_net": {"own_projections": False},
    "gated_slot_attention": {"options": {"slots": 4}},
    "kimi_delta_attention": {},
}
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in list(BASES)[1:]]


@pytest.mark.parametrize("base", [next(iter(BASES)), *SLOW])
def test_pages_equal_dense(base):
    """Values, states and gradients in float64, with borders and padding."""
    layer = MixtureOfMemories(FEATURES, heads=2, base=base, page_size=4, **BASES[base])
    params, x = random_params(layer), inputs()
    ids = jnp.asarray(IDS)
    cotangent = np.where(IDS[..., None] >= 0, inputs(7), 0)

    @functools.partial(jax.jit, static_argnums=0)
    def both(layer, params, x):
        def loss(params, x):
            y, state = layer.apply({"params": params}, x, None, ids)
            return jnp.sum(cotangent * y) + jnp.sum(state.memories.memory**2), (y, state)

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(params, x)

    with jax.enable_x64(True):
        (_, (y, state)), grads = both(layer, params, x)
        (_, (want, want_state)), want_grads = both(layer.clone(dispatch="dense"), params, x)
    valid = IDS >= 0
    close(y[valid], want[valid], 1e-9)
    jax.tree.map(lambda a, b: close(a, b, 1e-9), state, want_state)
    jax.tree.map(lambda a, b: close(a, b, 1e-9 * max(1, np.abs(b).max())), grads, want_grads)


def test_nothing_leaks_through_the_packing():
    """In float32, bitwise: later tokens and other rows, with convolution and several pages."""
    layer = MixtureOfMemories(FEATURES, heads=2, page_size=4)
    params, x = {"params": random_params(layer)}, inputs().astype(np.float32)
    params = jax.tree.map(np.float32, params)
    apply = jax.jit(layer.apply)
    y, _ = apply(params, x)
    later = x.copy()
    later[:, 15:] = 1 - 2 * later[:, 15:]
    got, _ = apply(params, later)
    np.testing.assert_array_equal(got[:, :15], y[:, :15])
    assert not np.array_equal(got[:, 15:], y[:, 15:])
    other = x.copy()
    other[1] = 1 - 2 * other[1]
    got, _ = apply(params, other)
    np.testing.assert_array_equal(got[0], y[0])


# top_k, memories, time, page size
PACKINGS = [(1, 1, 7, 3), (2, 4, 21, 4), (3, 3, 8, 8), (2, 5, 1, 1), (1, 4, 20, 5)]
pack_compiled = jax.jit(pack, static_argnums=(2, 3))


@given(
    shape=st.sampled_from(PACKINGS),
    seed=st.integers(0, 1000),
    favour=st.sampled_from([0, 3, 100]),  # from even to everything in the first
    share=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_packing(shape, seed, favour, share):
    """Each choice has one place; pages hold one memory's tokens in time, and enough of them."""
    top_k, memories, time, page_size = shape
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(2, time, memories)) - favour * np.arange(memories)
    chosen = np.argsort(-scores, axis=-1)[..., :top_k]
    valid = rng.random((2, time)) < share
    pages = jax.tree.map(np.asarray, pack_compiled(chosen, valid, memories, page_size))
    number = number_of_pages(time, top_k, memories, page_size)
    assert pages.token.shape == (number, 2, page_size)
    for row in range(2):
        streams = {m: [] for m in range(memories)}
        for n in range(number):
            tokens = pages.token[n, row]
            streams[pages.memory[n, row]] += list(tokens[tokens < time])
        for m, stream in streams.items():
            assert stream == [t for t in range(time) if valid[row, t] and m in chosen[row, t]]
        flat = pages.token[:, row].reshape(-1)
        for t, j in np.ndindex(time, top_k):
            place = pages.place[row, t, j]
            if not valid[row, t]:
                assert place == number * page_size
            else:
                assert flat[place] == t
                assert pages.memory[place // page_size, row] == chosen[row, t, j]


def test_a_token_touches_top_k_memories():
    assert number_of_pages(1, 2, 8, 1) == 2
    assert number_of_pages(4096, 2, 8, 128) == 2 * 4096 // 128 + 7  # not 8 * 4096 / 128


@functools.partial(jax.jit, static_argnums=0)
def balance(layer, params, x, ids):
    _, sown = layer.apply({"params": params}, x, None, ids, mutable=["losses", "intermediates"])
    return sown["losses"]["load_balance"][0], sown["intermediates"]["load"][0]


def test_parameters_are_all_that_init_makes():
    made = jax.eval_shape(MixtureOfMemories(FEATURES).init, jax.random.key(0), inputs())
    assert set(made) == {"params"} and set(made["params"]) == {"router", "memory", "memories"}


def test_balance_loss():
    """0 at even routing, memories - top_k at the worst, padding left out, gradient through P."""
    layer = MixtureOfMemories(FEATURES, **LINEAR, balance_scale=1.0)
    params, x = random_params(layer), inputs()
    x[..., 0] = 1
    kernel = params["router"]["kernel"]
    kernel[:] = 0
    kernel[0, :2] = [2e4, 1e4]
    everywhere = np.zeros_like(IDS)
    loss, load = balance(layer, params, x, everywhere)
    np.testing.assert_allclose(loss, 4 - 2, rtol=1e-6)
    np.testing.assert_allclose(load, [1, 1, 0, 0])
    kernel[:] = np.random.default_rng(5).normal(size=kernel.shape)
    loss, load = balance(layer, params, x, IDS)
    logits = (x @ kernel)[IDS >= 0]
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    chosen = np.argsort(-p, axis=-1)[:, :2]
    share = [np.mean((chosen == m).any(1)) for m in range(4)]
    np.testing.assert_allclose(load, share, rtol=1e-6)
    np.testing.assert_allclose(loss, 4 * np.dot(share, p.mean(0)) - 2, rtol=1e-5)

    def of_router(kernel):
        own = params | {"router": {"kernel": kernel}}
        return balance(layer, own, x, IDS)[0]

    def by_hand(kernel):
        return 4 * jnp.dot(jnp.array(share), jax.nn.softmax(x[IDS >= 0] @ kernel).mean(0)) - 2

    want = jax.grad(by_hand)(jnp.asarray(kernel, jnp.float32))
    close(jax.grad(of_router)(jnp.asarray(kernel, jnp.float32)), want, 1e-6)


def test_weights_of_zero_move_nothing():
    """A second choice whose probability underflows is still written, and weighs nothing."""
    layer = MixtureOfMemories(FEATURES, heads=2, page_size=4)
    params, x = random_params(layer), inputs()
    params["router"]["kernel"] *= 1e6
    y, state, sown = run64(layer, params, x)
    want, want_state, _ = run64(layer.clone(dispatch="dense"), params, x)
    np.testing.assert_allclose(sown["load"].sum(), 2)
    close(y, want)
    jax.tree.map(close, state, want_state)


def test_state_bytes():
    """(memories + 1) times the base's, and the segment ids that each base state carries."""
    base = GatedDeltaNet(64).state_bytes(3)
    assert MixtureOfMemories(64).state_bytes(3) == 5 * base + 3 * 4
    assert MixtureOfMemories(64, shared_memory=False).state_bytes(3) == 4 * base + 3 * 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base": "softmax_attention"}, "base: .* fixed size .* got 'softmax_attention'"),
        ({"base": "rwkv7"}, "base: .* got 'rwkv7'"),
        ({"base": "mixture_of_memories"}, "base: "),
        ({"top_k": 5}, "top_k: expected at most memories 4, got 5"),
        ({"memories": 0}, "memories: .* got 0"),
        ({"page_size": 0}, "page_size: .* got 0"),
        ({"dispatch": "sparse"}, "dispatch: "),
    ],
)
def test_bad_options(options, message):
    layer = MixtureOfMemories(FEATURES, **options)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(layer.init, jax.random.key(0), jnp.zeros((1, 2, FEATURES)))


@pytest.mark.slow
@pytest.mark.parametrize("base", sorted(set(REGISTRY) - {"mixture_of_memories"}))
def test_every_base(base):
    """A layer of the registry is a base, or says that it is none."""
    layer = MixtureOfMemories(32, base=base)
    x = jnp.asarray(inputs(features=32), jnp.float32)
    try:
        layer.make_base()
    except ValueError as error:
        assert "fixed size" in str(error)
        return
    params = layer.init(jax.random.key(0), x)
    y, _ = jax.jit(layer.apply)(params, x)
    want, _ = jax.jit(layer.clone(dispatch="dense").apply)(params, x)
    np.testing.assert_allclose(y, want, rtol=0, atol=1e-4)
