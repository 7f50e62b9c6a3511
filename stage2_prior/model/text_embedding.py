"""Embeddings of the n-grams of texts that are given as bytes: hash n-gram embeddings, as in the Byte Latent Transformer (Pagnoni et al. 2024).

A byte alone says little, and a small model needs many steps to learn words from bytes. With these embeddings, the place of the last byte of a word
holds an embedding of the end of the word.

In comments: B batch, S sequence, L places of a text, D width.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

LENGTHS = (2, 3, 4, 5)
"""The numbers of bytes n that have embeddings."""
MULTIPLIER, MODULUS = 1_000_003, 2**31 - 1
"""Numbers of the polynomial hash."""


class NGramEmbedding(nn.Module):
    """Sums the embeddings of the n-grams that end at each place of a text. n-grams with the same hash share an embedding."""

    def __init__(self, rows: int, width: int):
        """`rows` is the number of embeddings for each n."""
        super().__init__()
        self.rows = rows
        self.embedding = nn.Embedding(len(LENGTHS) * rows, width)

    def forward(self, ids_BL: torch.Tensor) -> torch.Tensor:
        """The sums (B, L, D), scaled to the size of one embedding."""
        rows_nBL = torch.stack([ngram_hashes(ids_BL, length) % self.rows + number * self.rows for number, length in enumerate(LENGTHS)])
        return self.embedding(rows_nBL).sum(0) * len(LENGTHS)**-0.5


def ngram_hashes(ids_BL: torch.Tensor, length: int) -> torch.Tensor:
    """The hash (B, L) of the `length` ids that end at each place. Places before the text count as -1."""
    ids_BL = ids_BL.long()  # products do not fit into 32 bits
    hashes_BL = torch.zeros_like(ids_BL)
    for shift in range(length - 1, -1, -1):
        shifted_BL = F.pad(ids_BL, (shift, 0), value=-1)[:, :ids_BL.shape[1]]
        hashes_BL = (hashes_BL * MULTIPLIER + shifted_BL + 1) % MODULUS
    return hashes_BL


def text_slices(given: Sequence[Sequence[int]]) -> list[slice]:
    """The positions of each text in the sequence, which starts with the class.

    `given` are the shapes [height, width, depth] of given grids and [length] of texts, in order.
    """
    slices, start = [], 1
    for shape in given:
        length = torch.Size(shape).numel()
        if len(shape) == 1:
            slices.append(slice(start, start + length))
        start += length
    return slices
