"""Quantizers by name. Each maps latents to ids and ids back to latents. protocol.py defines their interface."""

from stage1_tokenizer.quantizers.ema import EMAQuantizer
from stage1_tokenizer.quantizers.fsq import FSQQuantizer
from stage1_tokenizer.quantizers.gradient import GradientQuantizer
from stage1_tokenizer.quantizers.gumbel import GumbelQuantizer
from stage1_tokenizer.quantizers.ibq import IBQQuantizer
from stage1_tokenizer.quantizers.kl import KLBottleneck
from stage1_tokenizer.quantizers.lfq import LFQQuantizer
from stage1_tokenizer.quantizers.protocol import Quantizer, QuantizerOutput
from stage1_tokenizer.quantizers.residual import ResidualQuantizer
from stage1_tokenizer.quantizers.simvq import SimVQQuantizer

QUANTIZERS: dict[str, type[Quantizer]] = {quantizer.KIND: quantizer for quantizer in (
    EMAQuantizer,
    GradientQuantizer,
    SimVQQuantizer,
    GumbelQuantizer,
    FSQQuantizer,
    LFQQuantizer,
    IBQQuantizer,
    ResidualQuantizer,
    KLBottleneck,
)}

__all__ = ["QUANTIZERS", "EMAQuantizer", "FSQQuantizer", "GradientQuantizer", "GumbelQuantizer", "IBQQuantizer", "KLBottleneck", "LFQQuantizer",
           "Quantizer", "QuantizerOutput", "ResidualQuantizer", "SimVQQuantizer"]
