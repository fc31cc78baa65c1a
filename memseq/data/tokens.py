"""Bytes as tokens: ids 0 to 255 are the byte values, 256 stands before a document's first byte.

The document-start token is an input only. It is never a target, so a model of these tokens spends
its probability on 256 outcomes that can happen, and its loss per token in nats, divided by ln 2,
is bits per byte.
"""

from collections.abc import Iterable

DOCUMENT_START = 256
VOCABULARY_SIZE = 257


def encode(text: str | bytes) -> list[int]:
    """Token ids of a text that begins a document: the document-start token, then its bytes.

    A str is taken in UTF-8.
    """
    return [DOCUMENT_START, *(text.encode() if isinstance(text, str) else text)]


def decode(tokens: Iterable[int]) -> str:
    """Text of token ids. Document starts are dropped and broken UTF-8 becomes U+FFFD.

    Raises ValueError for an id outside 0..256.
    """
    values = [int(token) for token in tokens]
    if values and not 0 <= min(values) <= max(values) < VOCABULARY_SIZE:
        raise ValueError(
            f"tokens: ids from {min(values)} to {max(values)}; "
            f"expected 0..255 (bytes) or {DOCUMENT_START} (document start)"
        )
    kept = bytes(value for value in values if value != DOCUMENT_START)
    return kept.decode("utf-8", errors="replace")
