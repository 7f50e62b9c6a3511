"""Rows of a table of embeddings, for training on a CPU by a gradient that is several times as fast as torch's own.

In comments: N ids of a batch, V ids that there are, D width.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable


class Occurrences(NamedTuple):
    """Where each id stands in a batch: by it the gradient of a table is added up in one pass, id by id. Computed once for all tables."""

    order_N: torch.Tensor
    """The positions of id 0, then those of id 1, and so on."""
    offsets_V: torch.Tensor
    """Where the positions of each id begin in that order."""

    @classmethod
    def of(cls, ids: torch.Tensor, vocabulary: int) -> "Occurrences":
        """Of ids of any shape, which should be below `vocabulary`; the lookup itself refuses others."""
        sorted_N, order_N = ids.flatten().sort(stable=True)
        return cls(order_N, torch.searchsorted(sorted_N, torch.arange(vocabulary, device=ids.device)))


def lookup(embedding: nn.Module, ids: torch.Tensor, occurrences: Occurrences | None, dtype: torch.dtype) -> torch.Tensor:
    """Rows (..., D) of an embedding in a format; by Lookup where `occurrences` are given and nothing was added to the embedding from outside."""
    if occurrences is None or not is_untouched(embedding, nn.Embedding):
        return embedding(ids).to(dtype)
    return Lookup.apply(embedding.weight, ids, occurrences, dtype)


class Lookup(torch.autograd.Function):
    """Rows of a table, which is put into their format before; it is read in half of the time then, where that is the shorter one.

    What they get for a gradient is added up in float32, then rounded to its format, as matrices' gradients are; torch's kernel adds one by one to a
    table in memory.
    """

    @staticmethod
    def forward(ctx, table_VD: torch.Tensor, ids: torch.Tensor, occurrences: Occurrences, dtype: torch.dtype) -> torch.Tensor:
        """(..., D) for ids of any shape; IndexError for one that the table has not."""
        ctx.save_for_backward(*occurrences)
        ctx.dtype = table_VD.dtype
        return F.embedding(ids, table_VD.to(dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The gradient of the table."""
        order_N, offsets_V = ctx.saved_tensors
        return F.embedding_bag(order_N, gradient.flatten(0, -2), offsets_V, mode="sum").to(ctx.dtype), None, None, None


def is_untouched(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module is of a kind itself, without hooks or a forward of its own: only then its weights say all that it does."""
    return type(module) is kind and not module._forward_hooks and not module._forward_pre_hooks and "forward" not in vars(module)
