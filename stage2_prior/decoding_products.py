"""Products of a few rows with large matrices, which are most of the work when tokens are drawn one after another on a CPU.

With few rows a product is bound by reading the weights. The usual one (F.linear) reads them in an order that does not suit that; oneDNN's
1 x 1 convolution takes them packed, and on the rows of a B model it was measured 1.4 to 2 times faster (benchmarks/sampling.py). To it, N rows
of K numbers are a picture of 1 x N pixels with K channels. The operators are those that torch.compile uses when it freezes weights.
"""

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

PACKED_ROWS = range(2, 49)
"""Numbers of rows for which packing pays: a single row is read at full speed as it is, and many are bound by arithmetic."""
PACKED_NUMBERS = 2**19
"""Matrices of fewer numbers stay in the caches of a processor, where F.linear is the faster one."""


class Product:
    """x_NK -> x W^T + b: one product in place of several linear modules that read the same input, optionally of their first rows alone."""

    def __init__(self, linears: Sequence[nn.Linear], rows: int, outputs: int | None = None):
        weight = linears[0].weight if len(linears) == 1 else torch.cat([linear.weight for linear in linears])
        bias = linears[0].bias if len(linears) == 1 else joined_bias(linears)
        weight, bias = weight[:outputs].detach(), None if bias is None else bias[:outputs].detach()
        self.bias, self.packed = bias, None
        if rows in PACKED_ROWS and weight.numel() >= PACKED_NUMBERS and can_pack(weight.device.type, weight.dtype):
            self.packed, weight = pack(weight, rows), None
        self.weight = weight

    def __call__(self, x_NK: torch.Tensor) -> torch.Tensor:
        """The product (N, outputs)."""
        if self.packed is None:
            return F.linear(x_NK, self.weight, self.bias)
        return packed_product(x_NK, self.packed, self.bias)


def joined_bias(linears: Sequence[nn.Linear]) -> torch.Tensor | None:
    """The biases one after another, zero where a module has none; None where none has one."""
    if all(linear.bias is None for linear in linears):
        return None
    return torch.cat([linear.weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias for linear in linears])


def pack(weight: torch.Tensor, rows: int) -> torch.Tensor:
    """A matrix (outputs, K) in oneDNN's own order for a 1 x 1 convolution over `rows` pixels."""
    return torch.ops.mkldnn._reorder_convolution_weight(weight[:, :, None, None], [0, 0], [1, 1], [1, 1], 1, [1, weight.shape[1], 1, rows])


def packed_product(x_NK: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The product (N, outputs) of rows with a packed matrix; a contiguous x_NK is not copied, it is a picture with channels last already."""
    image = torch.ops.mkldnn._convolution_pointwise(x_NK.t()[None, :, None], packed, bias, [0, 0], [1, 1], [1, 1], 1, "none", [], "")
    return image[0, :, 0].t()


@functools.cache
def can_pack(device_type: str, dtype: torch.dtype) -> bool:
    """Whether packed products work here, found by one: torch says so in no other way, and its operators for it are not part of its public API."""
    if device_type != "cpu" or dtype not in (torch.float32, torch.bfloat16) or not torch.backends.mkldnn.is_available():
        return False
    try:
        if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return False
        weight = torch.arange(-48, 48, device=device_type).view(12, 8).to(dtype)
        x_NK = torch.arange(-8, 8, device=device_type).view(2, 8).to(dtype)
        return torch.equal(packed_product(x_NK, pack(weight, 2), None), F.linear(x_NK, weight))  # small whole numbers: exact in any order
    except (RuntimeError, AttributeError, TypeError):
        return False
