"""Sets with one member that matters, told apart by layers that pool or associate their members.

    python experiments/hopfield/classify.py --config=configs/hopfield/sets.py:bits

Needs memseq with its extra `experiments`; "digits" also scikit-learn, whose bundled images it uses.
The layers are those of `memseq.layers.SET_LAYERS` with their own defaults where no option is given.

Variants: "bits" (bit-pattern multiple-instance learning), "latch" (one symbol of 32 tells the
class), "digits" (does a set of images show a 3), "smoke" (2 epochs on 64 bags).

Time on two cores: bits about four minutes, the others about one.
"""

from ml_collections import ConfigDict

from memseq.config import choose_variant

BITS = {"bags": 2048, "members": 16, "bits": 8, "signals": 8}
VARIANTS = {
    "bits": {},
    "latch": {
        "task": "latch",
        "options": ConfigDict({"sequences": 4096, "length": 32, "symbols": 20}, type_safe=False),
        "compare": ("hopfield_pooling", "hopfield", "hopfield_lookup"),
        "training.epochs": 5,
    },
    "digits": {
        "task": "digits",
        "options": ConfigDict({"bags": 2000, "members": 12, "target": 3}, type_safe=False),
        "compare": ("hopfield_pooling", "hopfield_encoder_block", "mean"),
        "training.epochs": 20,
    },
    "smoke": {
        "options": ConfigDict({"bags": 64, "members": 4, "bits": 4, "signals": 2}, type_safe=False),
        "compare": ("hopfield_pooling",),
        "features": 16,
        "training.epochs": 2,
    },
}


def get_config(variant: str = "") -> ConfigDict:
    config = ConfigDict()
    config.task = "bits"
    config.options = ConfigDict(BITS, type_safe=False)
    config.compare = ("hopfield_pooling", "mean")  # names of `layers`
    config.layers = ConfigDict(type_safe=False)
    for name in ("hopfield_pooling", "hopfield", "hopfield_lookup", "hopfield_encoder_block"):
        config.layers[name] = {"layer": name, "options": {}}
    config.layers["mean"] = {"layer": "", "options": {}}
    config.features = 64
    config.train_share = 0.75
    config.seed = 0
    config.training = ConfigDict()
    config.training.epochs = 250
    config.training.batch = 32
    config.training.learning_rate = 1e-3
    config.training.weight_decay = 1e-2
    return choose_variant(config, variant, VARIANTS)
