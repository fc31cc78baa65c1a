"""Needles in a haystack: trained on at most 512 tokens, tested on more, and streamed.

    python experiments/needle/run.py [LAYER ...] [--longest=TOKENS]

Trains one model a layer on the task `needle`, first on 64 tokens, where it costs little to find
out what is asked, then on 512. Tests read texts of up to a million tokens in pieces, through the
model's state, and score the queries at their ends. Writes results.jsonl (a line a layer; a line of
the same one is replaced) and needle.png into this folder, or into --out, and prints the README's
table.
"""

import argparse
import dataclasses
import json
import pathlib
import time

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from memseq import tasks
from memseq.models import LanguageModel
from memseq.training.copies import Settings, Trainer
from memseq.training.optimizers import decay_mask

STAGES = ((64, 800), (512, 40))  # (tokens, steps) of training, one after the other
# Length -> texts read side by side.
LENGTHS = {n: 32 for n in (512, 1024, 2048, 4096, 8192, 16384)} | {2**17: 4, 2**20: 4}
PIECE = 512  # tokens of one call
TASK = tasks.get("needle", needles=8)

NETWORK = {"heads": 2}  # of 16
LAYERS = {
    "titans_lmm": ("Titans LMM", NETWORK | {"expansion": 2, "conv_width": 2}),
    "titans_mac": ("Titans MAC", NETWORK | {"memory_options": (("expansion", 2),)}),
    "gated_delta_net": ("Gated DeltaNet", {"heads": 2, "key_dim": 16, "conv_width": 2}),
    "ttt_linear": ("TTT-Linear", NETWORK | {"conv_width": 2}),
}


def model_of(layer: str) -> LanguageModel:
    return LanguageModel(
        TASK.vocab_size, 32, pattern=(layer,), mixers={layer: LAYERS[layer][1]}, channel=None
    )


def trained(model, settings: Settings, name: str):
    """(key of the data, parameters with the axes of copies, step training failed at or -1)."""
    copies, done, seeds = None, 0, jnp.zeros((1,), jnp.int32)
    for length, steps in STAGES:
        task = dataclasses.replace(TASK, length=length, test=())
        trainer = Trainer(model, task, settings, decay_mask)
        train = jax.jit(trainer.train, donate_argnums=0)
        copies = jax.jit(trainer.start)(seeds) if copies is None else copies
        for step in range(done, done + steps, settings.steps_per_dispatch):
            stop = min(step + settings.steps_per_dispatch, done + steps)
            copies = train(copies, seeds, jnp.int32(step), jnp.int32(stop))
            loss = float(copies.losses[0, 0, step:stop].mean())
            print(f"{name}, {length} tokens, step {stop}: {loss:.3f}", flush=True)
        done += steps
    return trainer.data_key, copies.params, int(copies.failed_at[0, 0])


def by_length(model, key, params, longest: int) -> dict[int, dict]:
    """Length -> scores on texts of that length, and bytes of a row's state before and after."""
    params = jax.tree.map(lambda leaf: leaf[0, 0], params)
    read = jax.jit(model.apply, donate_argnums=2)
    found = {}
    for length, rows in LENGTHS.items():
        if length > longest:
            continue
        task = dataclasses.replace(TASK, length=length, test=())
        batch = task.batch(key, "test", 0, rows)
        tokens, state = np.asarray(batch["inputs"]), model.init_state(rows)
        held = [sum(leaf.nbytes for leaf in jax.tree.leaves(state))]
        start = time.process_time()
        for piece in range(0, length, PIECE):
            logits, state = read(params, tokens[:, piece : piece + PIECE], state)
        held.append(sum(leaf.nbytes for leaf in jax.tree.leaves(state)))
        answers = np.zeros_like(tokens)
        answers[:, -TASK.needles :] = logits[:, -TASK.needles :].argmax(-1)
        scores = task.scores(answers, batch)
        found[length] = {name: round((a / b).item(), 4) for name, (a, b) in scores.items()}
        found[length] |= {
            "texts": rows,
            "state_bytes": [size // rows for size in held],
            "cpu_seconds": round(time.process_time() - start, 1),
        }
        print(length, found[length], flush=True)
    return found


def table(lines: list[dict]) -> str:
    """A row a layer: accuracy by length, and the bytes of its state, before and after all."""
    rows = [
        "| layer | " + " | ".join(f"{n:,}" for n in LENGTHS) + " | state bytes |",
        "|---" * (len(LENGTHS) + 2) + "|",
    ]
    for line in lines:
        found = line["by_length"]
        cells = [f"{found[n]['accuracy']:.3f}" if n in found else "-" for n in map(str, LENGTHS)]
        held = {size for one in found.values() for size in one["state_bytes"]}
        rows.append(
            f"| {LAYERS[line['layer']][0]} | {' | '.join(cells)} | "
            f"{', '.join(f'{size:,}' for size in sorted(held))} |"
        )
    return "\n".join(rows)


def draw(lines: list[dict], path: pathlib.Path) -> None:
    figure, axes = plt.subplots(figsize=(6.5, 3.6), layout="constrained")
    for line in lines:
        points = [(int(n), found["accuracy"]) for n, found in line["by_length"].items()]
        axes.plot(*zip(*points, strict=True), "o-", label=LAYERS[line["layer"]][0], markersize=4)
    axes.axhline(TASK.chance, color="0.7", linestyle=":", label="chance")
    axes.axvline(STAGES[-1][0], color="0.9", zorder=0)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="tokens before and with the queries", ylabel="accuracy", ylim=(0, 1.02))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("layers", nargs="*", default=list(LAYERS))
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=5e-3)
    parser.add_argument("--longest", type=int, default=max(LENGTHS), help="text read, in tokens")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent)
    args = parser.parse_args()
    settings = Settings((args.learning_rate,), sum(steps for _, steps in STAGES), args.batch)
    path = args.out / "results.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    for layer in args.layers:
        start, model = time.process_time(), model_of(layer)
        key, params, failed_at = trained(model, settings, layer)
        new = {
            "layer": layer,
            "failed_at": failed_at,
            "by_length": by_length(model, key, params, args.longest),
            "settings": {"stages": STAGES, "batch": args.batch, "rate": args.learning_rate},
            "jax": jax.__version__,
            "cpu_seconds": round(time.process_time() - start, 1),
        }
        lines = [line for line in lines if line["layer"] != layer] + [json.loads(json.dumps(new))]
        lines.sort(key=lambda line: list(LAYERS).index(line["layer"]))
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    draw(lines, args.out / "needle.png")
    print(table(lines))


if __name__ == "__main__":
    main()
