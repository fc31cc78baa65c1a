import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import memseq
from memseq.data import corpus, sources

FILES = {f"{i}.txt": (f"file {i} " * (5 + i % 7)).encode() for i in range(120)}


@pytest.fixture
def text(tmp_path):
    root = tmp_path / "text"
    root.mkdir()
    for name, content in FILES.items():
        (root / name).write_bytes(content)
    return root


@pytest.fixture
def config(tmp_path, text):
    return {"path": str(text), "data_dir": str(tmp_path / "data")}


def everything(opened):
    return {
        (split, documents.name(i)): documents[i].tobytes()
        for split, documents in opened.splits.items()
        for i in range(len(documents))
    }


def unfinished(tmp_path):
    return list((tmp_path / "data").glob("**/incomplete.*"))


def start(config, prologue=""):
    """A process that opens the corpus without a network and prints its digest."""
    code = f"""
import os, pathlib, signal, socket, sys, time

def refuse(*args, **kwargs):
    raise AssertionError("network")

socket.socket.connect = socket.getaddrinfo = refuse
from memseq.data import corpus, sources
{prologue}
opened = corpus.open_corpus({config!r})
for documents in opened.splits.values():
    for document in documents:
        assert document.size
assert "tensorflow" not in sys.modules
print(opened.digest)
"""
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(pathlib.Path(memseq.__file__).parents[1])},
    )


def test_every_file_is_there_once_byte_for_byte(config, capsys):
    opened = corpus.open_corpus(config)
    found = everything(opened)
    assert len(found) == len(FILES)
    assert {name: content for (_, name), content in found.items()} == FILES
    for documents in opened.splits.values():
        assert len(documents) > 0
        assert documents.total == documents.lengths.sum()
        assert documents[0].dtype == np.uint8
        with pytest.raises(IndexError):
            documents[len(documents)]
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "memseq: preparing" in captured.err
    assert "memseq: prepared in" in captured.err
    assert len(captured.err.splitlines()) == 2


def test_it_is_prepared_once_and_again_when_a_file_changes(config, text, capsys):
    first = corpus.open_corpus(config)
    capsys.readouterr()
    again = corpus.open_corpus(config)
    assert capsys.readouterr().err == ""
    assert (again.directory, again.digest) == (first.directory, first.digest)

    os.utime(text / "7.txt", ns=(1, 1))
    touched = corpus.open_corpus(config)
    assert touched.directory != first.directory
    assert touched.digest == first.digest  # of the text: the same, so a run may go on

    (text / "7.txt").write_bytes(b"something else")
    changed = corpus.open_corpus(config)
    assert changed.digest != first.digest
    assert b"something else" in everything(changed).values()
    assert everything(first) == everything(again)  # the old one is still whole


def test_bytes_of_any_value_and_names_of_any_kind_survive(tmp_path, text):
    (text / os.fsdecode(b"caf\xe9.bin")).write_bytes(bytes(range(256)) * 3)
    config = {"path": str(text), "data_dir": str(tmp_path / "data"), "glob": "*"}
    found = everything(corpus.open_corpus(config))
    assert bytes(range(256)) * 3 in found.values()
    assert os.fsdecode(b"caf\xe9.bin") in {name for _, name in found}


def test_two_processes_prepare_the_same_text_at_once(tmp_path, config):
    # Each waits, inside the preparation, until the other is there too.
    waiting = """
split = sources.split
def wait(source):
    pathlib.Path({mine!r}).touch()
    end = time.monotonic() + 60
    while not pathlib.Path({other!r}).exists():
        assert time.monotonic() < end
        time.sleep(0.01)
    return split(source)
sources.split = wait
"""
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    processes = [
        start(config, waiting.format(mine=a, other=b)),
        start(config, waiting.format(mine=b, other=a)),
    ]
    results = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], results
    assert results[0][0] == results[1][0] == corpus.open_corpus(config).digest + "\n"
    assert not unfinished(tmp_path)


def test_a_preparation_that_finishes_between_look_and_start_is_used(config):
    source = sources.find(corpus.Settings.of(config))
    folder = corpus.Settings.of(config).folder()
    late = corpus.TextCorpus(folder, source)
    digest = corpus.open_corpus(config).digest
    corpus._prepare(late, folder, source)
    assert corpus.open_corpus(config).digest == digest


def test_a_killed_preparation_leaves_nothing_that_looks_complete(tmp_path, config):
    killed = """
read = sources.Extent.read
def die(extent):
    if extent.file.name.startswith("50"):
        os.kill(os.getpid(), signal.SIGKILL)
    return read(extent)
sources.Extent.read = die
"""
    process = start(config, killed)
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL
    (left,) = unfinished(tmp_path)
    opened = corpus.open_corpus(config)
    assert len(everything(opened)) == len(FILES)
    assert left.exists()  # young: it might belong to a process that is still at work

    for path in [left, *left.rglob("*")]:
        os.utime(path, (time.time() - 2 * 24 * 3600,) * 2)
    corpus.open_corpus({**config, "limit_mb": 0.001})
    assert not left.exists()
    assert len(everything(corpus.open_corpus(config))) == len(FILES)


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path, config):
    full = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))  # no file longer than 500 bytes
"""
    process = start(config, full)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 1
    assert said.splitlines()[-1].startswith("OSError: cannot write the prepared corpus to ")
    assert not unfinished(tmp_path)
    assert len(everything(corpus.open_corpus(config))) == len(FILES)


def test_a_data_dir_that_cannot_be_written_is_named(tmp_path, config):
    (tmp_path / "data").write_text("a file")
    with pytest.raises(OSError, match="cannot write the prepared corpus to .*data: Not a dir"):
        corpus.open_corpus(config)


@pytest.mark.parametrize("damage", ["records", "shorter", "info", "metadata"])
def test_a_damaged_corpus_is_named(config, damage):
    directory = corpus.open_corpus(config).directory
    (records,) = directory.glob("*train*")
    if damage == "records":
        records.unlink()
    elif damage == "shorter":
        os.truncate(records, records.stat().st_size // 2)
    elif damage == "info":
        (directory / "dataset_info.json").unlink()
    else:
        (directory / "metadata.json").write_text('{"lengths": {"train": [1], "validation"')
    with pytest.raises(OSError, match=f"{directory} is damaged .*remove that folder"):
        corpus.open_corpus(config)


def test_a_record_of_another_length_is_noticed():
    documents = corpus.Documents([{"text": b"abc", "name": b"a"}], [4])
    with pytest.raises(OSError, match="document 0 .* has 3 bytes where 4 were written"):
        documents[0]


def test_an_unknown_split_is_named(config):
    with pytest.raises(ValueError, match="split: got 'dev', expected one of train, validation"):
        corpus.open_corpus(config).split("dev")


def test_a_slice_of_the_standard_library(tmp_path):
    opened = corpus.open_corpus({"data_dir": str(tmp_path), "limit_mb": 0.3})
    assert sum(documents.total for documents in opened.splits.values()) == 300_000
    assert "standard library" in opened.label
    train = b"".join(document.tobytes() for document in opened.split("train"))
    assert b"import " in train
    assert b"    return " in train
