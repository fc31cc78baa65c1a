"""Multi-query associative recall: store pairs, then give the value of every key when asked."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from memseq.tasks import base, recall

# (length, pairs, weight): what current zoology and Based configs train on, and their test cells.
TRAIN_CELLS = ((64, 4, 100), (128, 8, 20), (256, 16, 20), (256, 32, 20), (256, 64, 20))
TEST_CELLS = (
    (64, 4, 1),
    (64, 8, 1),
    (64, 16, 1),
    (128, 32, 1),
    (256, 64, 1),
    (512, 128, 1),
    (1024, 256, 1),
)
LADDER = {
    "vocab_size": 8192,
    "cells": TRAIN_CELLS,
    "noise": "random",
    "power_a": 0.01,
    "test": {"cells": TEST_CELLS},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MQAR(base.Task):
    """Multi-query associative recall (Arora et al. 2023, "Zoology", arXiv 2312.04927).

    A context of `pairs` key-value pairs, then every key is asked once, somewhere in the query
    region. An example, with `vocab_size=12, cells=((12, 2, 1),), noise="zero"` and
    `jax.random.key(0)`:

        inputs   5  8  2  6  0  0  5  0  2  0  0  0
        targets  .  .  .  .  .  .  8  .  6  .  .  .

    Keys 5 and 2 are bound to 8 and 6; the query 5 at position 6 must be answered by 8, the query 2
    at position 8 by 6. The answer is the label of the query's own position and is never fed back.

    Laws. Keys are distinct ids of [1, V/2), values distinct ids of [V/2, V). The region after the
    context has S = (length - 2 pairs passes) / 2 two-token slots; slot i (from 1) is drawn with
    probability proportional to i ** (power_a - 1) among those left. Zoology gives the draws in
    their order to the keys in the order of writing (`coupled=True`), so that early keys get near
    slots; otherwise the assignment is random, and how far a query is and how old its pair is are
    independent. An example first draws its cell (length, pairs) by weight; all have the length of
    the longest cell and are padded with zeros.

    Chance is 1 / (mean number of pairs), as a guesser that knows the values of the context but does
    not look at the queries has one expected hit in every sequence: each value is asked for once.
    (Guessing any value id is right for one in as many as there are. With `coupled=True` it does not
    use the positions either.)

    Ceiling is reached, under every kind of noise, by a reader that keeps the first binding it sees:
    a key's first occurrence is always in the context and is followed by its value. With
    `noise="random"`, a memory that cannot tell filler from pairs has a lower limit of its own,
    `overwriting_accuracy`: it stores every bigram of a key and a value, and the latest wins.

    Attributes:
        vocab_size: number of token ids.
        cells: the mixture: (length, pairs, weight) each; lengths even, weights above 0.
        noise: filler is "zero", "random" (any id, so it may look like a key or a pair) or
            "disjoint" (ids of its own).
        filler_tokens: how many ids `noise="disjoint"` takes from the top of the vocabulary.
        power_a: law of the gaps; 0.01 is close to 1/slot, 1 is uniform. Above 0.
        coupled: whether early-written keys get the slots that were drawn first.
        passes: how often the context is shown ("Just read twice", arXiv 2407.05483).

    Scores add `effective_pairs` (pairs a sequence by which the memory beats guessing any value,
    `pairs (v accuracy - 1) / (v - 1)` with v values, arXiv 2407.04841) and each cell's accuracy, as
    "64x4".
    """

    vocab_size: int = 128
    cells: tuple[tuple[int, int, float], ...] = ((64, 4, 1), (64, 8, 1), (64, 16, 1))
    noise: str = "random"
    filler_tokens: int = 16
    power_a: float = 0.01
    coupled: bool = False
    passes: int = 1

    SUMMARY: ClassVar[str] = "store key-value pairs, then give the value of each key that is asked"
    ROLES: ClassVar[tuple[str, ...]] = recall.ROLES
    META: ClassVar[dict[str, str]] = {
        "pair": "number of the pair, in the order of writing",
        "lag": "positions from the pair's last value to the query",
        "age": "pairs written after the one that is asked for",
        "cell": "which entry of the mixture the example is",
        "pairs": "pairs of the example",
    }
    VARIANTS: ClassVar[dict] = {
        "tiny": {},
        "paper": LADDER,
        "zoology": {**LADDER, "coupled": True},
    }

    def __post_init__(self):
        base.check_integer("passes", self.passes, 1)
        base.check_positive("power_a", self.power_a)
        cells = base.as_tuple(self.cells)
        if not isinstance(cells, tuple) or not cells:
            raise ValueError(f"cells: expected (length, pairs, weight) entries, got {cells!r}")
        for cell in cells:
            if not isinstance(cell, tuple) or len(cell) != 3:
                raise ValueError(f"cells: expected (length, pairs, weight), got {cell!r}")
            length, pairs, weight = cell
            base.check_integer("length in cells", length, 2)
            base.check_integer("pairs in cells", pairs, 1)
            base.check_positive("weight in cells", weight)
            needed = 2 * pairs * (self.passes + 1)
            if length % 2 or length < needed:
                raise ValueError(
                    f"length in cells: {pairs} pairs shown {self.passes} times and asked once need "
                    f"an even length of at least {needed}, got {length}"
                )
        if len({cell[:2] for cell in cells}) < len(cells):
            raise ValueError(f"cells: expected each (length, pairs) once, got {cells!r}")
        object.__setattr__(self, "cells", cells)
        recall.check_enough("cells", self.most_pairs, self.most_pairs, self.tokens)
        super().__post_init__()

    @property
    def tokens(self) -> recall.Tokens:
        return recall.token_ranges(self.vocab_size, self.noise, self.filler_tokens)

    @property
    def length(self) -> int:
        return max(length for length, _, _ in self.cells)

    @property
    def most_pairs(self) -> int:
        return max(pairs for _, pairs, _ in self.cells)

    @property
    def mean_pairs(self) -> float:
        total = sum(weight for _, _, weight in self.cells)
        return sum(pairs * weight for _, pairs, weight in self.cells) / total

    @property
    def chance(self) -> float:
        return 1.0 / self.mean_pairs

    @property
    def overwriting_accuracy(self) -> float:
        """Accuracy of a perfect memory that stores filler too; exact, see `recall`."""
        if self.noise != "random":
            return 1.0
        total = sum(weight for _, _, weight in self.cells)
        right = sum(
            weight * pairs * recall.overwriting_accuracy(slots, pairs, self.power_a, 0, self.tokens)
            for (_, pairs, weight), slots in zip(self.cells, self._slots(), strict=True)
        )
        return right / total / self.mean_pairs

    def _slots(self) -> list[int]:
        return [length // 2 - pairs * self.passes for length, pairs, _ in self.cells]

    def single_cells(self) -> dict[str, "MQAR"]:
        """Each cell of the mixture as a task of its own, by name ("64x4"), without padding."""
        return {
            f"{cell[0]}x{cell[1]}": dataclasses.replace(self, cells=(cell,), test=())
            for cell in self.cells
        }

    def details(self) -> str:
        cells = ", ".join(f"{length}x{pairs}" for length, pairs, _ in self.cells)
        gaps = "nearest slots to early keys" if self.coupled else "gaps independent of age"
        limit = ""
        if self.noise == "random":
            limit = f" (a memory that stores filler too reaches {self.overwriting_accuracy:.3f})"
        return (
            f"length x pairs {cells}; {self.noise} filler{limit}; power_a {self.power_a:g}, {gaps}"
        )

    def example(self, key: jax.Array) -> base.Example:
        lengths, pair_counts, weights = (
            np.array(column) for column in zip(*self.cells, strict=True)
        )
        most, time = self.most_pairs, jnp.arange(self.length)
        draw_key, filler_key = jax.random.split(key)
        for_cell, for_keys, for_values, for_slots, for_order = recall.uniform_parts(
            draw_key,
            (),
            (self.tokens.keys[1],),
            (self.tokens.values[1],),
            (max(self._slots()),),
            (most,),
        )
        borders = np.cumsum(weights / weights.sum())[:-1]
        cell = jnp.sum(for_cell >= jnp.array(borders, jnp.float32), dtype=jnp.int32)
        length, pairs = (jnp.array(column, jnp.int32)[cell] for column in (lengths, pair_counts))
        context = 2 * pairs * self.passes

        # Distinct ids for the largest cell; the first of them are as distinct and as random.
        key_ids = recall.draw_distinct(for_keys, most, self.tokens.keys)
        value_ids = recall.draw_distinct(for_values, most, self.tokens.values)
        slots = recall.draw_slots(for_slots, self.power_a, (length - context) // 2, most)
        asked = jnp.arange(most) if self.coupled else recall.shuffled(for_order, pairs)

        # Where queries stand; draws beyond this cell's pairs go out of range and are dropped.
        place = jnp.where(jnp.arange(most) < pairs, context + 2 * slots, self.length)
        pair = jnp.full(self.length, -1, jnp.int32).at[place].set(asked, mode="drop")
        is_query, is_context = pair >= 0, time < context
        pair = jnp.where(is_context, (time // 2) % pairs, pair)
        outside = jnp.where(time < length, recall.FILLER, recall.PADDING)
        role = jnp.where(
            is_context,
            jnp.where(time % 2 == 0, recall.KEY, recall.VALUE),
            jnp.where(is_query, recall.QUERY, outside),
        )
        inputs = jnp.where(role == recall.VALUE, value_ids[pair], key_ids[pair])
        last_written = context - 2 * pairs + 2 * pair + 1
        return {
            "inputs": recall.add_filler(filler_key, inputs, role, self.noise, self.tokens),
            "targets": jnp.where(is_query, value_ids[pair], 0),
            "mask": is_query,
            "meta": {
                "role": role.astype(jnp.int32),
                "pair": pair,
                "lag": jnp.where(is_query, time - last_written, -1),
                "age": jnp.where(is_query, pairs - 1 - pair, -1),
                "cell": jnp.full(self.length, cell),
                "pairs": jnp.full(self.length, pairs),
            },
        }

    def slices(self, predicted: jax.Array, correct: jax.Array, batch: base.Example) -> base.Scores:
        mask, cell = batch["mask"], batch["meta"]["cell"]
        values = self.tokens.values[1]
        right = jnp.sum(correct, dtype=jnp.float32)
        asked = jnp.sum(mask, dtype=jnp.float32)
        examples = jnp.float32(mask.shape[0])
        scores = {"effective_pairs": ((values * right - asked) / (values - 1), examples)}
        for number, (length, pairs, _) in enumerate(self.cells):
            scores[f"{length}x{pairs}"] = base.share(correct, mask & (cell == number))
        return scores
