"""The operations with more than one matrix, step by step in NumPy float64: see `oracles`."""

import numpy as np

from memseq.pallas_kernels.log_linear_attention import LogLinearState
from memseq.pallas_kernels.ridge_readout import RidgeState
from tests.pallas_kernels.oracles import _decay, _rows, _walk


def ridge_readout(
    query,
    key,
    value,
    beta,
    log_decay,
    ridge,
    *,
    iterations=None,
    scale=None,
    initial_state=None,
    segment_ids=None,
):
    """Both sums, then an exact solution: `iterations` means nothing here."""
    batch, time, heads, values = value.shape
    keys = key.shape[-1]
    group = heads // key.shape[2]
    scale = 1 / np.sqrt(keys) if scale is None else scale
    out = np.zeros(value.shape)
    grams, memories = np.zeros((batch, heads, keys, keys)), np.zeros((batch, heads, keys, values))
    for b, ids in enumerate(_rows(segment_ids, batch)):
        for h in range(heads):
            gram, memory = np.zeros((keys, keys)), np.zeros((keys, values))
            if initial_state is not None:
                gram, memory = (part[b, h].copy() for part in initial_state)
            for t, restart in _walk(ids, time):
                if restart:
                    gram, memory = np.zeros((keys, keys)), np.zeros((keys, values))
                k, v = key[b, t, h // group], value[b, t, h]
                kept = _decay(log_decay, b, t, h, 1)[0]
                gram = kept * gram + beta[b, t, h] * np.outer(k, k)
                memory = kept * memory + beta[b, t, h] * np.outer(k, v)
                solved = np.linalg.solve(gram + np.diag(ridge[h]), query[b, t, h // group])
                out[b, t, h] = scale * memory.T @ solved
            grams[b, h], memories[b, h] = gram, memory
    return out, RidgeState(grams, memories)


def buckets(position):
    """The levels of everything before `position`, {level: (first, past the last)}."""
    found, end = {}, position
    while end > 0:
        size = end & -end  # the lowest binary digit
        found[size.bit_length()] = (end - size, end)
        end -= size
    return found


def level_of(source, position, levels):
    """The level at which `position` reads `source`; the last also holds what is older."""
    if source == position:
        return 0
    for level, (first, end) in buckets(position).items():
        if first <= source < end:
            return min(level, levels - 1)
    raise AssertionError


def log_linear_attention(
    query,
    key,
    value,
    level_scale,
    log_decay=None,
    beta=None,
    *,
    scale=None,
    initial_state=None,
    segment_ids=None,
):
    """Every pair has a matrix of its own to the end; no memories are merged before they are read.

    An initial memory counts as a pair written at the first position of its bucket.
    """
    batch, time, heads, values = value.shape
    keys, levels = key.shape[-1], level_scale.shape[-1]
    group = heads // key.shape[2]
    scale = 1 / np.sqrt(keys) if scale is None else scale
    out = np.zeros(value.shape)
    memories = np.zeros((batch, heads, levels - 1, keys, values))
    ends = np.zeros(batch, np.int32)
    for b, ids in enumerate(_rows(segment_ids, batch)):
        for h in range(heads):
            parts, now = [], 0
            if initial_state is not None:
                now = int(initial_state.position[b])
                parts = [
                    (first, initial_state.memories[b, h, level - 1])
                    for level, (first, _) in buckets(now).items()
                ]
            for t, restart in _walk(ids, time):
                if restart:
                    parts, now = [], 0
                q, k, v = query[b, t, h // group], key[b, t, h // group], value[b, t, h]
                transition = _decay(log_decay, b, t, h, 1)[0] * np.eye(keys)
                strength = 1.0 if beta is None else beta[b, t, h]
                if beta is not None:
                    transition = transition - strength * np.outer(k, k) @ transition
                parts = [(source, transition @ memory) for source, memory in parts]
                parts.append((now, strength * np.outer(k, v)))
                for source, memory in parts:
                    weight = level_scale[b, t, h, level_of(source, now, levels)]
                    out[b, t, h] += scale * weight * q @ memory
                now += 1
            for source, memory in parts:
                memories[b, h, level_of(source, now, levels) - 1] += memory
            ends[b] = now
    return out, LogLinearState(memories, ends)
