"""Metric files: whole lines, cut back to the restored step, valid JSON whatever the numbers."""

import json
import math
import pathlib
import struct

import pytest
from tensorboardX.proto.event_pb2 import Event

from memseq.training.metrics import JsonLines, Metrics, read_lines


def write(path, *lines):
    file = JsonLines(path)
    for line in lines:
        file.write(line)
    file.close()


def test_lines_are_on_disk_at_once_and_appended(tmp_path):
    path = tmp_path / "lines.jsonl"
    file = JsonLines(path)
    file.write({"step": 1, "loss": 0.5})
    assert path.read_text() == '{"step": 1, "loss": 0.5}\n'
    file.close()
    write(path, {"step": 2})
    assert list(read_lines(path)) == [{"step": 1, "loss": 0.5}, {"step": 2}]


def test_numbers_that_are_not_finite_become_null(tmp_path):
    write(tmp_path / "x", {"a": math.nan, "b": math.inf, "c": {"d": -math.inf, "e": 1}})
    assert json.loads((tmp_path / "x").read_text()) == {
        "a": None,
        "b": None,
        "c": {"d": None, "e": 1},
    }


def test_floats_come_back_bit_for_bit(tmp_path):
    values = [1 / 3, 1e-300, 123456789.123456789]
    write(tmp_path / "x", {"values": values})
    assert next(read_lines(tmp_path / "x"))["values"] == values


def test_later_lines_and_a_line_cut_short_are_dropped(tmp_path):
    path = tmp_path / "x"
    write(path, *({"step": step} for step in (1, 2, 3, 4)))
    with path.open("a") as file:
        file.write('{"step": 2, "lo')
    assert [line["step"] for line in read_lines(path)] == [1, 2, 3, 4]
    JsonLines(path, last_step=2).close()
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    JsonLines(path).close()
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


@pytest.mark.parametrize("text", ["{]\n{}\n", "3\n"])
def test_a_damaged_line_is_named(tmp_path, text):
    (tmp_path / "x").write_text(text)
    with pytest.raises(ValueError, match="x, line 1: "):
        list(read_lines(tmp_path / "x"))


def test_a_run_goes_on_in_its_own_files(tmp_path):
    with Metrics(tmp_path, last_step=0) as first:
        first.write("eval", 0, {"bits": 8.0})
        for step in (1, 2, 3):
            first.write("train", step, {"loss": 1.0 / step})
            first.write_timing("speed", step, {"tokens_per_second": 10.0})
    with Metrics(tmp_path, last_step=2) as second:
        second.write("train", 3, {"loss": 0.25})
    lines = list(read_lines(tmp_path / "metrics.jsonl"))
    assert [(line["kind"], line["step"]) for line in lines] == [
        ("eval", 0),
        ("train", 1),
        ("train", 2),
        ("train", 3),
    ]
    assert lines[-1]["loss"] == 0.25
    assert len(list(read_lines(tmp_path / "timing.jsonl"))) == 3


def test_a_fresh_run_starts_its_files_anew(tmp_path):
    for _ in range(2):
        with Metrics(tmp_path, last_step=0) as metrics:
            metrics.write("eval", 0, {"bits": 8.0})
    assert len(list(read_lines(tmp_path / "metrics.jsonl"))) == 1


def events(folder):
    """What TensorBoard would read from all files of a folder, in the order of writing."""
    found = []
    for file in sorted((folder / "tensorboard").iterdir()):
        content = file.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])  # length, its checksum, data, its checksum
            found.append(Event.FromString(content[12 : 12 + length]))
            content = content[16 + length :]
    return found


def test_tensorboard_gets_the_same_numbers_and_a_resumed_run_replaces_later_ones(tmp_path):
    for last_step in (0, 4):
        with Metrics(tmp_path, last_step=last_step) as metrics:
            metrics.write("train", last_step + 1, {"loss": 0.5, "bad": math.nan, "name": "x"})
    got = [
        (e.file_version, e.step, {v.tag: v.simple_value for v in e.summary.value})
        for e in events(tmp_path)
    ]
    assert got == [
        ("brain.Event:2", 0, {}),
        ("", 1, {}),
        ("", 1, {"train/loss": 0.5}),
        ("brain.Event:2", 0, {}),
        ("", 5, {}),
        ("", 5, {"train/loss": 0.5}),
    ]
    assert events(tmp_path)[4].HasField("session_log")


@pytest.mark.skipif(not pathlib.Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_an_os_error_that_names_the_file(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.symlink_to("/dev/full")
    file = JsonLines.__new__(JsonLines)
    file.path, file._file = path, path.open("w")
    with pytest.raises(OSError, match="lines.jsonl"):
        file.write({"step": 1})
