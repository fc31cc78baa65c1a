"""Keeping a model's state: on disk, and in several copies."""

import hashlib
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import serialization

from memseq.pallas_kernels.common.checks import check_count

_MAGIC = b"memseq state 1\n"


def fork(state: Any, copies: int) -> Any:
    """The state of a model with every row repeated: one prompt's memory for many continuations.

    Leaves [layers, batch, ...] become [layers, batch * copies, ...]; copies of a row are adjacent.

    Raises:
        ValueError: fewer than one copy.
    """
    check_count("copies", copies, 1)
    return jax.tree.map(lambda x: jnp.repeat(x, copies, axis=1), state)


def save_state(path: str | os.PathLike, state: Any) -> None:
    """Writes a state to a file, whole or not at all.

    Raises:
        OSError: the file cannot be written; one that was there before is as it was.
    """
    path = Path(path)
    content = {"layers": _layers(state), "state": serialization.to_state_dict(state)}
    body = serialization.msgpack_serialize(jax.device_get(content))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(_MAGIC + hashlib.blake2b(body, digest_size=16).digest() + body)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def restore_state(path: str | os.PathLike, like: Any) -> Any:
    """Reads what `save_state` wrote.

    Args:
        like: a state of the same model, batch and context, such as `model.init_state(batch)`.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is damaged, or holds a state of another shape.
    """
    content = Path(path).read_bytes()
    digest, body = content[len(_MAGIC) :][:16], content[len(_MAGIC) + 16 :]
    if not content.startswith(_MAGIC) or hashlib.blake2b(body, digest_size=16).digest() != digest:
        raise ValueError(f"path: {path} is not a whole saved state")
    content = serialization.msgpack_restore(body)
    if content["layers"] != _layers(like):
        raise ValueError(
            f"path: {path} holds the state of another model: {content['layers']}, "
            f"expected {_layers(like)}"
        )
    try:
        state = serialization.from_state_dict(like, content["state"])
    except (KeyError, ValueError) as error:
        raise ValueError(f"path: {path} holds the state of another model: {error}") from error
    for (where, got), want in zip(
        jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(like), strict=True
    ):
        if got.shape != want.shape or got.dtype != want.dtype:
            raise ValueError(
                f"path: {path} holds another state: {jax.tree_util.keystr(where)} is "
                f"{got.dtype} {list(got.shape)}, expected {want.dtype} {list(want.shape)}"
            )
    return jax.tree.map(jnp.asarray, state)


def _layers(state: Any) -> str:
    """The classes of the layers' states: shapes alone do not tell one memory from another."""
    return ", ".join(type(part).__name__ for part in state)
