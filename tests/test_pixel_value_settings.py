"""The settings data.channels and data.value_range: errors, and where they are stored."""

import dataclasses

import pytest

from stage1_tokenizer.data.image_cache import resized_megabytes
from stage1_tokenizer.image_files.images import ImageTransform
from stage1_tokenizer.tokenizer import ImageTokenizer
from vqmosaic.errors import InputError
from vqmosaic.recipes.recipe_sections import DataConfig
from vqmosaic.recipes.tokenizer_sections import TokenizerConfig

WHOLE_RANGE = (0, 65535)
TINY_NETWORK = TokenizerConfig(channels=32, channel_multipliers=[1, 1], residual_blocks=1, codebook_size=32, code_dim=8, latent_channels=32,
                               middle_attention=False)


@pytest.mark.parametrize("channels", [0, 5, -1, 2.5, "3", True])
def test_other_numbers_of_channels_are_errors(channels):
    for construct in (lambda: DataConfig(channels=channels), lambda: ImageTransform(16, channels)):
        with pytest.raises(InputError, match=r"channels is .*(allowed: 1 \(grey\), 2 \(grey and alpha\), 3 \(RGB\), 4|must be an integer)"):
            construct()


@pytest.mark.parametrize("value_range", [[1, 1], [2, 1], [0], [0, 1, 2], [], [0, float("inf")], [float("nan"), 1], 65535, "0,1", ["a", "b"]])
def test_other_ranges_are_errors(value_range):
    for construct in (lambda: DataConfig(value_range=value_range), lambda: ImageTransform(16, 1, value_range)):
        with pytest.raises(InputError, match=r"value_range"):
            construct()


def test_digits_have_no_range():
    with pytest.raises(InputError, match=r"data\.value_range is .* but data.source is 'digits'.*null"):
        DataConfig(source="digits", value_range=[0, 255])


def test_config_has_the_range_only_if_it_is_set(tmp_path):
    """The fingerprint of 8-bit tokenizers is that of the versions without value_range."""
    plain = ImageTransform(16, 1)
    assert plain.to_dict() == {"image_size": 16, "channels": 1, "resampling": "bicubic"} and ImageTransform.from_dict(plain.to_dict()) == plain
    deep = ImageTransform(16, 1, [0, 65535])
    assert deep.to_dict() == plain.to_dict() | {"value_range": [0.0, 65535.0]} and ImageTransform.from_dict(deep.to_dict()) == deep
    assert dataclasses.replace(deep, value_range=None) == plain and hash(deep) != hash(plain)
    fingerprints = {ImageTokenizer(TINY_NETWORK, transform).fingerprint_of_tokens() for transform in (plain, deep, ImageTransform(16, 1, (0, 4095)))}
    assert len(fingerprints) == 3
    ImageTokenizer(TINY_NETWORK, deep).save_pretrained(tmp_path / "tokenizer")
    assert ImageTokenizer.from_pretrained(tmp_path / "tokenizer").transform == deep


def test_the_cache_counts_the_size_of_floats():
    assert resized_megabytes(2**20, ImageTransform(1, 2)) == 2 and resized_megabytes(2**20, ImageTransform(1, 2, WHOLE_RANGE)) == 8
