"""Packed rows of a corpus, read through grain.

A document of n bytes gives n tokens and n targets: the tokens are the document-start token and the
first n - 1 bytes, the targets are the n bytes. So every byte is a target, the first one predicted
from the document-start token, and nothing is predicted after the last. A batch is a dict of

    tokens       int32   [batch, length]    0..256; 0 where there is padding
    targets      int32   [batch, length]    0..255; the byte that follows the token in its document
    segment_ids  int32   [batch, length]    0, 1, ... along a row; -1 where there is padding
    weights      float32 [batch, length]    1 where the target counts, else 0

A segment is a piece of one document, and a memory starts afresh with each. A piece that does not
begin a document has as its first token the byte before it.

Training packs without loss: in each epoch the documents are laid end to end in a new order, the
stream is cut into rows at a new phase, and the rows are shuffled; only the last row of an epoch has
padding. Row i of epoch e is computed from (seed, e, i) alone, which is why this is a grain
`MapDataset` of its own and not one of grain's packers (those fill rows from an iterator, in order,
and resume by replaying it): the state of the iterator is one number, and rows of one long file do
not arrive next to each other.

Held-out rows are windows that overlap: each scores what the one before it has not, after reading
some bytes of context again with weight 0. A window cut without overlap would start with an empty
memory and be charged for it, which the context models it is compared with are not.
"""

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import grain
import numpy as np

from memseq.data import packing
from memseq.data.corpus import open_corpus
from memseq.data.settings import Settings

Batch = dict[str, np.ndarray]

# Without end, in effect. An endless dataset has sys.maxsize rows, which batches of 1 overflow.
_EPOCHS = 2**30


def train_iterator(
    config: Mapping[str, Any],
    *,
    batch: int,
    length: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.DatasetIterator:
    """Endless batches of the training split, epoch after epoch in new orders.

    Args:
        config: `config.data`, see `settings.Settings`.
        batch: Rows of the global batch. This process gets `batch / process_count` of them, a
            contiguous block, so concatenated over processes the batch does not depend on their
            number: fit for `jax.make_array_from_process_local_data`.
        length: Tokens in a row.
        seed: Any integer; orders and row borders depend on it.
        process_index, process_count: Which of how many processes this is.

    Returns:
        An iterator with `get_state()` (JSON) and `set_state(state)`, after which the same batches
        follow, bit for bit, on any number of processes. A state of another corpus, batch size,
        length or seed is refused with a ValueError that names the difference.
    """
    local = _local_rows(batch, length, process_index, process_count)
    corpus = open_corpus(config)
    rows = packing.PackedRows(corpus.split("train"), length, seed)
    dataset = (
        rows.shuffle(seed=packing.derive_seed(seed, "rows", 0))
        .repeat(_EPOCHS)
        .batch(local)
        .slice(slice(process_index, None, process_count))
        .to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4))
    )
    identity = {"corpus": corpus.digest, "batch": batch, "length": length, "seed": seed}
    return iter(_Identified(dataset, identity))


class HeldOutBatches:
    """Batches that score a held-out split once, the same in every pass.

    `len()` is the number of batches; `scored` the number of bytes, equal to the sum of all weights
    (over all processes).
    """

    def __init__(self, dataset: grain.MapDataset, scored: int):
        self._dataset = dataset
        self.scored = scored

    def __len__(self) -> int:
        return len(self._dataset)

    def __iter__(self) -> Iterator[Batch]:
        return iter(
            self._dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2))
        )


def held_out_batches(
    config: Mapping[str, Any],
    *,
    batch: int,
    length: int,
    split: str = "validation",
    overlap: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> HeldOutBatches:
    """One complete pass over `split`, or over the sample of it that `config.held_out_mb` asks for.

    Args:
        config: `config.data`, see `settings.Settings`.
        batch: Rows of the global batch, divided among processes as in training. The last batch is
            filled with rows of weight 0.
        length: Tokens in a row, and so the longest context.
        split: "validation" or "test" ("train" works too).
        overlap: Bytes of context that each window reads again, 0 to `length - 1`; a quarter of
            `length` by default, which costs a third more rows than none. Every byte is scored with
            at least so many bytes before it in its segment, or from its document's start.

    Returns:
        `HeldOutBatches`. The bytes with weight 1 are exactly those of `packing.held_out_spans`.
    """
    local = _local_rows(batch, length, process_index, process_count)
    overlap = length // 4 if overlap is None else overlap
    if not 0 <= overlap < length:
        raise ValueError(f"overlap: got {overlap}, expected 0 to length - 1 = {length - 1}")
    corpus = open_corpus(config)
    documents = corpus.split(split)
    spans = packing.held_out_spans(documents.lengths, Settings.of(config).held_out_mb)
    plan = packing.pack_windows(packing.windows(spans, length, overlap), length)
    plan += [()] * (-len(plan) % batch)
    dataset = (
        grain.MapDataset.source(plan)
        .map(functools.partial(packing.window_row, documents, length))
        .batch(local)
        .slice(slice(process_index, None, process_count))
    )
    return HeldOutBatches(dataset, scored=int((spans[:, 2] - spans[:, 1]).sum()))


def _local_rows(batch: int, length: int, process_index: int, process_count: int) -> int:
    for name, value in (("batch", batch), ("length", length)):
        if value < 1:
            raise ValueError(f"{name}: got {value}, expected 1 or more")
    if process_count < 1 or not 0 <= process_index < process_count:
        raise ValueError(
            f"process_index: got {process_index} of {process_count} processes, "
            "expected 0 to process_count - 1"
        )
    if batch % process_count:
        raise ValueError(
            f"batch: got {batch} rows for {process_count} processes, expected a multiple of them"
        )
    return batch // process_count


class _Identified(grain.IterDataset):
    """Its iterator's state says what it is a state of, and no other is accepted."""

    def __init__(self, parent: grain.IterDataset, identity: Mapping[str, Any]):
        super().__init__(parent)
        self._identity = dict(identity)

    def __iter__(self) -> grain.DatasetIterator:
        return _IdentifiedIterator(iter(self._parent), self._identity)


class _IdentifiedIterator(grain.DatasetIterator):
    def __init__(self, parent: grain.DatasetIterator, identity: Mapping[str, Any]):
        super().__init__(parent)
        self._identity = identity

    def __next__(self) -> Batch:
        return next(self._parent)

    def get_state(self) -> dict[str, Any]:
        return {**self._identity, "position": self._parent.get_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        for name, mine in self._identity.items():
            if name not in state or state[name] != mine:
                raise ValueError(
                    f"state: the saved data position has {name} {state.get(name)!r} and this run "
                    f"{mine!r}; expected the same, or a new run"
                    + (" (the text has changed)" if name == "corpus" else "")
                )
        self._parent.set_state(state["position"])
