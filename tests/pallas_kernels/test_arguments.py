"""What every operation takes and returns: bad arguments, and the sizes at which models call it.

An operation that is registered in `memseq.pallas_kernels.operations` inherits the checks of what it
shares with others; `BAD` and `RETURNS` say the rest. Arguments are the example of the shape "odd",
which every operation has: 3 rows of 97 steps, 6 heads and 2 for keys, keys of 24, values of 20.
"""

import inspect
import re
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memseq.pallas_kernels.common.dispatch import IMPLEMENTATIONS
from memseq.pallas_kernels.log_linear_attention import LogLinearState
from memseq.pallas_kernels.neural_memory import Loss
from memseq.pallas_kernels.neural_memory.state import MemoryState
from memseq.pallas_kernels.operations import OPERATIONS
from memseq.pallas_kernels.ridge_readout import RidgeState


def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


PAIRS = {
    "query: expected [batch, time, key_heads, key_dim] = [any, any, any, any], got": {
        "query": zeros(3, 97, 24)
    },
    "key: expected query's [batch, time, key_heads, key_dim] = [3, 97, 2, 24], got": {
        "key": zeros(3, 97, 2, 23)
    },
    "value: expected [batch, time, heads, value_dim] = [3, 97, any, any], got": {
        "value": zeros(3, 96, 6, 20)
    },
    "value: the number of its heads must be a multiple of the key's 2, got 3": {
        "value": zeros(3, 97, 3, 20)
    },
}
DECAY_OF_HEADS = {
    "log_decay: expected [heads] = [6] or [batch, time, heads] = [3, 97, 6], got shape "
    "[3, 97, 6, 24]": {"log_decay": zeros(3, 97, 6, 24)},
}
DECAY_OF_CHANNELS = {
    "log_decay: expected [heads] = [6], [batch, time, heads] = [3, 97, 6] or "
    "[batch, time, heads, key_dim] = [3, 97, 6, 24], got shape [3, 97, 1]": {
        "log_decay": zeros(3, 97, 1)
    },
}
STATE = {
    "initial_state: expected [batch, heads, key_dim, value_dim] = [3, 6, 24, 20], got": {
        "initial_state": zeros(3, 6, 20, 24)
    },
}
BETA = {
    "beta: expected [batch, time, heads] = [3, 97, 6], got shape [3, 97]": {"beta": zeros(3, 97)},
}
ERASE = {
    "erase: expected one of 'decayed', 'undecayed', got 'undecay'; did you mean 'undecayed'?": {
        "erase": "undecay"
    },
}
SOFTMAX_ATTENTION = {
    "query: expected [batch, queries, heads, dim] = [any, any, any, any], got": {
        "query": zeros(3, 97, 24)
    },
    "query: the number of its heads must be a multiple of the key's 2, got 3": {
        "query": zeros(3, 97, 3, 24)
    },
    "key: expected [batch, keys, key_heads, dim] = [3, any, any, 24], got": {
        "key": zeros(3, 97, 2, 23)
    },
    "value: expected [batch, keys, key_heads, value_dim] = [3, 97, 2, any], got": {
        "value": zeros(3, 97, 6, 20)
    },
    "sinks: expected [heads] = [6], got shape [2]": {"sinks": zeros(2)},
    "log_forget: expected [batch, keys, heads] = [3, 97, 6], got shape [3, 97, 2]": {
        "log_forget": zeros(3, 97, 2)
    },
    "window: expected an integer of at least 1 or None, got 0": {"window": 0},
    "sink_tokens: expected an integer of at least 0, got -1": {"sink_tokens": -1},
    "query_segments: expected int32 [batch, time], got float32": {"query_segments": zeros(3, 97)},
    "key_segments: expected [batch, time] = [3, 97], got shape [3, 96]": {
        "key_segments": zeros(3, 96, dtype=np.int32)
    },
    "query_segments: needed where key_segments are given, got None": {
        "key_segments": zeros(3, 97, dtype=np.int32)
    },
    "query_positions: needed where key_positions are given, got None": {
        "key_positions": zeros(3, 97, dtype=np.int32)
    },
    "query_positions, key_positions: needed by causal, window and log_forget where the number of "
    "keys is not that of queries (98 keys, 97 queries), got None": {
        "key": zeros(3, 98, 2, 24),
        "value": zeros(3, 98, 2, 20),
    },
    "key_positions: needed by causal": {
        "key": zeros(3, 98, 2, 24),
        "value": zeros(3, 98, 2, 20),
        "query_positions": zeros(3, 97, dtype=np.int32),
    },
    "key_segments: needed where the number of keys is not that of queries (98 keys, 97": {
        "key": zeros(3, 98, 2, 24),
        "value": zeros(3, 98, 2, 20),
        "query_segments": zeros(3, 97, dtype=np.int32),
    },
}

# What an operation must say of these arguments, beside what it inherits.
BAD = {
    "linear_attention": PAIRS | DECAY_OF_CHANNELS | STATE | {
        "value_log_decay: expected [batch, time, heads, value_dim] = [3, 97, 6, 20], got": {
            "value_log_decay": zeros(3, 97, 6)
        },
        "bonus: expected [heads, key_dim] = [6, 24], got shape [24]": {"bonus": zeros(24)},
    },
    "delta_rule": PAIRS | BETA | DECAY_OF_CHANNELS | ERASE | STATE | {
        "erase_key: expected key's shape = [3, 97, 2, 24], got shape [3, 97, 6, 24]": {
            "erase_key": zeros(3, 97, 6, 24)
        },
    },
    "momentum_delta_rule": PAIRS | BETA | DECAY_OF_HEADS | ERASE | {
        "step: expected [batch, time, heads] = [3, 97, 6], got shape [97]": {"step": zeros(97)},
        "log_momentum: expected [heads] = [6] or [batch, time, heads] = [3, 97, 6], got shape "
        "[97]": {"log_momentum": zeros(97)},
        "initial_state: expected [batch, heads, 2 * key_dim, value_dim] = [3, 6, 48, 20], got": {
            "initial_state": zeros(3, 6, 24, 20)
        },
    },
    "diagonal_plus_low_rank": PAIRS | DECAY_OF_CHANNELS | STATE | {
        "a: expected key's shape = [3, 97, 2, 24] or [batch, time, heads, key_dim] = "
        "[3, 97, 6, 24], got shape [3, 97, 3, 24]": {"a": zeros(3, 97, 3, 24)},
        "b: expected key's shape = [3, 97, 2, 24] or [batch, time, heads, key_dim] = "
        "[3, 97, 6, 24], got shape [3, 97, 6, 20]": {"b": zeros(3, 97, 6, 20)},
        "implementation: 'mosaic_tpu' of diagonal_plus_low_rank cannot run: value_dim is 2048": {
            "value": zeros(3, 97, 6, 2048),
            "implementation": "mosaic_tpu",
        },
    },
    "log_linear_attention": PAIRS | BETA | DECAY_OF_HEADS | {
        "level_scale: expected [batch, time, heads, levels] = [3, 97, 6, any], got": {
            "level_scale": zeros(3, 97, 6)
        },
        "level_scale: expected at least 2 levels, got 1": {"level_scale": zeros(3, 97, 6, 1)},
        "initial_state: expected a LogLinearState (memories, position), got ndarray": {
            "initial_state": zeros(3, 6, 24, 20)
        },
        "initial_state.memories: expected [batch, heads, levels - 1, key_dim, value_dim] = "
        "[3, 6, 4, 24, 20], got": {
            "initial_state": (zeros(3, 6, 5, 24, 20), zeros(3, dtype=np.int32))
        },
        "initial_state.position: expected int32 [batch] = [3], got float32 (3,)": {
            "initial_state": (zeros(3, 6, 4, 24, 20), zeros(3))
        },
    },
    "ridge_readout": PAIRS | BETA | DECAY_OF_HEADS | {
        "ridge: expected [heads, key_dim] = [6, 24], got shape [6]": {"ridge": zeros(6)},
        "iterations: expected an integer of at least 1, got 0": {"iterations": 0},
        "initial_state: expected a RidgeState (gram, memory), got ndarray": {
            "initial_state": zeros(3, 6, 24, 20)
        },
        "initial_state.gram: expected [batch, heads, key_dim, key_dim] = [3, 6, 24, 24], got": {
            "initial_state": (zeros(3, 6, 24, 20), zeros(3, 6, 24, 20))
        },
        "initial_state.memory: expected [batch, heads, key_dim, value_dim] = [3, 6, 24, 20], got": {
            "initial_state": (zeros(3, 6, 24, 24), zeros(3, 6, 24, 24))
        },
    },
    "neural_memory": {
        "key: expected query's [batch, time, heads, key_dim] = [3, 97, 2, 24], got": {
            "key": zeros(3, 97, 2, 23)
        },
        "value: expected [batch, time, heads, value_dim] = [3, 97, 2, any], got": {
            "value": zeros(3, 97, 6, 24)
        },
        "step: expected [batch, time, heads] = [3, 97, 2] or [batch, time, heads, window], got": {
            "step": zeros(3, 97)
        },
        "momentum: expected [batch, time, heads] = [3, 97, 2], got": {"momentum": zeros(3, 97)},
        "initial: expected a tuple of layers": {"initial": ()},
        "initial[0]['weight']: expected [heads, in, out] = [2, 24, 24], got": {
            "initial": ({"weight": zeros(2, 23, 24)},)
        },
        'initial[0]: expected {"weight": ...} and perhaps "bias"': {
            "initial": ({"weigth": zeros(2, 24, 24)},)
        },
        "memory: with a residual, value_dim must be key_dim 24, got 20": {
            "initial": ({"weight": zeros(2, 24, 20)},),
            "value": zeros(3, 97, 2, 20),
        },
        "threshold: the loss 'l2' expects None, got": {"threshold": zeros(3, 97, 2)},
        "threshold: the loss 'huber' expects [batch, time, heads], got None": {
            "loss": Loss("huber")
        },
        "update_chunk: expected an integer of at least 1, got 0": {"update_chunk": 0},
        "anchor: expected one of 'token', 'decayed', 'chunk', 'call', got 'chunks'; did you mean "
        "'chunk'?": {"anchor": "chunks"},
        "read: expected one of 'after', 'before', 'chunk', got 'later'": {"read": "later"},
        "outer_grad: expected one of": {"outer_grad": "stop"},
        'outer_grad: expected ("truncate", n), got': {"outer_grad": ("truncated", 2)},
        "outer_grad[1]: expected an integer of at least 1, got 0": {"outer_grad": ("truncate", 0)},
        "position_scale: expected [heads, update_chunk] = [2, 64] or [update_chunk], got": {
            "position_scale": zeros(3)
        },
        "affine: expected one of 'scale', 'offset', got 'bias'": {"affine": {"bias": zeros(2, 24)}},
        "affine['scale']: expected [heads, value_dim] = [2, 24], got": {
            "affine": {"scale": zeros(24)}
        },
        "max_segments: expected an integer of at least 1 or None, got 0": {"max_segments": 0},
        "initial_state: expected the structure": {"initial_state": ()},
    },
    "mlstm": {
        "query: expected [batch, time, key_heads, key_dim] = [any, any, any, any], got": {
            "query": zeros(3, 97, 24)
        },
        "key: expected query's [batch, time, key_heads, key_dim] = [3, 97, 6, 24], got": {
            "key": zeros(3, 97, 6, 23)
        },
        "value: expected [batch, time, heads, value_dim] = [3, 97, any, any], got": {
            "value": zeros(3, 97, 20)
        },
        "log_input: expected [batch, time, heads] = [3, 97, 6], got": {"log_input": zeros(3, 97)},
        "log_forget: expected [batch, time, heads] = [3, 97, 6], got": {"log_forget": zeros(6)},
        "initial_state: expected [batch, heads, key_dim, value_dim] = [3, 6, 24, 21], got": {
            "initial_state": (zeros(3, 6, 24, 20), zeros(3, 6))
        },
    },
    "linear_scan": {
        "x: expected [batch, time, channels] = [any, any, any], got": {"x": zeros(3, 97)},
        "log_decay: expected a floating-point array, got dtype complex64": {
            "log_decay": zeros(24, dtype=np.complex64)
        },
        "log_decay: expected [channels] = [24] or [batch, time, channels] = [3, 97, 24], got": {
            "log_decay": zeros(97, 24)
        },
        "sign: expected [channels] = [24] or": {"sign": zeros(3, 97, 1)},
        "phase: expected [channels] = [24] or": {"phase": zeros(3)},
        "initial_state: expected [batch, channels] = [3, 24], got": {"initial_state": zeros(3, 23)},
        "initial_state: expected a real array, as x is real and there is no phase, got dtype "
        "complex64": {"initial_state": zeros(3, 24, dtype=np.complex64), "phase": None},
    },
    "selective_scan": {
        "x: expected [batch, time, channels] = [any, any, any], got": {"x": zeros(3, 97)},
        "dt: expected x's [batch, time, channels] = [3, 97, 24], got": {"dt": zeros(3, 97, 1)},
        "A: expected [channels, state_dim] = [24, any], got": {"A": zeros(5, 24)},
        "B: expected [batch, time, state_dim] = [3, 97, 5] or [batch, time, groups, state_dim], "
        "got shape [3, 97, 4]": {"B": zeros(3, 97, 4)},
        "B: the number of its groups must divide the 24 channels of x, got 5": {
            "B": zeros(3, 97, 5, 5)
        },
        "C: expected B's shape = [3, 97, 2, 5], got": {"C": zeros(3, 97, 5)},
        "D: expected [channels] = [24], got": {"D": zeros(1, 24)},
        "initial_state: expected [batch, channels, state_dim] = [3, 24, 5], got": {
            "initial_state": zeros(3, 5, 24)
        },
        "implementation: 'mosaic_tpu' of selective_scan cannot run: state_dim is 65, the kernels "
        "take up to 64": {
            "A": zeros(24, 65),
            "B": zeros(3, 97, 65),
            "C": zeros(3, 97, 65),
            "implementation": "mosaic_tpu",
        },
    },
    "causal_conv": {
        "x: expected [batch, time, channels] = [any, any, any], got": {"x": zeros(3, 97)},
        "kernel: expected [width, channels] = [any, 24], got": {"kernel": zeros(3, 23)},
        "kernel: expected at least one tap, got width 0": {"kernel": zeros(0, 24)},
        "bias: expected [channels] = [24], got": {"bias": zeros(1)},
        "activation: expected one of None, 'silu', 'gelu', 'relu', got 'silo'; did you mean "
        "'silu'?": {"activation": "silo"},
        "initial_state: expected [batch, width - 1, channels] = [3, 2, 24], got": {
            "initial_state": zeros(3, 3, 24)
        },
    },
    "attention": SOFTMAX_ATTENTION,
    "path_attention": SOFTMAX_ATTENTION | {
        "direction: expected [batch, queries, key_heads, dim] = [3, 97, 2, 24], got": {
            "direction": zeros(3, 97, 6, 24)
        },
        "beta: expected [batch, queries, key_heads] = [3, 97, 2], got": {"beta": zeros(3, 97, 6)},
        "key: expected at least the 97 keys of the queries, got 96": {
            "key": zeros(3, 96, 2, 24),
            "value": zeros(3, 96, 2, 20),
            "query_positions": zeros(3, 97, dtype=np.int32),
            "key_positions": zeros(3, 96, dtype=np.int32),
        },
    },
    "hopfield_retrieve": {
        "query: expected [batch, queries, heads, dim] = [any, any, any, any], got": {
            "query": zeros(3, 97, 24)
        },
        "query: the number of its heads must be a multiple of the key's 2, got 3": {
            "query": zeros(3, 97, 3, 24)
        },
        "stored: expected batch 3 or 1, got 2": {"stored": zeros(2, 61, 2, 24)},
        "stored: expected [batch or 1, patterns, stored_heads, dim] = [any, any, any, 24], got": {
            "stored": zeros(3, 61, 2, 23)
        },
        "stored: expected at least one pattern, got none": {
            "stored": zeros(3, 0, 2, 24),
            "values": None,
        },
        "values: expected [batch as stored, patterns, stored_heads, value_dim] = [3, 61, 2, any]": {
            "values": zeros(3, 60, 2, 24)
        },
        "steps: expected an integer of at least 1, got 0": {"steps": 0},
        "separation: expected one of 'softmax', 'softmax_n', 'entmax', 'sparsemax', 'budget', got "
        "'soft'": {"separation": "soft"},
        "gradient: expected one of": {"gradient": "unroll"},
        "state_norm: expected one of": {"state_norm": "l1"},
        "budget: expected an integer of at least 1, got None": {"separation": "budget"},
        "causal: expected as many stored patterns as queries, got 61 patterns and 97": {
            "causal": True
        },
        "tolerance: expected a number >= 0 or None, got -1": {"tolerance": -1},
        "beta: expected a number > 0 or [heads], got 0": {"beta": 0},
        "beta: expected a number > 0 or [heads] = [2], got (3,)": {"beta": zeros(3)},
        "alpha: expected a number in [1, 2] or [heads], got 3": {
            "separation": "entmax",
            "alpha": 3,
        },
        "sink: only separation 'softmax_n' has one, not 'softmax'": {"sink": 0.0},
        "mask: expected bool, True takes part, got float32": {"mask": zeros(3, 61)},
        "mask: expected [batch, patterns] = [3, 61] or [batch, queries, patterns] = [3, 97, 61], "
        "got [3, 97]": {"mask": zeros(3, 97, dtype=bool)},
    },
}  # fmt: skip

# Arrays that the examples go without.
MORE = {
    "linear_attention": {
        "value_log_decay": zeros(3, 97, 6, 20),
        "bonus": zeros(6, 24),
        "initial_state": zeros(3, 6, 24, 20),
    },
    "delta_rule": {"erase_key": zeros(3, 97, 2, 24), "initial_state": zeros(3, 6, 24, 20)},
    "momentum_delta_rule": {"initial_state": zeros(3, 6, 48, 20)},
    "diagonal_plus_low_rank": {"initial_state": zeros(3, 6, 24, 20)},
    "linear_scan": {"sign": zeros(3, 97, 24), "initial_state": zeros(3, 24)},
    "selective_scan": {"initial_state": zeros(3, 24, 5)},
    "causal_conv": {"bias": zeros(24), "initial_state": zeros(3, 2, 24)},
    "attention": {"sinks": zeros(6), "log_forget": zeros(3, 97, 6)},
    "path_attention": {"sinks": zeros(6), "log_forget": zeros(3, 97, 6)},
}
# Any number is a scale, any truth value a switch; the descriptions of a memory check themselves.
UNCHECKED = {"scale", "causal", "return_energy", "loss", "retention"}


def example(name, shape, dtype):
    """The operation's example: its arrays as shapes and dtypes, and its options."""
    options = {}

    def arrays():
        arguments = OPERATIONS[name].shapes.example(shape, jax.random.key(0), dtype)
        for argument, x in arguments.items():
            if not any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(x)):
                options[argument] = x
        return {k: x for k, x in arguments.items() if k not in options}

    return jax.eval_shape(arrays), options


def good(name):
    arrays, options = example(name, OPERATIONS[name].shapes.SHAPES["odd"], jnp.float32)
    return jax.tree.map(lambda x: zeros(*x.shape), arrays) | options


def arrays_of(name):
    arguments = good(name) | MORE.get(name, {})
    return {k: x for k, x in arguments.items() if isinstance(x, np.ndarray)}


def parameters(name):
    return inspect.signature(OPERATIONS[name].function).parameters


def inherited(name):
    """What an operation says of the arguments that many have: {message: arguments}."""
    choices = ", ".join(map(repr, IMPLEMENTATIONS))
    bad = {
        f"implementation: expected one of {choices}, got 'chunk'; did you mean 'chunked'?": {
            "implementation": "chunk"
        }
    }
    forms = OPERATIONS[name].forms
    for form in IMPLEMENTATIONS[1:]:
        if form not in forms.available and name != "mlstm":  # whose forms are linear attention's
            has = ", ".join(forms.available)
            message = f"implementation: {name} has no form '{form}' yet; it has {has}"
            bad[message] = {"implementation": form}
    if "segment_ids" in parameters(name):
        for ids, words in (
            (zeros(3, 97), "int32 [batch, time], got float32"),
            ([0], "int32 [batch, time], got list"),
            (zeros(97, dtype=np.int32), "[batch, time] = [3, 97], got shape [97]"),
            (zeros(3, 96, dtype=np.int32), "[batch, time] = [3, 97], got shape [3, 96]"),
        ):
            bad[f"segment_ids: expected {words}"] = {"segment_ids": ids}
    if "chunk_size" in parameters(name):
        for size in (0, -1, 2.5, True):
            message = f"chunk_size: expected an integer of at least 1 or None, got {size}"
            bad[message] = {"chunk_size": size}
    for argument, x in arrays_of(name).items():
        integers = x.astype(np.int32)
        bad[f"{argument}: expected a floating-point array, got dtype int32"] = {argument: integers}
        bad[f"{argument}: expected an array, got list"] = {argument: [1.0]}
        parameter = parameters(name)[argument]
        optional = type(None) in typing.get_args(parameter.annotation)
        if parameter.default is parameter.empty and not optional:
            bad[f"{argument}: expected an array, got NoneType"] = {argument: None}
    return bad


def rows(name):
    found = []
    for message, changes in (inherited(name) | BAD[name]).items():
        label = f"{name}-{message.partition(': expected')[0]}"
        found.append(pytest.param(name, message, changes, id=label))
    return found


def call(name, arguments):
    return jax.eval_shape(lambda: OPERATIONS[name].function(**arguments))


@pytest.mark.parametrize(
    ("name", "message", "changes"), [row for name in OPERATIONS for row in rows(name)]
)
def test_bad_input(name, message, changes):
    with pytest.raises(ValueError) as error:
        call(name, good(name) | changes)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_argument_is_checked(name):
    messages = " ".join(m.partition(": ")[0] for m in inherited(name) | BAD[name])
    assert set(parameters(name)) <= set(re.findall(r"\w+", messages)) | UNCHECKED


@pytest.mark.parametrize("name", OPERATIONS)
def test_another_size_fits_or_is_named(name):
    """Each array with one more in an axis, and without its first axis: no error from within."""
    arguments = good(name) | MORE.get(name, {}) | {"implementation": "chunked"}
    for argument, x in arrays_of(name).items():
        longer = [
            zeros(*(n + (i == axis) for i, n in enumerate(x.shape))) for axis in range(x.ndim)
        ]
        for changed in (*longer, x[0]):
            try:
                call(name, arguments | {argument: changed})
            except ValueError as error:
                named = str(error).partition(":")[0].split(", ")
                assert {re.match(r"\w*", x)[0] for x in named} <= set(parameters(name)), str(error)
            else:
                assert changed.ndim == x.ndim, f"{argument} without its first axis"


def narrow(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)


def wide(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def integers(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def out_of(s):
    return narrow(s.batch, s.time, s.heads, s.value_dim)


def matrix_memory(s):
    return out_of(s), wide(s.batch, s.heads, s.key_dim, s.value_dim)


def network(s):
    sizes = s.sizes()
    weights = tuple(
        {"weight": wide(s.batch, s.heads, n, m)} for n, m in zip(sizes[:-1], sizes[1:], strict=True)
    )
    none = wide(s.batch, 0, s.heads, s.dim)
    momentum = weights if s.momentum else ()
    state = MemoryState(
        weights, weights, momentum, none, none, integers(s.batch), integers(s.batch)
    )
    return narrow(s.batch, s.time, s.heads, s.dim), state


def scanned(s):
    turned = jnp.complex64 if s.turns else None
    return (
        jax.ShapeDtypeStruct((s.batch, s.time, s.channels), turned or jnp.bfloat16),
        jax.ShapeDtypeStruct((s.batch, s.channels), turned or jnp.float32),
    )


# What a call with arrays of 16 bits returns at a shape.
RETURNS = {
    "linear_attention": matrix_memory,
    "delta_rule": matrix_memory,
    "momentum_delta_rule": lambda s: matrix_memory(s._replace(key_dim=2 * s.key_dim)),
    "diagonal_plus_low_rank": matrix_memory,
    "log_linear_attention": lambda s: (
        out_of(s),
        LogLinearState(
            wide(s.batch, s.heads, s.levels - 1, s.key_dim, s.value_dim), integers(s.batch)
        ),
    ),
    "ridge_readout": lambda s: (
        out_of(s),
        RidgeState(
            wide(s.batch, s.heads, s.key_dim, s.key_dim),
            wide(s.batch, s.heads, s.key_dim, s.value_dim),
        ),
    ),
    "neural_memory": network,
    "mlstm": lambda s: (
        out_of(s),
        (wide(s.batch, s.heads, s.key_dim, s.value_dim + 1), wide(s.batch, s.heads)),
    ),
    "linear_scan": scanned,
    "selective_scan": lambda s: (
        narrow(s.batch, s.time, s.channels),
        wide(s.batch, s.channels, s.state_dim),
    ),
    "causal_conv": lambda s: (
        narrow(s.batch, s.time, s.channels),
        narrow(s.batch, s.width - 1, s.channels),
    ),
    "attention": lambda s: narrow(s.batch, s.time, s.heads, s.dim),
    "path_attention": lambda s: (
        narrow(s.batch, s.time, s.heads, s.dim),
        wide(s.batch, s.time, s.key_heads, s.dim),
    ),
    "hopfield_retrieve": lambda s: narrow(s.batch, s.queries, s.heads, s.dim),
}


@pytest.mark.parametrize(
    ("name", "shape"),
    [(name, shape) for name in OPERATIONS for shape in OPERATIONS[name].shapes.SHAPES],
)
def test_named_shapes(name, shape):
    shape = OPERATIONS[name].shapes.SHAPES[shape]
    arrays, options = example(name, shape, jnp.bfloat16)
    found = jax.eval_shape(lambda x: OPERATIONS[name].function(**x, **options), arrays)
    expected = RETURNS[name](shape)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for x, want in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (x.shape, x.dtype) == (want.shape, want.dtype)
