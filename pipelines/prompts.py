"""Encodes prompts as the ids of a text condition: the bytes of UTF-8, or the ids of a tokenizer of transformers."""

from collections.abc import Sequence
from pathlib import Path

import torch

from stage2_prior.segments import GivenText
from vqmosaic.errors import InputError


class TextEncoder:
    """Texts to ids (N, n): cut to the length of the condition, and padded with its padding id."""

    def __init__(self, condition: GivenText, folder: Path | None = None):
        self.condition, self.folder = condition, folder

    @classmethod
    def load(cls, condition: GivenText, folder: Path | None) -> "TextEncoder":
        """The encoder of a condition. Without a folder, ids are bytes."""
        if folder is None:
            return cls(condition)
        raise NotImplementedError

    def ids(self, texts: str | Sequence[str]) -> torch.Tensor:
        """int64 ids (N, n) of a text or a list of texts. Raises InputError for anything else."""
        texts = [texts] if isinstance(texts, str) else texts
        if not isinstance(texts, Sequence) or not texts or not all(isinstance(text, str) for text in texts):
            raise InputError(f"prompt is {str(texts)[:100]!r}; give a text, or a list of texts.")
        length, padding = self.condition.num_tokens, self.condition.text_ids
        rows = [list(text.encode("utf-8", "replace"))[:length] for text in texts]
        return torch.tensor([row + [padding] * (length - len(row)) for row in rows])
