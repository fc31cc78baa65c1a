"""The loop around the step: what a run leaves behind, stopping and going on, runs gone wrong."""

import json
import os
import signal

import numpy as np
import pytest
from ml_collections import ConfigDict

from memseq import config as configs
from memseq.data.tokens import VOCABULARY_SIZE
from memseq.training import loop
from memseq.training.checkpoints import Checkpoints
from memseq.training.metrics import read_lines
from tests.training.stand_in import Tiny, options


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(8):
        words = " ".join(f"word{(number * k) % 17}" for k in range(400))
        (folder / f"{number}.txt").write_text(words)
    return folder


@pytest.fixture
def config(corpus, tmp_path):
    return ConfigDict(
        {
            "seed": 0,
            "model": {"vocab_size": VOCABULARY_SIZE, "features": 8},
            "data": {
                "path": str(corpus),
                "glob": "",
                "data_dir": str(corpus.parent / "prepared"),
                "limit_mb": 0.0,
                "held_out_mb": 0.0,
            },
            "train": {
                "steps": 6,
                "batch": 8,
                "length": 16,
                "microbatches": 1,
                "loss_chunk": 16,
                "log_every": 2,
                "max_skipped": 3,
            },
            "optimizer": options(),
            "eval": {"every": 3},
            "checkpoint": {"every": 2, "keep": 2},
            "profile": {"start": 0, "stop": 0},
            "mesh": "data=-1",
        }
    )


@pytest.fixture(autouse=True)
def tiny_model(monkeypatch):
    def language_model(model):
        return Tiny(features=model.features, vocabulary=model.vocab_size)

    monkeypatch.setattr("memseq.models.build.language_model", language_model)


def lines(folder, kind=None, name="metrics.jsonl"):
    return [x for x in read_lines(folder / name) if kind is None or x["kind"] == kind]


def steps_of(folder, kind):
    return [line["step"] for line in lines(folder, kind)]


def before_step(monkeypatch, step, action):
    """Calls `action` when the step that follows `step` finished ones is about to be dispatched."""
    advance = loop._Run._advance

    def hooked(run):
        if run.step == step:
            action(run)
        advance(run)

    monkeypatch.setattr(loop._Run, "_advance", hooked)


def test_a_run_leaves_everything_in_its_folder(config, tmp_path, capsys):
    summary = loop.train(config, tmp_path / "run")
    run = tmp_path / "run"
    assert steps_of(run, "train") == [1, 2, 4, 6]
    assert steps_of(run, "eval") == [0, 3, 6]
    assert Checkpoints(run / "checkpoints", read_only=True).steps() == [4, 6]
    first, *_, last = lines(run, "eval")
    assert last["bits_per_byte"] == summary.bits_per_byte < first["bits_per_byte"]
    assert abs(first["bits_per_byte"] - 8) < 0.5  # nothing learned: a byte is worth 8 bits
    assert 0 < last["order_3"] < 8 and 0 < last["order_2"] < 8
    assert (summary.step, summary.signal) == (6, None)
    train = lines(run, "train")[-1]
    assert train["tokens"] == 6 * 8 * 16 and np.isfinite(train["loss"])
    assert (
        configs.differences(
            configs.from_json((run / "config.json").read_text()),
            configs.from_json(configs.to_json(config)),
        )
        == {}
    )
    (session,) = list(read_lines(run / "sessions.jsonl"))
    assert session["step"] == 0 and "jax" in session["versions"]
    assert "params/embed/embedding" in (run / "parameters.txt").read_text()
    split = lines(run, "split", "timing.jsonl")[-1]
    parts = sum(value for key, value in split.items() if key not in ("kind", "step", "total"))
    np.testing.assert_allclose(parts, split["total"])
    assert {"init", "data", "compile", "train", "eval", "save"} <= split.keys()
    assert split["step"] == 6
    shown = capsys.readouterr().err
    assert "order-2" in shown and "order-3" in shown and "bits/byte" in shown


def test_a_stopped_run_goes_on_to_the_numbers_of_one_that_was_not(config, tmp_path, monkeypatch):
    config.train.log_every = 1  # the line of the step that was stopped at must not be lost
    loop.train(config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        before_step(patch, 2, lambda run: os.kill(os.getpid(), signal.SIGTERM))
        summary = loop.train(config, tmp_path / "parts")
    assert (summary.step, summary.signal, summary.bits_per_byte) == (3, signal.SIGTERM, None)
    with monkeypatch.context() as patch:
        before_step(patch, 4, lambda run: os.kill(os.getpid(), signal.SIGINT))
        assert loop.train(config, tmp_path / "parts").step == 5
    loop.train(config, tmp_path / "parts")
    whole, parts = ((tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "parts"))
    assert whole == parts
    assert digests(tmp_path / "whole") == digests(tmp_path / "parts")
    sessions = list(read_lines(tmp_path / "parts" / "sessions.jsonl"))
    assert [session["step"] for session in sessions] == [0, 3, 5]


def digests(run, step=6):
    path = run / "checkpoints" / str(step) / "meta" / "metadata"
    body = json.loads(path.read_text())["body"]
    return body["digests"], body["data"], body["counters"]


def test_a_crash_between_checkpoints_goes_back_to_the_one_before(config, tmp_path, monkeypatch):
    loop.train(config, tmp_path / "whole")

    def crash(run):
        raise RuntimeError("power")

    with monkeypatch.context() as patch:
        before_step(patch, 5, crash)
        with pytest.raises(RuntimeError, match="power"):
            loop.train(config, tmp_path / "parts")
    assert steps_of(tmp_path / "parts", "eval") == [0, 3]
    loop.train(config, tmp_path / "parts")
    whole, parts = ((tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "parts"))
    assert whole == parts
    assert digests(tmp_path / "whole") == digests(tmp_path / "parts")


def test_a_finished_run_is_scored_again_and_left_alone(config, tmp_path):
    first = loop.train(config, tmp_path)
    before = (tmp_path / "metrics.jsonl").read_text()
    again = loop.train(config, tmp_path)
    assert again == first
    assert (tmp_path / "metrics.jsonl").read_text() == before


def test_a_run_can_be_made_longer(config, tmp_path, capsys):
    loop.train(config, tmp_path)
    config.train.steps = 8
    assert loop.train(config, tmp_path).step == 8
    assert steps_of(tmp_path, "train") == [1, 2, 4, 6, 8]
    assert "config.train.steps was 6, is 8 from here on" in capsys.readouterr().err


@pytest.mark.parametrize(
    "key, value", [("model.features", 16), ("train.length", 32), ("seed", 1), ("train.batch", 16)]
)
def test_another_config_is_refused_by_name_and_nothing_is_lost(config, tmp_path, key, value):
    loop.train(config, tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.glob("*.json*")}
    config.update_from_flattened_dict({key: value})
    with pytest.raises(ValueError, match=f"another config: {key} was .*, is {value}"):
        loop.train(config, tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.glob("*.json*")} == before
    assert Checkpoints(tmp_path / "checkpoints").steps() == [4, 6]


def test_an_update_chunk_is_part_of_the_model_and_changes_only_on_purpose(config, tmp_path, capsys):
    key = "model.mixers.titans_lmm.update_chunk"
    config.model.mixers = ConfigDict({"titans_lmm": {"update_chunk": 16}})
    loop.train(config, tmp_path)
    config.model.mixers.titans_lmm.update_chunk = 32
    with pytest.raises(ValueError, match=f"another config: {key} was 16, is 32.*may_differ"):
        loop.train(config, tmp_path)
    config.checkpoint.may_differ = (key,)
    config.train.steps = 8
    assert loop.train(config, tmp_path).step == 8
    assert f"config.{key} was 16, is 32 from here on" in capsys.readouterr().err


def test_a_broken_checkpoint_is_named_and_the_one_before_taken(config, tmp_path, capsys):
    loop.train(config, tmp_path)
    whole = (tmp_path / "metrics.jsonl").read_text(), digests(tmp_path)
    (tmp_path / "checkpoints" / "6" / "meta" / "metadata").write_text("{}")
    loop.train(config, tmp_path)
    assert ((tmp_path / "metrics.jsonl").read_text(), digests(tmp_path)) == whole
    shown = capsys.readouterr().err
    assert "the checkpoint of step 6 cannot be used: " in shown
    assert "going on from the checkpoint of step 4" in shown


def test_many_steps_that_are_not_finite_stop_the_run(config, tmp_path, monkeypatch, capsys):
    def poison(run):
        params = run.state.params["params"]
        params["up"]["kernel"] = params["up"]["kernel"].at[0, 0].set(np.nan)

    config.train.steps = 20
    config.checkpoint.every = 4
    before_step(monkeypatch, 5, poison)
    with pytest.raises(FloatingPointError, match="3 steps in a row, up to step 8,"):
        loop.train(config, tmp_path)
    assert Checkpoints(tmp_path / "checkpoints", read_only=True).steps() == [4]
    assert [x["skipped"] for x in lines(tmp_path, "train")] == [0, 0, 0, 1, 2, 3]
    assert lines(tmp_path, "train")[-1]["loss"] is None
    assert "step 6 was skipped" in capsys.readouterr().err


def test_a_single_bad_step_is_counted_and_the_run_goes_on(config, tmp_path, monkeypatch):
    def poison(run):
        def put(batch):
            del run._put  # the next batch is whole again
            return run._put({**batch, "weights": batch["weights"] * np.float32(np.nan)})

        run._put = put

    before_step(monkeypatch, 2, poison)
    loop.train(config, tmp_path)
    assert [(x["step"], x["skipped"], x["skipped_in_row"]) for x in lines(tmp_path, "train")] == [
        (1, 0, 0),
        (2, 0, 0),
        (3, 1, 1),
        (4, 1, 0),
        (6, 1, 0),
    ]


def test_a_folder_in_use_or_in_the_way_is_an_os_error(config, tmp_path, monkeypatch):
    def again(run):
        with pytest.raises(OSError, match="in use by another run"):
            loop.train(config, tmp_path / "run")

    before_step(monkeypatch, 1, again)
    loop.train(config, tmp_path / "run")
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        loop.train(config, tmp_path / "file" / "run")


def test_a_checkpoint_that_cannot_be_written_stops_the_run_within_one_interval(
    config, tmp_path, monkeypatch
):
    save = Checkpoints.save

    def full(self, state, **rest):
        if int(state.step) < 4:
            return save(self, state, **rest)
        raise OSError(28, "No space left on device", str(self.directory))

    monkeypatch.setattr(Checkpoints, "save", full)
    with pytest.raises(OSError, match="No space left"):
        loop.train(config, tmp_path)
    assert Checkpoints(tmp_path / "checkpoints", read_only=True).steps() == [2]
    monkeypatch.undo()


@pytest.mark.parametrize(
    "key, value, words",
    [
        ("train.steps", 0, "config.train.steps: got 0, expected >= 1"),
        ("train.microbatches", 3, "config.train.batch: got 8, expected a multiple of 3"),
        ("train.batch", 12, "config.train.batch: got 12, expected a multiple of .* 8 .devices"),
        ("checkpoint.every", 0, "config.checkpoint.every"),
        ("eval.every", -1, "config.eval.every"),
        ("model.vocab_size", 256, "config.model.vocab_size: got 256, expected >= 257"),
        ("mesh", "data=3", "mesh 'data=3'"),
        ("optimizer.name", "sgd", "optimizer.name"),
        ("profile.stop", -1, "profile"),
    ],
)
def test_numbers_that_cannot_work_are_refused(config, tmp_path, key, value, words):
    config.update_from_flattened_dict({key: value})
    with pytest.raises(ValueError, match=words):
        loop.train(config, tmp_path / "run")


def test_a_mesh_with_sharded_parameters_trains_and_resumes_elsewhere(config, tmp_path, monkeypatch):
    config.mesh = "data=2,fsdp=2,tensor=2"
    with monkeypatch.context() as patch:
        before_step(patch, 3, lambda run: os.kill(os.getpid(), signal.SIGTERM))
        loop.train(config, tmp_path)
    assert "fsdp, tensor" in (tmp_path / "parameters.txt").read_text()
    config.mesh = "data=8"
    assert np.isfinite(loop.train(config, tmp_path).bits_per_byte)
