"""Training on 4,096 tokens at default settings: how many of 500 steps had to be skipped.

Slow tests, some minutes each on a core, and slower where XLA does not optimise, so run them as

    XLA_FLAGS= scripts/test -n0 -s -m slow tests/layers/test_neural_memory_long.py -k "default"

`-k` takes a part: the name of a preset, "default" or "depth_3", "float32" or "bfloat16".
"""

import argparse
import functools
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memseq.layers import REGISTRY
from memseq.models import LanguageModel
from memseq.training.optimizers import make_optimizer
from memseq.training.state import initial_state
from memseq.training.step import make_train_step
from tests.training.stand_in import options

TIME, STEPS, FEATURES, VOCABULARY = 4096, 500, 32, 128

# The layers, and the depths of their memory networks beside the default. TTTLinear with two layers
# is TTTMLP; NeuralMemory is TitansLMM.
DEPTHS = {
    "titans_lmm": (1, 3, 4),
    "titans_mag": (1, 3, 4),
    "titans_mal": (1, 3, 4),
    "titans_mac": (1, 3, 4),
    "ttt_linear": (),
    "ttt_mlp": (3, 4),
    "moneta": (1, 3, 4),
    "yaad": (1, 3, 4),
    "memora": (1, 3, 4),
    "omega_net": (1, 3, 4),
}
CASES = [(name, None) for name in DEPTHS]
CASES += [(name, depth) for name, depths in DEPTHS.items() for depth in depths]


@functools.cache
def text() -> np.ndarray:
    """Source of a module of Python's own library: ASCII, about 100,000 tokens."""
    return np.frombuffer(pathlib.Path(argparse.__file__).read_bytes(), np.uint8) % VOCABULARY


def batch(rng: np.random.Generator) -> dict[str, np.ndarray]:
    start = rng.integers(len(text()) - TIME)
    row = text()[None, start : start + TIME + 1].astype(np.int32)
    return {
        "tokens": row[:, :-1],
        "targets": row[:, 1:],
        "segment_ids": np.zeros((1, TIME), np.int32),
        "weights": np.ones((1, TIME), np.float32),
    }


def mixer_options(name: str, depth: int | None) -> dict:
    if depth is None:
        return {}
    beside_attention = hasattr(REGISTRY[name], "memory_options")
    return {"memory_options": (("depth", depth),)} if beside_attention else {"depth": depth}


def train(name, depth, dtype, steps=STEPS) -> tuple[int, np.ndarray, np.ndarray]:
    """(steps skipped, losses [steps] in nats, norms of gradients before clipping [steps])."""
    model = LanguageModel(
        VOCABULARY,
        FEATURES,
        pattern=(name,),
        mixers={name: mixer_options(name, depth)},
        channel=None,
        dtype=dtype,
    )
    optimizer, schedule = make_optimizer(options(learning_rate=3e-3, warmup_steps=20), steps)
    state = jax.jit(lambda: initial_state(model, optimizer, 0, 2))()
    step, rng, rows = make_train_step(model, optimizer, schedule), np.random.default_rng(0), []
    for _ in range(steps):
        state, metrics = step(state, batch(rng))
        rows.append(metrics)
    rows = jax.device_get(rows)
    losses, norms = (np.array([row[key] for row in rows]) for key in ("loss", "grad_norm"))
    return int(rows[-1]["skipped"]), losses, norms


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [None, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("name", "depth"),
    CASES,
    ids=[f"{name}-{'default' if depth is None else f'depth_{depth}'}" for name, depth in CASES],
)
def test_500_steps_of_4096_tokens(name, depth, dtype):
    began = time.process_time()
    skipped, losses, norms = train(name, depth, dtype)
    case = f"{name}, depth {depth or 'default'}, {'bfloat16' if dtype else 'float32'}"
    print(
        f"\n{case}: {skipped} of {STEPS} skipped, nats a byte {losses[:50].mean():.3f} to "
        f"{losses[-50:].mean():.3f}, largest gradient {np.nanmax(norms):.3g}, "
        f"{time.process_time() - began:.0f} CPU-seconds",
        flush=True,
    )
    assert skipped == 0
    assert np.isfinite(losses).all() and losses[-50:].mean() < losses[:50].mean() - 0.5
