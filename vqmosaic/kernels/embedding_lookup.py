"""Embedding lookup for training on a CPU, with a gradient that is several times as fast as torch's.

Shape suffixes: N ids in a batch, V vocabulary size, D width.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable


class Occurrences(NamedTuple):
    """The positions of each id in a batch. With them, the gradient of a table is summed in one pass, id by id. Computed once for all tables."""

    order_N: torch.Tensor
    """The positions of id 0, then those of id 1, and so on."""
    offsets_V: torch.Tensor
    """Where the positions of each id begin in order_N."""

    @classmethod
    def of(cls, ids: torch.Tensor, vocabulary: int) -> "Occurrences":
        """The occurrences of ids of any shape. Ids must be below `vocabulary`; the lookup itself raises an error for others."""
        sorted_N, order_N = ids.flatten().sort(stable=True)
        return cls(order_N, torch.searchsorted(sorted_N, torch.arange(vocabulary, device=ids.device)))


def find_occurrences(ids: torch.Tensor, vocabulary: int) -> Occurrences | None:
    """The occurrences of ids of any shape where EmbeddingLookup applies: in training on a CPU, but not under torch.compile. None elsewhere."""
    if torch.is_grad_enabled() and ids.device.type == "cpu" and not torch.compiler.is_compiling():
        return Occurrences.of(ids, vocabulary)
    return None


def lookup(embedding: nn.Module, ids: torch.Tensor, occurrences: Occurrences | None, dtype: torch.dtype) -> torch.Tensor:
    """Rows (..., D) of an embedding in `dtype`. Uses EmbeddingLookup if `occurrences` are given and the embedding is an unmodified nn.Embedding."""
    if occurrences is None or not is_unmodified(embedding, nn.Embedding):
        return embedding(ids).to(dtype)
    return EmbeddingLookup.apply(embedding.weight, ids, occurrences, dtype)


class EmbeddingLookup(torch.autograd.Function):
    """Rows of a table in `dtype`. The table is converted first, because a 16-bit table is read in half of the time.

    The gradients of the rows are summed in float32 and then rounded to their own dtype, like the gradients of matrices. torch's kernel adds them one
    by one to a table in memory.
    """

    @staticmethod
    def forward(ctx, table_VD: torch.Tensor, ids: torch.Tensor, occurrences: Occurrences, dtype: torch.dtype) -> torch.Tensor:
        """Rows (..., D) for ids of any shape. Raises IndexError for an id outside the table."""
        ctx.save_for_backward(*occurrences)
        ctx.dtype = table_VD.dtype
        return F.embedding(ids, table_VD.to(dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The gradient of the table."""
        order_N, offsets_V = ctx.saved_tensors
        return F.embedding_bag(order_N, gradient.flatten(0, -2), offsets_V, mode="sum").to(ctx.dtype), None, None, None


def is_unmodified(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module is exactly of class `kind`, without hooks and without a replaced forward, so that its weights determine its output."""
    return type(module) is kind and not module._forward_hooks and not module._forward_pre_hooks and "forward" not in vars(module)
