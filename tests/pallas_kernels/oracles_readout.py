"""The operations with more than one matrix, step by step in NumPy float64: see `oracles`."""

import numpy as np

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
