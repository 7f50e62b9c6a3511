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
"""a, b, c of the polynomial a x + b x^3 + c x^5 of each iteration, from Polar Express (Amsel et al. 2025, arXiv 2505.16932). The earlier polynomials
map singular values from [0.01, 1] to some interval, and the next polynomial is the one that is closest to 1 on it. These three iterations do as much
as five iterations with one fixed polynomial."""
MARGIN = 1.01
"""Matrices are divided by MARGIN times their norm, so that bfloat16 rounding does not push singular values beyond the interval of a polynomial. The
first polynomials are steep at the upper end of their interval and diverge beyond it. For the same reason, the coefficients of the first two are those
of the optimal polynomial of x / MARGIN."""
MAX_GRAM_ELEMENTS = 2**23
"""Largest number of elements in the products x x^T of all matrices that are processed together. It limits the memory. Many small matrices are
processed in one call."""
ADAMW_UPDATE_RMS = 0.2
"""Typical root mean square of an AdamW update, divided by the learning rate. Updates of matrices are scaled to it (Liu et al. 2025, arXiv
2502.16982)."""


def orthogonalize(stacks: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Approximately U V^T for each matrix U S V^T of each stack (N, R, C), in the stack's dtype. All matrices must have the same shorter side.

    Let s be a singular value divided by the norm of its matrix. If s is above about 0.01, the result has a singular value of 0.7 to 1.3 instead,
    otherwise at most 77 s.
    """
    wide = [stack.mT if stack.shape[1] > stack.shape[2] else stack for stack in stacks]
    updates = [orthogonalize_directly(x_NRC) for x_NRC in wide] if wide[0].dtype == torch.bfloat16 else orthogonalize_by_gram(wide)
    return [update.mT if update.shape != stack.shape else update for update, stack in zip(updates, stacks, strict=True)]


def inverse_norms(norms_N11: torch.Tensor) -> torch.Tensor:
    """Factors (N, 1, 1) that scale matrices with these norms so that their singular values are below 1."""
    return 1 / (MARGIN * norms_N11.clamp_min(1e-7))


def orthogonalize_directly(x_NRC: torch.Tensor) -> torch.Tensor:
    """Orthogonalize one stack by iterating on x itself. This is for bfloat16, whose rounding loses the squares of small singular values."""
    norms_N11 = torch.linalg.vector_norm(x_NRC, dim=(1, 2), keepdim=True, dtype=torch.promote_types(x_NRC.dtype, torch.float32))
    x = x_NRC * inverse_norms(norms_N11).to(x_NRC.dtype)
    for a, b, c in COEFFICIENTS:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def orthogonalize_by_gram(stacks: list[torch.Tensor]) -> list[torch.Tensor]:
    """Orthogonalize all stacks together by iterating on their products x x^T (N, R, R). Each stack must have R <= C.

    This is for float32, which is precise enough for squared singular values. For convolution kernels, which are nine times as wide as high, it is
    half of the work. For square matrices it is 20 % more work, but fewer calls, so it is still faster while they are small.
    """
    grams_NRR = torch.cat([x_NRC @ x_NRC.mT for x_NRC in stacks])
    scale_N11 = inverse_norms(grams_NRR.diagonal(dim1=1, dim2=2).sum(1).sqrt()[:, None, None])  # the trace of x x^T is the squared norm of x
    left_NRR = left_factors(grams_NRR * scale_N11.square()) * scale_N11
    return [left @ x_NRC for left, x_NRC in zip(left_NRR.split([len(x_NRC) for x_NRC in stacks]), stacks, strict=True)]


def left_factors(gram_NRR: torch.Tensor) -> torch.Tensor:
    """The matrices L (N, R, R) for which L x is orthogonalized, computed from the products x x^T (N, R, R) without x itself."""
    left_NRR = None
    for iteration, (a, b, c) in enumerate(COEFFICIENTS, start=1):
        factor = torch.baddbmm(gram_NRR, gram_NRR, gram_NRR, beta=b, alpha=c)
        factor.diagonal(dim1=1, dim2=2).add_(a)
        left_NRR = factor if left_NRR is None else factor @ left_NRR
        if iteration < len(COEFFICIENTS):
            gram_NRR = factor @ gram_NRR @ factor
    assert left_NRR is not None
    return left_NRR


class Muon(torch.optim.AdamW):
    """AdamW, except for `matrices`, whose updates are orthogonalized Nesterov momentum (Jordan et al. 2024).

    Both use the same learning rate, because updates of matrices are scaled to the size of AdamW's. A kernel (O, I, h, w) counts as a matrix
    (O, I h w); a stack (E, R, C) counts as E matrices (R, C). `step` consumes the gradients of matrices: `grad` is None afterwards.
    """

    def __init__(self, matrices: Iterable[nn.Parameter], groups: list[dict], *, lr: float, stacks: Iterable[nn.Parameter] = (),
                 betas: tuple[float, float] = (0.9, 0.99), momentum: float = 0.95, weight_decay: float = 0.0, dtype: torch.dtype = torch.float32):
        """Create the optimizer for the matrices and all other parameters.

        Args:
            matrices: parameters that are updated with orthogonalized momentum, including stacks.
            groups: parameter groups of all other parameters, for AdamW.
            stacks: those of `matrices` that are stacks (E, R, C) of E matrices. All others with three or more dimensions are kernels.
            betas: AdamW's betas for the other parameters.
            momentum, weight_decay: those of the matrices.
            dtype: number format of the orthogonalization.
        """
        matrices = list(matrices)
        super().__init__([{"params": matrices, "weight_decay": weight_decay, "momentum": momentum}, *groups], lr=lr, betas=betas, fused=True)
        self.dtype = dtype
        self.stacks = {id(parameter) for parameter in stacks}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # a closure, which torch allows, raises an error
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

    def _step_matrices(self, group: dict, parameters: list[torch.Tensor]) -> None:
        """Update the momenta, apply weight decay, and subtract the orthogonalized Nesterov momenta from the matrices."""
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        momenta = [self.state[parameter]["momentum"] for parameter in parameters]
        torch._foreach_add_([self.state[parameter]["step"] for parameter in parameters], 1)
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        torch._foreach_lerp_(gradients, momenta, group["momentum"])
        directions = gradients  # the Nesterov momentum has overwritten them
        if group["weight_decay"]:
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        pairs = [pair for parameter, direction in zip(parameters, directions, strict=True)
                 for pair in self._matrices_with_directions(parameter, direction)]
        for side, pairs_of_side in groupby(sorted(pairs, key=shorter_side), key=shorter_side):
            same_side = list(pairs_of_side)
            matrices_at_once = max(1, MAX_GRAM_ELEMENTS // side**2)
            for start in range(0, len(same_side), matrices_at_once):
                self._add_directions(same_side[start:start + matrices_at_once], group["lr"])
        for parameter in parameters:
            parameter.grad = None

    def _matrices_with_directions(self, parameter: torch.Tensor, direction: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(matrix, update direction) of each matrix in a parameter. The matrices are views."""
        if id(parameter) in self.stacks:
            return list(zip(parameter.unbind(), direction.unbind(), strict=True))
        return [(as_matrix(parameter, parameter), as_matrix(direction, parameter))]

    def _add_directions(self, pairs: list[tuple[torch.Tensor, torch.Tensor]], learning_rate: float) -> None:
        """Orthogonalize the directions, scale them, and subtract them from their matrices. All matrices must have the same shorter side."""
        by_shape: dict[torch.Size, list[tuple[torch.Tensor, torch.Tensor]]] = defaultdict(list)
        for pair in pairs:
            by_shape[pair[0].shape].append(pair)
        stacks = [torch.stack([direction for _, direction in same_shape]).to(self.dtype) for same_shape in by_shape.values()]
        for (shape, same_shape), updates in zip(by_shape.items(), orthogonalize(stacks), strict=True):
            matrices = [matrix for matrix, _ in same_shape]
            # An orthogonal matrix (R, C) has a root mean square of 1 / sqrt(max(R, C)).
            torch._foreach_add_(matrices, updates.to(matrices[0].dtype).unbind(), alpha=-learning_rate * ADAMW_UPDATE_RMS * max(shape) ** 0.5)


def shorter_side(pair: tuple[torch.Tensor, torch.Tensor]) -> int:
    """The shorter side of the matrix in a pair (matrix, direction), which is the size of its product x x^T."""
    matrix, _ = pair
    return min(matrix.shape)


def as_matrix(values: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """Flatten a tensor with the shape (O, ...) of `parameter` to a matrix (O, rest). For the parameter itself, this is a view.

    The column order depends on the memory format of the parameter. Orthogonalization does not depend on it.
    """
    if parameter.is_contiguous():
        return values.flatten(1)
    if parameter.ndim == 4 and parameter.is_contiguous(memory_format=torch.channels_last):
        return values.movedim(1, -1).flatten(1)
    raise ValueError(f"Muon accepts contiguous or channels_last parameters; one has shape {tuple(parameter.shape)} and strides "
                     f"{parameter.stride()}.")
