"""Selective copying: pick the data out of the noise, and say it in order."""

import dataclasses
import functools
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from memseq.tasks import base

ROLES = ("filler", "data", "answer")
NOISE, ASK, FIRST = 0, 1, 2  # token ids; data begins at FIRST


@functools.cache
def share_of_the_most_common(draws: int, symbols: int) -> float:
    """Expected share of the most common of `symbols` symbols among that many uniform draws.

    The counts are multinomial: no count is above m with probability draws! / symbols^draws times
    the coefficient of x^draws in (sum_{j <= m} x^j / j!)^symbols.
    """
    scale = math.factorial(draws) / symbols**draws
    expected = 0.0
    for most in range(draws):
        term = np.array([1 / math.factorial(j) for j in range(most + 1)])
        series = np.ones(1)
        for _ in range(symbols):
            series = np.convolve(series, term)[: draws + 1]
        within = series[draws] * scale if series.size > draws else 0.0
        expected += 1 - within
    return expected / draws


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelectiveCopying(base.Task):
    """Tokens lie among noise, at random places; after the context they are wanted in order.

    A context of `context` positions holds `items` data tokens, drawn uniformly from 2 to
    `vocab_size - 1`, at places drawn uniformly; all other positions are noise, token 0. Then token
    1 asks `items` times, and the answers are the data in the order in which it came. Answers are
    labels of their own positions and are never fed back. An example, with `context=10, items=3`
    and `jax.random.key(0)`:

        inputs   14  0  0  0  0  0 14  0  6  0  1  1  1
        targets   .  .  .  .  .  .  .  .  .  . 14 14  6

    Places differ from example to example, so a time-invariant memory, which writes every position
    alike, cannot leave the noise out. Gu and Dao 2023, "Mamba", arXiv 2312.00752, section 4.1 and
    appendix E.1, have the sizes of the `paper` variant (context 4096, 16 tokens, vocabulary 16);
    they did not publish their generator.

    Chance is the expected share of the most common token among `items`, as that is the best guess
    of a reader who knows the data but not which of it is asked for. (Guessing any data token is
    right for one in `vocab_size - 2`.)

    Ceiling is reached by a queue of the data: the answer is a function of the context.

    Attributes:
        vocab_size: number of token ids, at least 4.
        context: positions before the answers.
        items: data tokens, at most the context; up to 100.
    """

    vocab_size: int = 16
    context: int = 56
    items: int = 8

    SUMMARY: ClassVar[str] = "pick the data tokens out of the noise, and give them in order"
    ROLES: ClassVar[tuple[str, ...]] = ROLES
    META: ClassVar[dict[str, str]] = {"item": "number of the data token, in the order of coming"}
    VARIANTS: ClassVar[dict] = {"tiny": {}, "paper": {"context": 4096, "items": 16}}

    def __post_init__(self):
        base.check_integer("vocab_size", self.vocab_size, 4)
        base.check_integer("context", self.context, 1)
        most = min(self.context, 100)
        if base.check_integer("items", self.items, 1) > most:
            raise ValueError(f"items: expected 1 to {most}, got {self.items}")
        super().__post_init__()

    @property
    def length(self) -> int:
        return self.context + self.items

    @property
    def symbols(self) -> int:
        """How many different data tokens there are."""
        return self.vocab_size - FIRST

    @property
    def chance(self) -> float:
        return share_of_the_most_common(self.items, self.symbols)

    def details(self) -> str:
        return f"{self.items} tokens among {self.context} positions, then as many answers"

    def example(self, key: jax.Array) -> base.Example:
        place_key, data_key = jax.random.split(key)
        uniform = jax.random.uniform(place_key, (self.context,))
        places = jnp.sort(jax.lax.top_k(uniform, self.items)[1])
        data = FIRST + jax.random.randint(data_key, (self.items,), 0, self.symbols)
        number = jnp.full((self.context,), -1).at[places].set(jnp.arange(self.items))
        item = jnp.concatenate([number, jnp.arange(self.items)]).astype(jnp.int32)
        asked = jnp.arange(self.length) >= self.context
        shown = jnp.where(item >= 0, data[jnp.maximum(item, 0)], NOISE).astype(jnp.int32)
        return {
            "inputs": jnp.where(asked, ASK, shown),
            "targets": jnp.where(asked, shown, 0),
            "mask": asked,
            "meta": {
                "role": jnp.where(asked, 2, jnp.where(item >= 0, 1, 0)).astype(jnp.int32),
                "item": item,
            },
        }
