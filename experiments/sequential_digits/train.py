"""Trains classifiers of pixel sequences that differ in one layer, and writes what they reach.

    python experiments/sequential_digits/train.py --config=configs/digits/sequential.py[:VARIANT]

Options: --config=FILE[:VARIANT] and --config.KEY=VALUE; --out=FILE of JSON lines (one layer a line,
a line of the same layer and order of pixels is replaced), this folder's results.jsonl by default.
Prints the table of all lines in that file.
"""

import argparse
import functools
import json
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

from memseq import config as configs
from memseq.models.classifier import SequenceClassifier


def load_data(train_share: float, permuted: bool) -> tuple:
    """(pixels [n, 64, 1] in [0, 1], digits [n]) to train on and to test on, in random order."""
    found, rng = load_digits(), np.random.default_rng(0)
    order = rng.permutation(len(found.target))
    pixels, digits = found.data[order] / 16, found.target[order]
    if permuted:
        pixels = pixels[:, rng.permutation(64)]
    cut = int(len(digits) * train_share)
    pixels = pixels[..., None].astype(np.float32)
    return (pixels[:cut], digits[:cut]), (pixels[cut:], digits[cut:])


def train(model, data, test, *, seeds, epochs, batch, learning_rate):
    """Yields the test accuracies [seeds] after each epoch; seeds are trained side by side."""
    (x, y), (test_x, test_y) = data, test
    steps = len(y) // batch
    schedule = optax.cosine_decay_schedule(learning_rate, steps * epochs)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))

    def loss(params, x, y):
        logits = model.apply(params, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def epoch(params, state, order):
        """order: [seeds, steps, batch], the examples of each step."""

        def step(carry, chosen):
            params, state = carry
            updates, state = optimizer.update(
                jax.grad(loss)(params, jnp.asarray(x)[chosen], jnp.asarray(y)[chosen]), state
            )
            return (optax.apply_updates(params, updates), state), None

        def one(params, state, order):
            return jax.lax.scan(step, (params, state), order)[0]

        params, state = jax.vmap(one)(params, state, order)
        right = jax.vmap(lambda p: model.apply(p, test_x).argmax(-1) == test_y)(params)
        return params, state, right.mean(-1)

    keys = jax.random.split(jax.random.key(0), seeds)
    params = jax.jit(jax.vmap(lambda key: model.init(key, x[:1])))(keys)
    state = jax.vmap(optimizer.init)(params)
    rng = np.random.default_rng(1)
    for _ in range(epochs):
        orders = [rng.permutation(len(y))[: steps * batch] for _ in range(seeds)]
        order = np.stack(orders).reshape(seeds, steps, batch)
        params, state, accuracy = epoch(params, state, order)
        yield np.asarray(accuracy, np.float64)


def table(lines: list[dict]) -> str:
    """A row a layer: median of the seeds (least to most), rows read in order and permuted."""
    rows = ["| layer | row by row | permuted |", "|---|---|---|"]
    for layer in dict.fromkeys(line["layer"] for line in lines):
        cells = []
        for permuted in (False, True):
            last = [
                line["accuracy"][-1]
                for line in lines
                if line["layer"] == layer and line["permuted"] == permuted
            ]
            cells.append(
                f"{np.median(last[0]):.3f} ({min(last[0]):.3f} to {max(last[0]):.3f})"
                if last
                else "-"
            )
        rows.append(f"| {layer} | {' | '.join(cells)} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--config", default="configs/digits/sequential.py")
    parser.add_argument("--out", default=str(pathlib.Path(__file__).parent / "results.jsonl"))
    args, overrides = parser.parse_known_args()
    config = configs.load(args.config, overrides)
    data, test = load_data(config.train_share, config.permuted)
    out = pathlib.Path(args.out)
    lines = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    for label in config.compare:
        row = config.layers[label].to_dict()
        model = SequenceClassifier(
            classes=10,
            features=config.features,
            pattern=(row["layer"],),
            mixers={row["layer"]: row["options"]},
            channel=None,
            pool="last",
        )
        start, curve = time.process_time(), []
        for accuracy in train(model, data, test, seeds=config.seeds, **config.training.to_dict()):
            curve.append([round(float(a), 4) for a in accuracy])
            print(f"{label}, epoch {len(curve)}: {curve[-1]}", flush=True)
        new = {
            "layer": label,
            "permuted": config.permuted,
            "cpu_seconds": round(time.process_time() - start, 1),
            "jax": jax.__version__,
            "accuracy": curve,
        }
        same = (label, config.permuted)
        lines = [line for line in lines if (line["layer"], line["permuted"]) != same] + [new]
        out.write_text("".join(json.dumps(line) + "\n" for line in lines))
    order = configs.load(args.config, []).compare
    print(table(sorted(lines, key=lambda line: order.index(line["layer"]))))


if __name__ == "__main__":
    main()
