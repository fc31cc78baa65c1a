import os

import ml_collections
import pytest

from memseq.data import sources
from memseq.data.settings import Settings


def write(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text)
    return root


def find(path, **more):
    return sources.find(Settings(path=str(path), **more))


def texts(splits):
    return {name: [extent.read() for extent in extents] for name, extents in splits.items()}


def names(source):
    return [file.name for file in source.files]


def test_a_directory_is_walked_without_hidden_cached_and_installed_files(tmp_path):
    root = write(
        tmp_path,
        {
            "b.txt": b"b",
            "a/c.py": b"c",
            ".git/x": b"x",
            ".hidden": b"x",
            "__pycache__/x": b"x",
            "site-packages/x": b"x",
        },
    )
    os.symlink(root / "missing", root / "dangling")
    assert names(find(root)) == ["a/c.py", "b.txt"]
    assert names(find(root, glob="*.py")) == ["a/c.py"]
    assert names(find(root, glob="a/*")) == ["a/c.py"]
    assert names(find(root / "b.txt")) == ["b.txt"]


def test_the_folder_of_prepared_corpora_is_no_part_of_a_corpus(tmp_path):
    root = write(tmp_path, {"a.txt": b"a", "prepared/key/x": b"x"})
    assert names(find(root, data_dir=str(root / "prepared"))) == ["a.txt"]


@pytest.mark.parametrize("change", ["touch", "grow", "add", "remove", "rename"])
def test_the_key_changes_with_the_files(tmp_path, change):
    root = write(tmp_path, {"a.txt": b"first", "b.txt": b"second"})
    before = find(root)
    assert find(root).key == before.key
    assert find(root, limit_mb=1).key != before.key
    if change == "touch":
        os.utime(root / "a.txt", ns=(1, 1))
    elif change == "grow":
        status = os.stat(root / "a.txt")
        (root / "a.txt").write_bytes(b"first and more")
        os.utime(root / "a.txt", ns=(status.st_atime_ns, status.st_mtime_ns))
    elif change == "add":
        write(root, {"c.txt": b"third"})
    elif change == "remove":
        (root / "b.txt").unlink()
    else:
        (root / "b.txt").rename(root / "c.txt")
    assert find(root).key != before.key


def test_files_are_split_by_name_and_stay_where_they_are_when_others_come(tmp_path):
    root = write(tmp_path, {f"{i}.txt": b"%04d" % i * 10 for i in range(1000)})
    splits, binary = sources.split(find(root))
    assert not binary
    before = {name: {extent.file.name for extent in splits[name]} for name in splits}
    assert [len(before[name]) for name in sources.SPLITS] == pytest.approx([900, 50, 50], abs=25)
    assert len(set().union(*before.values())) == 1000
    write(root, {f"new{i}.txt": b"new" for i in range(300)})
    splits, _ = sources.split(find(root))
    for name, extents in splits.items():
        assert before[name] <= {extent.file.name for extent in extents}


def test_one_file_is_cut_by_position_and_nothing_is_lost(tmp_path):
    text = bytes(range(256)) * 4
    path = tmp_path / "one.txt"
    path.write_bytes(text)
    splits = texts(sources.split(find(path))[0])
    assert b"".join(sum((splits[name] for name in sources.SPLITS), [])) == text
    assert [len(splits[name][0]) for name in sources.SPLITS] == [921, 51, 52]


def test_a_long_file_becomes_documents_of_bounded_length(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "DOCUMENT_BYTES", 100)
    path = tmp_path / "one.txt"
    path.write_bytes(bytes(range(256)) * 4)
    train = texts(sources.split(find(path))[0])["train"]
    assert [len(text) for text in train] == [100] * 9 + [21]
    assert b"".join(train) == path.read_bytes()[:921]


def test_a_limit_takes_exactly_so_many_bytes_and_always_the_same(tmp_path):
    root = write(tmp_path, {f"{i}.txt": b"x" * (i % 50) for i in range(200)})
    splits, _ = sources.split(find(root, limit_mb=0.001))
    extents = [extent for name in sources.SPLITS for extent in splits[name]]
    assert sum(extent.stop - extent.start for extent in extents) == 1000
    assert sources.split(find(root, limit_mb=0.001))[0] == splits


def test_binary_files_are_left_out_unless_asked_for(tmp_path):
    root = write(tmp_path, {"a.txt": b"text " * 100, "b.bin": b"\0" * 100})
    splits, binary = sources.split(find(root))
    assert [file.name for file in binary] == ["b.bin"]
    assert not any(0 in text for part in texts(splits).values() for text in part)
    assert not sources.split(find(root, glob="*"))[1]
    assert not sources.split(find(root / "b.bin"))[1]


@pytest.mark.parametrize(
    ("files", "settings", "message"),
    [
        (None, {}, "data.path: .* does not exist; expected a file or a directory"),
        ({}, {}, "data.path: no file in .* matches"),
        ({"a.txt": b"text"}, {"glob": "*.py"}, r"no file in .* matches '\*.py'"),
        ({"a.txt": b"", "b.txt": b""}, {}, r"every file in .* \(2\) is empty"),
        ({"a.bin": b"\0\1", "b.txt": b""}, {}, "has only binary or empty files"),
        ({"a.txt": b"four"}, {}, "gives 4 bytes in 1 files, too few"),
    ],
)
def test_files_that_make_no_corpus_are_refused_in_one_sentence(tmp_path, files, settings, message):
    root = tmp_path / "corpus"
    if files is not None:
        root.mkdir()
        write(root, files)
    with pytest.raises(ValueError, match=message) as caught:
        sources.split(find(root, **settings))
    assert "\n" not in str(caught.value)


def test_unreadable_folders_and_files_are_named(tmp_path, monkeypatch):
    root = write(tmp_path, {"a.txt": b"text"})
    source = find(root)

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied", str(root))

    with monkeypatch.context() as patch:
        patch.setattr(sources.os, "scandir", refuse)
        with pytest.raises(ValueError, match=f"cannot read {root}: Permission denied"):
            find(root)
    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", refuse)
        with pytest.raises(ValueError, match="a.txt: Permission denied"):
            sources.split(source)


def test_a_file_that_changes_while_it_is_prepared_is_an_error(tmp_path):
    root = write(tmp_path, {"a.txt": b"text " * 10})
    splits, _ = sources.split(find(root))
    (root / "a.txt").write_bytes(b"text " * 11)
    with pytest.raises(ValueError, match="changed from 50 to 55 bytes"):
        splits["train"][0].read()


def test_the_standard_library_is_the_default():
    source = sources.find(Settings())
    assert source.size > 10**6
    assert all(file.name.endswith(".py") for file in source.files)
    assert "json/decoder.py" in names(source)
    assert not any("site-packages" in file.name for file in source.files)
    assert source.key.startswith("stdlib-3.")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"limit_mb": -1}, "data.limit_mb: got -1, expected a number of megabytes"),
        ({"held_out_mb": float("nan")}, "data.held_out_mb: got nan"),
        ({"limit_mb": True}, "data.limit_mb: got True"),
        ({"path": None}, "data.path: got None, expected a string"),
    ],
)
def test_settings_of_the_wrong_kind_are_named(config, message):
    with pytest.raises(ValueError, match=message):
        Settings.of(config)


def test_settings_come_from_a_locked_config_that_has_some_of_the_keys_and_others():
    config = ml_collections.ConfigDict({"path": "x", "limit_mb": 2, "length": 512}).lock()
    assert Settings.of(config) == Settings(path="x", limit_mb=2.0)
    assert Settings.of({}) == Settings()


def test_the_folder_of_prepared_corpora(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("MEMSEQ_DATA", raising=False)
    assert Settings().folder() == tmp_path / "cache" / "memseq"
    monkeypatch.setenv("MEMSEQ_DATA", str(tmp_path / "data"))
    assert Settings().folder() == tmp_path / "data"
    assert Settings(data_dir=str(tmp_path)).folder() == tmp_path
    monkeypatch.delenv("MEMSEQ_DATA")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Settings().folder() == tmp_path / ".cache" / "memseq"
