"""Based of 363M parameters.

What: linear attention with the exponential's second-order series, softmax attention in a window of
128, and gated convolutions between them: Arora et al. 2024, arXiv:2402.18668. 27 layers of width
1024, 16 heads of 16-wide keys, in the order of the authors' published example config: of five
layers the second is linear attention and the third has the window.

    memseq train --config=configs/lm/based.py --workdir=runs/based
    memseq train --config=configs/lm/based.py:smoke --workdir=runs/smoke

363M parameters, as the paper's; embeddings are tied. The vocabulary has the size of the paper's, so
that the model does; the text is that of configs/lm/bytes.py, which uses 257 entries of it. Training
is the usual one at this size: half a million tokens a step, AdamW, a cosine.
"""

from pathlib import Path

from ml_collections import ConfigDict

from memseq import config as configs

FIVE = (
    "gated_convolution",
    "based",
    "softmax_attention",
    "gated_convolution",
    "gated_convolution",
)


def get_config(variant: str = "") -> ConfigDict:
    config = configs.load(f"{Path(__file__).with_name('bytes.py')}:{variant}")
    config.model.pattern = FIVE
    config.model.mixers = ConfigDict(
        {
            "based": {"heads": 16},
            "softmax_attention": {"heads": 16, "window": 128},
        },
        type_safe=False,
    )
    if variant:  # a variant of bytes.py keeps its sizes
        return config
    config.model.update(
        vocab_size=50280,
        features=1024,
        pattern=5 * FIVE + 2 * ("gated_convolution",),
        repeats=1,
        hidden_ratio=3.0,
        dtype="bfloat16",
        remat="dots",
    )
    config.train.update(steps=20_000, batch=256, length=2048, microbatches=16)
    config.optimizer.update(
        name="adamw", learning_rate=8e-4, schedule="cosine", warmup_steps=1024, final_fraction=0.1
    )
    return config
