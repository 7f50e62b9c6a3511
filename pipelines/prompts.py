"""Encodes prompts as the ids of a text condition: the bytes of UTF-8, or the ids of a tokenizer of transformers."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from stage1_tokenizer.conditions.text_tokenizer import TextTokenizer, load_text_tokenizer, text_ids
from stage2_prior.segments import GivenText
from vqmosaic.errors import InputError
from vqmosaic.files.fingerprints import check_same_tokens
from vqmosaic.wording import is_or_are


class TextEncoder:
    """Texts to ids (N, n) of a condition: cut to its length, and padded with its padding id."""

    def __init__(self, condition: GivenText, tokenizer: TextTokenizer, folder: Path | None = None):
        """Raises InputError unless this tokenizer made the ids on which the prior was trained. `folder` is that of a tokenizer of transformers."""
        expected = condition.token_fingerprint or tokenizer.fingerprint
        check_same_tokens(tokenizer.fingerprint, folder or "the bytes of UTF-8", expected, f"the text {condition.name!r} of the prior")
        if tokenizer.num_ids != condition.text_ids:
            raise InputError(f"The tokenizer of the text {condition.name!r} has {tokenizer.num_ids} ids, but the prior was trained with "
                             f"{condition.text_ids}. Use the tokenizer that made its captions.")
        self.condition, self.tokenizer, self.folder = condition, tokenizer, folder

    @classmethod
    def load(cls, condition: GivenText, folder: Path | None) -> "TextEncoder":
        """The encoder of a condition, with the tokenizer in a folder, or without a folder the bytes of UTF-8."""
        return cls(condition, load_text_tokenizer(folder), folder)

    def ids(self, texts: str | Sequence[str]) -> torch.Tensor:
        """int64 ids (N, n) of a text or a list of texts, without spaces at their ends. Raises InputError for anything else, and for empty texts."""
        texts = [texts] if isinstance(texts, str) else texts
        if not isinstance(texts, Sequence) or not texts or not all(isinstance(text, str) for text in texts):
            raise InputError(f"prompt is {str(texts)[:100]!r}; give a text, or a list of texts.")
        if not all(text.strip() for text in texts):
            raise InputError("prompt is empty, but the prior was trained without empty captions. Leave it out to generate without a prompt.")
        return torch.from_numpy(np.stack([text_ids(self.tokenizer, text.strip(), self.condition.num_tokens) for text in texts]))

    def describe_cut(self, texts: str | Sequence[str]) -> str | None:
        """How many texts are longer than the captions of the prior, with what is left of the first. None if there are none."""
        texts, length = [texts] if isinstance(texts, str) else texts, self.condition.num_tokens
        cut = [text.strip() for text in texts if len(self.tokenizer.encode(text.strip())) > length]
        if not cut:
            return None
        which = "the prompt is" if len(texts) == 1 else f"{len(cut)} of {len(texts)} prompts {is_or_are(len(cut))}"
        return (f"{which} longer than {length} {self.tokenizer.unit}, the length of captions in training, and the rest is ignored. The prior "
                f"sees{'' if len(texts) == 1 else ', for example,'} {self.tokenizer.decode(self.tokenizer.encode(cut[0], length))!r}")

    def texts(self, ids_Nn: torch.Tensor) -> list[str]:
        """The texts of ids (N, n), without padding. Dropped texts (ids -1) are empty."""
        rows = [[each for each in row if 0 <= each < self.condition.text_ids] for row in ids_Nn.tolist()]
        return [self.tokenizer.decode(row) for row in rows]
