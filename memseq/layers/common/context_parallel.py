"""One wrapper that splits time over a mesh axis, for layers and for memory operations."""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from memseq.layers.common.base import SequenceLayer
from memseq.pallas_kernels.common import context

LAYER = ("params", "x", "state", "segment_ids")


def context_parallel(what: SequenceLayer | Callable, axis: str = "context") -> Callable:
    """A layer's `apply`, or an operation, with the time axis split over a mesh axis.

        layer = GatedDeltaNet(features=512)
        with jax.set_mesh(make_mesh("context=8")):
            y, state = jax.jit(context_parallel(layer))(params, x, state, segment_ids)
            out, state = jax.jit(context_parallel(delta_rule))(query, key, value, beta)

    Takes and returns what `layer.apply(params, x, state, segment_ids)` or the operation does, for
    any length of time; values and gradients are those of one device. Each device holds 1 / axis of
    everything that has time, and states whole; devices exchange what their stretch does to the
    memory, twice the size of a state (key_dim x key_dim more for delta rules), and the tails of
    short convolutions. Other mesh axes stay as they are: batch and heads may be split too.

    A stretch goes over the memory operation three times: for what it adds to an empty memory, for
    what it does to a memory that it finds, and for its outputs. In a mixture of memories each
    memory goes over all tokens, as pages of one memory cannot be split. What a layer sows (losses,
    intermediates) is of one stretch and does not come out.

    Args:
        what: a layer that looks across time through linear-state operations alone, or such an
            operation of `memseq.pallas_kernels`: `causal_conv`, `delta_rule`,
            `diagonal_plus_low_rank`, `linear_attention`, `linear_scan`, `log_linear_attention`,
            `mlstm`, `momentum_delta_rule`, `ridge_readout` or `selective_scan`.
        axis: name of an axis of the mesh of `jax.set_mesh`.

    Raises:
        ValueError: another operation; when called, another layer, or a mesh without the axis.
    """
    if isinstance(what, SequenceLayer):
        return _layer(what, axis)
    split = getattr(what, "split", None)
    if split is None:
        name = getattr(what, "__name__", repr(what))
        raise ValueError(
            f"context_parallel: expected a layer or a linear-state operation, got {name}"
        )
    return _operation(what, split, axis)


def _layer(layer: SequenceLayer, axis: str) -> Callable:
    def call(params: Any, x: jax.Array, state: Any = None, segment_ids: jax.Array | None = None):
        ids = segment_ids
        if ids is None:  # they carry the padding to a whole number of stretches
            ids = jnp.zeros(x.shape[:2], jnp.int32)
            if state is not None:
                ids += jnp.maximum(state.segment, 0)[:, None]
        arguments = {"x": x, "segment_ids": ids, "params": params, "state": state}

        def local(arguments):
            with context.over(axis):
                return layer.apply(*(arguments[name] for name in LAYER))

        y, after = _split(local, arguments, ("x", "segment_ids"), axis, x.shape[1])
        if segment_ids is None:
            before = jnp.full_like(after.segment, -1) if state is None else state.segment
            after = after.replace(segment=before)
        return y, after

    return call


def _operation(operation: Callable, split: context.Split, axis: str) -> Callable:
    signature = inspect.signature(operation)

    def call(*args, **kwargs):
        given = signature.bind(*args, **kwargs).arguments
        names = {*split.time, *split.whole}
        arrays = {k: v for k, v in given.items() if k in names and v is not None}
        static = {k: v for k, v in given.items() if k not in names}
        arrays = jax.tree.map(jnp.asarray, arrays)
        x = arrays[split.time[0]]
        if "segment_ids" not in arrays:
            arrays["segment_ids"] = jnp.zeros(x.shape[:2], jnp.int32)

        def local(arrays):
            with context.over(axis):
                return operation(**arrays, **static)

        timed = [k for k in split.time if k in arrays and arrays[k].ndim > 1]
        return _split(local, arrays, timed, axis, x.shape[1])

    return call


def _split(function: Callable, arguments: dict, timed, axis: str, time: int):
    """function(arguments) -> (out, state), the `timed` ones and out split along their time."""
    mesh = jax.sharding.get_abstract_mesh()
    if axis not in mesh.axis_names:
        raise ValueError(
            f"axis: expected one of the mesh's {list(mesh.axis_names)} (see jax.set_mesh), "
            f"got {axis!r}"
        )
    missing = -time % mesh.shape[axis]

    def pad(name, x):
        if name not in timed or not missing:
            return x
        value = -1 if name == "segment_ids" else 0
        widths = [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2)
        return jnp.pad(x, widths, constant_values=value)

    arguments = {name: pad(name, x) for name, x in arguments.items()}
    over_time, whole = PartitionSpec(None, axis), PartitionSpec()
    specs = {name: over_time if name in timed else whole for name in arguments}
    out, state = jax.shard_map(
        function, in_specs=(specs,), out_specs=(over_time, whole), axis_names={axis}
    )(arguments)
    return out[:, :time], state
