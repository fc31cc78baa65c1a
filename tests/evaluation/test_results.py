"""What is finished stays finished, whatever happens to the run."""

import datetime
import json

import pytest

from memseq.evaluation.results import RESULTS, Folder, dated, write_whole

ROW = {"kind": "trained", "memory": "m", "task": "t", "seed": 0, "status": "ok"}


@pytest.fixture
def folder(tmp_path):
    made = Folder(tmp_path / "run")
    made.create()
    return made


def test_rows_come_back(folder):
    folder.append([ROW, {**ROW, "seed": 1}])
    folder.append([{**ROW, "seed": 2}])
    assert [row["seed"] for row in folder.rows()] == [0, 1, 2]


def test_half_a_line_is_forgotten(folder):
    """A run that was killed while it wrote leaves half a row, which must not spoil the next."""
    folder.append([ROW])
    with open(folder.results, "a") as file:
        file.write('{"kind": "trained", "mem' + 1000 * "o")
    assert folder.rows() == [ROW]
    folder.append([{**ROW, "seed": 1}])
    assert [row["seed"] for row in folder.rows()] == [0, 1]
    assert folder.results.read_text().endswith("}\n")


def test_damaged_line_is_named(folder):
    folder.append([ROW])
    with open(folder.results, "a") as file:
        file.write('{"kind": 1}\n')
    with pytest.raises(ValueError, match="results.jsonl, line 2: not a row"):
        folder.rows()


def test_not_a_number_is_refused(folder):
    with pytest.raises(ValueError):
        folder.append([{**ROW, "accuracy": float("nan")}])
    assert folder.rows() == []


def test_earlier_run_is_kept(folder):
    folder.append([ROW])
    folder.create()
    assert folder.rows() == [ROW]


def test_strangers_and_files_are_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match="holds other things than a run \\('thesis.tex'\\)"):
        Folder(tmp_path).create()
    with pytest.raises(ValueError, match="is a file"):
        Folder(tmp_path / "thesis.tex").create()
    assert not (tmp_path / RESULTS).exists()


def test_no_run(tmp_path):
    with pytest.raises(ValueError, match="no results.jsonl"):
        Folder(tmp_path).rows()
    assert Folder(tmp_path).read_manifest() == {}


def test_manifest(folder):
    folder.write_manifest({"a": [1]})
    assert folder.read_manifest() == {"a": [1]}
    folder.manifest.write_text("{")
    with pytest.raises(ValueError, match="run.json is not JSON"):
        folder.read_manifest()


def test_write_whole_leaves_nothing_beside(tmp_path):
    write_whole(tmp_path / "x.json", json.dumps(1))
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_dated(tmp_path):
    now = datetime.datetime(2026, 11, 20, 9, 5, 7)
    first = dated(tmp_path, now)
    assert first.name == "2026-11-20_09-05-07"
    first.mkdir()
    assert dated(tmp_path, now).name == "2026-11-20_09-05-07_2"
