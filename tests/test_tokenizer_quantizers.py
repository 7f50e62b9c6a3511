"""The image tokenizer with each quantizer: saving and loading, fingerprints, ids with a depth, latents without ids."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from stage1_tokenizer.image_files.images import ImageTransform
from stage1_tokenizer.tokenizer import ImageTokenizer
from stage1_tokenizer.trainable.trainable_tokenizer import ALWAYS_FINGERPRINTED_FIELDS
from tests.test_tokenizer import CHANNELS, SIZE, images
from vqmosaic.errors import InputError
from vqmosaic.recipes.tokenizer_sections import LEARNING_FIELDS, QUANTIZER_NAMES, TokenizerConfig

FIELDS = {"codebook_size": 64, "code_dim": 5, "latent_channels": 16, "channels": 32, "channel_multipliers": [1, 1], "residual_blocks": 1}

# Written by vqmosaic 2ba233c, which had only the quantizer ema and its fields.
EARLIEST_CONFIG = """{
  "format": "vqmosaic.image_tokenizer", "format_version": 1, "vqmosaic": "0.1.0",
  "network": {"quantizer": "ema", "codebook_size": 16, "code_dim": 4, "latent_channels": 16, "channels": 32, "channel_multipliers": [1, 1],
              "residual_blocks": 1, "attention_levels": [], "middle_attention": false, "dropout": 0.0, "commitment_weight": 0.25,
              "ema_decay": 0.99, "l2_normalize": false, "revival_threshold": 0.03},
  "transform": {"image_size": 8, "channels": 1, "resampling": "bicubic"}, "class_names": null,
  "token_fingerprint": "d731d3b6af284349da25aee1d66cd68aa8b42e49a2371e56c459b83aa682ef38",
  "full_fingerprint": "dc5ab168f0dd17bc0c6f161b59307c4da3ed1e5ac4279ffb308fe8f54accccf8"}"""


def make(kind: str, **fields) -> ImageTokenizer:
    return ImageTokenizer(TokenizerConfig(**FIELDS | {"quantizer": kind} | fields), ImageTransform(SIZE, CHANNELS), None).eval()


def fingerprints(tokenizer: ImageTokenizer) -> tuple[str, str]:
    """The token fingerprint and the full fingerprint."""
    return tokenizer._fingerprints(tokenizer._export_weights())


@pytest.mark.parametrize("kind", QUANTIZER_NAMES)
def test_every_quantizer_can_be_saved_and_loaded(kind, tmp_path):
    tokenizer = make(kind)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    loaded = ImageTokenizer.from_pretrained(tmp_path / "tokenizer")
    if kind == "kl":  # on some CPUs, rounding of narrow matrix products depends on memory alignment
        torch.testing.assert_close(loaded.reconstruct(images()), tokenizer.reconstruct(images()), rtol=1e-4, atol=1e-5)
    else:
        assert torch.equal(loaded.reconstruct(images()), tokenizer.reconstruct(images()))
    assert loaded.token_fingerprint == tokenizer.token_fingerprint
    if kind != "kl":
        ids = tokenizer.encode(images())
        assert torch.equal(loaded.encode(images()), ids)
        assert ids.shape == (4, *tokenizer.grid_shape) and ids.shape[3:] == ((4,) if kind == "residual" else ())
        torch.testing.assert_close(loaded.decode(ids), tokenizer.forward(images()).reconstructions.detach())


def test_tokenizer_without_ids_refuses_encode_and_decode_but_reconstructs():
    tokenizer = make("kl")
    for call in (lambda: tokenizer.encode(images()), lambda: tokenizer.decode(torch.zeros(1, 8, 8, dtype=torch.int64))):
        with pytest.raises(InputError, match=r"kl.*continuous"):
            call()
    assert tokenizer(images()).quantizer.ids is None
    assert tokenizer.reconstruct(images()).shape == images().shape


@pytest.mark.parametrize("kind, shape, words", [("residual", (1, 8, 8), r"\(1, 8, 8\).*\(B, h, w, 4\)"), ("residual", (1, 8, 8, 3), "B, h, w, 4"),
                                                ("ema", (1, 8, 8, 1), r"\(B, h, w\)")])
def test_ids_with_a_wrong_depth_are_refused(kind, shape, words):
    with pytest.raises(InputError, match=words):
        make(kind).decode(torch.zeros(shape, dtype=torch.int64))


def test_folder_of_an_earlier_version_loads_with_its_fingerprints(tmp_path):
    config = json.loads(EARLIEST_CONFIG)
    tokenizer = ImageTokenizer(TokenizerConfig(**config["network"]), ImageTransform(8, 1), None)
    state = tokenizer.state_dict()
    names = sorted(state.keys() - {"quantizer.ema_counts", "quantizer.ema_sums", "quantizer.commits"})
    weights = {name: ((torch.arange(state[name].numel()) % 7 - 3) / 8).view_as(state[name]) for name in names}
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(EARLIEST_CONFIG)
    loaded = ImageTokenizer.from_pretrained(tmp_path)  # checks the fingerprints in config.json
    assert (loaded.token_fingerprint, loaded.full_fingerprint) == (config["token_fingerprint"], config["full_fingerprint"])
    loaded.save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert again["token_fingerprint"] == config["token_fingerprint"] and again["network"].keys() > config["network"].keys()


def test_only_fields_that_affect_the_network_change_fingerprints():
    assert fingerprints(make("ema")) == fingerprints(make("ema", gumbel_temperature=2.0, rotation_trick=True, codebook_weight=3.0, kl_weight=1.0))
    assert fingerprints(make("residual"))[0] != fingerprints(make("residual", residual_shared=True))[0]
    assert set(ALWAYS_FINGERPRINTED_FIELDS) | set(LEARNING_FIELDS) <= vars(TokenizerConfig()).keys()


@pytest.mark.parametrize("kind", [kind for kind in QUANTIZER_NAMES if kind != "kl"])
def test_token_fingerprint_covers_all_exported_quantizer_tensors(kind):
    tokenizer = make(kind)
    before = fingerprints(tokenizer)
    exported = {name for name in tokenizer._export_weights() if name.startswith("quantizer.")}
    with torch.no_grad():
        for name in exported:
            tensor = tokenizer.state_dict()[name]
            tensor.view(-1)[0] += 1
            after = fingerprints(tokenizer)
            tensor.view(-1)[0] -= 1
            assert after[0] != before[0], name


def test_every_config_field_is_used():
    """Some source file reads it as `config.<field>`."""
    sources = "".join(path.read_text() for path in Path(__file__).parent.parent.joinpath("stage1_tokenizer").rglob("*.py"))
    assert [name for name in vars(TokenizerConfig()) if f"config.{name}" not in sources] == []
