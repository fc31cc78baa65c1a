"""Which files a corpus is made of: the standard library's source or the user's own text.

A source is found again at every start, which takes a stat of each file and no reading; its key
changes when a file is added, removed, resized or touched, so changed text is prepared anew. The
splits are decided when a corpus is prepared:

- A file belongs to train, validation or test (90, 5 and 5 of 100) by a hash of its name relative
  to the corpus, so a file stays where it is when others come and go.
- Where that leaves a split without a fair share of the bytes (a corpus of one file, or of a few),
  every file is cut at 90 and 95 of 100 of its bytes instead.
"""

import dataclasses
import fnmatch
import hashlib
import math
import os
import platform
import re
import stat
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from memseq.data.settings import MEGABYTE, Settings

SPLITS = ("train", "validation", "test")
DOCUMENT_BYTES = (
    2**18
)  # a longer file becomes several documents: rows are read at random, by document

_FORMAT = 1  # raise when the meaning of a prepared corpus changes: old ones are then left alone
_BOUNDS = (0.90, 0.95)
_PROBE = 8192  # a zero byte among so many first ones says "binary", the rule git and grep use
_SKIPPED_FOLDERS = ("__pycache__", "site-packages", "dist-packages")


@dataclasses.dataclass(frozen=True)
class File:
    """One file of a source: its name relative to the corpus, and what `stat` said of it."""

    name: str
    path: Path
    size: int  # bytes
    modified: int  # nanoseconds


@dataclasses.dataclass(frozen=True)
class Source:
    """Files to prepare. `key` names them and their state, and is fit for a folder's name."""

    label: str
    key: str
    files: tuple[File, ...]
    skip_binary: bool
    limit: int  # bytes; 0 is all

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)


@dataclasses.dataclass(frozen=True)
class Extent:
    """Bytes `start` to `stop` of one file: one document."""

    file: File
    start: int
    stop: int

    def read(self) -> bytes:
        """The document's bytes. Raises ValueError if the file is no longer what was listed."""
        try:
            with open(self.file.path, "rb") as stream:
                stream.seek(self.start)
                text = stream.read(self.stop - self.start)
                size = os.fstat(stream.fileno()).st_size
        except OSError as error:
            raise _unreadable(self.file.path, error) from error
        if size != self.file.size or len(text) != self.stop - self.start:
            raise ValueError(
                f"data.path: {self.file.path} changed from {self.file.size} to {size} bytes while "
                "the corpus was being prepared; run again when it is no longer written to"
            )
        return text


def find(settings: Settings) -> Source:
    """Lists the files that `settings` asks for.

    A directory is walked without following links to directories; hidden names (first character a
    dot), `__pycache__`, `site-packages`, `dist-packages` and the folder of prepared corpora are
    passed over. Files with zero bytes near their beginning are taken for binary and left out when
    the corpus is prepared, unless `glob` or the path of a single file asks for them.

    Raises ValueError for a path that is missing, unreadable or without a matching file.
    """
    if settings.path:
        root = Path(settings.path).expanduser().absolute()
        label, stem = str(root), re.sub(r"[^A-Za-z0-9]+", "-", root.name).strip("-") or "files"
    else:
        root = Path(sysconfig.get_paths()["stdlib"])
        label = f"the standard library of Python {platform.python_version()}"
        stem = f"stdlib-{platform.python_version()}"
    glob = settings.glob or ("" if settings.path else "*.py")
    single = root.is_file()
    if single:
        found = [_entry(root.name, root)]
    elif root.is_dir():
        found = list(_walk(root, glob, settings.folder()))
    else:
        raise ValueError(
            f"data.path: {settings.path!r} does not exist; expected a file or a directory of text"
        )
    files = tuple(sorted((file for file in found if file is not None), key=lambda f: f.name))
    if not files:
        raise ValueError(
            f"data.path: no file in {root} matches {glob or '*'!r} (hidden ones are passed over); "
            "expected text files" + ("" if settings.path else ", or data.path naming some")
        )
    if not any(file.size for file in files):
        raise ValueError(
            f"data.path: every file in {root} ({len(files)}) is empty; expected some text"
        )
    limit = math.ceil(settings.limit_mb * MEGABYTE)
    skip_binary = not (single or settings.glob)
    digest = hashlib.blake2b(digest_size=8)
    for part in (_FORMAT, DOCUMENT_BYTES, label, str(root), limit, skip_binary):
        digest.update(f"{part}\0".encode("utf-8", "surrogateescape"))
    for file in files:
        line = f"{file.name}\0{file.size}\0{file.modified}\0"
        digest.update(line.encode("utf-8", "surrogateescape"))
    return Source(label, f"{stem[:40]}-{digest.hexdigest()}", files, skip_binary, limit)


def split(source: Source) -> tuple[dict[str, list[Extent]], list[File]]:
    """Documents of each split, in the order of file names, and the files left out as binary.

    With a limit, files are taken in the order of a hash of their names until it is reached, the
    last one only as far as it goes.

    Raises ValueError where nothing is left, or too little for three splits.
    """
    binary = [file for file in source.files if source.skip_binary and _is_binary(file)]
    left_out = {file.name for file in binary}
    extents = [
        Extent(file, 0, file.size)
        for file in source.files
        if file.size and file.name not in left_out
    ]
    if not extents:
        raise ValueError(
            f"data.path: {source.label} has only binary or empty files ({len(source.files)}); "
            "expected text (data.glob='*' takes binary files too)"
        )
    if source.limit:
        extents = _limited(extents, source.limit)
    splits = _by_name(extents)
    if not _fair(splits):
        splits = _by_position(extents)
    if not all(splits.values()):
        total = sum(extent.stop - extent.start for extent in extents)
        raise ValueError(
            f"data.path: {source.label} gives {total} bytes in {len(extents)} files, too few for "
            "train, validation and test; expected at least 20 bytes in one file"
        )
    return {name: list(_documents(extents)) for name, extents in splits.items()}, binary


def _entry(name: str, path: Path) -> File | None:
    try:
        status = os.stat(path)
    except FileNotFoundError:  # a dangling link, or a file removed since the directory was read
        return None
    except OSError as error:
        raise _unreadable(path, error) from error
    if not stat.S_ISREG(status.st_mode):
        return None
    return File(name, path, status.st_size, status.st_mtime_ns)


def _walk(root: Path, glob: str, prepared: Path) -> Iterator[File | None]:
    def refuse(error: OSError) -> None:
        raise _unreadable(error.filename, error) from error

    for folder, folders, names in os.walk(root, onerror=refuse):
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".")
            and name not in _SKIPPED_FOLDERS
            and Path(folder, name) != prepared
        )
        for name in names:
            path = Path(folder, name)
            relative = path.relative_to(root).as_posix()
            pattern_for = relative if "/" in glob else name
            if not name.startswith(".") and (not glob or fnmatch.fnmatchcase(pattern_for, glob)):
                yield _entry(relative, path)


def _unreadable(path: str | Path, error: OSError) -> ValueError:
    reason = error.strerror or str(error)
    return ValueError(f"data.path: cannot read {path}: {reason}; expected readable text files")


def _is_binary(file: File) -> bool:
    try:
        with open(file.path, "rb") as stream:
            return b"\0" in stream.read(_PROBE)
    except OSError as error:
        raise _unreadable(file.path, error) from error


def _hash(name: str, salt: str) -> float:
    """A number in [0, 1) that depends on the name alone, on any machine."""
    data = name.encode("utf-8", "surrogateescape")
    digest = hashlib.blake2b(data, digest_size=6, person=salt.encode())
    return int.from_bytes(digest.digest(), "big") / 2**48


def _limited(extents: list[Extent], limit: int) -> list[Extent]:
    kept, left = [], limit
    for extent in sorted(extents, key=lambda e: (_hash(e.file.name, "limit"), e.file.name)):
        if left <= 0:
            break
        kept.append(dataclasses.replace(extent, stop=min(extent.stop, left)))
        left -= extent.stop
    return sorted(kept, key=lambda e: e.file.name)


def _by_name(extents: list[Extent]) -> dict[str, list[Extent]]:
    splits: dict[str, list[Extent]] = {name: [] for name in SPLITS}
    for extent in extents:
        place = _hash(extent.file.name, "split")
        splits[SPLITS[sum(place >= bound for bound in _BOUNDS)]].append(extent)
    return splits


def _by_position(extents: list[Extent]) -> dict[str, list[Extent]]:
    splits: dict[str, list[Extent]] = {name: [] for name in SPLITS}
    for extent in extents:
        cuts = [0, *(int(extent.stop * bound) for bound in _BOUNDS), extent.stop]
        for name, start, stop in zip(SPLITS, cuts, cuts[1:], strict=False):
            if stop > start:
                splits[name].append(Extent(extent.file, start, stop))
    return splits


def _fair(splits: dict[str, list[Extent]]) -> bool:
    sizes = {name: sum(e.stop - e.start for e in extents) for name, extents in splits.items()}
    total = sum(sizes.values())
    held_out = min(sizes["validation"], sizes["test"])
    return sizes["train"] >= 0.8 * total and held_out >= 0.01 * total


def _documents(extents: list[Extent]) -> Iterator[Extent]:
    for extent in extents:
        for start in range(extent.start, extent.stop, DOCUMENT_BYTES):
            yield Extent(extent.file, start, min(start + DOCUMENT_BYTES, extent.stop))
