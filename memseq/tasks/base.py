"""What every task is: examples as a pure function of a PRNG key, and scores of predictions."""

import dataclasses
import difflib
import functools
import math
import numbers
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

# A split's number is folded into the key, so the splits of one key are different streams.
SPLITS = {"train": 0, "validation": 1, "test": 2}

# A batch or an example: inputs, targets, mask, meta.
Example = dict[str, Any]
# Name -> (sum, count), both float32 scalars; add both over batches, then divide.
Scores = dict[str, tuple[jax.Array, jax.Array]]


def unknown(argument: str, got: object, known: Iterable[str]) -> ValueError:
    """The error for a name that does not exist: it tells the nearest one that does, and all."""
    known = list(known)
    near = difflib.get_close_matches(str(got), known, n=1, cutoff=0.0)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return ValueError(f"{argument}: unknown name {got!r}; {hint}Known: {', '.join(known)}")


def check_name(argument: str, got: object, known: Iterable[str]) -> None:
    """Raises `ValueError` unless `got` is one of the names in `known`."""
    known = list(known)
    if got not in known:
        raise unknown(argument, got, known)


def check_integer(argument: str, got: object, least: int) -> int:
    """`got` as an int; `ValueError` unless it is a whole number of at least `least`."""
    if isinstance(got, bool) or not isinstance(got, numbers.Integral) or got < least:
        raise ValueError(f"{argument}: expected a whole number of at least {least}, got {got!r}")
    return int(got)


def check_positive(argument: str, got: object) -> float:
    """`got` as a finite float above 0; `ValueError` otherwise."""
    real = isinstance(got, numbers.Real) and not isinstance(got, bool)
    if not real or not math.isfinite(got) or got <= 0:
        raise ValueError(f"{argument}: expected a finite number above 0, got {got!r}")
    return float(got)


def as_tuple(value: object) -> object:
    """Lists and tuples, however nested, as tuples: what `jax.jit` takes as static must hash."""
    return tuple(as_tuple(item) for item in value) if isinstance(value, list | tuple) else value


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """A memory task: its examples depend on nothing but its fields and a PRNG key.

    A subclass is a frozen dataclass with `SUMMARY` (one line), `VARIANTS` (preset name -> field
    values; the first one is the default), `ROLES`, `META` (what each entry of `meta` but `role`
    says), `vocab_size`, `length`, `chance`, `details()` (its sizes in a line) and `example(key)`,
    and may add `slices` and a `ceiling` below 1. Its `__post_init__` checks the fields and then
    calls `super().__post_init__()`.

    `example(key)` gives a dict of

    - `inputs` int32 `[T]` and `targets` int32 `[T]`: a model's logits at position t are scored
      against `targets[t]`;
    - `mask` bool `[T]`: where they are scored at all (targets are 0 elsewhere);
    - `meta`: a dict of arrays `[T, ...]`, of which `role` int32 is an index into `ROLES`. Whole
      numbers are -1 and truth values False where an entry has nothing to say.

    `chance` is the accuracy of the best guesser that does not use what it is asked for; `ceiling`
    is that of the ideal reader, which knows how the examples are made. Why they are what they are
    is for the docstring to say, in paragraphs that begin with "Chance is" and "Ceiling is", which
    `memseq tasks show` prints.

    Attributes:
        variant: name of the preset that the fields started from; a label, nothing depends on it.
        test: the fields that differ at test time, as a mapping or as (name, value) pairs.
    """

    variant: str = ""
    test: tuple[tuple[str, Any], ...] = ()

    SUMMARY: ClassVar[str]
    VARIANTS: ClassVar[Mapping[str, Mapping[str, Any]]]
    ROLES: ClassVar[tuple[str, ...]]
    META: ClassVar[Mapping[str, str]] = {}

    def __post_init__(self):
        changes = self.test.items() if hasattr(self.test, "items") else self.test
        changes = as_tuple(list(changes))
        for change in changes:
            if not isinstance(change, tuple) or len(change) != 2:
                raise ValueError(f"test: expected (field, value) pairs, got {change!r}")
        object.__setattr__(self, "test", changes)
        if changes:
            self.eval_variant()  # an impossible test is an error now, not after hours of training

    @classmethod
    def preset(cls, variant: str | None = None, **options) -> "Task":
        """The task as a variant has it (default: the first of `VARIANTS`), but for the options.

        Raises `ValueError` for a variant, an option or a setting that does not exist or cannot be.
        """
        variant = next(iter(cls.VARIANTS)) if variant is None else variant
        check_name("variant", variant, cls.VARIANTS)
        fields = [field.name for field in dataclasses.fields(cls) if field.name != "variant"]
        for option in options:
            check_name("option", option, fields)
        return cls(**{**cls.VARIANTS[variant], **options, "variant": variant})

    @property
    def ceiling(self) -> float:
        """Accuracy of the ideal reader."""
        return 1.0

    def example(self, key: jax.Array) -> Example:
        """One example, from a key of `jax.random.key`. Pure; may be traced and vmapped."""
        raise NotImplementedError

    def eval_variant(self) -> "Task":
        """The task as it is tested: itself, but for the fields that `test` changes."""
        fields = [field.name for field in dataclasses.fields(self)]
        for name, _ in self.test:
            check_name("test", name, [field for field in fields if field != "test"])
        return dataclasses.replace(self, **{"test": (), **dict(self.test)})

    def batch(self, key: jax.Array, split: str, index, batch_size: int) -> Example:
        """Batch number `index` of a split: the `batch_size` examples from `index * batch_size` on.

        Example i of a split is `example(fold_in(fold_in(key, SPLITS[split]), i))`, whatever the
        batch size and the order of calls. The keys of the three splits differ; short examples can
        still be alike by chance.

        Args:
            key: the stream's key, from `jax.random.key`.
            split: "train", "validation" or "test".
            index: whole number of at least 0, may be traced.
            batch_size: examples in the batch; static.

        Returns:
            What `example` gives, every array with a leading axis of `batch_size`.
        """
        check_name("split", split, SPLITS)
        batch_size = check_integer("batch_size", batch_size, 1)
        if isinstance(index, numbers.Integral):
            if not 0 <= index < 2**32 // batch_size:
                most = 2**32 // batch_size - 1
                raise ValueError(f"index: expected a whole number from 0 to {most}, got {index}")
            index = np.uint32(index)
        return _batch(self, key, np.uint32(SPLITS[split]), index, batch_size)

    def slices(self, predicted: jax.Array, correct: jax.Array, batch: Example) -> Scores:
        """The task's own scores; `correct` is False at unscored positions."""
        return {}

    def scores(self, predictions: jax.Array, batch: Example) -> Scores:
        """Scores of a batch as sums and counts, which add up over batches. May be traced.

        Args:
            predictions: tokens, integers `[B, T]`, or logits, floating `[B, T, vocab_size]`.
            batch: what `batch` gave.

        Returns:
            `accuracy` (micro: every scored position counts alike), `sequence_accuracy` (all scored
            positions of a sequence right) and the task's slices; each a pair (sum, count) of
            float32 scalars.
        """
        targets, mask = batch["targets"], batch["mask"]
        floating = jnp.issubdtype(predictions.dtype, jnp.floating)
        expected = (*targets.shape, self.vocab_size) if floating else targets.shape
        if predictions.shape != expected:
            kind = "logits" if floating else "tokens"
            raise ValueError(
                f"predictions: expected {kind} of shape {expected}, got {predictions.shape}"
            )
        predicted = jnp.argmax(predictions, axis=-1) if floating else predictions
        correct = (predicted == targets) & mask
        return {
            "accuracy": share(correct, mask),
            "sequence_accuracy": share((correct | ~mask).all(axis=-1), mask.any(axis=-1)),
            **self.slices(predicted, correct, batch),
        }

    def describe(self) -> str:
        """One line: the sizes, the level of chance and the ceiling."""
        return (
            f"{self.details()}; length {self.length}, vocabulary {self.vocab_size}; "
            f"chance {self.chance:.3f}, ceiling {self.ceiling:.3f}"
        )


@functools.partial(jax.jit, static_argnames=("task", "batch_size"))
def _batch(task: Task, key, split, index, batch_size: int) -> Example:
    stream = jax.random.fold_in(key, split)
    start = jnp.asarray(index).astype(jnp.uint32) * jnp.uint32(batch_size)
    which = start + jnp.arange(batch_size, dtype=jnp.uint32)
    return jax.vmap(lambda number: task.example(jax.random.fold_in(stream, number)))(which)


def share(hits: jax.Array, among: jax.Array) -> tuple[jax.Array, jax.Array]:
    """How many of `among` are hits, and how many `among` are, both float32 scalars."""
    return jnp.sum(hits & among, dtype=jnp.float32), jnp.sum(among, dtype=jnp.float32)
