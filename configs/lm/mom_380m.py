"""Mixtures of memories, Gated DeltaNet in each: the shape that its authors train.

What: Du et al. 2025, arXiv:2502.13685: 24 layers of width 1024 with four heads of 256, four
memories of which a token goes to two, one memory of all tokens, tied embeddings, and channel layers
of ratio 3, as in the authors' training/configs/mom.json.

    memseq train --config=configs/lm/mom_380m.py --workdir=runs/mom_380m
    memseq train --config=configs/lm/mom_380m.py:smoke --workdir=runs/smoke

512M parameters, 201M of them the four memories' own projections to keys and values. The paper calls
its size 380M and counts 444M for this mixture; no shape that it or its code gives comes to either,
and this one, the authors', is the nearest. Training is the paper's: half a million tokens a step,
30,720 steps, AdamW, a cosine. The vocabulary has the size of the paper's; the text is that of
configs/lm/bytes.py, which uses 257 entries of it.
"""

from pathlib import Path

from ml_collections import ConfigDict

from memseq import config as configs


def get_config(variant: str = "") -> ConfigDict:
    config = configs.load(f"{Path(__file__).with_name('gla_340m.py')}:{variant}")
    heads, head_dim = (4, 8) if variant else (4, 256)
    config.model.pattern = ("mixture_of_memories",)
    config.model.mixers = ConfigDict(
        {
            "mixture_of_memories": {
                "base": "gated_delta_net",
                "heads": heads,
                "options": {"key_dim": head_dim, "value_dim": head_dim},
                "memories": 4,
                "top_k": 2,
                "shared_memory": True,
                "balance_scale": 0.01,
            }
        },
        type_safe=False,
    )
    config.model.tie_embeddings = True
    if not variant:
        config.model.hidden_ratio = 3.0
        config.train.steps = 30_720
        config.optimizer.weight_decay = 0.01
    return config
