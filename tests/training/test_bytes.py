"""The shipped byte-level config, from the command line: two steps of training, then generation."""

import pathlib
import shutil

import numpy as np
import pytest

from memseq import cli
from memseq.training.continue_text import continuations
from memseq.training.metrics import read_lines

CONFIG = str(pathlib.Path(__file__).parent.parent.parent / "configs" / "lm" / "bytes.py")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return tmp_path_factory.mktemp("prepared")


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, prepared):
    folder = tmp_path_factory.mktemp("runs") / "smoke"
    arguments = [f"--config={CONFIG}:smoke", f"--workdir={folder}", "--config.mesh=data=4,fsdp=2"]
    assert cli.main(["train", *arguments, f"--config.data.data_dir={prepared}", *BATCH]) == 0
    return folder


BATCH = ["--config.train.batch=8"]


def test_the_smoke_variant_trains_two_steps(workdir):
    lines = list(read_lines(workdir / "metrics.jsonl"))
    assert [(line["kind"], line["step"]) for line in lines] == [
        ("eval", 0),
        ("train", 1),
        ("train", 2),
        ("eval", 2),
    ]
    assert np.all(np.isfinite([line["loss"] for line in lines[1:3]]))
    # about 8 bits a byte before training; source text is far below that for a context model
    assert 7 < lines[0]["bits_per_byte"] < 10
    assert 1 < lines[-1]["order_3"] < lines[-1]["order_2"] < 4
    assert lines[-1]["bytes"] >= 10_000


def test_generation_continues_ragged_prompts_at_once_and_each_as_alone(workdir, capsys):
    arguments = [f"--workdir={workdir}", "--steps=5", "--seed=3"]
    assert cli.main(["generate", *arguments, "--prompt=def ", "--prompt=import os\nimport "]) == 0
    out = capsys.readouterr().out
    assert out.startswith("def ") and "\nimport os\nimport " in out
    both = continuations(workdir, ["def ", "import os\nimport "], steps=5, temperature=0)
    assert both == [
        continuations(workdir, [prompt], steps=5, temperature=0)[0]
        for prompt in ("def ", "import os\nimport ")
    ]


def test_draws_depend_on_the_seed_alone(workdir):
    first, again, other = (
        continuations(workdir, [""], steps=20, top_k=50, seed=seed) for seed in (1, 1, 2)
    )
    assert first == again != other


def failed(arguments, capsys):
    assert cli.main(["generate", "--prompt=x", "--steps=2", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("memseq: error: ") and error.count("\n") == 1
    return error


def test_a_run_without_checkpoints_is_one_sentence(tmp_path, capsys):
    assert "holds no checkpoint" in failed([f"--workdir={tmp_path}"], capsys)
    assert list(tmp_path.iterdir()) == []
    assert "holds no checkpoint" in failed([f"--workdir={tmp_path}/nowhere"], capsys)


def test_a_step_that_is_not_there_is_one_sentence(workdir, capsys):
    assert "no checkpoint of step 7; it has 2" in failed(
        [f"--workdir={workdir}", "--step=7"], capsys
    )


def test_a_damaged_checkpoint_is_one_sentence(workdir, tmp_path, capsys):
    copy = shutil.copytree(workdir, tmp_path / "copy")
    for file in (copy / "checkpoints" / "2" / "params").rglob("d/*"):
        file.write_bytes(file.read_bytes()[:50])
    assert "no checkpoint in" in failed([f"--workdir={copy}"], capsys)


@pytest.mark.parametrize(
    "argument, words",
    [
        ("--config.optimizer.lerning_rate=1", "did you mean 'optimizer.learning_rate'"),
        ("--config.train.steps=two", "takes an integer"),
        ("--config.data.path=/nowhere/at/all", "/nowhere/at/all"),
        ("--config.model.pattern=gated_delta_nt", "gated_delta_net"),
        ("--config.model.mixers.gated_delta_net.hedas=2", "heads"),
        ("--config.train.batch=12", "expected a multiple of 1"),
    ],
)
def test_a_wrong_setting_is_one_sentence(argument, words, prepared, tmp_path, capsys):
    arguments = [f"--config={CONFIG}:smoke", f"--workdir={tmp_path}/run"]
    arguments += [f"--config.data.data_dir={prepared}", *BATCH, argument]
    assert cli.main(["train", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("memseq: error: ") and error.count("\n") == 1 and words in error, error


def test_a_folder_that_cannot_be_written_is_one_sentence(prepared, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    arguments = [f"--config={CONFIG}:smoke", f"--workdir={tmp_path}/file/run", *BATCH]
    assert cli.main(["train", *arguments, f"--config.data.data_dir={prepared}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("memseq: error: ") and error.count("\n") == 1 and "file" in error
