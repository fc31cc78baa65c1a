"""What the tests of the layers share: a layer run in float64, and NumPy parts to write it again.

The parts, as the transcriptions in the test files, take one sequence and are written from the
equations. `params` are a layer's parameters without the outer "params", as NumPy float64.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

FEATURES, TIME = 16, 21

# padding in front, inside and behind; a segment shorter than a convolution; an id that comes back
IDS = np.array([[-1] + [0] * 2 + [1] * 5 + [-1] * 2 + [1] * 3 + [0] * 6 + [-1] * 2] * 2, np.int32)
IDS[1] = [4] * 9 + [2] * 12


def random_params(layer, seed=0, features=FEATURES):
    """Parameters of the layer's shapes, none at its start value: a scale of 1 hides."""
    rng = np.random.default_rng(seed)
    example = jax.ShapeDtypeStruct((1, 4, features), jnp.float32)
    shapes = jax.eval_shape(layer.init, jax.random.key(0), example)["params"]

    def draw(path, leaf):
        values = rng.normal(size=leaf.shape)
        if path[-1].key == "kernel":
            return values / np.sqrt(leaf.shape[0])
        return 1 + 0.3 * values if path[-1].key in ("scale", "D") else values

    return jax.tree_util.tree_map_with_path(draw, shapes)


def inputs(seed=1, time=TIME, features=FEATURES, batch=2):
    return np.random.default_rng(seed).normal(size=(batch, time, features))


@functools.partial(jax.jit, static_argnames="layer")
def _apply(layer, params, x, state, segment_ids):
    return layer.apply({"params": params}, x, state, segment_ids, mutable="intermediates")


def run64(layer, params, x, state=None, segment_ids=None):
    """(y, state, what was sown by name), computed and returned in float64."""
    with jax.enable_x64(True):
        (y, state), sown = _apply(layer, params, x, state, segment_ids)
    own = sown.get("intermediates", {}).items()  # a dict in it is a layer inside this one
    sown = {name: np.asarray(values[0]) for name, values in own if isinstance(values, tuple)}
    assert y.dtype == np.float64
    return np.asarray(y), state, sown


def segments_of(ids):
    """Positions of each segment of one row: [np.array, ...]; padding is left out."""
    found, last = [], None
    for t in np.flatnonzero(ids >= 0):
        if ids[t] != last:
            found.append([])
        found[-1].append(t)
        last = ids[t]
    return [np.array(positions) for positions in found]


def check_transcription(layer, transcription, ids=None, seed=0, tolerance=1e-9):
    """layer.apply equals `transcription(layer, params, x) -> (y, memory, sown)`, row by row.

    memory: the last state's `memory`, or None; sown: per-step values by name, whose mean is sown.
    Returns what the transcription sowed.
    """
    params, x = random_params(layer, seed), inputs(seed + 1)
    y, state, sown = run64(layer, params, x, segment_ids=ids)
    assert y.shape == x.shape and np.isfinite(y).all()
    everywhere = np.zeros(x.shape[:2], np.int32)
    collected = {}
    for row, row_ids in enumerate(everywhere if ids is None else ids):
        for positions in segments_of(row_ids):
            want, memory, values = transcription(layer, params, x[row, positions])
            np.testing.assert_allclose(y[row, positions], want, rtol=0, atol=tolerance)
            for name, steps in values.items():
                collected.setdefault(name, []).append(steps)
        if memory is not None:
            np.testing.assert_allclose(state.memory[row], memory, rtol=0, atol=tolerance)
    if ids is None:
        for name, steps in collected.items():
            np.testing.assert_allclose(sown[name], np.mean(steps), rtol=0, atol=tolerance)
        if memory is not None:
            norm = np.sqrt(np.mean(np.square(state.memory)))
            np.testing.assert_allclose(sown["memory_norm"], norm, rtol=0, atol=tolerance)


def check_dtypes(layer, dtype=jnp.bfloat16):
    """Activations and the convolution's tail in `dtype`, memory and gates in float32."""
    narrow = layer.clone(dtype=dtype)
    x = jax.ShapeDtypeStruct((2, TIME, layer.features), jnp.float32)
    params = jax.eval_shape(narrow.init, jax.random.key(0), x)
    assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(params))
    apply = functools.partial(narrow.apply, mutable="intermediates")
    (y, state), sown = jax.eval_shape(apply, params, x)
    assert y.dtype == dtype and state.conv.dtype == dtype
    assert all(a.dtype == jnp.float32 for a in jax.tree.leaves(sown))
    again, after = jax.eval_shape(narrow.apply, params, x, narrow.init_state(2, context=TIME))
    assert again.dtype == dtype
    empty = jax.eval_shape(lambda: narrow.init_state(2, context=TIME))
    assert jax.tree.map(lambda a: (a.shape, a.dtype), after) == jax.tree.map(
        lambda a: (a.shape, a.dtype), empty
    )
    return state


def count(layer, features=FEATURES):
    """Number of parameters."""
    shapes = jax.eval_shape(
        layer.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 1, features), jnp.float32)
    )
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def init(layer, seed=0, features=None):
    """The layer's own start values, without the outer "params"."""
    x = jnp.zeros((1, 1, features or layer.features))
    return jax.jit(layer.init)(jax.random.key(seed), x)["params"]


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def softplus(x):
    return np.log1p(np.exp(x))


def unit(x):
    return x / np.sqrt(np.sum(x**2) + 1e-6)


def rms_norm(x, scale):
    return x / np.sqrt(np.mean(x**2) + 1e-5) * scale


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def short_conv(x, kernel, bias=0.0, activation=silu):
    """y_t = silu(bias + sum_w kernel_w x_{t - width + 1 + w}) over x [time, channels]."""
    width = len(kernel)
    y = np.zeros_like(x)
    for t in range(len(x)):
        y[t] = bias
        for w in range(width):
            if t - width + 1 + w >= 0:
                y[t] += kernel[w] * x[t - width + 1 + w]
    return activation(y) if activation else y


def gated_linear_unit(params, y):
    """(W g + w) * sigmoid(V g + v), g = gelu(y), where it has params."""
    if "output" not in params:
        return y
    g = gelu(y)
    output, gate = (
        g @ params[name]["kernel"] + params[name]["bias"] for name in ("output", "gate")
    )
    return output * sigmoid(gate)


def query_key_value(params, x, key_heads, heads, activation=False):
    """Projections, then short convolution where it has a kernel: three [time, heads, dim]."""
    parts = [x @ params[name]["kernel"] for name in ("query", "key", "value")]
    borders = np.cumsum([part.shape[1] for part in parts])[:2]
    if "conv" in params:
        mixed = short_conv(np.concatenate(parts, axis=1), params["conv"]["kernel"])
        parts = np.split(mixed, borders, axis=1)
    elif activation:
        parts = [silu(part) for part in parts]
    return [
        part.reshape(len(x), n, -1)
        for part, n in zip(parts, (key_heads, key_heads, heads), strict=True)
    ]


def read_out(params, x, out, activation=silu):
    """Norm per head, gate, output projection of out [time, heads, dim], where they have params."""
    if "gate_in" in params:
        gate = x @ params["gate_in"]["kernel"] @ params["gate"]["kernel"] + params["gate"]["bias"]
    elif "gate" in params:
        gate = x @ params["gate"]["kernel"]
    y = []
    for t, heads in enumerate(out):
        if "norm" in params:
            heads = [rms_norm(o, params["norm"]["scale"]) for o in heads]
        o = np.concatenate(list(heads))
        if "gate" in params:
            o = o * activation(gate[t])
        y.append(o @ params["output"]["kernel"])
    return np.array(y)
