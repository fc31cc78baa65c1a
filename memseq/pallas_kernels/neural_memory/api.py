"""`neural_memory`: arguments, checks and dispatch."""

from typing import Any

import jax
import jax.numpy as jnp

from memseq.pallas_kernels.common import checks
from memseq.pallas_kernels.common.dispatch import Forms, run
from memseq.pallas_kernels.common.precision import products_precision
from memseq.pallas_kernels.common.segments import hide_padding, segments
from memseq.pallas_kernels.neural_memory.alignment import chunks_needed
from memseq.pallas_kernels.neural_memory.chunked import chunked
from memseq.pallas_kernels.neural_memory.losses import WITH_THRESHOLD, Loss
from memseq.pallas_kernels.neural_memory.memory import Layer, Memory
from memseq.pallas_kernels.neural_memory.mosaic_tpu import MOSAIC_TPU
from memseq.pallas_kernels.neural_memory.reference import reference
from memseq.pallas_kernels.neural_memory.retention import Retention
from memseq.pallas_kernels.neural_memory.state import Inputs, MemoryState, empty_state

FORMS = Forms("neural_memory", reference, chunked, MOSAIC_TPU)
ANCHORS = ("token", "decayed", "chunk", "call")
READS = ("after", "before", "chunk")
OUTER_GRADS = ("full", "stop_anchor", "stop_writes")


def neural_memory(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    initial: tuple[Layer, ...],
    log_keep: jax.Array | None,
    step: jax.Array,
    momentum: jax.Array | None = None,
    *,
    memory: Memory,
    loss: Loss,
    update_chunk: int,
    retention: Retention | None = None,
    threshold: jax.Array | None = None,
    position_scale: jax.Array | None = None,
    affine: dict[str, jax.Array] | None = None,
    anchor: str = "chunk",
    read: str = "after",
    outer_grad: str | tuple[str, int] = "full",
    max_segments: int | None = None,
    initial_state: MemoryState | None = None,
    segment_ids: jax.Array | None = None,
    implementation: str = "auto",
) -> tuple[jax.Array, MemoryState]:
    """A network that is trained, while it is read, to answer each key with its value.

        u_t = gradient at W_anchor of loss(M(k_t; W), v_t)
        S_t = momentum_t S_{t-1} - step_t u_t,  W_t = keep_t W_{t-1} + S_t,  out_t = M(q_t; W_t)

    Without momentum W_t = keep_t W_{t-1} - step_t u_t. Titans (Behrouz et al. 2025,
    arXiv:2501.00663, equations 9 to 14) with momentum; TTT (Sun et al. 2024, arXiv:2407.04620,
    equation 4) without keep and momentum; Miras (Behrouz et al. 2025, arXiv:2504.13173, section 5)
    by other losses and retention maps; the Omega rule (Behrouz et al. 2025, arXiv:2505.23735,
    equation 9) by a window of steps. A linear memory with the loss "dot" is linear attention; with
    "l2" and the anchor "token" it is DeltaNet, with "decayed" Gated DeltaNet.

    `update_chunk` is part of the model: time is cut, from each segment's start, into chunks of that
    length, and the gradients of a chunk are all taken at the memory as it is when the chunk starts.

        chunk      |  0  1  2  3 |  4  5  6  7 |  8
        writes     |  at W_0     |  at W_4     |  at W_8    (the anchor; each adds to W at once)
        read 5     |  "before" W_5, "after" W_6, "chunk" W_4, with W_t the memory before step t

    Args:
        query: [batch, time, heads, key_dim], floating.
        key: as query. Keys are taken as they come; normalise them outside.
        value: [batch, time, heads, value_dim].
        initial: what a segment starts from, a layer after another: {"weight": [heads, in, out]},
            and "bias" [heads, out] in a layer that has one. From key_dim to value_dim.
        log_keep: natural logarithm of what the weights keep at a step, <= 0, [batch, time, heads].
            None keeps all.
        step: sizes of the gradient steps, [batch, time, heads]; or [batch, time, heads, window],
            along the gradients of this token and of those before it in its segment, the latest
            first, all taken at the present anchor.
        momentum: what S keeps at a step, in [0, 1], [batch, time, heads]; None is no momentum.
        memory: the network beside its weights.
        loss: of one token.
        update_chunk: steps of an update chunk.
        retention: a map that keeps the weights bounded, beside log_keep; None is none.
        threshold: of the losses that have one, [batch, time, heads], positive.
        position_scale: [heads, update_chunk] or [update_chunk]; after i + 1 steps of a chunk the
            memory is read, and after its last step it goes on, as W_anchor + position_scale[i]
            (W - W_anchor). The factor 1 / (i + 1) of TTT. None is 1.
        affine: "scale" and "offset" [heads, value_dim] of the network's normalisation.
        anchor: where gradients are taken: "chunk"; "token", at W_{t-1}, which is chunks of one;
            "decayed", at keep_t W_{t-1}, chunks of one too; "call", at the memory with which this
            call starts, so that other splits into calls give other results.
        read: the memory that a query sees: "after" or "before" its own step's write, or "chunk",
            the anchor.
        outer_grad: what differentiating this operation goes through. "full"; "stop_anchor":
            gradient steps do not depend on the weights that they are taken at; "stop_writes": they
            depend on their size `step` alone; ("truncate", n): n chunks, the state between them is
            a constant.
        max_segments: the most segments of a row, which bounds the work of packed rows: each can
            cost a chunk more. A row with more gives NaN. None is any number, and slow.
        initial_state: what a call returned; None starts from `initial`.
        segment_ids: int32 [batch, time]. The memory restarts from `initial` wherever the id
            changes; the initial state continues the first segment. Negative ids are padding: no
            write, no decay, output 0.
        implementation: "auto", or one of `FORMS.available`.

    Returns:
        out [batch, time, heads, value_dim] in value's dtype, and the `MemoryState` after the last
        step, float32 (float64 if an input is).

    Raises:
        ValueError: for shapes, dtypes or options that do not fit, at trace time.
    """
    checks.check_array("query", query, (None,) * 4, "[batch, time, heads, key_dim]")
    batch, time, heads, key_dim = query.shape
    checks.check_array("key", key, query.shape, "query's [batch, time, heads, key_dim]")
    layout = "[batch, time, heads, value_dim]"
    checks.check_array("value", value, (batch, time, heads, None), layout)
    dim = value.shape[3]
    _check_layers(initial, heads, key_dim, dim)
    if memory.residual and key_dim != dim:
        raise ValueError(f"memory: with a residual, value_dim must be key_dim {key_dim}, got {dim}")
    by_step = (batch, time, heads)
    for name, x in (("log_keep", log_keep), ("momentum", momentum), ("threshold", threshold)):
        if x is not None:
            checks.check_array(name, x, by_step, "[batch, time, heads]")
    if (threshold is None) == (loss.kind in WITH_THRESHOLD):
        wanted = "[batch, time, heads]" if threshold is None else "None"
        raise ValueError(f"threshold: the loss {loss.kind!r} expects {wanted}, got {threshold!r}")
    checks.check_floating("step", step)
    if step.shape != by_step and (step.shape[:3] != by_step or step.ndim != 4 or not step.size):
        raise ValueError(
            f"step: expected [batch, time, heads] = {list(by_step)} or [batch, time, heads, "
            f"window], got shape {list(step.shape)}"
        )
    step = step[..., None] if step.ndim == 3 else step
    window = step.shape[-1]
    if window > 1 and threshold is not None:
        raise ValueError(f"step: a window of {window} does not go with the loss {loss.kind!r}")
    checks.check_count("update_chunk", update_chunk, 1)
    checks.check_count("max_segments", max_segments, 1, optional=True)
    checks.check_choice("anchor", anchor, ANCHORS)
    checks.check_choice("read", read, READS)
    if anchor in ("token", "decayed"):
        update_chunk = 1
    if isinstance(outer_grad, tuple | list):
        outer_grad = tuple(outer_grad)
        if len(outer_grad) != 2 or outer_grad[0] != "truncate":
            raise ValueError(f'outer_grad: expected ("truncate", n), got {outer_grad!r}')
        checks.check_count("outer_grad[1]", outer_grad[1], 1)
    else:
        checks.check_choice("outer_grad", outer_grad, OUTER_GRADS)
    if position_scale is not None:
        checks.check_floating("position_scale", position_scale)
        if position_scale.shape not in ((update_chunk,), (heads, update_chunk)):
            raise ValueError(
                f"position_scale: expected [heads, update_chunk] = {[heads, update_chunk]} or "
                f"[update_chunk], got shape {list(position_scale.shape)}"
            )
        position_scale = jnp.broadcast_to(position_scale, (heads, update_chunk))
    affine = {} if affine is None else affine
    for name, x in affine.items():
        checks.check_choice("affine", name, ("scale", "offset"))
        checks.check_array(f"affine[{name!r}]", x, (heads, dim), "[heads, value_dim]")
    checks.check_segment_ids(segment_ids, batch, time)

    floats = (query, key, value, log_keep, step, momentum, threshold, position_scale)
    leaves = jax.tree.leaves((initial, affine, initial_state))
    dtype = checks.state_dtype(*floats, *leaves)
    initial = jax.tree.map(lambda w: w.astype(dtype), tuple(initial))
    empty = empty_state(initial, batch, momentum is not None, window, key_dim, dim)
    state = empty if initial_state is None else _check_state(initial_state, empty)
    out_dtype, precision = value.dtype, products_precision(query, key, value)
    floats = [None if x is None else x.astype(dtype) for x in floats]
    query, key, value, log_keep, step, momentum, threshold, position_scale = floats
    log_keep = jnp.zeros(by_step, dtype) if log_keep is None else log_keep
    segs = None
    if segment_ids is not None:
        segs = segments(segment_ids)
        query, key, value, log_keep, step, momentum, threshold = (
            hide_padding(x, segs.valid)
            for x in (query, key, value, log_keep, step, momentum, threshold)
        )
    most = 1 if segment_ids is None else time if max_segments is None else max_segments
    inputs = Inputs(
        query=query,
        key=key,
        value=value,
        keep=jnp.exp(log_keep),
        step=step,
        momentum=momentum,
        threshold=threshold,
        position_scale=position_scale,
        affine={name: x.astype(dtype) for name, x in affine.items()},
        initial=initial,
        state=state,
        valid=None if segs is None else segs.valid,
        index=None if segs is None else segs.index,
    )
    arrays, tree = jax.tree.flatten(inputs)
    out, state = run(
        FORMS,
        implementation,
        time,
        tuple(arrays),
        tree=tree,
        memory=memory,
        loss=loss,
        retention=Retention() if retention is None else retention,
        update_chunk=update_chunk,
        anchor=anchor,
        read=read,
        outer_grad=outer_grad,
        precision=precision,
        carried=initial_state is not None,
        max_chunks=chunks_needed(time, update_chunk, initial_state is not None, most),
    )
    if segment_ids is not None and max_segments is not None:
        out, state = _nan_where(segs.index[:, -1] >= max_segments, (out, state))
    return out.astype(out_dtype), state


def _check_layers(initial: Any, heads: int, key_dim: int, dim: int) -> None:
    if not isinstance(initial, tuple | list) or not initial:
        raise ValueError(f"initial: expected a tuple of layers, got {type(initial).__name__}")
    size = key_dim
    for i, layer in enumerate(initial):
        name = f"initial[{i}]"
        if not isinstance(layer, dict) or not {"weight"} <= set(layer) <= {"weight", "bias"}:
            raise ValueError(f'{name}: expected {{"weight": ...}} and perhaps "bias"')
        wanted = (heads, size, dim if i == len(initial) - 1 else None)
        checks.check_array(f"{name}['weight']", layer["weight"], wanted, "[heads, in, out]")
        size = layer["weight"].shape[2]
        if "bias" in layer:
            checks.check_array(f"{name}['bias']", layer["bias"], (heads, size), "[heads, out]")


def _check_state(state: MemoryState, empty: MemoryState) -> MemoryState:
    if jax.tree.structure(state) != jax.tree.structure(empty):
        raise ValueError(
            f"initial_state: expected the structure {jax.tree.structure(empty)}, "
            f"got {jax.tree.structure(state)}"
        )
    for (path, x), want in zip(
        jax.tree.leaves_with_path(state), jax.tree.leaves(empty), strict=True
    ):
        if x.shape != want.shape:
            raise ValueError(
                f"initial_state{jax.tree_util.keystr(path)}: expected shape {list(want.shape)}, "
                f"got {list(x.shape)}"
            )
    return jax.tree.map(lambda x, want: jnp.asarray(x).astype(want.dtype), state, empty)


def _nan_where(rows: jax.Array, tree: Any) -> Any:
    """Floating leaves [batch, ...] are NaN in these rows [batch]."""
    return jax.tree.map(
        lambda x: (
            jnp.where(rows.reshape(-1, *[1] * (x.ndim - 1)), jnp.nan, x)
            if jnp.issubdtype(x.dtype, jnp.floating)
            else x
        ),
        tree,
    )
