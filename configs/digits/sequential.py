"""Handwritten digits read one pixel at a time, by seven memories of vectors and matrices.

    python experiments/sequential_digits/train.py --config=configs/digits/sequential.py

Needs memseq with its extra `experiments`: the images are those that scikit-learn bundles, 1,797 of
8 x 8 pixels, read row by row as 64 steps of one number. One block (norm, layer, residual; no
channel layer), the class is read at the last step. All layers have the same features, learning rate
and steps; seeds are trained together.

Variants: "permuted" (all images in one random order of pixels), "smoke" (one epoch, one seed).
"""

from ml_collections import ConfigDict

from memseq.config import choose_variant

# Label -> layer of `memseq.layers.REGISTRY` and options of its constructor; rows in this order.
LAYERS = {
    "S5": {"layer": "s5", "options": {"state_dim": 32, "blocks": 2}},
    "LRU": {"layer": "lru", "options": {"r_min": 0.8, "r_max": 0.99, "max_phase": 1.57}},
    "Mamba": {"layer": "mamba", "options": {"expand": 1, "state_dim": 8}},
    "LEM": {"layer": "lem", "options": {"dt": 0.3}},
    "wave RNN": {"layer": "wave_rnn", "options": {"hidden_dim": 128, "rings": 2}},
    "mLSTM": {"layer": "mlstm", "options": {"input_bias": 0.0}},
    "LSTM": {"layer": "lstm", "options": {}},
}


def get_config(variant: str = "") -> ConfigDict:
    config = ConfigDict()
    config.layers = ConfigDict(
        {
            label: {"layer": row["layer"], "options": ConfigDict(row["options"], type_safe=False)}
            for label, row in LAYERS.items()
        }
    )
    config.compare = tuple(LAYERS)
    config.permuted = False
    config.features = 32
    config.train_share = 0.8
    config.seeds = 3
    config.training = ConfigDict()
    config.training.epochs = 15
    config.training.batch = 64
    config.training.learning_rate = 5e-3
    smoke = {"training.epochs": 1, "seeds": 1, "compare": ("LRU",), "features": 16}
    return choose_variant(config, variant, {"permuted": {"permuted": True}, "smoke": smoke})
