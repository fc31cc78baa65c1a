"""N-parity and delayed match, N as far as a memory comes: all N up to the newest at once.

    python experiments/timescales/windows.py [--task=NAME] [--memory=LABEL] [--steps=N] [--out=FILE]

A model (one block of 32 features, SwiGLU) sees random bits; heads on its output answer the task
`parity` with windows of N, or `delayed_match`, for N = 2, 3, ..., 50. Training starts with the
head of N = 2. A head whose answers are right more than 98 % of the time brings in the next, and
all of them go on being trained: the multi-head curriculum of Khajehabdollahi et al. 2024.
"""

import argparse
import functools
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from study import MEMORIES, RESULTS, Clock, record

from memseq.models.language_model import LanguageModel
from memseq.tasks.delayed_match import matches
from memseq.tasks.parity import ones_within

WINDOWS = np.arange(2, 51)
TIME, BATCH, FEATURES = 64, 32, 32
RATE, SOLVED = 3e-3, 0.98
TASKS = {
    "parity": lambda bits, window: ones_within(bits, window) % 2,
    "delayed_match": matches,
}
COMPARED = [label for label in MEMORIES if label != "HiPPO-LegS"]


class Heads(nn.Module):
    """Tokens [batch, time] to the log-odds of "yes" for each window [batch, time, windows]."""

    layer: str
    options: nn.FrozenDict

    @nn.compact
    def __call__(self, tokens):
        model = LanguageModel(
            vocab_size=3,
            features=FEATURES,
            pattern=(self.layer,),
            mixers={self.layer: self.options},
        )
        return nn.Dense(len(WINDOWS))(model.hidden(tokens)[0])


def train(name: str, label: str, steps: int, seed: int):
    """(newest head after each step [steps], accuracy of each window on new bits [windows])."""
    layer, options = MEMORIES[label]
    model = Heads(layer, nn.FrozenDict(options))
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(RATE))
    start, data = jax.random.split(jax.random.key(seed))
    scored = jnp.arange(TIME) >= WINDOWS[-1] - 1  # the tail, where every window is full

    def draw(key, rows):
        bits = jax.random.bernoulli(key, 0.5, (rows, TIME)).astype(jnp.int32)
        by_window = jax.vmap(TASKS[name], (None, 0), -1)
        return 1 + bits, jax.vmap(by_window, (0, None))(bits, WINDOWS).astype(jnp.float32)

    def right(odds, wanted):
        return jnp.mean((odds > 0)[:, scored] == (wanted > 0.5)[:, scored], axis=(0, 1))

    def loss(params, tokens, wanted, newest):
        odds = model.apply(params, tokens)
        each = optax.sigmoid_binary_cross_entropy(odds, wanted)[:, scored].mean((0, 1))
        active = jnp.arange(len(WINDOWS)) <= newest
        return jnp.sum(jnp.where(active, each, 0)) / jnp.sum(active), right(odds, wanted)

    @functools.partial(jax.jit, donate_argnums=0)
    def some_steps(carry, numbers):
        def step(carry, number):
            params, state, newest, level = carry
            tokens, wanted = draw(jax.random.fold_in(data, number), BATCH)
            grads, found = jax.grad(loss, has_aux=True)(params, tokens, wanted, newest)
            updates, state = optimizer.update(grads, state)
            level = 0.7 * level + 0.3 * found[newest]
            on = (level > SOLVED) & (newest < len(WINDOWS) - 1)
            newest, level = newest + on, jnp.where(on, 0.5, level)
            return (optax.apply_updates(params, updates), state, newest, level), newest

        return jax.lax.scan(step, carry, numbers)

    params = jax.jit(model.init)(start, jnp.zeros((1, TIME), jnp.int32))
    carry = (params, optimizer.init(params), jnp.int32(0), jnp.float32(0.5))
    newest = []
    for first in range(0, steps, 100):
        carry, found = some_steps(carry, jnp.arange(first, min(first + 100, steps)))
        newest += np.asarray(found).tolist()
        if first % 500 == 400:
            print(f"{name}, {label}, step {len(newest)}: N = {WINDOWS[newest[-1]]}", flush=True)
    tokens, wanted = draw(jax.random.fold_in(data, steps), 256)
    return newest, np.asarray(jax.jit(lambda p: right(model.apply(p, tokens), wanted))(carry[0]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--task", choices=TASKS, action="append")
    parser.add_argument("--memory", choices=COMPARED, action="append")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    args = parser.parse_args()
    for name in args.task or TASKS:
        for label in args.memory or COMPARED:
            clock = Clock()
            newest, accuracy = train(name, label, args.steps, args.seed)
            solved = int(np.cumprod(accuracy >= SOLVED).sum())
            line = {
                "study": "windows",
                "task": name,
                "memory": label,
                "seed": args.seed,
                "steps": args.steps,
                "solved": int(WINDOWS[solved - 1]) if solved else 0,
                "newest": WINDOWS[np.array(newest[:: max(args.steps // 50, 1)])].tolist(),
                "accuracy": [round(float(a), 3) for a in accuracy],
                "cpu_seconds": clock.seconds(),
            }
            record(line, ("study", "task", "memory", "seed", "steps"), args.out)
            print(f"{name}, {label}: up to N = {line['solved']}, {line['cpu_seconds']} s")


if __name__ == "__main__":
    main()
