"""Checkpoints: whole, verified, finite, and going back to the newest sound one after any damage."""

import json
import resource
import shutil
import signal

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from memseq import partitioning
from memseq.training.checkpoints import CheckpointMismatch, Checkpoints
from memseq.training.digest import digest
from memseq.training.state import TrainState

CONFIG = ConfigDict({"model": {"features": 64, "pattern": ("a", "b")}})


def make_state(step, features=64, dtype=jnp.float32):
    key = jax.random.fold_in(jax.random.key(5), step)
    kernel = jax.random.normal(key, (features, 4 * features))
    params = {"params": {"up": {"kernel": kernel, "bias": jnp.arange(4.0).astype(dtype)}}}
    return TrainState(
        step=jnp.int32(step),
        skipped=jnp.int32(1),
        skipped_in_row=jnp.int32(0),
        key=jax.random.key(7),
        params=params,
        opt_state=optax.adamw(1e-3).init(params),
    )


def structs(state):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def save(checkpoints, state, data=None):
    data = {"position": int(state.step)} if data is None else data
    checkpoints.save(state, data=data, counters={"tokens": 10 * int(state.step)}, config=CONFIG)


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_array_equal(x, y)


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """Checkpoints of steps 1, 2 and 3, made once; tests damage copies."""
    folder = tmp_path_factory.mktemp("template") / "checkpoints"
    checkpoints = Checkpoints(folder, keep=3)
    for step in (1, 2, 3):
        save(checkpoints, make_state(step))
    checkpoints.close()
    return folder


@pytest.fixture
def folder(template, tmp_path):
    return shutil.copytree(template, tmp_path / "checkpoints")


def test_everything_comes_back(folder):
    restored = Checkpoints(folder).restore(structs(make_state(0)))
    assert_same(restored.state, make_state(3))
    assert (restored.step, restored.data, restored.counters) == (3, {"position": 3}, {"tokens": 30})
    assert restored.config.model.pattern == ("a", "b") and restored.skipped == {}


def test_an_older_step_on_request(folder):
    assert_same(Checkpoints(folder).restore(structs(make_state(0)), step=2).state, make_state(2))
    with pytest.raises(ValueError, match="no checkpoint of step 9; it has 1, 2, 3"):
        Checkpoints(folder).restore(structs(make_state(0)), step=9)


def test_no_checkpoint_at_all_is_none(tmp_path):
    assert Checkpoints(tmp_path / "new").restore(structs(make_state(0))) is None
    assert Checkpoints(tmp_path / "absent", read_only=True).restore_params(lambda _: None) is None
    assert not (tmp_path / "absent").exists()


def test_parameters_alone_with_structs_made_from_the_config(folder):
    def like(config):
        return structs(make_state(0, features=config.model.features)).params

    restored = Checkpoints(folder, read_only=True).restore_params(like)
    assert_same(restored.state, make_state(3).params)


def test_keep_removes_the_oldest(folder):
    checkpoints = Checkpoints(folder, keep=2)
    save(checkpoints, make_state(4))
    checkpoints.close()
    assert Checkpoints(folder, read_only=True).steps() == [3, 4]


def test_arrays_come_back_in_other_places(folder):
    mesh = partitioning.make_mesh("data=1,fsdp=4,tensor=2")
    like = jax.eval_shape(lambda: make_state(0))
    shardings = partitioning.tree_shardings(like, mesh)
    like = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), like, shardings
    )
    restored = Checkpoints(folder).restore(like)
    assert_same(restored.state, make_state(3))
    kernel = restored.state.params["params"]["up"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (16, 128)


def data_files(folder, step, item):
    """The files that hold arrays or their index, the largest last."""
    files = [f for f in (folder / str(step) / item).rglob("d/*") if f.is_file()]
    return sorted(files, key=lambda f: f.stat().st_size)


def flip_parameter_bit(folder):
    file = data_files(folder, 3, "params")[-1]
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def flip_optimizer_bit(folder):
    for file in data_files(folder, 3, "rest"):
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 4
        file.write_bytes(content)


def change_data_position(folder):
    file = folder / "3" / "meta" / "metadata"
    text = file.read_text()
    assert '"position": 3' in text
    file.write_text(text.replace('"position": 3', '"position": 4'))


def truncate(folder):
    file = data_files(folder, 3, "params")[-1]
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def delete_file(folder):
    data_files(folder, 3, "params")[-1].unlink()


def empty_step(folder):
    shutil.rmtree(folder / "3")
    (folder / "3").mkdir()


def delete_description(folder):
    (folder / "3" / "meta" / "metadata").unlink()


def delete_meta(folder):
    shutil.rmtree(folder / "3" / "meta")


def delete_rest(folder):
    shutil.rmtree(folder / "3" / "rest")


def delete_manifest(folder):
    (folder / "3" / "params" / "manifest.ocdbt").unlink()


def newer_step_name(folder):
    (folder / "3").rename(folder / "4")


FAULTS = [
    flip_parameter_bit,
    flip_optimizer_bit,
    change_data_position,
    truncate,
    delete_file,
    empty_step,
    delete_description,
    delete_meta,
    delete_rest,
    delete_manifest,
    newer_step_name,
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_after_damage_the_newest_sound_step_is_taken_and_the_run_can_go_on(folder, fault):
    fault(folder)
    checkpoints = Checkpoints(folder, keep=3)
    restored = checkpoints.restore(structs(make_state(0)))
    assert restored.step == 2
    assert_same(restored.state, make_state(2))
    ((step, reason),) = restored.skipped.items()
    assert step in (3, 4) and len(reason) > 10
    assert (folder / f"broken-{step}").is_dir()
    save(checkpoints, make_state(3))
    checkpoints.close()
    assert_same(Checkpoints(folder).restore(structs(make_state(0))).state, make_state(3))


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_whatever_file_is_damaged_the_state_is_that_of_a_step(folder, tmp_path, damage):
    """Some files are not needed to restore; then step 3 must come back as it was saved."""
    steps = set()
    for file in sorted(f.relative_to(folder) for f in (folder / "3").rglob("*") if f.is_file()):
        copy = shutil.copytree(folder, tmp_path / "copy")
        content = bytearray((copy / file).read_bytes())
        if damage == "delete":
            (copy / file).unlink()
        elif damage == "truncate":
            (copy / file).write_bytes(content[: len(content) // 2])
        else:
            content[len(content) // 2] ^= 1
            (copy / file).write_bytes(content)
        restored = Checkpoints(copy, read_only=True).restore(structs(make_state(0)))
        assert_same(restored.state, make_state(restored.step))
        assert (restored.data, set(restored.skipped)) == (
            {"position": restored.step},
            {3} - {restored.step},
        )
        steps.add(restored.step)
        shutil.rmtree(copy)
    assert steps == {2, 3}


def test_damage_beside_the_parameters_does_not_keep_them_from_being_read(folder):
    flip_optimizer_bit(folder)
    like = structs(make_state(0)).params
    assert Checkpoints(folder, read_only=True).restore_params(lambda _: like).step == 3
    flip_parameter_bit(folder)
    restored = Checkpoints(folder, read_only=True).restore_params(lambda _: like)
    assert restored.step == 2 and "params/params/up/kernel" in restored.skipped[3]
    assert (folder / "3").is_dir(), "reading only must not rename anything"


def test_no_sound_checkpoint_is_an_error_that_names_every_reason(folder):
    shutil.rmtree(folder / "1")
    truncate(folder)
    shutil.rmtree(folder / "2" / "meta")
    before = sorted(folder.iterdir())
    with pytest.raises(ValueError, match="no checkpoint in .* can be used .step 3: .*step 2: "):
        Checkpoints(folder).restore(structs(make_state(0)))
    assert sorted(folder.iterdir()) == before


def test_an_unfinished_write_is_ignored_and_removed(folder):
    left = folder / "4.orbax-checkpoint-tmp-12"
    shutil.copytree(folder / "3", left)
    assert Checkpoints(folder, read_only=True).steps() == [1, 2, 3] and left.exists()
    assert Checkpoints(folder).restore(structs(make_state(0))).step == 3


@pytest.mark.parametrize(
    "like, words",
    [
        (make_state(0, features=16), r"params/params/up/kernel is float32\[64, 256\] .*\[16, 64\]"),
        (make_state(0, dtype=jnp.bfloat16), "up/bias is float32.* bfloat16"),
        (
            make_state(0).replace(opt_state=()),
            "opt_state/.* in the checkpoint, absent in the config",
        ),
    ],
)
def test_another_model_or_optimiser_is_refused_by_leaf(folder, like, words):
    with pytest.raises(CheckpointMismatch, match=words):
        Checkpoints(folder).restore(structs(like))
    assert Checkpoints(folder).steps() == [1, 2, 3]


def test_the_callers_check_comes_first(folder):
    def check(config):
        raise CheckpointMismatch(f"features {config.model.features}")

    with pytest.raises(CheckpointMismatch, match="features 64"):
        Checkpoints(folder).restore(structs(make_state(0, features=16)), check=check)


@pytest.mark.parametrize("where", ["params", "opt_state"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_state_that_is_not_finite_is_never_saved(folder, where, value):
    state = make_state(4)
    bad = jax.tree.map(
        lambda x: x.at[(0,) * x.ndim].set(value) if x.ndim else x, getattr(state, where)
    )
    checkpoints = Checkpoints(folder, keep=1)
    with pytest.raises(FloatingPointError, match="after step 4 is not finite in .*up/bias"):
        save(checkpoints, state.replace(**{where: bad}))
    checkpoints.close()
    assert Checkpoints(folder).steps() == [1, 2, 3]


@pytest.fixture
def small_files():
    """No file may grow beyond 2 kB, as on a full disk."""
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, limits[1]))
    # nor are compiled programs left half written to those who share them
    seconds = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1e9)
    yield
    jax.config.update("jax_persistent_cache_min_compile_time_secs", seconds)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, before)


def test_a_failed_write_surfaces_at_the_next_call_and_leaves_the_rest(folder, small_files):
    checkpoints = Checkpoints(folder, keep=3)
    big = make_state(4, features=256)
    with pytest.raises(
        OSError, match="could not be written to .*; the checkpoints before it are as"
    ):
        save(checkpoints, big)
        checkpoints.wait()
    again = Checkpoints(folder)
    assert again.steps() == [1, 2, 3]
    assert_same(again.restore(structs(make_state(0))).state, make_state(3))


def test_a_folder_that_cannot_be_made_is_an_os_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        Checkpoints(tmp_path / "file" / "checkpoints")


def test_the_description_is_plain_json(folder):
    body = json.loads((folder / "3" / "meta" / "metadata").read_text())["body"]
    assert body["step"] == 3 and body["leaves"]["params"]["params/params/up/bias"] == [
        [4],
        "float32",
    ]


@pytest.mark.parametrize(
    "dtype", ["float32", "float16", "bfloat16", "int8", "uint32", "bool", "complex64"]
)
def test_a_digest_sees_every_flipped_bit_and_every_exchange(dtype):
    rng = np.random.default_rng(0)
    dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
    x = rng.integers(0, 2, (3, 5)).astype(dtype)

    def of(array):
        return digest({"x": jnp.asarray(array)})[0]["x"]

    seen = {of(x)}
    flips = 0
    for byte in range(0, x.nbytes, 3):
        for bit in range(1 if dtype.kind == "b" else 8):
            y = x.copy()
            y.view(np.uint8).reshape(-1)[byte] ^= 1 << bit
            seen.add(of(y))
            flips += 1
    assert len(seen) == flips + 1
    y = x.copy()
    y[0], y[1] = x[1], x[0]
    assert np.array_equal(x, y) or of(y) not in seen
    assert of(-x if dtype.kind == "f" else x[::-1]) != of(x)


def test_a_digest_does_not_depend_on_the_sharding():
    mesh = partitioning.make_mesh("data=1,fsdp=4,tensor=2")
    x = jax.random.normal(jax.random.key(0), (8, 16))
    spread = jax.device_put(x, jax.NamedSharding(mesh, jax.P("fsdp", "tensor")))
    assert digest({"x": x}) == digest({"x": spread})
    assert digest({"x": x.at[0, 0].set(jnp.inf)})[1] == ["x"]
