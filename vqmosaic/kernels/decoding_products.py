"""Products of a few rows with large matrices, which are most of the work when tokens are sampled one after another on a CPU.

With few rows, reading the weights limits the speed. F.linear reads them in an order that is bad for few rows; oneDNN has operators for packed
weights. In bf16 it is the linear operator, 1.3 to 1.6 times as fast for the rows and matrices of priors. In float32 it is the 1 x 1 convolution, 1.4
to 2 times as fast for those of a B model: N rows of K values are an image of 1 x N pixels with K channels. (Both were measured by hand;
benchmarks/sampling.py times whole calls.) torch.compile uses the same operators when it freezes weights.
"""

import functools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

PACKED_ROWS = range(2, 49)
"""Numbers of rows for which packing is faster in float32. For one row F.linear reads at full speed, and for many rows arithmetic is the limit."""
PACKED_MIN_ELEMENTS = 2**19
"""In float32, smaller matrices stay in the CPU caches, where F.linear is faster."""

ProductFunction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
"""Maps rows (N, K), a matrix and a bias to the product (N, outputs)."""


class Product:
    """x_NK -> x W^T + b: one product in place of several linear modules with the same input, optionally only their first `outputs` outputs."""

    def __init__(self, linears: Sequence[nn.Linear], rows: int, outputs: int | None = None):
        weight = linears[0].weight if len(linears) == 1 else torch.cat([linear.weight for linear in linears])
        bias = linears[0].bias if len(linears) == 1 else concatenate_biases(linears)
        weight, bias = weight[:outputs].detach(), None if bias is None else bias[:outputs].detach()
        is_faster = weight.dtype == torch.bfloat16 or (rows in PACKED_ROWS and weight.numel() >= PACKED_MIN_ELEMENTS)
        self.product: ProductFunction = F.linear
        if is_faster and can_pack(weight.device.type, weight.dtype):
            self.product, weight = packed_product(weight.dtype), pack(weight, rows)
        self.weight, self.bias = weight, bias

    def __call__(self, x_NK: torch.Tensor) -> torch.Tensor:
        """The product (N, outputs)."""
        return self.product(x_NK, self.weight, self.bias)


def concatenate_biases(linears: Sequence[nn.Linear]) -> torch.Tensor | None:
    """The concatenated biases, with zeros for a module without bias; None if no module has one."""
    if all(linear.bias is None for linear in linears):
        return None
    return torch.cat([linear.weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias for linear in linears])


def pack(weight: torch.Tensor, rows: int) -> torch.Tensor:
    """A matrix (outputs, K) packed in oneDNN's own order for `rows` rows, for the operator of its dtype."""
    if weight.dtype == torch.bfloat16:
        return torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    return torch.ops.mkldnn._reorder_convolution_weight(weight[:, :, None, None], [0, 0], [1, 1], [1, 1], 1, [1, weight.shape[1], 1, rows])


def packed_product(dtype: torch.dtype) -> ProductFunction:
    """The function for matrices that were packed in this dtype."""
    return packed_linear if dtype == torch.bfloat16 else packed_convolution


def packed_linear(x_NK: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The product (N, outputs) of rows with a matrix that was packed in bf16."""
    return torch.ops.mkldnn._linear_pointwise(x_NK, packed, bias, "none", [], "")


def packed_convolution(x_NK: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The same in float32. A contiguous x_NK is not copied: it already is a channels_last image."""
    image = torch.ops.mkldnn._convolution_pointwise(x_NK.t()[None, :, None], packed, bias, [0, 0], [1, 1], [1, 1], 1, "none", [], "")
    return image[0, :, 0].t()


@functools.cache
def can_pack(device_type: str, dtype: torch.dtype) -> bool:
    """Whether packed products work on this machine. A trial product decides: torch has no query for it, and the operators are not public API."""
    if device_type != "cpu" or dtype not in (torch.float32, torch.bfloat16) or not torch.backends.mkldnn.is_available():
        return False
    try:
        if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return False
        weight = torch.arange(-48, 48, device=device_type).view(12, 8).to(dtype)
        x_NK = torch.arange(-8, 8, device=device_type).view(2, 8).to(dtype)
        product = packed_product(dtype)(x_NK, pack(weight, 2), None)
        return torch.equal(product, F.linear(x_NK, weight))  # small integers: exact in any order of summation
    except (RuntimeError, AttributeError, TypeError):
        return False
