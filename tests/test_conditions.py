"""The records of data.conditions: checks, defaults, recipes of their tokenizers, and the manifest's list of given grids."""

import dataclasses
import json

import pytest

from tests.tiny import fields_of, tiny_recipe
from token_shards.manifest import Grid, ShardSetHeader, TokenShardManifest
from vqmosaic.errors import InputError
from vqmosaic.recipes.conditions import ConditionConfig
from vqmosaic.recipes.recipe import Recipe, condition_recipe, fewer_pixels_per_token
from vqmosaic.recipes.recipe_files import load_recipe, save_recipe
from vqmosaic.recipes.recipe_sections import DataConfig
from vqmosaic.recipes.tokenizer_sections import TokenizerConfig
from vqmosaic.runs.run_folder import RunFolder
from vqmosaic.runs.stage_records import write_record

LOW = {"name": "low", "kind": "low_resolution", "factor": 2}
CAPTION = {"name": "text", "kind": "caption", "length": 24, "templates": ["a {class}", "the digit {class}"]}


def with_conditions(*records: dict) -> DataConfig:
    return DataConfig(source="digits", image_size=16, channels=1, conditions=list(records))


@pytest.mark.parametrize(("record", "message"), [
    (3, r"conditions\[0\] is 3; it must be a record"),
    ({"kind": "grey"}, r"conditions\[0\]\.name is None; it must be a string"),
    ({"name": "low"}, r"conditions\[0\]\.kind is None; allowed: low_resolution, edges"),
    ({"name": "low", "kind": "low_resoluton"}, "Did you mean 'low_resolution'"),
    ({"name": "low", "kind": "low_resolution"}, r"factor is not given; kind 'low_resolution' needs it"),
    ({"name": "low", "kind": "low_resolution", "factor": 3}, r"factor is 3, which does not divide the height .*one of 2, 4, 8, 16"),
    ({"name": "low", "kind": "low_resolution", "factor": 1}, "factor is 1; it must be at least 2"),
    ({"name": "low", "kind": "low_resolution", "factr": 2}, "a field is 'factr'; .*Did you mean 'factor'"),
    ({"name": "e", "kind": "edges", "factor": 2}, r"\(kind edges\): a field is 'factor'; allowed: name, kind, drop_rate, method"),
    ({"name": "e", "kind": "edges", "method": "prewitt"}, "method is 'prewitt'; allowed: sobel, canny"),
    ({"name": "e", "kind": "edges", "drop_rate": 1.5}, "drop_rate is 1.5; it must be at least 0 and at most 1"),
    ({"name": "e", "kind": "edges", "drop_rate": "often"}, "drop_rate is 'often'; it must be a number"),
    ({"name": "class", "kind": "grey"}, "name is 'class', which has another meaning"),
    ({"name": "image", "kind": "grey"}, "name is 'image', which has another meaning"),
    ({"name": "My edges", "kind": "grey"}, "name is 'My edges'; allowed: at most 30 lower case letters"),
    ({"name": "g", "kind": "grey", "tokenizer": "runs/grey/tokenizer", "network": {"codebook_size": 64}}, "has both tokenizer and network"),
    ({"name": "g", "kind": "grey", "network": 3}, "network is 3; it must be a mapping of fields of the section tokenizer"),
    ({"name": "m", "kind": "paired_folder"}, "path is not given"),
    ({"name": "m", "kind": "paired_folder", "path": "maps", "channels": 5}, "channels is 5; allowed: 1"),
    ({"name": "t", "kind": "caption"}, "length is not given"),
    ({"name": "t", "kind": "caption", "length": 0}, "length is 0; it must be at least 1"),
    ({"name": "t", "kind": "caption", "length": 10**12}, "length is 1000000000000; it must be .*at most 4096"),
    ({"name": "g", "kind": "grey"}, "of kind grey, but data.channels is 1"),
    ({"name": "t", "kind": "caption", "length": 8, "templates": ["a photo"]}, r"'a photo' does not contain \{class\}"),
    ({"name": "t", "kind": "caption", "length": 8, "held_out_templates": ["a {class}"]}, "no templates to train on"),
    ({"name": "t", "kind": "caption", "length": 8, "templates": ["a {class}"], "column": "text"}, "both templates and column"),
    ({"name": "t", "kind": "caption", "length": 8, "templates": ["a {class}"], "held_out_templates": ["a {class}"]}, "is also in templates"),
])
def test_records_are_checked(record, message):
    with pytest.raises(InputError, match=message):
        with_conditions(record)


def test_names_are_unique():
    with pytest.raises(InputError, match=r"conditions\[1\]\.name is 'low', which data\.conditions has already"):
        with_conditions(LOW, {"name": "low", "kind": "grey"})


def test_conditions_are_made_from_the_images_themselves():
    with pytest.raises(InputError, match=r"data\.derived and data\.conditions are both given"):
        DataConfig(source="digits", image_size=16, derived={"kind": "grey"}, conditions=[LOW])


@pytest.mark.parametrize(("record", "message"), [
    ({**LOW, "network": {"codebok_size": 8}}, r"network: a field is 'codebok_size'; .*Did you mean 'codebook_size'"),
    ({**LOW, "factor": 16}, r"data.conditions \(low\) needs a tokenizer .*the size of its images is 1"),
    ({**LOW, "network": {"channel_multipliers": [1, 1, 1, 1]}}, r"\(low\) needs a tokenizer .*the size of its images is 8"),
    ({**LOW, "training": {"max_steps": 0}}, r"tokenizer_training.max_steps is 0; .*\(low\)\.training"),
])
def test_tokenizers_of_conditions_are_checked(record, message, tmp_path):
    with pytest.raises(InputError, match=message):
        tiny_recipe(tmp_path, data__conditions=json.dumps([record]))


def test_records_omit_defaults_and_manifests_omit_paths():
    data = with_conditions({**LOW, "drop_rate": 0.25, "network": {"channels": 32}},
                           {"name": "e", "kind": "edges", "method": "sobel", "drop_rate": 0},
                           {"name": "m", "kind": "paired_folder", "path": "maps", "channels": 1}, {**CAPTION, "text_tokenizer": "gpt2"})
    assert data.conditions[1] == {"name": "e", "kind": "edges"}
    low, edges, maps, text = data.given_conditions
    assert (low.factor, low.drop_rate, edges.method, maps.path, text.length) == (2, 0.25, "sobel", "maps", 24)
    assert low.ids_record() == LOW and edges.ids_record() == {"name": "e", "kind": "edges", "method": "sobel"}
    assert maps.ids_record() == {"name": "m", "kind": "paired_folder", "channels": 1} and text.ids_record() == CAPTION
    assert maps.derivation() == {"kind": "paired_folder", "path": "maps", "channels": 1}


def test_recipe_round_trip_and_override(tmp_path):
    recipe = tiny_recipe(tmp_path / "run", data__conditions=json.dumps([LOW, CAPTION]), tokenizer__channel_multipliers="[1,1]")
    save_recipe(recipe, tmp_path / "recipe.yaml")
    assert load_recipe(str(tmp_path / "recipe.yaml")) == recipe
    assert load_recipe(str(tmp_path / "recipe.yaml"), ["--data.conditions=[]"]).data.conditions == []
    low = condition_recipe(recipe, recipe.data.given_conditions[0])
    assert low.run_dir == str(tmp_path / "run" / "conditions" / "low")
    assert low.data.derived == {"kind": "low_resolution", "factor": 2} and low.data.final_size == 8 and low.grid_sides == (8, 8)
    assert low.data.conditions == [] and low.tokenizer == dataclasses.replace(recipe.tokenizer, channel_multipliers=[1])
    save_recipe(low, tmp_path / "low.yaml")
    assert load_recipe(str(tmp_path / "low.yaml")) == low


def test_tokenizers_of_conditions_inherit_what_fits_them(tmp_path):
    recipe = tiny_recipe(tmp_path, adversarial__weight=0.1, adversarial__layers=1, tokenizer_training__perceptual_weight=1,
                         tokenizer_training__perceptual_loss="discriminator_features",
                         data__conditions=json.dumps([{**LOW, "network": {"channel_multipliers": [1, 1], "codebook_size": 16},
                                                       "training": {"max_steps": 3}}]))
    low = condition_recipe(recipe, recipe.data.given_conditions[0])
    assert (low.tokenizer.codebook_size, low.tokenizer_training.max_steps) == (16, 3)
    assert low.adversarial.weight == low.tokenizer_training.perceptual_weight == 0
    assert low.tokenizer_training.batch_size == recipe.tokenizer_training.batch_size


@pytest.mark.parametrize(("patch_size", "levels", "factor", "expected"), [
    (4, 1, 4, (1, 1)), (4, 1, 2, (2, 1)), (2, 2, 4, (1, 1)), (1, 3, 2, (1, 2)), (1, 3, 8, (1, 1)), (2, 2, 1, (2, 2)), (4, 1, 8, (1, 1))])
def test_low_resolutions_have_as_many_tokens_as_the_image(patch_size, levels, factor, expected):
    tokenizer = TokenizerConfig(patch_size=patch_size, channel_multipliers=[1, 2, 2][:levels], attention_levels=[levels - 1])
    condition = ConditionConfig(name="low", kind="low_resolution", factor=factor)
    changes = fewer_pixels_per_token(tokenizer, condition)
    changed = dataclasses.replace(tokenizer, **changes)
    assert (changed.patch_size, len(changed.channel_multipliers)) == expected
    assert changed.downsampling == max(1, tokenizer.downsampling // factor)
    condition.network = {"patch_size": 2}
    assert fewer_pixels_per_token(tokenizer, condition) == {}, "the recipe sets the size itself"


def test_recipes_without_conditions_are_written_as_before(tmp_path):
    recipe = tiny_recipe(tmp_path / "run")
    save_recipe(recipe, tmp_path / "recipe.yaml")
    run = RunFolder(tmp_path / "run")
    write_record(run, recipe, "tokens", {}, finished=False)
    for text in ((tmp_path / "recipe.yaml").read_text(), run.record("tokens").read_text()):
        assert "conditions" not in text and "derived" not in text
    assert {"data.conditions", "data.derived"} <= fields_of(Recipe()).keys()


def header(conditions: list, **changes) -> ShardSetHeader:
    grids = [Grid(name="image", codebook_size=8, height=2, width=2), Grid(name="low", codebook_size=8, height=1, width=1, token_fingerprint="b"),
             Grid(name="text", codebook_size=257, height=1, width=24, token_fingerprint="text:bytes")]
    return ShardSetHeader(**{"split": "train", "token_fingerprint": "a", "grids": grids, "views": [{}], "dataset": {}, "encoding": {},
                             "images_per_shard": 4, "num_sources": 4, "conditions": conditions, **changes})


def test_manifest_lists_the_given_grids(tmp_path):
    given = header([LOW, CAPTION])
    assert [grid.name for grid in given.drawn_grids] == ["image"] and given.to_dict()["conditions"] == [LOW, CAPTION]
    plain = header([])
    assert "conditions" not in plain.to_dict() and plain.fingerprint != given.fingerprint and len(plain.drawn_grids) == 3
    entry = {"name": "shard-000000.tar", "count": 4, "size": 1, "sha256": "c", "sidecar_sha256": "d"}
    content = given.to_dict() | {"num_samples": 4, "skipped": [], "sources_sha256": "e", "shards": [entry]}
    assert TokenShardManifest.from_dict(json.loads(json.dumps(content))).header == given
    del content["conditions"]
    assert TokenShardManifest.from_dict(content).header == dataclasses.replace(given, conditions=[])


@pytest.mark.parametrize(("conditions", "message"), [
    ([{"name": "edges", "kind": "edges"}], "conditions names the grid 'edges', but the grids are"),
    ([LOW, LOW], "each may be named once"),
    ([{"name": name, "kind": "grey"} for name in ("image", "low", "text")], "at least one grid must be drawn"),
    (["low"], "it must be a list of records with name and kind"),
    (5, "it must be a list of records with name and kind"),
    ([{"name": "low"}], "it must be a list of records with name and kind"),
])
def test_manifest_checks_the_given_grids(conditions, message):
    with pytest.raises(InputError, match=message):
        header(conditions)
