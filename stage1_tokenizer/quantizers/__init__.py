"""Quantizers by name. Each turns latents into ids and back; see protocol.py for what all of them do."""

from stage1_tokenizer.quantizers.ema import EMAQuantizer
from stage1_tokenizer.quantizers.protocol import Quantizer, QuantizerOutput

QUANTIZERS: dict[str, type[Quantizer]] = {"ema": EMAQuantizer}

__all__ = ["QUANTIZERS", "EMAQuantizer", "Quantizer", "QuantizerOutput"]
