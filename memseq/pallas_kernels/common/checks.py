"""Checks of an operation's arguments: each raises ValueError at trace time.

Every message names the argument, what came and what was expected.
"""

import difflib
import numbers
from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp


def check_array(name: str, x: jax.Array, shape: tuple[int | None, ...], layout: str) -> None:
    """`x` must be a floating-point array of `shape` (None: any size); `layout` names its axes."""
    check_floating(name, x)
    if x.ndim != len(shape) or any(
        want is not None and got != want for got, want in zip(x.shape, shape, strict=True)
    ):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name}: expected {layout} = [{wanted}], got shape {list(x.shape)}")


def check_floating(name: str, x: jax.Array) -> None:
    """`x` must be an array of a floating-point dtype, of any shape."""
    if not hasattr(x, "dtype") or not hasattr(x, "shape"):
        raise ValueError(f"{name}: expected an array, got {type(x).__name__}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"{name}: expected a floating-point array, got dtype {x.dtype}")


def check_segment_ids(
    segment_ids: jax.Array | None, batch: int, time: int, name: str = "segment_ids"
) -> None:
    """`segment_ids` must be integers [batch, time] that can be negative, or None."""
    if segment_ids is None:
        return
    if not hasattr(segment_ids, "dtype") or not jnp.issubdtype(
        segment_ids.dtype, jnp.signedinteger
    ):
        came = getattr(segment_ids, "dtype", type(segment_ids).__name__)
        raise ValueError(f"{name}: expected int32 [batch, time], got {came}")
    if segment_ids.shape != (batch, time):
        raise ValueError(
            f"{name}: expected [batch, time] = [{batch}, {time}], "
            f"got shape {list(segment_ids.shape)}"
        )


def check_heads(key_heads: int, value_heads: int, name: str = "value") -> None:
    """Grouped heads: each key head serves the same whole number of value heads."""
    if key_heads == 0 or value_heads % key_heads:
        raise ValueError(
            f"{name}: the number of its heads must be a multiple of the key's {key_heads}, "
            f"got {value_heads}"
        )


class PairSizes(NamedTuple):
    """Sizes of a query, and of the keys and values of a matrix memory."""

    batch: int
    time: int
    key_heads: int
    key_dim: int
    heads: int
    value_dim: int


def check_pairs(query: jax.Array, key: jax.Array, value: jax.Array) -> PairSizes:
    """query, key [batch, time, key_heads, key_dim] and value [batch, time, heads, value_dim]."""
    check_array("query", query, (None,) * 4, "[batch, time, key_heads, key_dim]")
    batch, time, key_heads, key_dim = query.shape
    check_array("key", key, query.shape, "query's [batch, time, key_heads, key_dim]")
    check_array("value", value, (batch, time, None, None), "[batch, time, heads, value_dim]")
    heads, value_dim = value.shape[2:]
    check_heads(key_heads, heads)
    return PairSizes(batch, time, key_heads, key_dim, heads, value_dim)


def check_chunk_size(chunk_size: int | None) -> None:
    """`chunk_size` must be an integer of at least 1, or None."""
    check_count("chunk_size", chunk_size, 1, optional=True)


def check_count(name: str, value: int | None, least: int, optional: bool = False) -> None:
    """`value` must be an integer of at least `least`; None passes where it is `optional`."""
    if optional and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least:
        wanted = f"an integer of at least {least}" + (" or None" if optional else "")
        raise ValueError(f"{name}: expected {wanted}, got {value!r}")


def check_choice(name: str, value: object, choices: Iterable[str | None]) -> None:
    """`value` must be one of `choices`; the message offers the nearest."""
    choices = list(choices)
    if value in choices:
        return
    near = difflib.get_close_matches(str(value), [c for c in choices if isinstance(c, str)], n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(
        f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}{hint}"
    )


def state_dtype(*arrays: jax.Array | None) -> jnp.dtype:
    """float64 where an input is float64, else float32: the dtype of states, gates and sums.

    What is no array does not count: the check of that argument names it.
    """
    wide = any(hasattr(x, "dtype") and jnp.result_type(x) == jnp.float64 for x in arrays)
    return jnp.dtype(jnp.float64 if wide else jnp.float32)


def check_state(
    state: jax.Array | None,
    shape: tuple[int, ...],
    dtype: jnp.dtype,
    layout: str = "[batch, heads, key_dim, value_dim]",
    name: str = "initial_state",
) -> jax.Array:
    """The initial state in `dtype`, zeros for None."""
    if state is None:
        return jnp.zeros(shape, dtype)
    check_array(name, state, shape, layout)
    return state.astype(dtype)


def check_log_decay(
    log_decay: jax.Array | None,
    batch: int,
    time: int,
    heads: int,
    key_dim: int | None,
    dtype: jnp.dtype,
    name: str = "log_decay",
) -> jax.Array | None:
    """The decay in `dtype`, [batch, time, heads] or [batch, time, heads, key_dim], or None.

    key_dim None: key channels cannot have decays of their own.
    """
    if log_decay is None:
        return None
    check_floating(name, log_decay)
    wanted = {"[heads]": (heads,), "[batch, time, heads]": (batch, time, heads)}
    if key_dim is not None:
        wanted["[batch, time, heads, key_dim]"] = (batch, time, heads, key_dim)
    if log_decay.shape not in wanted.values():
        *first, last = (f"{layout} = {list(shape)}" for layout, shape in wanted.items())
        raise ValueError(
            f"{name}: expected {', '.join(first)} or {last}, got shape {list(log_decay.shape)}"
        )
    log_decay = log_decay.astype(dtype)
    if log_decay.ndim == 1:
        return jnp.broadcast_to(log_decay, (batch, time, heads))
    return log_decay
