"""Products of a few rows with large matrices, which are most of the work when tokens are sampled one after another on a CPU.

With few rows, reading the weights limits the speed. F.linear reads them in an order that is slow for few rows. oneDNN has operators for packed
weights, which are reordered once: in bf16 the linear operator; in float32 the 1 x 1 convolution, for which N rows of K values are an image of
1 x N pixels with K channels. torch.compile uses the same operators when it freezes weights.
"""

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

PACKED_ROWS = range(2, 49)
"""Numbers of rows for which packing is faster in float32. For one row F.linear reads at full speed, and for many rows arithmetic is the limit."""
PACKED_MIN_ELEMENTS = 2**19
"""In float32, smaller matrices stay in the CPU caches, where F.linear is faster."""

Parts = dict[type[nn.Module], Callable[[Any], nn.Module]]
"""For each type of module, a function that returns the replacement for a module of this type."""
ProductFunction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
"""Maps rows (N, K), a matrix and a bias to the product (N, outputs)."""


def reference(linear: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """What PackedLinear computes."""
    return linear(x)


class PackedLinear(nn.Module):
    """A linear layer with packed weights, for inputs with any number of rows."""

    def __init__(self, linear: nn.Linear, rows: int):
        super().__init__()
        self.packed, self.bias = pack(linear.weight.detach(), rows), linear.bias
        self.product = packed_product(linear.weight.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The product (..., outputs) of x (..., K)."""
        return self.product(x.flatten(0, -2), self.packed, self.bias).unflatten(0, x.shape[:-1])


def pack_linear_layers(module: nn.Module, rows: int) -> nn.Module:
    """A copy of a module that shares its weights. Its linear layers are packed where this is faster for `rows` rows."""
    return share_weights(module, {nn.Linear: lambda linear: PackedLinear(linear, rows) if is_faster_packed(linear.weight, rows) else linear})


def share_weights(module: nn.Module, replacements: Parts) -> nn.Module:
    """A copy of a module and of the modules in it that shares their weights. Modules of the types in `replacements` are replaced."""
    if type(module) in replacements:
        return replacements[type(module)](module)
    copied = copy.copy(module)
    copied._compiled_call_impl = None  # it would call the original
    copied._modules = {name: child if child is None else share_weights(child, replacements) for name, child in module._modules.items()}
    return copied


def is_faster_packed(weight: torch.Tensor, rows: int) -> bool:
    """Whether a matrix can be packed, and its products with this number of rows are then faster."""
    is_faster = weight.dtype == torch.bfloat16 or (rows in PACKED_ROWS and weight.numel() >= PACKED_MIN_ELEMENTS)
    return is_faster and can_pack(weight.device.type, weight.dtype)


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
