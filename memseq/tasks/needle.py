"""Needles in a haystack: a few facts anywhere in a long text of noise, asked for at its end."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from memseq.tasks import base, recall

THIRDS = ("early", "middle", "late")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Needle(base.Task):
    """A few key-value pairs scattered in filler; at the end every key is asked for its value.

    An example, with `vocab_size=16, filler_tokens=4, length=14, needles=2` and
    `jax.random.key(0)`:

        inputs   3 9 12 15 15 15 12 14 15 12  1 11  3  1
        targets  . .  .  .  .  .  .  .  .  .  .  .  9 11

    Key 3 is bound to 9 and key 1 to 11; 12 to 15 are filler.

    Pairs stand in different two-token slots, every choice of them equally likely; the rest of the
    text is filler, drawn from ids of its own. The last `needles` positions ask for all keys, in
    random order. A memory must keep little, but for long, and must not let noise wear it away.
    Related: the passkey and needle tests of long-context models (Hsieh et al. 2024, "RULER", arXiv
    2404.06654).

    Chance is 1 / needles, as a guesser that knows the values of the text but does not look at the
    queries has one expected hit in every sequence: each value is asked for once.

    Ceiling is reached by keeping the pairs: filler never looks like one.

    Attributes:
        vocab_size: number of token ids; keys are [1, V/2), values [V/2, V) with V without filler's.
        filler_tokens: how many ids filler has, the last of the vocabulary.
        length: positions; the text has length - needles of them, which must be even.
        needles: pairs of an example, at least 2: of one the value could be had without its key.

    Scores add the accuracy by where in the text the pair stood: "early", "middle" and "late", its
    thirds.
    """

    vocab_size: int = 64
    filler_tokens: int = 16
    length: int = 64
    needles: int = 4

    SUMMARY: ClassVar[str] = "a few facts anywhere in noise, asked for at the end; tested longer"
    ROLES: ClassVar[tuple[str, ...]] = recall.ROLES[:-1]
    META: ClassVar[dict[str, str]] = {
        "pair": "number of the pair, in the order of the text",
        "lag": "positions from the pair's value to the query",
    }
    VARIANTS: ClassVar[dict] = {"tiny": {"test": {"length": 256}}}

    def __post_init__(self):
        base.check_integer("needles", self.needles, 2)
        base.check_integer("length", self.length, 2)
        if self.length < 3 * self.needles or (self.length - self.needles) % 2:
            raise ValueError(
                f"length: {self.needles} needles, each asked for once, need one of at least "
                f"{3 * self.needles} that leaves an even text before them, got {self.length}"
            )
        recall.check_enough("needles", self.needles, self.needles, self.tokens)
        super().__post_init__()

    @property
    def tokens(self) -> recall.Tokens:
        return recall.token_ranges(self.vocab_size, "disjoint", self.filler_tokens)

    @property
    def text(self) -> int:
        """Positions before the queries."""
        return self.length - self.needles

    @property
    def chance(self) -> float:
        return 1.0 / self.needles

    def details(self) -> str:
        return f"{self.needles} pairs in {self.text} tokens of text, {self.filler_tokens} of filler"

    def example(self, key: jax.Array) -> base.Example:
        time, needles = jnp.arange(self.length), self.needles
        draw_key, filler_key = jax.random.split(key)
        for_slots, for_keys, for_values, for_order = recall.uniform_parts(
            draw_key,
            (self.text // 2,),
            (self.tokens.keys[1],),
            (self.tokens.values[1],),
            (needles,),
        )
        slots = jnp.sort(recall.draw_slots(for_slots, 1.0, self.text // 2, needles))
        key_ids = recall.draw_distinct(for_keys, needles, self.tokens.keys)
        value_ids = recall.draw_distinct(for_values, needles, self.tokens.values)

        pair = jnp.full(self.length, -1, jnp.int32)
        pair = (
            pair.at[2 * slots].set(jnp.arange(needles)).at[2 * slots + 1].set(jnp.arange(needles))
        )
        pair = pair.at[self.text :].set(jnp.argsort(for_order))
        is_query = time >= self.text
        role = jnp.where(
            is_query,
            recall.QUERY,
            jnp.where(pair < 0, recall.FILLER, jnp.where(time % 2 == 0, recall.KEY, recall.VALUE)),
        )
        inputs = jnp.where(role == recall.VALUE, value_ids[pair], key_ids[pair])
        return {
            "inputs": recall.add_filler(filler_key, inputs, role, "disjoint", self.tokens),
            "targets": jnp.where(is_query, value_ids[pair], 0),
            "mask": is_query,
            "meta": {
                "role": role.astype(jnp.int32),
                "pair": pair,
                "lag": jnp.where(is_query, time - 2 * slots[pair] - 1, -1),
            },
        }

    def slices(self, predicted: jax.Array, correct: jax.Array, batch: base.Example) -> base.Scores:
        mask, lag = batch["mask"], batch["meta"]["lag"]
        third = 3 * (jnp.arange(self.length) - lag) // self.text  # of where the value stood
        return {
            name: base.share(correct, mask & (third == number))
            for number, name in enumerate(THIRDS)
        }
