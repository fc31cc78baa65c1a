"""Delayed match: is this bit what it was some steps ago?"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from memseq.tasks import base

ROLES = ("bit",)


def matches(bits: jax.Array, window) -> jax.Array:
    """bool [T]: is a bit equal to the first of the last `window` bits, or of all so far?

    bits int32 [T]; window may be traced.
    """
    first = jnp.arange(bits.size) - (window - 1)
    return bits == bits[jnp.maximum(first, 0)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DelayedMatch(base.Task):
    """Whether a bit is equal to the one that `window - 1` steps before it was.

    Bits are fair and independent; token 1 is the bit 0 and token 2 the bit 1. The answer is token
    2 where the first and the last of the last `window` bits are equal, 1 where they are not, at
    every position that has that many. An example, with `length=10, window=4` and
    `jax.random.key(0)`:

        inputs   1 1 2 2 1 2 2 1 1 2
        targets  . . . 1 2 2 2 2 1 2

    The memory has to hold the last `window` bits in their order, all the time: what is asked for
    moves on with every step. N-delayed-match-to-sample of Khajehabdollahi et al. 2024, "Emergent
    mechanisms for long timescales depend on training curriculum and affect performance in memory
    tasks", with N = `window`; its N-parity is `parity` with a window.

    Chance is 1/2, as the answer is a fair coin when either of the two bits is not known.

    Ceiling is reached by a queue of bits: the answer is a function of them.

    Attributes:
        vocab_size: number of token ids, at least 3; token 0 is not used.
        length: positions.
        window: N, from 2 to the length.
    """

    vocab_size: int = 4
    length: int = 32
    window: int = 8

    SUMMARY: ClassVar[str] = "is this bit what it was N - 1 steps ago? At every step"
    ROLES: ClassVar[tuple[str, ...]] = ROLES
    VARIANTS: ClassVar[dict] = {"tiny": {}}

    def __post_init__(self):
        base.check_integer("vocab_size", self.vocab_size, 3)
        base.check_integer("length", self.length, 2)
        if base.check_integer("window", self.window, 2) > self.length:
            raise ValueError(
                f"window: expected at most the length, {self.length}, got {self.window}"
            )
        super().__post_init__()

    @property
    def chance(self) -> float:
        return 0.5

    def details(self) -> str:
        return f"{self.length} bits, each beside the one {self.window - 1} before it"

    def example(self, key: jax.Array) -> base.Example:
        bits = jax.random.bernoulli(key, 0.5, (self.length,)).astype(jnp.int32)
        mask = jnp.arange(self.length) >= self.window - 1
        return {
            "inputs": 1 + bits,
            "targets": jnp.where(mask, 1 + matches(bits, self.window), 0),
            "mask": mask,
            "meta": {"role": jnp.zeros((self.length,), jnp.int32)},
        }
