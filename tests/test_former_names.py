"""Names from version 0.1.0 that still work, with a DeprecationWarning."""

import subprocess
import sys

import pytest

from pipelines import ImageGenerationPipeline
from tests.tiny import ROOT


def test_former_grid_transformer_module_registers_the_model():
    code = ("import warnings; warnings.simplefilter('error', DeprecationWarning)\n"
            "try:\n    import stage2_prior.grid_transformer\nexcept DeprecationWarning as warning:\n    assert 'stage2_prior.model' in str(warning)\n"
            "from transformers import AutoConfig; print(AutoConfig.for_model('grid_transformer').model_type)")
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.strip() == "grid_transformer", result.stderr


def test_positional_sampling_settings_are_deprecated(tiny_run):
    pipe = ImageGenerationPipeline.from_pretrained(tiny_run)
    with pytest.warns(DeprecationWarning, match="pass guidance_scale, temperature, top_k by keyword"):
        positional = pipe("3", 2, 7, 1.5, 0.5, 4)
    by_keyword = pipe("3", 2, 7, guidance_scale=1.5, temperature=0.5, top_k=4)
    assert positional.token_ids.equal(by_keyword.token_ids)
    with pytest.raises(TypeError, match="at most 10 positional"):
        pipe("3", 2, 7, 1.5, 0.5, 4, 1.0, "pil", None, 64, True)
    with pytest.raises(ValueError, match="temperature"):
        pipe("3", 2, 7, temprature=0.5)
