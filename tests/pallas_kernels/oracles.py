"""The operations once more, step by step in NumPy float64, written from the equations alone.

Every function reads one row, head and position after another. Arguments and results are those of
the operations; `segment_ids` restart the memory where the last valid id changes.
"""

import numpy as np


def _walk(ids, time):
    """Yields (t, restart) for the valid positions of one row."""
    last = None
    for t in range(time):
        if ids is not None and ids[t] < 0:
            continue
        now = None if ids is None else ids[t]
        yield t, last is not None and now != last
        last = now


def _rows(segment_ids, batch):
    return [None] * batch if segment_ids is None else list(segment_ids)


def _decay(log_decay, b, t, h, channels):
    if log_decay is None:
        return np.ones(channels)
    g = log_decay[h] if log_decay.ndim == 1 else log_decay[b, t, h]
    return np.exp(g) * np.ones(channels)


def linear_attention(
    query,
    key,
    value,
    log_decay=None,
    *,
    value_log_decay=None,
    bonus=None,
    scale=None,
    initial_state=None,
    segment_ids=None,
):
    batch, time, heads, values = value.shape
    keys = key.shape[-1]
    group = heads // key.shape[2]
    scale = 1 / np.sqrt(keys) if scale is None else scale
    out = np.zeros(value.shape)
    states = np.zeros((batch, heads, keys, values))
    for b, ids in enumerate(_rows(segment_ids, batch)):
        for h in range(heads):
            memory = np.zeros((keys, values))
            if initial_state is not None:
                memory = initial_state[b, h].copy()
            for t, restart in _walk(ids, time):
                if restart:
                    memory = np.zeros((keys, values))
                q, k, v = query[b, t, h // group], key[b, t, h // group], value[b, t, h]
                before = memory
                memory = _decay(log_decay, b, t, h, keys)[:, None] * memory
                memory = memory * _decay(value_log_decay, b, t, h, values)
                memory = memory + np.outer(k, v)
                if bonus is None:
                    out[b, t, h] = scale * q @ memory
                else:
                    out[b, t, h] = scale * q @ (before + np.outer(bonus[h] * k, v))
            states[b, h] = memory
    return out, states


def delta_rule(
    query,
    key,
    value,
    beta,
    log_decay=None,
    *,
    erase_key=None,
    erase="decayed",
    scale=None,
    initial_state=None,
    segment_ids=None,
):
    batch, time, heads, values = value.shape
    keys = key.shape[-1]
    group = heads // key.shape[2]
    scale = 1 / np.sqrt(keys) if scale is None else scale
    erase_key = key if erase_key is None else erase_key
    out = np.zeros(value.shape)
    states = np.zeros((batch, heads, keys, values))
    for b, ids in enumerate(_rows(segment_ids, batch)):
        for h in range(heads):
            memory = np.zeros((keys, values))
            if initial_state is not None:
                memory = initial_state[b, h].copy()
            for t, restart in _walk(ids, time):
                if restart:
                    memory = np.zeros((keys, values))
                decayed = _decay(log_decay, b, t, h, keys)[:, None] * memory
                held = erase_key[b, t, h // group] @ (decayed if erase == "decayed" else memory)
                error = value[b, t, h] - held
                memory = decayed + beta[b, t, h] * np.outer(key[b, t, h // group], error)
                out[b, t, h] = scale * query[b, t, h // group] @ memory
            states[b, h] = memory
    return out, states


def momentum_delta_rule(
    query,
    key,
    value,
    beta,
    step,
    log_momentum,
    log_decay=None,
    *,
    erase="decayed",
    scale=None,
    initial_state=None,
    segment_ids=None,
):
    batch, time, heads, values = value.shape
    keys = key.shape[-1]
    group = heads // key.shape[2]
    scale = 1 / np.sqrt(keys) if scale is None else scale
    out = np.zeros(value.shape)
    states = np.zeros((batch, heads, 2 * keys, values))
    for b, ids in enumerate(_rows(segment_ids, batch)):
        for h in range(heads):
            memory, momentum = np.zeros((2, keys, values))
            if initial_state is not None:
                memory, momentum = initial_state[b, h, :keys], initial_state[b, h, keys:]
            for t, restart in _walk(ids, time):
                if restart:
                    memory, momentum = np.zeros((2, keys, values))
                k = key[b, t, h // group]
                decayed = _decay(log_decay, b, t, h, 1) * memory
                error = value[b, t, h] - k @ (decayed if erase == "decayed" else memory)
                momentum = _decay(log_momentum, b, t, h, 1) * momentum
                momentum = momentum + step[b, t, h] * np.outer(k, error)
                memory = decayed + beta[b, t, h] * momentum
                out[b, t, h] = scale * query[b, t, h // group] @ memory
            states[b, h] = np.concatenate([memory, momentum])
    return out, states


def causal_conv(x, kernel, bias=None, *, activation=None, initial_state=None, segment_ids=None):
    batch, time, channels = x.shape
    width = len(kernel)
    y = np.zeros(x.shape)
    states = np.zeros((batch, width - 1, channels))
    for b, ids in enumerate(_rows(segment_ids, batch)):
        empty = [np.zeros(channels)] * (width - 1)
        tail = empty if initial_state is None else list(initial_state[b])
        for t, restart in _walk(ids, time):
            window = [*(empty if restart else tail), x[b, t]]
            total = sum(tap * past for tap, past in zip(kernel, window, strict=True))
            total = total + (0 if bias is None else bias)
            if activation == "silu":
                total = total / (1 + np.exp(-total))
            elif activation == "gelu":
                inner = np.sqrt(2 / np.pi) * (total + 0.044715 * total**3)
                total = 0.5 * total * (1 + np.tanh(inner))
            elif activation == "relu":
                total = np.maximum(total, 0)
            y[b, t] = total
            tail = window[1:]
        states[b] = np.reshape(tail, (width - 1, channels))
    return y, states


def attention(
    query,
    key,
    value,
    *,
    query_positions,
    key_positions,
    query_segments=None,
    key_segments=None,
    scale=None,
    causal=True,
    window=None,
    sinks=None,
    sink_tokens=0,
    log_forget=None,
):
    """Positions are not optional here; segments are compared by their ids."""
    batch, queries, heads, dim = query.shape
    keys = key.shape[1]
    group = heads // key.shape[2]
    scale = 1 / np.sqrt(dim) if scale is None else scale
    out = np.zeros((batch, queries, heads, value.shape[-1]))
    if query_segments is None:
        query_segments, key_segments = np.zeros((batch, queries)), np.zeros((batch, keys))
    for b in range(batch):
        for i in range(queries):
            own = (key_segments[b] == query_segments[b, i]) & (key_segments[b] >= 0)
            position = query_positions[b, i]
            seen = []
            for j in np.flatnonzero(own):
                distance = position - key_positions[b, j]
                if causal and distance < 0:
                    continue
                if window is not None and distance >= window and key_positions[b, j] >= sink_tokens:
                    continue
                seen.append(j)
            for h in range(heads):
                logits = []
                for j in seen:
                    logit = scale * query[b, i, h] @ key[b, j, h // group]
                    if log_forget is not None:
                        between = own & (key_positions[b] > key_positions[b, j])
                        between &= key_positions[b] <= position
                        logit += log_forget[b, between, h].sum()
                    logits.append(logit)
                if not seen:
                    continue
                terms = np.array(logits if sinks is None else [*logits, sinks[h]])
                weights = np.exp(terms - terms.max())
                weights = (weights / weights.sum())[: len(seen)]
                out[b, i, h] = weights @ value[b, seen, h // group]
    return out
