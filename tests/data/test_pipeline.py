import collections
import itertools
import json

import numpy as np
import pytest

from memseq.data import corpus, packing, pipeline
from memseq.data.tokens import DOCUMENT_START

KEYS = {
    "tokens": np.int32,
    "targets": np.int32,
    "segment_ids": np.int32,
    "weights": np.float32,
}


def documents_of(lengths, seed=0):
    generator = np.random.default_rng(seed)
    texts = [generator.integers(0, 256, n, np.uint8).tobytes() for n in lengths]
    return corpus.Documents([{"text": text, "name": b""} for text in texts], lengths)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    root = tmp_path_factory.mktemp("text")
    generator = np.random.default_rng(1)
    for i in range(150):
        size = int(generator.integers(1, 120))
        (root / f"{i}.txt").write_bytes(generator.integers(1, 256, size, np.uint8).tobytes())
    return {"path": str(root), "data_dir": str(tmp_path_factory.mktemp("data"))}


def pairs_of(documents):
    """How often each (byte before, byte) occurs; the document start stands before the first."""
    counts = collections.Counter()
    for document in documents:
        before = [DOCUMENT_START, *document[:-1].tolist()]
        counts.update(zip(before, document.tolist(), strict=True))
    return counts


def scored_pairs(rows):
    counts = collections.Counter()
    for row in rows:
        kept = np.asarray(row["weights"]) > 0
        tokens, targets = row["tokens"][kept].tolist(), row["targets"][kept].tolist()
        counts.update(zip(tokens, targets, strict=True))
    return counts


def check_layout(row, documents):
    """Segments number 0, 1, ..., padding comes last, and each segment is a piece of a document."""
    ids = row["segment_ids"]
    used = int((ids >= 0).sum())
    assert (ids[used:] == -1).all()
    assert (np.diff(ids[:used]) >= 0).all()
    assert set(ids[:used].tolist()) == set(range(ids[:used].max(initial=-1) + 1))
    for key in ("tokens", "targets", "weights"):
        assert not row[key][used:].any()
    for segment in range(ids.max() + 1):
        tokens, targets = row["tokens"][ids == segment], row["targets"][ids == segment]
        np.testing.assert_array_equal(tokens[1:], targets[:-1])
        piece = bytes(targets.tolist())
        if tokens[0] == DOCUMENT_START:
            assert any(document.tobytes().startswith(piece) for document in documents)
        else:
            piece = bytes([tokens[0]]) + piece
            assert any(piece in document.tobytes() for document in documents)


@pytest.mark.parametrize(
    "lengths", [[1], [7], [1, 1, 1], [3, 50, 8, 1, 20, 9, 33], [64, 64], [200]]
)
@pytest.mark.parametrize("length", [1, 5, 16, 500])
def test_each_epoch_has_every_byte_once(lengths, length):
    documents = documents_of(lengths)
    rows = packing.PackedRows(documents, length, seed=3)
    assert len(rows) == -(-sum(lengths) // length)
    for epoch in range(3):
        part = [rows[epoch * len(rows) + i] for i in range(len(rows))]
        for row in part:
            check_layout(row, documents)
            assert {key: row[key].dtype.type for key in row} == KEYS
        # Rotating the stream may cut a document in two, never more: each byte keeps its neighbour.
        assert scored_pairs(part) == pairs_of(documents)
        assert sum(row["weights"].sum() for row in part) == sum(lengths)
        assert all(row["weights"].all() for row in part[:-1])


def test_epochs_and_seeds_differ_in_order_and_in_row_borders():
    documents = documents_of([64] * 20)
    rows = packing.PackedRows(documents, 32, seed=0)
    other = packing.PackedRows(documents, 32, seed=1)
    first = [rows[i]["targets"].tobytes() for i in range(len(rows))]
    second = [rows[i + len(rows)]["targets"].tobytes() for i in range(len(rows))]
    third = [other[i]["targets"].tobytes() for i in range(len(rows))]
    again = [
        packing.PackedRows(documents, 32, seed=0)[i]["targets"].tobytes() for i in range(len(rows))
    ]
    assert first == again
    assert not set(first) & set(second)
    assert not set(first) & set(third)


def test_a_document_shorter_than_a_row_by_hand():
    row = packing.window_row(
        documents_of([6, 3]),
        12,
        [packing.Window(0, 2, 4, 6), packing.Window(1, 0, 0, 3)],
    )
    a, b = (document.tolist() for document in documents_of([6, 3]))
    assert row["tokens"].tolist() == [a[1], a[2], a[3], a[4], 256, b[0], b[1], 0, 0, 0, 0, 0]
    assert row["targets"].tolist() == [*a[2:6], *b, 0, 0, 0, 0, 0]
    assert row["segment_ids"].tolist() == [0, 0, 0, 0, 1, 1, 1, -1, -1, -1, -1, -1]
    assert row["weights"].tolist() == [0, 0, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0]


def test_training_batches(config):
    iterator = pipeline.train_iterator(config, batch=3, length=32, seed=0)
    documents = corpus.open_corpus(config).split("train")
    batch = next(iterator)
    assert {key: (value.shape, value.dtype.type) for key, value in batch.items()} == {
        key: ((3, 32), dtype) for key, dtype in KEYS.items()
    }
    for i in range(3):
        check_layout({key: value[i] for key, value in batch.items()}, documents)


def test_rows_of_an_epoch_are_shuffled_and_complete(config):
    documents = corpus.open_corpus(config).split("train")
    count = -(-documents.total // 16)
    iterator = pipeline.train_iterator(config, batch=1, length=16, seed=5)
    epochs = [[next(iterator) for _ in range(count)] for _ in range(2)]
    for epoch in epochs:
        assert scored_pairs(epoch) == pairs_of(documents)
    in_order = [packing.PackedRows(documents, 16, 5)[i]["targets"] for i in range(count)]
    shuffled = [batch["targets"][0] for batch in epochs[0]]
    assert sorted(row.tobytes() for row in in_order) == sorted(row.tobytes() for row in shuffled)
    moved = sum(not np.array_equal(a, b) for a, b in zip(in_order, shuffled, strict=True))
    assert moved > count // 2


def test_resuming_gives_the_same_batches_bit_for_bit(config):
    def new():
        return pipeline.train_iterator(config, batch=4, length=64, seed=2)

    iterator = new()
    states, batches = [], []
    for _ in range(40):  # an epoch is about 33 batches
        states.append(json.dumps(iterator.get_state()))
        batches.append(next(iterator))
    for position in (0, 1, 7, 30, 33, 39):
        resumed = new()
        next(resumed)
        resumed.set_state(json.loads(states[position]))
        assert json.dumps(resumed.get_state()) == states[position]
        for expected, got in zip(batches[position : position + 4], resumed, strict=False):
            for key in KEYS:
                np.testing.assert_array_equal(got[key], expected[key])
        resumed.close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch": 8}, "has batch 4 and this run 8"),
        ({"length": 32}, "has length 64 and this run 32"),
        ({"seed": 3}, "has seed 2 and this run 3"),
        ({"limit_mb": 0.005}, "has corpus '.*the text has changed"),
    ],
)
def test_a_state_of_something_else_is_refused(config, change, message):
    options = {"batch": 4, "length": 64, "seed": 2}
    state = pipeline.train_iterator(config, **options).get_state()
    limit = {key: change[key] for key in change if key == "limit_mb"}
    options |= {key: change[key] for key in change if key in options}
    with pytest.raises(ValueError, match=message):
        pipeline.train_iterator({**config, **limit}, **options).set_state(state)


def test_processes_share_a_global_batch_that_does_not_depend_on_their_number(config):
    def batches(index, count):
        iterator = pipeline.train_iterator(
            config, batch=4, length=32, seed=0, process_index=index, process_count=count
        )
        return list(itertools.islice(iterator, 5)), iterator.get_state()

    (whole, state), halves = batches(0, 1), [batches(i, 2) for i in range(2)]
    for step in range(5):
        for key in KEYS:
            joined = np.concatenate([half[0][step][key] for half in halves])
            np.testing.assert_array_equal(joined, whole[step][key])
    assert [half[1] for half in halves] == [state, state]


@pytest.mark.parametrize("overlap", [0, 3, 7])
@pytest.mark.parametrize("length", [8, 9, 40])
def test_windows_score_every_byte_once_with_context(overlap, length):
    lengths = np.array([1, 7, 8, 9, 33, 100])
    spans = packing.held_out_spans(lengths)
    windows = list(packing.windows(spans, length, overlap))
    scored = [np.zeros(n, int) for n in lengths]
    for window in windows:
        assert 0 < window.stop - window.begin <= length
        assert window.begin == max(0, window.scored - overlap)
        scored[window.document][window.scored : window.stop] += 1
    for counts in scored:
        np.testing.assert_array_equal(counts, 1)
    rows = packing.pack_windows(iter(windows), length)
    assert sorted(map(str, itertools.chain(*rows))) == sorted(map(str, windows))
    for row in rows:
        assert 0 < sum(window.stop - window.begin for window in row) <= length


def test_a_sample_of_spans_is_even_disjoint_and_about_as_large_as_asked():
    lengths = np.array([100, 50_000, 4096, 1, 200_000] * 20)
    everything = packing.held_out_spans(lengths)
    np.testing.assert_array_equal(everything[:, 2], lengths)
    np.testing.assert_array_equal(packing.held_out_spans(lengths, 100.0), everything)
    spans = packing.held_out_spans(lengths, 0.5)
    sizes = spans[:, 2] - spans[:, 1]
    assert sizes.min() > 0
    assert sizes.max() <= packing.SPAN_BYTES
    assert 0.4e6 < sizes.sum() < 0.6e6
    assert (spans[:, 2] <= lengths[spans[:, 0]]).all()
    assert len({tuple(span) for span in spans.tolist()}) == len(spans)
    assert len(set(spans[:, 0].tolist())) > 35
    assert len(packing.held_out_spans(lengths, 1e-6)) == 1


@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("split", ["validation", "test"])
def test_a_held_out_pass_scores_every_byte_once(config, batch, split):
    documents = corpus.open_corpus(config).split(split)
    batches = pipeline.held_out_batches(config, batch=batch, length=16, split=split)
    passes = [list(batches), list(batches)]
    assert len(passes[0]) == len(batches)
    assert sum(float(b["weights"].sum()) for b in passes[0]) == batches.scored == documents.total
    rows = [{key: b[key][i] for key in KEYS} for b in passes[0] for i in range(batch)]
    assert len(rows) == batch * len(batches)
    for row in rows:
        check_layout(row, documents)
        assert {key: row[key].dtype.type for key in row} == KEYS
    assert scored_pairs(rows) == pairs_of(documents)
    for first, second in zip(*passes, strict=True):
        for key in KEYS:
            np.testing.assert_array_equal(first[key], second[key])


def test_a_held_out_pass_is_divided_among_processes(config):
    def batches(index, count):
        return list(
            pipeline.held_out_batches(
                config, batch=4, length=16, process_index=index, process_count=count
            )
        )

    whole, halves = batches(0, 1), [batches(i, 2) for i in range(2)]
    assert len(halves[0]) == len(halves[1]) == len(whole)
    for step, expected in enumerate(whole):
        for key in KEYS:
            joined = np.concatenate([half[step][key] for half in halves])
            np.testing.assert_array_equal(joined, expected[key])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 0}, "batch: got 0, expected 1 or more"),
        ({"length": -1}, "length: got -1"),
        ({"batch": 3, "process_count": 2}, "batch: got 3 rows for 2 processes"),
        ({"process_index": 2, "process_count": 2}, "process_index: got 2 of 2"),
    ],
)
def test_impossible_options_are_named(config, options, message):
    options = {"batch": 2, "length": 8, **options}
    with pytest.raises(ValueError, match=message):
        pipeline.train_iterator(config, seed=0, **options)
    with pytest.raises(ValueError, match=message):
        pipeline.held_out_batches(config, **options)


def test_impossible_held_out_options_are_named(config):
    with pytest.raises(ValueError, match="overlap: got 8, expected 0 to length - 1 = 7"):
        pipeline.held_out_batches(config, batch=1, length=8, overlap=8)
    with pytest.raises(ValueError, match="split: got 'dev'"):
        pipeline.held_out_batches(config, batch=1, length=8, split="dev")


def test_documents_stand_in_a_new_random_order_in_each_epoch():
    rows = packing.PackedRows(documents_of([5] * 500), 16, seed=0)
    orders = [rows._layout(epoch)[0] for epoch in range(3)]
    for order in orders:
        np.testing.assert_array_equal(np.sort(order), np.arange(500))
    for a, b in itertools.combinations([np.arange(500), *orders], 2):
        assert np.mean(a == b) < 0.02  # one of 500 agrees by chance
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.2
