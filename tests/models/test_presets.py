"""The models of configs/lm with papers' shapes: counted, not allocated, and tiny ones run."""

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from memseq import config as configs
from memseq.models import build

FOLDER = Path(__file__).parent.parent.parent / "configs" / "lm"

# parameters, what the paper says of them in millions if it does, bytes after 2,048 positions
PRESETS = {
    "gla_340m": (341_707_776, 340, 12_583_008),
    "gated_deltanet_1b": (1_387_348_732, 1_300, 66_834_516),
    "rwkv7_04b": (450_715_648, 450.8, 6_389_952),
    "based": (362_672_128, 363, 8_441_792),
    "deltaproduct": (392_318_976, 392, 13_320_288),
    "kda_hybrid": (350_944_656, None, 60_149_880),
    "samba": (1_354_095_360, 1_300, 172_846_188),
    "sambay": (1_129_306_688, None, 6_642_004),
    "mom_380m": (512_352_192, None, 128_041_536),
    "hybrid": (379_368_096, None, 61_329_528),
}

# what configs/lm/hybrid.py mixes with
PARTNERS = ["softmax_attention", "sliding_window_attention", "forgetting_attention"]
PARTNERS += ["path_attention", "differential_attention"]


def model_of(name):
    return build.language_model(configs.load(str(FOLDER / name)).model)


@pytest.mark.parametrize("name", PRESETS)
def test_size(name):
    count, published, state_bytes = PRESETS[name]
    model = model_of(f"{name}.py")
    tokens = jax.ShapeDtypeStruct((1, 16), jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == count
    assert published is None or abs(count / 1e6 / published - 1) < 0.07
    assert model.state_bytes(1, 2048) == state_bytes


@pytest.mark.parametrize("name", PRESETS)
def test_smoke_variant_is_small_and_runs(name):
    model = model_of(f"{name}.py:smoke")
    tokens = jnp.zeros((1, 8), jnp.int32)

    def run(key):
        params = model.init(key, tokens)
        return model.apply(params, tokens)[0], params

    logits, params = jax.eval_shape(run, jax.random.key(0))
    assert logits.shape == (1, 8, 257)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) < 1_000_000


@pytest.mark.slow
@pytest.mark.parametrize("partner", PARTNERS)
def test_partners_of_the_hybrid(partner):
    """Eighteen layers and six of the attention asked for; windows bound the state."""
    model = model_of(f"hybrid.py:{partner}")
    assert model.pattern * model.repeats == (("gated_delta_net",) * 3 + (partner,)) * 6
    tokens = jax.ShapeDtypeStruct((1, 16), jnp.int32)
    jax.eval_shape(model.init, jax.random.key(0), tokens)
    grows = model.state_bytes(1, 8192) > model.state_bytes(1, 4096)
    assert grows == (partner != "sliding_window_attention")
