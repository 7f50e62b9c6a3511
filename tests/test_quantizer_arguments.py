"""Quantizers take a TokenizerConfig. The deprecated arguments of version 0.1.0 give the same quantizer and warn."""

import pytest
import torch

from stage1_tokenizer.quantizers import QUANTIZERS
from vqmosaic.recipes.tokenizer_sections import QUANTIZER_NAMES, TokenizerConfig


def test_every_quantizer_name_has_a_class():
    assert tuple(sorted(QUANTIZERS)) == tuple(sorted(QUANTIZER_NAMES))


@pytest.mark.parametrize("kind", QUANTIZER_NAMES)
def test_deprecated_arguments_warn_and_give_the_same_quantizer(kind):
    config = TokenizerConfig(quantizer=kind, codebook_size=64, code_dim=8, commitment_weight=0.5)
    new = QUANTIZERS[kind](config, seed=3)
    with pytest.warns(DeprecationWarning, match="Pass a TokenizerConfig") as warned:
        positional = QUANTIZERS[kind](64, 8, commitment_weight=0.5, seed=3)
    assert warned[0].filename == __file__
    with pytest.warns(DeprecationWarning):
        by_keyword = QUANTIZERS[kind](codebook_size=64, code_dim=8, commitment_weight=0.5, seed=3)
    with pytest.warns(DeprecationWarning, match="from_config is deprecated"):
        from_config = QUANTIZERS[kind].from_config(config, 3)
    latents_BDhw = torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    outputs = [module.eval()(latents_BDhw) for module in (new, positional, by_keyword, from_config)]
    for output in outputs[1:]:
        assert torch.equal(output.quantized, outputs[0].quantized) and torch.equal(output.loss, outputs[0].loss)


def test_config_cannot_be_combined_with_other_arguments():
    with pytest.raises(TypeError, match="part of the TokenizerConfig"):
        QUANTIZERS["ema"](TokenizerConfig(), 8)
    with pytest.raises(TypeError, match="part of the TokenizerConfig"):
        QUANTIZERS["ema"](TokenizerConfig(), ema_decay=0.9)
