"""The tokenizer with two levels: data flow, ids, saving and loading, fingerprints, every quantizer on each level, its recipe fields."""

import dataclasses
import json

import pytest
import torch

from pipelines.stages.stage_checks import check_before_start
from stage1_tokenizer import ImageTokenizer, load_tokenizer
from stage1_tokenizer.image_files.images import ImageTransform
from stage1_tokenizer.tokenizer_grids import grids_of_tokenizer
from stage1_tokenizer.trainable.hierarchical_tokenizer import HierarchicalTokenizer
from tests.tiny import fields_of, tiny_recipe
from token_shards import Grid
from vqmosaic.errors import InputError
from vqmosaic.recipes.fields_from_data import DataSize, describe_choices
from vqmosaic.recipes.recipe_files import load_recipe, save_recipe
from vqmosaic.recipes.tokenizer_sections import HIERARCHICAL_FIELDS, QUANTIZER_NAMES, TokenizerConfig

FIELDS = {"kind": "hierarchical", "codebook_size": 64, "code_dim": 5, "latent_channels": 16, "channels": 32, "channel_multipliers": [1, 1],
          "residual_blocks": 0, "top": {"codebook_size": 16, "code_dim": 3}}
SIZE, CHANNELS = 16, 3
GRIDS = [Grid("top", 16, 4, 4), Grid("bottom", 64, 8, 8)]


def make(size=SIZE, seed: int = 0, top: dict | None = None, **fields) -> HierarchicalTokenizer:
    config = TokenizerConfig(**FIELDS | {"top": FIELDS["top"] | (top or {})} | fields)
    return HierarchicalTokenizer(config, ImageTransform(size, CHANNELS), ["a", "b"], seed).eval()


def images(count: int = 3, size: int = SIZE) -> torch.Tensor:
    return torch.rand(count, CHANNELS, size, size, generator=torch.Generator().manual_seed(5)) * 2 - 1


def fingerprints(tokenizer: HierarchicalTokenizer) -> tuple[str, str]:
    """The token fingerprint and the full fingerprint."""
    return tokenizer._fingerprints(tokenizer._export_weights())


# --- data flow ---------------------------------------------------------------------------------------------------------------


def test_decoding_the_ids_equals_the_forward_pass():
    tokenizer = make()
    ids, output = tokenizer.encode(images()), tokenizer(images())
    assert tokenizer.grids == GRIDS and {name: tuple(grid_ids.shape) for name, grid_ids in ids.items()} == {"top": (3, 4, 4), "bottom": (3, 8, 8)}
    assert all(torch.equal(ids[name], level.ids) for name, level in output.levels.items())
    torch.testing.assert_close(tokenizer.decode(ids), output.reconstructions.detach())
    assert torch.equal(tokenizer.reconstruct(images()), tokenizer.decode(ids))
    assert output.quantizer_loss.item() == pytest.approx(sum(level.loss.item() for level in output.levels.values()))
    with pytest.raises(ValueError, match="too many values"):
        _ = output.quantizer


def test_one_image_gives_the_same_ids_as_a_batch():
    tokenizer = make()
    ids = tokenizer.encode(images())
    alone = [tokenizer.encode(image_CHW[None]) for image_CHW in images()]
    assert all(torch.equal(torch.cat([part[name] for part in alone]), grid_ids) for name, grid_ids in ids.items())


def test_the_bottom_latents_depend_on_the_top_codes_and_not_the_reverse():
    tokenizer = make()
    before = {name: tokenizer.latents(images(), name) for name in ("top", "bottom")}
    assert [tuple(latents.shape) for latents in before.values()] == [(3, 3, 4, 4), (3, 5, 8, 8)]
    tokenizer.top_quantizer.codebook.add_(1)
    assert torch.equal(tokenizer.latents(images(), "top"), before["top"])
    assert not torch.allclose(tokenizer.latents(images(), "bottom"), before["bottom"])
    tokenizer = make()
    tokenizer.bottom_quantizer.codebook.add_(1)
    assert all(torch.equal(tokenizer.latents(images(), name), latents) for name, latents in before.items())


def test_the_decoder_sees_both_grids():
    tokenizer = make()
    ids = tokenizer.encode(images())
    restored_BCHW = tokenizer.decode(ids)
    for name, codes in (("top", 16), ("bottom", 64)):
        assert not torch.allclose(tokenizer.decode(ids | {name: (ids[name] + 1) % codes}), restored_BCHW)


@pytest.mark.parametrize("size, factor, fields, shapes", [
    (32, 4, {"channel_multipliers": [1], "patch_size": 4}, [(2, 2), (8, 8)]), ([16, 32], 2, {}, [(4, 8), (8, 16)]), (16, 4, {}, [(2, 2), (8, 8)]),
    (16, 2, {"channel_multipliers": [1, 2], "residual_blocks": 1, "attention_levels": [1], "middle_attention": False}, [(4, 4), (8, 8)])])
def test_sizes_and_factors(size, factor, fields, shapes):
    tokenizer = make(size, top_factor=factor, **fields)
    assert [(grid.height, grid.width) for grid in tokenizer.grids] == shapes == list(tokenizer.level_sides.values())
    images_BCHW = torch.zeros(1, CHANNELS, *tokenizer.transform.sides)
    assert tokenizer.reconstruct(images_BCHW).shape == images_BCHW.shape
    assert any("query" in name for name, _ in tokenizer.top_encoder.named_parameters()) == bool(fields.get("attention_levels", True))


def test_all_parameters_get_gradients_and_all_statistics_are_committed():
    tokenizer = make().train()
    output = tokenizer(images())
    (output.reconstructions.square().mean() + output.quantizer_loss).backward()
    assert [name for name, parameter in tokenizer.named_parameters() if parameter.grad is None or not parameter.grad.isfinite().all()] == []
    before = {name: quantizer.codes().clone() for name, quantizer in tokenizer.quantizers.items()}
    tokenizer.discard()
    tokenizer.commit()
    assert all(torch.equal(quantizer.codes(), before[name]) for name, quantizer in tokenizer.quantizers.items()), "discarded"
    tokenizer(images())
    tokenizer.commit()
    assert not any(torch.equal(quantizer.codes(), before[name]) for name, quantizer in tokenizer.quantizers.items())


def test_seeds_determine_the_weights():
    first, same, other = make(), make(), make(seed=1)
    assert all(torch.equal(tensor, same.state_dict()[name]) for name, tensor in first.state_dict().items())
    for part in (*first.TOKEN_PARTS, *first.DECODER_PARTS):
        assert any(not torch.equal(tensor, other.state_dict()[f"{part}.{name}"]) for name, tensor in getattr(first, part).state_dict().items()), part


# --- every quantizer ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", ["top", "bottom"])
@pytest.mark.parametrize("kind", QUANTIZER_NAMES)
def test_every_quantizer_on_each_level(kind, level, tmp_path):
    settings = {"quantizer": kind, "residual_depth": 2}
    tokenizer = make(top=settings) if level == "top" else make(top={"quantizer": "ema"}, **settings)
    assert {name: quantizer.KIND for name, quantizer in tokenizer.quantizers.items()} == {"top": "ema", "bottom": "ema"} | {level: kind}
    restored_BCHW = tokenizer.reconstruct(images())
    tokenizer.train()
    tokenizer.set_progress(0.5)
    output = tokenizer(images())
    (output.reconstructions.square().mean() + output.quantizer_loss).backward()
    assert all(parameter.grad is not None for parameter in tokenizer.parameters())
    tokenizer.discard()
    tokenizer.eval().save_pretrained(tmp_path / "tokenizer")
    loaded = load_tokenizer(tmp_path / "tokenizer")
    assert loaded.grids == tokenizer.grids == grids_of_tokenizer(tmp_path / "tokenizer")
    torch.testing.assert_close(loaded.reconstruct(images()), restored_BCHW, rtol=1e-4, atol=1e-5)
    if kind == "kl":
        assert tokenizer.grids == []
        for call in (lambda: tokenizer.encode(images()), lambda: tokenizer.decode({})):
            with pytest.raises(InputError, match=r"quantizer is 'kl', whose latents are continuous"):
                call()
        return
    ids = tokenizer.encode(images())
    assert all(torch.equal(loaded.encode(images())[name], grid_ids) for name, grid_ids in ids.items())
    assert ids[level].shape[3:] == ((2,) if kind == "residual" else ())
    torch.testing.assert_close(loaded.decode(ids), tokenizer(images()).reconstructions.detach())


# --- files -------------------------------------------------------------------------------------------------------------------


def test_saving_and_loading(tmp_path):
    tokenizer = make(top={"residual_depth": 2})
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    content = json.loads((tmp_path / "tokenizer/config.json").read_text())
    assert content["format"] == "vqmosaic.hierarchical_tokenizer" and "kind" not in content["network"]
    assert content["network"]["top"] == {"codebook_size": 16, "code_dim": 3, "residual_depth": 2} and content["network"]["top_factor"] == 2
    assert [grid["name"] for grid in content["grids"]] == ["top", "bottom"] and grids_of_tokenizer(tmp_path / "tokenizer") == GRIDS
    loaded = load_tokenizer(tmp_path / "tokenizer")
    assert isinstance(loaded, HierarchicalTokenizer) and loaded.config == tokenizer.config and loaded.class_names == ["a", "b"]
    assert (loaded.token_fingerprint, loaded.full_fingerprint) == fingerprints(tokenizer)
    ids = tokenizer.encode(images())
    assert all(torch.equal(loaded.encode(images())[name], grid_ids) for name, grid_ids in ids.items())
    assert torch.equal(loaded.decode(ids), tokenizer.decode(ids))
    assert not any(name.endswith(("ema_counts", "ema_sums", "commits")) for name in tokenizer._export_weights())
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again/config.json").read_bytes() == (tmp_path / "tokenizer/config.json").read_bytes()
    with pytest.raises(InputError, match=r"ImageTokenizer reads 'vqmosaic.image_tokenizer'"):
        ImageTokenizer.from_pretrained(tmp_path / "tokenizer")


def test_a_decoder_in_bf16_keeps_the_ids(tmp_path):
    tokenizer = make()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    loaded = load_tokenizer(tmp_path / "tokenizer", dtype="bfloat16")
    ids = tokenizer.encode(images())
    assert all(torch.equal(loaded.encode(images())[name], grid_ids) for name, grid_ids in ids.items())
    torch.testing.assert_close(loaded.decode(ids), tokenizer.decode(ids), rtol=0.1, atol=0.05)


def test_fingerprints_cover_what_determines_the_ids():
    tokenizer = make()
    token_fingerprint, full_fingerprint = fingerprints(tokenizer)
    for part in (*tokenizer.TOKEN_PARTS, *tokenizer.DECODER_PARTS):
        names = {name for name in tokenizer._export_weights() if name.startswith(f"{part}.")}
        assert names, part
        with torch.no_grad():
            tensor = tokenizer.state_dict()[sorted(names)[0]]
            before = tensor.clone()
            tensor.view(-1)[0] += 1
            after = fingerprints(tokenizer)
            tensor.copy_(before)
        assert after[1] != full_fingerprint and (after[0] != token_fingerprint) == (part in tokenizer.TOKEN_PARTS), part
    parts = {name.partition(".")[0] for name in tokenizer.state_dict()}
    assert parts == {*tokenizer.TOKEN_PARTS, *tokenizer.DECODER_PARTS}


def test_only_settings_with_an_effect_change_fingerprints():
    same = [{"commitment_weight": 1.0}, {"top": {"commitment_weight": 1.0, "residual_depth": 2, "quantizer": "ema"}}, {"kl_weight": 1.0}]
    assert {fingerprints(make(**changes)) for changes in same} == {fingerprints(make())}
    for changes in ({"top": {"l2_normalize": True}}, {"l2_normalize": True, "top": {"l2_normalize": False}}, {"middle_attention": False}):
        assert fingerprints(make(**changes))[0] != fingerprints(make())[0], changes


def test_files_of_image_tokenizers_do_not_change(tmp_path):
    config = TokenizerConfig(**{name: value for name, value in FIELDS.items() if name not in HIERARCHICAL_FIELDS})
    ImageTokenizer(config, ImageTransform(SIZE, CHANNELS)).save_pretrained(tmp_path / "tokenizer")
    content = json.loads((tmp_path / "tokenizer/config.json").read_text())
    assert not {*HIERARCHICAL_FIELDS} & content["network"].keys() and "grids" not in content


@pytest.mark.parametrize("change, message", [
    (lambda ids: ids["bottom"], r"a tensor of shape \(3, 8, 8\), but this tokenizer has the grids top, bottom"),
    (lambda ids: {"top": ids["top"]}, "of the grids top; this tokenizer has: top, bottom"),
    (lambda ids: ids | {"top": ids["top"] + 16}, r"token ids of grid 'top' run from .*; allowed: 0 to 15"),
    (lambda ids: ids | {"bottom": ids["bottom"][..., None]}, r"token ids of grid 'bottom' have shape \(3, 8, 8, 1\)"),
    (lambda ids: ids | {"bottom": ids["bottom"][:, :6]}, r"'top' have shape \(3, 4, 4\) and those of grid 'bottom' \(3, 6, 8\).* 2 times"),
    (lambda ids: ids | {"bottom": ids["bottom"][:2]}, "as many images in both")])
def test_wrong_ids_are_refused(change, message):
    tokenizer = make()
    with pytest.raises(InputError, match=message):
        tokenizer.decode(change(tokenizer.encode(images())))


def test_classes_refuse_the_other_kind():
    for kind, needed in ((ImageTokenizer, "image"), (HierarchicalTokenizer, "hierarchical")):
        config = TokenizerConfig(**FIELDS) if needed == "image" else TokenizerConfig()
        with pytest.raises(InputError, match=rf"tokenizer.kind is .*; {kind.__name__} needs '{needed}'"):
            kind(config, ImageTransform(SIZE, CHANNELS))


# --- recipe fields -----------------------------------------------------------------------------------------------------------


def test_the_top_level_has_its_own_quantizer_fields():
    config = TokenizerConfig(**FIELDS | {"top": {"quantizer": "residual", "residual_depth": 2}})
    top, bottom = config.levels["top"], config.levels["bottom"]
    assert list(config.levels) == ["top", "bottom"] and bottom is config
    assert (top.quantizer, top.depth, top.codebook_size, top.channels) == ("residual", 2, 64, 32) and (bottom.quantizer, bottom.depth) == ("ema", 1)
    assert list(TokenizerConfig().levels) == ["image"]


@pytest.mark.parametrize("fields, message", [
    ({"kind": "hierarchicl"}, "tokenizer.kind is 'hierarchicl'.*Did you mean 'hierarchical'"),
    ({"top_factor": 3}, "tokenizer.top_factor is 3; it must be a power of two of at least 2"), ({"top_factor": 1}, "tokenizer.top_factor is 1"),
    ({"top": {"codebook": 4}}, "tokenizer.top sets 'codebook'; allowed.*Did you mean 'codebook_size'"),
    ({"top": {"channels": 64}}, "tokenizer.top sets 'channels'.*All other fields are the same for both grids"),
    ({"top": {"codebook_size": 1}}, "tokenizer.top.codebook_size is 1; it must be at least 2"),
    ({"top": {"codebook_size": "many"}}, "tokenizer.top.codebook_size is 'many'; it must be an integer"),
    ({"top": {"quantizer": "vq"}}, "tokenizer.top.quantizer is 'vq'; allowed"), ({"top": 4}, "tokenizer.top is 4; it must be a mapping"),
    ({"top": {"quantizer": "fsq", "codebook_size": 11}}, "tokenizer.top.codebook_size is 11, but tokenizer.top.quantizer fsq"),
    ({"top": {"quantizer": "lfq", "codebook_size": 12}}, "tokenizer.top.codebook_size is 12, but tokenizer.top.quantizer lfq"),
    ({"diveq": True, "top": {"quantizer": "fsq"}}, "tokenizer.top.diveq is true, but tokenizer.top.quantizer is 'fsq'"),
    ({"kind": "image"}, "tokenizer.top sets codebook_size, code_dim, but tokenizer.kind is 'image'")])
def test_invalid_fields_are_refused(fields, message):
    with pytest.raises(InputError, match=message):
        TokenizerConfig(**FIELDS | fields)


def test_recipes_set_entries_of_top_by_name(tmp_path):
    recipe = load_recipe("digits_vqvae2", ["--tokenizer.top.code_dim=4", f"--run_dir={tmp_path}"])
    assert recipe.tokenizer.top == {"codebook_size": 256, "code_dim": 4} and recipe.num_tokens == 4 + 16
    save_recipe(recipe, tmp_path / "recipe.yaml")
    assert load_recipe(str(tmp_path / "recipe.yaml")) == recipe
    with pytest.raises(InputError, match=r"there is no field 'tokenizer.tp'"):
        load_recipe("digits_vqvae2", ["--tokenizer.tp=4"])


@pytest.mark.parametrize("changes, message", [
    ({"data__image_size": 20}, "tokenizer.top_factor 2, it must be a multiple of 8 with at least 2 tokens per side of the top grid; set .* to 16"),
    ({"tokenizer__top_factor": 8}, "data.image_size is 16. .* multiple of 32 .*remove levels or lower tokenizer.top_factor"),
    ({"sampling__top_k": 300}, "sampling.top_k is 300, but tokenizer.top.codebook_size is 256"),
    ({"sampling__steps": 21, "prior__architecture": "grid_transformer", "prior_training__order": "annealed"}, "an image has 20 tokens")])
def test_combinations_are_checked_before_anything_starts(changes, message, tmp_path):
    with pytest.raises(InputError, match=message):
        tiny_recipe(tmp_path, **{"tokenizer__kind": "hierarchical", "tokenizer__top": '{"codebook_size": 256}', **changes})


@pytest.mark.parametrize("changes, section", [({"tokenizer__top": '{"quantizer": "kl"}'}, "tokenizer.top"),
                                              ({"tokenizer__quantizer": "kl", "tokenizer__top": '{"quantizer": "ema"}'}, "tokenizer")])
def test_both_levels_need_ids_for_tokens(changes, section, tmp_path):
    recipe = tiny_recipe(tmp_path / "run", tokenizer__kind="hierarchical", **changes)
    assert check_before_start(recipe, "tokenizer") == "start"
    with pytest.raises(InputError, match=f"^{section}.quantizer is 'kl', whose latents are continuous. Token shards and priors need discrete ids"):
        check_before_start(recipe, "tokens", alone=False)


def test_rules_choose_grids_and_codes_for_both_levels():
    def recipe_for(*options: str):
        return load_recipe("image_folder", ["--data.path=photos", *options], count_images=lambda fields: DataSize(20_000))

    two, one = recipe_for("--tokenizer.kind=hierarchical", "--data.image_size=64"), recipe_for("--data.image_size=64")
    assert two.tokenizer.codebook_size == one.tokenizer.codebook_size and two.tokenizer.downsampling == one.tokenizer.downsampling
    assert two.tokenizer.top == {"codebook_size": two.tokenizer.levels["top"].codebook_size} and one.tokenizer.top == {}
    assert "20,000 training images" in describe_choices(two, "tokenizer", DataSize(20_000), on_gpu=False)["tokenizer.top"]
    assert "tokenizer.top" not in describe_choices(one, "tokenizer", DataSize(20_000), on_gpu=False)
    own = recipe_for("--tokenizer.kind=hierarchical", "--tokenizer.top.code_dim=4")
    assert own.tokenizer.top == {"code_dim": 4}, "an entry that is set keeps the rule from choosing the field"
    uneven = recipe_for("--tokenizer.kind=hierarchical", "--data.image_size=[48,72]")
    assert {name: height * 72 == width * 48 for name, (height, width) in
            HierarchicalTokenizer(uneven.tokenizer, ImageTransform((48, 72), 3)).level_sides.items()} == {"top": True, "bottom": True}


def test_fields_without_levels_are_those_of_earlier_recipes(tmp_path):
    fields = fields_of(tiny_recipe(tmp_path))
    assert (fields["tokenizer.kind"], fields["tokenizer.top_factor"], fields["tokenizer.top"]) == ("image", 2, {})
    assert dataclasses.asdict(TokenizerConfig()).keys() >= {*HIERARCHICAL_FIELDS}
