"""Neural memory layers: equality with NumPy transcriptions whose gradients are written by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memseq.layers import (
    TTTMLP,
    Memora,
    Moneta,
    NeuralMemory,
    OmegaNet,
    TitansLMM,
    TitansMAC,
    TitansMAG,
    TitansMAL,
    TTTLinear,
    Yaad,
)
from tests.layers.harness import (
    FEATURES,
    IDS,
    check_dtypes,
    check_transcription,
    inputs,
    query_key_value,
    random_params,
    read_out,
    rms_norm,
    run64,
    sigmoid,
    silu,
    softplus,
    unit,
)

SMALL = {"heads": 2, "expansion": 2, "update_chunk": 4}


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def gelu_slope(x):
    inner = np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)
    slope = np.sqrt(2 / np.pi) * (1 + 3 * 0.044715 * x**2)
    return 0.5 * (1 + np.tanh(inner)) + 0.5 * x * slope * (1 - np.tanh(inner) ** 2)


def layer_norm(z, eps=1e-5):
    deviation = np.sqrt(np.var(z) + eps)
    return (z - z.mean()) / deviation, deviation


class Network:
    """x + scale * norm(W_n gelu(... W_1 x)) + bias of one head, and its gradients."""

    def __init__(self, scale, bias, eps, residual):
        self.scale, self.bias, self.eps, self.residual = scale, bias, eps, residual

    def forward(self, weights, x):
        h, zs, hs = x, [], []
        for i, w in enumerate(weights):
            hs.append(h)
            zs.append(h @ w)
            h = gelu(zs[-1]) if i < len(weights) - 1 else zs[-1]
        n, deviation = layer_norm(h, self.eps)
        out = n * self.scale + self.bias
        return x + out if self.residual else out, (hs, zs, n, deviation)

    def gradients(self, weights, key, d_out):
        """Of sum(d_out * M(key)) in the weights."""
        _, (hs, zs, n, deviation) = self.forward(weights, key)
        dn = d_out * self.scale
        dz = (dn - dn.mean() - n * np.mean(dn * n)) / deviation
        found = []
        for i in reversed(range(len(weights))):
            found.insert(0, np.outer(hs[i], dz))
            if i:
                dz = (weights[i] @ dz) * gelu_slope(zs[i - 1])
        return found


def l2(r, _):
    return r


def cubes(r, _):
    return 3 * r * np.sqrt(r**2 + 1e-6)


def huber(r, threshold):
    return r * min(1, threshold / np.linalg.norm(r))


def moneta_weights(a, start):
    return [w / max(np.sum(s**4), 1) ** 0.5 for w, s in zip(a, start, strict=True)]


def memora_weights(a, start):
    return [4 * np.exp(w) / np.exp(w).sum(axis=0) for w in a]


def transcribed(error=l2, weights_of=lambda a, start: a, unit_of=unit, residual=True):
    """Of a layer whose loss has the gradient `error`, read through `weights_of`."""

    def transcription(layer, params, x):
        heads, value_dim = layer.heads, layer.features // layer.heads
        query, key, value = query_key_value(params, x, heads, heads)

        def gate(name, columns):
            z = x @ params[f"{name}_gate"]["kernel"] + params[f"{name}_bias"]
            return z.reshape(len(x), heads, columns)

        step = sigmoid(gate("step", layer.window)) * layer.max_step / value_dim
        keep = sigmoid(gate("keep", 1))[..., 0]
        mixing = np.zeros_like(keep)
        if "momentum_gate" in params:
            mixing = sigmoid(gate("momentum", 1))[..., 0]
        threshold = np.zeros_like(keep)
        if "threshold_gate" in params:
            threshold = softplus(gate("threshold", 1))[..., 0] * np.sqrt(value_dim)
        out = np.zeros((len(x), heads, value_dim))
        for h in range(heads):
            network = Network(
                params["affine_scale"][h], params["affine_bias"][h], layer.memory_epsilon, residual
            )
            a = [params[f"initial_weight_{i}"][h] for i in range(layer.depth)]
            s = [np.zeros_like(w) for w in a]
            for t in range(len(x)):
                if t % layer.update_chunk == 0:
                    start = a
                anchor = weights_of(start, start)
                u = [np.zeros_like(w) for w in a]
                for lag in range(min(layer.window, t + 1)):
                    k, v = unit_of(key[t - lag, h]), value[t - lag, h]
                    r = network.forward(anchor, k)[0] - v
                    found = network.gradients(anchor, k, error(r, threshold[t, h]))
                    u = [b + step[t, h, lag] * g for b, g in zip(u, found, strict=True)]
                s = [mixing[t, h] * b - g for b, g in zip(s, u, strict=True)]
                a = [keep[t, h] * w + b for w, b in zip(a, s, strict=True)]
                out[t, h] = network.forward(weights_of(a, start), unit_of(query[t, h]))[0]
        return read_out(params, x, out), None, {"mean_step": step * value_dim, "mean_decay": keep}

    return transcription


CASES = {
    "titans_lmm": (TitansLMM, {}, transcribed()),
    "three layers, a window": (
        NeuralMemory,
        {"depth": 3, "window": 3, "use_momentum": False},
        transcribed(),
    ),
    "moneta": (Moneta, {}, transcribed(cubes, moneta_weights)),
    "yaad": (Yaad, {}, transcribed(huber)),
    "memora": (Memora, {}, transcribed(weights_of=memora_weights)),
}


@pytest.mark.parametrize("name", CASES)
def test_transcription(name):
    cls, options, transcription = CASES[name]
    layer = cls(FEATURES, **SMALL | options, implementation="chunked")
    check_transcription(layer, transcription)


def test_transcription_of_packed_rows():
    layer = TitansLMM(FEATURES, **SMALL, implementation="chunked")
    check_transcription(layer, transcribed(), IDS)


def test_dtypes():
    state = check_dtypes(TitansLMM(FEATURES, **SMALL))
    assert all(w.dtype == jnp.float32 for w in jax.tree.leaves(state.held.weights))


def test_state_is_weights_anchor_and_momentum():
    layer = TitansLMM(FEATURES, heads=2, conv_width=4)
    weights = 2 * 2 * 8 * 32 * 4  # heads, layers, 8 x 32, bytes
    rest = 3 * 3 * FEATURES * 4 + 4 + 4 + 4  # tail, segment, position, count of the window
    assert layer.state_bytes(1) == 3 * weights + rest
    assert layer.clone(use_momentum=False).state_bytes(1) == 2 * weights + rest


def test_the_update_chunk_is_part_of_the_model():
    layer = TitansLMM(FEATURES, **SMALL)
    params, x = random_params(layer), inputs()
    four, eight = (run64(layer.clone(update_chunk=c), params, x)[0] for c in (4, 8))
    np.testing.assert_allclose(four[:, :4], eight[:, :4], rtol=0, atol=1e-12)
    assert np.abs(four[:, 4:] - eight[:, 4:]).max() > 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 0}, "depth: expected"),
        ({"window": 0}, "window: expected"),
        ({"initial_keep": 1.0}, "initial gates: expected shares"),
        ({"loss": "l3"}, "loss.kind"),
        ({"retention": "lq"}, "retention.amount"),
        ({"value_dim": 8}, "with a residual, value_dim must be key_dim"),
        ({"update_chunk": 0}, "update_chunk: expected"),
    ],
)
def test_bad_options(options, message):
    layer = NeuralMemory(FEATURES, **options)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(layer.init, jax.random.key(0), jnp.zeros((1, 2, FEATURES)))


# TTT --------------------------------------------------------------------------------------------


def rotated(x, position):
    half = len(x) // 2
    angle = position * 10_000.0 ** (-np.arange(half) / half)
    first, second = x[:half], x[half:]
    return np.concatenate(
        [
            first * np.cos(angle) - second * np.sin(angle),
            second * np.cos(angle) + first * np.sin(angle),
        ]
    )


def ttt(layer, params, x):
    """Mini-batches with the factors max(1 / i + learned, 0), biases written with the weights."""
    heads, dim, chunk = layer.heads, layer.features // layer.heads, layer.update_chunk
    query, key, value = query_key_value(params, x, heads, heads)
    step = sigmoid(x @ params["step_gate"]["kernel"] + params["step_bias"])
    step = step * layer.max_step / dim
    out = np.zeros((len(x), heads, dim))

    def forward(weights, biases, x, scale, offset):
        h, zs, hs = x, [], []
        for i, (w, b) in enumerate(zip(weights, biases, strict=True)):
            hs.append(h)
            zs.append(h @ w + b)
            h = gelu(zs[-1]) if i < len(weights) - 1 else zs[-1]
        n, deviation = layer_norm(h)
        return x + scale * n + offset, hs, zs, n, deviation

    for h in range(heads):
        affine = params["affine_scale"][h], params["affine_bias"][h]
        first = [params[f"initial_weight_{i}"][h] for i in range(layer.depth)]
        offsets = [params[f"initial_bias_{i}"][h] for i in range(layer.depth)]
        for t in range(len(x)):
            i = t % chunk
            if i == 0:
                total = [np.zeros_like(w) for w in first], [np.zeros_like(b) for b in offsets]
            k, q = rotated(key[t, h], i), rotated(query[t, h], i)
            answer, hs, zs, n, deviation = forward(first, offsets, k, *affine)
            dn = (answer - value[t, h]) * affine[0]
            dz = (dn - dn.mean() - n * np.mean(dn * n)) / deviation
            for j in reversed(range(layer.depth)):
                total[0][j] += step[t, h] * np.outer(hs[j], dz)
                total[1][j] += step[t, h] * dz
                if j:
                    dz = (first[j] @ dz) * gelu_slope(zs[j - 1])
            share = max(1 / (i + 1) + params["share_bias"][i], 0)
            now = [
                [w - share * g for w, g in zip(start, sums, strict=True)]
                for start, sums in zip((first, offsets), total, strict=True)
            ]
            out[t, h] = forward(*now, q, *affine)[0]
            if i == chunk - 1:
                first, offsets = now
    out = out.reshape(len(x), -1)
    out = (out - out.mean(-1, keepdims=True)) / np.sqrt(out.var(-1, keepdims=True) + 1e-6)
    out = out * params["post_norm"]["scale"] + params["post_norm"]["bias"]
    y = (out * gelu(x @ params["gate"]["kernel"])) @ params["output"]["kernel"]
    return y, None, {}


@pytest.mark.parametrize("cls", [TTTLinear, TTTMLP])
def test_ttt_transcription(cls):
    check_transcription(cls(FEATURES, **SMALL, implementation="chunked"), ttt, IDS)


# OmegaNet ---------------------------------------------------------------------------------------


def test_omega_net_transcription():
    """The transcription of a window, with the keys' products written as loops."""

    def products(x, scale):
        x, n = unit(x), len(x)
        pairs = [x[i] * x[j] for i in range(n) for j in range(i, n)]
        return np.concatenate([[scale[0]], scale[1] * x, scale[2] * np.array(pairs)])

    def transcription(layer, params, x):
        scale = params["degree_scale"]
        return transcribed(unit_of=lambda k: products(k, scale), residual=False)(layer, params, x)

    layer = OmegaNet(FEATURES, key_dim=4, **SMALL, implementation="chunked")
    check_transcription(layer, transcription)
    check_transcription(layer, transcription, IDS)


def test_one_token_and_no_momentum_is_the_plain_memory():
    """E10 and E24 through layers: a window of one is TitansLMM without its momentum."""
    options = SMALL | {"residual": False, "use_momentum": False, "key_dim": 8}
    plain = TitansLMM(FEATURES, **options)
    omega = OmegaNet(FEATURES, **options, window=1)
    params = random_params(plain)
    widened = random_params(omega)
    for name in params:
        widened[name] = params[name]
    # the network sees the keys alone
    widened["degree_scale"] = np.array([0.0, 1.0, 0.0])
    widened["initial_weight_0"] = np.zeros((2, 45, 16))
    widened["initial_weight_0"][:, 1:9] = params["initial_weight_0"]
    np.testing.assert_allclose(
        run64(omega, widened, inputs())[0], run64(plain, params, inputs())[0], rtol=0, atol=1e-11
    )


# Titans beside attention --------------------------------------------------------------------------


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def windowed(params, x, heads, window):
    """Attention in a window that also sees learned tokens at the positions before the first."""
    tokens = params["initial_tokens"]
    count, dim = len(tokens), x.shape[1] // heads
    inputs_ = np.concatenate([tokens, x])
    query, key, value = (
        (inputs_ @ params[name]["kernel"]).reshape(len(inputs_), heads, dim)
        for name in ("query", "key", "value")
    )
    out = np.zeros((len(x), heads, dim))
    for t in range(len(x)):
        seen = [*range(count), *range(count + max(0, t - window + 1), count + t + 1)]
        for h in range(heads):
            q = rotated(query[count + t, h], t)
            keys = np.array([rotated(key[j, h], j - count) for j in seen])
            out[t, h] = softmax(keys @ q / np.sqrt(dim)) @ value[seen, h]
    return out.reshape(len(x), -1) @ params["output"]["kernel"]


def normed(x, params):
    return np.array([rms_norm(row, params["scale"]) for row in x])


def memory_alone(layer, params, x):
    return transcribed()(layer.make_memory(), params["long_term"], x)[0]


def mag(layer, params, x):
    attended = windowed(params["short_term"], x, layer.heads, layer.window)
    gate = sigmoid(normed(memory_alone(layer, params, x), params["memory_norm"]))
    y = normed(attended, params["attention_norm"]) * gate
    return y @ params["output"]["kernel"], None, {}


def mal(layer, params, x):
    if layer.order == "memory_first":
        x = normed(memory_alone(layer, params, x), params["norm"])
        x = windowed(params["short_term"], x, layer.heads, layer.window)
    else:
        x = windowed(params["short_term"], x, layer.heads, layer.window)
        x = memory_alone(layer, params, normed(x, params["norm"]))
    return x @ params["output"]["kernel"], None, {}


def mac(layer, params, x):
    """Token by token: the answer of the stretch's memory, attention, a write, a read, the gate."""
    p, heads = params["stretch"], layer.heads
    m = params["stretch"]["memory"]
    dim, chunk = layer.features // heads, layer.update_chunk
    tokens = p["initial_tokens"]
    networks = [
        Network(m["affine_scale"][h], m["affine_bias"][h], 1e-5, True) for h in range(heads)
    ]
    a = [[m[f"initial_weight_{i}"][h] for i in range(2)] for h in range(heads)]
    s = [[np.zeros_like(w) for w in head] for head in a]

    def split(z):
        return z.reshape(heads, dim)

    ys = np.zeros_like(x)
    for t in range(len(x)):
        slot = t % chunk
        if slot == 0:
            start, seen = [list(head) for head in a], [(j, z) for j, z in enumerate(tokens)]
            seen = [(j - len(tokens), z) for j, z in seen]
        asked = split(silu(x[t] @ m["query"]["kernel"]))
        told = [n.forward(w, unit(q))[0] for n, w, q in zip(networks, start, asked, strict=True)]
        seen = [*seen, (slot, np.concatenate(told)), (slot, x[t])]
        query = split(x[t] @ p["query"]["kernel"])
        out = np.zeros((heads, dim))
        for h in range(heads):
            keys = np.array([rotated(split(z @ p["key"]["kernel"])[h], j) for j, z in seen])
            values = np.array([split(z @ p["value"]["kernel"])[h] for _, z in seen])
            out[h] = softmax(keys @ rotated(query[h], slot) / np.sqrt(dim)) @ values
        y = out.reshape(-1) @ p["attention_output"]["kernel"]
        step, keep, mixing = (
            sigmoid(y @ m[f"{name}_gate"]["kernel"] + m[f"{name}_bias"])
            for name in ("step", "keep", "momentum")
        )
        key, value = (split(silu(y @ m[name]["kernel"])) for name in ("key", "value"))
        remembered = np.zeros((heads, dim))
        for h, network in enumerate(networks):
            k = unit(key[h])
            r = network.forward(start[h], k)[0] - value[h]
            u = network.gradients(start[h], k, r)
            s[h] = [mixing[h] * b - step[h] / dim * g for b, g in zip(s[h], u, strict=True)]
            a[h] = [keep[h] * w + b for w, b in zip(a[h], s[h], strict=True)]
            remembered[h] = network.forward(a[h], unit(split(y)[h]))[0]
        gate = sigmoid(rms_norm(remembered.reshape(-1), p["memory_norm"]["scale"]))
        ys[t] = rms_norm(y, p["attention_norm"]["scale"]) * gate
    return ys @ params["output"]["kernel"], None, {}


BESIDE = {
    "mag": (TitansMAG, {"window": 5, "memory_options": (("expansion", 2),)}, mag),
    "mal": (TitansMAL, {"window": 5, "memory_options": (("expansion", 2),)}, mal),
    "attention first": (TitansMAL, {"window": 3, "order": "attention_first"}, mal),
    "mac": (TitansMAC, {"memory_options": (("expansion", 2),)}, mac),
}


@pytest.mark.parametrize("name", BESIDE)
def test_titans_beside_attention(name):
    cls, options, transcription = BESIDE[name]
    layer = cls(FEATURES, heads=2, update_chunk=4, persistent_tokens=3, **options)
    check_transcription(layer.clone(implementation="chunked"), transcription, IDS)


@pytest.mark.slow
def test_mac_ends_its_outer_gradient_after_some_stretches():
    """("truncate", 2): the second stretch's outputs have one in the first, the third's have not."""
    options = (("depth", 1), ("outer_grad", ("truncate", 2)))
    layer = TitansMAC(FEATURES, heads=1, update_chunk=4, memory_options=options)
    cotangents = np.zeros((2, 1, 12, FEATURES))
    cotangents[0, :, 4:8] = cotangents[1, :, 8:] = 1

    @jax.jit
    def pull(params, x):
        _, pullback = jax.vjp(lambda x: layer.apply({"params": params}, x)[0], x)
        return jax.vmap(pullback)(cotangents)[0]

    with jax.enable_x64(True):
        second, third = np.abs(pull(random_params(layer), inputs(time=12, batch=1))).max((1, 3))
    assert (second[:8] > 1e-6).all() and (third[8:] > 1e-6).all()  # NaN is not above
    np.testing.assert_array_equal(second[8:], 0)
    np.testing.assert_array_equal(third[:8], 0)


def test_order_of_mal():
    layer = TitansMAL(FEATURES, order="memory")
    with pytest.raises(ValueError, match="order: .*mean 'memory_first'"):
        jax.eval_shape(layer.init, jax.random.key(0), jnp.zeros((1, 2, FEATURES)))
