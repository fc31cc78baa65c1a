"""The rule table: which parameter is sharded how, decays, and is a matrix; and the mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec

from memseq import partitioning as p

# (path, shape, spec on a mesh data=2,fsdp=2,tensor=2, decays, matrix)
CASES = [
    ("params/embed/embedding", (258, 32), ("tensor", "fsdp"), False, False),
    ("params/embed/embedding", (257, 32), (None, "fsdp"), False, False),
    ("params/memory/stored_patterns", (64, 32), ("tensor", "fsdp"), False, False),
    ("params/layers/mixer/query/kernel", (3, 32, 64), (None, "fsdp", "tensor"), True, True),
    ("params/layers/mixer/query/bias", (3, 64), (), False, False),
    ("params/mixer/output/kernel", (64, 32), ("tensor", "fsdp"), True, True),
    ("params/mixer/decay_out/kernel", (64, 32), ("fsdp", "tensor"), True, True),
    ("params/layers/channel/down/kernel", (3, 64, 32), (None, "tensor", "fsdp"), True, True),
    ("params/head/kernel", (32, 258), ("fsdp", "tensor"), True, False),
    ("params/layers/mixer/conv/kernel", (3, 4, 64), (None, None, "tensor"), False, False),
    ("params/layers/mixer/norm/scale", (3, 64), (), False, False),
    ("params/layers/mixer/key_scale", (3, 64), (), False, False),
    ("params/layers/mixer/bonus", (3, 4, 16), (), False, False),
    ("params/layers/mixer/gate/A_log", (3, 4), (), False, False),
    ("params/layers/mixer/gate/dt_bias", (3, 4), (), False, False),
    ("params/layers/mixer/gain_log", (3, 64), (), False, False),
    ("params/layers/mixer/phase", (3, 64, 32), (), False, False),
    ("params/layers/mixer/D", (3, 64), (), False, False),
    ("params/memory/log_beta", (), (), False, False),
    ("params/memory/sink_logits", (4,), (), False, False),
    ("params/nothing/like/this", (64, 64), (), False, False),
]


@pytest.fixture(scope="module")
def mesh():
    return p.make_mesh("data=2,fsdp=2,tensor=2")


@pytest.mark.parametrize("name, shape, spec, decays, matrix", CASES)
def test_rules(mesh, name, shape, spec, decays, matrix):
    assert p.partition_spec(name, shape, mesh) == PartitionSpec(*spec)
    assert p.decays(name) is decays
    assert p.is_matrix(name) is matrix


def test_a_mesh_has_all_axes_and_they_are_auto(mesh):
    assert mesh.axis_names == p.AXES
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "context": 1, "tensor": 2}
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert dict(p.make_mesh().shape)["data"] == jax.device_count()
    assert dict(p.make_mesh({"fsdp": -1, "tensor": 2}).shape)["fsdp"] == jax.device_count() // 2
    assert p.make_mesh("", jax.devices()[:1]).size == 1


@pytest.mark.parametrize(
    "shape, words",
    [
        ("rows=2", "unknown axis 'rows'"),
        ("data=2,fsdp", "'fsdp' is not AXIS=SIZE"),
        ("data=x", "'data=x' is not AXIS=SIZE"),
        ("data=0", "size 0"),
        ("data=-1,fsdp=-1", "only one axis"),
        ("data=3", "do not multiply to the 8 devices"),
        ("data=-1,fsdp=3", "do not multiply to the 8 devices"),
    ],
)
def test_a_wrong_mesh_is_explained(shape, words):
    with pytest.raises(ValueError, match=words):
        p.make_mesh(shape)


def test_optimiser_moments_live_where_their_parameters_do(mesh):
    params = {"params": {"up": {"kernel": jnp.zeros((32, 64))}, "norm": {"scale": jnp.zeros(64)}}}
    state = optax.adamw(1e-3).init(params)
    placed = jax.device_put(state, p.tree_shardings(state, mesh))
    moments = placed[0].mu["params"]
    assert moments["up"]["kernel"].sharding.spec == PartitionSpec("fsdp", "tensor")
    assert moments["up"]["kernel"].addressable_shards[0].data.shape == (16, 32)
    assert moments["norm"]["scale"].sharding.spec == PartitionSpec()
    assert placed[0].count.sharding.spec == PartitionSpec()


def test_a_batch_is_split_over_data_and_fsdp(mesh):
    x = jax.device_put(np.arange(8 * 6).reshape(8, 6), p.batch_sharding(mesh))
    assert x.addressable_shards[0].data.shape == (2, 6)


def test_the_report_counts_bytes_on_a_device(mesh):
    params = {
        "up": {"kernel": jax.ShapeDtypeStruct((32, 64), jnp.bfloat16)},
        "odd": jax.ShapeDtypeStruct((5,), jnp.float32),
    }
    rows = {row.name: row for row in p.report(params, mesh)}
    assert rows["up/kernel"].bytes == 32 * 64 * 2
    assert rows["up/kernel"].bytes_per_device == 32 * 64 * 2 // 4
    assert rows["odd"].rule is None and rows["odd"].bytes_per_device == 20
    np.testing.assert_allclose(p.replicated_fraction(list(rows.values())), 20 / (32 * 64 * 2 + 20))
    text = p.format_report(list(rows.values()))
    assert "fsdp, tensor" in text and "(no rule)" in text and "2,053 parameters" in text
    assert f"{1024 + 20:,} bytes on each device" in text


def test_axes_of_kernels_are_those_of_the_innermost():
    assert p.split() == (p.BATCH_AXES, p.HEAD_AXES)
    with p.split_over("rows", ["columns"]):
        assert p.split() == (("rows",), ("columns",))
        with p.split_over(heads=()):
            assert p.split() == (("rows",), ())
    assert p.split() == (p.BATCH_AXES, p.HEAD_AXES)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ({"batch": 3}, "batch: expected names of mesh axes, got 3"),
        ({"heads": ("tensor", None)}, "heads: expected names of mesh axes, got ('tensor', None)"),
        ({"heads": "data"}, "heads: expected other axes than batch's ('data', 'fsdp'), got"),
    ],
)
def test_bad_axes_of_kernels(names, said):
    with pytest.raises(ValueError) as error, p.split_over(**names):
        pass
    assert str(error.value).startswith(said)
