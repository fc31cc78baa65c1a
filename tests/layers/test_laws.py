"""The seven laws of a causal sequence layer, for the whole registry at once.

1 streaming, 2 causality, 3 packing, 4 independence, 5 form, 6 transforms, 7 state. Adding a layer
to `memseq.layers.REGISTRY` is enough to have it tested. Everything runs on two compiled calls per
layer (21 steps and one step) as far as it can: compilation is what the tests cost. What needs
programs of its own (`sampled`: other forms, transforms, meshes, artifacts) hangs on the operation
more than on the layer, so the default run takes one layer of each operation; `-m slow` the others.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memseq.layers import REGISTRY
from memseq.partitioning import batch_sharding, make_mesh, tree_shardings

FEATURES, TIME, CHUNK = 32, 21, 4


class Case:
    """A layer with parameters, inputs and its compiled calls."""

    def __init__(self, name):
        self.layer = REGISTRY[name](FEATURES, implementation="chunked", chunk_size=CHUNK)
        self.x = jax.random.normal(jax.random.key(1), (2, TIME, FEATURES))
        shapes = jax.eval_shape(self.layer.init, jax.random.key(2), self.x)
        # random everywhere: zeros and ones would hide what a bias or a scale does
        leaves, tree = jax.tree.flatten(shapes)
        draw = np.random.default_rng(3).normal
        self.params = jax.tree.unflatten(
            tree, [jnp.asarray(0.2 * draw(size=a.shape), a.dtype) for a in leaves]
        )
        self.empty = self.layer.init_state(2, context=TIME)

    @functools.cached_property
    def call(self):
        return jax.jit(self.layer.apply)

    @functools.cached_property
    def whole(self):
        """The parallel call over all of x: no state, no ids."""
        return self.call(self.params, self.x)

    @functools.cached_property
    def pull(self):
        """(params, x, ids, cotangent) to the gradient of sum(cotangent * y) in params and x."""
        return self.pull_of(self.layer)

    def pull_of(self, layer):
        def loss(params, x, ids, cotangent):
            y, _ = layer.apply(params, x, self.empty, ids)
            return jnp.sum(jnp.where(ids[..., None] >= 0, cotangent * y, 0))

        return jax.jit(jax.grad(loss, argnums=(0, 1)))

    def padded(self, x, ids):
        """Rows x [n, t, features] and ids, filled up to the compiled shape with padding."""
        n, t = ids.shape
        x = jnp.pad(x, ((0, 2 - n), (0, TIME - t), (0, 0)), constant_values=3.0)
        return x, jnp.pad(jnp.asarray(ids), ((0, 2 - n), (0, TIME - t)), constant_values=-1)


@functools.cache
def case(name):
    return Case(name)


# Another layer's class with other values, or with a step of its own inside another's scan: its laws
# are slow tests, its equations are not.
VARIANTS = set(
    """
    titans_lmm titans_mag titans_mal moneta yaad memora omega_net ttt_mlp log_linear_mamba2
    preconditioned_kimi_delta_attention gated_delta_product polarized_mamba hawk
    sliding_window_attention mamba3_mimo momentum_delta_net differential_attention shared_attention
    shared_memory path_attention complex_hgrn factored_bilinear_rnn
    layered_mem_mamba lmu
    rwkv_channel_mix gated_convolution
    """.split()
)


# one layer after another, each compiled once
@pytest.fixture(
    params=[
        pytest.param(name, marks=pytest.mark.slow if name in VARIANTS else []) for name in REGISTRY
    ],
    scope="module",
)
def subject(request):
    return case(request.param)


def samples():
    """Every layer, all but the first of each operation marked slow."""
    seen = set()
    for name, constructor in sorted(REGISTRY.items(), key=lambda item: item[0] in VARIANTS):
        operation = constructor(FEATURES).OPERATION
        late = operation in seen or name in VARIANTS
        yield pytest.param(name, marks=[pytest.mark.slow] if late else [])
        seen.add(operation)


@pytest.fixture(params=samples(), scope="module")
def sampled(request):
    return case(request.param)


def close(got, want, tolerance=2e-5):
    got, want = np.asarray(got), np.asarray(want)
    assert np.isfinite(got).all() and np.isfinite(want).all()
    size = np.abs(want).max(initial=1)
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance * size)


# the borders fall inside a chunk, at its edge, and leave a segment shorter than a convolution
IDS = np.array([[0] * 2 + [1] * 9 + [-1] * 3 + [1] * 2 + [2] * 5, [7] * 8 + [-1] * 2 + [5] * 11])
PIECES = {0: [slice(0, 2), slice(2, 16), slice(16, 21)], 1: [slice(0, 8), slice(10, 21)]}


def test_streaming_token_by_token(subject):
    want, want_state = subject.whole
    state, outs = subject.empty, []
    for t in range(TIME):
        y, state = subject.call(subject.params, subject.x[:, t : t + 1], state)
        outs.append(y)
    close(jnp.concatenate(outs, 1), want)
    jax.tree.map(close, jax.tree.leaves(state), jax.tree.leaves(want_state))


def test_streaming_in_ragged_calls(subject):
    """Two calls whose rows are cut at different places: padding neither writes nor advances."""
    cuts = [13, 5]
    first = np.where(np.arange(TIME) < np.array(cuts)[:, None], 4, -1)
    rest = np.full((2, TIME), -1)
    x2 = np.full(subject.x.shape, 3.0, np.float32)
    for row, cut in enumerate(cuts):
        rest[row, : TIME - cut] = 4
        x2[row, : TIME - cut] = subject.x[row, cut:]
    x1 = jnp.where(first[..., None] >= 0, subject.x, 3.0)
    y1, state = subject.call(subject.params, x1, subject.empty, jnp.asarray(first, jnp.int32))
    y2, state = subject.call(subject.params, x2, state, jnp.asarray(rest, jnp.int32))
    for row, cut in enumerate(cuts):
        got = jnp.concatenate([y1[row, :cut], y2[row, : TIME - cut]])
        close(got, subject.whole[0][row])
    np.testing.assert_array_equal(state.segment, [4, 4])


def test_causality(subject):
    future = subject.x.at[:, 11:].set(2 - 3 * subject.x[:, 11:])
    y, _ = subject.call(subject.params, future)
    np.testing.assert_array_equal(y[:, :11], subject.whole[0][:, :11])
    assert not np.array_equal(y[:, 11:], subject.whole[0][:, 11:])


def test_packing_forward(subject):
    ids = jnp.asarray(IDS, jnp.int32)
    y, state = subject.call(subject.params, subject.x, subject.empty, ids)
    for row, pieces in PIECES.items():
        for piece in pieces:
            alone = subject.padded(subject.x[row : row + 1, piece], IDS[row : row + 1, piece])
            want, alone_state = subject.call(subject.params, alone[0], subject.empty, alone[1])
            valid = IDS[row, piece] >= 0
            close(y[row, piece][valid], want[0, : valid.size][valid])
        for got, want in zip(jax.tree.leaves(state), jax.tree.leaves(alone_state), strict=True):
            close(got[row], want[0])


def test_packing_backward(subject):
    """A segment's loss has the gradient that it has alone, and exactly none elsewhere."""
    ids = jnp.asarray(IDS, jnp.int32)
    piece = PIECES[0][1]
    cotangent = np.zeros(subject.x.shape, np.float32)
    cotangent[0, piece] = np.random.default_rng(0).normal(size=cotangent[0, piece].shape)
    params, x = subject.pull(subject.params, subject.x, ids, cotangent)
    elsewhere = np.ones((2, TIME), bool)
    elsewhere[0, piece] = False
    np.testing.assert_array_equal(np.asarray(x)[elsewhere], 0)
    alone_x, alone_ids = subject.padded(subject.x[:1, piece], IDS[:1, piece])
    alone = np.zeros_like(cotangent)
    alone[0, : cotangent[0, piece].shape[0]] = cotangent[0, piece]
    want_params, want = subject.pull(subject.params, alone_x, alone_ids, alone)
    close(x[0, piece], want[0, : cotangent[0, piece].shape[0]], 1e-4)
    jax.tree.map(lambda a, b: close(a, b, 1e-4), params, want_params)


@pytest.mark.parametrize("cut", [2, 5, 12])  # at a border, inside a segment, inside padding
def test_packing_across_calls(subject, cut):
    """A border between two calls restarts the memory as one within a call does."""
    want, _ = subject.call(subject.params, subject.x, subject.empty, jnp.asarray(IDS, jnp.int32))
    state, outs = subject.empty, []
    for part in (slice(0, cut), slice(cut, TIME)):
        x, ids = subject.padded(subject.x[:, part], IDS[:, part])
        y, state = subject.call(subject.params, x, state, ids)
        outs.append(y[:, : IDS[:, part].shape[1]])
    valid = IDS >= 0
    close(jnp.concatenate(outs, 1)[valid], want[valid])


def test_independence(subject):
    """Other values in a batch-mate change nothing; another batch size, rounding only."""
    ids = jnp.asarray(IDS, jnp.int32)
    want, _ = subject.call(subject.params, subject.x, subject.empty, ids)
    other = subject.x.at[1].set(-2 * subject.x[1] + 1)
    y, _ = subject.call(subject.params, other, subject.empty, ids.at[1].set(0))
    np.testing.assert_array_equal(y[0][IDS[0] >= 0], want[0][IDS[0] >= 0])
    one, _ = subject.call(
        subject.params, subject.x[:1, :1], subject.layer.init_state(1, context=TIME)
    )
    two, _ = subject.call(subject.params, subject.x[:, :1], subject.empty)
    close(one, two[:1], 1e-5)


def test_form(sampled):
    """The chunked form and the reference, values and gradients, with borders and padding."""
    ids = jnp.asarray(IDS, jnp.int32)
    reference = sampled.layer.clone(implementation="reference")
    y, state = jax.jit(reference.apply)(sampled.params, sampled.x, sampled.empty, ids)
    got, got_state = sampled.call(sampled.params, sampled.x, sampled.empty, ids)
    close(got[IDS >= 0], y[IDS >= 0])
    jax.tree.map(close, got_state, state)
    cotangent = jnp.cos(jnp.arange(sampled.x.size).reshape(sampled.x.shape))
    want = sampled.pull_of(reference)(sampled.params, sampled.x, ids, cotangent)
    got = sampled.pull(sampled.params, sampled.x, ids, cotangent)
    jax.tree.map(lambda a, b: close(a, b, 1e-4), got, want)


def test_transforms(sampled):
    """jit(grad(vmap(remat(scan over layers)))) is what the layers give one by one."""
    stacked = jax.tree.map(lambda a: jnp.stack([a, 0.9 * a]), sampled.params)

    def loss(params, x):
        @jax.checkpoint
        def body(x, params):
            y, _ = sampled.layer.apply(params, x)
            return x + y, None

        y = jax.vmap(lambda x: jax.lax.scan(body, x, params)[0])(x[:, None])
        return jnp.sum(jnp.sin(y)), y

    (_, y), (grads, dx) = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(
        stacked, sampled.x
    )
    first, second = (jax.tree.map(lambda a, i=i: a[i], stacked) for i in range(2))
    middle = sampled.x + sampled.whole[0]
    last = middle + sampled.call(second, middle)[0]
    close(y[:, 0], last)
    ids = jnp.zeros((2, TIME), jnp.int32)
    d_second, through = sampled.pull(second, middle, ids, jnp.cos(last))
    d_middle = jnp.cos(last) + through
    d_first, through = sampled.pull(first, sampled.x, ids, d_middle)
    close(dx, d_middle + through, 1e-4)
    want = jax.tree.map(lambda *a: jnp.stack(a), d_first, d_second)
    jax.tree.map(lambda a, b: close(a, b, 1e-4), grads, want)


def test_sharded(sampled):
    """jit over a mesh that splits the batch on one axis, and features and heads on another."""
    mesh = make_mesh("data=2,tensor=2", jax.devices()[:4])
    params = jax.device_put(sampled.params, tree_shardings(sampled.params, mesh))
    assert any("tensor" in a.sharding.spec for a in jax.tree.leaves(params))
    x = jax.device_put(sampled.x, batch_sharding(mesh))
    with jax.set_mesh(mesh):
        y, _ = sampled.call(params, x)
    close(y, sampled.whole[0])


def export(subject, platform):
    arguments = (subject.params, subject.x, subject.empty, jnp.asarray(IDS, jnp.int32))
    return jax.export.export(subject.call, platforms=[platform])(*arguments), arguments


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_export(subject, platform):
    """One artifact a platform."""
    assert export(subject, platform)[0].platforms == (platform,)


def test_exported_values(sampled):
    """The artifact for this platform, written and read, gives the same values."""
    exported, arguments = export(sampled, "cpu")
    restored = jax.export.deserialize(exported.serialize())
    jax.tree.map(close, restored.call(*arguments), sampled.call(*arguments))


def test_state(subject):
    """Fixed shapes, batch first, and bytes counted from the arrays themselves."""
    _, state = subject.call(subject.params, subject.x[:, :1], subject.empty)
    layout = jax.tree.map(lambda a: (a.shape, a.dtype), subject.empty)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), state) == layout
    assert all(a.shape[0] == 2 for a in jax.tree.leaves(state))
    assert state.segment.dtype == jnp.int32 and type(state).__name__.endswith("State")
    counted = sum(a.nbytes for a in jax.tree.leaves(state))
    assert subject.layer.state_bytes(2, context=TIME) == counted
    with pytest.raises(ValueError, match="state"):
        subject.layer.apply(subject.params, subject.x, subject.layer.init_state(3, context=TIME))
    with pytest.raises(ValueError, match=r"x: expected \[batch, time, features\]"):
        subject.layer.apply(subject.params, subject.x[..., :-1])


def test_bfloat16_activations(subject):
    """Activations in bfloat16, memory and gates in float32: close to the float32 call."""
    y, state = jax.jit(subject.layer.clone(dtype=jnp.bfloat16).apply)(subject.params, subject.x)
    assert y.dtype == jnp.bfloat16
    want = np.asarray(subject.whole[0])
    error = np.linalg.norm(np.asarray(y, np.float32) - want) / np.linalg.norm(want)
    assert np.isfinite(np.asarray(y, np.float32)).all() and error < 0.05
    if hasattr(state, "memory"):
        assert state.memory.dtype == jnp.float32
