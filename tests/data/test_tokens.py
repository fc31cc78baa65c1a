import pytest

from memseq.data import tokens


def test_encode_begins_a_document_and_decode_gives_the_text_back():
    text = "def f(x):\n    return 'é'\n"
    ids = tokens.encode(text)
    assert ids[0] == tokens.DOCUMENT_START == 256
    assert max(ids[1:]) < 256
    assert len(ids) == 1 + len(text.encode())
    assert tokens.decode(ids) == text
    assert tokens.encode(text.encode()) == ids


def test_decode_replaces_broken_utf8_and_refuses_ids_outside_the_vocabulary():
    assert tokens.decode([0xC3]) == "\ufffd"
    assert tokens.decode([]) == ""
    with pytest.raises(ValueError, match="tokens: ids from 1 to 257; expected 0..255"):
        tokens.decode([1, tokens.VOCABULARY_SIZE])
    with pytest.raises(ValueError, match="tokens: ids from -1"):
        tokens.decode([-1])
