"""What the recall tasks share: token ranges, where queries fall, filler and what it can cost.

A recall example is a context of pairs `key value key value ...` followed by a query region of
two-token slots. A query stands at the first token of its slot; its answer is the label of that same
position and is not fed back. All other tokens of the region are filler.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from memseq.tasks.base import check_integer, check_name

ROLES = ("filler", "key", "value", "query", "padding")
FILLER, KEY, VALUE, QUERY, PADDING = range(len(ROLES))
NOISE = ("zero", "disjoint", "random")


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Ranges of token ids: (first, how many) of keys, values and filler."""

    keys: tuple[int, int]
    values: tuple[int, int]
    filler: tuple[int, int]


def token_ranges(vocab_size: int, noise: str, filler_tokens: int) -> Tokens:
    """0 is filler, the lower half keys, the upper half values, as in zoology.

    With `noise="random"` filler is drawn from the whole vocabulary; with "disjoint" the last
    `filler_tokens` ids are filler's own and the halves are those of the rest; with "zero" filler is
    always 0.
    """
    check_integer("vocab_size", vocab_size, 4)
    check_name("noise", noise, NOISE)
    check_integer("filler_tokens", filler_tokens, 1)
    used = vocab_size - filler_tokens if noise == "disjoint" else vocab_size
    if used < 4:
        raise ValueError(
            f"filler_tokens: {filler_tokens} of a vocabulary of {vocab_size} leave {used} ids for "
            "keys and values; at least 4 are needed"
        )
    half = used // 2
    filler = {"zero": (0, 1), "disjoint": (used, filler_tokens), "random": (0, vocab_size)}[noise]
    return Tokens(keys=(1, half - 1), values=(half, used - half), filler=filler)


def check_enough(argument: str, keys: int, values: int, tokens: Tokens) -> None:
    """Raises `ValueError` when there are too few ids for that many different keys or values."""
    for kind, needed, there in (
        ("keys", keys, tokens.keys[1]),
        ("values", values, tokens.values[1]),
    ):
        if needed > there:
            raise ValueError(
                f"{argument}: needs {needed} different {kind}, but the vocabulary has {there}"
            )


def uniform_parts(key: jax.Array, *shapes: tuple[int, ...]) -> list[jax.Array]:
    """Independent uniform numbers of (0, 1), float32, one array of each shape.

    They come from one call of the generator, as each costs a quarter of a second to compile.
    """
    sizes = [math.prod(shape) for shape in shapes]
    drawn = jax.random.uniform(key, (sum(sizes),), minval=jnp.finfo(jnp.float32).tiny)
    starts = np.cumsum([0, *sizes])
    return [
        drawn[start : start + size].reshape(shape)
        for start, size, shape in zip(starts, sizes, shapes, strict=False)
    ]


def draw_distinct(uniform: jax.Array, count: int, token_range: tuple[int, int]) -> jax.Array:
    """`count` different ids of a range, int32 `[count]`, every ordered choice equally likely.

    `uniform` holds one number for each id of the range.
    """
    return token_range[0] + jax.lax.top_k(uniform, count)[1]


def draw_slots(uniform: jax.Array, power_a: float, slots, most_queries: int) -> jax.Array:
    """Different slots in the order in which they are drawn, int32 `[most_queries]`.

    Slot i, from 0 and below `slots`, is drawn among those left with probability proportional to
    `(i + 1) ** (power_a - 1)`: close to 1/(i + 1) for zoology's 0.01, uniform for 1. To add Gumbel
    noise to log-weights and to sort is that law exactly. Entries from the `slots`-th on are
    meaningless. `uniform` holds one number for each slot that there could be.
    """
    index = jnp.arange(uniform.size)
    log_weight = (power_a - 1.0) * jnp.log1p(index.astype(jnp.float32))
    noisy = log_weight - jnp.log(-jnp.log(uniform))
    return jax.lax.top_k(jnp.where(index < slots, noisy, -jnp.inf), most_queries)[1]


def shuffled(uniform: jax.Array, count) -> jax.Array:
    """0 .. count-1 in random order, then the other indices of `uniform`, int32 `[uniform.size]`."""
    index = jnp.arange(uniform.size)
    return jnp.argsort(jnp.where(index < count, uniform, 2.0 + index))


def add_filler(
    key: jax.Array, inputs: jax.Array, role: jax.Array, noise: str, tokens: Tokens
) -> jax.Array:
    """`inputs` with the filler positions drawn as `noise` says; padding becomes 0."""
    first, size = tokens.filler
    drawn = first + jax.random.randint(key, inputs.shape, 0, size, dtype=jnp.int32)
    filler = jnp.zeros_like(inputs) if noise == "zero" else drawn
    return jnp.where(role == FILLER, filler, jnp.where(role == PADDING, 0, inputs))


@functools.lru_cache(maxsize=256)
def overwriting_accuracy(
    slots: int, queries: int, power_a: float, lead: int, tokens: Tokens
) -> float:
    """Accuracy under `noise="random"` of a perfect memory that takes filler for pairs, exactly.

    That memory stores every bigram of a key id and a value id, wherever it stands, and the latest
    one wins. It errs when filler has formed `asked key, wrong value` between the pair and the
    query.

    The `queries` drawn slots are those of `queries` exponential clocks (rate = the slot's weight)
    that ring first, so given the time of the last of them all slots are independent. The function
    walks over the slots with the number of queries so far, whether the last ring was among them and
    whether the previous token is the asked key, and integrates over that time (trapezoid rule in
    its logarithm, which converges exponentially here).

    Args:
        slots, queries, power_a: as in `draw_slots`, for one size of example.
        lead: slots of filler between the context and the first slot that can hold a query.
        tokens: the ranges.
    """
    vocabulary = tokens.filler[1]
    is_key, is_value = 1.0 / vocabulary, tokens.values[1] / vocabulary
    # One filler token, if it forms no pair: from and to (previous is not the key, it is the key).
    step = np.array([[1 - is_key, is_key], [1 - is_key - is_value, is_key]])
    # The query of another key is neither the asked key nor a value.
    other_query = np.array([[1.0, 0.0], [1.0, 0.0]])
    start = np.array([1.0, 0.0]) @ np.linalg.matrix_power(step, 2 * lead)
    if slots == queries:  # no slot is left for filler, and its second token is followed by a key
        clean = start.sum()
        return float(clean + (1 - clean) / tokens.values[1])
    weight = np.arange(1.0, slots + 1) ** (power_a - 1.0)
    time = np.exp(np.linspace(-40.0, np.log(60.0 / weight.min()), 300))
    # Axes: time of the last ring, queries so far, is the last ring among them, previous token.
    before = np.zeros((time.size, queries + 1, 2, 2))  # the asked slot is still to come
    before[:, 0, 0] = start
    asked = np.zeros((time.size, queries + 1, 2))  # it has been, and no wrong pair had formed

    def after(w: float, left: np.ndarray, drawn: np.ndarray) -> np.ndarray:
        """The state after a slot of weight w: from `left` if it is not drawn, else from `drawn`."""
        silent = np.exp(-w * time).reshape(-1, *[1] * (left.ndim - 1))
        state = left * silent
        state[:, 1:] += drawn[:, :-1] * (1 - silent)
        state[:, 1:, 1] += drawn[:, :-1, 0] * (w * silent)[:, :, 0]
        return state

    for w in weight:
        here = after(w, np.zeros_like(asked), before.sum(axis=-1))
        asked = after(w, asked, asked) + here
        before = after(w, before @ step @ step, before @ other_query @ step)
    # Every query may be the asked one, hence the division; d time = time d log(time).
    clean = np.trapezoid(asked[:, queries, 1] * time, np.log(time)) / queries
    # The value of the latest pair in the filler is uniform, so now and then it is the right one.
    return float(clean + (1 - clean) / tokens.values[1])
