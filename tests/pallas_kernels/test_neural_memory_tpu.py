"""The TPU kernels of `neural_memory`, run by the interpreter, against the reference form."""

from unittest import mock

import jax
import numpy as np
import pytest

from memseq.pallas_kernels import neural_memory
from memseq.pallas_kernels.neural_memory import Loss, Memory, MemoryState, Retention, mosaic_tpu
from memseq.pallas_kernels.neural_memory.losses import WITH_THRESHOLD
from memseq.partitioning import make_mesh
from tests.pallas_kernels.harness import (
    assert_close,
    check_kernel,
    check_kernel_16_bit,
    interpreted,
)
from tests.pallas_kernels.test_neural_memory import (
    BATCH,
    CHUNK,
    DIM,
    HEADS,
    IDS,
    LINEAR,
    TIME,
    layers,
)

DEFAULTS = {"log_keep": None, "memory": Memory(), "loss": Loss(), "update_chunk": CHUNK}


@pytest.fixture(autouse=True)
def small():
    """Two chunks a grid step, so that short calls have several."""
    with mock.patch.object(mosaic_tpu, "GRID_STEP", 2 * HEADS * mosaic_tpu.ROWS):
        yield


def floating(*, depth, position=None, **x):
    """`neural_memory` from and to floating arrays alone, which are named one by one.

    position: of each row in its chunk, where the arrays have a state ("held_...").
    """

    def take(kind):
        found = [
            {name: x.pop(f"{kind}{name}_{i}", None) for name in ("weight", "bias")}
            for i in range(depth)
        ]
        found = [{k: w for k, w in layer.items() if w is not None} for layer in found]
        return tuple(layer for layer in found if layer)

    initial = take("")
    if position is not None:
        weights, anchor, momentum = (take(kind) for kind in ("held_", "anchor_", "momentum_"))
        rows, heads, dim = weights[0]["weight"].shape[:3]
        none = np.zeros((rows, 0, heads, dim), weights[0]["weight"].dtype)
        count = np.zeros((rows,), np.int32)
        x["initial_state"] = MemoryState(
            weights, anchor, momentum, none, none, count, np.asarray(position, np.int32)
        )
    affine = {name: x.pop(f"affine_{name}", None) for name in ("scale", "offset")}
    x["affine"] = {name: w for name, w in affine.items() if w is not None}
    out, state = neural_memory(initial=initial, **DEFAULTS | x)
    return out, state.weights, state.anchor, state.momentum


def build(
    depth=2,
    bias=False,
    momentum=True,
    keep=True,
    affine=False,
    scale=False,
    time=TIME,
    step=0.3,
    **options,
):
    rng = np.random.default_rng(0)
    lead = (BATCH, time, HEADS)
    x = {name: rng.normal(size=(*lead, DIM)) for name in ("query", "key", "value")}
    x["step"] = step * rng.uniform(size=lead)
    if keep:
        x["log_keep"] = -rng.exponential(0.2, size=lead)
    if momentum:
        x["momentum"] = rng.choice([0.0, 0.5, 1.0], size=lead)
    if affine:
        x |= {f"affine_{n}": rng.normal(size=(HEADS, DIM)) for n in ("scale", "offset")}
    if scale:
        x["position_scale"] = rng.uniform(0.5, 1, size=(HEADS, CHUNK))
    weights = layers(rng, depth, bias)
    kinds = [""]
    if "position" in options:
        kinds += ["held_", "anchor_"] + ["momentum_"] * momentum
    for kind in kinds:
        for i, layer in enumerate(weights):
            for name, w in layer.items():
                lead = (BATCH,) if kind else ()
                x[f"{kind}{name}_{i}"] = w + 0.3 * rng.normal(size=(*lead, *w.shape))
    if options.get("loss", Loss()).kind in WITH_THRESHOLD:
        x["threshold"] = rng.uniform(0.5, 2, size=(BATCH, time, HEADS))
    return x, {"depth": depth} | options, rng


CASES = {
    "a matrix, packed, truncated": build(
        1, position=[3, -1], segment_ids=IDS, outer_grad=("truncate", 1)
    ),
    "two layers, huber": build(bias=True, momentum=False, affine=True, loss=Loss("huber")),
}


@pytest.mark.parametrize("name", CASES)
def test_tpu_kernels(name):
    check_kernel(floating, *CASES[name])


SLOW = {
    "two layers, everything": dict(
        bias=True, affine=True, scale=True, position=[3, -1], segment_ids=IDS
    ),
    "no keep, not a whole chunk": dict(keep=False, momentum=False),
    "whole chunks, padded grid step": dict(time=3 * CHUNK, retention=Retention("clamp", 1.0)),
    # one that contracts: others amplify what is rounded, in every form
    "long": dict(depth=1, time=75, step=0.05, momentum=False, memory=LINEAR),
    "chunks of twenty": dict(depth=1, time=47, update_chunk=20),
    "silu, rms, no residual": dict(memory=Memory("silu", False, "rms")),
    "tanh, no norm": dict(memory=Memory("tanh", True, "none")),
    "relu": dict(memory=Memory("relu")),
    **{
        f"loss {kind}": dict(depth=1, loss=Loss(kind))
        for kind in ("dot", "lp", "huber_each", "robust")
    },
    **{
        f"retention {kind}": dict(
            depth=1, bias=True, retention=Retention(kind, amount), position=[2, -1], segment_ids=IDS
        )
        for kind, amount in (("elastic", 0.05), ("sphere", None), ("row_norm", None), ("lq", 4.0))
    },
    **{f"anchor {kind}": dict(depth=1, anchor=kind) for kind in ("token", "decayed", "call")},
    **{
        f"read {kind}": dict(depth=1, scale=True, read=kind, position=[3, 1])
        for kind in ("before", "chunk")
    },
    **{f"outer {kind}": dict(depth=1, outer_grad=kind) for kind in ("stop_anchor", "stop_writes")},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_tpu_kernels_with_every_option(name):
    check_kernel(floating, *build(**SLOW[name]))


@pytest.mark.slow
def test_tpu_kernels_with_16_bit_inputs():
    check_kernel_16_bit(floating, *build(time=24, update_chunk=8), 8)


@pytest.mark.slow
def test_tpu_kernels_under_a_mesh():
    """Rows and heads over devices: what they share (initial weights) has one gradient."""
    x, options, rng = build(1, affine=True, segment_ids=IDS)
    x = jax.tree.map(lambda a: a.astype(np.float32), x)

    def gradients(form):
        def loss(x):
            outputs = floating(**x, **options, implementation=form)
            return sum((y**2).sum() for y in jax.tree.leaves(outputs))

        return jax.jit(jax.value_and_grad(loss))

    expected = gradients("chunked")(x)
    with jax.set_mesh(make_mesh("data=2,fsdp=2,tensor=2")), interpreted():
        found = gradients("mosaic_tpu")(x)
    assert_close(found, expected, 2e-5)


LIMITS = {
    "the memory has 3 layers, the kernels take up to 2": dict(depth=3),
    "retention 'softmax' needs weights for every step": dict(retention=Retention("softmax", 1.0)),
    "update_chunk is 300, the kernels take up to 128": dict(update_chunk=300),
}


@pytest.mark.parametrize("message", LIMITS)
def test_what_the_kernels_do_not_take(message):
    x, options, _ = build(**LIMITS[message])
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda x: floating(**x, **options, implementation="mosaic_tpu"), x)


def test_sizes_that_the_kernels_do_not_take():
    x, options, _ = build()
    window = x | {"step": np.ones((BATCH, TIME, HEADS, 3))}
    by_size = [
        x | {"weight_0": np.zeros((HEADS, DIM, n)), "weight_1": np.zeros((HEADS, n, DIM))}
        for n in (2**13, 2**14)
    ]
    cases = [(window, "step has a window of 3"), (by_size[0], "anchor take 12.8 MiB, the kernels")]
    cases.append((by_size[1], "a layer is 16384 wide and update_chunk 4, the kernels"))
    for changed, message in cases:
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(lambda x: floating(**x, **options, implementation="mosaic_tpu"), changed)
