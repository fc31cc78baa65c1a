"""Selective copying and induction heads, trained up to 256 tokens and tested up to 65,536.

    python experiments/timescales/streams.py [--task=NAME] [--memory=LABEL] [--seconds=N]

Two blocks of 32 features without channel layers, half as wide as in Gu and Dao 2023
(arXiv:2312.00752). Training goes through lengths of 16, 64 and 256. It leaves the first two when
the last 20 steps were 99 % right, or when their share of the CPU-seconds is spent; the last takes
all of its own. Tests run as streams of 256 tokens a call, through the state.
"""

import argparse
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
from study import RESULTS, Clock, record

from memseq import tasks
from memseq.models.language_model import LanguageModel
from memseq.training.copies import scored_loss

LENGTHS, SHARES = (16, 64, 256), (0.15, 0.25, 0.6)
TESTS = (64, 256, 1024, 4096, 16_384, 65_536)
TOKENS, TEST_TOKENS, CALL = 1024, 2**19, 256
ITEMS = 8
MEMORIES = {"Mamba": "mamba", "Mamba-2": "mamba2"}
OPTIONS = {"mamba": {}, "mamba2": {"state_dim": 16, "heads": 4}}


def induction_heads(length: int):
    return tasks.get("induction_heads", length=length)


def selective_copying(length: int):
    """`length` counts the answers; the shortest has fewer data tokens."""
    items = min(ITEMS, length // 4)
    return tasks.get("selective_copying", context=length - items, items=items)


TASKS = {"induction_heads": induction_heads, "selective_copying": selective_copying}


def train(model, make, seconds: float, rate: float, seed: int):
    """(parameters, [(length, steps, accuracy of the last 20 steps)])."""
    start, data = jax.random.split(jax.random.key(seed))
    params = jax.jit(model.init)(start, jnp.zeros((1, 16), jnp.int32))
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))
    state, log = optimizer.init(params), []
    for length, share in zip(LENGTHS, SHARES, strict=True):
        task, clock, found = make(length), Clock(), []
        key = jax.random.fold_in(data, length)

        def loss(params, batch):
            logits, _ = model.apply(params, batch["inputs"])
            hits = (logits.argmax(-1) == batch["targets"]) & batch["mask"]
            value = scored_loss(logits, batch["targets"], batch["mask"])
            return value, hits.sum() / batch["mask"].sum()

        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def some_steps(params, state, first, task=task, key=key, loss=loss, length=length):
            def step(carry, number):
                params, state = carry
                batch = task.batch(key, "train", number, TOKENS // length)
                grads, right = jax.grad(loss, has_aux=True)(params, batch)
                updates, state = optimizer.update(grads, state, params)
                return (optax.apply_updates(params, updates), state), right

            return jax.lax.scan(step, (params, state), first + jnp.arange(20))

        while not found or clock.seconds() < share * seconds:
            (params, state), right = some_steps(params, state, len(found))
            found += np.asarray(right).tolist()
            if length < LENGTHS[-1] and np.mean(found[-20:]) >= 0.99:
                break
            if len(found) % 200 == 0:
                print(
                    f"  length {length}, step {len(found)}: {np.mean(found[-20:]):.3f}", flush=True
                )
        log.append((length, len(found), round(float(np.mean(found[-20:])), 4)))
    return params, log


def stream(model, params, task) -> dict[str, float]:
    """Scores of the first 16 to 64 test examples, read `CALL` tokens at a time."""
    rows = min(max(TEST_TOKENS // task.length, 16), 64)
    batch = jax.jit(lambda: task.batch(jax.random.key(0), "test", 0, rows))()
    state, predicted = model.init_state(rows), []
    call = _call(model)
    for tokens in np.split(batch["inputs"], range(CALL, task.length, CALL), axis=1):
        answers, state = call(params, tokens, state)
        predicted.append(np.asarray(answers))
    scores = task.scores(jnp.asarray(np.concatenate(predicted, axis=1)), batch)
    return {name: round(float(total) / float(count), 4) for name, (total, count) in scores.items()}


@functools.cache
def _call(model):
    def call(params, tokens, state):
        logits, state = model.apply(params, tokens, state)
        return logits.argmax(-1).astype(jnp.int32), state

    return jax.jit(call)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--task", choices=TASKS, action="append")
    parser.add_argument("--memory", choices=MEMORIES, action="append")
    parser.add_argument("--seconds", type=float, default=120.0, help="of CPU time, to train")
    parser.add_argument("--rate", type=float, default=5e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--longest", type=int, default=TESTS[-1], help="test up to this length")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    args = parser.parse_args()
    for name in args.task or TASKS:
        for label in args.memory or MEMORIES:
            clock, layer = Clock(), MEMORIES[label]
            model = LanguageModel(
                vocab_size=TASKS[name](16).vocab_size,
                features=32,
                pattern=(layer,),
                repeats=2,
                mixers={layer: OPTIONS[layer]},
                channel=None,
            )
            print(f"{name}, {label}", flush=True)
            params, log = train(model, TASKS[name], args.seconds, args.rate, args.seed)
            trained = clock.seconds()
            tests = {}
            for length in (length for length in TESTS if length <= args.longest):
                tests[length] = stream(model, params, TASKS[name](length))
                print(f"  tested at {length}: {tests[length]}", flush=True)
            line = {
                "study": "streams",
                "task": name,
                "memory": label,
                "seed": args.seed,
                "rate": args.rate,
                "trained": log,
                "tests": tests,
                "chance": {length: round(TASKS[name](length).chance, 4) for length in tests},
                "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
                "state_bytes": model.state_bytes(),
                "train_cpu_seconds": trained,
                "cpu_seconds": clock.seconds(),
            }
            record(line, ("study", "task", "memory", "seed"), args.out)


if __name__ == "__main__":
    main()
