"""The word problem of a group of permutations: states that do not commute."""

import dataclasses
import functools
import itertools
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from memseq.tasks import base
from memseq.tasks.bands import band_scores, check_bands

ROLES = ("permutation",)
MOST = 5  # 120 permutations


@functools.cache
def products(items: int) -> np.ndarray:
    """int32 [n!, n!]: the number of "first a, then b", for permutations in lexical order."""
    permutations = list(itertools.permutations(range(items)))
    number = {permutation: i for i, permutation in enumerate(permutations)}
    table = [
        [number[tuple(b[a[i]] for i in range(items))] for b in permutations] for a in permutations
    ]
    return np.array(table, np.int32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Words(base.Task):
    """Which permutation a sequence of permutations comes to, at lengths beyond those of training.

    Each token is a permutation of `items` things, drawn uniformly; the answer at each position is
    the one that results from all so far, one after another, written as its token. Tokens 1 to
    items! are the permutations in lexical order (1 is the identity); 0 is not used. An example,
    with `length=8` and `jax.random.key(0)`:

        inputs   2 1 3 2 6 4 1 6
        targets  2 2 4 6 1 4 4 3

    Three things make S3, the smallest group in which order matters, five S5, whose word problem is
    complete for the circuit class NC1. A memory whose transitions are one generalised Householder
    matrix a token cannot track S3 in one layer; products of two, with eigenvalues down to -1, can,
    and S5 needs four (Siems et al. 2025, "DeltaProduct", arXiv 2502.10297, whose lengths the
    `paper` variant has).

    Chance is 1/items!, as the result is uniform when any one permutation so far is not known. (A
    reader of only the last w tokens is right at the first w positions.)

    Ceiling is reached by multiplying: the answer is a function of the tokens.

    Attributes:
        items: how many things are permuted, 2 to 5.
        vocab_size: number of token ids, more than items!.
        length: positions.
        bands: last positions (from 1) of the bands by which accuracy is split, ascending.

    Scores add `scaled_accuracy`, (accuracy - chance) / (1 - chance), and
    the accuracy of each band that the length reaches, as "13-24".
    """

    items: int = 3
    vocab_size: int = 7
    length: int = 12
    bands: tuple[int, ...] = (12, 24, 48)

    SUMMARY: ClassVar[str] = "which permutation do all so far come to? Trained short, tested long"
    ROLES: ClassVar[tuple[str, ...]] = ROLES
    VARIANTS: ClassVar[dict] = {
        "tiny": {"test": {"length": 48}},
        "paper": {"length": 128, "bands": (128, 256, 512), "test": {"length": 512}},
        "s5": {
            "items": 5,
            "vocab_size": 121,
            "length": 128,
            "bands": (128, 256),
            "test": {"length": 256},
        },
    }

    def __post_init__(self):
        if base.check_integer("items", self.items, 2) > MOST:
            raise ValueError(f"items: expected 2 to {MOST}, got {self.items}")
        base.check_integer("vocab_size", self.vocab_size, math.factorial(self.items) + 1)
        base.check_integer("length", self.length, 1)
        object.__setattr__(self, "bands", check_bands(self.bands))
        super().__post_init__()

    @property
    def chance(self) -> float:
        return 1 / math.factorial(self.items)

    def details(self) -> str:
        return f"words of {self.length} permutations of {self.items} things"

    def example(self, key: jax.Array) -> base.Example:
        table = jnp.asarray(products(self.items))
        drawn = jax.random.randint(key, (self.length,), 0, math.factorial(self.items))
        result = jax.lax.associative_scan(lambda first, then: table[first, then], drawn)
        return {
            "inputs": 1 + drawn.astype(jnp.int32),
            "targets": 1 + result.astype(jnp.int32),
            "mask": jnp.ones((self.length,), bool),
            "meta": {"role": jnp.zeros((self.length,), jnp.int32)},
        }

    def slices(self, predicted: jax.Array, correct: jax.Array, batch: base.Example) -> base.Scores:
        return band_scores(self, self.bands, correct, batch["mask"])
