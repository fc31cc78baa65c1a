"""Made-up runs: rows as a real run writes them, with the scores that a test asks for."""

import pathlib
import types

import numpy as np

from memseq import config as configs
from memseq.evaluation import capacity, jobs, recall
from memseq.evaluation.results import Folder

MAIN = str(pathlib.Path(__file__).resolve().parents[2] / "configs/recall/main.py")

# Medians that meet every claim of configs/recall/main.py.
GOOD = {
    ("delta_net", "rewrite"): 0.98,
    ("linear_attention", "rewrite"): 0.35,
    ("delta_net_2", "parity"): 0.99,
    ("delta_net", "parity"): 0.5,
    ("softmax_attention", "parity"): 0.5,
}


def config(*overrides: str):
    return configs.load(MAIN, overrides)


def rows(settings, scores=GOOD, seeds=3, closed_form=True):
    """A row for each (memory, task, seed) of a config; seeds lie 0.005 apart around the median."""
    made = capacity.rows("tiny") if closed_form else []
    for task in settings.on:
        for memory in settings.compare:
            model, on, _, training = jobs.build(settings, memory, task)
            job = jobs.Job(memory, task, tuple(range(seeds)))
            common = {**jobs._common(settings, job), **jobs._about(model, on, training)}
            for seed in range(seeds):
                value = scores.get((memory, task), 0.7) + 0.005 * (seed - seeds // 2)
                made.append({**common, **measured(task, value), "seed": seed})
    return made


def measured(task: str, value: float):
    """What a sweep adds to a row, for a headline score of `value`."""
    stale = (1 - value) / 2
    shares = {"accuracy": value, "sequence_accuracy": value**2}
    if task == "rewrite":
        shares |= {"updated": value, "stale": stale, "other": 1 - value - stale}
        shares |= {f"half: {name}": share for name, share in shares.items()}
        shares |= {"half: updated": value / 2, "half: kept": value / 2}
    else:
        shares |= {"1-16": 1.0, "17-32": value, "33-64": value}
    counts = {name: (1000 * share, 1000) for name, share in shares.items()}
    if task == "rewrite":
        counts["kept"] = (0, 0)
    return {
        "status": "ok",
        "error": None,
        "accuracy": value,
        "scores": shares,
        "counts": counts,
        "validation_accuracy": value,
        "learning_rate": 0.01,
        "by_position": [None] * 64 if task == "rewrite" else np.linspace(1, value, 64).tolist(),
        "curve": [[10, 4.0], [20, 1.0], [30, 0.5]],
        "sweep": [
            {"learning_rate": 0.005, "validation": value / 2, "failed_at": None, "scores": {}},
            {"learning_rate": 0.01, "validation": value, "failed_at": None, "scores": {}},
        ],
        "parameters": 31264,
        "wall_seconds": 10.0,
        "cpu_seconds": 9.5,
    }


def broken(row, error="diverged: the loss was not finite <at step 3>"):
    """The row of the same run, had it failed."""
    empty = {"scores": {}, "counts": {}, "by_position": [], "curve": row["curve"][:2]}
    return {**row, **empty, "status": "failed", "error": error, "accuracy": None}


def folder(path, settings, made) -> Folder:
    """A run's folder that holds these rows."""
    out = Folder(path)
    out.create()
    args = types.SimpleNamespace(config="configs/recall/main.py", seeds=3, overrides=[])
    recall._write_manifest(out, settings, args)
    out.append(made)
    return out
