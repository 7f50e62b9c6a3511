"""The interface of all quantizers: forward, commit, discard, ids_to_latents."""

import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import nn

from vqmosaic.recipes.tokenizer_sections import TokenizerConfig


@dataclass
class QuantizerOutput:
    """Quantized latents (B, D, h, w) float32 with a gradient to the latents, int64 ids in [0, K), and a scalar loss.

    ids have shape (B, h, w), or (B, h, w, depth) if depth is greater than 1. None if the quantizer has no ids.
    """

    quantized: torch.Tensor
    ids: torch.Tensor | None
    loss: torch.Tensor


class Quantizer(nn.Module, ABC):
    """Base class of the quantizers. A forward pass in training only collects statistics. After an accepted optimizer step, commit() applies
    them with one all-reduce. After a refused step, discard() drops them.

    Args:
        config: the tokenizer section of a recipe. Fields that belong to other quantizers are ignored.
        seed: determines the random initialization.

    The arguments of version 0.1.0 still work, with a DeprecationWarning: `codebook_size`, `code_dim` and fields of TokenizerConfig by keyword.
    """

    KIND: ClassVar[str]
    """The name of this quantizer in `tokenizer.quantizer`."""

    TRAINING_ONLY: ClassVar[tuple[str, ...]] = ()
    """Names of buffers that only training needs. An export omits them."""
    CODES: ClassVar[tuple[str, ...]] = ()
    """Names of the parameters that are codes. All other parameters are network weights, as in encoder and decoder."""
    has_ids: ClassVar[bool] = True
    depth: int = 1
    codebook_size: int
    code_dim: int

    def __init__(self, config: TokenizerConfig | int | None = None, code_dim: int | None = None, *, seed: int = 0, **fields):
        super().__init__()
        if not isinstance(config, TokenizerConfig):
            inner_calls = sum("__init__" in vars(base) for base in type(self).__mro__[:type(self).__mro__.index(Quantizer)])
            warnings.warn(f"{type(self).__name__}(codebook_size, code_dim) is deprecated. Pass a TokenizerConfig.", DeprecationWarning,
                          stacklevel=2 + inner_calls)
            sizes: dict[str, Any] = {"codebook_size": config, "code_dim": code_dim}
            config = TokenizerConfig(quantizer=self.KIND, **{name: size for name, size in sizes.items() if size is not None}, **fields)
        elif code_dim is not None or fields:
            raise TypeError("code_dim and other fields are part of the TokenizerConfig")
        self.config, self.codebook_size, self.code_dim, self.seed = config, config.codebook_size, config.code_dim, seed

    @classmethod
    def from_config(cls, config: TokenizerConfig, seed: int) -> Self:
        """Deprecated: call the class with the same arguments."""
        warnings.warn(f"{cls.__name__}.from_config is deprecated. Call {cls.__name__}(config, seed=seed).", DeprecationWarning, stacklevel=2)
        return cls(config, seed=seed)

    def initialize(self, latents_ND: torch.Tensor) -> None:
        """Initialize the codes from latents (N, D). The trainer calls it before step 0 with the same latents on every rank."""

    def set_progress(self, share: float) -> None:
        """Update annealed values. The trainer calls it before each step with the training progress in [0, 1]."""

    def commit(self) -> None:
        """Apply the statistics collected by forward passes since the last commit."""

    def discard(self) -> None:
        """Drop the statistics collected by forward passes since the last commit."""

    def restart_averages(self) -> None:
        """Reset the moving averages to the current codes. Called after loading an export, which lacks the averages."""

    @abstractmethod
    def ids_to_latents(self, ids_Bhw: torch.Tensor) -> torch.Tensor:
        """Convert ids (B, h, w), or (B, h, w, depth), to float32 latents (B, D, h, w)."""

    def vectors_and_codes(self, latents_BDhw: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Float32 vectors (B, h, w, F) for latents (B, D, h, w), and codes (K, F): the id of a latent is that of the code nearest to its vector.

        None if the quantizer chooses codes in another way.
        """
        return None

    def codebook_parameters(self) -> list[nn.Parameter]:
        """Parameters that are codes, including those of inner quantizers."""
        return [getattr(module, name) for module in self.modules() if isinstance(module, Quantizer) for name in module.CODES]

    def training_only_names(self) -> set[str]:
        """State dict names, relative to this module, of the buffers that an export omits."""
        return {f"{prefix}.{name}".lstrip(".") for prefix, module in self.named_modules() if isinstance(module, Quantizer)
                for name in module.TRAINING_ONLY}
