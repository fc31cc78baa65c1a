"""What the scripts of this study share: the memories, and the file of their results."""

import json
import pathlib
import time

import jax

from memseq.config import provenance

FOLDER = pathlib.Path(__file__).parent
RESULTS = FOLDER / "results.jsonl"

# label -> name in memseq.layers.REGISTRY, options
MEMORIES = {
    "HiPPO-LegS": ("hippo_memory", {"heads": 8}),
    "HiPPO-LegT": (
        "hippo_memory",
        {"heads": 8, "order": 32, "measure": "legt", "method": "zoh", "window": 64},
    ),
    "S4D": ("s4d", {}),
    "LRU": ("lru", {}),
    "Mamba": ("mamba", {}),
    "mLSTM": ("mlstm", {}),
    "LEM": ("lem", {}),
}


def lines(path: pathlib.Path = RESULTS) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def record(line: dict, same: tuple[str, ...], path: pathlib.Path = RESULTS) -> None:
    """Adds a line, in the place of one that agrees with it in the keys `same`."""
    about = provenance()
    line = line | {"revision": about["revision"], "jax": jax.__version__}
    kept = [old for old in lines(path) if any(old.get(key) != line[key] for key in same)]
    path.write_text("".join(json.dumps(each) + "\n" for each in [*kept, line]))


class Clock:
    """CPU-seconds of this process since it was made."""

    def __init__(self):
        self.start = time.process_time()

    def seconds(self) -> float:
        return round(time.process_time() - self.start, 1)
