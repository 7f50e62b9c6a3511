"""Tokenizers of texts: the bytes of UTF-8, or a tokenizer of transformers in a local folder. Texts are cut and padded to a fixed number of ids.

The padding id follows the ids of the text, so that it is the last one.
"""

import hashlib
import os
from pathlib import Path
from typing import Protocol

import numpy as np

from token_shards.manifest import BYTES_FINGERPRINT, Grid
from vqmosaic.errors import InputError
from vqmosaic.files.durable_files import sha256_of_file

TOKENIZER_NAMES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "sentencepiece.bpe.model")
"""Files of which a tokenizer of transformers has at least one."""
_WEIGHT_SUFFIXES = frozenset({".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".gguf", ".ckpt"})


class TextTokenizer(Protocol):
    """Converts texts to ids."""

    num_ids: int
    """Number of ids, without the padding id."""
    unit: str
    """What messages call several ids: bytes or ids."""
    fingerprint: str
    """Identifies the tokenizer: text:bytes, or text:<sha256 of its files>."""

    def encode(self, text: str, length: int | None = None) -> list[int]:
        """The ids of a text, at most `length` of them. None gives all."""

    def decode(self, ids: list[int]) -> str:
        """The text of ids, without the padding id. Not every tokenizer returns the same text."""


class ByteTokenizer:
    """The bytes of a text in UTF-8. Longer texts are cut between characters, not within one."""

    num_ids = 256
    unit = "bytes"
    fingerprint = BYTES_FINGERPRINT

    def encode(self, text: str, length: int | None = None) -> list[int]:
        return list(text.encode(errors="replace")[:length].decode(errors="ignore").encode())

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode(errors="replace")


class TransformersTokenizer:
    """A tokenizer of transformers in a local folder, without its special tokens. Never downloads anything and never runs code from the folder."""

    unit = "ids"

    def __init__(self, folder: Path):
        from transformers import AutoTokenizer  # imported here, because bytes need no library

        self.fingerprint = text_fingerprint(folder)
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise InputError(f"text_tokenizer is {str(folder)!r}, which transformers cannot load: {' '.join(str(error).split())[:300]}") from error
        self.num_ids = max(self._tokenizer.get_vocab().values(), default=-1) + 1  # not the length: some vocabularies skip ids

    def encode(self, text: str, length: int | None = None) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False))[:length]

    def decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids))


def load_text_tokenizer(folder: str | Path | None) -> TextTokenizer:
    """The tokenizer in a folder of transformers, or the bytes of UTF-8 for None."""
    return ByteTokenizer() if folder is None else TransformersTokenizer(check_text_tokenizer(folder))


def check_text_tokenizer(folder: str | Path, field: str = "text_tokenizer") -> Path:
    """The folder of a tokenizer. Raises InputError, which names the field, if it has no file of one. Reads only names."""
    path = Path(os.path.expanduser(folder))
    if not path.is_dir():
        raise InputError(f"{field} is {str(folder)!r}, which is not a folder on this machine. Give the folder of a tokenizer of transformers, or "
                         "null for the bytes of UTF-8.")
    if not any((path / name).is_file() for name in TOKENIZER_NAMES):
        raise InputError(f"{field} is {str(folder)!r}, a folder without a tokenizer of transformers: it has none of {', '.join(TOKENIZER_NAMES)}.")
    return path


def tokenizer_files(folder: Path) -> list[Path]:
    """The files directly in a folder that a tokenizer may need: all but hidden files and the weights of a model, by name."""
    return sorted(path for path in folder.iterdir()
                  if path.is_file() and not path.name.startswith(".") and path.suffix.lower() not in _WEIGHT_SUFFIXES)


def text_fingerprint(folder: str | Path | None) -> str:
    """The fingerprint of the tokenizer in a folder, or of the bytes of UTF-8 for None. Loads no library."""
    if folder is None:
        return BYTES_FINGERPRINT
    digest = hashlib.sha256()
    for path in tokenizer_files(check_text_tokenizer(folder)):
        digest.update(f"{path.name}\t{sha256_of_file(path)}\n".encode())
    return f"text:{digest.hexdigest()}"


def text_grid(name: str, tokenizer: TextTokenizer, length: int) -> Grid:
    """The grid of a text with `length` places: one row of ids, with the padding id."""
    return Grid(name=name, codebook_size=tokenizer.num_ids + 1, height=1, width=length, token_fingerprint=tokenizer.fingerprint)


def text_ids(tokenizer: TextTokenizer, text: str, length: int) -> np.ndarray:
    """The int64 ids (length,) of a text, cut and padded."""
    ids_T = np.full(length, tokenizer.num_ids, np.int64)
    given = tokenizer.encode(text, length)
    ids_T[:len(given)] = given
    return ids_T
