"""Fields chosen from the data: the chosen values, fields set by hand, and values that a started run keeps."""

import dataclasses
import json

import pytest
from PIL import Image

from pipelines.stages.chain import longer_training_hint
from pipelines.stages.count_images import count_images
from pipelines.stages.stage_checks import check_before_start
from stage1_tokenizer.image_files.views import named_views
from tests.tiny import fields_of
from vqmosaic.errors import InputError
from vqmosaic.recipes.fields_from_data import ASSUMED_IMAGES, BUDGETS, RULES, DataSize, Facts, describe_choices
from vqmosaic.recipes.recipe_files import load_recipe, save_recipe, shipped_names
from vqmosaic.recipes.view_lists import VIEW_COUNTS
from vqmosaic.runs.run_folder import RunFolder
from vqmosaic.runs.stage_records import write_record


def load(*overrides: str, images: int | None = None, **settings):
    return load_recipe("image_folder", list(overrides), count_images=lambda recipe: images and DataSize(images), **settings)


@pytest.mark.parametrize(("size", "side"), [(16, 8), (28, 7), (32, 8), (48, 6), (56, 7), (64, 8), (96, 12), (128, 16), (192, 12), (512, 16)])
def test_grid_size_follows_image_size(size, side):
    recipe = load(f"--data.image_size={size}")
    assert recipe.num_tokens == side**2 and recipe.tokenizer.downsampling == size // side


def test_unusual_image_size_gets_the_closest_grid():
    assert load("--data.image_size=100").num_tokens == 25**2
    assert load("--data.image_size=25").num_tokens == 25**2


@pytest.mark.parametrize("patch_size", [1, 2, 4, 8])
def test_levels_follow_a_given_patch_size(patch_size):
    recipe = load("--data.image_size=64", f"--tokenizer.patch_size={patch_size}")
    assert recipe.tokenizer.patch_size == patch_size and recipe.num_tokens == 64


def test_fewer_images_get_more_views_and_fewer_steps():
    few, some, many = (load(images=images) for images in (500, 5000, 50_000))
    assert [recipe.tokens.views for recipe in (few, some, many)] == ["flip+wide-shifts", "flip+shifts", "flip"]
    assert few.data.shift == some.data.shift > many.data.shift == 0
    assert few.prior.dropout > some.prior.dropout == many.prior.dropout
    epochs = [recipe.prior_training.max_steps * recipe.prior_training.batch_size / images
              for recipe, images in ((few, 500), (some, 5000), (many, 50_000))]
    assert epochs == pytest.approx([57, 34, 11], rel=0.01), "more views allow more epochs"
    assert load("--tokens.views=flip", images=500).prior_training.max_steps < few.prior_training.max_steps
    assert load(images=60).tokenizer.codebook_size < few.tokenizer.codebook_size == many.tokenizer.codebook_size


def test_diveq_is_chosen_only_where_it_applies():
    assert load().tokenizer.diveq and load("--tokenizer.quantizer=residual").tokenizer.diveq
    assert not load("--tokenizer.quantizer=fsq", "--tokenizer.codebook_size=1000").tokenizer.diveq
    assert not load("--tokenizer.rotation_trick=true").tokenizer.diveq


@pytest.mark.parametrize("name", list(VIEW_COUNTS))
def test_view_counts_match_the_views(name):
    assert len(named_views(name)) == VIEW_COUNTS[name]


def test_epochs_follow_the_views_of_existing_tokens():
    data = DataSize(4000, views=1)
    recipe = load_recipe("image_folder", ["--prior_training.tokens=elsewhere"], count_images=lambda recipe: data)
    assert recipe.prior_training.max_steps == 8 * 4000 / 32
    listed = load("--tokens.views=[{}, {flip: true}, {shift: [1, 0]}, {shift: [0, 1]}]", images=4000)
    assert listed.prior_training.max_steps == 16 * 4000 / 32


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.choose.__name__)
def test_rule_chooses_exactly_the_fields_it_declares(rule):
    values = fields_of(load("--tokenizer.kind=hierarchical", images=500))
    assert tuple(choice.field for choice in rule.choose(values, Facts(lambda: DataSize(500), lambda: False))) == rule.fields


def test_data_set_is_not_opened_if_all_fields_are_set(tmp_path):
    def count(recipe):
        raise AssertionError("the data set was opened")

    save_recipe(load(images=500), tmp_path / "all.yaml")
    assert load_recipe(str(tmp_path / "all.yaml"), count_images=count).tokens.views == "flip+wide-shifts"


@pytest.mark.parametrize(("option", "message"), [
    ("--tokens.views=flips", r"tokens\.views.*flips.*Did you mean"), ("--prior_training.batch_size=0", r"prior_training\.batch_size is 0"),
    ("--tokenizer.patch_size=0", r"tokenizer\.patch_size is 0"), ("--data.image_size=0", r"data\.image_size is 0"),
    ("--tokenizer.channel_multipliers=[]", r"tokenizer\.channel_multipliers is \[\]"),
    ("--tokenizer.channel_multipliers=[1,1,1,1,1,1,1,1]", r"data\.image_size is 64"),
    ("--data.image_size=250", r"data\.image_size is 250, which makes 125 x 125 tokens.*such as 256"), ("--minutes=0", "^minutes is 0"),
    ("--minutes=-4", "^minutes is -4"),
])
def test_invalid_values_read_by_rules_are_rejected(option, message):
    with pytest.raises(InputError, match=message):
        load(option, images=500)


def test_patch_size_follows_given_levels():
    recipe = load("--tokenizer.channel_multipliers=[1,1,2,4]")
    assert recipe.num_tokens == 64 and recipe.tokenizer.patch_size == 1 and recipe.tokenizer.residual_blocks == 1
    assert load("--tokenizer.channel_multipliers=[1,2]").num_tokens == 64


def test_no_mirrored_views_if_flips_are_off():
    for images in (500, 5000, 50_000):
        recipe = load("--data.flip=false", images=images)
        assert not recipe.tokens.mirrors


def test_shifted_views_fit_the_smallest_images():
    for size in (16, 17, 24):
        assert load(f"--data.image_size={size}", images=500).tokens.view_shift == 1


def test_every_chosen_field_can_be_set(tmp_path):
    names = chosen_fields()
    chosen = {name: value for name, value in fields_of(load(images=500)).items() if name in names}
    other = {
        **chosen, "tokenizer.patch_size": 4, "tokenizer.channel_multipliers": [1, 1], "tokenizer.residual_blocks": 1, "tokenizer.channels": 96,
        "tokenizer.codebook_size": 100, "tokenizer.diveq": False, "tokenizer_training.batch_size": 5, "tokenizer_training.max_minutes": 3.0,
        "data.shift": 1, "tokens.views": "none", "tokens.view_shift": 1, "prior.dropout": 0.05, "prior_training.batch_size": 7,
        "prior_training.max_steps": 11, "prior_training.max_minutes": 4.0}
    assert all(other[name] != value for name, value in chosen.items()), "each value must differ from the rule's"
    options = [f"--{name}={json.dumps(value) if isinstance(value, list) else value}" for name, value in other.items()]
    assert fields_of(load(*options, images=500)).items() >= other.items()
    file = tmp_path / "mine.yaml"
    save_recipe(load(*options, images=500), file)
    assert fields_of(load_recipe(str(file), count_images=lambda recipe: DataSize(20_000))).items() >= other.items(), "also in a recipe file"


def chosen_fields() -> set[str]:
    """Fields that rules choose in the recipe image_folder."""
    return {name for stage in ("tokenizer", "prior") for name in describe_choices(load(images=500), stage, DataSize(500), on_gpu=False)}


def test_plan_shows_choices_with_reasons_and_fields_set_by_hand():
    lines = describe_choices(load("--prior.dropout=0.25", images=500), "prior", DataSize(500), on_gpu=False)
    assert lines["tokens.views"] == "flip+wide-shifts: 500 training images, data.flip is true"
    assert lines["prior.dropout"] == "0.25, as set; the rule gives 0.2"
    assert not any(name.startswith(("tokenizer", "data")) for name in lines), "the plan of the tokenizer shows these"


def test_a_run_inside_its_data_set_is_rejected(tmp_path):
    (tmp_path / "photos/cat").mkdir(parents=True)
    for index in range(3):
        Image.new("RGB", (16, 16), (index, 0, 0)).save(tmp_path / "photos/cat" / f"{index}.png")
    for stage in ("tokenizer", "tokens"):
        with pytest.raises(InputError, match=r"run_dir is .* inside data\.path .* Set --run_dir to a folder outside"):
            check_before_start(load(f"--data.path={tmp_path / 'photos'}", f"--run_dir={tmp_path / 'photos/runs/x'}"), stage, alone=False)
    assert check_before_start(load(f"--data.path={tmp_path / 'photos'}", f"--run_dir={tmp_path / 'runs/x'}"), "tokenizer") == "start"


def test_longer_training_hint():
    hint = longer_training_hint(load("--minutes=2"))
    assert "1 min for the tokenizer and 1 min for the prior" in hint and hint.endswith("add --minutes 4 --redo tokens")
    hint = longer_training_hint(load("--minutes=null", "--tokenizer_training.max_minutes=5", "--prior_training.max_minutes=5"))
    assert hint.endswith("add --tokenizer_training.max_minutes 10 --redo tokens")
    assert longer_training_hint(load("--prior_training.max_minutes=null")) == "", "time did not end the training"


def test_minutes_are_divided_and_given_max_minutes_stay():
    recipe = load("--minutes=120")
    assert (recipe.tokenizer_training.max_minutes, recipe.prior_training.max_minutes) == (60, 60)
    recipe = load("--minutes=120", "--prior_training.max_minutes=5")
    assert (recipe.tokenizer_training.max_minutes, recipe.prior_training.max_minutes) == (60, 5)
    recipe = load_recipe("digits", ["--minutes=3"])
    assert [getattr(recipe, section).max_minutes for section in ("tokenizer_training", "prior_training")] == [1.5, 1.5], "in every recipe"


@pytest.mark.parametrize("name", sorted(set(shipped_names()) - {"image_folder"}))
def test_other_recipes_do_not_depend_on_the_data(name):
    assert load_recipe(name) == load_recipe(name, count_images=lambda recipe: DataSize(7))


def test_default_number_of_images_without_a_data_set():
    assert load_recipe("image_folder") == load(images=ASSUMED_IMAGES) == load_recipe("image_folder", count_images=count_images)


def start_stage(recipe, stage: str, run) -> None:
    """Write the record of a started stage, as the stages do."""
    (run / "stages").mkdir(parents=True, exist_ok=True)
    write_record(RunFolder(run), recipe, stage, {}, finished=False)


def test_started_stage_keeps_its_values_when_images_are_added(tmp_path):
    run = tmp_path / "run"
    first = load(f"--run_dir={run}", images=500)
    start_stage(first, "tokenizer", run)
    again = load(f"--run_dir={run}", images=20_000)
    assert again.tokenizer == first.tokenizer and again.data == first.data and again.tokenizer_training == first.tokenizer_training
    assert again.tokens.views == load(images=20_000).tokens.views != first.tokens.views, "the stage tokens has not started"
    assert again.prior.dropout == load(images=20_000).prior.dropout
    redone = load(f"--run_dir={run}", images=20_000, redo_stage="tokenizer")
    assert redone.tokenizer_training == load(images=20_000).tokenizer_training
    assert load(f"--run_dir={run}", images=20_000, redo_stage="prior").data.shift == first.data.shift


def test_new_budget_is_divided_in_a_started_run(tmp_path):
    run = tmp_path / "run"
    recipe = load(f"--run_dir={run}", "--minutes=10", images=500)
    start_stage(recipe, "tokenizer", run)  # writes recipe.yaml as well
    assert load(f"--run_dir={run}", images=500).tokenizer_training.max_minutes == 5, "the run keeps its budget"
    for name in ("image_folder", str(run)):
        longer = load_recipe(name, [f"--run_dir={run}", "--minutes=60"], count_images=lambda recipe: DataSize(500))
        assert [getattr(longer, field.partition(".")[0]).max_minutes for field in BUDGETS] == [30, 30]
    assert load_recipe(str(run)) == dataclasses.replace(recipe, run_dir=str(run))


def test_started_run_keeps_its_budget_unless_an_option_changes_it(tmp_path):
    run, file = tmp_path / "run", tmp_path / "mine.yaml"
    file.write_text(f"run_dir: {run}\nminutes: 30\n")
    start_stage(load_recipe(str(file)), "tokenizer", run)
    file.write_text(f"run_dir: {run}\nminutes: 60\n")
    assert load_recipe(str(file)).tokenizer_training.max_minutes == 15
    assert load_recipe(str(file), ["--minutes=60"]).tokenizer_training.max_minutes == 30
