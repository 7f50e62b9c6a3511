"""What every quantizer offers: forward / commit / discard, ids back to latents."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

import torch
from torch import nn

if TYPE_CHECKING:
    from vqmosaic.recipes.tokenizer_sections import TokenizerConfig


@dataclass
class QuantizerOutput:
    """quantized (B, D, h, w) float32 with a gradient to the latents, ids int64 in [0, K), loss a scalar.

    ids are (B, h, w); (B, h, w, depth) where the quantizer's depth is greater than 1; None where it has no ids.
    """

    quantized: torch.Tensor
    ids: torch.Tensor | None
    loss: torch.Tensor


class Quantizer(nn.Module, ABC):
    """Base of the quantizers. A forward in training only gathers statistics; commit() after an accepted optimizer step
    applies them (all-reduced once), discard() after a refused step forgets them.

    Constructors take `codebook_size` and `code_dim`, and keyword arguments named like the fields of TokenizerConfig.
    """

    TRAINING_ONLY: ClassVar[tuple[str, ...]] = ()
    """Names of buffers that only training needs; an export leaves them out."""
    CODES: ClassVar[tuple[str, ...]] = ()
    """Names of the parameters that are codes. All other parameters are network weights, like those of encoder and decoder."""
    has_ids: ClassVar[bool] = True
    depth: int = 1
    codebook_size: int
    code_dim: int

    @classmethod
    @abstractmethod
    def from_config(cls, config: "TokenizerConfig", seed: int) -> Self:
        """The quantizer that a recipe's tokenizer section describes."""

    def initialize(self, latents_ND: torch.Tensor) -> None:
        """Start from real latents; called by the trainer before step 0, with the same latents on every rank."""

    def set_progress(self, share: float) -> None:
        """Told by the trainer before each step which share of the training is done, in [0, 1]; for what is annealed."""

    def commit(self) -> None:
        """Apply what the forwards since the last commit gathered."""

    def discard(self) -> None:
        """Forget what the forwards since the last commit gathered."""

    def restart_averages(self) -> None:
        """Let what commit() moves start from the codes as they are; called after they were loaded from an export."""

    @abstractmethod
    def ids_to_latents(self, ids_Bhw: torch.Tensor) -> torch.Tensor:
        """Latents (B, D, h, w) float32 of ids (B, h, w), or (B, h, w, depth)."""

    def codebook_parameters(self) -> list[nn.Parameter]:
        """Parameters that are codes, including those of inner quantizers."""
        return [getattr(module, name) for module in self.modules() if isinstance(module, Quantizer) for name in module.CODES]

    def training_only_names(self) -> set[str]:
        """Dotted names, inside this module, of the buffers that an export leaves out."""
        return {f"{prefix}.{name}".lstrip(".") for prefix, module in self.named_modules() if isinstance(module, Quantizer)
                for name in module.TRAINING_ONLY}
