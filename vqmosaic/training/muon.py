"""Muon: momentum made orthogonal for the matrices inside a network, AdamW for everything else.

torch.optim.Muon takes two-dimensional parameters only and iterates in bfloat16, which many CPUs compute slowly; this one takes the
kernels of convolutions as well, works in the dtype it is told, and goes through many matrices together.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import groupby

import torch
from torch import nn

COEFFICIENTS = ((8.0133, -22.9257, 16.5995), (3.6006, -2.6418, 0.5105), (2.6613, -1.9772, 0.4526))
"""a, b, c of x -> a x + b x^3 + c x^5, for one iteration after another: each is the polynomial that stays nearest to 1 over the interval that the
ones before lead to, from [0.01, 1] on (Amsel et al. 2025, arXiv 2505.16932). From 0.01 on, three do what one fixed polynomial needs five for."""
MARGIN = 1.01
"""The first polynomials are steep at the upper end of their intervals and wild beyond. This keeps what rounding in bfloat16 adds inside: matrices are
divided by so much more than their norm, and the polynomials above but for the last are those of x / MARGIN."""
LARGEST_STACK = 2**23
"""Numbers in the products of the matrices that go through one iteration: many small ones, for fewer calls, and few large ones, for less memory."""
RMS_OF_ADAMW = 0.2
"""Root mean square of an AdamW update over its learning rate, to which updates are scaled (Liu et al. 2025, arXiv 2502.16982)."""


def orthogonalized(stacks: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """For each matrix U S V^T of each stack (N, R, C) nearly U V^T, in the stack's dtype; all must have one shorter side.

    Singular values from about 0.01 of the matrix's norm on become 0.7 to 1.3; those below, at most 77 times what they were over the norm.
    """
    lying = [stack.mT if stack.shape[1] > stack.shape[2] else stack for stack in stacks]
    updates = [iterated(x_NRC) for x_NRC in lying] if lying[0].dtype == torch.bfloat16 else iterated_products(lying)
    return [update.mT if update.shape != stack.shape else update for update, stack in zip(updates, stacks, strict=True)]


def shrinking(norms_N11: torch.Tensor) -> torch.Tensor:
    """The factors (N, 1, 1) that bring singular values below 1."""
    return 1 / (MARGIN * norms_N11.clamp_min(1e-7))


def iterated(x_NRC: torch.Tensor) -> torch.Tensor:
    """The iteration over x itself, for bfloat16, whose rounding swallows the squares of small singular values."""
    norms_N11 = torch.linalg.vector_norm(x_NRC, dim=(1, 2), keepdim=True, dtype=torch.promote_types(x_NRC.dtype, torch.float32))
    x = x_NRC * shrinking(norms_N11).to(x_NRC.dtype)
    for a, b, c in COEFFICIENTS:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def iterated_products(stacks: list[torch.Tensor]) -> list[torch.Tensor]:
    """The same for float32, over the products x x^T (N, R, R), whose squares it bears: those of all stacks together.

    With kernels of convolutions, nine times as wide as high, that is half of the work; square matrices cost a fifth more, which the fewer calls
    outweigh while they are small.
    """
    products = torch.cat([x_NRC @ x_NRC.mT for x_NRC in stacks])
    shrink_N11 = shrinking(products.diagonal(dim1=1, dim2=2).sum(1).sqrt()[:, None, None])
    products = orthogonalizing(products * shrink_N11.square()) * shrink_N11
    return [product @ x_NRC for product, x_NRC in zip(products.split([len(x_NRC) for x_NRC in stacks]), stacks, strict=True)]


def orthogonalizing(gram_NRR: torch.Tensor) -> torch.Tensor:
    """What x (N, R, C) has to be multiplied by from the left, for its products x x^T (N, R, R): the same iteration, of which x itself is no part."""
    product = None
    for iteration, (a, b, c) in enumerate(COEFFICIENTS, start=1):
        factor = torch.baddbmm(gram_NRR, gram_NRR, gram_NRR, beta=b, alpha=c)
        factor.diagonal(dim1=1, dim2=2).add_(a)
        product = factor if product is None else factor @ product
        if iteration < len(COEFFICIENTS):
            gram_NRR = factor @ gram_NRR @ factor
    return product


class Muon(torch.optim.AdamW):
    """AdamW, but for `matrices`, whose updates are orthogonalized Nesterov momentum (Jordan et al. 2024).

    One learning rate serves both: updates of matrices are scaled to the size that AdamW's have. A kernel (O, I, h, w) counts as a matrix
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
        """Update all parameters that have gradients; none, where a gradient scaler has found that they overflowed."""
        if closure is not None:
            raise ValueError("Muon takes no closure: it uses each gradient once.")
        group = self.param_groups[0]
        overflowed = getattr(self, "found_inf", None)  # set by torch's GradScaler, which leaves it to fused optimizers to skip the step
        if overflowed is not None and overflowed.item():
            for parameter in group["params"]:
                parameter.grad = None
            super().step()
            return
        parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
        for parameter in parameters:
            if not self.state[parameter]:  # AdamW looks for a step in every state that it loads
                self.state[parameter].update(momentum=torch.zeros_like(parameter), step=torch.zeros(()))
        if parameters:
            self._step_matrices(group, parameters)
        super().step()

    def _step_matrices(self, group: dict, parameters: list[nn.Parameter]) -> None:
        """Nesterov momentum of all matrices that have gradients, made orthogonal, weighed and added."""
        gradients = [parameter.grad for parameter in parameters]
        momenta = [self.state[parameter]["momentum"] for parameter in parameters]
        torch._foreach_add_([self.state[parameter]["step"] for parameter in parameters], 1)
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        torch._foreach_lerp_(gradients, momenta, group["momentum"])
        if group["weight_decay"]:
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        pairs = [pair for parameter, gradient in zip(parameters, gradients, strict=True) for pair in self._pairs(parameter, gradient)]
        for height, of_height in groupby(sorted(pairs, key=height_of), key=height_of):
            matrices, together = list(of_height), max(1, LARGEST_STACK // height**2)
            for start in range(0, len(matrices), together):
                self._add_directions(matrices[start:start + together], group["lr"])
        for parameter in parameters:
            parameter.grad = None

    def _pairs(self, parameter: nn.Parameter, gradient: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The matrices of a parameter, each with its update direction."""
        if id(parameter) in self.stacks:
            return list(zip(parameter.unbind(), gradient.unbind(), strict=True))
        return [(as_matrix(parameter, parameter), as_matrix(gradient, parameter))]

    def _add_directions(self, pairs: list[tuple[torch.Tensor, torch.Tensor]], learning_rate: float) -> None:
        """To each matrix its direction made orthogonal; all of one height."""
        by_shape: dict[torch.Size, list[tuple[torch.Tensor, torch.Tensor]]] = defaultdict(list)
        for pair in pairs:
            by_shape[pair[0].shape].append(pair)
        stacks = [torch.stack([direction for _, direction in same]).to(self.dtype) for same in by_shape.values()]
        for (shape, same), updates in zip(by_shape.items(), orthogonalized(stacks), strict=True):
            matrices = [matrix for matrix, _ in same]
            torch._foreach_add_(matrices, updates.to(matrices[0].dtype).unbind(), alpha=-learning_rate * RMS_OF_ADAMW * max(shape) ** 0.5)


def height_of(pair: tuple[torch.Tensor, torch.Tensor]) -> int:
    """The shorter side of a matrix and its direction, which is that of its products."""
    return min(pair[0].shape)


def as_matrix(values: torch.Tensor, parameter: nn.Parameter) -> torch.Tensor:
    """A parameter (O, ...), or what is shaped as it, as a matrix (O, rest): the parameter itself in its own memory, whose order columns have.

    That of channels_last differs from that of names; singular vectors and values do not ask for it.
    """
    if parameter.is_contiguous():
        return values.flatten(1)
    if parameter.ndim == 4 and parameter.is_contiguous(memory_format=torch.channels_last):
        return values.movedim(1, -1).flatten(1)
    raise ValueError(f"Muon takes parameters in torch's usual order or in channels_last; one has shape {tuple(parameter.shape)} and strides "
                     f"{parameter.stride()}.")
