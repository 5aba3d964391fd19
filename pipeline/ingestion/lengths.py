"""How long a sample is: what length grouping sorts by."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import InputError


class LengthCounter:
    """Counts the tokens of prompts, or, without a tokenizer, their characters."""

    def __init__(self, tokenizer_file: str | None) -> None:
        self._tokenizer = _load(tokenizer_file) if tokenizer_file else None

    def count(self, texts: Sequence[str]) -> list[int]:
        """Return the length of each text."""
        if self._tokenizer is None:
            return [len(text) for text in texts]
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [len(encoding) for encoding in encodings]


def tokenizer_digest(tokenizer_file: str | None) -> str:
    """Return the sha256 of the tokenizer, empty without one: where the file lies does not matter.

    Raises:
        InputError: there is no such file.
    """
    if tokenizer_file is None:
        return ""
    try:
        return hashlib.sha256(Path(tokenizer_file).read_bytes()).hexdigest()
    except OSError as error:
        raise InputError(
            f"data.length_tokenizer must be a tokenizer.json, {tokenizer_file!r} cannot be read: {error}; "
            "name the one in the base model's folder, or leave it out to count characters"
        ) from error


def _load(tokenizer_file: str) -> Any:
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(tokenizer_file)
    except Exception as error:  # tokenizers raises plain Exception
        raise InputError(
            f"data.length_tokenizer must be a tokenizer.json, got {tokenizer_file!r}: {error}; "
            "name the one in the base model's folder"
        ) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
