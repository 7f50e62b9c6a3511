"""The Muon optimizer: orthogonalized momentum for the matrices inside a network, AdamW for everything else.

torch.optim.Muon only accepts two-dimensional parameters, and iterates in bfloat16, which is slow on many CPUs. This one also accepts convolution
kernels, computes in a given dtype, and processes many matrices together.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import groupby

import torch
from torch import nn

COEFFICIENTS = ((8.0133, -22.9257, 16.5995), (3.6006, -2.6418, 0.5105), (2.6613, -1.9772, 0.4526))
"""a, b, c of the polynomial x -> a x + b x^3 + c x^5 of each iteration. Each polynomial is the one closest to 1 on the interval to which the previous
ones map [0.01, 1] (Amsel et al. 2025, arXiv 2505.16932). On [0.01, 1], three of these do what one fixed polynomial needs five iterations for."""
MARGIN = 1.01
"""Matrices are divided by MARGIN times their norm, so that bfloat16 rounding does not push singular values beyond the interval of a polynomial. The
first polynomials are steep at the upper end of their interval and diverge beyond it. All polynomials but the last are those of x / MARGIN."""
MAX_GRAM_ELEMENTS = 2**23
"""Largest number of elements in the products x x^T of the matrices that are processed together: many small matrices, for fewer calls, but few large
ones, for less memory."""
ADAMW_UPDATE_RMS = 0.2
"""Root mean square of an AdamW update divided by its learning rate. Muon's updates are scaled to it (Liu et al. 2025, arXiv 2502.16982)."""


def orthogonalize(stacks: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Approximately U V^T for each matrix U S V^T of each stack (N, R, C), in the stack's dtype. All matrices must have the same shorter side.

    Singular values above about 0.01 of the matrix's norm become 0.7 to 1.3. Smaller ones become at most 77 times their ratio to the norm.
    """
    wide = [stack.mT if stack.shape[1] > stack.shape[2] else stack for stack in stacks]
    updates = [orthogonalize_directly(x_NRC) for x_NRC in wide] if wide[0].dtype == torch.bfloat16 else orthogonalize_by_gram(wide)
    return [update.mT if update.shape != stack.shape else update for update, stack in zip(updates, stacks, strict=True)]


def inverse_norms(norms_N11: torch.Tensor) -> torch.Tensor:
    """The factors (N, 1, 1) that scale matrices so that their singular values are below 1."""
    return 1 / (MARGIN * norms_N11.clamp_min(1e-7))


def orthogonalize_directly(x_NRC: torch.Tensor) -> torch.Tensor:
    """Iterate on x itself. This is for bfloat16, whose rounding loses the squares of small singular values."""
    norms_N11 = torch.linalg.vector_norm(x_NRC, dim=(1, 2), keepdim=True, dtype=torch.promote_types(x_NRC.dtype, torch.float32))
    x = x_NRC * inverse_norms(norms_N11).to(x_NRC.dtype)
    for a, b, c in COEFFICIENTS:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def orthogonalize_by_gram(stacks: list[torch.Tensor]) -> list[torch.Tensor]:
    """Iterate on the products x x^T (N, R, R) of all stacks together. This is for float32, which is precise enough for squared singular values.

    For convolution kernels, which are nine times as wide as high, this is half of the work. For square matrices it is 20 % more work, but fewer
    calls, so it is still faster while they are small.
    """
    products = torch.cat([x_NRC @ x_NRC.mT for x_NRC in stacks])
    scale_N11 = inverse_norms(products.diagonal(dim1=1, dim2=2).sum(1).sqrt()[:, None, None])
    products = left_factors(products * scale_N11.square()) * scale_N11
    return [product @ x_NRC for product, x_NRC in zip(products.split([len(x_NRC) for x_NRC in stacks]), stacks, strict=True)]


def left_factors(gram_NRR: torch.Tensor) -> torch.Tensor:
    """The matrices (N, R, R) to multiply x (N, R, C) by from the left, computed from the products x x^T (N, R, R) without x itself."""
    product = None
    for iteration, (a, b, c) in enumerate(COEFFICIENTS, start=1):
        factor = torch.baddbmm(gram_NRR, gram_NRR, gram_NRR, beta=b, alpha=c)
        factor.diagonal(dim1=1, dim2=2).add_(a)
        product = factor if product is None else factor @ product
        if iteration < len(COEFFICIENTS):
            gram_NRR = factor @ gram_NRR @ factor
    return product


class Muon(torch.optim.AdamW):
    """AdamW, except for `matrices`, whose updates are orthogonalized Nesterov momentum (Jordan et al. 2024).

    Both use the same learning rate: updates of matrices are scaled to the size of AdamW's. A kernel (O, I, h, w) counts as a matrix
    (O, I h w); a stack (E, R, C) counts as E matrices (R, C). `step` consumes the gradients of matrices: `grad` is None afterwards.
    """

    def __init__(self, matrices: Iterable[nn.Parameter], groups: list[dict], *, lr: float, stacks: Iterable[nn.Parameter] = (),
                 betas: tuple[float, float] = (0.9, 0.99), momentum: float = 0.95, weight_decay: float = 0.0, dtype: torch.dtype = torch.float32):
        """Create the optimizer for the matrices and all other parameters.

        Args:
            matrices: parameters that are updated with orthogonalized momentum, including stacks.
            groups: AdamW's parameter groups.
            stacks: those of `matrices` that are stacks (E, R, C) of E matrices. All others with three or more dimensions are kernels.
            weight_decay: weight decay of the matrices.
            dtype: number format of the orthogonalization.
        """
        matrices = list(matrices)
        super().__init__([{"params": matrices, "weight_decay": weight_decay, "momentum": momentum}, *groups], lr=lr, betas=betas, fused=True)
        self.dtype = dtype
        self.stacks = {id(parameter) for parameter in stacks}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update all parameters that have gradients, or none of them if a gradient scaler has found an overflow."""
        if closure is not None:
            raise ValueError("Muon takes no closure: it uses each gradient once.")
        group = self.param_groups[0]
        overflowed = getattr(self, "found_inf", None)  # set by torch's GradScaler: fused optimizers must skip the step themselves
        if overflowed is not None and overflowed.item():
            for parameter in group["params"]:
                parameter.grad = None
            super().step()
            return
        parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
        for parameter in parameters:
            if not self.state[parameter]:  # AdamW expects `step` in every state that it loads
                self.state[parameter].update(momentum=torch.zeros_like(parameter), step=torch.zeros(()))
        if parameters:
            self._step_matrices(group, parameters)
        super().step()

    def _step_matrices(self, group: dict, parameters: list[nn.Parameter]) -> None:
        """Update the momenta, apply weight decay, and add the orthogonalized Nesterov directions to the matrices."""
        gradients = [parameter.grad for parameter in parameters]
        momenta = [self.state[parameter]["momentum"] for parameter in parameters]
        torch._foreach_add_([self.state[parameter]["step"] for parameter in parameters], 1)
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        torch._foreach_lerp_(gradients, momenta, group["momentum"])
        if group["weight_decay"]:
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        pairs = [pair for parameter, gradient in zip(parameters, gradients, strict=True) for pair in self._pairs(parameter, gradient)]
        for side, group_of_pairs in groupby(sorted(pairs, key=shorter_side), key=shorter_side):
            same_side, chunk = list(group_of_pairs), max(1, MAX_GRAM_ELEMENTS // side**2)
            for start in range(0, len(same_side), chunk):
                self._add_directions(same_side[start:start + chunk], group["lr"])
        for parameter in parameters:
            parameter.grad = None

    def _pairs(self, parameter: nn.Parameter, gradient: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The matrices of a parameter, each with its update direction."""
        if id(parameter) in self.stacks:
            return list(zip(parameter.unbind(), gradient.unbind(), strict=True))
        return [(as_matrix(parameter, parameter), as_matrix(gradient, parameter))]

    def _add_directions(self, pairs: list[tuple[torch.Tensor, torch.Tensor]], learning_rate: float) -> None:
        """Orthogonalize the directions and add them to their matrices, scaled. All matrices must have the same shorter side."""
        by_shape: dict[torch.Size, list[tuple[torch.Tensor, torch.Tensor]]] = defaultdict(list)
        for pair in pairs:
            by_shape[pair[0].shape].append(pair)
        stacks = [torch.stack([direction for _, direction in same_shape]).to(self.dtype) for same_shape in by_shape.values()]
        for (shape, same_shape), updates in zip(by_shape.items(), orthogonalize(stacks), strict=True):
            matrices = [matrix for matrix, _ in same_shape]
            torch._foreach_add_(matrices, updates.to(matrices[0].dtype).unbind(), alpha=-learning_rate * ADAMW_UPDATE_RMS * max(shape) ** 0.5)


def shorter_side(pair: tuple[torch.Tensor, torch.Tensor]) -> int:
    """The shorter side of a matrix, which is the size of its product x x^T."""
    return min(pair[0].shape)


def as_matrix(values: torch.Tensor, parameter: nn.Parameter) -> torch.Tensor:
    """A view of a parameter (O, ...), or of a tensor of its shape, as a matrix (O, rest). A parameter is not copied.

    The column order depends on the memory format. Orthogonalization does not depend on it.
    """
    if parameter.is_contiguous():
        return values.flatten(1)
    if parameter.ndim == 4 and parameter.is_contiguous(memory_format=torch.channels_last):
        return values.movedim(1, -1).flatten(1)
    raise ValueError(f"Muon accepts contiguous or channels_last parameters; one has shape {tuple(parameter.shape)} and strides "
                     f"{parameter.stride()}.")
