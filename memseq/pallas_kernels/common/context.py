"""Time split over devices: what one stretch of time does to a memory, and how stretches combine.

A linear-state operation maps the state before a stretch to the state after it by an affine map,

    after = moved(before) + added,

whose two parts are two calls of the operation itself: `added` is where the stretch leads from an
empty memory, and `moved` where it leads from ones, or from the identity, when nothing is written.
Each device takes both of its own stretch, the devices exchange them, and each folds those before
its own into the state that it starts from. What crosses the mesh is of the size of states, not of
time. (As fla's context parallelism does for the delta rule; products in float32.)

Operations are marked by `splits_time`. Inside `over`, a call of one of them splits time by itself:
that is how a layer becomes context parallel without knowing of it.
"""

import contextlib
import contextvars
import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

_AXIS: contextvars.ContextVar[str | None] = contextvars.ContextVar("memseq_context", default=None)


def axis() -> str | None:
    """The mesh axis over which time is split where this is called, None if it is not."""
    return _AXIS.get()


@contextlib.contextmanager
def over(name: str | None):
    """Inside: the arrays of operations are a device's stretch of time, in the order of the axis."""
    token = _AXIS.set(name)
    try:
        yield
    finally:
        _AXIS.reset(token)


@dataclasses.dataclass(frozen=True)
class Split:
    """How an operation's time can be split.

    Attributes:
        time: names of its arguments with time as their second axis.
        whole: names of its other arrays, which have no time.
        silent: (arguments, n) -> the arguments with nothing written, for a state of n columns if
            `matrix`. None for an operation made of others, which split time by themselves.
        matrix: a stretch multiplies the state [..., n, columns] from the left by a matrix; else it
            scales each entry.
    """

    time: tuple[str, ...]
    whole: tuple[str, ...]
    silent: Callable[[dict[str, Any], int], dict[str, Any]] | None
    matrix: bool


def splits_time(
    time: tuple[str, ...],
    silent: Callable | None,
    *,
    matrix: bool,
    whole: tuple[str, ...] = (),
) -> Callable:
    """Decorator of an operation `(..., initial_state, segment_ids) -> (out, state)`: see `Split`.

    time, whole: beside segment_ids and initial_state, which every operation has.
    """
    split = Split((*time, "segment_ids"), (*whole, "initial_state"), silent, matrix)

    def decorate(operation):
        signature = inspect.signature(operation)

        @functools.wraps(operation)
        def call(*args, **kwargs):
            name = axis()
            if name is None or silent is None:
                return operation(*args, **kwargs)
            with over(None):
                return _across(operation, split, name, signature.bind(*args, **kwargs).arguments)

        call.split = split
        return call

    return decorate


def nothing_written(arguments: dict, size: int) -> dict:
    """`Split.silent` of a delta rule: values of zero, `size` of them a head."""
    value = arguments["value"]
    return arguments | {"value": jnp.zeros((*value.shape[:3], size), value.dtype)}


def _across(operation, split: Split, name: str, arguments: dict) -> tuple[Any, Any]:
    ids = arguments.get("segment_ids")
    before = arguments.pop("initial_state", None)
    _, added = operation(**arguments)
    if before is None:
        before = jax.tree.map(jnp.zeros_like, added)
    size = jax.tree.leaves(added)[0].shape[-2] if split.matrix else 0

    def start(x):
        if not split.matrix:
            return jnp.ones_like(x)
        return jnp.broadcast_to(jnp.eye(size, dtype=x.dtype), (*x.shape[:-1], size))

    silent = split.silent(arguments, size)
    _, moved = operation(**silent, initial_state=jax.tree.map(start, added))

    def after(stretch, state):
        added, moved = stretch
        return jax.tree.map(
            lambda m, x, a: (product(m, x) if split.matrix else m * x) + a, moved, state, added
        )

    own = carried_in(before, (added, moved), after, ids, name)
    out, last = operation(**arguments, initial_state=own)
    return out, at_the_end(last, name)


def carried_in(
    before: Any,
    stretch: Any,
    after: Callable[[Any, Any], Any],
    ids: jax.Array | None,
    name: str | None = None,
) -> Any:
    """The state that this device's stretch of time starts from.

    Args:
        before: the state before all time, a pytree of arrays [batch, ...].
        stretch: what this device's stretch does to a state, a pytree of arrays.
        after: (a stretch, the state before it) -> the state after it.
        ids: int32 [batch, time] of this stretch: the state is zero where the stretch before ended
            in another segment. None if `after` sees to that.
        name: the mesh axis; None is the present one.
    """
    name = name or axis()
    stretches = jax.lax.all_gather((stretch, _ends(ids)), name)
    rank = jax.lax.axis_index(name)
    state = own = before
    seen = last = None if ids is None else jnp.zeros(ids.shape[0], jnp.int32)
    for i in range(jax.lax.axis_size(name)):
        stretch, ends = jax.tree.map(lambda x, i=i: x[i], stretches)
        if ends is not None:
            first, end, some = ends
            goes_on = ~some | (seen == 0) | (first == last)
            state = jax.tree.map(lambda x, keep=goes_on: _kept(keep, x), state)
            last, seen = jnp.where(some, end, last), seen + some
        own = jax.tree.map(lambda a, b, i=i: jnp.where(rank == i, a, b), state, own)
        state = after(stretch, state)
    return own


def at_the_end(x: Any, name: str | None = None) -> Any:
    """The last device's x, a pytree, on all of them: the state after all time."""
    name = name or axis()
    final = jax.lax.axis_index(name) == jax.lax.axis_size(name) - 1
    return jax.tree.map(lambda x: jax.lax.psum(jnp.where(final, x, 0), name), x)


def begins_anew(ids: jax.Array) -> jax.Array:
    """bool [batch]: this stretch begins with another segment than those before ended with."""
    first, end, some = _ends(ids)

    def after(stretch, last):
        end, some = stretch
        return jnp.where(some, end, last)

    last = carried_in(jnp.full_like(end, -1), (end, some), after, None)
    return some & (last >= 0) & (first != last)


def all_time(x: jax.Array) -> jax.Array:
    """x [batch, stretch, ...] of all devices, [batch, time, ...]; for what is as small as ids."""
    return jax.lax.all_gather(x, axis(), axis=1, tiled=True)


def own_stretch(x: jax.Array, size: int) -> jax.Array:
    """The positions [batch, size, ...] of this device of x [batch, time, ...]."""
    return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(axis()) * size, size, axis=1)


def product(moved: jax.Array, state: jax.Array) -> jax.Array:
    """What a map [..., n, n] makes of a state [..., n, columns], in float32 products."""
    return jnp.einsum("...ij,...jv->...iv", moved, state, precision=jax.lax.Precision.HIGHEST)


def _kept(keep: jax.Array, x: jax.Array) -> jax.Array:
    """x [batch, ...] where `keep` [batch], else 0."""
    return jnp.where(keep.reshape(-1, *[1] * (x.ndim - 1)), x, 0)


def _ends(ids: jax.Array | None):
    """(first valid id, last valid id, whether there is one), [batch] each, of int32 [batch, time].

    None for None.
    """
    if ids is None:
        return None
    valid = ids >= 0
    last = ids.shape[1] - 1 - jnp.argmax(valid[:, ::-1], axis=1)
    first = jnp.take_along_axis(ids, jnp.argmax(valid, axis=1)[:, None], axis=1)[:, 0]
    return first, jnp.take_along_axis(ids, last[:, None], axis=1)[:, 0], valid.any(axis=1)


def end_segment(ids: jax.Array, default: jax.Array, *, last: bool) -> jax.Array:
    """The first or last valid id of each row, int32 [batch]; `default` [batch] where there is none.

    Of all time, where it is split over devices.
    """
    first, end, some = _ends(ids)
    found = end if last else first
    name = axis()
    if name is None:
        return jnp.where(some, found, default)
    rank = jax.lax.axis_index(name)
    # in numbers that grow to the end that is wanted, so that the largest is it and 0 is none
    place = rank + 1 if last else jax.lax.axis_size(name) - rank
    place = jnp.where(some, place, 0)
    at = jax.lax.pmax(place, name)
    found = jax.lax.psum(jnp.where((place == at) & some, found, 0), name)
    return jnp.where(at > 0, found, default)
