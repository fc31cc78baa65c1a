"""The laws that every operation with a state obeys, in every form: see `memseq.pallas_kernels`.

One compiled function a form, with its gradients, answers most questions: only values differ.
"""

from unittest import mock

import jax
import numpy as np
import pytest

from memseq.pallas_kernels import (
    causal_conv,
    delta_rule,
    diagonal_plus_low_rank,
    linear_attention,
    linear_scan,
    log_linear_attention,
    momentum_delta_rule,
    neural_memory,
    ridge_readout,
    selective_scan,
)
from memseq.pallas_kernels.bench import OPERATIONS as BENCH
from memseq.pallas_kernels.common import chunks
from memseq.pallas_kernels.log_linear_attention import LogLinearState
from memseq.pallas_kernels.neural_memory import Loss, Memory, MemoryState
from tests.pallas_kernels.harness import (
    assert_close,
    assert_same,
    check_transforms,
    correlated_keys,
    cotangents_like,
    hard_decay,
    interpreted,
    with_gradients,
)

BATCH, TIME, HEADS, DIM = 4, 40, 2, 4
# "by stretch" is chunked as a CPU takes long calls
FORMS = ("reference", "chunked", "by stretch", "mosaic_tpu")
IDS = np.array([-1] * 2 + [0] * 9 + [1] * 3 + [-1] * 2 + [1] * 12 + [0] * 10 + [-1] * 2, np.int32)


def linear_attention_inputs(rng):
    lead = (BATCH, TIME, HEADS)
    return {
        "query": rng.normal(size=(*lead, DIM)),
        "key": correlated_keys(rng, *lead, DIM, 0.5),
        "value": rng.normal(size=(*lead, 3)),
        "log_decay": hard_decay(rng, (*lead, DIM)),
        "bonus": rng.normal(size=(HEADS, DIM)),
        "initial_state": rng.normal(size=(BATCH, HEADS, DIM, 3)),
    }


def delta_rule_inputs(rng):
    inputs = linear_attention_inputs(rng)
    del inputs["bonus"]
    lead = (BATCH, TIME, HEADS)
    return inputs | {"log_decay": hard_decay(rng, lead), "beta": rng.uniform(0, 2, size=lead)}


def momentum_delta_rule_inputs(rng):
    inputs = delta_rule_inputs(rng)
    lead = (BATCH, TIME, HEADS)
    return inputs | {
        "beta": rng.uniform(size=lead),
        "step": rng.uniform(size=lead),
        "log_momentum": hard_decay(rng, lead),
        "initial_state": rng.normal(size=(BATCH, HEADS, 2 * DIM, 3)),
    }


def diagonal_plus_low_rank_inputs(rng):
    inputs = linear_attention_inputs(rng)
    del inputs["bonus"]
    unit = correlated_keys(rng, BATCH, TIME, HEADS, DIM, 0.5)
    strength = rng.uniform(size=(BATCH, TIME, HEADS, 1))
    return inputs | {"a": -unit, "b": strength * unit}


def ridge_readout_inputs(rng):
    inputs = linear_attention_inputs(rng)
    del inputs["bonus"]
    lead = (BATCH, TIME, HEADS)
    roots = rng.normal(size=(BATCH, HEADS, DIM, DIM))
    return inputs | {
        "log_decay": hard_decay(rng, lead),
        "beta": rng.uniform(size=lead),
        "ridge": rng.uniform(0.25, 1.0, size=(HEADS, DIM)),
        "initial_state": (roots @ roots.swapaxes(-1, -2), inputs["initial_state"]),
    }


def log_linear_attention_inputs(rng):
    inputs = delta_rule_inputs(rng)
    lead = (BATCH, TIME, HEADS)
    return inputs | {
        "level_scale": rng.normal(size=(*lead, 4)),
        "initial_state": (
            rng.normal(size=(BATCH, HEADS, 3, DIM, 3)),
            np.array([3.0, 0.0, 6.0, 5.0]),
        ),
    }


def with_float_position(*, initial_state=None, **inputs):
    """`log_linear_attention` whose state is all floating, so that all of it has a gradient."""
    if initial_state is not None:
        memories, position = initial_state
        initial_state = LogLinearState(memories, position.astype("int32"))
    out, state = log_linear_attention(initial_state=initial_state, **inputs)
    return out, (state.memories, state.position.astype(state.memories.dtype))


def neural_memory_inputs(rng):
    lead, weights = (BATCH, TIME, HEADS), (BATCH, HEADS, DIM, 3)
    return {
        "query": rng.normal(size=(*lead, DIM)),
        "key": correlated_keys(rng, *lead, DIM, 0.5),
        "value": rng.normal(size=(*lead, 3)),
        "weight": rng.normal(size=weights[1:]),
        "log_keep": hard_decay(rng, lead),
        "step": 0.3 * rng.uniform(size=lead),
        "momentum": rng.choice([0.0, 0.5, 1.0], size=lead),
        # weights, anchor, momentum, position in the chunk: 0 for weights that restart
        "initial_state": (*rng.normal(size=(3, *weights)), np.array([3.0, 1.0, 4.0, 0.0])),
    }


def matrix_with_float_position(*, weight, initial_state=None, **inputs):
    """`neural_memory` of a matrix, whose state is all floating, one above its position."""
    options = {"memory": Memory(residual=False, normalisation="none"), "loss": Loss()}
    if initial_state is not None:
        *parts, position = initial_state
        (batch, _, dim, value_dim), heads = parts[0].shape, weight.shape[0]
        initial_state = MemoryState(
            *(({"weight": part},) for part in parts),
            np.zeros((batch, 0, heads, dim), parts[0].dtype),
            np.zeros((batch, 0, heads, value_dim), parts[0].dtype),
            np.zeros((batch,), np.int32),
            position.astype("int32") - 1,
        )
    out, state = neural_memory(
        initial=({"weight": weight},), initial_state=initial_state, **options, **inputs
    )
    parts = [part[0]["weight"] for part in (state.weights, state.anchor, state.momentum)]
    return out, (*parts, (state.position + 1).astype(parts[0].dtype))


def linear_scan_inputs(rng):
    lead = (BATCH, TIME, 3)
    return {
        "x": rng.normal(size=lead),
        "log_decay": hard_decay(rng, lead),
        "sign": rng.choice([-1.0, 1.0], size=lead),
        "initial_state": rng.normal(size=(BATCH, 3)),
    }


def selective_scan_inputs(rng):
    lead = (BATCH, TIME)
    return {
        "x": rng.normal(size=(*lead, 4)),
        "dt": rng.exponential(0.3, size=(*lead, 4)),
        "A": -rng.exponential(3.0, size=(4, 2)),
        "B": rng.normal(size=(*lead, 2)),
        "C": rng.normal(size=(*lead, 2)),
        "D": rng.normal(size=4),
        "initial_state": rng.normal(size=(BATCH, 4, 2)),
    }


def causal_conv_inputs(rng):
    return {
        "x": rng.normal(size=(BATCH, TIME, 3)),
        "kernel": rng.normal(size=(4, 3)),
        "bias": rng.normal(size=3),
        "initial_state": rng.normal(size=(BATCH, 3, 3)),
    }


OPERATIONS = {
    "linear_attention": (linear_attention, linear_attention_inputs, {"chunk_size": 8}),
    "delta_rule": (delta_rule, delta_rule_inputs, {"chunk_size": 8}),
    "momentum_delta_rule": (momentum_delta_rule, momentum_delta_rule_inputs, {"chunk_size": 8}),
    "diagonal_plus_low_rank": (
        diagonal_plus_low_rank,
        diagonal_plus_low_rank_inputs,
        {"chunk_size": 8},
    ),
    "log_linear_attention": (
        with_float_position,
        log_linear_attention_inputs,
        {"chunk_size": 8},
    ),
    "ridge_readout": (ridge_readout, ridge_readout_inputs, {"chunk_size": 8, "iterations": 9}),
    "neural_memory": (
        matrix_with_float_position,
        neural_memory_inputs,
        {"update_chunk": 4, "max_segments": 5},
    ),
    "linear_scan": (linear_scan, linear_scan_inputs, {"chunk_size": 8}),
    "selective_scan": (selective_scan, selective_scan_inputs, {"chunk_size": 8}),
    "causal_conv": (causal_conv, causal_conv_inputs, {"activation": "silu"}),
}
# these go by stretch on a CPU
MATRIX = (
    "linear_attention",
    "delta_rule",
    "momentum_delta_rule",
    "diagonal_plus_low_rank",
    "log_linear_attention",
    "ridge_readout",
)
SHARED = (
    "bonus",
    "kernel",
    "bias",
    "A",
    "D",
    "ridge",
    "weight",
)  # the arguments without a batch axis


class Operation:
    """One operation in one form, its inputs in float32, and it compiled with its gradients."""

    def __init__(self, name, form):
        self.function, build, self.options = OPERATIONS[name]
        self.form = form
        self.rng = np.random.default_rng(0)
        self.inputs = jax.tree.map(lambda x: x.astype(np.float32), build(self.rng))
        self.by_time = [k for k in self.inputs if k not in (*SHARED, "initial_state")]
        self.cotangents = cotangents_like(self.rng, jax.eval_shape(self.call, self.inputs))
        self.compiled = jax.jit(
            lambda inputs, cotangents, ids: with_gradients(
                lambda inputs: self.call(inputs, segment_ids=ids)
            )(inputs, cotangents)
        )

    def run(self, *arguments):
        with interpreted(self.form):
            return self.compiled(*arguments)

    def call(self, inputs, **options):
        form, whole = (self.form, 2**30) if self.form != "by stretch" else ("chunked", 0)
        with mock.patch.object(chunks, "WHOLE", whole):
            return self.function(**inputs, **self.options | options, implementation=form)

    def changed(self, where):
        """The inputs with other values at [row, time], decays and strengths included."""
        inputs = jax.tree.map(np.copy, self.inputs)
        for name in self.by_time:
            inputs[name][where] = np.roll(inputs[name][where], 1, axis=-2) * 0.5
        return inputs

    def cotangents_where(self, keep, state):
        """The cotangents of the outputs at `keep` [batch, time] and, if so, of the state."""
        out, last = self.cotangents
        keep = keep.reshape(*keep.shape, *[1] * (out.ndim - 2))
        return np.where(keep, out, 0), last if state else jax.tree.map(np.zeros_like, last)


def forms(name):
    available = (*BENCH[name].forms.available, *(["by stretch"] if name in MATRIX else []))
    return [form for form in FORMS if form in available]


def case(name, form):
    # the interpreter takes a scan's kernels step by step: a minute each; a network's are large
    slow = form == "mosaic_tpu" and (name.endswith("scan") or name == "neural_memory")
    return pytest.param((name, form), marks=pytest.mark.slow if slow else (), id=f"{name}-{form}")


@pytest.fixture(scope="module", params=[case(n, f) for n in OPERATIONS for f in forms(n)])
def operation(request):
    return Operation(*request.param)


def row(tree, number=0):
    """One row of a batch, in all leaves of a tree."""
    return jax.tree.map(lambda x: np.asarray(x)[number : number + 1], tree)


def any_difference(a, b):
    pairs = zip(*map(jax.tree.leaves, (a, b)), strict=True)
    return any((np.asarray(x) != np.asarray(y)).any() for x, y in pairs)


ONE_SEGMENT = np.zeros((BATCH, TIME), np.int32)
PACKED = np.stack([IDS, IDS[::-1], np.roll(IDS, 5), ONE_SEGMENT[0]])


def test_the_future_changes_nothing(operation):
    for now in (13, 16):
        past = np.broadcast_to(np.arange(TIME) < now, (BATCH, TIME))
        cotangents = operation.cotangents_where(past, state=False)
        for ids in (ONE_SEGMENT, PACKED):
            (out, state), gradients = operation.run(operation.inputs, cotangents, ids)
            later = operation.changed(np.s_[:, now:])
            (other, other_state), others = operation.run(later, cotangents, ids)
            assert (np.asarray(out)[:, now:] != np.asarray(other)[:, now:]).any()
            assert any_difference(state, other_state)
            assert_same(other[:, :now], out[:, :now])
            for name, gradient in gradients.items():
                if name in operation.by_time:
                    assert_same(others[name][:, :now], gradient[:, :now], name)
                    assert_same(gradient[:, now:], np.zeros_like(gradient[:, now:]), name)
                else:
                    assert_same(others[name], gradient, name)


def test_rows_of_a_batch_are_alone(operation):
    outputs, gradients = operation.run(operation.inputs, operation.cotangents, PACKED)
    others = operation.run(operation.changed(np.s_[1:]), operation.cotangents, PACKED)
    assert_same(row(others[0]), row(outputs))
    for name in gradients:
        if name not in SHARED:
            assert_same(row(others[1][name]), row(gradients[name]), name)


def test_segments_are_alone(operation):
    """The gradient of one segment's loss in another segment's inputs is zero, not small."""
    for index, (start, end) in enumerate([(2, 11), (11, 28), (28, 38)]):
        inside = np.zeros((BATCH, TIME), bool)
        inside[0, start:end] = IDS[start:end] >= 0
        cotangents = operation.cotangents_where(inside, state=False)
        _, gradients = operation.run(operation.inputs, cotangents, PACKED)
        for name in operation.by_time:
            gradient = np.asarray(gradients[name])
            assert (gradient[inside] != 0).any(), name
            assert_same(gradient[~inside], np.zeros_like(gradient[~inside]), name)
        # the initial state continues the first segment only
        gradient = row(gradients["initial_state"])
        assert any_difference(gradient, jax.tree.map(np.zeros_like, gradient)) == (index == 0)


def test_padding_is_invisible(operation):
    (out, _), gradients = operation.run(operation.inputs, operation.cotangents, PACKED)
    for x in (out, *(gradients[name] for name in operation.by_time)):
        assert_same(np.asarray(x)[PACKED < 0], np.zeros_like(np.asarray(x)[PACKED < 0]))
    inputs = jax.tree.map(np.copy, operation.inputs)
    for name in operation.by_time:
        inputs[name][PACKED < 0] = np.nan
    assert_same(
        operation.run(inputs, operation.cotangents, PACKED),
        operation.run(operation.inputs, operation.cotangents, PACKED),
    )


def test_packed_equals_separate(operation):
    """The three segments of one row, then each as a row of its own, from the same compilation."""
    packed_ids = np.stack([IDS] + [np.full(TIME, -1, np.int32)] * (BATCH - 1))
    outputs, gradients = operation.run(operation.inputs, operation.cotangents, packed_ids)
    parts = [np.flatnonzero(IDS[a:b] >= 0) + a for a, b in [(0, 11), (11, 28), (28, 40)]]
    rows = jax.tree.map(np.copy, operation.inputs)
    out_cotangent, state_cotangent = jax.tree.map(np.copy, operation.cotangents)
    ids = np.full((BATCH, TIME), -1, np.int32)
    for number, part in enumerate(parts):
        ids[number, : len(part)] = 7
        for name in operation.by_time:
            rows[name][number, : len(part)] = operation.inputs[name][0, part]
        out_cotangent[number, : len(part)] = operation.cotangents[0][0, part]
    last = len(parts) - 1
    for x in jax.tree.leaves(rows["initial_state"]):
        x[1:] = 0
    for x, whole in zip(
        *map(jax.tree.leaves, (state_cotangent, operation.cotangents[1])), strict=True
    ):
        x[:] = 0
        x[last] = whole[0]
    separate = operation.run(rows, (out_cotangent, state_cotangent), ids)
    for number, part in enumerate(parts):
        label = f"part {number}"
        assert_close(outputs[0][0, part], separate[0][0][number, : len(part)], 2e-5, label)
        for name in operation.by_time:
            found = separate[1][name][number, : len(part)]
            assert_close(gradients[name][0, part], found, 1e-4, f"{label}, {name}")
    assert_close(row(outputs[1]), row(separate[0][1], last), 2e-5, "state")
    assert_close(row(gradients["initial_state"]), row(separate[1]["initial_state"]), 1e-4)


# programs that take ten seconds to compile, or come close to the delta rule's
LATE = ("neural_memory", "momentum_delta_rule")


def late_slow(names):
    return [pytest.param(n, marks=pytest.mark.slow if n in LATE else []) for n in names]


QUICK = late_slow(OPERATIONS)


@pytest.mark.parametrize("name", QUICK)
def test_any_split_equals_one_call(name):
    """Split inside a chunk and inside a segment, values and gradients."""

    def halves(operation, inputs):
        outs, state = [], inputs["initial_state"]
        for part in (slice(0, 21), slice(21, TIME)):
            piece = {k: x[:, part] if k in operation.by_time else x for k, x in inputs.items()}
            out, state = operation.call(
                piece | {"initial_state": state}, segment_ids=PACKED[:, part]
            )
            outs.append(out)
        return jax.numpy.concatenate(outs, axis=1), state

    operation = Operation(name, "chunked")
    split = jax.jit(with_gradients(lambda x: halves(operation, x)))
    found = split(operation.inputs, operation.cotangents)
    whole = operation.run(operation.inputs, operation.cotangents, PACKED)
    assert_close(found[0], whole[0], 2e-5)
    assert_close(found[1], whole[1], 1e-4)


@pytest.mark.parametrize("name", MATRIX)
def test_long_calls_go_by_stretch_on_a_cpu_only(name):
    operation = Operation(name, "by stretch")
    traced = jax.jit(operation.call).trace(operation.inputs)
    loops = {
        platform: traced.lower(lowering_platforms=(platform,)).as_text().count("stablehlo.while")
        for platform in ("cpu", "cuda", "tpu")
    }
    assert loops["cpu"] > loops["cuda"] == loops["tpu"]


@pytest.mark.parametrize("name", late_slow([*MATRIX, "linear_scan", "selective_scan"]))
def test_chunk_size_changes_nothing(name):
    operation = Operation(name, "chunked")

    single = jax.jit(with_gradients(lambda x: operation.call(x, segment_ids=PACKED, chunk_size=1)))
    whole = operation.run(operation.inputs, operation.cotangents, PACKED)
    found = single(operation.inputs, operation.cotangents)
    assert_close(found[0], whole[0], 2e-5)
    assert_close(found[1], whole[1], 1e-4)


@pytest.mark.parametrize("name", QUICK)
def test_transforms(name):
    last = "by stretch" if name in MATRIX else "chunked"
    operations = {form: Operation(name, form) for form in ("reference", last)}
    reference = operations["reference"]

    def call(form, x):
        return operations[form].call(x, segment_ids=None)

    check_transforms(call, tuple(operations), reference.inputs, SHARED, reference.rng)


@pytest.mark.parametrize("name", QUICK)
def test_memory_is_linear_in_time_and_the_program_does_not_grow(name):
    function, build, options = OPERATIONS[name]
    inputs = build(np.random.default_rng(0))

    def program(time):
        def longer(x):
            return jax.ShapeDtypeStruct([time if n == TIME else n for n in x.shape], np.float32)

        def loss(x):
            outputs = function(**x, **options, implementation="chunked")
            return sum(y.sum() for y in jax.tree.leaves(outputs))

        shapes = jax.tree.map(longer, inputs)
        call = jax.value_and_grad(loss)
        return jax.jit(call).lower(shapes)

    short, long = program(512), program(2048)
    assert len(long.as_text().splitlines()) == len(short.as_text().splitlines())
    sizes = [p.compile().memory_analysis().temp_size_in_bytes for p in (short, long)]
    assert 0 < sizes[1] < 4.2 * sizes[0]
