"""Capacity curves, metastable states and half-masked retrieval, without any training.

    python experiments/hopfield/capacity.py

Writes capacity.png and results/capacity.json into this folder. Everything is one or a few steps of
`hopfield_retrieve`; the measures are those of `memseq.evaluation.theory`.
"""

import json
import pathlib

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from memseq.evaluation import theory
from memseq.layers import ClassicalHopfield, DenseAssociativeMemory
from memseq.pallas_kernels import hopfield_retrieve

HERE = pathlib.Path(__file__).parent
PATTERNS = 4000
DIMS = (4, 8, 12, 16, 20, 32)
SETTINGS = ((1, 1.0), (1, 2.0), (3, 1.0))  # (radius factor K, beta)
BETAS = (0.01, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 4.0)
K90_BETAS = (0.001, 0.01, 0.03, 0.1, 0.2, 0.5)
COUNTS = (100, 300, 1000, 3000)


def sphere(rng, patterns, dim, radius):
    x = rng.normal(size=(patterns, dim))
    return (radius * x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def capacity_curve(radius_factor: float, beta: float) -> dict[int, float]:
    """Dimension -> share of noisy patterns that one step brings within a tenth of the radius."""
    found = {}
    for dim in DIMS:
        rng = np.random.default_rng(0)
        radius = radius_factor * np.sqrt(dim - 1)
        stored = sphere(rng, PATTERNS, dim, radius)
        noisy = stored + 0.3 * rng.normal(size=stored.shape).astype(np.float32)
        out = hopfield_retrieve(noisy[None, :, None], stored[None, :, None], beta=beta)[0, :, 0]
        error = np.linalg.norm(np.asarray(out) - stored, axis=1)
        found[dim] = float((error < 0.1 * radius).mean())
    return found


def clusters() -> np.ndarray:
    """16 clusters of 16 patterns: centres on a sphere of radius 8 in 64 dimensions."""
    rng = np.random.default_rng(0)
    centres = sphere(rng, 16, 64, 8.0)
    return (centres[:, None] + 0.25 * rng.normal(size=(16, 16, 64))).reshape(256, 64)


def half_masked(correlation: float) -> dict[str, dict[int, float]]:
    """Method -> number of patterns -> share found (cosine above 0.95) from half of a pattern.

    Patterns of +-1 in 784 dimensions; any two have this correlation on average.
    """
    rng = np.random.default_rng(0)
    methods = {
        "Hebb": None,
        "polynomial, power 10": None,
        "softmax, beta 0.01": {"separation": "softmax", "beta": 0.01},
        "softmax, beta 0.05": {"separation": "softmax", "beta": 0.05},
        "1.5-entmax, beta 0.01": {"separation": "entmax", "beta": 0.01},
        "sparsemax, beta 0.01": {"separation": "sparsemax", "beta": 0.01},
    }
    found = {name: {} for name in methods}
    for count in COUNTS:
        shared = rng.choice([-1.0, 1.0], size=784)
        same = rng.random((count, 784)) < (1 + np.sqrt(correlation)) / 2
        stored = np.where(same, shared, -shared).astype(np.float32)
        probes = stored[:100].copy()
        probes[:, 392:] = 0
        for name, options in methods.items():
            if name == "Hebb":
                layer = ClassicalHopfield()
                weights = layer.apply({}, stored, method="store")
                ends = layer.apply({}, probes, weights, method="step")
            elif options is None:
                layer = DenseAssociativeMemory(784, kind="polynomial", power=10)
                ends = layer.apply({}, probes[None] / 784, stored=stored)[0]
            else:
                arrays = probes[None, :, None], stored[None, :, None]
                ends = jax.jit(lambda q, y, o=options: hopfield_retrieve(q, y, **o))(*arrays)
                ends = ends[0, :, 0]
            ends = np.asarray(ends)
            cosine = (ends * stored[:100]).sum(1) / jnp.linalg.norm(ends, axis=1) / 28
            found[name][count] = float((np.asarray(cosine) > 0.95).mean())
    return found


def draw(results: dict, path: pathlib.Path) -> None:
    figure = plt.figure(figsize=(13, 6.4), layout="constrained")
    grid = figure.add_gridspec(2, 6)
    panels = [figure.add_subplot(grid[0, 2 * i : 2 * i + 2]) for i in range(3)]
    for name, curve in results["capacity"].items():
        panels[0].plot(list(curve), list(curve.values()), "o-", label=name)
    panels[0].set(title=f"{PATTERNS:,} patterns, one step", xlabel="dimension", ylabel="found")
    panels[0].legend(frameon=False)
    fixed = results["fixed_points"]
    panels[1].semilogx(list(fixed), list(fixed.values()), "o-", color="C3")
    for level in (1, 16, 256):
        panels[1].axhline(level, color="0.85", zorder=0)
    panels[1].set(title="16 clusters of 16", xlabel="beta", ylabel="fixed points", yscale="log")
    k90 = results["k90"]
    panels[2].semilogx(list(k90), list(k90.values()), "o-", color="C2")
    panels[2].set(title="256 patterns", xlabel="beta", ylabel="patterns with 90 % of the weight")
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
    for i, (correlation, methods) in enumerate(results["half_masked"].items()):
        panel = figure.add_subplot(grid[1, 3 * i : 3 * i + 3])
        table = np.array([list(curve.values()) for curve in methods.values()])
        panel.imshow(table, cmap="Blues", vmin=0, vmax=1.4, aspect="auto")
        for row, column in np.ndindex(*table.shape):
            panel.text(column, row, f"{table[row, column]:.2f}", ha="center", va="center")
        panel.set_xticks(range(len(COUNTS)), [f"{count:,}" for count in COUNTS])
        panel.set_yticks(range(len(methods)), list(methods))
        panel.set(title=f"found from half a pattern, correlation {correlation}", xlabel="patterns")
    figure.savefig(path, dpi=90)


def main() -> None:
    stored = clusters()
    spread = sphere(np.random.default_rng(0), 256, 64, 8.0)
    results = {
        "capacity": {f"K={k}, beta={beta:g}": capacity_curve(k, beta) for k, beta in SETTINGS},
        "fixed_points": {beta: len(theory.fixed_points(stored, beta)) for beta in BETAS},
        "k90": {
            beta: float(theory.k90(theory.weights(spread, spread, beta)).mean())
            for beta in K90_BETAS
        },
        "half_masked": {rho: half_masked(rho) for rho in (0.0, 0.8)},
    }
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / "results" / "capacity.json").write_text(json.dumps(results, indent=1) + "\n")
    draw(results, HERE / "capacity.png")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
