"""Induction heads: what came after this token, the one time it was there before?"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from memseq.tasks import base

ROLES = ("filler", "trigger", "value", "query")
FILLER, TRIGGER, VALUE, QUERY = range(len(ROLES))


@dataclasses.dataclass(frozen=True, kw_only=True)
class InductionHeads(base.Task):
    """A trigger stands somewhere among random tokens; when it comes again, what followed it?

    All tokens but two are drawn uniformly from 1 to `vocab_size - 1`. Token 0, the trigger, stands
    at a place drawn uniformly, and again at the last position, where the answer is the token that
    followed it. An example, with `length=10` and `jax.random.key(0)`:

        inputs   16 10 16 10  3  1  0 14 14  0
        targets   .  .  .  .  .  .  .  .  . 14

    Two layers of attention find it by copying what follows from one layer to the next; how long a
    sequence may be is what the task is for. Gu and Dao 2023, "Mamba", arXiv 2312.00752, section
    4.2 and appendix E.1: trained at length 256 with 16 tokens and the trigger, tested at 64 to
    2^20. They did not publish their generator.

    Chance is 1 / (vocab_size - 1), as the answer is a uniform token. (A reader that counts tokens
    and says the most common one is right a little more often.)

    Ceiling is reached by keeping the token that follows the trigger.

    Attributes:
        vocab_size: number of token ids, the trigger included; at least 3.
        length: positions, at least 3.
    """

    vocab_size: int = 17
    length: int = 64

    SUMMARY: ClassVar[str] = "what followed the trigger? Trained short, tested long"
    ROLES: ClassVar[tuple[str, ...]] = ROLES
    META: ClassVar[dict[str, str]] = {"lag": "positions from the value to the query"}
    VARIANTS: ClassVar[dict] = {
        "tiny": {"test": {"length": 512}},
        "paper": {"length": 256, "test": {"length": 65_536}},
    }

    def __post_init__(self):
        base.check_integer("vocab_size", self.vocab_size, 3)
        base.check_integer("length", self.length, 3)
        super().__post_init__()

    @property
    def chance(self) -> float:
        return 1 / (self.vocab_size - 1)

    def details(self) -> str:
        return f"{self.length} tokens, the trigger once among them and once at the end"

    def example(self, key: jax.Array) -> base.Example:
        token_key, place_key = jax.random.split(key)
        time, last = jnp.arange(self.length), self.length - 1
        tokens = jax.random.randint(token_key, (self.length,), 1, self.vocab_size)
        place = jax.random.randint(place_key, (), 0, last - 1)
        asked = time == last
        inputs = jnp.where((time == place) | asked, 0, tokens).astype(jnp.int32)
        role = jnp.where(time == place, TRIGGER, jnp.where(time == place + 1, VALUE, FILLER))
        return {
            "inputs": inputs,
            "targets": jnp.where(asked, inputs[place + 1], 0),
            "mask": asked,
            "meta": {
                "role": jnp.where(asked, QUERY, role).astype(jnp.int32),
                "lag": jnp.where(asked, last - 1 - place, -1).astype(jnp.int32),
            },
        }
