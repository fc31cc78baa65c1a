"""Trains set classifiers that differ in one layer, and writes what they reach as JSON.

    python experiments/hopfield/classify.py --config=configs/hopfield/sets.py:bits

Options: --config=FILE[:VARIANT] and --config.KEY=VALUE; --out=FOLDER for the JSON lines (one layer
a line), which is this folder's results/ by default.
"""

import argparse
import json
import pathlib
import time

import sets

from memseq import config as configs


def load_data(config) -> tuple[list, list]:
    """(x, mask, label) to train on and to test on; no image is in both."""
    options, share = config.options.to_dict(), config.train_share
    if config.task == "digits":
        from sklearn.datasets import load_digits

        found = load_digits()
        cut, bags = int(len(found.target) * share), options.pop("bags")
        return tuple(
            sets.digit_sets(
                found.data[part], found.target[part], config.seed + i, bags=count, **options
            )
            for i, (part, count) in enumerate(
                ((slice(cut), int(bags * share)), (slice(cut, None), bags - int(bags * share)))
            )
        )
    data = {"bits": sets.bit_patterns, "latch": sets.latch}[config.task](config.seed, **options)
    cut = int(len(data[2]) * share)
    return tuple([a[part] for a in data] for part in (slice(cut), slice(cut, None)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--config", default="configs/hopfield/sets.py")
    parser.add_argument("--out", default=str(pathlib.Path(__file__).parent / "results"))
    args, overrides = parser.parse_known_args()
    config = configs.load(args.config, overrides)
    train_data, test_data = load_data(config)
    lines = []
    for name in config.compare:
        chosen = config.layers[name].to_dict()
        model = sets.SetClassifier(
            chosen["layer"], config.features, tuple(chosen["options"].items())
        )
        start = time.perf_counter()
        print(f"{config.task}, {name}: epoch, AUC, accuracy on {len(test_data[2])} held-out sets")
        found = sets.train(
            model,
            train_data,
            test_data,
            seed=config.seed,
            report=lambda *row: print("  {:4d}  {:.3f}  {:.3f}".format(*row), flush=True),
            **config.training.to_dict(),
        )
        lines.append(
            {
                "task": config.task,
                "layer": name,
                "seed": config.seed,
                "seconds": round(time.perf_counter() - start, 1),
                "curve": [[e, round(a, 4), round(c, 4)] for e, a, c in found],
            }
        )
    out = pathlib.Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (out / f"{config.task}.jsonl").write_text(text)


if __name__ == "__main__":
    main()
