"""Names from version 0.1.0 that still work, with a DeprecationWarning."""

import subprocess
import sys

import pytest

from pipelines import ImageGenerationPipeline
from tests.tiny import ROOT


def test_the_former_module_of_grid_transformer_registers_the_model():
    code = ("import warnings; warnings.simplefilter('error', DeprecationWarning)\n"
            "try:\n    import stage2_prior.grid_transformer\nexcept DeprecationWarning as warning:\n    assert 'stage2_prior.model' in str(warning)\n"
            "from transformers import AutoConfig; print(AutoConfig.for_model('grid_transformer').model_type)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "grid_transformer", done.stderr


def test_sampling_settings_may_be_positional(tiny_run):
    pipe = ImageGenerationPipeline.from_pretrained(tiny_run)
    with pytest.warns(DeprecationWarning, match="pass guidance_scale, temperature, top_k by keyword"):
        former = pipe("3", 2, 7, 1.5, 0.5, 4)
    now = pipe("3", 2, 7, guidance_scale=1.5, temperature=0.5, top_k=4)
    assert former.token_ids.equal(now.token_ids)
    with pytest.raises(TypeError, match="at most 10 positional"):
        pipe("3", 2, 7, 1.5, 0.5, 4, 1.0, "pil", None, 64, True)
    with pytest.raises(ValueError, match="temperature"):
        pipe("3", 2, 7, temprature=0.5)
