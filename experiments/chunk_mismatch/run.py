"""A memory trained with one update chunk and run with others: accuracy on `rewrite`.

    python experiments/chunk_mismatch/run.py [LAYER ...] [--seeds=N]

Training has two stages: 16 keys bound once, in 64 tokens, then bound four times, in 256. Writes
results.jsonl (a line a layer and seed; a line of the same two is replaced) and chunk_mismatch.png
into this folder, or into --out, and prints the README's table.
"""

import argparse
import json
import pathlib
import time

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from memseq import tasks
from memseq.models import LanguageModel
from memseq.training.copies import Settings, Trainer, batches_of, scorer
from memseq.training.optimizers import decay_mask

TRAINED, CHUNKS = 32, (4, 8, 16, 32, 64, 128, 256)
TASK = tasks.get("rewrite", length=256, pairs=16, updates=(16,), rewrites=(3,))
STAGES = ((tasks.get("rewrite", pairs=16, updates=(0,)), 400), (TASK, 60))  # (task, steps)
NETWORK = {"heads": 4, "key_dim": 16, "value_dim": 16, "conv_width": 2}
LAYERS = {
    "titans_lmm": ("Titans LMM", NETWORK | {"expansion": 2}),
    "ttt_linear": ("TTT-Linear", NETWORK),
}


def model_of(layer: str, update_chunk: int) -> LanguageModel:
    options = LAYERS[layer][1] | {"update_chunk": update_chunk}
    return LanguageModel(
        TASK.vocab_size, 64, pattern=(layer,), mixers={layer: options}, channel=None
    )


def resized(params, update_chunk: int):
    """Parameters for another chunk: TTT's share_bias has one number for each of its positions.

    Longer chunks go on with the shares 1 / i that it starts from.
    """

    def one(path, leaf):
        if path[-1].key != "share_bias":
            return leaf
        pad = [(0, 0)] * (leaf.ndim - 1) + [(0, max(update_chunk - leaf.shape[-1], 0))]
        return jnp.pad(leaf, pad)[..., :update_chunk]

    return jax.tree_util.tree_map_with_path(one, params)


def run(layer: str, seed: int, settings: Settings) -> dict:
    """Trains one model and scores it at every chunk: the line of results.jsonl."""
    start = time.process_time()
    copies, done, seeds = None, 0, jnp.array([seed], jnp.int32)
    for task, steps in STAGES:
        trainer = Trainer(model_of(layer, TRAINED), task, settings, decay_mask)
        copies = jax.jit(trainer.start)(seeds) if copies is None else copies
        train = jax.jit(trainer.train, donate_argnums=0)
        for step in range(done, done + steps, 20):
            copies = train(copies, seeds, jnp.int32(step), jnp.int32(min(step + 20, done + steps)))
            loss = float(copies.losses[0, 0, step])
            print(
                f"{layer}, seed {seed}, {task.length} tokens, step {step}: {loss:.3f}", flush=True
            )
        done += steps
    batches = batches_of(TASK, trainer.data_key, "test", settings.test_examples, settings.batch)
    accuracy, stale = {}, {}
    for chunk in CHUNKS:
        score = jax.jit(scorer(model_of(layer, chunk), TASK, trainer.over))
        scores = jax.device_get(score(resized(copies.params, chunk), batches)["scores"])
        accuracy[chunk], stale[chunk] = (
            round((scores[name][0] / scores[name][1]).item(), 4) for name in ("accuracy", "stale")
        )
        print(f"{layer}, seed {seed}, chunk {chunk}: {accuracy[chunk]}", flush=True)
    return {
        "layer": layer,
        "seed": seed,
        "trained_at": TRAINED,
        "failed_at": int(copies.failed_at[0, 0]),
        "accuracy": accuracy,
        "stale": stale,
        "settings": {"learning_rate": settings.learning_rates[0]}
        | {"stages": [[task.describe(), steps] for task, steps in STAGES]}
        | {name: getattr(settings, name) for name in ("batch", "test_examples")},
        "jax": jax.__version__,
        "cpu_seconds": round(time.process_time() - start, 1),
    }


def table(lines: list[dict]) -> str:
    """A row a layer: accuracy at each chunk, the median of its seeds (least to most)."""
    rows = [
        "| update chunk | " + " | ".join(map(str, CHUNKS)) + " |",
        "|---" * (len(CHUNKS) + 1) + "|",
    ]
    for layer in dict.fromkeys(line["layer"] for line in lines):
        cells = []
        for chunk in CHUNKS:
            found = [line["accuracy"][str(chunk)] for line in lines if line["layer"] == layer]
            ends = f" ({min(found):.2f} to {max(found):.2f})" if len(found) > 1 else ""
            cells.append(f"{np.median(found):.3f}{ends}")
        rows.append(f"| {LAYERS[layer][0]} | {' | '.join(cells)} |")
    return "\n".join(rows)


def draw(lines: list[dict], path: pathlib.Path) -> None:
    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    layers = dict.fromkeys(line["layer"] for line in lines)
    for color, layer in enumerate(layers):
        found = np.array(
            [[x["accuracy"][str(c)] for c in CHUNKS] for x in lines if x["layer"] == layer]
        )
        axes.plot(CHUNKS, np.median(found, 0), color=f"C{color}", label=LAYERS[layer][0])
        axes.plot(CHUNKS, found.T, "o", color=f"C{color}", markersize=4)
    axes.axhline(TASK.chance, color="0.7", linestyle=":", label="chance")
    axes.axvline(TRAINED, color="0.9", zorder=0)
    axes.set_xscale("log", base=2)
    axes.set_xticks(CHUNKS, map(str, CHUNKS))
    axes.set(xlabel=f"update chunk (trained at {TRAINED})", ylabel="accuracy", ylim=(0, 1.02))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("layers", nargs="*", default=list(LAYERS))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=5e-3)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent)
    args = parser.parse_args()
    steps = sum(steps for _, steps in STAGES)
    settings = Settings((args.learning_rate,), steps, args.batch, test_examples=128)
    path = args.out / "results.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    for layer in args.layers:
        for seed in range(args.seeds):
            new = json.loads(json.dumps(run(layer, seed, settings)))
            same = (layer, seed)
            lines = [line for line in lines if (line["layer"], line["seed"]) != same] + [new]
            lines.sort(key=lambda line: (list(LAYERS).index(line["layer"]), line["seed"]))
            path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    draw(lines, args.out / "chunk_mismatch.png")
    print(table(lines))


if __name__ == "__main__":
    main()
