"""`memseq recall` from the config to the report, and what can go wrong on the way."""

import json
import multiprocessing
import os
import pathlib
import re
import types

import jax
import numpy as np
import pytest

from memseq import config as configs
from memseq.evaluation import jobs, recall, report, workers
from memseq.evaluation.results import Folder
from tests.evaluation import harness

ROOT = pathlib.Path(harness.MAIN).parents[2]
SMOKE = f"{harness.MAIN}:smoke"
MEMORIES = ("softmax_attention", "linear_attention")  # of the smoke variant


def arguments(out, *overrides, seeds=1, config=SMOKE):
    overrides = ["--config.workers=1", *overrides]
    return types.SimpleNamespace(config=config, seeds=seeds, out=str(out), overrides=overrides)


def trained(folder) -> dict[tuple[str, str, int], dict]:
    rows = [row for row in folder.rows() if row["kind"] == "trained"]
    return {(row["memory"], row["task"], row["seed"]): row for row in rows}


def made_up(config, job, progress=None):
    """In place of `jobs.run`: the rows of a run that took no time."""
    if job.memory == "delta_net":
        raise KeyboardInterrupt
    rows = harness.rows(config, seeds=len(job.seeds), closed_form=False)
    return [row for row in rows if (row["memory"], row["task"]) == (job.memory, job.task)]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The smoke variant as it is: two memories, two tasks, two steps; two seeds."""
    out = tmp_path_factory.mktemp("recall") / "run"
    assert recall.main(arguments(out, seeds=2)) == 0
    return Folder(out)


def test_one_row_for_each_memory_task_and_seed(run):
    rows = trained(run)
    assert set(rows) == {(m, t, s) for m in MEMORIES for t in ("rewrite", "parity") for s in (0, 1)}
    assert len(run.rows()) == len(rows) + 5
    for (memory, _, _), row in rows.items():
        assert row["status"] == "ok" and 0 <= row["accuracy"] <= 1
        assert row["versions"]["jax"] == jax.__version__
        assert re.fullmatch("[0-9a-f]{12}", row["config_hash"])
        assert row["cpu_seconds"] > 0 and row["parameters"] > 0
        if memory == "linear_attention":  # [4, 16, 16 + 1], one tap of 3 * 64 channels, an id
            assert row["state_bytes"] == 4 * (4 * 16 * 17 + 3 * 64 + 1)
    assert "half: kept" in rows["linear_attention", "rewrite", 0]["scores"]
    assert "33-64" in rows["linear_attention", "parity", 0]["scores"]
    closed = [row["memory"] for row in run.rows() if row["kind"] == "closed_form"]
    assert closed == ["hebb", "decay", "delta", "least_squares", "softmax"]


def test_report_opens_without_a_network(run):
    text = run.report.read_text()
    assert "<svg" in text and not re.search(r"https?://|src=|href=", text)
    assert run.picture.stat().st_size > 1000
    assert run.read_manifest()["config"]["training"]["steps"] == 2


def test_more_seeds_go_on_where_the_run_stopped(run, capfd):
    before = run.rows()
    assert recall.main(arguments(run.path, seeds=2)) == 0
    assert run.rows() == before  # nothing was left to do
    assert f"report   {run.report}" in capfd.readouterr().out
    one = ("--config.on=parity,", "--config.compare=linear_attention,")
    assert recall.main(arguments(run.path, *one, seeds=3)) == 0
    assert run.rows()[: len(before)] == before
    assert len(run.rows()) == len(before) + 1
    assert ("linear_attention", "parity", 2) in trained(run)


def test_other_settings_do_not_mix(run):
    with pytest.raises(ValueError, match="made with other settings; give another --out"):
        recall.main(arguments(run.path, "--config.model.features=32", seeds=2))
    # words are no settings
    assert recall.main(arguments(run.path, "--config.tasks.parity.title=Odd", seeds=2)) == 0


def test_an_interrupt_keeps_what_is_finished(tmp_path, monkeypatch):
    """Ctrl-C in the second job: the rows of the first and a report of them are there."""
    monkeypatch.setattr(jobs, "run", made_up)
    both = "--config.compare=linear_attention,delta_net"
    with pytest.raises(KeyboardInterrupt):
        recall.main(arguments(tmp_path / "run", both, "--config.on=parity,"))
    folder = Folder(tmp_path / "run")
    assert set(trained(folder)) == {("linear_attention", "parity", 0)}
    assert "linear attention remembers best" in folder.report.read_text()


def test_a_full_disk_is_an_error_and_loses_nothing(tmp_path, monkeypatch):
    honest = Folder.append

    def append(self, rows):
        if any(row["memory"] == "linear_attention" for row in rows):
            raise OSError(28, "No space left on device", str(self.results))
        honest(self, rows)

    monkeypatch.setattr(jobs, "run", made_up)
    monkeypatch.setattr(Folder, "append", append)
    with pytest.raises(OSError, match="No space left on device"):
        recall.main(arguments(tmp_path / "run"))
    assert {key[0] for key in trained(Folder(tmp_path / "run"))} == {"softmax_attention"}


def test_one_failing_memory_does_not_stop_the_others(tmp_path, monkeypatch, capfd):
    """A mistake that shows only when the layer is traced becomes failed rows with the error."""
    honest = jobs.run

    def partly(config, job, progress=None):
        return (honest if job.memory == "delta_net" else made_up)(config, job, progress)

    monkeypatch.setattr(jobs, "run", partly)
    wrong = ("--config.memories.delta_net.options.max_beta=3.0", "--config.on=parity,")
    both = "--config.compare=linear_attention,delta_net"
    assert recall.main(arguments(tmp_path / "run", *wrong, both)) == 0
    rows = trained(Folder(tmp_path / "run"))
    assert rows["linear_attention", "parity", 0]["status"] == "ok"
    row = rows["delta_net", "parity", 0]
    assert row["status"] == "failed" and row["accuracy"] is None
    assert "max_beta: expected a write strength in (0, 2], got 3.0" in row["error"]
    out = capfd.readouterr()
    assert "1 of 2 runs failed" in out.out and "max_beta" in out.err
    # and no finished run at all is the command's failure
    assert recall.main(arguments(tmp_path / "alone", *wrong, "--config.compare=delta_net,")) == 1


@pytest.mark.parametrize(
    ("overrides", "seeds", "said"),
    [
        ((), 0, "seeds: expected an integer of at least 1, got 0"),
        (("--config.compare=delta_nut,",), 1, "did you mean 'delta_net'"),
        (("--config.on=rewrite,rewrite",), 1, "names something twice"),
        (("--config.claims=delta wins,",), 1, "claim 'delta wins'"),
        (("--config.training.steps=0", "--config.tasks.parity.training={}"), 1, "steps: "),
        (("--config.tasks.parity.variant=tinny",), 1, "did you mean 'tiny'"),
        (("--config.tasks.parity.headline=33-46",), 1, "headline"),
        (("--config.workers=-1",), 1, "workers: expected an integer of at least 0, got -1"),
        (("--config.capacity=tinny",), 1, "did you mean 'tiny'"),
    ],
)
def test_mistakes_are_found_before_anything_is_trained(tmp_path, overrides, seeds, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        recall.main(arguments(tmp_path / "run", *overrides, seeds=seeds))
    assert not (tmp_path / "run").exists()


def test_unwritable_folder():
    with pytest.raises(OSError):  # nobody can make a folder there, not even root
        recall.main(arguments("/proc/memseq/run"))


def test_folder_in_place_of_a_file(tmp_path):
    (tmp_path / "run").write_text("mine")
    with pytest.raises(ValueError, match="is a file"):
        recall.main(arguments(tmp_path / "run"))
    assert (tmp_path / "run").read_text() == "mine"


def test_default_folder_is_new_each_time(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(jobs, "run", lambda config, job, progress: jobs.failed(config, job, "no"))
    for _ in range(2):
        recall.main(arguments(recall.DEFAULT_OUT, "--config.on=parity,"))
    assert len(list(pathlib.Path(recall.DEFAULT_OUT).iterdir())) == 2


def test_every_config_names_what_exists():
    for name in ("main", "mqar"):
        config = configs.load(str(ROOT / f"configs/recall/{name}.py"))
        for job in jobs.plan(config, 1):
            model, task, also, settings = jobs.build(config, job.memory, job.task)
            assert jobs.state_bytes(model, 16) > 0 and settings.steps > 2
            assert config.tasks[job.task].headline in jobs.score_names(task)


def test_mqar_variant_names_a_layer():
    config = configs.load(str(ROOT / "configs/recall/mqar.py:gated_delta_net"))
    assert config.compare == ("gated_delta_net",)
    model, *_ = jobs.build(config, "gated_delta_net", "mqar")
    assert model.pattern == ("gated_convolution", "gated_delta_net")


def test_mqar_smoke(tmp_path):
    config = str(ROOT / "configs/recall/mqar.py:smoke")
    args = arguments(tmp_path / "run", config=config)
    assert recall.main(args) == 0
    row = Folder(tmp_path / "run").rows()[0]
    assert row["task"] == "mqar" and {"64x4", "64x8", "64x16"} <= set(row["scores"])
    assert "64x16" in (tmp_path / "run" / "report.html").read_text()


def test_workers(run):
    """A process of its own gives the same numbers; one that dies costs its own job only."""
    config = configs.load(SMOKE, ["--config.on=parity,"])
    events = []

    def hear(event):
        events.append(event)
        if event.job.memory == "softmax_attention" and event.rows is None:
            for process in multiprocessing.active_children():
                if process.name == f"memseq-worker-{event.worker}":
                    process.kill()

    workers.run(configs.to_json(config), jobs.plan(config, 1), 2, hear)
    rows = {row["memory"]: row for event in events for row in event.rows or ()}
    here = trained(run)["linear_attention", "parity", 0]
    there = rows["linear_attention"]
    assert there["status"] == "ok" and there["config_hash"] == here["config_hash"]
    np.testing.assert_allclose(there["curve"], here["curve"], rtol=1e-4)
    assert there["scores"].keys() == here["scores"].keys()
    assert rows["softmax_attention"]["status"] == "failed"
    assert "SIGKILL" in rows["softmax_attention"]["error"]
    assert {event.step for event in events if event.job.memory == "linear_attention"} >= {0, 2}


def test_count_of_workers():
    assert workers.choose_count(3, 2) == 2
    assert workers.choose_count(1, 5) == 1
    assert 1 <= workers.choose_count(0, 100) <= os.cpu_count()
    with pytest.raises(ValueError, match="workers: expected an integer of at least 0"):
        workers.choose_count(-1, 1)


def test_summary_has_every_table(run):
    text = report.summary(run.rows(), run.read_manifest())
    assert "Linear attention" in text and "N/d=0.5" in text
    assert json.loads(run.results.read_text().splitlines()[0])["task"] == "capacity"


@pytest.mark.slow
def test_three_seeds_show_what_they_must(tmp_path):
    """The main job: 12 minutes on two cores at most, and every claim of its config holds."""
    args = types.SimpleNamespace(config=harness.MAIN, seeds=3, out=str(tmp_path), overrides=[])
    assert recall.main(args) == 0
    folder = Folder(tmp_path)
    data = report.data_of(folder.rows(), folder.read_manifest())
    judged = report.outcomes(data, folder.read_manifest())
    assert len(judged) == 7
    assert [outcome.claim.text for outcome in judged if not outcome.holds] == []
    assert len([row for row in folder.rows() if row["kind"] == "trained"]) == 7 * 2 * 3
