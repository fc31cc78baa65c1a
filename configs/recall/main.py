"""Which memory remembers what: seven memories on two tasks, on a CPU, in minutes.

    memseq recall --config=configs/recall/main.py --seeds=3

Every memory is one layer of the same width in the same model, trained on

- `rewrite`: eight keys are bound to values, then all are bound again; the newest value is right. A
  memory that adds (linear attention) mixes old and new; one that writes the difference replaces.
- `parity`: is the number of ones so far odd? Trained on 16 bits, tested on 64. Needs a memory that
  can change sign at a step: write strengths up to 2.

Beside them stands the closed-form `capacity` of the bare rules. A memory more is an entry more in
`MEMORIES`.

On two cores one seed took 268 s, three took 905 CPU-seconds. Expected of three seeds' medians:
rewrite, DeltaNet at least 0.95 and at least 0.25 above linear attention; parity at positions 33 to
64, write strength to 2 at least 0.95, to 1 and softmax attention at most 0.6. The report says
whether that came out.

Variants: "smoke" (2 steps, two memories).
"""

from memseq.config import choose_variant
from memseq.evaluation.settings import recall_config

# What the matrix memories share, so that they differ in their rule and not in their size.
MATRIX = {
    "heads": 4,
    "key_dim": 16,
    "value_dim": 16,
    "conv_width": 2,  # a key and its value are neighbours
    "output_gate": True,
    "chunk_size": 16,
}

# Label -> title, layer of `memseq.layers.REGISTRY`, options of its constructor; rows in this order.
MEMORIES = {
    "softmax_attention": {
        "title": "Softmax attention (RoPE)",
        "layer": "softmax_attention",
        "options": {"heads": 4, "head_dim": 16, "conv_width": 2, "output_gate": True},
    },
    "linear_attention": {
        "title": "Linear attention",
        "layer": "linear_attention",
        "options": MATRIX,
    },
    "gated_linear_attention": {
        "title": "Gated linear attention",
        "layer": "gated_linear_attention",
        "options": MATRIX,
    },
    "delta_net": {
        "title": "DeltaNet (write to 1)",
        "layer": "delta_net",
        "options": MATRIX,
    },
    "delta_net_2": {
        "title": "DeltaNet (write to 2)",
        "layer": "delta_net",
        "options": {**MATRIX, "max_beta": 2.0},
    },
    "gated_delta_net": {
        "title": "Gated DeltaNet",
        "layer": "gated_delta_net",
        "options": MATRIX,
    },
    "mamba2": {
        "title": "Mamba-2",
        "layer": "mamba2",
        "options": {"heads": 4, "expand": 1, "state_dim": 16, "conv_width": 2, "chunk_size": 16},
    },
}

TASKS = {
    "rewrite": {
        "title": "Rewrite",
        "question": "is the newest value of a key read back?",
        "name": "rewrite",
        "also": ("half",),
    },
    "parity": {
        "title": "Parity",
        "question": "does counting carry past the trained length?",
        "name": "parity",
        "headline": "33-64",
        "training": {"steps": 300},
    },
}

# What the medians over seeds should show: TASK SCORE: MEMORY [- MEMORY] >= (or <=) NUMBER.
CLAIMS = (
    "rewrite accuracy: delta_net >= 0.95",
    "rewrite accuracy: delta_net - linear_attention >= 0.25",
    "parity 33-64: delta_net_2 >= 0.95",
    "parity 33-64: delta_net <= 0.6",
    "parity 33-64: softmax_attention <= 0.6",
    "capacity unique N/d=1: hebb - delta >= 0.1",
    "capacity rewrite N=16: delta - hebb >= 0.4",
)

VARIANTS = {
    # Two steps of two memories: does everything run?
    "smoke": {
        "compare": ("softmax_attention", "linear_attention"),
        "claims": (),
        "model.features": 16,
        "training.learning_rates": (3e-3,),
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
    config.capacity = "tiny"
    return choose_variant(config, variant, VARIANTS)
