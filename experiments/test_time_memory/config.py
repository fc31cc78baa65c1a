"""Memories that learn while they are read against the delta rule, on `rewrite` and MQAR.

    memseq recall --config=experiments/test_time_memory/config.py --seeds=3

One layer of 64 features, four heads of 16, on the tasks' tiny presets. Titans' LMM and Yaad hold
the weights of a network 16 -> 32 -> 16 a head and write it in chunks of 16 steps; DeltaNet holds a
matrix 16 x 16 a head and writes it at every step.

Variants: "smoke" (2 steps, one memory).
"""

from memseq.config import choose_variant
from memseq.evaluation.settings import recall_config

MATRIX = {"heads": 4, "key_dim": 16, "value_dim": 16, "conv_width": 2, "output_gate": True}
NETWORK = {**MATRIX, "expansion": 2, "update_chunk": 16, "max_segments": 1}

MEMORIES = {
    "delta_net": {"title": "DeltaNet", "layer": "delta_net", "options": MATRIX},
    "titans_lmm": {"title": "Titans LMM", "layer": "titans_lmm", "options": NETWORK},
    "yaad": {"title": "Yaad", "layer": "yaad", "options": NETWORK},
}

TASKS = {
    "rewrite": {
        "title": "Rewrite",
        "question": "is the newest value of a key read back?",
        "name": "rewrite",
    },
    "mqar": {
        "title": "MQAR",
        "question": "is the value of every key read back?",
        "name": "mqar",
    },
}

CLAIMS = tuple(
    f"{task} accuracy: {memory} - delta_net >= 0"
    for task in TASKS
    for memory in ("titans_lmm", "yaad")
)

VARIANTS = {
    "smoke": {
        "compare": ("titans_lmm",),
        "claims": (),
        "model.features": 16,
        "training.steps": 2,
        "training.batch": 4,
        "training.warmup": 1,
        "training.validation_examples": 4,
        "training.test_examples": 8,
    },
}


def get_config(variant=""):
    config = recall_config(MEMORIES, TASKS, CLAIMS)
    config.workers = 1
    config.training.learning_rates = (5e-3,)
    config.training.steps = 500
    return choose_variant(config, variant, VARIANTS)
