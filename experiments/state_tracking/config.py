"""State tracking: what a memory's transitions can count, trained short and tested long.

    memseq recall --config=experiments/state_tracking/config.py --seeds=3

One layer, in the same model, on

- `parity`: is the number of ones so far odd? Trained on 16 bits, tested on 64. A transition needs
  an eigenvalue of -1: write strengths up to 2.
- `words`: which of the six permutations of three things do all so far come to? Trained on 12,
  tested on 48. Permutations do not commute, so a transition has to rotate: two Householder steps,
  again with write strengths up to 2 (Siems et al. 2025, arXiv:2502.10297; Grazzi et al. 2025,
  arXiv:2411.12537).

Variants: "smoke" (2 steps, one memory).
"""

from memseq.config import choose_variant
from memseq.evaluation.settings import recall_config

MATRIX = {"heads": 4, "key_dim": 16, "value_dim": 16, "conv_width": 0, "chunk_size": 32}

MEMORIES = {
    "two_steps_to_2": {
        "title": "DeltaProduct, two steps, write to 2",
        "layer": "delta_product",
        "options": {**MATRIX, "steps": 2, "max_beta": 2.0},
    },
    "two_steps_to_1": {
        "title": "DeltaProduct, two steps, write to 1",
        "layer": "delta_product",
        "options": {**MATRIX, "steps": 2, "max_beta": 1.0},
    },
    "one_step_to_2": {
        "title": "DeltaNet, write to 2",
        "layer": "delta_net",
        "options": {**MATRIX, "max_beta": 2.0},
    },
}

TASKS = {
    "parity": {
        "title": "Parity",
        "question": "does counting carry past the trained length?",
        "name": "parity",
        "headline": "33-64",
        "training": {"steps": 300},
    },
    "words": {
        "title": "Words of S3",
        "question": "is the order of permutations kept?",
        "name": "words",
        "headline": "25-48",
    },
}

CLAIMS = (
    "parity 33-64: two_steps_to_2 >= 0.99",
    "parity 33-64: two_steps_to_1 <= 0.6",
    "words 25-48: two_steps_to_2 >= 0.99",
    "words 25-48: two_steps_to_1 <= 0.6",
    "words 25-48: one_step_to_2 <= 0.6",
)

VARIANTS = {
    "smoke": {
        "compare": ("two_steps_to_2",),
        "claims": (),
        "model.features": 16,
        "training.steps": 2,
        "training.batch": 4,
        "training.warmup": 1,
        "training.validation_examples": 4,
        "training.test_examples": 8,
        "tasks.parity.training.steps": 2,
    },
}


def get_config(variant=""):
    config = recall_config(MEMORIES, TASKS, CLAIMS)
    config.workers = 1
    config.training.learning_rates = (3e-3,)
    config.training.steps = 600
    config.training.batch = 128
    return choose_variant(config, variant, VARIANTS)
