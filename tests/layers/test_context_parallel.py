"""Time split over devices: the same values, states and gradients as on one."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memseq.layers import REGISTRY, GatedDeltaNet, LinearAttention, context_parallel
from memseq.layers.common.parts import count_positions
from memseq.layers.linear_attention.cumulative_softmax import cumulative_softmax
from memseq.layers.state_space.invariant import Dense, in_chunks, over_time
from memseq.pallas_kernels import (
    attention,
    causal_conv,
    delta_rule,
    diagonal_plus_low_rank,
    linear_attention,
    linear_scan,
    log_linear_attention,
    mlstm,
    momentum_delta_rule,
    ridge_readout,
    selective_scan,
)
from memseq.pallas_kernels.common import context
from memseq.pallas_kernels.common.segments import begins, numbered
from memseq.pallas_kernels.mlstm.api import stabilized
from memseq.partitioning import make_mesh

# Their memory is no linear state, or they look across time beside their operations.
ALONE = set(
    """
    softmax_attention sliding_window_attention forgetting_attention path_attention
    differential_attention shared_attention bmojo
    mem_mamba layered_mem_mamba factored_bilinear_rnn lmu slstm lstm gru lem
    wave_rnn elm_neuron echo_state reservoir_memory neural_memory
    titans_lmm titans_mac titans_mag titans_mal moneta yaad memora ttt_linear ttt_mlp omega_net
    """.split()
)
SPLIT = [name for name in REGISTRY if name not in ALONE]
# by default one, of a matrix memory and a convolution; operations have tests of their own
SAMPLE = ("gated_delta_net",)


def mesh(devices):
    return make_mesh(f"context={devices}", jax.devices()[:devices])


def close(got, want, tolerance=1e-5):
    got, want = np.asarray(got), np.asarray(want)
    assert np.isfinite(got).all() and np.isfinite(want).all()
    size = np.abs(want).max(initial=1)
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance * size)


def closes(got, want, tolerance=1e-5):
    jax.tree.map(lambda a, b: close(a, b, tolerance), got, want)


# Rows of 37 over 4 devices are stretches of 10, 3 of them padding: a segment over three stretches,
# one that ends where a stretch does, a stretch of padding alone, an id that comes back behind it.
TIME = 37
IDS = np.array(
    [[3] * 5 + [4] * 20 + [-1] * 6 + [4] * 6, [7] * 10 + [-1] * 10 + [7] * 10 + [8] * 7], np.int32
)


def both(function, arguments, ids, devices=4):
    """(on one device, split): value, gradients and what was returned."""

    def loss(function, arguments):
        out, state = function(arguments)
        seen = out if ids is None else jnp.where((ids >= 0).reshape(*ids.shape, 1), out, 0)
        learns = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.inexact)]
        value = sum(jnp.sum(jnp.sin(abs(x)) * x.real) for x in (seen, *learns))
        return value, (seen, state)

    def run(function):
        grad = jax.value_and_grad(functools.partial(loss, function), has_aux=True, allow_int=True)
        return jax.jit(grad)

    found = []
    for one in (function, lambda arguments: function(arguments, context_parallel)):
        with jax.set_mesh(mesh(devices)):
            (_, outputs), grads = run(one)(arguments)
        grads = [g for g in jax.tree.leaves(grads) if g.dtype != jax.dtypes.float0]
        found.append((outputs, grads))
    return found


def check_layer(layer, time, ids, devices, tolerance=1e-5):
    x = jax.random.normal(jax.random.key(1), (2, time, layer.features))
    params = jax.tree.map(
        lambda a: a + 0.1 * jax.random.normal(jax.random.key(a.size), a.shape),
        jax.jit(layer.init)(jax.random.key(0), x[:, :2]),
    )
    _, state = jax.jit(layer.apply)(params, x[:, 3:9])
    if ids is not None:
        state = state.replace(segment=jnp.asarray([3, 6], jnp.int32))

    def function(arguments, wrap=lambda layer: layer.apply):
        return wrap(layer)(*arguments, ids)

    want, got = both(function, (params, x, state), ids, devices)
    closes(got[0], want[0], tolerance)
    closes(got[1], want[1], 10 * tolerance)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in SAMPLE else pytest.mark.slow) for n in SPLIT]
)
def test_layers(name):
    """Values, states and gradients, from a state that goes on in one row and not in the other."""
    check_layer(REGISTRY[name](32, implementation="chunked", chunk_size=8), TIME, IDS, 4)


@pytest.mark.slow
def test_hippo_with_fixed_steps():
    """Of a window, whose transitions are the same at all steps."""
    layer = REGISTRY["hippo_memory"](32, order=12, measure="lmu", window=16)
    check_layer(layer, TIME, IDS, 4)


def test_without_ids():
    """The padding to whole stretches is nobody's segment: the state's id stays."""
    layer = GatedDeltaNet(32, heads=2)
    x = jax.random.normal(jax.random.key(1), (2, TIME, 32))
    params = layer.init(jax.random.key(0), x[:, :1])
    want, want_state = jax.jit(layer.apply)(params, x)
    with jax.set_mesh(mesh(4)):
        y, state = jax.jit(context_parallel(layer))(params, x)
    close(y, want)
    closes(state, want_state)
    np.testing.assert_array_equal(state.segment, [-1, -1])


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(ALONE))
def test_others_say_so(name):
    layer = REGISTRY[name](32)
    x = jax.ShapeDtypeStruct((2, 8, 32), jnp.float32)
    params = jax.eval_shape(layer.init, jax.random.key(0), x)
    with jax.set_mesh(mesh(2)), pytest.raises(ValueError, match="expected a layer that looks"):
        jax.eval_shape(context_parallel(layer), params, x)


@pytest.mark.slow
@pytest.mark.parametrize("time", [4096, 4001])
@pytest.mark.parametrize("name", SPLIT)
def test_eight_devices(name, time):
    rng = np.random.default_rng(0)
    ids = np.sort(rng.integers(0, 5, (2, time), np.int32))
    ids[1, 512:1024] = -1
    check_layer(REGISTRY[name](32, implementation="chunked"), time, ids, 8)


def decays(rng, *shape):
    return -rng.gamma(0.5, size=shape)


def unit(rng, *shape):
    x = rng.normal(size=shape)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def example(name, rng):
    """Arguments of an operation, with a decay of each kind that it takes among the cases."""
    matrix = (2, TIME, 2, 5)
    query, key, value = (unit(rng, *matrix) for _ in range(3))
    value = np.concatenate([value, value[..., :2]], axis=-1)
    beta, state = 2 * rng.random(matrix[:3]), rng.normal(size=(2, 2, 5, 7))
    common = {"query": query, "key": key, "value": value, "initial_state": state}
    channels = (2, TIME, 6)
    levels = (
        common
        | {  # the last one holds what is older than 8 steps
            "level_scale": rng.random((*matrix[:3], 5)),
            "log_decay": decays(rng, *matrix[:3]),
            "initial_state": (rng.normal(size=(2, 2, 4, 5, 7)), np.array([5, 13], np.int32)),
        }
    )
    return {
        "linear_attention": common | {"log_decay": decays(rng, *matrix[:3])},
        "linear_attention, channels": common
        | {
            "log_decay": decays(rng, *matrix),
            "value_log_decay": decays(rng, *value.shape),
            "bonus": rng.normal(size=(2, 5)),
        },
        "linear_attention, fixed": common | {"log_decay": decays(rng, 2)},
        "delta_rule": common | {"beta": beta},
        "delta_rule, channels": common
        | {"beta": beta, "log_decay": decays(rng, *matrix), "erase_key": unit(rng, *matrix)},
        "diagonal_plus_low_rank": common
        | {"a": key, "b": -key * beta[..., None] / 2, "log_decay": decays(rng, *matrix)},
        "momentum_delta_rule": common
        | {
            "beta": beta / 2,
            "step": rng.random(beta.shape),
            "log_momentum": decays(rng, *beta.shape),
            "log_decay": decays(rng, *beta.shape),
            "initial_state": rng.normal(size=(2, 2, 10, 7)),
        },
        "ridge_readout": {
            "query": query,
            "key": key,
            "value": value,
            "beta": beta,
            "log_decay": decays(rng, *matrix[:3]),
            "ridge": 0.5 + rng.random((2, 5)),
        },
        "log_linear_attention": levels,
        "log_linear_attention, delta": levels | {"beta": beta},
        "mlstm": common
        | {
            "log_input": 3 * rng.normal(size=matrix[:3]),
            "log_forget": decays(rng, *matrix[:3]),
            "initial_state": (rng.normal(size=(2, 2, 5, 8)), rng.random((2, 2))),
        },
        "linear_scan": {
            "x": rng.normal(size=channels),
            "log_decay": decays(rng, *channels),
            "phase": rng.normal(size=6),
            "initial_state": rng.normal(size=(2, 6)),
        },
        "selective_scan": {
            "x": rng.normal(size=channels),
            "dt": rng.random(channels),
            "A": -rng.gamma(1.0, size=(6, 3)),
            "B": rng.normal(size=(2, TIME, 3)),
            "C": rng.normal(size=(2, TIME, 3)),
            "D": rng.normal(size=6),
            "initial_state": rng.normal(size=(2, 6, 3)),
        },
        "causal_conv": {
            "x": rng.normal(size=channels),
            "kernel": rng.normal(size=(4, 6)),
            "bias": rng.normal(size=6),
            "initial_state": rng.normal(size=(2, 3, 6)),
        },
    }[name]


OPERATIONS = {
    f.__name__: f
    for f in (
        causal_conv,
        delta_rule,
        diagonal_plus_low_rank,
        linear_attention,
        linear_scan,
        log_linear_attention,
        mlstm,
        momentum_delta_rule,
        ridge_readout,
        selective_scan,
    )
}
CASES = (
    "causal_conv",
    "delta_rule",
    "delta_rule, channels",
    "diagonal_plus_low_rank",
    "linear_attention",
    "linear_attention, channels",
    "linear_attention, fixed",
    "linear_scan",
    "log_linear_attention",
    "log_linear_attention, delta",
    "mlstm",
    "momentum_delta_rule",
    "ridge_readout",
    "selective_scan",
)


QUICK = (
    "causal_conv",
    "delta_rule, channels",
    "linear_attention, channels",
    "linear_scan",
    "log_linear_attention",
)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in CASES]
)
def test_operations(name):
    """In float64: values, states and the gradients of every argument."""
    operation = OPERATIONS[name.partition(",")[0]]

    def function(arguments, wrap=lambda operation: operation):
        options = {} if operation is causal_conv else {"chunk_size": 8}
        return _flat(wrap(operation)(**arguments, segment_ids=ids, **options))

    with jax.enable_x64(True):
        ids = jnp.asarray(IDS)
        arguments = jax.tree.map(jnp.asarray, example(name, np.random.default_rng(0)))
        want, got = both(function, arguments, ids)
    closes(got, want, 1e-9)


def positions(ids, x, start):
    position, reached = count_positions(jnp.asarray([3, 6]), ids.shape[1], ids)
    return position[..., None], reached


def softmax_so_far(ids, x, start):
    written, log_decay, total = cumulative_softmax(x, start[..., 0], ids)
    valid = (ids >= 0)[..., None]  # at padding it means nothing
    return jnp.where(valid, jnp.concatenate([written, log_decay], -1), 0), total


def stabilizer(ids, x, start):
    found = stabilized(3 * x, -abs(x), abs(start[..., 0]), ids)
    return jnp.concatenate(found[:3], -1), found[3]


def fixed_matrix(ids, x, start):
    matrix = jnp.asarray(0.5 * np.random.default_rng(1).normal(size=(3, 2, 2)))
    system, ones = Dense(matrix), jnp.ones((3, 2))
    return over_time(in_chunks, system, ones, ones, x, start, ids, chunk_size=4)


PARTS = (
    lambda ids, x, start: (begins(ids)[..., None], jnp.zeros(1)),
    lambda ids, x, start: (numbered(ids).index[..., None], jnp.zeros(1)),
    positions,
    softmax_so_far,
    stabilizer,
    fixed_matrix,
)


@pytest.mark.parametrize("part", PARTS, ids=range(len(PARTS)))
def test_what_layers_carry_besides_operations(part):
    """Segments, positions, running sums of exponentials, stabilisers, powers of a matrix."""
    rng = np.random.default_rng(0)
    ids = np.pad(IDS, ((0, 0), (0, 3)), constant_values=-1)
    spec = jax.sharding.PartitionSpec
    with jax.enable_x64(True):
        x, start = jnp.asarray(rng.normal(size=(2, 40, 3))), jnp.asarray(rng.normal(size=(2, 3, 2)))
        want = part(jnp.asarray(ids), x, start)

        def stretch(ids, x):
            with context.over("context"):
                return part(ids, x, start)

        over = spec(None, "context")
        call = jax.shard_map(
            stretch, mesh=mesh(4), in_specs=over, out_specs=(over, spec()), axis_names={"context"}
        )
        closes(jax.jit(call)(jnp.asarray(ids), x), want, 1e-12)


def test_arrays_may_be_numpy():
    """As in the operation itself: what an array is, its name says."""
    arguments = example("causal_conv", np.random.default_rng(0))
    arguments = {name: np.float32(x) for name, x in arguments.items()}
    want, _ = causal_conv(**arguments, activation="silu")
    with jax.set_mesh(mesh(4)):
        got, _ = context_parallel(causal_conv)(**arguments, activation="silu")
    close(got, want)


def _flat(found):
    out, state = found
    return out.reshape(*out.shape[:2], -1), state


def test_memory_falls_with_devices():
    """What a device keeps for the backward pass: its own stretch, and states."""
    layer = LinearAttention(32, heads=2)
    x = jax.ShapeDtypeStruct((1, 2048, 32), jnp.float32)
    params = jax.eval_shape(layer.init, jax.random.key(0), x)

    def temporary(devices):
        with jax.set_mesh(mesh(devices)):

            def loss(params, x):
                return jnp.sum(jnp.sin(context_parallel(layer)(params, x)[0]))

            compiled = jax.jit(jax.grad(loss)).lower(params, x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    two, eight = temporary(2), temporary(8)
    assert eight < 0.4 * two


def test_states_cross_the_mesh_not_time():
    """Gathers and sums of the compiled program: of states and tails, nothing that grows with T."""
    layer = GatedDeltaNet(32, heads=2)

    def exchanged(time):
        x = jax.ShapeDtypeStruct((1, time, 32), jnp.float32)
        params = jax.eval_shape(layer.init, jax.random.key(0), x)
        with jax.set_mesh(mesh(8)):
            sharding = jax.sharding.NamedSharding(
                mesh(8), jax.sharding.PartitionSpec(None, "context")
            )
            x = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
            text = jax.jit(context_parallel(layer)).lower(params, x).compile().as_text()
        lines = [
            line.split("=", 1)[1].strip()
            for line in text.splitlines()
            if any(f" {kind}(" in line for kind in ("all-gather", "all-reduce", "all-to-all"))
        ]
        return sorted(line.split("{")[0] for line in lines)

    assert exchanged(512) == exchanged(256)
    assert any("all-gather" in kind or "f32[8," in kind for kind in exchanged(256))


def lowered(layer, time, mesh, gradient, **lowering):
    """The layer with time split over `mesh`, lowered there or for a machine that is not here."""
    place = functools.partial(jax.sharding.NamedSharding, mesh)
    over_time = place(jax.sharding.PartitionSpec(None, "context"))
    x = jax.ShapeDtypeStruct((1, time, layer.features), jnp.bfloat16, sharding=over_time)
    shapes = jax.eval_shape(layer.init, jax.random.key(0), x)
    whole = place(jax.sharding.PartitionSpec())
    params = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=whole), shapes)

    def loss(params, x):
        y, state = context_parallel(layer)(params, x)
        return jnp.sum(jnp.square(y.astype(jnp.float32))), (y, state)

    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        function = jax.grad(loss, argnums=(0, 1), has_aux=True) if gradient else loss
        return jax.jit(function).trace(params, x).lower(**lowering)


def test_kernels_run_on_each_stretch():
    """On a TPU too: the kernels stand in the program that is made for it."""
    layer = GatedDeltaNet(128, heads=2, dtype=jnp.bfloat16)
    text = lowered(layer, 512, mesh(4), gradient=True, lowering_platforms=("tpu",)).as_text()
    assert text.count("@tpu_custom_call") > 4


@pytest.mark.slow
def test_sixteen_chips_exchange_states():
    """Compiled for a v5e-16, forward and backward: what crosses is of the size of states."""
    from jax.experimental import topologies

    from memseq.pallas_kernels import aot

    aot.mesh_for("v5e", data=1)  # sets what libtpu wants to know
    pod = topologies.get_topology_desc(platform="tpu", topology_name="v5e:4x4").devices
    layer = GatedDeltaNet(128, heads=2, dtype=jnp.bfloat16)
    collective = re.compile(
        r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(-start)?\("
    )

    def exchanged(time):
        compiled = lowered(layer, time, make_mesh("context=16", pod), gradient=True).compile()
        text = compiled.as_text()
        assert text.count("tpu_custom_call") > 4
        found = {
            (kind, shape)
            for result, kind, _ in collective.findall(text)
            for shape in re.findall(r"\w+\[[\d,]*\]", result)
        }
        return found, compiled.memory_analysis().temp_size_in_bytes

    (found, small), (more, large) = exchanged(4096), exchanged(8192)
    assert found == more
    assert {kind for kind, _ in found} == {"all-gather", "all-reduce"}
    keys, values = layer.init_state(1).memory.shape[-2:]
    # of 16 chips and 2 heads: what a stretch adds to a memory, and what it does to one
    assert {("all-gather", f"f32[32,{keys},{n}]") for n in (values, keys)} <= found
    assert large < 2.2 * small


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (attention, "context_parallel: expected a layer or a linear-state .* got attention"),
        (REGISTRY["softmax_attention"](16), "context_parallel: expected a layer that looks"),
    ],
)
def test_what_cannot_be_split(what, message):
    x = jax.ShapeDtypeStruct((1, 8, 16), jnp.float32)
    with jax.set_mesh(mesh(2)), pytest.raises(ValueError, match=message):
        call = context_parallel(what)
        jax.eval_shape(call, jax.eval_shape(what.init, jax.random.key(0), x), x)


def test_the_mesh_must_have_the_axis():
    with jax.set_mesh(mesh(2)), pytest.raises(ValueError, match="axis: .* got 'time'"):
        context_parallel(linear_scan, "time")(jnp.ones((1, 8, 16)), -jnp.ones(16))
