"""What every quantizer offers: forward / commit / discard, ids back to latents."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import nn


@dataclass
class QuantizerOutput:
    """quantized (B, D, h, w) float32 with a gradient to the latents, ids (B, h, w) int64 in [0, K), loss a scalar."""

    quantized: torch.Tensor
    ids: torch.Tensor
    loss: torch.Tensor


class Quantizer(nn.Module, ABC):
    """Base of the quantizers. A forward in training only gathers statistics; commit() after an accepted optimizer step
    applies them (all-reduced once), discard() after a refused step forgets them."""

    codebook_size: int
    code_dim: int

    def initialize(self, latents_ND: torch.Tensor) -> None:
        """Start from real latents; called by the trainer before step 0, with the same latents on every rank."""

    def commit(self) -> None:
        """Apply what the forwards since the last commit gathered."""

    def discard(self) -> None:
        """Forget what the forwards since the last commit gathered."""

    def restart_averages(self) -> None:
        """Let what commit() moves start from the codes as they are; called after they were loaded from an export."""

    @abstractmethod
    def ids_to_latents(self, ids_Bhw: torch.Tensor) -> torch.Tensor:
        """Latents (B, D, h, w) float32 of ids (B, h, w)."""
