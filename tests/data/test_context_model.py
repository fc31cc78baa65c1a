import math

import numpy as np
import pytest

from memseq.data import context_model, corpus, packing, pipeline
from memseq.data.context_model import ContextModel, reference_bits_per_byte
from memseq.data.tokens import DOCUMENT_START

TEXTS = [b"abracadabra", b"a", b"banana band\n", bytes([0, 255, 0, 0, 7]), b"abra"]


def by_definition(texts, context, byte, order):
    """P_order(byte | context) straight from the formula, counting with plain loops."""
    seen = []
    for text in texts:
        padded = b"\0\0\0" + text
        seen += [(padded[i - order : i], padded[i]) for i in range(3, len(padded))]
    context = (b"\0\0\0" + context)[len(context) + 3 - order :]
    after = [value for before, value in seen if before == context]
    lower = by_definition(texts, context[1:], byte, order - 1) if order else 1 / 256
    if not after:
        return lower
    kinds = len(set(after))
    return (after.count(byte) + kinds * lower) / (len(after) + kinds)


@pytest.mark.parametrize("order", range(4))
def test_probabilities_are_those_of_the_formula(order):
    model = ContextModel(TEXTS)
    for context in (b"", b"a", b"ab", b"bra", b"ana", b"xyz", b"\0\0\0", b"the band", b"zza"):
        for byte in (0, 7, 10, 97, 98, 110, 200, 255):
            np.testing.assert_allclose(
                model.probability(context, byte, order),
                by_definition(TEXTS, context, byte, order),
                rtol=1e-12,
            )


@pytest.mark.parametrize("order", range(4))
@pytest.mark.parametrize("context", [b"", b"ra", b"nan", b"never seen", b"\xff\0"])
def test_probabilities_sum_to_one(order, context):
    model = ContextModel(TEXTS)
    total = math.fsum(model.probability(context, byte, order) for byte in range(256))
    np.testing.assert_allclose(total, 1, rtol=1e-12)


@pytest.mark.parametrize("order", range(4))
def test_bits_per_byte_is_the_mean_over_all_bytes_the_first_included(order):
    held_out = [b"abrasion", b"b", bytes([255, 0, 255])]
    model = ContextModel(TEXTS)
    bits = [
        -math.log2(model.probability(text[:i], text[i], order))
        for text in held_out
        for i in range(len(text))
    ]
    np.testing.assert_allclose(model.bits_per_byte(held_out, order), np.mean(bits), rtol=1e-12)
    arrays = [np.frombuffer(text, np.uint8) for text in held_out]
    np.testing.assert_allclose(model.bits_per_byte(arrays, order), np.mean(bits), rtol=1e-12)


def test_spans_score_their_bytes_with_the_context_before_them():
    held_out = [b"unused", b"abracadabra banana"]
    spans = np.array([[1, 2, 5], [1, 9, 18]])
    model = ContextModel(TEXTS)
    text = held_out[1]
    bits = [-math.log2(model.probability(text[:i], text[i])) for i in [*range(2, 5), *range(9, 18)]]
    np.testing.assert_allclose(model.bits_per_byte(held_out, 3, spans), np.mean(bits), rtol=1e-12)


def test_counting_in_pieces_changes_nothing(monkeypatch):
    generator = np.random.default_rng(0)
    texts = [generator.integers(0, 4, n, np.uint8) for n in (1, 2, 3, 4, 50, 300, 7)]
    whole = ContextModel(texts).bits_per_byte(texts)
    monkeypatch.setattr(context_model, "_CHUNK", 5)
    assert ContextModel(texts).bits_per_byte(texts) == whole


def test_what_is_known_of_random_bytes_and_of_repetition():
    generator = np.random.default_rng(0)
    noise = [generator.integers(0, 256, 200_000, np.uint8) for _ in range(2)]
    model = ContextModel(noise[:1])
    np.testing.assert_allclose(model.bits_per_byte(noise[1:], 0), 8, atol=0.01)
    assert (
        model.bits_per_byte(noise[1:], 3) > 8
    )  # there is nothing to learn, at the price of trying
    repeated = [b"0123456789" * 1000]
    assert 0 < ContextModel(repeated).bits_per_byte(repeated, 1) < 0.05


def test_no_bytes_and_orders_out_of_range_are_refused():
    with pytest.raises(ValueError, match="documents: got no bytes"):
        ContextModel([])
    with pytest.raises(ValueError, match="documents: got no bytes"):
        ContextModel(TEXTS).bits_per_byte([b""])
    with pytest.raises(ValueError, match="order: got 4, expected 0 to 3"):
        ContextModel(TEXTS).bits_per_byte(TEXTS, 4)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A slice of the real standard library."""
    data_dir = str(tmp_path_factory.mktemp("data"))
    return {"data_dir": data_dir, "limit_mb": 1.0, "held_out_mb": 0.0}


@pytest.mark.parametrize("held_out_mb", [0.0, 0.01])
def test_a_model_scored_through_the_pipeline_gets_the_same_number(config, held_out_mb):
    # An order-1 model needs the token only, so its bits can be added up over batches.
    config = {**config, "held_out_mb": held_out_mb}
    opened = corpus.open_corpus(config)
    model = ContextModel(opened.split("train"))
    held_out = opened.split("validation")
    spans = packing.held_out_spans(held_out.lengths, held_out_mb)
    bits = scored = 0.0
    known = {}
    batches = pipeline.held_out_batches(config, batch=8, length=256)
    for batch in batches:
        kept = batch["weights"] > 0
        for pair in zip(batch["tokens"][kept], batch["targets"][kept], strict=True):
            if pair not in known:
                context = b"" if pair[0] == DOCUMENT_START else bytes([pair[0]])
                known[pair] = -math.log2(model.probability(context, pair[1], 1))
            bits += known[pair]
        scored += float(batch["weights"].sum())
    assert scored == batches.scored == (spans[:, 2] - spans[:, 1]).sum()
    np.testing.assert_allclose(bits / scored, model.bits_per_byte(held_out, 1, spans), rtol=1e-9)


def test_reference_numbers_on_the_standard_library(config):
    for split in ("validation", "test"):
        result = reference_bits_per_byte(config, split=split)
        assert 2.0 < result["order_2"] < 4.0
        assert 1.5 < result["order_3"] < result["order_2"]
        assert result["bytes"] == corpus.open_corpus(config).split(split).total
        assert result == reference_bits_per_byte(config, split=split)


def test_a_kept_result_is_used_and_a_broken_one_is_made_again(config, monkeypatch, capsys):
    for old in corpus.open_corpus(config).directory.glob("context_models-*"):
        old.unlink()
    first = reference_bits_per_byte(config)
    (kept,) = corpus.open_corpus(config).directory.glob("context_models-*.json")
    assert reference_bits_per_byte({**config, "held_out_mb": 0.01}) != first
    kept.write_text('{"order_2": 2.5')
    assert reference_bits_per_byte(config) == first

    def refuse(*args, **kwargs):
        raise AssertionError("fitted again")

    with monkeypatch.context() as patch:
        patch.setattr(context_model, "ContextModel", refuse)
        assert reference_bits_per_byte(config) == first
    kept.unlink()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(context_model.json, "dump", full)
        capsys.readouterr()
        assert reference_bits_per_byte(config) == first
        assert "No space left on device" in capsys.readouterr().err
    assert not kept.exists()
    assert not [p for p in kept.parent.iterdir() if p.name.startswith("tmp")]


def test_results_of_splits_of_equal_size_are_kept_apart(tmp_path):
    (tmp_path / "one.txt").write_bytes(b"abc" * 600 + b"ab" * 50 + b"zq" * 50)
    config = {"path": str(tmp_path / "one.txt"), "data_dir": str(tmp_path / "data")}
    validation = reference_bits_per_byte(config, split="validation")
    test = reference_bits_per_byte(config, split="test")
    assert validation["bytes"] == test["bytes"] == 100
    assert test["order_2"] > validation["order_2"] + 1


def test_an_unknown_split_is_named(config):
    with pytest.raises(ValueError, match="split: got 'dev'"):
        reference_bits_per_byte(config, split="dev")
