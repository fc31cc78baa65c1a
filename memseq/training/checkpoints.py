"""Checkpoints that are whole, finite and verified: orbax's `CheckpointManager` and three things.

1. One atomic step holds everything a run needs to go on: parameters, optimiser, counters, PRNG, the
   data iterator's state, the host's counters and the resolved config.
2. A digest of every array is taken on the devices before saving and compared after loading: the
   storage layer returns flipped bits without a word. The JSON part has a checksum of its own.
3. Loading starts at the newest step and goes back to the newest one that passes, saying which it
   left out and why. Where there are steps and none passes, it is an error, never a fresh start.

A state that is not finite is refused. Saving is asynchronous: an error of one save comes up at the
next call, and the checkpoints before it stay as they are.
"""

import contextlib
import dataclasses
import json
import pathlib
import re
import zlib
from collections.abc import Callable
from typing import Any

import jax
import orbax.checkpoint as ocp

from memseq import partitioning
from memseq.config import ConfigDict, from_json, to_json
from memseq.training.digest import digest
from memseq.training.state import TrainState

ITEMS = ("params", "rest", "meta")


class CheckpointMismatch(ValueError):
    """A sound checkpoint of another model or another optimiser."""


@dataclasses.dataclass(frozen=True)
class Restored:
    """What a checkpoint gave back.

    Attributes:
      step: the step it was taken at.
      state: the train state; from `restore_params`, the parameters alone.
      config: the config that the run had.
      data: the data iterator's state.
      counters: the host's counters.
      skipped: newer steps that did not pass, {step: reason}.
    """

    step: int
    state: Any
    config: ConfigDict
    data: Any
    counters: dict[str, Any]
    skipped: dict[int, str]


class Checkpoints:
    """The checkpoints of one run, in one folder.

    As a context manager it waits, where an error ends the run, for a write that is under way.

    Args:
      directory: made if it is missing, unless `read_only`.
      keep: how many of the newest checkpoints stay.
      read_only: change nothing on disk.

    Raises:
      OSError: the folder cannot be made.
    """

    def __init__(self, directory: str | pathlib.Path, *, keep: int = 2, read_only: bool = False):
        if keep < 1:
            raise ValueError(f"checkpoint.keep: got {keep}, expected >= 1")
        self.directory = pathlib.Path(directory).absolute()
        self._read_only = read_only
        if not read_only:
            self.directory.mkdir(parents=True, exist_ok=True)
        self._manager = ocp.CheckpointManager(
            self.directory,
            item_names=ITEMS,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=ocp.checkpoint_managers.LatestN(n=keep),
                create=False,
                read_only=read_only,
                cleanup_tmp_directories=not read_only,
                save_interval_steps=0 if read_only else 1,
            ),
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind, error, trace) -> None:
        if error:  # a sound checkpoint that is being written is still worth having
            with contextlib.suppress(OSError):
                self.wait()

    def steps(self) -> list[int]:
        """The steps there are on disk, sound or not, in rising order."""
        if not self.directory.is_dir():
            return []
        self._manager.reload()
        return sorted(self._manager.all_steps())

    def save(
        self, state: TrainState, *, data: Any, counters: dict[str, Any], config: ConfigDict
    ) -> None:
        """Starts writing a checkpoint; returns when the arrays have been copied off the devices.

        Args:
          state: the train state after `state.step` steps.
          data: state of the data iterator after the same number of batches, as JSON can hold it.
          counters: the host's counters, as JSON can hold them.
          config: the resolved config.

        Raises:
          FloatingPointError: the state is not finite; nothing is written.
          OSError: this checkpoint or the one before it could not be written.
        """
        step = int(state.step)
        items = _items(state)
        digests, bad = {}, []
        for item, arrays in items.items():
            digests[item], not_finite = digest(arrays)
            bad += not_finite
        if bad:
            raise FloatingPointError(
                f"the state after step {step} is not finite in {bad[0]} "
                f"({len(bad)} arrays in all); no checkpoint was written"
            )
        meta = {
            "step": step,
            "leaves": {item: _describe(arrays) for item, arrays in items.items()},
            "digests": digests,
            "data": data,
            "counters": counters,
            "config": json.loads(to_json(config)),
        }
        trees = {
            item: ocp.args.StandardSave({_key(name): x for name, x in arrays.items()})
            for item, arrays in items.items()
        }
        description = ocp.args.JsonSave({"body": meta, "crc32": _checksum(meta)})
        args = ocp.args.Composite(meta=description, **trees)
        try:
            self._manager.save(step, args=args, force=True)
        except Exception as error:  # orbax passes on whatever its storage layer raised
            raise self._cannot_write(error) from error

    def wait(self) -> None:
        """Waits until the latest checkpoint is on disk. Raises OSError if it cannot be written."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:  # as in save
            raise self._cannot_write(error) from error

    def close(self) -> None:
        """Waits and lets go of the folder. Raises OSError as `wait` does."""
        self.wait()
        self._manager.close()

    def restore(
        self,
        like: TrainState,
        step: int | None = None,
        check: Callable[[ConfigDict], None] | None = None,
    ) -> Restored | None:
        """The newest sound checkpoint, or None where there is no checkpoint at all.

        Broken newer steps are renamed to `broken-<step>`, so that the run can write them again.

        Args:
          like: a train state of arrays or of ShapeDtypeStructs with shardings.
          step: take this step and no other.
          check: called with the checkpoint's config before its arrays are looked at; raises
            CheckpointMismatch if this is not the run to go on with.

        Raises:
          CheckpointMismatch: from `check`, or a leaf's name, shape or dtype is not that of `like`.
          ValueError: there are checkpoints and none is sound, or the asked step is not.
        """
        expected = _items(like)

        def load(step, meta):
            if check is not None:
                check(_config(meta))
            arrays = {}
            for item in ("params", "rest"):
                self._require_same(step, meta["leaves"][item], expected[item])
                arrays |= self._load(step, item, expected[item], meta["digests"][item])
            names = [partitioning.leaf_name(path) for path, _ in jax.tree.leaves_with_path(like)]
            return jax.tree.unflatten(jax.tree.structure(like), [arrays[name] for name in names])

        return self._newest_sound(load, step)

    def restore_params(
        self, like: Callable[[ConfigDict], Any], step: int | None = None
    ) -> Restored | None:
        """The parameters alone, as `restore`; `like` makes their structs from the config."""

        def load(step, meta):
            params = like(_config(meta))
            expected = _items(params, prefix="params/")["params"]
            self._require_same(step, meta["leaves"]["params"], expected)
            arrays = self._load(step, "params", expected, meta["digests"]["params"])
            return jax.tree.unflatten(
                jax.tree.structure(params), [arrays[name] for name in expected]
            )

        return self._newest_sound(load, step)

    def _newest_sound(self, load, wanted: int | None) -> Restored | None:
        steps = self.steps()
        if wanted is not None and wanted not in steps:
            known = ", ".join(map(str, steps)) or "none"
            raise ValueError(f"{self.directory} has no checkpoint of step {wanted}; it has {known}")
        candidates = [wanted] if wanted is not None else steps[::-1]
        broken: dict[int, str] = {}
        for step in candidates:
            try:
                meta = self._meta(step)
                state = load(step, meta)
            except (CheckpointMismatch, MemoryError):
                raise
            except (
                Exception
            ) as error:  # a damaged file can raise anything; each is told to the user
                broken[step] = _reason(error)
                continue
            self._set_aside(broken)
            return Restored(step, state, _config(meta), meta["data"], meta["counters"], broken)
        if broken:
            reasons = "; ".join(f"step {step}: {reason}" for step, reason in broken.items())
            raise ValueError(f"no checkpoint in {self.directory} can be used ({reasons})")
        return None

    def _meta(self, step: int) -> dict[str, Any]:
        args = ocp.args.Composite(meta=ocp.args.JsonRestore())
        saved = self._manager.restore(step, args=args)["meta"]
        if _checksum(saved["body"]) != saved["crc32"] or saved["body"]["step"] != step:
            raise ValueError("the checkpoint's description is damaged (checksum)")
        return saved["body"]

    def _load(self, step: int, item: str, expected: dict, digests: dict) -> dict[str, jax.Array]:
        """One item's arrays by leaf name, verified."""
        like = {
            _key(name): jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
            for name, x in expected.items()
        }
        args = ocp.args.Composite(**{item: ocp.args.StandardRestore(like)})
        saved = self._manager.restore(step, args=args)[item]
        arrays = {name: saved[_key(name)] for name in expected}
        if _describe(arrays) != _describe(expected):
            raise ValueError(f"the arrays of {item} came back with other shapes or dtypes")
        found, _ = digest(arrays)
        damaged = [name for name in arrays if found[name] != digests[name]]
        if damaged:
            raise ValueError(f"the data of {damaged[0]} is damaged (digest; {len(damaged)} in all)")
        return arrays

    def _require_same(self, step: int, saved: dict, expected: dict) -> None:
        wanted = _describe(expected)
        for name in sorted(saved.keys() | wanted.keys()):
            if saved.get(name) != wanted.get(name):
                raise CheckpointMismatch(
                    f"the checkpoint of step {step} in {self.directory} does not fit the config: "
                    f"{name} is {_text(saved.get(name))} in the checkpoint, "
                    f"{_text(wanted.get(name))} in the config"
                )

    def _set_aside(self, broken: dict[int, str]) -> None:
        if self._read_only or not broken:
            return
        for step in broken:
            target, count = self.directory / f"broken-{step}", 1
            while target.exists():
                count += 1
                target = self.directory / f"broken-{step}-{count}"
            (self.directory / str(step)).rename(target)
        self._manager.reload()

    def _cannot_write(self, error: Exception) -> OSError:
        return OSError(
            f"a checkpoint could not be written to {self.directory}: {_reason(error)}; "
            "the checkpoints before it are as they were"
        )


def _items(tree: Any, prefix: str = "") -> dict[str, dict[str, Any]]:
    """The leaves by name, parameters apart from the rest so that they can be loaded alone."""
    items = {"params": {}, "rest": {}}
    for path, leaf in jax.tree.leaves_with_path(tree):
        name = prefix + partitioning.leaf_name(path)
        items["params" if name.startswith("params/") else "rest"][name] = leaf
    return items


def _key(name: str) -> str:
    return name.replace("/", "|")  # slashes and dots have a meaning of their own to the storage


def _describe(arrays: dict[str, Any]) -> dict[str, Any]:
    return {name: [list(x.shape), str(x.dtype)] for name, x in arrays.items()}


def _text(leaf: list | None) -> str:
    return "absent" if leaf is None else f"{leaf[1]}{leaf[0]}"


def _config(meta: dict[str, Any]) -> ConfigDict:
    return from_json(json.dumps(meta["config"]))


def _checksum(body: Any) -> int:
    return zlib.crc32(json.dumps(body, sort_keys=True).encode())


def _reason(error: BaseException) -> str:
    """What an error has to say in a sentence: the word of the system, or its first line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    system = re.search(r": ([^:]+) \[os_error_code=", str(error))
    if system:
        return system[1]
    line = (str(error).strip().splitlines() or [""])[0]
    line = line.partition(" See full TensorStore details")[0]
    return f"{type(error).__name__}: {line[:200]}".removesuffix(": ")
