"""The elementwise recurrences once more, step by step in NumPy float64: see `oracles`.

Every function reads one row and position after another; `segment_ids` restart the memory where the
last valid id changes.
"""

import numpy as np

from tests.pallas_kernels.oracles import _rows, _walk


def _now(gate, b, t):
    return gate if gate.ndim == 1 else gate[b, t]


def linear_scan(x, log_decay, *, sign=None, phase=None, initial_state=None, segment_ids=None):
    batch, _, channels = x.shape
    dtype = np.result_type(x, np.float64 if phase is None else np.complex128)
    out = np.zeros(x.shape, dtype)
    states = np.zeros((batch, channels), dtype)
    for b, ids in enumerate(_rows(segment_ids, batch)):
        memory = np.zeros(channels, dtype)
        if initial_state is not None:
            memory = memory + initial_state[b]
        for t, restart in _walk(ids, x.shape[1]):
            kept = np.exp(_now(log_decay, b, t))
            if sign is not None:
                kept = kept * _now(sign, b, t)
            if phase is not None:
                angle = _now(phase, b, t)
                kept = kept * (np.cos(angle) + 1j * np.sin(angle))
            memory = x[b, t] + (0 if restart else kept * memory)
            out[b, t] = memory
        states[b] = memory
    return out, states


def selective_scan(x, dt, A, B, C, D=None, *, initial_state=None, segment_ids=None):
    batch, time, channels = x.shape
    B, C = (y[:, :, None] if y.ndim == 3 else y for y in (B, C))
    group = channels // B.shape[2]
    y = np.zeros(x.shape)
    states = np.zeros((batch, *A.shape))
    for b, ids in enumerate(_rows(segment_ids, batch)):
        for c in range(channels):
            memory = np.zeros(A.shape[1])
            if initial_state is not None:
                memory = initial_state[b, c]
            for t, restart in _walk(ids, time):
                memory = 0 if restart else np.exp(dt[b, t, c] * A[c]) * memory
                memory = memory + dt[b, t, c] * x[b, t, c] * B[b, t, c // group]
                y[b, t, c] = C[b, t, c // group] @ memory
                if D is not None:
                    y[b, t, c] += D[c] * x[b, t, c]
            states[b, c] = memory
    return y, states
