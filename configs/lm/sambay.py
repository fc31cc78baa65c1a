"""SambaY: a self-decoder of Mamba and windows, and a cross-decoder that keeps nothing.

What: Ren et al. 2025, arXiv:2507.06607, the authors' `sambay_d16`: sixteen layers of width 1984,
heads of 128 with a key-value head for four, no positions. Four times Mamba and attention over a
window of 128; then the Mamba whose read-out, and the full attention whose cache, the layers above
share; then three times a gated memory unit and attention on that cache.

    memseq train --config=configs/lm/sambay.py --workdir=runs/sambay
    memseq train --config=configs/lm/sambay.py:smoke --workdir=runs/smoke

1.13B parameters, 127M of them in embeddings. However long the context, one cache grows with it. Of
a prompt only the last step goes through the upper six layers (the shared attention below them does
attend at all steps). The vocabulary and the training are those of gla_340m; the text is that of
configs/lm/bytes.py.
"""

from pathlib import Path

from ml_collections import ConfigDict

from memseq import config as configs


def get_config(variant: str = "") -> ConfigDict:
    config = configs.load(f"{Path(__file__).with_name('gla_340m.py')}:{variant}")
    heads, head_dim, window = (4, 16, 32) if variant else (16, 128, 128)
    pairs, cross = (1, 1) if variant else (4, 3)
    attention = {"heads": heads, "head_dim": head_dim, "rope": False}
    grouped = {**attention, "kv_heads": heads // 4}
    config.model.pattern = (
        ("mamba", "sliding_window_attention") * pairs
        + ("shared_memory", "shared_attention")
        + ("gated_memory_unit", "cross_decoder_attention") * cross
    )
    config.model.mixers = ConfigDict(
        {
            "mamba": {},
            "sliding_window_attention": {**grouped, "window": window},
            "shared_memory": {"base": "mamba"},
            "shared_attention": grouped,
            "gated_memory_unit": {"expand": 2},
            "cross_decoder_attention": attention,
        },
        type_safe=False,
    )
    config.model.repeats = 1
    if not variant:
        # channel layers of 4 x 1984
        config.model.update(features=1984, hidden_ratio=6.0, tie_embeddings=False)
    return config
