"""A text corpus prepared once on disk by tensorflow-datasets (array_record, no TensorFlow).

`open_corpus` finds the files (see `sources`), prepares them if that has not been done for exactly
these files, and opens the result for random access. A prepared corpus is a folder

    <data_dir>/<key>/text_corpus/1.0.0/

written under another name and renamed when it is whole, so a preparation that was killed leaves
nothing that looks complete, and of two processes that prepare the same text one wins and both read
the same files. What a killed one left is removed by a later preparation, a day after. A corpus that
changed is prepared beside the old one; old ones may be deleted at any time when nothing reads them.
"""

import contextlib
import dataclasses
import hashlib
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from memseq.data import sources
from memseq.data.settings import MEGABYTE, Settings

_ABANDONED = (
    24 * 3600
)  # seconds after which an unfinished preparation belongs to no running process


class _LocalInfo(tfds.core.DatasetInfo):
    """DatasetInfo that never asks the tensorflow-datasets bucket whether it knows the data."""

    def initialize_from_bucket(self) -> None:
        pass


class TextCorpus(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Documents with features `name` (the file it is from) and `text`, both bytes.

    The metadata hold `lengths` (bytes of each document, by split), `digest` (of names and texts in
    order: equal wherever the same text was prepared) and the names left out as `binary`.
    """

    name = "text_corpus"
    VERSION = tfds.core.Version("1.0.0")
    # The builder looks beside its code for checksums of downloads; there are none, and looking for
    # the code of an installed package imports importlib_resources, which is not a dependency.
    code_path = None

    def __init__(self, folder: Path, source: sources.Source):
        self._source = source
        super().__init__(data_dir=folder / source.key)

    def _info(self) -> tfds.core.DatasetInfo:
        return _LocalInfo(
            builder=self,
            description="Text files as documents of bytes, in the order of their names.",
            features=tfds.features.FeaturesDict(
                {"name": tfds.features.Text(), "text": tfds.features.Text()}
            ),
            metadata=tfds.core.MetadataDict(),
            disable_shuffling=True,  # document i of a split has lengths[split][i] bytes
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        splits, binary = sources.split(self._source)
        self._digest = hashlib.blake2b(digest_size=16)
        self.info.metadata.update(
            lengths={}, binary=[repr(file.name)[1:-1] for file in binary], digest=""
        )
        return {name: self._generate_examples(name, splits[name]) for name in sources.SPLITS}

    def _generate_examples(
        self, split: str, extents: list[sources.Extent]
    ) -> Iterator[tuple[int, dict[str, bytes]]]:
        for index, extent in enumerate(extents):
            name = extent.file.name.encode("utf-8", "surrogateescape")
            text = extent.read()
            self._digest.update(b"%s\0%s\0%d\0" % (split.encode(), name, len(text)) + text)
            yield index, {"name": name, "text": text}
        # The metadata file is written after the last split, so it has the digest of all of them.
        self.info.metadata["lengths"][split] = [e.stop - e.start for e in extents]
        self.info.metadata["digest"] = self._digest.hexdigest()

    def _log_download_bytes(self) -> None:  # standard output is not ours to write to: see `_say`
        pass

    def _log_download_done(self) -> None:
        pass


class Documents(Sequence):
    """Random access to the documents of one split: item i is a uint8 array [lengths[i]].

    `lengths`: int64 [documents], in bytes, known without reading. `total`: their sum.
    """

    def __init__(self, records: Sequence[Mapping[str, bytes]], lengths: Sequence[int]):
        self._records = records
        self.lengths = np.asarray(lengths, np.int64)
        self.total = int(self.lengths.sum())

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> np.ndarray:
        if not 0 <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        text = np.frombuffer(self._records[int(index)]["text"], np.uint8)
        if len(text) != self.lengths[index]:
            raise OSError(
                f"document {index} of the prepared corpus has {len(text)} bytes where "
                f"{self.lengths[index]} were written; remove the prepared corpus and run again"
            )
        return text

    def name(self, index: int) -> str:
        """Name of the file that document `index` is from, relative to the corpus."""
        return self._records[int(index)]["name"].decode("utf-8", "surrogateescape")


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A prepared corpus: `splits` are "train", "validation" and "test"."""

    label: str
    directory: Path
    digest: str
    splits: Mapping[str, Documents]

    def split(self, name: str) -> Documents:
        """Documents of one split. Raises ValueError for a name that is none."""
        if name not in self.splits:
            raise ValueError(f"split: got {name!r}, expected one of {', '.join(sources.SPLITS)}")
        return self.splits[name]


def open_corpus(config: Mapping[str, Any]) -> Corpus:
    """Opens the corpus that `config` (keys of `settings.Settings`) names, preparing it if need be.

    What is prepared is said on stderr. Raises ValueError for files that cannot make a corpus (see
    `sources`) and OSError where the prepared one cannot be written or read.
    """
    settings = Settings.of(config)
    source = sources.find(settings)
    folder = settings.folder()
    builder = TextCorpus(folder, source)
    if not builder.data_path.exists():
        _prepare(builder, folder, source)
        builder = TextCorpus(folder, source)
    directory = Path(builder.data_path)
    try:
        metadata = builder.info.metadata
        splits = {
            name: Documents(builder.as_data_source(name), metadata["lengths"][name])
            for name in sources.SPLITS
        }
        digest = metadata["digest"]
        for name, documents in splits.items():
            shards = builder.info.splits[name].shard_lengths
            if sum(shards) != len(documents):
                raise ValueError(f"{sum(shards)} records of {len(documents)} in split {name}")
            for first in np.cumsum([0, *shards[:-1]]):  # the files are opened when they are read
                documents[first]
    except Exception as error:  # the readers raise whatever a broken file makes them trip over
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise OSError(
            f"the prepared corpus in {directory} is damaged ({reason}); "
            "remove that folder and run again"
        ) from error
    return Corpus(source.label, directory, digest, splits)


def _prepare(builder: TextCorpus, folder: Path, source: sources.Source) -> None:
    started = time.monotonic()
    _say(
        f"preparing {source.label} ({len(source.files)} files, "
        f"{source.size / MEGABYTE:.1f} MB) in {folder}"
    )
    target = Path(builder.data_path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(folder)
        local = tfds.download.DownloadConfig(try_download_gcs=False)
        with _quiet_bars(), tempfile.TemporaryDirectory() as nothing:  # nothing is downloaded to it
            builder.download_and_prepare(
                file_format="array_record", download_config=local, download_dir=nothing
            )
    except ValueError:  # one of ours, about the files
        raise
    except Exception as error:
        if target.exists():  # another process finished before us: renaming onto its result failed
            return
        reason = getattr(error, "strerror", None) or str(error)
        raise OSError(f"cannot write the prepared corpus to {folder}: {reason}") from error
    lengths = builder.info.metadata.get("lengths")
    if lengths is None:  # another process finished between our look and our start
        return
    sizes = ", ".join(f"{s} {sum(lengths[s]) / MEGABYTE:.2f}" for s in sources.SPLITS)
    binary = len(builder.info.metadata["binary"])
    left_out = f"; {binary} binary files left out" if binary else ""
    _say(f"prepared in {time.monotonic() - started:.1f} s (MB: {sizes}){left_out}")


def _remove_abandoned(folder: Path) -> None:
    for path in folder.glob("*/text_corpus/incomplete.*"):
        newest = max((p.stat().st_mtime for p in [path, *path.rglob("*")]), default=0)
        if time.time() - newest > _ABANDONED:
            shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def _quiet_bars() -> Iterator[None]:
    """No progress bars of tensorflow-datasets: our two lines say it, in logs as on a terminal."""
    tfds.disable_progress_bar()
    try:
        yield
    finally:
        tfds.enable_progress_bar()


def _say(message: str) -> None:
    print(f"memseq: {message}", file=sys.stderr, flush=True)
