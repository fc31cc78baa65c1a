"""Order-k byte models: what counting contexts of k bytes achieves on the same training text.

The probability of a byte b after the context c of k bytes is interpolated Witten-Bell (Witten and
Bell, "The zero-frequency problem", IEEE Transactions on Information Theory 37(4), 1991; the
interpolated form of its method C):

    P_k(b | c) = (n(c b) + t(c) P_{k-1}(b | c')) / (n(c) + t(c))

where n counts occurrences in the training text, t(c) is the number of different bytes seen after c,
c' is c without its first byte and P_{-1} is 1/256. A context never seen passes P_{k-1} through.
There is no constant to tune. Bytes before the beginning of a document count as zero bytes, so every
byte of a document is predicted, the first one from a context of its own: the same bytes are scored
as by a model that starts from the document-start token (see `pipeline`).
"""

import contextlib
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from memseq.data import packing
from memseq.data.corpus import open_corpus
from memseq.data.settings import Settings

MAX_ORDER = 3  # a context and its byte fill a 32-bit word
_CHUNK = 2**24  # bytes counted at a time: bounds the memory of fitting, whatever the text's size
_METHOD = "interpolated Witten-Bell 1"  # part of what a kept result is a result of


class ContextModel:
    """Models of order 0 to 3, fitted to `documents` (bytes, or uint8 arrays [length]) at once.

    Holds each different sequence of up to four bytes with its count: 12 bytes a sequence, about
    half a million of them in the standard library's 29 MB. Raises ValueError for no bytes at all.
    """

    def __init__(self, documents: Iterable[np.ndarray | bytes]):
        grams, counts = _count(documents)
        self._tables = [_Table(*_merge(grams & _mask(k + 1), counts)) for k in range(MAX_ORDER + 1)]

    def probability(self, context: bytes, byte: int, order: int = MAX_ORDER) -> float:
        """P(byte | last `order` bytes of `context`), which begins a document if it is shorter."""
        text = bytes(MAX_ORDER) + context
        gram = int.from_bytes(text[-MAX_ORDER:], "big") << 8 | byte
        return float(self._probabilities(np.array([gram], np.uint32), order)[0])

    def bits_per_byte(
        self,
        documents: Iterable[np.ndarray | bytes],
        order: int = MAX_ORDER,
        spans: np.ndarray | None = None,
    ) -> float:
        """Mean of -log2 P over the bytes of `documents`.

        `spans`, int64 [spans, 3] of (document, start, stop), scores those bytes only; their
        contexts still reach back before `start`. Raises ValueError where there is no byte to score.
        """
        grams, counts = _count(documents, spans)
        bits = -np.log2(self._probabilities(grams, order))
        return float(np.sum(bits * counts) / np.sum(counts))

    def _probabilities(self, grams: np.ndarray, order: int) -> np.ndarray:
        if not 0 <= order <= MAX_ORDER:
            raise ValueError(f"order: got {order}, expected 0 to {MAX_ORDER}")
        probability = np.full(len(grams), 1 / 256)
        for k in range(order + 1):
            probability = self._tables[k].interpolate(grams & _mask(k + 1), probability)
        return probability


class _Table:
    """One order: the count of each context with a byte, and n(c) and t(c) of each context."""

    def __init__(self, grams: np.ndarray, counts: np.ndarray):
        self._grams, self._counts = grams, counts
        contexts = grams >> 8
        first = _first_of_each(contexts)
        self._contexts = contexts[first]
        self._totals = np.add.reduceat(counts, first)
        self._kinds = np.diff(np.append(first, len(grams)))

    def interpolate(self, grams: np.ndarray, lower: np.ndarray) -> np.ndarray:
        where, known = _find(self._grams, grams)
        count = np.where(known, self._counts[where], 0)
        where, known = _find(self._contexts, grams >> 8)
        total, kinds = self._totals[where], self._kinds[where]
        return np.where(known, (count + kinds * lower) / (total + kinds), lower)


def reference_bits_per_byte(
    config: Mapping[str, Any], *, split: str = "validation"
) -> dict[str, float]:
    """Bits per byte of the order-2 and order-3 models, fitted on the training split, on `split`.

    Scores the bytes that `pipeline.held_out_batches(config, split=split, ...)` scores.

    Returns:
        {"order_2": bits, "order_3": bits, "bytes": number of bytes scored}. The result is kept in a
        file beside the prepared corpus, so only the first call fits the models (a few seconds for
        tens of megabytes).
    """
    corpus = open_corpus(config)
    held_out = corpus.split(split)
    spans = packing.held_out_spans(held_out.lengths, Settings.of(config).held_out_mb)
    key = hashlib.blake2b(digest_size=8)
    for part in (_METHOD, corpus.digest, split):
        key.update(f"{part}\0".encode())
    key.update(spans.astype("<i8").tobytes())
    kept = corpus.directory / f"context_models-{key.hexdigest()}.json"
    result = _load(kept)
    if result is None:
        fitted = ContextModel(corpus.split("train"))
        result = {
            f"order_{order}": fitted.bits_per_byte(held_out, order, spans) for order in (2, 3)
        }
        result["bytes"] = int((spans[:, 2] - spans[:, 1]).sum())
        _keep(kept, result)
    return result


def _count(
    documents: Iterable[np.ndarray | bytes], spans: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Different four-byte sequences (uint32, first byte highest, sorted) and their counts (int64).

    Each scored byte ends one sequence.
    """
    wanted: dict[int, list[tuple[int, int]]] | None = None
    if spans is not None:
        wanted = {}
        for document, start, stop in spans.tolist():
            wanted.setdefault(document, []).append((start, stop))
    grams, counts = np.zeros(0, np.uint32), np.zeros(0, np.int64)
    for chunk in _chunks(documents, wanted):
        more, times = np.unique(chunk, return_counts=True)
        grams, counts = _merge(np.concatenate([grams, more]), np.concatenate([counts, times]))
    if not len(grams):
        raise ValueError("documents: got no bytes, expected one or more")
    return grams, counts


def _chunks(
    documents: Iterable[np.ndarray | bytes], wanted: Mapping[int, list[tuple[int, int]]] | None
) -> Iterator[np.ndarray]:
    """The four-byte sequences of the documents, about `_CHUNK` at a time."""
    held: list[np.ndarray] = []
    size = 0
    for index, document in enumerate(documents):
        if wanted is not None and index not in wanted:
            continue
        text = np.frombuffer(document, np.uint8) if isinstance(document, bytes) else document
        grams = _grams(text)
        for start, stop in [(0, len(text))] if wanted is None else wanted[index]:
            held.append(grams[start:stop])
            size += stop - start
        if size >= _CHUNK:
            yield np.concatenate(held)
            held, size = [], 0
    if size:
        yield np.concatenate(held)


def _grams(text: np.ndarray) -> np.ndarray:
    """uint32 [len(text)]: the byte of each place in the lowest eight bits, three earlier above."""
    grams = text.astype(np.uint32)
    for back in range(1, MAX_ORDER + 1):
        grams[back:] |= text[:-back].astype(np.uint32) << np.uint32(8 * back)
    return grams


def _mask(length: int) -> np.uint32:
    return np.uint32(256**length - 1)


def _first_of_each(ordered: np.ndarray) -> np.ndarray:
    return np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))


def _merge(grams: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sorts, and adds up the counts of equal sequences."""
    order = np.argsort(grams, kind="stable")
    grams, counts = grams[order], counts[order]
    first = _first_of_each(grams)
    return grams[first], np.add.reduceat(counts, first)


def _find(ordered: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where each of `wanted` stands in `ordered`, and whether it does."""
    where = np.minimum(np.searchsorted(ordered, wanted), len(ordered) - 1)
    return where, ordered[where] == wanted


def _load(path: Path) -> dict[str, float] | None:
    """A kept result, or None where there is none that can be read."""
    try:
        result = json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    complete = isinstance(result, dict) and set(result) == {"order_2", "order_3", "bytes"}
    return result if complete else None


def _keep(path: Path, result: Mapping[str, float]) -> None:
    """Writes under another name first: a reader sees all of it or nothing."""
    name = ""
    try:
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as stream:
            name = stream.name
            json.dump(result, stream)
        os.replace(name, path)
    except OSError as error:  # a corpus others may read but not write: the numbers are still right
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        print(
            f"memseq: context models are fitted again next time: cannot write {path}: "
            f"{error.strerror}",
            file=sys.stderr,
        )
