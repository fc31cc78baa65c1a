"""Layers that read what a layer below them holds: alone, and in the decoders made of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memseq.layers import SHARED_LAYERS, Mamba, SharedAttention, SharedMemory
from memseq.models import LanguageModel
from memseq.models.generation import generate
from tests.layers.harness import inputs, silu
from tests.layers.harness import random_params as layer_params
from tests.models.harness import FEATURES, VOCAB, layout, random_params, tokens

MIXERS = {
    "mamba": {"state_dim": 4},
    "sliding_window_attention": {"heads": 2, "window": 3},
    "shared_memory": {"options": {"state_dim": 4}},
    "shared_attention": {"heads": 2, "kv_heads": 1, "rope": True, "qk_norm": True},
    "cross_decoder_attention": {"heads": 4, "head_dim": 8, "rope": True, "qk_norm": True},
    "gated_memory_unit": {},
}
SELF = ("mamba", "sliding_window_attention", "shared_memory", "shared_attention")
CROSS = ("gated_memory_unit", "cross_decoder_attention")


def sambay(cross=1, self_decoder=SELF[2:], **options):
    """A self-decoder and `cross` pairs of layers above it."""
    pattern = self_decoder + CROSS * cross
    options = {"channel": None, **options}
    mixers = {name: MIXERS[name] for name in pattern}
    return LanguageModel(VOCAB, FEATURES, pattern, mixers=mixers, **options)


@functools.partial(jax.jit, static_argnums=0)
def run(model, params, ids, state=None, segment_ids=None):
    return model.apply(params, ids, state, segment_ids)


def close(got, want, tolerance=2e-5):
    assert np.isfinite(want).all()
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance)


@pytest.fixture(scope="module")
def model():
    model = sambay(cross=2)
    return model, random_params(model, jax.ShapeDtypeStruct((1, 4), jnp.int32))


def whole(model, ids, segment_ids):
    model, params = model
    return run(model, params, ids, model.init_state(2, context=12), segment_ids)


def test_a_prompt_and_single_tokens_equal_one_call(model):
    """So do causality and packed documents: two compiled calls, of twelve tokens and of one."""
    ids, one = tokens(2, 12), np.zeros((2, 12), np.int32)
    want, want_state = whole(model, ids, one)
    prompt = np.where(np.arange(12) < 5, 0, -1).astype(np.int32)[None].repeat(2, axis=0)
    logits, state = whole(model, ids, prompt)
    close(logits[:, :5], want[:, :5])
    for t in range(5, 12):
        logits, state = run(*model, ids[:, t : t + 1], state)
        close(logits[:, 0], want[:, t])
    assert layout(state) == layout(model[0].init_state(2, context=12))
    jax.tree.map(close, state, want_state)

    later = np.where(np.arange(12) < 7, ids, (ids + 1) % VOCAB)
    changed, _ = whole(model, later, one)
    np.testing.assert_array_equal(changed[:, :7], want[:, :7])
    assert np.abs(changed[:, 7:] - want[:, 7:]).max() > 1e-3

    packed = np.array([[-1] + [3] * 4 + [-1] + [4] * 6, [0] * 12], np.int32)
    got, _ = whole(model, ids, packed)
    for place in (slice(1, 5), slice(6, 12)):
        alone, length = np.zeros((2, 12), np.int32), place.stop - place.start
        alone[0, :length] = ids[0, place]
        separate = np.where(np.arange(12) < length, 0, -1).astype(np.int32)[None]
        apart, _ = whole(model, alone, separate.repeat(2, axis=0))
        close(got[0, place], apart[0, :length])
    close(got[1], want[1])


def test_a_prompt_stops_at_what_is_shared(model):
    """Rows of 5 and 9 tokens: only their last step goes through the cross-decoder.

    Logits there and the state, from which decoding goes on, are those of all steps.
    """
    lengths, ids = np.array([5, 9]), tokens(2, 12)
    prompt = np.where(np.arange(12) < lengths[:, None], 4, -1).astype(np.int32)
    state = model[0].init_state(2, context=12)

    @jax.jit
    def prefill(params, last):
        return model[0].apply(params, ids, state, prompt, last, method="hidden")

    everywhere, want = prefill(model[1], None)
    hidden, got = prefill(model[1], lengths - 1)
    assert hidden.shape == (2, 1, FEATURES)
    close(hidden[:, 0], everywhere[np.arange(2), lengths - 1])
    jax.tree.map(close, got, want)
    np.testing.assert_array_equal(got[-1].segment, [[4, 4]])

    def products(last):
        return prefill.lower(model[1], last).cost_analysis()["flops"]

    assert products(lengths - 1) < 0.5 * products(None)  # four of the six layers read


@pytest.mark.slow
def test_a_cross_decoder_of_attention_alone():
    """YOCO's layout: retention with gates, one cache, and layers that read it."""
    pattern = ("simple_gated_linear_attention", "shared_attention")
    pattern += ("cross_decoder_attention",) * 2
    model = LanguageModel(VOCAB, FEATURES, pattern)
    params = random_params(model, jax.ShapeDtypeStruct((1, 4), jnp.int32))
    ids, state = tokens(2, 12), model.init_state(2, context=12)
    want, _ = run(model, params, ids, state)
    for t in range(12):
        logits, state = run(model, params, ids[:, t : t + 1], state)
        close(logits[:, 0], want[:, t])


@pytest.mark.slow
def test_generation_is_the_parallel_form(model):
    """Greedy tokens from the state are those that one call over all of them finds likeliest."""
    model, params = model
    prompts = [[3, 1, 4, 1, 5], [9, 2]]
    sampled, _ = generate(model, params, prompts, steps=4, key=jax.random.key(0), temperature=0)
    rows, ids = np.zeros((2, 12), np.int32), np.full((2, 12), -1, np.int32)
    for row, tail in enumerate(sampled):
        document = prompts[row] + tail
        rows[row, : len(document)], ids[row, : len(document)] = document, 0
    logits, _ = run(model, params, rows, model.init_state(2, context=12), ids)
    for row, tail in enumerate(sampled):
        first = len(prompts[row]) - 1
        assert np.argmax(logits[row], -1)[first : first + 4].tolist() == tail


def test_layers_above_keep_nothing():
    """One cache for all of them: a pair more adds its two segment ids to the state."""
    few, many = sambay(self_decoder=SELF), sambay(cross=5, self_decoder=SELF)
    assert many.state_bytes(3, 1000) == few.state_bytes(3, 1000) + 4 * 2 * 3 * 4
    twice = few.state_bytes(3, 2000) - few.state_bytes(3, 1000)
    assert twice == 1000 * 3 * (2 * 8 + 1) * 4  # the shared cache alone grows with the context
    names = [type(state).__name__ for state in many.init_state(1, 2)[4:]]
    assert set(names) == {"ReaderState"}


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "full"])
def test_gradients_reach_what_is_shared(remat):
    """Through the layers above alone: the shared layers' own outputs are cut off."""
    model = sambay(self_decoder=SELF, remat=remat)
    params = random_params(model, jax.ShapeDtypeStruct((1, 4), jnp.int32))
    layers = params["params"]["stack"]["layers"]
    layers["block_2"]["layer"]["layer"]["output"]["kernel"] *= 0
    layers["block_3"]["layer"]["output"]["kernel"] *= 0
    grads = jax.jit(jax.grad(lambda p: jnp.sum(jnp.sin(model.apply(p, tokens(2, 6))[0]))))(params)
    layers = grads["params"]["stack"]["layers"]
    assert np.abs(layers["block_2"]["layer"]["layer"]["key"]["kernel"]).max() > 1e-4
    for name in ("key", "value"):
        assert np.abs(layers["block_3"]["layer"][name]["kernel"]).max() > 1e-4


def test_gated_memory_unit():
    """W (m * silu(V x)) in float64, m being what Mamba read before its own gate."""
    x, shared = inputs(time=5), {}
    source = SharedMemory(FEATURES, options={"state_dim": 4})
    params = layer_params(source)
    unit = SHARED_LAYERS["gated_memory_unit"](FEATURES)
    with jax.enable_x64(True):
        y, _ = source.apply({"params": params}, x, None, None, shared)
        want, _ = Mamba(FEATURES, state_dim=4).apply({"params": params["layer"]}, x)
        np.testing.assert_array_equal(y, want)
        memory = np.asarray(shared["shared_memory"])
        inner = params["layer"]
        gated = memory * silu(x @ inner["gate"]["kernel"])
        np.testing.assert_allclose(gated @ inner["output"]["kernel"], y, rtol=0, atol=1e-9)
        rng = np.random.default_rng(0)
        own = {
            "gate": {"kernel": rng.normal(size=(FEATURES, 2 * FEATURES))},
            "output": {"kernel": rng.normal(size=(2 * FEATURES, FEATURES))},
        }
        for normed in (False, True):
            layer = unit.clone(output_norm=normed)
            gated = memory * silu(x @ own["gate"]["kernel"])
            if normed:
                own["norm"] = {"scale": rng.normal(size=2 * FEATURES)}
                gated = gated / np.sqrt((gated**2).mean(-1, keepdims=True) + 1e-5)
                gated = gated * own["norm"]["scale"]
            y, state = layer.apply({"params": own}, x, None, None, shared)
            want = gated @ own["output"]["kernel"]
            np.testing.assert_allclose(y, want, rtol=0, atol=1e-9)
    np.testing.assert_array_equal(state.segment, [-1, -1])


def test_cross_decoder_attention_with_the_queries_of_the_shared_one():
    """Its queries and output projection give what the shared layer gives, over several calls."""
    source = SharedAttention(FEATURES, heads=2, kv_heads=1, qk_norm=True, forget_gate=True)
    params, x = layer_params(source), inputs(time=9)
    reader = SHARED_LAYERS["cross_decoder_attention"](FEATURES, heads=2, qk_norm=True)
    own = {name: params[name] for name in ("query", "query_norm", "output")}
    ids = np.array([[0] * 9, [-1] + [2] * 3 + [5] * 5], np.int32)

    @jax.jit
    def both(x, ids, state, reader_state):
        shared = {}
        y, state = source.apply({"params": params}, x, state, ids, shared)
        return y, reader.apply({"params": own}, x, reader_state, ids, shared), state

    with jax.enable_x64(True):
        state, read = None, None
        for part in (slice(0, 5), slice(5, 9)):
            want, (got, read), state = both(x[:, part], ids[:, part], state, read)
            np.testing.assert_allclose(got, want, rtol=0, atol=1e-12)
    np.testing.assert_array_equal(read.segment, [0, 5])


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (("mamba", "gated_memory_unit"), "pattern: expected a layer 'shared_memory' below Gated"),
        (
            ("shared_memory", "cross_decoder_attention"),
            "pattern: expected a layer 'shared_attention' below CrossDecoderAttention",
        ),
        (("cross_decoder",), "pattern: .* did you mean 'cross_decoder_attention'"),
    ],
)
def test_nothing_to_read(pattern, message):
    model = LanguageModel(VOCAB, FEATURES, pattern)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))


@pytest.mark.parametrize(
    ("mixers", "message"),
    [
        ({"shared_attention": {"window": 4}}, "window: expected None, .* got 4"),
        ({"gated_memory_unit": {"expand": 3}}, "expand: expected 32 / 16, .* got 3"),
        ({"shared_memory": {"base": "shared_attention"}}, "base: "),
        ({"cross_decoder_attention": {"widow": 4}}, "mixers.cross_decoder_attention: .*'widow'"),
    ],
)
def test_bad_options(mixers, message):
    model = LanguageModel(VOCAB, FEATURES, SELF[2:] + CROSS, mixers=mixers)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))


def test_matrix_memories_share_their_read_out():
    """[batch, time, heads, dim] is flattened."""
    layer = SharedMemory(FEATURES, base="gated_delta_net", options={"key_dim": 4, "value_dim": 8})
    x = jax.ShapeDtypeStruct((1, 3, FEATURES), jnp.float32)

    def call(key, x):
        shared = {}
        return layer.init_with_output(key, x, None, None, shared)[0][0], shared["shared_memory"]

    y, memory = jax.eval_shape(call, jax.random.key(0), x)
    assert y.shape == (1, 3, FEATURES) and memory.shape == (1, 3, 4 * 8)
