"""The image tokenizer: encoding and decoding, strict loading, fingerprints, and the layers of taming's VQModel."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from stage1_tokenizer import ImageTokenizer
from stage1_tokenizer.image_files.images import ImageTransform
from stage1_tokenizer.networks import AttentionBlock, Decoder, Downsample, Encoder, ResidualBlock, Upsample
from tests.run_files import change_weights, edit_json
from vqmosaic.errors import InputError
from vqmosaic.recipes.tokenizer_sections import HIERARCHICAL_FIELDS, TokenizerConfig

SIZE, CHANNELS, K, D = 16, 3, 40, 6
TINY = {"codebook_size": K, "code_dim": D, "latent_channels": 16, "channels": 32, "channel_multipliers": [1, 2, 2], "residual_blocks": 1,
        "attention_levels": [2]}


def make(seed: int = 0, **fields) -> ImageTokenizer:
    """A tokenizer whose codebook is initialized from latents, so that many codes are used."""
    tokenizer = ImageTokenizer(TokenizerConfig(**TINY | fields), ImageTransform(SIZE, CHANNELS), ["cat", "dog"], seed).eval()
    with torch.no_grad():
        latents_BDhw = tokenizer.latents(images(32, seed=1))
    tokenizer.quantizer.initialize(latents_BDhw.permute(0, 2, 3, 1).reshape(-1, D))
    return tokenizer


def images(count: int = 4, seed: int = 0) -> torch.Tensor:
    coarse = torch.randn(count, CHANNELS, 4, 4, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse, SIZE, mode="bilinear").clamp(-1, 1)


@pytest.fixture(scope="module")
def tokenizer() -> ImageTokenizer:
    return make()


@pytest.fixture
def folder(tmp_path) -> Path:
    make().save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


# --- images and ids --------------------------------------------------------------------------------------------------------------


def test_encode_and_decode_match_forward(tokenizer):
    images_BCHW = images()
    output = tokenizer(images_BCHW)
    ids_Bhw = tokenizer.encode(images_BCHW)
    assert ids_Bhw.shape == (4, 4, 4) and ids_Bhw.dtype == torch.int64
    assert ids_Bhw.min() >= 0 and ids_Bhw.max() < K and len(ids_Bhw.unique()) > 10
    assert torch.equal(ids_Bhw, output.quantizer.ids)
    decoded_BCHW = tokenizer.decode(ids_Bhw)
    assert decoded_BCHW.shape == images_BCHW.shape and decoded_BCHW.dtype == torch.float32
    assert torch.equal(decoded_BCHW, output.reconstructions)


def test_encode_does_not_depend_on_the_batch(tokenizer):
    images_BCHW = images()
    one_by_one = torch.cat([tokenizer.encode(image[None]) for image in images_BCHW])
    assert torch.equal(one_by_one, tokenizer.encode(images_BCHW))


def test_encode_ignores_autocast_training_mode_and_dtype():
    tokenizer = make(dropout=0.5)
    expected = tokenizer.encode(images())
    tokenizer.train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(tokenizer.encode(images()), expected)
    assert tokenizer.training and not tokenizer.quantizer._pending, "encode does not affect training"
    assert torch.equal(tokenizer.encode(images().double()), expected)


@pytest.mark.parametrize("shape", [(4, CHANNELS, SIZE, 2 * SIZE), (4, 1, SIZE, SIZE), (CHANNELS, SIZE, SIZE)])
def test_images_with_a_wrong_shape_are_refused(tokenizer, shape):
    with pytest.raises(InputError, match=re.escape(f"(B, {CHANNELS}, {SIZE}, {SIZE})")):
        tokenizer.encode(torch.zeros(shape))


@pytest.mark.parametrize("bad", [-1, K])
def test_ids_out_of_range_are_refused(tokenizer, bad):
    ids_Bhw = torch.zeros(2, 4, 4, dtype=torch.int64)
    ids_Bhw[1, 2, 3] = bad
    with pytest.raises(InputError, match=f"allowed: 0 to {K - 1}"):
        tokenizer.decode(ids_Bhw)


def test_decode_of_an_empty_batch(tokenizer):
    assert tokenizer.decode(torch.zeros(0, 4, 4, dtype=torch.int64)).shape == (0, CHANNELS, SIZE, SIZE)


def test_weights_depend_on_the_seed_and_keep_the_global_rng_state():
    state = torch.random.get_rng_state()
    first, second, other = (ImageTokenizer(TokenizerConfig(**TINY), ImageTransform(SIZE), seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), state)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name])
    assert not torch.equal(first.decoder.last_layer, other.decoder.last_layer)


# --- files -----------------------------------------------------------------------------------------------------------------------


def test_saving_and_loading_is_bit_exact(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "saved")
    loaded = ImageTokenizer.from_pretrained(tmp_path / "saved")
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == ["config.json", "model.safetensors"]
    assert loaded.class_names == ["cat", "dog"] and loaded.transform == tokenizer.transform and loaded.config == tokenizer.config
    assert not loaded.training and not any(parameter.requires_grad for parameter in loaded.parameters())
    ids_Bhw = loaded.encode(images())
    assert torch.equal(ids_Bhw, tokenizer.encode(images()))
    assert torch.equal(loaded.decode(ids_Bhw), tokenizer.decode(ids_Bhw))
    loaded.save_pretrained(tmp_path / "again")
    assert (loaded.token_fingerprint, loaded.full_fingerprint) == (tokenizer.token_fingerprint, tokenizer.full_fingerprint)
    assert (tmp_path / "again/model.safetensors").read_bytes() == (tmp_path / "saved/model.safetensors").read_bytes()


def test_export_contains_float32_inference_weights_only(folder, tokenizer):
    weights = load_file(folder / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert not tokenizer.training_only_names() & weights.keys() and "quantizer.codebook" in weights


def test_saving_replaces_a_tokenizer_but_no_other_folder(tokenizer, tmp_path):
    make(seed=5).save_pretrained(tmp_path / "tokenizer")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    assert ImageTokenizer.from_pretrained(tmp_path / "tokenizer").full_fingerprint == tokenizer.full_fingerprint
    (tmp_path / "empty").mkdir()
    tokenizer.save_pretrained(tmp_path / "empty")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/holiday.jpg").write_text("dear to me")
    with pytest.raises(InputError, match="would be lost"):
        tokenizer.save_pretrained(tmp_path / "photos")
    assert (tmp_path / "photos/holiday.jpg").exists()


def test_mismatched_weights_are_listed(folder):
    def change(weights):
        del weights["encoder.conv_in.bias"]
        weights["encoder.conv_in.colour"] = torch.zeros(1)
        weights["decoder.conv_out.bias"] = torch.zeros(7)

    change_weights(folder, change)
    with pytest.raises(InputError) as error:
        ImageTokenizer.from_pretrained(folder)
    for words in ("missing encoder.conv_in.bias", "unexpected encoder.conv_in.colour", "decoder.conv_out.bias has shape (7,), not (3,)"):
        assert words in str(error.value)


@pytest.mark.parametrize("name", ["encoder.conv_in.weight", "quantizer.codebook", "decoder.conv_out.weight"])
def test_modified_weight_is_refused(folder, name):
    change_weights(folder, lambda weights: weights[name].view(-1)[0].add_(1e-3))
    with pytest.raises(InputError, match="has changed since it was exported"):
        ImageTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("length", [0, 5, 1000])
def test_truncated_file_is_refused(folder, length):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(InputError, match="truncated"):
        ImageTokenizer.from_pretrained(folder)


def test_folder_without_a_tokenizer_or_of_a_later_version_is_refused(folder, tmp_path):
    with pytest.raises(InputError, match="is not a tokenizer"):
        ImageTokenizer.from_pretrained(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"format_version": 99}))
    with pytest.raises(InputError, match="version 99"):
        ImageTokenizer.from_pretrained(folder)


def test_token_fingerprint_covers_only_what_determines_ids(tmp_path):
    tokenizer = make()
    tokenizer.save_pretrained(tmp_path / "first")
    token_fingerprint_before, full_fingerprint_before = tokenizer.token_fingerprint, tokenizer.full_fingerprint
    with torch.no_grad():
        tokenizer.decoder.conv_out.bias.add_(0.1)
    tokenizer.save_pretrained(tmp_path / "decoder")
    assert tokenizer.token_fingerprint == token_fingerprint_before and tokenizer.full_fingerprint != full_fingerprint_before
    with torch.no_grad():
        tokenizer.quantizer.codebook[0, 0] += 0.1
    tokenizer.save_pretrained(tmp_path / "codebook")
    assert tokenizer.token_fingerprint != token_fingerprint_before
    tokenizer = make()
    tokenizer.transform = ImageTransform(2 * SIZE, CHANNELS)
    tokenizer.save_pretrained(tmp_path / "transform")
    assert tokenizer.token_fingerprint != token_fingerprint_before
    other_training = make(dropout=0.1, commitment_weight=1.0, ema_decay=0.5, revival_threshold=0.0)
    other_training.save_pretrained(tmp_path / "learning")
    assert other_training.token_fingerprint == token_fingerprint_before, "training settings do not change the fingerprint"


def test_bf16_changes_the_decoder_only(folder):
    exact = ImageTokenizer.from_pretrained(folder)
    bf16_tokenizer = ImageTokenizer.from_pretrained(folder, dtype=torch.bfloat16)
    dtypes = {name: tensor.dtype for name, tensor in bf16_tokenizer.state_dict().items() if tensor.is_floating_point()}
    for name, dtype in dtypes.items():
        assert dtype == (torch.bfloat16 if name.startswith(("decoder.", "post_quant_conv.")) else torch.float32), name
    ids_Bhw = bf16_tokenizer.encode(images(16))
    assert torch.equal(ids_Bhw, exact.encode(images(16)))
    assert (bf16_tokenizer.token_fingerprint, bf16_tokenizer.full_fingerprint) == (exact.token_fingerprint, exact.full_fingerprint)
    decoded = bf16_tokenizer.decode(ids_Bhw)
    assert decoded.dtype == torch.float32
    assert (decoded - exact.decode(ids_Bhw)).abs().mean() < 0.02
    assert torch.equal(bf16_tokenizer(images(16)).reconstructions.float(), decoded)


# --- layout ----------------------------------------------------------------------------------------------------------------------


def conv_shapes(module: nn.Module) -> list[tuple[int, ...]]:
    return sorted(tuple(layer.weight.shape) for layer in module.modules() if isinstance(layer, nn.Conv2d))


def block(channels_in: int, channels_out: int) -> list[tuple[int, ...]]:
    """Convolutions of taming's ResnetBlock: conv1, conv2, and nin_shortcut if the width changes."""
    return [(channels_out, channels_in, 3, 3), (channels_out, channels_out, 3, 3),
            *([(channels_out, channels_in, 1, 1)] if channels_in != channels_out else [])]


def attention(channels: int) -> list[tuple[int, ...]]:
    """Convolutions of taming's AttnBlock: q, k, v, proj_out."""
    return 4 * [(channels, channels, 1, 1)]


def test_layers_without_residual_blocks():
    config = TokenizerConfig(**TINY | {"residual_blocks": 0, "channel_multipliers": [1, 1], "attention_levels": [1]})
    tokenizer = ImageTokenizer(config, ImageTransform(SIZE, CHANNELS))
    middle = [*block(32, 32), *attention(32), *block(32, 32)]
    assert conv_shapes(tokenizer.encoder) == sorted([(32, 3, 3, 3), (32, 32, 3, 3), *middle, (16, 32, 3, 3)])
    levels = [*block(32, 32), *attention(32), (32, 32, 3, 3), *block(32, 32)]
    assert conv_shapes(tokenizer.decoder) == sorted([(32, 16, 3, 3), *middle, *levels, (3, 32, 3, 3)])
    images_BCHW = torch.rand(2, CHANNELS, SIZE, SIZE) * 2 - 1
    assert tokenizer.decode(tokenizer.encode(images_BCHW)).shape == images_BCHW.shape


def test_layers_match_taming_vqmodel():
    """The layers of taming/modules/diffusionmodules/model.py for ddconfig ch 32, ch_mult [1, 2, 2], num_res_blocks 2, attn_resolutions [4],
    z_channels 16, resolution 16, in_channels 3, and embed_dim 6."""
    config = TokenizerConfig(**TINY | {"residual_blocks": 2})
    encoder = [(32, 3, 3, 3),
               *block(32, 32), *block(32, 32), (32, 32, 3, 3),                                                         # level 0, downsample
               *block(32, 64), *block(64, 64), (64, 64, 3, 3),                                                         # level 1, downsample
               *block(64, 64), *attention(64), *block(64, 64), *attention(64),                                         # level 2 has attention
               *block(64, 64), *attention(64), *block(64, 64), (16, 64, 3, 3)]                                         # middle, conv_out
    decoder = [(64, 16, 3, 3), *block(64, 64), *attention(64), *block(64, 64),                                         # conv_in, middle
               *block(64, 64), *attention(64), *block(64, 64), *attention(64), *block(64, 64), *attention(64), (64, 64, 3, 3),  # level 2, upsample
               *block(64, 64), *block(64, 64), *block(64, 64), (64, 64, 3, 3),                                         # level 1, upsample
               *block(64, 32), *block(32, 32), *block(32, 32), (3, 32, 3, 3)]                                          # level 0, conv_out
    tokenizer = ImageTokenizer(config, ImageTransform(SIZE, CHANNELS))
    assert conv_shapes(tokenizer.encoder) == sorted(encoder)
    assert conv_shapes(tokenizer.decoder) == sorted(decoder)
    assert tokenizer.quant_conv.weight.shape == (6, 16, 1, 1) and tokenizer.post_quant_conv.weight.shape == (16, 6, 1, 1)
    norms = [layer for layer in tokenizer.modules() if isinstance(layer, nn.GroupNorm)]
    blocks_of_encoder, attentions_of_encoder, blocks_of_decoder, attentions_of_decoder = 6 + 2, 2 + 1, 9 + 2, 3 + 1
    expected = 2 * (blocks_of_encoder + blocks_of_decoder) + attentions_of_encoder + attentions_of_decoder + 2  # plus one before each conv_out
    assert len(norms) == expected
    assert {(norm.num_groups, norm.eps, norm.affine) for norm in norms} == {(32, 1e-6, True)}


def test_attention_can_be_disabled():
    config = TokenizerConfig(**TINY | {"attention_levels": [], "middle_attention": False})
    tokenizer = ImageTokenizer(config, ImageTransform(SIZE, CHANNELS))
    pointwise = [shape for shape in conv_shapes(tokenizer) if shape[2:] == (1, 1)]
    assert len(pointwise) == 2 + 1 + 1  # quant_conv, post_quant_conv, and the shortcuts of 32 -> 64 and 64 -> 32


def test_attention_block_matches_its_1x1_convolutions():
    """In both memory formats."""
    block = AttentionBlock(TokenizerConfig(**TINY), 32)
    for x_BCHW in (images := torch.randn(2, 32, 6, 4), images.to(memory_format=torch.channels_last)):
        normed_BCHW = block.norm(x_BCHW)
        query, key, value = (layer(normed_BCHW).flatten(2).mT for layer in (block.query, block.key, block.value))  # (B, HW, C)
        mixed_BNC = (query @ key.mT / 32**0.5).softmax(-1) @ value
        expected_BCHW = x_BCHW + block.out(mixed_BNC.mT.view(2, 32, 6, 4))
        torch.testing.assert_close(block(x_BCHW), expected_BCHW, rtol=1e-4, atol=1e-5)


def test_convnext_block_matches_the_paper():
    """Depthwise convolution, LayerNorm over channels, and a feed-forward block of four times the width. No layer uses GroupNorm."""
    config = TokenizerConfig(**TINY | {"block": "convnext"})
    tokenizer = ImageTokenizer(config, ImageTransform(SIZE, CHANNELS)).eval()
    assert not any(isinstance(layer, (nn.GroupNorm, ResidualBlock)) for layer in tokenizer.modules())
    block = tokenizer.encoder.levels[1][0]  # 32 -> 64 channels
    x_BCHW = torch.randn(2, 32, 6, 6)
    start_BCHW = F.conv2d(x_BCHW, block.shortcut.weight, block.shortcut.bias)
    kernel_C33 = block.depthwise.weight[:, 0]
    windows_BC33HW = F.unfold(start_BCHW, 3, padding=1).view(2, 64, 3, 3, 6, 6)
    hidden_BCHW = torch.einsum("bcijhw,cij->bchw", windows_BC33HW, kernel_C33) + block.depthwise.bias[:, None, None]
    mean, variance = hidden_BCHW.mean(1, keepdim=True), hidden_BCHW.var(1, keepdim=True, unbiased=False)
    hidden_BHWC = ((hidden_BCHW - mean) / (variance + 1e-6).sqrt()).permute(0, 2, 3, 1)  # the norm starts as the identity
    hidden_BHWC = F.silu(hidden_BHWC @ block.widen.weight.T + block.widen.bias) @ block.narrow.weight.T + block.narrow.bias
    torch.testing.assert_close(block(x_BCHW), start_BCHW + hidden_BHWC.permute(0, 3, 1, 2), rtol=1e-4, atol=1e-5)
    assert block.widen.weight.shape == (256, 64)


def test_convnext_blocks_have_less_than_half_of_the_parameters():
    parameter_counts = []
    for block in ("resnet", "convnext"):
        tokenizer = ImageTokenizer(TokenizerConfig(channels=96, channel_multipliers=[1], block=block), ImageTransform(SIZE, CHANNELS))
        blocks = (*tokenizer.encoder.levels.parameters(), *tokenizer.decoder.levels.parameters())
        parameter_counts.append(sum(parameter.numel() for parameter in blocks))
    assert parameter_counts[1] < 0.5 * parameter_counts[0]


def test_convnext_tokenizer_can_be_saved_and_loaded(tmp_path):
    tokenizer, images_BCHW = make(block="convnext"), images()
    ids_Bhw = tokenizer.encode(images_BCHW)
    assert len(ids_Bhw.unique()) > 10
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    loaded = ImageTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert torch.equal(loaded.encode(images_BCHW), ids_Bhw) and torch.equal(loaded.decode(ids_Bhw), tokenizer.decode(ids_Bhw))
    assert loaded.token_fingerprint != make().fingerprint_of_tokens()
    channels_last = loaded.to(memory_format=torch.channels_last)
    torch.testing.assert_close(channels_last(images_BCHW.contiguous(memory_format=torch.channels_last)).reconstructions,
                               tokenizer.decode(ids_Bhw), rtol=1e-4, atol=1e-5)


def test_unknown_block_is_refused():
    with pytest.raises(InputError, match=r"tokenizer\.block.*'convnex'.*resnet, convnext"):
        TokenizerConfig(block="convnex")


def test_downsampling_pads_right_and_bottom():
    """With a kernel that is 1 in its upper left corner, output (i, j) is input (2i, 2j). Symmetric padding would give (2i - 1, 2j - 1)."""
    layer, x_BCHW = Downsample(1), torch.arange(64.0).view(1, 1, 8, 8)
    with torch.no_grad():
        layer.conv.weight.zero_()
        layer.conv.weight[0, 0, 0, 0] = 1
        layer.conv.bias.zero_()
        assert torch.equal(layer(x_BCHW), x_BCHW[:, :, ::2, ::2])
        layer.conv.weight.zero_()
        layer.conv.weight[0, 0, 2, 2] = 1
        assert torch.equal(layer(x_BCHW)[0, 0, -1], torch.zeros(4)), "the padding is at the bottom"


def test_upsampling_repeats_pixels():
    layer, x_BCHW = Upsample(1), torch.arange(16.0).view(1, 1, 4, 4)
    with torch.no_grad():
        layer.conv.weight.zero_()
        layer.conv.weight[0, 0, 1, 1] = 1
        layer.conv.bias.zero_()
        assert torch.equal(layer(x_BCHW), x_BCHW.repeat_interleave(2, 2).repeat_interleave(2, 3))


def test_residual_and_attention_blocks_match_taming():
    """Against taming's forward passes with the same weights."""
    config = TokenizerConfig(**TINY | {"attention_levels": [0], "channel_multipliers": [2]})
    encoder = Encoder(config, CHANNELS).eval()
    residual, attend = encoder.levels[0][0], encoder.levels[0][1]
    x_BCHW = torch.randn(2, 32, 8, 8)
    with torch.no_grad():
        hidden = residual.conv1(F.silu(F.group_norm(x_BCHW, 32, residual.norm1.weight, residual.norm1.bias, 1e-6)))
        hidden = residual.conv2(F.silu(F.group_norm(hidden, 32, residual.norm2.weight, residual.norm2.bias, 1e-6)))
        expected = residual.shortcut(x_BCHW) + hidden
        torch.testing.assert_close(residual(x_BCHW), expected)
        b, c, h, w = expected.shape
        normed = F.group_norm(expected, 32, attend.norm.weight, attend.norm.bias, 1e-6)
        q = attend.query(normed).reshape(b, c, h * w).permute(0, 2, 1)
        k = attend.key(normed).reshape(b, c, h * w)
        weights = torch.softmax(torch.bmm(q, k) * c**-0.5, dim=2)
        v = attend.value(normed).reshape(b, c, h * w)
        mixed = torch.bmm(v, weights.permute(0, 2, 1)).reshape(b, c, h, w)
        torch.testing.assert_close(attend(expected), expected + attend.out(mixed), rtol=1e-4, atol=1e-5)


def test_last_layer_is_the_weight_of_the_output_convolution(tokenizer):
    decoder = Decoder(TokenizerConfig(**TINY), CHANNELS)
    assert decoder.last_layer is decoder.conv_out.weight and decoder.last_layer.shape == (CHANNELS, 32, 3, 3)
    assert list(dict(decoder.named_parameters()))[-2:] == ["conv_out.weight", "conv_out.bias"]
    gradient, = torch.autograd.grad(decoder(torch.randn(1, 16, 4, 4)).sum(), decoder.last_layer)
    assert gradient.abs().sum() > 0


def test_config_file_contains_every_field(folder):
    content = json.loads((folder / "config.json").read_text())
    fields = dataclasses.asdict(TokenizerConfig(**TINY))
    assert content["network"] == {name: value for name, value in fields.items() if name not in HIERARCHICAL_FIELDS}
    assert content["transform"] == {"image_size": SIZE, "channels": CHANNELS, "resampling": "bicubic"}


@pytest.mark.parametrize(("field", "value"), [("network", [1]), ("transform", None), ("token_fingerprint", 3), ("full_fingerprint", None)])
def test_config_with_a_field_of_another_type_is_refused(folder, field, value):
    edit_json(folder / "config.json", **{field: value})
    with pytest.raises(InputError, match=rf"config.json: {field} is {re.escape(repr(value))}; it must be"):
        ImageTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("channels_last", [False, True])
def test_attention_uses_inputs_that_efficient_kernels_accept(channels_last, monkeypatch):
    """Channels of queries, keys and values lie side by side. Otherwise torch computes attention with a matrix of all pairs of positions."""
    block, strides = AttentionBlock(TokenizerConfig(**TINY), 32), []
    x = torch.randn(2, 32, 4, 4, generator=torch.Generator().manual_seed(0))
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    attention = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention",
                        lambda *inputs, **options: strides.extend(each.stride(-1) for each in inputs) or attention(*inputs, **options))
    assert block(x).shape == x.shape and strides == [1, 1, 1]


def test_loaded_tokenizer_keeps_its_codebook_in_training(tmp_path):
    """Exports contain no moving averages. With averages of a random codebook, the first commit would overwrite all codes."""
    from stage1_tokenizer.image_files.images import ImageTransform
    from stage1_tokenizer.tokenizer import ImageTokenizer
    from vqmosaic.recipes.tokenizer_sections import TokenizerConfig

    config = TokenizerConfig(codebook_size=16, code_dim=4, latent_channels=32, channels=32, channel_multipliers=[1, 1], residual_blocks=1)
    tokenizer = ImageTokenizer(config, ImageTransform(image_size=16, channels=1))
    tokenizer.quantizer.initialize(5 + torch.randn(400, 4, generator=torch.Generator().manual_seed(0)))
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    loaded = ImageTokenizer.from_pretrained(tmp_path / "tokenizer")
    before = loaded.quantizer.codebook.clone()
    loaded.train()
    loaded.quantizer(before.T.reshape(1, 4, 4, 4))  # each code is used once, so no code should move
    loaded.quantizer.commit()
    assert torch.allclose(loaded.quantizer.codebook, before, atol=1e-3)
