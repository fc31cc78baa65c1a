"""Layers whose read-out solves, weighs levels or sees a prefix, step by step."""

import functools

import jax
import numpy as np
import pytest

from memseq.layers import (
    CROSS_LAYERS,
    Based,
    GatedDeltaNet,
    LogLinearGatedDeltaNet,
    LogLinearMamba2,
    Mamba2,
    MesaNet,
    PrefixLinearAttention,
)
from tests.layers.harness import (
    FEATURES,
    IDS,
    check_dtypes,
    check_transcription,
    count,
    init,
    inputs,
    query_key_value,
    random_params,
    read_out,
    rms_norm,
    run64,
    short_conv,
    sigmoid,
    silu,
    softplus,
    unit,
)


def mesa_net(layer, params, x):
    """out = S^T (G + ridge)^-1 q, both sums decayed; silu and convolution for query and key."""
    heads = layer.heads
    query, key, value = (x @ params[name]["kernel"] for name in ("query", "key", "value"))
    pair = np.concatenate([query, key], axis=1)
    pair = short_conv(pair, params["conv"]["kernel"]) if "conv" in params else silu(pair)
    query, key = (part.reshape(len(x), heads, -1) for part in np.split(pair, 2, axis=1))
    value = value.reshape(len(x), heads, -1)
    decay = sigmoid(x @ params["decay"]["kernel"] + params["decay"]["bias"])
    decay **= 1 / layer.gate_normalizer
    beta = sigmoid(x @ params["beta"]["kernel"] + params["beta"]["bias"])
    ridge = layer.min_ridge + softplus(params["ridge_bias"])
    gram = np.zeros((heads, key.shape[-1], key.shape[-1]))
    memory, out = np.zeros((heads, key.shape[-1], value.shape[-1])), np.zeros(value.shape)
    for t in range(len(x)):
        for h in range(heads):
            q, k = unit(query[t, h]), unit(key[t, h])
            gram[h] = decay[t, h] * gram[h] + beta[t, h] * np.outer(k, k)
            memory[h] = decay[t, h] * memory[h] + beta[t, h] * np.outer(k, value[t, h])
            out[t, h] = memory[h].T @ np.linalg.inv(gram[h] + np.diag(ridge[h])) @ q
    return read_out(params, x, out), memory, {"mean_decay": decay, "mean_beta": beta}


class Levels:
    """The memories of one head, one a level, merged as steps go by: see `read` and `merge`."""

    def __init__(self, levels, keys, values):
        self.memory = np.zeros((levels, keys, values))  # level 0 is empty between steps
        self.steps = 0

    def pass_through(self, transition):
        self.memory = np.einsum("ij,ljv->liv", transition, self.memory)

    def read(self, query, pair, weights):
        self.memory[0] = pair
        return np.einsum("l,lkv,k->v", weights, self.memory, query)

    def merge(self):
        """A step is over: as many low levels as the count's trailing zeros say are full."""
        self.steps += 1
        into = 1
        while self.steps % 2**into == 0:
            into += 1
        into = min(into, len(self.memory) - 1)
        self.memory[into] = self.memory[: into + 1].sum(axis=0)
        self.memory[:into] = 0


def level_weights(layer, params, x, heads):
    logits = (x @ params["level"]["kernel"]).reshape(len(x), heads, -1)
    return softplus(params["level_scale"] * logits)


def log_linear_mamba2(layer, params, x):
    """Mamba-2's steps on every level's memory."""
    heads, size = len(params["D"]), layer.state_dim
    parts = [x @ params[name]["kernel"] for name in ("value", "key", "query")]
    mixed = np.concatenate(parts, axis=1)
    mixed = short_conv(mixed, params["conv"]["kernel"], params["conv"]["bias"])
    inner = parts[0].shape[1]
    u = mixed[:, :inner].reshape(len(x), heads, -1)
    b, c = (part.reshape(len(x), -1, size) for part in np.split(mixed[:, inner:], 2, axis=1))
    dt = softplus(x @ params["step_size"]["kernel"] + params["decay_gate"]["dt_bias"])
    decay = np.exp(-np.exp(params["decay_gate"]["A_log"]) * dt)
    weights = level_weights(layer, params, x, heads)
    group, y = heads // layer.groups, []
    memories = [Levels(weights.shape[-1], size, u.shape[-1]) for _ in range(heads)]
    for t in range(len(x)):
        out = []
        for h, memory in enumerate(memories):
            memory.pass_through(decay[t, h] * np.eye(size))
            pair = np.outer(b[t, h // group], dt[t, h] * u[t, h])
            read = memory.read(c[t, h // group], pair, weights[t, h])
            out.append(read + params["D"][h] * u[t, h])
            memory.merge()
        gated = np.concatenate(out) * silu(x[t] @ params["gate"]["kernel"])
        y.append(rms_norm(gated, params["norm"]["scale"]) @ params["output"]["kernel"])
    sown = {"mean_decay": decay, "mean_level_weight": weights}
    return np.array(y), np.array([m.memory[1:] for m in memories]), sown


def log_linear_gated_delta_net(layer, params, x):
    """Gated DeltaNet's steps on every level's memory."""
    heads = params["beta"]["kernel"].shape[1]
    query, key, value = query_key_value(params, x, layer.heads, heads)
    gate = params["decay_gate"]
    step = softplus(x @ params["decay"]["kernel"] + gate["dt_bias"])
    decay = np.exp(-np.exp(gate["A_log"]) * step)
    beta = layer.max_beta * sigmoid(x @ params["beta"]["kernel"])
    weights = level_weights(layer, params, x, heads)
    group, keys, out = heads // layer.heads, key.shape[-1], np.zeros(value.shape)
    memories = [Levels(weights.shape[-1], keys, value.shape[-1]) for _ in range(heads)]
    for t in range(len(x)):
        for h, memory in enumerate(memories):
            q, k = unit(query[t, h // group]), unit(key[t, h // group])
            memory.pass_through(decay[t, h] * (np.eye(keys) - beta[t, h] * np.outer(k, k)))
            pair = beta[t, h] * np.outer(k, value[t, h])
            out[t, h] = memory.read(q, pair, weights[t, h]) / np.sqrt(keys)
            memory.merge()
    sown = {"mean_decay": decay, "mean_beta": beta, "mean_level_weight": weights}
    return read_out(params, x, out), np.array([m.memory[1:] for m in memories]), sown


LAYERS = {
    "log-linear mamba2": (
        LogLinearMamba2(FEATURES, heads=4, groups=2, state_dim=3, max_length=32),
        log_linear_mamba2,
    ),
    "log-linear gated delta net": (
        LogLinearGatedDeltaNet(FEATURES, heads=2, value_heads=4, key_dim=3, max_length=5),
        log_linear_gated_delta_net,
    ),
    "mesa": (MesaNet(FEATURES), mesa_net),
    "mesa, no conv, gate": (
        MesaNet(
            FEATURES, heads=2, conv_width=0, output_gate=True, min_ridge=0.01, key_dim=5,
            value_dim=3, gate_normalizer=4.0,
        ),
        mesa_net,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("ids", [None, IDS], ids=["one segment", "packed"])
def test_transcription(name, ids):
    check_transcription(*LAYERS[name], ids)


def test_mesa_with_a_huge_ridge_is_gated_linear_attention():
    """Over the ridge; what the operations do in this limit is equal in test_ridge_readout."""
    layer = MesaNet(FEATURES, heads=2, conv_width=0, output_norm=False)
    params, x = random_params(layer), inputs()
    params["ridge_bias"] = np.full((2, 8), 1e9)
    y, _, _ = run64(layer, params, x)
    for u, got in zip(x, y, strict=True):
        query, key, value = (
            (u @ params[name]["kernel"]).reshape(-1, 2, 8) for name in ("query", "key", "value")
        )
        decay, beta = (
            sigmoid(u @ params[name]["kernel"] + params[name]["bias"]) for name in ("decay", "beta")
        )
        memory, out = np.zeros((2, 8, 8)), np.zeros(value.shape)
        for t in range(len(u)):
            for h in range(2):
                written = np.outer(unit(silu(key[t, h])), beta[t, h] * value[t, h])
                memory[h] = decay[t, h] * memory[h] + written
                out[t, h] = memory[h].T @ unit(silu(query[t, h]))
        want = out.reshape(-1, FEATURES) @ params["output"]["kernel"]
        np.testing.assert_allclose(got * (1e9 + 0.25), want, rtol=0, atol=1e-6)


def test_mesa_recalls_what_a_sum_of_close_keys_mixes_up():
    """Nothing decays, a small ridge: each of eight keys close together reads its own value."""
    layer = MesaNet(FEATURES, heads=1, conv_width=0, output_norm=False, min_ridge=1e-5)
    params = random_params(layer)
    eye = np.eye(FEATURES)
    for name in ("query", "key", "value", "output"):
        params[name] = {"kernel": eye}
    params["decay"] = {"kernel": np.zeros((FEATURES, 1)), "bias": np.full(1, 50.0)}
    params["beta"] = {"kernel": np.zeros((FEATURES, 1)), "bias": np.full(1, 50.0)}
    params["ridge_bias"] = np.full((1, FEATURES), -50.0)
    x = np.random.default_rng(0).normal(size=(1, 8, FEATURES)) * 0.3 + 2
    _, state, _ = run64(layer, params, x)
    gram, memory = np.asarray(state.gram[0, 0]), np.asarray(state.memory[0, 0])
    solved = np.linalg.solve(gram + 1e-5 * eye, memory)
    keys = np.apply_along_axis(unit, -1, silu(x[0]))
    np.testing.assert_allclose(keys @ solved, x[0], atol=0.02)
    assert np.abs(keys @ memory - x[0]).min(axis=1).max() > 1
    y, _, _ = run64(layer, params, x)
    np.testing.assert_allclose(y[0, -1], x[0, -1], atol=0.02)


LOG_LINEAR = {
    "mamba2": (Mamba2, LogLinearMamba2, {"heads": 2, "state_dim": 4}),
    "gated delta net": (GatedDeltaNet, LogLinearGatedDeltaNet, {"heads": 2, "max_beta": 2.0}),
}


@pytest.mark.parametrize("name", LOG_LINEAR)
def test_log_linear_with_all_weights_one_is_the_plain_layer(name):
    plain, log_linear, options = LOG_LINEAR[name]
    layer = log_linear(FEATURES, max_length=16, **options)
    params, x = random_params(layer), inputs()
    # softplus(1 * logits) is one where the logits are log(e - 1); a constant feature gives them
    x[..., 0] = 1
    params["level_scale"] = np.ones_like(params["level_scale"])
    params["level"]["kernel"] = np.zeros_like(params["level"]["kernel"])
    params["level"]["kernel"][0] = np.log(np.e - 1)
    y, state, _ = run64(layer, params, x)
    shared = {name: p for name, p in params.items() if not name.startswith("level")}
    want, want_state, _ = run64(plain(FEATURES, **options), shared, x)
    np.testing.assert_allclose(y, want, rtol=0, atol=1e-12)
    memory = np.asarray(state.memory).sum(axis=2)
    np.testing.assert_allclose(memory, want_state.memory, rtol=0, atol=1e-12)


def test_log_linear_sizes():
    """One level for the step itself and one a doubling up to max_length; weights start equal."""
    layer = LogLinearMamba2(32)
    assert layer.levels() == 15 and layer.clone(max_length=16385).levels() == 16
    assert layer.clone(max_length=2).levels() == 2
    state = layer.init_state(3)
    assert state.memory.shape == (3, 1, 14, 128, 64) and state.position.shape == (3,)
    extra = 32 * 15 + 15
    assert count(layer, 32) == count(Mamba2(32), 32) + extra
    np.testing.assert_array_equal(init(layer)["level_scale"], 1)
    delta = LogLinearGatedDeltaNet(32)
    assert delta.init_state(3).memory.shape == (3, 4, 14, 6, 12)
    assert count(delta, 32) == count(GatedDeltaNet(32), 32) + 4 * extra


def test_mesa_starts():
    """The ridge starts at 1, the decay at one half."""
    layer = MesaNet(32)
    params = init(layer)
    np.testing.assert_allclose(0.25 + softplus(np.float64(params["ridge_bias"])), 1, rtol=1e-6)
    np.testing.assert_array_equal(params["decay"]["bias"], 0)
    assert layer.init_state(3).gram.shape == layer.init_state(3).memory.shape == (3, 4, 8, 8)
    assert layer.init_state(3).conv.shape == (3, 3, 2 * 32)
    assert count(layer, 32) == 4 * 32 * 32 + 2 * (32 * 4 + 4) + 32 + 4 * 64 + 8


@pytest.mark.parametrize("layer", [MesaNet(32), LogLinearMamba2(32, max_length=64)])
def test_dtypes(layer):
    state = check_dtypes(layer)
    assert state.memory.dtype == np.float32
    if isinstance(layer, MesaNet):
        assert state.gram.dtype == np.float32


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (MesaNet(16, min_ridge=0.0), r"min_ridge: expected a number in \(0, 1\), got 0.0"),
        (MesaNet(16, iterations=0), "iterations: .* got 0"),
        (MesaNet(16, gate_normalizer=0.0), "gate_normalizer: .* got 0.0"),
        (LogLinearMamba2(16, max_length=1), "max_length: .* got 1"),
        (LogLinearGatedDeltaNet(16, max_beta=3.0), "max_beta: .* got 3.0"),
        (MesaNet(16, heads=3), "heads: .* got heads 3"),
    ],
)
def test_bad_options(layer, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(layer.init, jax.random.key(0), inputs())


PREFIX = np.random.default_rng(5).normal(size=(2, 6, FEATURES))
PREFIX_LAYERS = {
    "default": PrefixLinearAttention(FEATURES, key_dim=3),
    "conv, norm, not normalised": PrefixLinearAttention(
        FEATURES, heads=2, key_dim=3, feature_map="identity", normalize=False, conv_width=3,
        output_norm=True,
    ),
}  # fmt: skip


def prefix_linear_attention(layer, params, x, prefix):
    """A sum over the prefix and one over the past, and their normalisers, with phi as it says."""

    def phi(x):
        if layer.feature_map == "identity":
            return x
        pairs = np.array([a * b for a in x for b in x])
        return np.concatenate([[1], x / len(x) ** 0.25, pairs / np.sqrt(2 * len(x))])

    heads = layer.heads
    query, key, value = query_key_value(params, x, heads, heads)
    prefix_key, prefix_value = (
        (prefix @ params[name]["kernel"]).reshape(len(prefix), heads, -1)
        for name in ("prefix_key", "prefix_value")
    )
    out = np.zeros(value.shape)
    for t in range(len(x)):
        for h in range(heads):
            q = phi(query[t, h])
            pairs = [(prefix_key[j, h], prefix_value[j, h]) for j in range(len(prefix))]
            pairs += [(key[j, h], value[j, h]) for j in range(t + 1)]
            weights = np.array([q @ phi(k) for k, _ in pairs])
            total = weights.sum() if layer.normalize else np.sqrt(key.shape[-1])
            out[t, h] = weights @ np.array([v for _, v in pairs]) / total
    return read_out(params, x, out)


def prefix_params(layer):
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(layer.init, jax.random.key(0), inputs(), PREFIX)["params"]
    return jax.tree.map(lambda a: 0.5 * rng.normal(size=a.shape), shapes)


@functools.partial(jax.jit, static_argnames="layer")
def run_prefix(layer, params, *arguments, **options):
    return layer.apply({"params": params}, *arguments, **options)


@pytest.mark.parametrize("name", PREFIX_LAYERS)
def test_prefix_transcription_and_streaming(name):
    layer, x = PREFIX_LAYERS[name], inputs(time=9)
    params = prefix_params(layer)
    with jax.enable_x64(True):
        y, state = run_prefix(layer, params, x, PREFIX)
        first, now = run_prefix(layer, params, x[:, :4], PREFIX[:, ::-1])
        rest, now = run_prefix(layer, params, x[:, 4:], None, now)
        # a prefix in two parts, the second with a state
        part = layer.apply({"params": params}, PREFIX[:, :2], None, method="read")
        again, _ = run_prefix(layer, params, x, PREFIX[:, 2:], part)
    for row in range(2):
        want = prefix_linear_attention(layer, params, x[row], PREFIX[row])
        np.testing.assert_allclose(y[row], want, rtol=0, atol=1e-9)
    np.testing.assert_allclose(np.concatenate([first, rest], axis=1), y, rtol=0, atol=1e-10)
    np.testing.assert_allclose(now.memory, state.memory, rtol=0, atol=1e-10)
    np.testing.assert_allclose(again, y, rtol=0, atol=1e-10)


def test_prefix_masks_and_segments():
    """Who is masked is not read, the empty prefix is Based, and a new segment starts empty."""
    layer = PREFIX_LAYERS["default"]
    params, x = prefix_params(layer), inputs(time=9)
    mask = np.array([[True] * 4 + [False] * 2, [False] * 6])
    dirty = np.where(mask[..., None], PREFIX, np.nan)
    ids = np.array([[3] * 5 + [-1] + [4] * 3] * 2, np.int32)
    own = {name: p for name, p in params.items() if not name.startswith("prefix")}
    with jax.enable_x64(True):
        y, _ = run_prefix(layer, params, x, dirty, memory_mask=mask)
        short, _ = run_prefix(layer, params, x, PREFIX[:, :4])
        packed, state = run_prefix(layer, params, x, PREFIX, segment_ids=ids)
        whole, _ = run_prefix(layer, params, x, PREFIX)
    based, _, _ = run64(Based(FEATURES, key_dim=3), own, x)
    alone, _, _ = run64(Based(FEATURES, key_dim=3), own, x[:, 6:])
    np.testing.assert_allclose(y[0], short[0], rtol=0, atol=1e-12)
    np.testing.assert_allclose(y[1], based[1], rtol=0, atol=1e-12)
    assert np.abs(np.asarray(whole) - based).max() > 0.01
    np.testing.assert_allclose(packed[:, :5], whole[:, :5], rtol=0, atol=1e-12)
    np.testing.assert_allclose(packed[:, 6:], alone, rtol=0, atol=1e-10)
    np.testing.assert_array_equal(state.segment, 4)


def test_prefix_gradients_dtypes_and_bad_input():
    layer = PREFIX_LAYERS["default"]
    assert CROSS_LAYERS["prefix_linear_attention"] is PrefixLinearAttention
    params, x = prefix_params(layer), inputs(time=9)
    gradients = jax.jit(
        jax.grad(lambda p, m: jax.numpy.sin(layer.apply({"params": p}, x, m)[0]).sum(), (0, 1))
    )(params, PREFIX)
    for leaf in jax.tree.leaves(gradients):
        assert np.isfinite(leaf).all() and np.abs(leaf).max() > 0
    narrow = layer.clone(dtype=jax.numpy.bfloat16)
    y, state = jax.eval_shape(narrow.apply, {"params": params}, np.float32(x), np.float32(PREFIX))
    assert y.dtype == jax.numpy.bfloat16 and state.memory.dtype == np.float32
    assert layer.state_bytes(1) == 4 * (4 * (1 + 3 + 9) * 5 + 1)
    for arguments, message in [
        ((x,), "memory: expected a prefix or a state to go on from, got neither"),
        ((x, PREFIX[..., 1:]), r"memory: expected \[batch, positions, features\]"),
        ((x, PREFIX, layer.init_state(3)), "state.*expected shape"),
    ]:
        with pytest.raises(ValueError, match=message):
            layer.apply({"params": params}, *arguments)
    with pytest.raises(ValueError, match="memory_mask: expected bool .* got float64"):
        layer.apply({"params": params}, x, PREFIX, memory_mask=np.ones((2, 6)))
