"""DeltaProduct of 392M parameters.

What: the model with two Householder steps a token of Siems et al. 2025, arXiv:2502.10297: 24 layers
of width 1024 with eight heads, write strengths up to 2, SwiGLU.

    memseq train --config=configs/lm/deltaproduct.py --workdir=runs/deltaproduct
    memseq train --config=configs/lm/deltaproduct.py:smoke --workdir=runs/smoke

392M parameters. The vocabulary has the size of the paper's, so that the model does; the text is
that of configs/lm/bytes.py, which uses 257 entries of it. Training is the usual one at this size:
half a million tokens a step, AdamW, a cosine.
"""

from pathlib import Path

from ml_collections import ConfigDict

from memseq import config as configs


def get_config(variant: str = "") -> ConfigDict:
    config = configs.load(f"{Path(__file__).with_name('bytes.py')}:{variant}")
    config.model.pattern = ("delta_product",)
    config.model.mixers = ConfigDict(
        {"delta_product": {"heads": 8, "steps": 2, "max_beta": 2.0}}, type_safe=False
    )
    if variant:  # a variant of bytes.py keeps its sizes
        return config
    config.model.update(
        vocab_size=32000,
        features=1024,
        repeats=24,
        hidden_ratio=4.125,
        dtype="bfloat16",
        remat="dots",
    )
    config.train.update(steps=66_758, batch=256, length=2048, microbatches=16)
    config.optimizer.update(
        name="adamw", learning_rate=3e-4, schedule="cosine", warmup_steps=1024, final_fraction=0.1
    )
    return config
