"""How far the capacity curve's plateau (20 dimensions, K = 1, beta = 1) is luck: ten seeds.

    python experiments/hopfield/plateau.py

Writes results/plateau.json: of each seed the share of all 4,000 probes that one step finds, and of
each 1,000 of them. The same equations as `capacity.py`, in NumPy and float64.
"""

import json
import pathlib

import numpy as np

PATTERNS, DIM, PART = 4000, 20, 1000


def found(seed: int) -> np.ndarray:
    """bool [PATTERNS]: does one step bring the noisy pattern within a tenth of the radius?"""
    rng = np.random.default_rng(seed)
    radius = np.sqrt(DIM - 1)
    stored = rng.normal(size=(PATTERNS, DIM))
    stored *= radius / np.linalg.norm(stored, axis=1, keepdims=True)
    scores = (stored + 0.3 * rng.normal(size=stored.shape)) @ stored.T
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    out = weights @ stored / weights.sum(axis=1, keepdims=True)
    return np.linalg.norm(out - stored, axis=1) < 0.1 * radius


def main():
    rows = []
    for seed in range(10):
        shares = found(seed).reshape(-1, PART).mean(axis=1)
        rows.append({"seed": seed, "all": shares.mean(), "parts": shares.tolist()})
        print(rows[-1])
    everywhere = np.array([row["all"] for row in rows])
    parts = np.array([row["parts"] for row in rows])
    print(f"all: {everywhere.min():.4f} to {everywhere.max():.4f}, mean {everywhere.mean():.4f}")
    print(f"of {PART}: {parts.min():.3f} to {parts.max():.3f}, deviation {parts.std():.4f}")
    results = pathlib.Path(__file__).parent / "results" / "plateau.json"
    results.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
