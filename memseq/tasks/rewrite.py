"""Rewriting: some keys are bound again, and the latest value is the one that counts."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from memseq.tasks import base, recall

ORDERS = ("block", "interleaved")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rewrite(base.Task):
    """Multi-query recall in which some keys are bound again, so that old values are out of date.

    `pairs` keys are bound; `updates` of them, chosen at random, are bound `rewrites` more times;
    then every key is asked once and its latest value is right. An example, with `vocab_size=16,
    length=14, pairs=2, updates=(1,), rewrites=(1,)` and `jax.random.key(0)`:

        inputs   7 13  5 14  7 15  0  0  5  0  7  0  0  0
        targets  .  .  .  .  .  .  .  . 14  . 15  .  .  .

    Key 7 was bound to 13 and then to 15. The query 7 at position 10 wants 15 (answering 13 is
    *stale*); the query 5 at position 8 wants 14, which was *kept*.

    All values of an example are distinct, so a new value is never the old one and an old value
    tells which key it belonged to. In "block" order all keys are first bound once, then come the
    rounds of rewrites, each a random order of the rewritten keys; in "interleaved" order all writes
    are in one random order (what is called the first of a key is then simply its earliest). Queries
    fall into the slots of the remaining region as in `mqar`, independently of the order of writing.
    Related: zoology's `forgetting_mqar`; associative retrieval with rewriting (Rodkin et al. 2024,
    arXiv 2407.04841); proactive interference in language models (arXiv 2506.08184).

    Chance is 1 / pairs, as a guesser that knows which values are the latest but does not look at
    the queries has one expected hit in every sequence: each of these values is asked for once.
    (Always answering the last value written is enough for that.)

    Ceiling is reached, under every kind of noise, by a reader that knows where the context ends and
    keeps the latest binding before it. With `noise="random"`, a memory that cannot tell filler from
    pairs has a lower limit of its own, `overwriting_accuracy`: it goes on storing in the filler.

    Attributes:
        vocab_size: number of token ids; keys are [1, V/2), values [V/2, V) (less with
            `noise="disjoint"`).
        length: positions; even.
        pairs: keys of an example.
        updates: how many of them are rewritten; an example draws one of the entries.
        rewrites: how many times each of those is rewritten; an example draws one of the entries,
            each at least 1.
        order: "block" or "interleaved".
        noise, filler_tokens, power_a: filler and the law of the slots, as in `mqar`. "random" needs
            a single entry of `updates` and of `rewrites`.
        gap: slots of filler between the last write and the first slot in which a query may fall.

    Scores add `updated` and `kept` (accuracy on the queries of rewritten and of other keys) and, as
    shares of all queries, `stale` (the answer is an older value of the asked key) and `other` (any
    other error): accuracy + stale + other = 1. Where examples differ in their number of rewrites R,
    also "updated R=1", "stale R=1" and so on, as shares of the updated queries.
    """

    vocab_size: int = 128
    length: int = 64
    pairs: int = 8
    updates: tuple[int, ...] = (8,)
    rewrites: tuple[int, ...] = (1,)
    order: str = "block"
    noise: str = "zero"
    filler_tokens: int = 16
    power_a: float = 1.0
    gap: int = 0

    SUMMARY: ClassVar[str] = "bind some keys again; the latest value of each key is the right one"
    ROLES: ClassVar[tuple[str, ...]] = recall.ROLES
    META: ClassVar[dict[str, str]] = {
        "pair": "number of the key, in the order of first writing if the order is block",
        "version": "0 where the key is first bound, 1 at its first rewrite, and so on",
        "updated": "whether the asked key was rewritten",
        "kept": "whether it was not",
        "older": "the asked key's earlier values, which are stale",
        "lag": "positions from the value that answers to the query",
        "age": "writes after that value",
        "updates": "rewritten keys of the example",
        "rewrites": "times each of them is rewritten",
    }
    VARIANTS: ClassVar[dict] = {
        "tiny": {},
        "half": {"updates": (4,)},
        "paper": {
            "vocab_size": 8192,
            "length": 256,
            "pairs": 16,
            "updates": (4, 8, 16),
            "rewrites": (1, 2, 4),
            # 64 keys and 16 rewrites of 16 of them take 640 tokens; rewriting all would not fit.
            "test": {"length": 1024, "pairs": 64, "rewrites": (1, 2, 4, 8, 16)},
        },
    }

    def __post_init__(self):
        base.check_integer("length", self.length, 2)
        base.check_integer("pairs", self.pairs, 1)
        base.check_integer("gap", self.gap, 0)
        base.check_positive("power_a", self.power_a)
        base.check_name("order", self.order, ORDERS)
        for name, least in (("updates", 0), ("rewrites", 1)):
            value = base.as_tuple(getattr(self, name))
            value = value if isinstance(value, tuple) else (value,)
            if not value:
                raise ValueError(f"{name}: expected at least one number, got none")
            for entry in value:
                base.check_integer(name, entry, least)
            object.__setattr__(self, name, value)
        if self.noise == "random" and len({*self.updates}) * len({*self.rewrites}) > 1:
            raise ValueError(
                "noise: with 'random' filler all examples must have the same updates and rewrites, "
                f"got {self.updates} and {self.rewrites}: where the writes end could not be known"
            )
        if self.most_updates > self.pairs:
            raise ValueError(
                f"updates: expected at most the number of pairs, {self.pairs}, "
                f"got {self.most_updates}"
            )
        needed = 2 * (self.most_writes + self.gap + self.pairs)
        if self.length % 2 or self.length < needed:
            raise ValueError(
                f"length: {self.most_writes} writes, a gap of {self.gap} slots and {self.pairs} "
                f"queries need an even length of at least {needed}, got {self.length}"
            )
        recall.check_enough("pairs", self.pairs, self.pairs * self.most_versions, self.tokens)
        super().__post_init__()

    @property
    def tokens(self) -> recall.Tokens:
        return recall.token_ranges(self.vocab_size, self.noise, self.filler_tokens)

    @property
    def most_updates(self) -> int:
        return max(self.updates)

    @property
    def most_versions(self) -> int:
        """Values a key can have had: 1 when none is ever rewritten."""
        return 1 + (max(self.rewrites) if self.most_updates else 0)

    @property
    def most_writes(self) -> int:
        return self.pairs + self.most_updates * max(self.rewrites)

    @property
    def chance(self) -> float:
        return 1.0 / self.pairs

    @property
    def overwriting_accuracy(self) -> float:
        """Accuracy of a perfect memory that stores filler too; exact, see `recall`."""
        if self.noise != "random":
            return 1.0
        slots = self.length // 2 - self.most_writes - self.gap
        return recall.overwriting_accuracy(slots, self.pairs, self.power_a, self.gap, self.tokens)

    def details(self) -> str:
        updates, rewrites = ("/".join(map(str, n)) for n in (self.updates, self.rewrites))
        limit = ""
        if self.noise == "random":
            limit = f" (a memory that stores filler too reaches {self.overwriting_accuracy:.3f})"
        return (
            f"{self.pairs} keys, {updates} of them rewritten {rewrites}x, {self.order} order; "
            f"{self.noise} filler{limit}; power_a {self.power_a:g}, gap {self.gap}"
        )

    def _writes(
        self, uniform: list[jax.Array], updates: jax.Array, rewrites: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Pair and version of each write, int32 `[most_writes]`, -1 past the last; their number."""
        for_rounds, for_choice, for_order = uniform
        index = jnp.arange(self.most_writes)
        rounds = jax.vmap(lambda drawn: recall.shuffled(drawn, updates))(for_rounds)
        chosen = jnp.argsort(for_choice)  # the first `updates` are rewritten
        later, per_round = jnp.maximum(index - self.pairs, 0), jnp.maximum(updates, 1)
        # Rounds past this example's number are clipped by the gather and cut off below.
        again = chosen[rounds[later // per_round, later % per_round]]
        writes = self.pairs + updates * rewrites
        pair = jnp.where(index < self.pairs, index, again)
        if self.order == "interleaved":
            pair = pair[recall.shuffled(for_order, writes)]
        pair = jnp.where(index < writes, pair, -1)
        same = (pair[:, None] == pair[None, :]) & (index[None, :] < index[:, None])
        return pair, jnp.where(pair >= 0, same.sum(axis=1, dtype=jnp.int32), -1), writes

    def example(self, key: jax.Array) -> base.Example:
        time, pairs = jnp.arange(self.length), self.pairs
        draw_key, filler_key = jax.random.split(key)
        for_updates, for_rewrites, for_keys, for_values, for_slots, for_asked, *for_writes = (
            recall.uniform_parts(
                draw_key,
                (),
                (),
                (self.tokens.keys[1],),
                (self.tokens.values[1],),
                (self.length // 2,),
                (pairs,),
                (max(self.rewrites), pairs),
                (pairs,),
                (self.most_writes,),
            )
        )
        updates, rewrites = (
            jnp.array(choices, jnp.int32)[jnp.floor(drawn * len(choices)).astype(jnp.int32)]
            for choices, drawn in ((self.updates, for_updates), (self.rewrites, for_rewrites))
        )
        written, versions, writes = self._writes(for_writes, updates, rewrites)
        key_ids = recall.draw_distinct(for_keys, pairs, self.tokens.keys)
        value_ids = recall.draw_distinct(
            for_values, pairs * self.most_versions, self.tokens.values
        ).reshape(pairs, self.most_versions)

        # The last version of each pair and the write that made it; what is no write is dropped.
        slot = jnp.where(written >= 0, written, pairs)
        nothing = jnp.zeros(pairs, jnp.int32)
        last = nothing.at[slot].max(versions, mode="drop")
        last_write = nothing.at[slot].max(jnp.arange(self.most_writes), mode="drop")

        start = 2 * (writes + self.gap)
        slots = recall.draw_slots(for_slots, self.power_a, (self.length - start) // 2, pairs)
        asked = jnp.argsort(for_asked)
        pair = jnp.full(self.length, -1, jnp.int32).at[start + 2 * slots].set(asked)
        is_query, is_context = pair >= 0, time < 2 * writes
        write = jnp.where(is_context, time // 2, 0)
        pair = jnp.where(is_context, written[write], pair)
        version = jnp.where(is_context, versions[write], last[pair])
        value = value_ids[pair, version]
        role = jnp.where(
            is_context,
            jnp.where(time % 2 == 0, recall.KEY, recall.VALUE),
            jnp.where(is_query, recall.QUERY, recall.FILLER),
        )
        inputs = jnp.where(role == recall.VALUE, value, key_ids[pair])
        updated = is_query & (version > 0)
        is_older = updated[:, None] & (jnp.arange(max(self.rewrites)) < version[:, None])
        older = jnp.where(is_older[:, : self.most_versions - 1], value_ids[pair, :-1], -1)
        return {
            "inputs": recall.add_filler(filler_key, inputs, role, self.noise, self.tokens),
            "targets": jnp.where(is_query, value, 0),
            "mask": is_query,
            "meta": {
                "role": role.astype(jnp.int32),
                "pair": pair,
                "version": jnp.where(is_context, version, -1),
                "updated": updated,
                "kept": is_query & ~updated,
                "older": older,
                "lag": jnp.where(is_query, time - 2 * last_write[pair] - 1, -1),
                "age": jnp.where(is_query, writes - 1 - last_write[pair], -1),
                "updates": jnp.full(self.length, updates),
                "rewrites": jnp.full(self.length, rewrites),
            },
        }

    def slices(self, predicted: jax.Array, correct: jax.Array, batch: base.Example) -> base.Scores:
        mask, meta = batch["mask"], batch["meta"]
        older = meta["older"]
        stale = mask & ((older == predicted[..., None]) & (older >= 0)).any(axis=-1)
        scores = {
            "updated": base.share(correct, meta["updated"]),
            "kept": base.share(correct, meta["kept"]),
            "stale": base.share(stale, mask),
            "other": base.share(~correct & ~stale, mask),
        }
        for number in self.rewrites if len(set(self.rewrites)) > 1 else ():
            among = meta["updated"] & (meta["rewrites"] == number)
            scores[f"updated R={number}"] = base.share(correct, among)
            scores[f"stale R={number}"] = base.share(stale, among)
        return scores
