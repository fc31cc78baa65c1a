"""How much of an input is left after a lag, in layers as they start: no training.

    python experiments/timescales/retention.py [--out=FILE]

For each memory, two curves against the lag, from inputs of white noise:

- `gradient`: the Frobenius norm of d out[t + lag] / d x[t], relative to that at lag 1; by
  forward mode, along random directions of x[t];
- `probe`: the share of the variance of a signal u[t] that a linear read-out of out[t + lag],
  fitted by ridge regression, explains on sequences it was not fitted to. u is one direction of
  the input; the sum over lags is the memory capacity, at most the number of features.
"""

import argparse
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from study import MEMORIES, RESULTS, Clock, record

from memseq.layers import REGISTRY
from memseq.layers.recurrent.reservoir import ridge

FEATURES, START, LAGS = 32, 256, 1024
DIRECTIONS, ROWS = 8, 4
PROBE_TIME, PROBE_LAGS = 2048, 512
KEPT = [0, *sorted({round(2 ** (k / 4)) for k in range(41)})]  # lags that are written down


def gradient(layer, params) -> np.ndarray:
    """[LAGS + 1]: root mean square over rows and directions v of |d out[t + lag] / d x[t] . v|."""
    keys = jax.random.split(jax.random.key(1))
    x = jax.random.normal(keys[0], (ROWS, START + LAGS + 1, FEATURES))
    directions = jax.random.normal(keys[1], (DIRECTIONS, ROWS, FEATURES))

    @jax.jit
    def change(direction):
        tangent = jnp.zeros_like(x).at[:, START].set(direction)
        _, (out, _) = jax.jvp(lambda x: layer.apply(params, x), (x,), (tangent,))
        return jnp.sum(out[:, START:] ** 2, axis=-1).mean(0)

    return np.sqrt(np.mean([change(direction) for direction in directions], axis=0))


def probe(layer, params) -> np.ndarray:
    """[PROBE_LAGS + 1]: share of the variance of u[t - lag] explained by out[t], held out."""
    rng = np.random.default_rng(0)
    signal = rng.normal(size=(8, PROBE_TIME))
    direction = rng.normal(size=FEATURES)
    x = jnp.asarray(signal[..., None] * direction, jnp.float32)
    out = np.asarray(jax.jit(layer.apply)(params, x)[0], np.float64)
    out = (out - out.mean((0, 1))) / (out.std((0, 1)) + 1e-12)
    out = np.concatenate([out, np.ones_like(out[..., :1])], axis=-1)[:, PROBE_LAGS:]
    wanted = np.stack(
        [signal[:, PROBE_LAGS - lag : PROBE_TIME - lag] for lag in range(PROBE_LAGS + 1)], axis=-1
    )
    with jax.enable_x64(True):
        weights = np.asarray(
            ridge(
                jnp.asarray(out[:6].reshape(-1, out.shape[-1])),
                jnp.asarray(wanted[:6].reshape(-1, wanted.shape[-1])),
            )
        )
    error = ((out[6:] @ weights - wanted[6:]) ** 2).mean((0, 1))
    return 1 - error / wanted[6:].var((0, 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    args = parser.parse_args()
    for label, (name, options) in MEMORIES.items():
        clock = Clock()
        layer = REGISTRY[name](FEATURES, implementation="chunked", **options)
        params = jax.jit(layer.init)(jax.random.key(0), jnp.zeros((1, 32, FEATURES)))
        by_lag, explained = gradient(layer, params), probe(layer, params)
        line = {
            "study": "retention",
            "memory": label,
            "lags": KEPT,
            "gradient": [float(by_lag[lag] / by_lag[1]) for lag in KEPT],
            "probe_lags": [lag for lag in KEPT if lag <= PROBE_LAGS],
            "probe": [round(float(explained[lag]), 4) for lag in KEPT if lag <= PROBE_LAGS],
            "capacity": round(float(np.maximum(explained[1:], 0).sum()), 2),
            "state_bytes": layer.state_bytes(),
            "cpu_seconds": clock.seconds(),
        }
        record(line, ("study", "memory"), args.out)
        at = {lag: f"{by_lag[lag] / by_lag[1]:.1e}" for lag in (16, 128, 1024)}
        print(label, at, "capacity", line["capacity"], f"{line['cpu_seconds']} s", flush=True)


if __name__ == "__main__":
    main()
