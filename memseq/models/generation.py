"""Continuing token sequences from a state."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from memseq.models.language_model import LanguageModel
from memseq.pallas_kernels.common.checks import check_count


def generate(
    model: LanguageModel,
    params: Any,
    prompts: Sequence[Sequence[int]],
    *,
    steps: int,
    key: jax.Array,
    temperature: float = 1.0,
    top_k: int | None = None,
    state: Any = None,
) -> tuple[list[list[int]], Any]:
    """Samples `steps` tokens after each prompt; the prompts may have different lengths.

    The prompts are read in one parallel pass, then one token after another from the state, whose
    size does not change. A row's continuation does not depend on the other rows.

    Args:
        model, params: a language model, and the variables of `model.init`.
        prompts: token ids, each prompt at least one token.
        steps: number of tokens to sample for each prompt.
        key: typed PRNG key.
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: sample from the k likeliest tokens only; None from all.
        state: go on from this state, one row a prompt (see `memseq.models.state.fork`); None
            starts empty.

    Returns:
        The sampled tokens of each prompt, and the state after the last of them was read.

    Raises:
        ValueError: for options that do not fit, and for a state without room for all positions.
    """
    if not prompts or any(len(prompt) == 0 for prompt in prompts):
        raise ValueError("prompts: expected at least one prompt, each of at least one token")
    check_count("steps", steps, 1)
    if not temperature >= 0:
        raise ValueError(f"temperature: expected a number >= 0, got {temperature}")
    if top_k is not None and not 1 <= top_k <= model.vocab_size:
        raise ValueError(f"top_k: expected 1 to {model.vocab_size} (the vocabulary), got {top_k}")
    lengths = np.array([len(prompt) for prompt in prompts])
    width = -(-int(lengths.max()) // 64) * 64  # few distinct shapes, few compilations
    tokens = np.zeros((len(prompts), width), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    if tokens.min() < 0 or tokens.max() >= model.vocab_size:
        raise ValueError(
            f"prompts: expected token ids from 0 to {model.vocab_size - 1}, "
            f"got {tokens.min()} to {tokens.max()}"
        )
    if state is None:
        state = model.init_state(len(prompts), context=width + steps)
    _check_state(state, len(prompts))
    logits, state = _prefill(model, params, tokens, lengths, state)
    sampled, bad, state = _decode(model, params, logits, state, key, temperature, steps, top_k)
    if bad:
        raise ValueError(
            f"state: expected room for the prompts and {steps} tokens, got logits that are not a "
            "number (a cache of keys and values is full, or the parameters are not finite)"
        )
    return np.asarray(sampled).T.tolist(), state


def _check_state(state, rows: int) -> None:
    if any(getattr(part, "grows", False) for part in state):
        raise ValueError(
            "state: expected one of fixed size, as from model.init_state(batch, context), "
            "got a cache that grows with every call"
        )
    if _segment(state).shape != (rows,):
        raise ValueError(
            f"state: expected one row a prompt, {rows}, got {_segment(state).shape[0]}"
        )


@functools.partial(jax.jit, static_argnames="model")
def _prefill(model, params, tokens, lengths, state):
    """The logits after each row's last prompt token, and the state there."""
    padded = jnp.arange(tokens.shape[1]) >= lengths[:, None]
    # without an id of its own a row goes on with whatever segment its state is in
    segment = jnp.maximum(_segment(state), 0)
    ids = jnp.where(padded, -1, segment[:, None])
    hidden, state = model.apply(params, tokens, state, ids, lengths - 1, method="hidden")
    return model.apply(params, hidden[:, 0], method="logits"), state


def _segment(state) -> jax.Array:
    """int32 [batch]: the segment that every layer's state agrees on."""
    return state[0].segment[0]


@functools.partial(jax.jit, static_argnames=("model", "steps", "top_k"))
def _decode(model, params, logits, state, key, temperature, steps, top_k):
    def step(carry, i):
        logits, state = carry
        token = _sample(jax.random.fold_in(key, i), logits, temperature, top_k)
        bad = jnp.isnan(logits).any()
        logits, state = model.apply(params, token[:, None], state)
        return (logits[:, 0], state), (token, bad)

    (_, state), (tokens, bad) = jax.lax.scan(step, (logits, state), jnp.arange(steps))
    return tokens, bad.any(), state


def _sample(key, logits, temperature, top_k):
    """One token a row, int32 [batch], from logits [batch, vocab]."""
    if top_k is not None:
        threshold = jax.lax.top_k(logits, top_k)[0][:, -1:]
        logits = jnp.where(logits < threshold, -jnp.inf, logits)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(logits.shape[0]))
    warm = jnp.where(temperature > 0, temperature, 1.0)
    drawn = jax.vmap(jax.random.categorical)(keys, logits / warm)
    return jnp.where(temperature > 0, drawn, jnp.argmax(logits, -1)).astype(jnp.int32)
