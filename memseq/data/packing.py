"""Which bytes stand in which row: training rows packed without loss, held-out rows as windows.

Everything here is computed from the lengths of the documents; their text is read when a row is.
See `pipeline` for what a row holds.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np

from memseq.data.corpus import Documents
from memseq.data.settings import MEGABYTE
from memseq.data.tokens import DOCUMENT_START

SPAN_BYTES = 4096  # a sample of a held-out split is made of pieces so long


class PackedRows(grain.MapDataset):
    """All rows of one epoch, and of the next ones: item `epoch * len(self) + row`.

    An item is a dict like a batch without its first axis.
    """

    def __init__(self, documents: Documents, length: int, seed: int):
        super().__init__()
        self._documents = documents
        self._length = length
        self._seed = seed
        self._layout = functools.lru_cache(maxsize=2)(self._new_layout)

    def __len__(self) -> int:
        return -(-self._documents.total // self._length)

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        epoch, number = divmod(index, len(self))
        order, ends, phase = self._layout(epoch)
        total = self._documents.total
        row = _empty_row(self._length)
        at, stop = number * self._length, min((number + 1) * self._length, total)
        slot = segment = 0
        while at < stop:
            place = (at + phase) % total
            document = int(np.searchsorted(ends, place, side="right"))
            size = min(int(ends[document]) - place, stop - at)
            text = self._documents[order[document]]
            begin = place - (int(ends[document]) - len(text))
            _fill(row, slot, text, begin, begin + size, segment)
            at, slot, segment = at + size, slot + size, segment + 1
        return row

    def _new_layout(self, epoch: int) -> tuple[np.ndarray, np.ndarray, int]:
        """Order of the documents, where each ends in the stream, and where its first row starts."""
        order = _permutation(len(self._documents), derive_seed(self._seed, "documents", epoch))
        phase = derive_seed(self._seed, "phase", epoch) % self._documents.total
        return order, np.cumsum(self._documents.lengths[order]), phase


def held_out_spans(lengths: np.ndarray, megabytes: float = 0.0) -> np.ndarray:
    """Which bytes of a split are scored: int64 [spans, 3] of (document, start, stop).

    All of every document, or with `megabytes` > 0 about that many million bytes: pieces of up to
    4096 bytes, at least one, evenly spaced over the split.
    """
    documents = np.arange(len(lengths))
    everything = np.stack([documents, np.zeros_like(documents), lengths], axis=1)
    share = megabytes * MEGABYTE / max(1, int(lengths.sum()))
    if not megabytes or share >= 1:
        return everything
    counts = -(-lengths // SPAN_BYTES)
    document = np.repeat(documents, counts)
    piece = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    start = piece * SPAN_BYTES
    stop = np.minimum(start + SPAN_BYTES, lengths[document])
    chosen = max(1, int(share * len(document)))
    keep = (2 * np.arange(chosen) + 1) * len(document) // (2 * chosen)
    return np.stack([document, start, stop], axis=1)[keep]


@dataclasses.dataclass(frozen=True)
class Window:
    """Bytes `begin` to `stop` of a document as targets of one segment, scored from `scored` on."""

    document: int
    begin: int
    scored: int
    stop: int


def windows(spans: np.ndarray, length: int, overlap: int) -> Iterator[Window]:
    """Windows of up to `length` bytes that score every byte of `spans` once, in their order."""
    for document, start, end in spans.tolist():
        scored = start
        while scored < end:
            begin = max(0, scored - overlap)
            stop = min(begin + length, end)
            yield Window(document, begin, scored, stop)
            scored = stop


def pack_windows(windows: Iterator[Window], length: int) -> list[tuple[Window, ...]]:
    """Windows in rows, longest first and each row filled until the next one does not fit."""
    rows: list[tuple[Window, ...]] = []
    room = 0
    for window in sorted(windows, key=lambda w: w.begin - w.stop):  # stable: ties keep their order
        size = window.stop - window.begin
        if size > room:
            rows.append(())
            room = length
        rows[-1] += (window,)
        room -= size
    return rows


def window_row(
    documents: Documents, length: int, windows: Sequence[Window]
) -> dict[str, np.ndarray]:
    """The row that holds `windows`, like a batch without its first axis."""
    row = _empty_row(length)
    slot = 0
    for segment, window in enumerate(windows):
        _fill(row, slot, documents[window.document], window.begin, window.stop, segment)
        row["weights"][slot : slot + window.scored - window.begin] = 0
        slot += window.stop - window.begin
    return row


def _empty_row(length: int) -> dict[str, np.ndarray]:
    return {
        "tokens": np.zeros(length, np.int32),
        "targets": np.zeros(length, np.int32),
        "segment_ids": np.full(length, -1, np.int32),
        "weights": np.zeros(length, np.float32),
    }


def _fill(
    row: dict[str, np.ndarray], slot: int, text: np.ndarray, begin: int, stop: int, segment: int
) -> None:
    """Puts bytes `begin` to `stop` of a document at `slot` of a row, as targets of one segment."""
    end = slot + stop - begin
    row["targets"][slot:end] = text[begin:stop]
    row["tokens"][slot] = text[begin - 1] if begin else DOCUMENT_START
    row["tokens"][slot + 1 : end] = text[begin : stop - 1]
    row["segment_ids"][slot:end] = segment
    row["weights"][slot:end] = 1


def _permutation(count: int, seed: int) -> np.ndarray:
    """A random order of 0..count-1, int64: by the hash of each (splitmix64), as no numpy version
    changes it. grain's own index_shuffle takes 17 ms an index where count is 2, and 17 us at best.
    """
    words = np.arange(count, dtype=np.uint64) + np.uint64(seed << 32)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        words = (words ^ (words >> np.uint64(shift))) * np.uint64(factor)
    return np.argsort(words, kind="stable")


def derive_seed(seed: int, purpose: str, epoch: int) -> int:
    """32 bits that differ for neighbouring seeds and epochs, and do not change with numpy."""
    data = f"{seed}/{purpose}/{epoch}".encode()
    return int.from_bytes(hashlib.blake2b(data, digest_size=4).digest(), "big")
