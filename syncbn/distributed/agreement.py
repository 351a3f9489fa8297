"""Texts that the ranks of a group exchange to see whether they are about to do the same."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

#: Bytes of a text in the exchange; longer ones are cut, and end in a digest of the whole.
TEXT_BYTES = 256
_DIGEST_BYTES = 8


def as_bytes(text: str) -> Tensor:
    """Return a text as uint8 [TEXT_BYTES]."""
    encoded = text.encode()
    if len(encoded) > TEXT_BYTES:
        digest = hashlib.blake2b(encoded, digest_size=_DIGEST_BYTES).hexdigest().encode()
        encoded = encoded[: TEXT_BYTES - len(digest) - 4] + b"... " + digest
    encoded = encoded.ljust(TEXT_BYTES, b"\0")
    return torch.frombuffer(bytearray(encoded), dtype=torch.uint8)


def disagreement(texts: Tensor, ranks: Sequence[int]) -> str:
    """Return a line for every rank and its text, or nothing if all are equal.

    Args:
        texts: uint8 [W, TEXT_BYTES], those of W ranks.
        ranks: their global ranks.
    """
    if bool((texts == texts[0]).all()):
        return ""
    rows = zip(ranks, texts.cpu(), strict=True)
    return "\n".join(f"  rank {rank}: {_as_text(text)}" for rank, text in rows)


def _as_text(row: Tensor) -> str:
    return bytes(row.tolist()).rstrip(b"\0").decode(errors="replace")
