"""Products of a few rows with large matrices, which are most of the work when tokens are drawn one after another on a CPU.

With few rows a product is bound by reading the weights. The usual one (F.linear) reads them in an order that does not suit that; oneDNN takes them
packed. In bf16 that is its linear operator, 1.3 to 1.6 times as fast on the rows and matrices of priors; in float32 its 1 x 1 convolution, 1.4 to 2
times on those of a B model (both measured by hand; benchmarks/sampling.py times whole calls), to which N rows of K numbers are a picture of 1 x N
pixels with K channels. These are the operators that torch.compile uses when it freezes weights.
"""

import functools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

PACKED_ROWS = range(2, 49)
"""Numbers of rows for which packing pays in float32: a single row is read at full speed as it is, and many are bound by arithmetic."""
PACKED_NUMBERS = 2**19
"""In float32, matrices of fewer numbers stay in the caches of a processor, where F.linear is the faster one."""


class Product:
    """x_NK -> x W^T + b: one product in place of several linear modules that read the same input, optionally of their first rows alone."""

    def __init__(self, linears: Sequence[nn.Linear], rows: int, outputs: int | None = None):
        weight = linears[0].weight if len(linears) == 1 else torch.cat([linear.weight for linear in linears])
        bias = linears[0].bias if len(linears) == 1 else joined_bias(linears)
        weight, bias = weight[:outputs].detach(), None if bias is None else bias[:outputs].detach()
        pays = weight.dtype == torch.bfloat16 or (rows in PACKED_ROWS and weight.numel() >= PACKED_NUMBERS)
        self.product = F.linear
        if pays and can_pack(weight.device.type, weight.dtype):
            self.product, weight = packed_product(weight.dtype), pack(weight, rows)
        self.weight, self.bias = weight, bias

    def __call__(self, x_NK: torch.Tensor) -> torch.Tensor:
        """The product (N, outputs)."""
        return self.product(x_NK, self.weight, self.bias)


def joined_bias(linears: Sequence[nn.Linear]) -> torch.Tensor | None:
    """The biases one after another, zero where a module has none; None where none has one."""
    if all(linear.bias is None for linear in linears):
        return None
    return torch.cat([linear.weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias for linear in linears])


def pack(weight: torch.Tensor, rows: int) -> torch.Tensor:
    """A matrix (outputs, K) in oneDNN's own order for `rows` rows, for the operator of its number format."""
    if weight.dtype == torch.bfloat16:
        return torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    return torch.ops.mkldnn._reorder_convolution_weight(weight[:, :, None, None], [0, 0], [1, 1], [1, 1], 1, [1, weight.shape[1], 1, rows])


def packed_product(dtype: torch.dtype) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]:
    """The function of rows (N, K), packed matrix and bias that gives the product (N, outputs)."""
    return packed_linear if dtype == torch.bfloat16 else packed_convolution


def packed_linear(x_NK: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The product (N, outputs) of rows with a matrix that was packed in bf16."""
    return torch.ops.mkldnn._linear_pointwise(x_NK, packed, bias, "none", [], "")


def packed_convolution(x_NK: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The same in float32; a contiguous x_NK is not copied, it is a picture with channels last already."""
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
        product = packed_product(dtype)(x_NK, pack(weight, 2), None)
        return torch.equal(product, F.linear(x_NK, weight))  # small whole numbers: exact in any order
    except (RuntimeError, AttributeError, TypeError):
        return False
