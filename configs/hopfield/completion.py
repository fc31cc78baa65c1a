"""Energy Transformer on images with hidden patches: the descent fills them in.

    python experiments/hopfield/complete.py --config=configs/hopfield/completion.py

Needs memseq with its extra `experiments`, and scikit-learn, whose bundled digits are the images:
8 x 8 pixels, 16 patches of 2 x 2, some of them replaced by one learned token.

Variants: "smoke" (2 epochs, few features).

Time on two cores: about four minutes.
"""

from ml_collections import ConfigDict

from memseq.config import choose_variant


def get_config(variant: str = "") -> ConfigDict:
    config = ConfigDict()
    config.features = 64
    config.hidden_patches = 6  # of 16
    config.train_share = 0.8
    config.seed = 0
    config.layer = ConfigDict({"heads": 4, "memories": 128, "steps": 8, "step_size": 0.1})
    config.training = ConfigDict()
    config.training.epochs = 60
    config.training.batch = 64
    config.training.learning_rate = 3e-3
    config.training.weight_decay = 1e-3
    smoke = {"features": 16, "training.epochs": 2, "layer.steps": 2}
    return choose_variant(config, variant, {"smoke": smoke})
