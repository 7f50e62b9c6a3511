"""Squared ReLU with its own gradient, in chunks of rows on a CPU.

Autograd of relu(x).square() passes over x five times; a chunk stays in the CPU's cache. Not measured since the move.
"""

import torch
from torch.autograd.function import once_differentiable

CHUNK_ELEMENTS = 2**18
"""Elements processed at a time by SquaredReLU on a CPU. A chunk fits in its cache."""


def reference(x: torch.Tensor) -> torch.Tensor:
    """What squared_relu computes, with torch's own gradient."""
    return torch.relu(x)**2


def squared_relu(x: torch.Tensor) -> torch.Tensor:
    """relu(x)^2 for x of any shape, by SquaredReLU on every device; in chunks where `is_chunked`."""
    return SquaredReLU.apply(x)


def is_chunked(x: torch.Tensor) -> bool:
    """Whether x is processed in chunks: on a CPU, but not under torch.compile."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


class SquaredReLU(torch.autograd.Function):
    """relu(x)^2 with the gradient 2 relu(x), in chunks of rows. Autograd of relu(x).square() would pass over x five times."""

    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        """relu(x)^2 for x of any shape."""
        ctx.save_for_backward(x)
        result = torch.empty_like(x, memory_format=torch.contiguous_format)
        for chunk, out in zip(row_chunks(x), row_chunks(result), strict=True):
            torch.clamp_min(chunk, 0, out=out).square_()
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        """The gradient of x."""
        x, = ctx.saved_tensors
        result, zero = torch.empty_like(x, memory_format=torch.contiguous_format), x.new_zeros(())
        for chunk, grad, out in zip(row_chunks(x), row_chunks(gradient), row_chunks(result), strict=True):
            torch.addcmul(zero, grad, torch.clamp_min(chunk, 0, out=out), value=2, out=out)
        return result


def row_chunks(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Split x, as rows of its last dimension, into chunks of about CHUNK_ELEMENTS; a single chunk on a GPU and under torch.compile."""
    rows = x.reshape(-1, x.shape[-1])
    return rows.split(max(1, CHUNK_ELEMENTS // x.shape[-1])) if is_chunked(x) else (rows,)
