"""A byte-level language model of source text, small enough for a CPU.

What: Gated DeltaNet blocks on the source of the running Python's own standard library, or on your
own text (`--config.data.path=FOLDER`). The score is bits per byte of held-out files, printed beside
order-2 and order-3 context models that were fitted on the same training text.

    memseq train --config=configs/lm/bytes.py --workdir=runs/bytes
    memseq generate --workdir=runs/bytes --prompt='def '

Time and numbers, measured once on two busy CPU cores: 15 CPU-minutes for everything, set-up,
compilation and scoring included. On 100 kB of held-out files the order-2 model has 2.58 bits/byte
and the order-3 model 2.02. This model had 2.22 at its first score, a quarter of the way, 2.018 at
half, 1.86 at three quarters, and ended at 1.71.
"""

from ml_collections import ConfigDict, config_dict

from memseq.config import choose_variant

VARIANTS = {
    # Two steps of a tiny model: does everything run?
    "smoke": {
        "data.limit_mb": 0.5,
        "data.held_out_mb": 0.01,
        "model.features": 32,
        "model.repeats": 1,
        "train.steps": 2,
        "train.batch": 4,
        "train.length": 64,
        "train.log_every": 1,
        "optimizer.warmup_steps": 1,
    },
}


def get_config(variant: str = "") -> ConfigDict:
    config = ConfigDict()
    config.seed = 0

    config.model = ConfigDict()
    config.model.vocab_size = 257  # the bytes and a document start
    config.model.features = 128
    config.model.pattern = ("gated_delta_net",)  # repeated; each is followed by a channel layer
    config.model.repeats = 4
    config.model.mixers = ConfigDict(  # constructor options by layer name; new names may be added
        {"gated_delta_net": {"heads": 2}}, type_safe=False
    )
    config.model.channel = config_dict.placeholder(str)  # None is no channel layer
    config.model.channel = "swiglu"
    config.model.hidden_ratio = 2.0
    config.model.tie_embeddings = True
    config.model.remat = "none"
    config.model.dtype = "float32"
    config.model.param_dtype = "float32"
    config.model.implementation = "auto"

    config.data = ConfigDict()
    config.data.path = ""  # a file or folder of text; "" is the standard library's source
    config.data.glob = ""
    config.data.data_dir = ""  # where prepared text is kept; "" is the user's cache
    config.data.limit_mb = 0.0  # millions of bytes taken; 0 is all
    config.data.held_out_mb = 0.1  # millions of bytes scored; 0 is all

    config.train = ConfigDict()
    config.train.steps = 1200
    config.train.batch = 8
    config.train.length = 256
    config.train.microbatches = 1
    config.train.loss_chunk = 256  # positions whose logits are held at once
    config.train.log_every = 20
    config.train.max_skipped = 20  # steps in a row without a finite loss or gradient

    config.optimizer = ConfigDict()
    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 1e-2
    config.optimizer.schedule = "wsd"
    config.optimizer.warmup_steps = 50
    config.optimizer.decay_fraction = 0.4
    config.optimizer.final_fraction = 0.05
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.95
    config.optimizer.eps = 1e-8
    config.optimizer.momentum = 0.95
    config.optimizer.weight_decay = 0.1
    config.optimizer.clip_norm = 1.0

    config.eval = ConfigDict()
    config.eval.every = 300  # 0 is only at the start and at the end
    config.checkpoint = ConfigDict()
    config.checkpoint.every = 150
    config.checkpoint.keep = 2
    config.checkpoint.may_differ = ()  # keys of the model that a resumed run may change
    config.profile = ConfigDict()
    config.profile.start = 0  # a trace of the steps between start and stop; equal is none
    config.profile.stop = 0
    config.mesh = "data=-1"
    return choose_variant(config, variant, VARIANTS)
