"""A training step for a TPU pod, compiled ahead of time on a machine that has none of it."""

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from memseq import partitioning
from memseq.models.language_model import LanguageModel
from memseq.pallas_kernels import aot
from memseq.training.optimizers import make_optimizer
from memseq.training.state import initial_state
from memseq.training.step import make_train_step

OPTIMIZER = {
    "name": "adamw",
    "learning_rate": 1e-3,
    "schedule": "cosine",
    "warmup_steps": 10,
    "decay_fraction": 0.2,
    "final_fraction": 0.1,
    "b1": 0.9,
    "b2": 0.95,
    "eps": 1e-8,
    "momentum": 0.95,
    "weight_decay": 0.1,
    "clip_norm": 1.0,
}


def test_kernels_in_a_training_step_for_256_chips():
    """Every chip runs the kernels on its own rows and heads: 4 of 256 rows, 2 of 8 heads."""
    aot.require_libtpu()
    pod = topologies.get_topology_desc(platform="tpu", topology_name="v5p:8x8x4").devices
    mesh = partitioning.make_mesh("data=8,fsdp=8,tensor=4", pod)
    model = LanguageModel(
        vocab_size=512,
        features=512,
        pattern=("gated_delta_net",),
        repeats=1,
        mixers={"gated_delta_net": {"heads": 8, "key_dim": 128, "value_dim": 128}},
        dtype=jnp.bfloat16,
    )
    optimizer, schedule = make_optimizer(OPTIMIZER, 100)
    state = jax.eval_shape(lambda: initial_state(model, optimizer, 0, 512))
    shardings = partitioning.tree_shardings(state, mesh)
    step = make_train_step(model, optimizer, schedule, out_shardings=shardings)
    rows = partitioning.batch_sharding(mesh)
    batch = {
        name: jax.ShapeDtypeStruct((256, 512), dtype, sharding=rows)
        for name, dtype in [
            ("tokens", jnp.int32),
            ("targets", jnp.int32),
            ("segment_ids", jnp.int32),
            ("weights", jnp.float32),
        ]
    }
    state = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings
    )
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        compiled = step.lower(state, batch).compile()
    calls = [line for line in compiled.as_text().splitlines() if "tpu_custom_call" in line]
    deltas = [line for line in calls if "delta_rule" in line]
    assert len(deltas) >= 3  # forward, states at the chunks' starts, backward
    # 4 rows x 2 heads as sequences of 512 steps: no chip computes another's share
    assert all("[8,512,128]" in line for line in deltas if "forward" in line or "backward" in line)
